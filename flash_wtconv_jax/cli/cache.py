"""`flash-wtconv cache`: what was measured on this machine, shown, forgotten, and handed on."""

from pathlib import Path
from typing import Annotated

import typer

from flash_wtconv_jax.cli.messages import say
from pallas_kernels.common.types import Json

cache = typer.Typer(
    help="Show, forget and hand on what the tuner measured on this machine.", no_args_is_help=True
)

_Kind = Annotated[
    str | None, typer.Option("--device", help="A kind of device, as `show` names it. Default: all.")
]

_NOTHING = 'nothing was measured yet: implementation="auto" measures'


@cache.command("path")
def path() -> None:
    """Print the folder of the files, one a kind of device."""
    from pallas_kernels.dispatch.cache import user_cache

    typer.echo(user_cache().folder or "nowhere: there is no home to keep files in")


@cache.command("show")
def show(device: _Kind = None) -> None:
    """Print what won, how fast, and by how much, for every problem."""
    from rich.table import Table

    from flash_wtconv_jax.cli.tables import plain_console, print_table
    from pallas_kernels.dispatch.cache import user_cache

    if not user_cache().kinds():
        typer.echo(_NOTHING)
        return
    console = plain_console()
    for kind, entries in _entries(device).items():
        table = Table("operator", "problem", "fastest", title=kind)
        for heading in ("ms", "next"):
            table.add_column(heading, no_wrap=True)
        for entry in entries:
            timed = [one for one in entry["measured"] if "ms" in one]
            problem = ", ".join(f"{value}" for value in entry["problem"].values())
            if not timed:
                failed = entry["measured"][0]["failed"] if entry["measured"] else ""
                table.add_row(f"{entry['operator']} {entry['direction']}", problem, "", "", failed)
                continue
            first, second = timed[0], timed[1] if len(timed) > 1 else None
            table.add_row(
                f"{entry['operator']} {entry['direction']}",
                problem,
                _named(first),
                f"{first['ms']:.3g}",
                f"{_named(second)} x{second['ms'] / first['ms']:.2f}" if second else "",
            )
        print_table(console, table)


@cache.command("clear")
def clear(device: _Kind = None) -> None:
    """Forget what was measured."""
    from pallas_kernels.dispatch.cache import user_cache

    say(f"forgot {user_cache().clear(device)} entries")


@cache.command("export")
def export(
    file: Annotated[Path, typer.Argument(help="The JSON file to write.")],
    device: _Kind = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write what was measured into one file, for other machines of the same kinds."""
    from pallas_kernels.common.files import replacing
    from pallas_kernels.dispatch.cache import dumped

    entries = _entries(device)
    with replacing(file, force) as temporary:
        temporary.write_text(dumped(entries), encoding="utf-8")
    say(f"wrote {sum(map(len, entries.values()))} entries to {file}")


@cache.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A file that `export` wrote.")],
) -> None:
    """Add what was measured elsewhere; of what both know, the file's times count."""
    from pallas_kernels.common import versions
    from pallas_kernels.dispatch.cache import loaded, user_cache

    store = user_cache()
    try:
        devices = loaded(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} holds no exported measurements: {error}") from None
    for kind, entries in devices.items():
        store.keep(kind, entries)
    found = [entry for entries in devices.values() for entry in entries]
    kinds = ", ".join(devices) or "none"
    say(f"read {len(found)} entries of {kinds} and kept them in {store.folder}")
    ours = versions.package()
    others = sum(entry["versions"].get("flash-wtconv") != ours for entry in found)
    if others:
        say(f"of these, {others} of other versions than {ours} do not count here")


def _entries(device: str | None) -> dict[str, list[Json]]:
    """Entries by kind of device; an error where nothing was measured."""
    from pallas_kernels.dispatch.cache import user_cache

    store = user_cache()
    kinds = store.kinds()
    if device is not None and device not in kinds:
        raise ValueError(f"--device {device!r}: nothing was measured on it, but on {kinds}")
    found = {kind: store.entries(kind) for kind in kinds if device in (None, kind)}
    if not found:
        raise ValueError(_NOTHING)
    return found


def _named(measured: Json) -> str:
    from pallas_kernels.dispatch import Candidate

    return str(Candidate(measured["implementation"], tuple(measured["config"].items())))
