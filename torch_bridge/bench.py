"""`python -m torch_bridge bench`: every implementation beside plain PyTorch, in one run."""

import math
from collections.abc import Callable, Mapping
from datetime import date
from functools import partial
from itertools import chain, cycle
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from flash_wtconv_jax.bench import timing
from flash_wtconv_jax.bench.timing import Spread
from pallas_kernels.common.types import Json, Tree
from pallas_kernels.wtconv.shapes import GPU_SHAPES, SHAPES, Shape
from torch_bridge.check import about
from torch_bridge.runtime.device import named, synchronize
from torch_bridge.wtconv import ops
from torch_bridge.wtconv.layers import WTConv2d

PASSES = {"forward": 2, "forward+backward": 5}
"""The least number of tensors of x's size that are read or written, by direction."""

KNOWN = {"cpu": SHAPES, "gpu": GPU_SHAPES}
"""The images that each device is measured with."""
_BASELINE = "eager"
_FORMATS = {"": torch.contiguous_format, " channels-last": torch.channels_last}
_SETS = 4
"""Pairs of x and dy that calls take in turn."""
_ROUNDS = 20
_PAUSE_BYTES = 2**32
_PAUSES = 5
"""Bytes read and written before each call on a GPU, and how often: for five milliseconds."""

Call = Callable[[], Tree]


def bench(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="A named shape; several are allowed: "
            f"{', '.join(dict.fromkeys(chain(KNOWN['gpu'], KNOWN['cpu'])))}. "
            "Default: all."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda or mps. Default: the first that PyTorch has, cpu last."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for torch_wtconv.json and torch_wtconv.png.")
    ] = Path("runs/bench"),
) -> None:
    """Time the 2-D layer, forward and forward+backward, in both memory formats."""
    from rich.markup import escape
    from rich.progress import Progress

    from flash_wtconv_jax import plots
    from flash_wtconv_jax.cli.bench import keeping, tell, wtconv_table

    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out {out} is a file, expected a folder")
    with Progress(transient=True) as bar:

        def progress(label: str, steps: int) -> Callable[[], None]:
            task = bar.add_task(escape(label), total=steps)
            return lambda: bar.advance(task)

        report = run(shape, dtype, progress, keeping(out), device)
    tell(report, wtconv_table(report), {"torch_wtconv": plots.speedups}, out)


def run(
    shapes: list[str] | None,
    dtype: str,
    progress: Callable[[str, int], Callable[[], None]],
    keep: Callable[[Json], None] = lambda report: None,
    platform: str | None = None,
) -> Json:
    """Times every implementation that this machine has, in both memory formats.

    Args:
        shapes: Names in `KNOWN` of the device; None is all.
        dtype: Dtype of x, dy and the parameters: "float32", "bfloat16" or "float16".
        progress: Told a label and a number of steps, returns what to call after each step.
        keep: Told the report so far after each shape, `left` naming what is to come.
        platform: "cpu", "cuda" or "mps"; None is `runtime.device.best_device`'s.

    Returns:
        A JSON-able report: device, versions, date, `clock`, `roofs` with the `copy_bytes_per_s` of
        a large copy, and a row for each shape, direction and contender ("cuda channels-last") with
        its times in milliseconds; `floor_ms`, the time of `PASSES` at the copy's bandwidth, and
        `over_floor`; `speedup`, the median of plain PyTorch on contiguous images over its own; and
        on a GPU `temporaries`, the peak of memory beyond the results in inputs, and
        `extra_memory`, the same with the results; and the shapes that are `left`, none in the end.

    Raises:
        ValueError: An unknown shape or dtype, or a device that is not here.
    """
    device = named(platform)
    known = KNOWN["gpu" if device.type == "cuda" else "cpu"]
    names = shapes or list(known)
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise ValueError(f"shape: {unknown} is not one of {sorted(known)}")
    dtypes = ("float32", "bfloat16", "float16")
    if dtype not in dtypes:
        raise ValueError(f"dtype: {dtype!r} is not one of {list(dtypes)}")
    bandwidth = _copy_bytes_per_s(device)
    report: Json = {
        "benchmark": "torch_wtconv",
        "date": date.today().isoformat(),
        **about(device),
        "dtype": dtype,
        "baseline": _BASELINE,
        "clock": "device events" if device.type == "cuda" else "host",
        "no_device_events": None,
        "roofs": {"copy_bytes_per_s": bandwidth},
        "rows": [],
        "left": list(dict.fromkeys(names)),
    }
    for name in [*report["left"]]:
        layer = known[name]
        for direction, calls in _calls(layer, device, getattr(torch, dtype)).items():
            times = take_turns(device, calls, partial(progress, f"{name} {direction}"))
            size = math.prod(layer.x) * getattr(torch, dtype).itemsize
            floor_ms = PASSES[direction] * size / bandwidth * 1e3
            for contender, call in calls.items():
                temporaries, extra_memory = _memory(device, call, size)
                report["rows"].append(
                    {
                        "shape": name,
                        "x": list(layer.x),
                        "levels": layer.levels,
                        "kernel_size": layer.kernel_size,
                        "direction": direction,
                        "contender": contender,
                        **times[contender].row(),
                        "floor_ms": floor_ms,
                        "over_floor": times[contender].median / floor_ms,
                        **timing.comparison(times[contender], times[_BASELINE]),
                        "temporaries": temporaries,
                        "extra_memory": extra_memory,
                        "implementation": None,
                    }
                )
        report["left"].remove(name)
        keep(report)
    return report


def _copy_bytes_per_s(device: torch.device) -> float:
    """Bytes read and written in a second by a copy of a tensor far larger than any cache."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    copy = {"copy": lambda: target.copy_(source)}
    times = take_turns(device, copy, lambda steps: lambda: None)
    return 2 * source.nbytes / times["copy"].median * 1e3


def _calls(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, Call]]:
    """Calls of every contender of a shape, by direction."""
    torch.manual_seed(0)
    sizes = shape.batch, shape.channels, shape.height, shape.width
    drawn = {suffix: _pairs(sizes, device, dtype, format) for suffix, format in _FORMATS.items()}
    calls: dict[str, dict[str, Call]] = {direction: {} for direction in PASSES}
    # The baseline first, so that it stands first in tables and pictures.
    for name in sorted(ops.Implementation, key=lambda name: name != _BASELINE):
        problem = sizes, dtype, shape.kernel_size, shape.levels, "haar"
        try:
            ops.pick(str(name), device, *problem)
        except NotImplementedError:
            continue
        layer = WTConv2d(
            shape.channels,
            shape.channels,
            shape.kernel_size,
            wt_levels=shape.levels,
            device=device,
            dtype=dtype,
            implementation=name,
        )
        for suffix, pairs in drawn.items():
            calls["forward"][f"{name}{suffix}"] = partial(_forward, layer, cycle(pairs))
            calls["forward+backward"][f"{name}{suffix}"] = partial(_both, layer, cycle(pairs))
    return calls


def _pairs(
    sizes: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of x and dy that calls take in turn."""
    drawn = [torch.randn(sizes, dtype=dtype, device=device) for _ in range(2 * _SETS)]
    drawn = [values.contiguous(memory_format=memory_format) for values in drawn]
    return list(zip(drawn[::2], drawn[1::2], strict=True))


@torch.no_grad()
def _forward(layer: WTConv2d, pairs: "cycle[tuple[Tensor, Tensor]]") -> Tree:
    return layer(next(pairs)[0])


def _both(layer: WTConv2d, pairs: "cycle[tuple[Tensor, Tensor]]") -> Tree:
    x, dy = next(pairs)
    leaf = x.detach().requires_grad_()
    trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    y = layer(leaf)
    return y, *torch.autograd.grad(y, [leaf, *trained], dy)


def take_turns(
    device: torch.device, calls: Mapping[str, Call], progress: Callable[[int], Callable[[], None]]
) -> dict[str, Spread]:
    """Times calls in turns, in milliseconds: by a GPU's events, elsewhere by the host's clock.

    By the host's clock each call is waited for. Before each call a GPU copies gigabytes: meanwhile
    the host enqueues the call, so that launching is timed only as far as it takes longer, and
    nothing of the call's tensors stays in a cache.

    Args:
        device: Where the calls compute.
        calls: The calls by name.
        progress: Told a number of steps, returns what to call after each step.
    """
    if device.type != "cuda":
        waited = {name: partial(_waited, device, call) for name, call in calls.items()}
        return timing.take_turns(waited, progress(timing.turns(len(calls))))
    limit = torch.cuda.get_device_properties(device).total_memory // 16
    source, target = torch.empty(2, min(_PAUSE_BYTES, limit) // 2, dtype=torch.uint8, device=device)
    step = progress(_ROUNDS * len(calls))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
        call()
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(_PAUSES):
                target.copy_(source)
            start.record()
            call()
            end.record()
            synchronize(device)
            times[name].append(start.elapsed_time(end))
            step()
    return {name: Spread.of(ms) for name, ms in times.items()}


def _waited(device: torch.device, call: Call) -> None:
    """A call and all that it has enqueued."""
    call()
    synchronize(device)


def _memory(device: torch.device, call: Call, size: int) -> tuple[float | None, float | None]:
    """The peak of a call's memory in inputs, beyond its results and with them."""
    if device.type != "cuda":
        return None, None
    synchronize(device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = call()
    peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del results
    return (peak - after) / size, (peak - before) / size
