"""`flash-wtconv bench`: times beside a baseline, as tables, JSON files and pictures."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flash_wtconv_jax.bench.compiling import CONTENDERS, PROGRAMS, STEPS
from flash_wtconv_jax.cli.messages import say
from pallas_kernels.common.types import Json
from pallas_kernels.conv2d.shapes import SHAPES
from pallas_kernels.depthwise.shapes import FOR_PLATFORM as IMAGES
from pallas_kernels.mlp.shapes import SHAPES as MLPS
from pallas_kernels.sparse.depthwise.shapes import SHAPES as DEPTHWISE
from pallas_kernels.sparse.shapes import SHAPES as VOXELS
from pallas_kernels.stylize.convolution.shapes import SHAPES as STYLE_LAYERS
from pallas_kernels.stylize.shapes import SHAPES as STYLE_NORMS
from pallas_kernels.wtconv.shapes import FOR_PLATFORM
from pallas_kernels.wtconv.shapes import IMAGES as LAYERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from pallas_kernels.dispatch.table import Entry

bench = typer.Typer(
    help="Time the operators and networks beside plain ones, in one run.", no_args_is_help=True
)

_Progress = Callable[[str, int], Callable[[], None]]
_Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
_Device = Annotated[
    str | None, typer.Option(help="cpu, gpu or tpu. Default: the first that JAX has.")
]
_WriteDefaults = Annotated[
    bool,
    typer.Option(
        "--write-defaults",
        help="Time every implementation, and write which is the fastest into the package's "
        "table of this kind of device.",
    ),
]
_OUT = Path("runs/bench")


def _folder(files: str) -> Any:
    """The option `--out` of a benchmark that writes files into a folder."""
    return typer.Option(help=f"Folder for {files}.")


def _named(shapes: str | Mapping[str, Iterable[str]]) -> Any:
    """The option `--shape` of named ones, of each platform where each has its own."""
    if not isinstance(shapes, str):
        each = (f"on a {kind.upper()} {', '.join(names)}" for kind, names in shapes.items())
        shapes = "; ".join(each)
    return typer.Option(help=f"A named shape; several are allowed: {shapes}. Default: all.")


@bench.command("wtconv")
def wtconv(
    shape: Annotated[list[str] | None, _named(FOR_PLATFORM)] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="What ratios refer to: 'torch eager', 'plain jax', 'depthwise 7x7' or 'flash'. "
            "Default: the first of them that is here."
        ),
    ] = None,
    dtype: _Dtype = "float32",
    device: _Device = None,
    out: Annotated[Path, _folder("wtconv.json, wtconv.png and wtconv_roofline.png")] = _OUT,
    write_defaults: _WriteDefaults = False,
) -> None:
    """Time the wavelet convolution, forward and forward+backward."""
    from flash_wtconv_jax import plots
    from flash_wtconv_jax.bench import wtconv as benchmark
    from pallas_kernels.common.device import kind, platform

    with _measuring(device, out) as progress:
        known = FOR_PLATFORM[platform()]
        names = shape or list(known)
        if write_defaults:
            sizes = (known[name] for name in names if name in known)
            _tell_of_no_choice(benchmark.implementations(size, dtype) for size in sizes)
        keep = keeping(out)
        report = benchmark.run(names, baseline, progress, dtype, write_defaults, keep)
        device_kind = kind()
    figures = {"wtconv": plots.speedups, "wtconv_roofline": plots.roofline}
    tell(report, wtconv_table(report), figures, out)
    if write_defaults:
        _write_defaults(device_kind, benchmark.defaults(report))


@bench.command("wtconvnext")
def wtconvnext(
    model: Annotated[str, typer.Option(help="tiny, small or base.")] = "tiny",
    batch: Annotated[
        int | None, typer.Option(help="Images a call. Default: 128, on a CPU 4.")
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="Height and width of the images. Default: 224, on a CPU 64.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of the computation: float32, bfloat16 or float16; parameters are float32. "
            "Default: bfloat16, on a CPU float32."
        ),
    ] = None,
    work: Annotated[
        list[str] | None, typer.Option(help="inference or training. Default: both.")
    ] = None,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Print where the time goes, of programs without CUDA graphs; on a GPU.",
        ),
    ] = False,
    device: _Device = None,
    out: Annotated[Path, _folder("wtconvnext.json and .png")] = _OUT,
) -> None:
    """Time WTConvNeXt, inference and training steps, beside ConvNeXt of the same size."""
    from flash_wtconv_jax import plots
    from flash_wtconv_jax.bench import wtconvnext as benchmark
    from flash_wtconv_jax.cli.tables import plain_console, print_table

    with _measuring(device, out) as progress:
        sizes = batch, size, dtype
        report = benchmark.run(model, progress, *sizes, work, profile, keeping(out))
    if profile:
        print_table(plain_console(), _profile_table(report))
    tell(report, _wtconvnext_table(report), {"wtconvnext": plots.throughput}, out)


@bench.command("conv2d")
def conv2d(
    shape: Annotated[list[str] | None, _named(", ".join(SHAPES))] = None,
    dtype: _Dtype = "bfloat16",
    device: _Device = None,
    out: Annotated[Path, _folder("conv2d.json")] = _OUT,
    write_defaults: _WriteDefaults = False,
) -> None:
    """Time the dense 2-D convolution beside XLA's, alone and with padding, bias and activation."""
    from flash_wtconv_jax.bench import conv2d as benchmark

    _time(benchmark, _conv2d_table, shape, dtype, device, out, write_defaults)


@bench.command("depthwise")
def depthwise(
    shape: Annotated[list[str] | None, _named(IMAGES)] = None,
    dtype: _Dtype = "bfloat16",
    device: _Device = None,
    out: Annotated[Path, _folder("depthwise.json")] = _OUT,
    write_defaults: _WriteDefaults = False,
) -> None:
    """Time the depthwise convolution beside XLA's, in copies of its input."""
    from flash_wtconv_jax.bench import depthwise as benchmark

    _time(benchmark, _depthwise_table, shape, dtype, device, out, write_defaults)


@bench.command("haar")
def haar(
    shape: Annotated[list[str] | None, _named(LAYERS)] = None,
    dtype: _Dtype = "float32",
    device: _Device = None,
    out: Annotated[Path, _folder("haar.json")] = _OUT,
) -> None:
    """Time the Haar cascade of images, by each implementation, in copies of its input."""
    from flash_wtconv_jax.bench import haar as benchmark

    _time(benchmark, _haar_table, shape, dtype, device, out)


@bench.command("mlp")
def mlp(
    shape: Annotated[list[str] | None, _named(", ".join(MLPS))] = None,
    dtype: _Dtype = "bfloat16",
    device: _Device = None,
    out: Annotated[Path, _folder("mlp.json")] = _OUT,
    write_defaults: _WriteDefaults = False,
) -> None:
    """Time the pointwise MLP of ConvNeXt's blocks beside plain JAX."""
    from flash_wtconv_jax.bench import mlp as benchmark

    _time(benchmark, _mlp_table, shape, dtype, device, out, write_defaults)


@bench.command("sparse")
def sparse(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="A named layer; several are allowed: "
            f"{', '.join(VOXELS)}; {', '.join(f'depthwise_{name}' for name in DEPTHWISE)}. "
            "Default: all."
        ),
    ] = None,
    dtype: _Dtype = "bfloat16",
    device: _Device = None,
    out: Annotated[Path, _folder("sparse.json")] = _OUT,
    write_defaults: _WriteDefaults = False,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="Begin no layer after so many, and none that sparse.json has already: the same "
            "command goes on where it stopped. Default: time all layers."
        ),
    ] = None,
) -> None:
    """Time sparse convolutions of a room and their maps beside plain JAX."""
    from flash_wtconv_jax.bench import sparse as benchmark
    from pallas_kernels.common.device import kind

    with _measuring(device, out) as progress:
        names = shape or list(benchmark.NAMES)
        if write_defaults:
            known = (name for name in names if name in benchmark.NAMES)
            _tell_of_no_choice(benchmark.implementations(name, dtype) for name in known)
        before = None if minutes is None else _earlier(out / "sparse.json")
        report = benchmark.run(names, progress, dtype, minutes, before, keeping(out))
        device_kind = kind()
    tell(report, _sparse_table(report), {}, out)
    if report["left"]:
        say(f"not timed yet: {', '.join(report['left'])}")
    if write_defaults:
        _write_defaults(device_kind, benchmark.defaults(report))


@bench.command("stylize")
def stylize(
    work: Annotated[
        list[str] | None,
        typer.Option(
            help="norm, layer, network, ladder, training, style_vit or large; several are "
            "allowed. Default: all."
        ),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="A named norm or layer; several are allowed: "
            f"{', '.join(STYLE_NORMS)}; {', '.join(STYLE_LAYERS)}. "
            "Default: the norms of pictures of 512, and all layers."
        ),
    ] = None,
    size: Annotated[
        list[int] | None,
        typer.Option(
            help="Height and width of the networks' images; several are allowed. "
            "Default: 256, 512 and 1024, on a CPU 64."
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Images a call; several are allowed. Default: 1 and 8, on a CPU 1."),
    ] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="float32, bfloat16 or float16; several are allowed. Default: all, on a TPU "
            "without float16, on a CPU float32."
        ),
    ] = None,
    device: _Device = None,
    out: Annotated[Path, _folder("stylize.json and stylize.png")] = _OUT,
    write_defaults: _WriteDefaults = False,
) -> None:
    """Time style transfer: the norm over a copy, its layers and its networks beside plain JAX."""
    from flash_wtconv_jax import plots
    from flash_wtconv_jax.bench import stylize as benchmark
    from pallas_kernels.common.device import kind

    with _measuring(device, out) as progress:
        if write_defaults:
            names = [
                name for name in shape or benchmark.NAMES if name in (*STYLE_NORMS, *STYLE_LAYERS)
            ]
            _tell_of_no_choice(
                benchmark.implementations(name, one)
                for name in names
                for one in dtype or ("bfloat16", "float16", "float32")
            )
        report = benchmark.run(progress, work, shape, size, batch, dtype, keeping(out))
        device_kind = kind()
    tell(report, _stylize_table(report), {"stylize": plots.ladders}, out)
    if write_defaults:
        _write_defaults(device_kind, benchmark.defaults(report))


@bench.command("levels")
def levels(
    depth: Annotated[
        int | None, typer.Option(min=0, help="The most levels. Default: 5, on a CPU 3.")
    ] = None,
    kernel_size: Annotated[int, typer.Option(min=1, help="Taps along each axis.")] = 5,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images. Default: 128, on a CPU 4.")
    ] = None,
    size: Annotated[int, typer.Option(min=1, help="Height and width of the images.")] = 56,
    channels: Annotated[int, typer.Option(min=1, help="Channels of the images.")] = 96,
    dtype: _Dtype = "float32",
    device: _Device = None,
    out: Annotated[Path, _folder("levels.json")] = _OUT,
) -> None:
    """Time the layer at each number of levels, with its field and parameters, beside a 7x7."""
    from flash_wtconv_jax.bench import levels as benchmark
    from pallas_kernels.common.device import on_cpu
    from pallas_kernels.wtconv.shapes import Shape

    with _measuring(device, out) as progress:
        most = (3 if on_cpu() else 5) if depth is None else depth
        images = batch or (4 if on_cpu() else 128)
        shape = Shape(images, size, size, channels, most, kernel_size)
        report = benchmark.run(shape, progress, dtype)
    tell(report, _levels_table(report), {}, out)


@bench.command("sharding")
def sharding(
    part: Annotated[
        list[str] | None,
        typer.Option(help="operators, training or rows; several are allowed. Default: all."),
    ] = None,
    devices: Annotated[
        list[int] | None,
        typer.Option(
            help="Numbers of devices; several are allowed. Default: 1, 2, 4 and 8 of those here."
        ),
    ] = None,
    operator: Annotated[
        list[str] | None, typer.Option(help="Names of operators; several are allowed.")
    ] = None,
    device: _Device = None,
    out: Annotated[Path, _folder("sharding.json")] = _OUT,
    minutes: Annotated[
        float, typer.Option(help="Begin nothing after so many; what is left is named.")
    ] = 8.0,
) -> None:
    """Compare every operator over several devices with one, and time training and a large image.

    Operators are not timed: several processes may compare some each, beside each other.
    On a CPU, of 8 devices that share it, this shows that programs are right, and no times.
    """
    from flash_wtconv_jax.bench import devices as platforms
    from flash_wtconv_jax.bench import sharding as benchmark

    if device == "cpu":
        platforms.share_cpu(8)
    with _measuring(device, out) as progress:
        report = benchmark.run(progress, part, devices, operator, minutes, keeping(out))
    tell(report, _sharding_table(report), {}, out)
    if report["left"]:
        say(f"not run yet: {'; '.join(report['left'])}")
    wrong = [f"{row['label']}: {row['wrong']}" for row in report["rows"] if row["wrong"]]
    if wrong or report["failed"]:
        raise RuntimeError("; ".join(wrong + report["failed"]))


@bench.command("host")
def host(
    out: Annotated[Path, _folder("host.json")] = _OUT,
) -> None:
    """Time what Python takes for a warm eager call of layers and functions."""
    from flash_wtconv_jax.bench import host as benchmark

    with _measuring(None, out) as progress:
        report = benchmark.run(progress)
    tell(report, _host_table(report), {}, out)


@bench.command("compile")
def compile_(
    program: Annotated[
        list[str] | None,
        typer.Option(help=f"Several are allowed: {'; '.join(PROGRAMS)}. Default: all."),
    ] = None,
    device: _Device = None,
    out: Annotated[Path, _folder("compile.json")] = _OUT,
) -> None:
    """Time first calls with nothing cached: tracing, lowering, compiling, running."""
    from flash_wtconv_jax.bench import compiling as benchmark

    with _progress(out) as progress:
        report = benchmark.run(program or PROGRAMS, progress, device)
    tell(report, _compile_table(report), {}, out)


@bench.command("all")
def everything(
    device: Annotated[str, typer.Option(help="gpu; others have no published figures.")] = "gpu",
    out: Annotated[Path, _folder("a folder a part")] = _OUT,
    minutes: Annotated[
        float,
        typer.Option(help="End after so many; the same command goes on where it stopped."),
    ] = 9.0,
) -> None:
    """Make every figure and picture of a GPU, in parts that are made once."""
    from flash_wtconv_jax.bench import everything as benchmark

    left = benchmark.run(out, minutes, device, say)
    for name, (report, figures) in benchmark.merged(out).items():
        tell(report, wtconv_table(report), figures, out, name)
    made = "everything is made that the installed packages can make"
    say(f"not made yet: {', '.join(left)}" if left else made)


def _time(
    benchmark: Any,
    table: "Callable[[Json], Table]",
    shape: list[str] | None,
    dtype: str,
    device: str | None,
    out: Path,
    write_defaults: bool = False,
) -> None:
    """Runs the benchmark of an operator, a module of `bench`, and tells of it."""
    from pallas_kernels.common.device import kind

    with _measuring(device, out) as progress:
        known = benchmark.known()
        names = shape or list(known)
        if write_defaults:
            sizes = (known[name] for name in names if name in known)
            _tell_of_no_choice(benchmark.implementations(size, dtype) for size in sizes)
        report = benchmark.run(names, progress, dtype, keeping(out))
        device_kind = kind()
    tell(report, table(report), {}, out)
    if write_defaults:
        _write_defaults(device_kind, benchmark.defaults(report))


@contextmanager
def _measuring(device: str | None, out: Path) -> Iterator[_Progress]:
    """Runs a benchmark on a device with a progress bar; wrong options are errors before it."""
    import jax

    from flash_wtconv_jax import environment
    from flash_wtconv_jax.bench import devices

    environment.device()  # Where JAX has none, its reason is all there is to say.
    with _progress(out) as progress, jax.default_device(devices.first(device)):
        yield progress


@contextmanager
def _progress(out: Path) -> Iterator[_Progress]:
    """A progress bar, if what is measured can be written into a folder."""
    from rich.markup import escape
    from rich.progress import Progress

    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out {out} is a file, expected a folder")
    with Progress(transient=True) as bar:

        def progress(label: str, steps: int) -> Callable[[], None]:
            task = bar.add_task(escape(label), total=steps)
            return lambda: bar.advance(task)

        yield progress


def _tell_of_no_choice(able: Iterable[Sequence[str]]) -> None:
    """Says, before minutes of timing, where no shape has a choice of implementations.

    `run` tells of unknown shapes.
    """
    if max(map(len, able), default=2) < 2:
        say(
            "--write-defaults will write nothing: no shape has several implementations that can "
            "compute it here; 'flash-wtconv info' tells which can run"
        )


def _write_defaults(kind: str, entries: "Iterable[Entry]") -> None:
    """Writes entries, if there are any, into the package's table of a kind of device."""
    from pallas_kernels.dispatch import forget, table

    if not (found := list(entries)):
        return
    path = table.path(kind)
    path.parent.mkdir(exist_ok=True)
    _write(path, table.merged(kind, found))
    forget()


def tell(
    report: Json,
    table: "Table",
    figures: "Mapping[str, Callable[[Json], Figure]]",
    out: Path,
    name: str = "",
) -> None:
    """Prints the table; writes the report and the pictures.

    A picture that cannot be drawn is told of, and is no error: the report is there.

    Args:
        report: JSON-able, with the name of its `benchmark` and `no_device_events`, which is None
            or why a GPU was timed by the host's clock.
        table: A table of rich.
        figures: What draws pictures of the report, by the names of their files.
        out: The folder, made if it is not there.
        name: The name of the report's file, "" for that of its benchmark.
    """
    from flash_wtconv_jax.cli.tables import plain_console, print_table
    from pallas_kernels.common.files import making_folder

    console = plain_console()
    print_table(console, table)
    if report["no_device_events"]:
        console.print(f"by the host's clock: {report['no_device_events']}", soft_wrap=True)
    with making_folder(out):
        _write(out / f"{name or report['benchmark']}.json", json.dumps(report, indent=2))
        for figure, draw in figures.items():
            # Here, since a benchmark without pictures needs no matplotlib.
            from flash_wtconv_jax import plots

            path = out / f"{figure}.png"
            try:
                plots.save(draw(report), path)
            except Exception as error:  # Matplotlib fails in its own ways.
                typer.echo(f"warning: {path} could not be drawn: {error}", err=True)
            else:
                say(f"wrote {path}")


def keeping(out: Path) -> Callable[[Json], None]:
    """A function that writes the reports it is told into a folder, for runs that are stopped.

    Args:
        out: The folder, made if it is not there.
    """
    from pallas_kernels.common.files import making_folder, replacing

    def keep(report: Json) -> None:
        path = out / f"{report['benchmark']}.json"
        with making_folder(out), replacing(path, force=True) as temporary:
            temporary.write_text(json.dumps(report, indent=2))

    return keep


def _earlier(path: Path) -> Json | None:
    """The report that an earlier run wrote, None where there is none."""
    if not path.exists():
        return None
    try:
        report = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: no report ({error}); remove it, or give another --out") from None
    if not isinstance(report, dict) or not isinstance(report.get("rows"), list):
        raise ValueError(f"{path}: no report of a benchmark; remove it, or give another --out")
    return report


def _write(path: Path, text: str) -> None:
    from pallas_kernels.common.files import replacing

    with replacing(path, force=True) as temporary:
        temporary.write_text(text)
    say(f"wrote {path}")


_USERS = (
    "; times and x as users have them: one jit, called back to back by the host's clock, caches "
    "warm, CUDA graphs on (all other times: single calls, caches cold, graphs off)"
)


def wtconv_table(report: Json) -> "Table":
    """The table of a report: a section a shape, a row a contender, its medians and ratios.

    Args:
        report: A report of `bench.wtconv.run` or of PyTorch's benchmark.

    Returns:
        A table of rich.
    """
    from rich.table import Table

    roofs = report["roofs"]
    # PyTorch's has one.
    both_clocks = report.get("users_clock") is not None
    table = Table(
        title=f"WTConv, {report['dtype']}, {report['device']['kind']}",
        caption=f"median ms (least-greatest) by {_clock(report)}; floor: times over that of 2 and "
        f"5 passes at the {roofs['copy_bytes_per_s'] / 1e9:,.0f} GB/s of a copy; x: speed over "
        f"{report['baseline']}; flash: ours, and what computes it; memory: temporaries of "
        "forward+backward in inputs, and with its results" + (_USERS if both_clocks else ""),
    )
    table.add_column("", no_wrap=True)
    directions = list(dict.fromkeys(row["direction"] for row in report["rows"]))
    for direction in directions:
        for heading in (direction, "floor", "x", *(("as users", "x") if both_clocks else ())):
            table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("memory", justify="right", no_wrap=True)
    rows = {(r["shape"], r["contender"], r["direction"]): r for r in report["rows"]}
    previous = None
    for shape, contender in dict.fromkeys(key[:2] for key in rows):
        if shape != previous:
            table.add_section()
            table.add_row(shape, style="bold")
            previous = shape
        both = [rows[shape, contender, direction] for direction in directions]
        cells = [
            cell
            for row in both
            for cell in (
                *(_times(row), f"{row['over_floor']:.1f}", _speed(row)),
                *((_ms(row["users"]["median_ms"]), _speed(row["users"])) if both_clocks else ()),
            )
        ]
        memory, extra = both[-1]["temporaries"], both[-1]["extra_memory"]
        picked = both[0]["implementation"]
        name = f"{contender} ({'/'.join(dict.fromkeys(picked.values()))})" if picked else contender
        table.add_row(name, *cells, "" if memory is None else f"{memory:.1f}, {extra:.1f}")
    return table


def _wtconvnext_table(report: Json) -> "Table":
    """The table of a report: a row a network, for each kind of work images a second and times."""
    from rich.table import Table

    both_clocks = report["users_clock"] is not None
    table = Table(
        title=_network(report),
        caption=f"median ms (least-greatest) of a batch by {_clock(report)}; "
        f"x: speed over {report['baseline']}" + (_USERS if both_clocks else ""),
    )
    table.add_column("", no_wrap=True)
    rows = {(row["contender"], row["work"]): row for row in report["rows"]}
    works = list(dict.fromkeys(work for _, work in rows))
    # The images a second are the users'.
    headings = ("images/s", "x", "ms as users", "ms") if both_clocks else ("images/s", "x", "ms")
    for work in works:
        for heading in headings:
            table.add_column(f"{work}, {heading}", justify="right", no_wrap=True)
    for contender in dict.fromkeys(name for name, _ in rows):
        cells = []
        for row in (rows[contender, work] for work in works):
            first = row["users"] or row
            cells += [f"{first['images_per_s']:,.0f}", _speed(first)]
            cells += [_times(one) for one in (row["users"], row) if one]
        table.add_row(contender, *cells)
    return table


def _profile_table(report: Json) -> "Table":
    """The table of a report's profile: a section a kind of work and network, a row a part."""
    from rich.table import Table

    table = Table(
        title=f"where the time goes: {_network(report)}",
        caption="ms a batch of kernels and copies, and how many, by the scope of each one's last "
        "operation; CUDA graphs off",
    )
    _add_columns(table, ("forward", "kernels", "backward", "kernels", "share"))
    sections: dict[tuple[str, str], dict[str, dict[str, Json]]] = {}
    for row in report["profile"]:
        parts = sections.setdefault((row["work"], row["contender"]), {})
        parts.setdefault(row["part"], {})[row["direction"]] = row
    for (work, contender), parts in sections.items():
        whole = sum(row["ms"] for each in parts.values() for row in each.values())
        table.add_section()
        table.add_row(f"{contender}, {work}, {_ms(whole)} ms", style="bold")
        for part, each in parts.items():
            cells = []
            for direction in ("forward", "backward"):
                row = each.get(direction)
                cells += [_ms(row["ms"]), f"{row['launches']:.0f}"] if row else ["", ""]
            share = sum(row["ms"] for row in each.values()) / whole
            table.add_row(part, *cells, f"{100 * share:.0f} %")
    return table


def _network(report: Json) -> str:
    """The network and the images of a report, as titles name them."""
    size, device = report["size"], report["device"]["kind"]
    what = f"{report['model']}, batch {report['batch']}, {size} x {size}"
    return f"{what}, {report['dtype']}, {device}"


def _host_table(report: Json) -> "Table":
    """The table of a report: a row a contender."""
    from rich.table import Table

    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    table = Table(
        title=f"host time, {report['device']['kind']}",
        caption=f"microseconds a warm eager call; {versions}",
    )
    _add_columns(table, ("median", "least", "greatest"))
    for row in report["rows"]:
        figures = (f"{row[key]:.0f}" for key in ("median", "least", "greatest"))
        table.add_row(row["contender"], *figures)
    return table


def _compile_table(report: Json) -> "Table":
    """The table of a report: a section a program, a row a contender."""
    from rich.table import Table

    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    table = Table(
        title=f"first calls, {report['device']['kind']}",
        caption="seconds in a new process with no cache, without imports; x: speed over "
        f"{CONTENDERS[-1]}; {versions}",
    )
    for heading in ("", "", "all", *STEPS, "x"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in report["rows"]:
        seconds = (f"{row[key]:.2f}" for key in ("all", *STEPS, "speedup"))
        table.add_row(row["program"], row["contender"], *seconds)
    return table


def _levels_table(report: Json) -> "Table":
    """The table of a report: a row a number of levels."""
    from rich.table import Table

    table = Table(
        title=f"WTConv by levels, x {tuple(report['x'])}, kernel {report['kernel_size']}, "
        f"{report['dtype']}, {report['device']['kind']}",
        caption=f"median ms (least-greatest) by {_clock(report)}; field: the side of what an "
        f"output sees, in pixels; x: speed over {report['baseline']}",
    )
    table.add_column("", no_wrap=True)
    directions = list(dict.fromkeys(row["direction"] for row in report["rows"]))
    for heading in ("field", "parameters", *(part for one in directions for part in (one, "x"))):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = {(row["contender"], row["direction"]): row for row in report["rows"]}
    for contender in dict.fromkeys(name for name, _ in rows):
        both = [rows[contender, direction] for direction in directions]
        cells = (cell for row in both for cell in (_times(row), _speed(row)))
        figures = f"{both[0]['field']}", f"{both[0]['parameters']:,}"
        table.add_row(contender, *figures, *cells)
    return table


def _conv2d_table(report: Json) -> "Table":
    """The table of a report: a section an expression and direction, a row a shape and contender."""
    from rich.table import Table

    table = Table(
        title=f"conv2d, {report['dtype']}, {report['device']['kind']}",
        caption=f"median ms (least-greatest) by {_clock(report)}; x: speed over "
        f"{report['baseline']}; mean: geometric",
    )
    table.add_column("", no_wrap=True)
    for heading in ("", "ms", "TFLOP/s", "x"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for mean in report["means"]:
        what = mean["expression"], mean["direction"]
        if mean["contender"] == report["baseline"]:
            table.add_section()
            table.add_row(", ".join(what), style="bold")
        for row in report["rows"]:
            key = row["expression"], row["direction"], row["contender"]
            if key == (*what, mean["contender"]):
                rate = f"{row['tflops_per_s']:.3g}"
                table.add_row(row["shape"], row["contender"], _times(row), rate, _speed(row))
        table.add_row("mean", mean["contender"], "", "", _speed(mean))
    return table


def _depthwise_table(report: Json) -> "Table":
    """The table of a report: a section a shape and direction, a row a contender."""
    strided = (r | {"by": f" stride {r['stride']}" * (r["stride"] > 1)} for r in report["rows"])
    title = "{shape} {kernel_size}x{kernel_size}{by} {direction}"
    both = " (forward+backward in units of 2.5 copies, its five passes)"
    return _copies_table(report, "depthwise convolution", strided, title, both)


def _haar_table(report: Json) -> "Table":
    """The table of a report: a section a shape and direction, a row a contender."""
    title = "{shape} {levels} levels {direction}"
    return _copies_table(report, "Haar cascade", report["rows"], title)


def _copies_table(
    report: Json, what: str, rows: Iterable[Json], title: str, both: str = ""
) -> "Table":
    """The table of a report whose times are told in copies of x; `both` says of what copies."""
    from rich.table import Table

    both_clocks = report.get("users_clock") is not None
    table = Table(
        title=f"{what}, {report['dtype']}, {report['device']['kind']}",
        caption=f"median ms (least-greatest) by {_clock(report)}; copies: times over that of a "
        f"copy of x{both}; x: speed over {report['baseline']}; memory: temporaries in inputs, and "
        "with the results" + (_USERS if both_clocks else ""),
    )
    users = ("ms as users", "copies", "x") if both_clocks else ()
    _add_columns(table, ("ms", "copies", "x", *users, "memory"))
    for row in _in_sections(table, rows, title):
        cells = []
        for times in (row, row["users"]) if both_clocks else (row,):
            cells += [_times(times), f"{times['copies']:.2f}", _speed(times)]
        memory = ""
        if row["temporaries"] is not None:
            memory = f"{row['temporaries']:.1f}, {row['extra_memory']:.1f}"
        table.add_row(row["contender"], *cells, memory)
    return table


def _mlp_table(report: Json) -> "Table":
    """The table of a report: a section a shape and direction, a row a contender."""
    from rich.table import Table

    table = Table(
        title=f"pointwise MLP, {report['dtype']}, {report['device']['kind']}",
        caption=f"median ms (least-greatest) by {_clock(report)}; x: speed over "
        f"{report['baseline']}",
    )
    _add_columns(table, ("ms", "TFLOP/s", "x"))
    for row in _in_sections(table, report["rows"], "{shape} {direction}"):
        figures = f"{row['tflops_per_s']:.3g}", _speed(row)
        table.add_row(row["contender"], _times(row), *figures)
    return table


def _sparse_table(report: Json) -> "Table":
    """The table of a report: a section a layer and direction, a row a contender."""
    from rich.table import Table

    table = Table(
        title=f"sparse convolution, {report['dtype']}, {report['device']['kind']}",
        caption=f"median ms (least-greatest) by {_clock(report)}; TFLOP/s of valid pairs; times of "
        "arithmetic (flops), of every array once (bytes) and of the own forward pass; memory: "
        f"temporaries in sizes of x; x: speed over {report['baseline']}",
    )
    _add_columns(table, ("ms", "TFLOP/s", "flops", "bytes", "forward", "memory", "x"))
    for row in _in_sections(table, report["rows"], "{shape} {direction}"):
        figures = []
        if row["direction"] != "map":
            figures = [f"{row['tflops_per_s']:.3g}"]
            overs = "over_arithmetic", "over_memory", "over_forward"
            figures += [f"{row[over]:.1f}" for over in overs]
            memory = "" if row["temporaries"] is None else f"{row['temporaries']:.2f}"
            figures += [memory, _speed(row)]
        table.add_row(row["contender"], _times(row), *figures)
    return table


def _sharding_table(report: Json) -> "Table":
    """The table of a report: a section a part, a row a call over so many devices."""
    from rich.table import Table

    table = Table(
        title=f"over {report['device']['count']} x {report['device']['kind']}",
        caption="median ms by the host's clock; linear: over what so many devices could do; off: "
        "the worst error of output and gradients, over their RMS; exchanged: collectives of the "
        "program, and the elements of their results",
    )
    _add_columns(table, ("ms", "images/s", "linear", "off"))
    table.add_column("exchanged")
    table.add_column("wrong")
    for row in _in_sections(table, report["rows"], "{part}"):
        images = f"{row['images_per_s']:,.0f}" if "images_per_s" in row else ""
        linear = f"{row['efficiency']:.2f}" if "efficiency" in row else ""
        ms = _ms(row["median_ms"]) if "median_ms" in row else ""
        off = f"{max(row['errors']):.1e}" if "errors" in row else ""
        exchanged = ", ".join(
            f"{count} {kind} ({elements:,})"
            for kind, (count, elements) in row["collectives"].items()
        )
        wrong = row["wrong"] or ""
        table.add_row(row["label"], ms, images, linear, off, exchanged, wrong)
    return table


def _stylize_table(report: Json) -> "Table":
    """The table of a report: a section a group of contenders, a row a contender."""
    from rich.table import Table

    table = Table(
        title=f"style transfer, {report['device']['kind']}",
        caption=f"median ms (least-greatest) by {_clock(report)}, of large pictures by the host's "
        "clock; x: speed over the section's baseline; memory: temporaries in MB, of large pictures "
        "all; copy: times that of a copy; off: of tiles, of 255",
    )
    table.add_column("", no_wrap=True)
    for heading in ("ms", "x", "memory", "copy", "off"):
        table.add_column(heading, justify="right", no_wrap=heading != "ms")
    title = "{work}, {name}, {dtype}, {direction}; over {baseline}"
    for row in _in_sections(table, report["rows"], title):
        if "why_not" in row:
            table.add_row(row["contender"], row["why_not"])
            continue
        used = row.get("temporaries", row.get("peak"))
        memory = "" if used is None else f"{used / 1e6:,.1f}"
        speed = _speed(row) if "speedup" in row else ""
        copy = f"{row['over_copy']:.2f}" if "over_copy" in row else ""
        off = str(row.get("off", ""))
        table.add_row(row["contender"], _times(row), speed, memory, copy, off)
    return table


def _add_columns(table: "Table", headings: Iterable[str]) -> None:
    """Adds the column of the rows' names, and those of figures."""
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)


def _in_sections(table: "Table", rows: Iterable[Json], title: str) -> Iterator[Json]:
    """The rows; before each that begins a section, the section's title made of the row's values."""
    previous = None
    for row in rows:
        what = title.format_map(row)
        if what != previous:
            table.add_section()
            table.add_row(what, style="bold")
            previous = what
        yield row


def _clock(report: Json) -> str:
    """The clock of a report, as captions name it."""
    if report["clock"] != "host":
        return report["clock"]
    return "the host's clock" + (
        "" if report["device"]["platform"] == "cpu" else " around 20 calls at once"
    )


def _times(row: Json) -> str:
    middle, least, greatest = (_ms(row[f"{key}_ms"]) for key in ("median", "least", "greatest"))
    return f"{middle} ({least}-{greatest})"


def _speed(row: Json) -> str:
    """The speed over the baseline, unless times of one of them differ by more than twice.

    Rows of an earlier version's report do not say whether they do.
    """
    return "too noisy to compare" if row.get("too_noisy") else f"{row['speedup']:.2f}"


def _ms(value: float) -> str:
    digits = 0 if value >= 10 else 1 if value >= 1 else 3
    return f"{value:.{digits}f}"
