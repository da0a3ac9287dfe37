"""`flash-wtconv bench all`: every benchmark with published figures, in parts that are made once.

A part is a command of its own, in a process of its own and with a folder of its own, whose report
says that it is made. So a run can be stopped at any time, and one that ends in time goes on with
the same command. Parts that time several implementations write the fastest into the package's table
of defaults.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flash_wtconv_jax.bench.compiling import LAYERS, NETWORKS
from pallas_kernels.common.types import Json
from pallas_kernels.conv2d.shapes import SHAPES
from pallas_kernels.wtconv.shapes import FOR_PLATFORM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GROUP = "flash_wtconv.bench.all"
"""The entry point group of functions that return further `Part`s of other packages."""

DTYPES = ("float32", "bfloat16", "float16")
_CLI = "from flash_wtconv_jax.cli import main; main()"
_SEEN = "import sys; from flash_wtconv_jax.bench.devices import first; first(sys.argv[1])"
"""A program that fails where there is no device of a platform."""
_TOGETHER = 2
"""Shapes of a part, whose implementations compile and run for a minute or two each."""
_PICTURES = "--size", "512", "--batch", "8"
"""Pictures of networks of style transfer, whose programs of one size compile for minutes."""
_DEFAULTS = "--write-defaults"
_STYLIZE = "stylize", "--dtype"
_NETWORKS = [
    *(("bfloat16", size, ("--size", size)) for size in ("256", "512", "1024")),
    *(("float16", size, ("--size", size)) for size in ("512", "1024")),
    ("float32", "512", _PICTURES),
]
"""Networks of style transfer: dtype, size, and the options of both."""
_ROOMS = {
    "bfloat16": (
        ("room_1000000_64_128_s1", "room_1000000_128_128_s1"),
        ("room_1000000_64_128_s2", "room_10000_64_128_s1", "depthwise_room_1000000_128"),
    ),
    "float32": (("room_1000000_64_128_s1",),),
}
"""Layers on voxels, by dtype, in groups of a part."""


class Part(NamedTuple):
    """A part of all benchmarks; what other packages register are such tuples.

    Attributes:
        name: The name of its folder.
        command: The command, without the option `--out`.
        report: The name of the file that says that it is made.
        group: The benchmark whose figure it is a part of, or "".
    """

    name: str
    command: tuple[str, ...]
    report: str
    group: str = ""


def parts(platform: str) -> list[Part]:
    """All parts, in the order in which they are made.

    Args:
        platform: "gpu".

    Raises:
        ValueError: A platform without published figures.

    Example:
        >>> [part.name for part in parts("gpu")][:3]
        ['wtconv_float32_0', 'wtconv_float32_1', 'wtconv_float32_2']
    """
    if platform != "gpu":
        raise ValueError(f"device: {platform!r} has no published figures, expected 'gpu'")

    def part(name: str, *arguments: str, group: str = "") -> Part:
        command = (sys.executable, "-c", _CLI, "bench", *arguments)
        return Part(name, (*command, "--device", platform), f"{arguments[0]}.json", group)

    def shapes(names: Iterable[str]) -> list[str]:
        return [word for name in names for word in ("--shape", name)]

    found = []
    for dtype in DTYPES:
        found += [
            part(
                f"wtconv_{dtype}_{i}",
                *("wtconv", "--dtype", dtype, *shapes(names), _DEFAULTS),
                group=f"wtconv_{dtype}",
            )
            for i, names in enumerate(_groups(FOR_PLATFORM[platform], _TOGETHER))
        ]
    found += [
        part(f"conv2d_{i}", "conv2d", "--dtype", "bfloat16", *shapes(names), _DEFAULTS)
        for i, names in enumerate(_groups(SHAPES, _TOGETHER))
    ]
    found += [part(name, name, "--dtype", "bfloat16", _DEFAULTS) for name in ("mlp", "depthwise")]
    found += [part(f"haar_{dtype}", "haar", "--dtype", dtype) for dtype in DTYPES[:2]]
    found += [
        part(f"sparse_{dtype}_{i}", "sparse", "--dtype", dtype, *shapes(names), _DEFAULTS)
        for dtype, groups in _ROOMS.items()
        for i, names in enumerate(groups)
    ]
    found += [
        part("stylize_norm", "stylize", "--work", "norm", _DEFAULTS),
        part("stylize_layer", *_STYLIZE, "bfloat16", "--work", "layer", _DEFAULTS),
        part("stylize_large", "stylize", "--work", "large"),
        part("stylize_ladder", "stylize", "--work", "ladder", *_PICTURES),
    ]
    found += [
        part(f"stylize_network_{dtype}_{size}", *_STYLIZE, dtype, "--work", "network", *pictures)
        for dtype, size, pictures in _NETWORKS
    ]
    found += [
        part(f"stylize_training_{dtype}", *_STYLIZE, dtype, "--work", "training", *_PICTURES)
        for dtype in DTYPES[1:]
    ]
    found += [
        part(f"compile_{i}", "compile", *(w for name in names for w in ("--program", name)))
        for i, names in enumerate((LAYERS, *((name,) for name in NETWORKS)))
    ]
    found.append(part("levels", "levels", "--dtype", "float32"))
    for suffix, more in (("", ()), ("_profile", ("--profile",))):
        found += [
            part(f"wtconvnext{suffix}_{work}", "wtconvnext", "--work", work, *more)
            for work in NETWORKS.values()
        ]
    registered = (entry.load() for entry in entry_points(group=GROUP))
    found += [Part(*one) for function in registered for one in function()]
    # The others go by the table of defaults that these write.
    return sorted(found, key=lambda part: _DEFAULTS not in part.command)


def _groups(names: Iterable[str], size: int) -> list[list[str]]:
    """The names in groups of a size."""
    every = list(names)
    return [every[i : i + size] for i in range(0, len(every), size)]


def run(out: Path, minutes: float, platform: str, say: Callable[[str], None]) -> list[str]:
    """Makes the parts that are not made, until the time is over.

    Args:
        out: The folder of the parts' folders.
        minutes: After so many no part begins, and one that is at work is stopped.
        platform: As `parts` takes it.
        say: Told what is made, and what fails.

    Returns:
        The names of parts that are not made.

    Raises:
        ValueError: See `parts`; minutes that are none; or no device of this platform is here.
    """
    if not minutes > 0:
        raise ValueError(f"minutes must be more than 0, got {minutes:g}")
    every = parts(platform)
    # In a process of its own, since JAX would keep the device's memory from the parts in this one.
    seen = subprocess.run(
        [sys.executable, "-c", _SEEN, platform], stderr=subprocess.PIPE, text=True, check=False
    )
    if seen.returncode:
        _, _, reason = seen.stderr.strip().rpartition("\n")
        raise ValueError(reason.removeprefix("ValueError: "))
    end = time.monotonic() + 60 * minutes
    # Those that were begun before, and not made, come last: they may never end in time.
    for part in sorted(every, key=lambda part: (out / part.name).exists()):
        left = end - time.monotonic()
        if is_made(out, part) or left <= 0:
            continue
        say(f"{part.name}: {' '.join(part.command[3:])}")
        (out / part.name).mkdir(parents=True, exist_ok=True)
        try:
            done = subprocess.run(
                [*part.command, "--out", str(out / part.name)], timeout=left, check=False
            )
        except subprocess.TimeoutExpired:
            say(f"{part.name} was stopped after {left / 60:.1f} minutes; it begins anew")
            break
        if done.returncode:
            say(f"{part.name} failed, exit code {done.returncode}")
    return [part.name for part in every if not is_made(out, part)]


def is_made(out: Path, part: Part) -> bool:
    """Whether the report of a part is there, and nothing of it is left to be timed.

    Args:
        out: As `run` takes it.
        part: The part.
    """
    path = out / part.name / part.report
    return path.exists() and not json.loads(path.read_text()).get("left")


def merged(out: Path) -> "dict[str, tuple[Json, Mapping[str, Callable[[Json], Figure]]]]":
    """The reports of benchmarks in several parts that are all made, and their pictures.

    Args:
        out: As `run` takes it.

    Returns:
        By the benchmark's name its report, whose roofs are those of the first part, and what draws
        its pictures, by their names.
    """
    groups: dict[str, list[Part]] = {}
    for part in parts("gpu"):
        if part.group:
            groups.setdefault(part.group, []).append(part)
    found: dict[str, tuple[Json, Mapping[str, Callable[[Json], Figure]]]] = {}
    for name, every in groups.items():
        if all(is_made(out, part) for part in every):
            from flash_wtconv_jax import plots

            first, *others = (
                json.loads((out / part.name / part.report).read_text()) for part in every
            )
            first["rows"] += [row for report in others for row in report["rows"]]
            figures = {name: plots.speedups}
            # PyTorch's has no roof of arithmetic.
            if "fma_per_s" in first["roofs"]:
                figures[f"{name}_roofline"] = plots.roofline
            found[name] = first, figures
    return found
