"""`flash-wtconv bench wtconv`: our layer beside plain JAX and PyTorch eager, in one run."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import entry_points
from itertools import cycle
from typing import NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flash_wtconv_jax.bench import clocks, roofline
from flash_wtconv_jax.bench.clocks import Call
from flash_wtconv_jax.bench.defaults import OURS, able, entries
from flash_wtconv_jax.bench.reports import Keep, check_shapes, head, unkept
from flash_wtconv_jax.bench.timing import Spread, comparison
from pallas_kernels.common import device
from pallas_kernels.common.device import on_cpu
from pallas_kernels.common.types import Json, Tree
from pallas_kernels.dispatch.table import Entry
from pallas_kernels.wtconv import baseline_jax, wtconv1d, wtconv2d
from pallas_kernels.wtconv.api import OPERATOR
from pallas_kernels.wtconv.problem import Problem
from pallas_kernels.wtconv.shapes import FOR_PLATFORM, Layer

Result = TypeVar("Result")

DTYPES = ("float32", "bfloat16", "float16")
PASSES = {"forward": 2, "forward+backward": 5}
"""The least number of tensors of x's size that are read or written, by direction."""

GROUP = "flash_wtconv.bench.wtconv"
"""The entry point group of every `RegisteredContender`."""

_WTCONV = {1: wtconv1d, 2: wtconv2d}
_PLAIN = "plain jax"
_RIVAL_SIZE = 7
_ROTATED_BYTES = 2**28
"""Bytes of the copies of x that a GPU's calls take in turn: more than its caches hold."""
_MOST_COPIES = 64


class RegisteredContender(Protocol):
    """A contender of another package: the module or object that its entry point names."""

    NAME: str

    def runs(self, dtype: str, *, on_cpu: bool) -> bool:
        """Whether it can be timed here, beside JAX on a CPU or on an accelerator."""
        ...

    def versions(self) -> dict[str, str]:
        """The versions of the packages that its times depend on, by name."""
        ...

    def calls(
        self, x: jax.Array, params: Mapping[str, jax.Array], dy: jax.Array
    ) -> dict[str, Call]:
        """The layer that `pallas_kernels.wtconv.wtconv2d` is, a call for each key of `PASSES`."""
        ...


def run(
    shapes: list[str],
    baseline: str | None,
    progress: Callable[[str, int], Callable[[], None]],
    dtype: str = "float32",
    each: bool = False,
    keep: Keep = unkept,
) -> Json:
    """Times every contender that this machine has.

    They are our layer as the device's rule picks it; plain JAX; on an accelerator a plain 7 x 7
    depthwise convolution, of signals of 7 taps, the layer's rival at its cost; and what other
    packages register under `GROUP`, which is PyTorch on a CPU.

    Args:
        shapes: Names in `pallas_kernels.wtconv.shapes.FOR_PLATFORM` of the device.
        baseline: The contender that ratios refer to: "torch eager", "plain jax", "depthwise 7x7"
            (of signals alone "depthwise 7") or "flash"; None is PyTorch where it can be measured
            beside us, else plain JAX.
        progress: Told a label and a number of steps, returns what to call after each step.
        dtype: Dtype of x, dy and the parameters, one of `DTYPES`.
        each: Also every implementation that can compute a shape, where several can ("flash xla").
        keep: Told the report so far whenever rows are added, `left` naming what is to come.

    Returns:
        A JSON-able report: device, versions, date, `clock` (and `no_device_events`, why a GPU's
        events are not it), `roofs` (as `roofline.measure`), and a row for each shape, direction and
        contender with its times in milliseconds; `floor_ms`, the time of `PASSES` at the copy's
        bandwidth, and `over_floor`; `speedup`, the baseline's median over its own, and
        `speedup_over_plain_jax`; `users`, times and speedups by `users_clock` (`clocks.users`),
        both None where `clock` is no other; `multiply_adds`; for JAX `temporaries`, the peak of
        temporary memory in inputs, and `extra_memory`, the same with the results; for "flash" the
        `implementation` of each direction that is picked; and the shapes that are `left`, none in
        the end.

    Raises:
        ValueError: An unknown shape or dtype, or a baseline that this machine does not have.
    """
    known = FOR_PLATFORM[device.platform()]
    check_shapes(shapes, known)
    check_dtype(dtype)
    registered = _registered(dtype)
    here = [OURS, _PLAIN]
    rivals = {_rival(known[name]) for name in shapes}
    here += [] if on_cpu() or len(rivals) > 1 else list(rivals)
    here += registered
    baseline = baseline or next(iter(registered), _PLAIN)
    if baseline not in here:
        raise ValueError(f"baseline: {baseline!r} is not here, expected one of {here}")
    clock, no_device_events = clocks.best()
    measured = roofline.measure(clock)
    users = clocks.users(clock)
    report: Json = {
        **head("wtconv", clock, no_device_events, registered.values()),
        "dtype": dtype,
        "baseline": baseline,
        "users_clock": users.name if users else None,
        "roofs": measured,
        "rows": [],
        "left": list(dict.fromkeys(shapes)),
    }
    for name in [*report["left"]]:
        for direction, contenders in _contenders(known[name], dtype, each, registered).items():
            told = partial(progress, f"{name} {direction}")
            times, theirs = by_both_clocks(clock, users, contenders, told)
            report["rows"] += [
                {
                    "shape": name,
                    "x": list(known[name].x),
                    "levels": known[name].levels,
                    "kernel_size": known[name].kernel_size,
                    "direction": direction,
                    "contender": contender,
                    **_figures(known[name], dtype, direction, contender, times, measured),
                    **_speedups(times, contender, baseline),
                    "users": _as_users_run(theirs, contender, baseline),
                    "temporaries": one.temporaries,
                    "extra_memory": one.extra_memory,
                    "implementation": _picked(known[name], dtype) if contender == OURS else None,
                }
                for contender, one in contenders.items()
            ]
        report["left"].remove(name)
        keep(report)
    return report


def check_dtype(dtype: str) -> None:
    """Raises `ValueError` for a dtype that is not one of `DTYPES`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype: {dtype!r} is not one of {list(DTYPES)}")


def implementations(shape: Layer, dtype: str) -> list[str]:
    """Our implementations that can compute a shape here, in both directions.

    Args:
        shape: The layer.
        dtype: Dtype of x, dy and the parameters.

    Returns:
        Their names.

    Raises:
        ValueError: An unknown dtype.

    Example:
        >>> with jax.default_device(jax.devices("cpu")[0]):
        ...     implementations(FOR_PLATFORM["cpu"]["image_112"], "float32")
        ['xla']
    """
    check_dtype(dtype)
    return able(OPERATOR, _problem(shape, dtype))


def defaults(report: Json) -> list[Entry]:
    """The fastest implementations of a report, as `defaults.entries` returns them.

    Args:
        report: A report of `run`.

    Returns:
        An entry for each direction of each shape that several implementations can compute.
    """

    def problem(row: Json) -> Json:
        of = Problem(row["x"], report["dtype"], row["kernel_size"], row["levels"], "haar")
        return of._asdict()

    return entries(OPERATOR, report, problem)


class Contender(NamedTuple):
    """One direction of a contender.

    Attributes:
        call: One call, on a GPU of arrays that no call before it has left in a cache.
        warm: The same on arrays that are the same each time.
        temporaries: Its temporary memory in sizes of x, None where that is not known.
        extra_memory: The same with its results.
    """

    call: Call
    warm: Call
    temporaries: float | None = None
    extra_memory: float | None = None


def by_both_clocks(
    clock: clocks.Clock,
    users: clocks.HostClock | None,
    contenders: Mapping[str, Contender],
    progress: Callable[[int], Callable[[], None]],
) -> tuple[dict[str, Spread], dict[str, Spread]]:
    """Times of contenders, and those by the users' clock.

    Args:
        clock: What `clocks.best` returns.
        users: What `clocks.users` returns of it; None where there is no such clock.
        contenders: The contenders by name.
        progress: Told a number of steps, returns what to call after each step.

    Returns:
        Both by name, the second empty without a users' clock.

    Example:
        >>> nothing = Contender(lambda: None, lambda: None)
        >>> silent = lambda steps: lambda: None
        >>> times, theirs = by_both_clocks(clocks.HostClock(), None, {"nothing": nothing}, silent)
        >>> sorted(times), theirs
        (['nothing'], {})
    """
    step = progress(sum(one.turns(len(contenders)) for one in (clock, users) if one))
    # The users' clock goes first: what the profiler leaves behind must not slow a launch.
    warm = {name: one.warm for name, one in contenders.items()}
    theirs = users.take_turns(warm, step) if users else {}
    return clock.take_turns({name: one.call for name, one in contenders.items()}, step), theirs


def _contenders(
    shape: Layer, dtype: str, each: bool, registered: Mapping[str, RegisteredContender]
) -> dict[str, dict[str, Contender]]:
    """Every contender of a shape, by direction."""
    copies = drawn_copies(shape.x, shape.x, dtype)
    params = drawn_params(shape, dtype)
    rival = drawn_params(shape._replace(levels=0, kernel_size=_RIVAL_SIZE), dtype)["base_kernel"]
    ndim = len(shape.x) - 2
    layer = _WTCONV[ndim]
    ours: dict[str, tuple[Callable, Tree]] = {OURS: (layer, params)}
    others: dict[str, tuple[Callable, Tree]] = {
        _PLAIN: (partial(baseline_jax.wtconv, ndim=ndim), params)
    }
    names = implementations(shape, dtype)
    for name in names if each and len(names) > 1 else []:
        own = others if OPERATOR.module(name).DIFFERENTIABLE else ours
        own[f"{OURS} {name}"] = partial(layer, implementation=name), params
    if not on_cpu():
        others[_rival(shape)] = _depthwise, rival
    jobs = {name: partial(compiled_calls, *one, copies) for name, one in (ours | others).items()}
    compiled = beside_each_other(jobs, others)
    contenders: dict[str, dict[str, Contender]] = {
        direction: {name: one[direction] for name, one in compiled.items()} for direction in PASSES
    }
    for name, contender in registered.items():
        for direction, call in contender.calls(copies[0][0], params, copies[0][1]).items():
            contenders[direction][name] = Contender(call, call)
    return contenders


def drawn_copies(
    x: tuple[int, ...], dy: tuple[int, ...], dtype: str
) -> list[tuple[jax.Array, jax.Array]]:
    """Pairs of x and dy; on a GPU several, so that no call finds its own in a cache.

    Args:
        x: The shape of x.
        dy: The shape of dy.
        dtype: The dtype of both.

    Example:
        >>> with jax.default_device(jax.devices("cpu")[0]):
        ...     [[array.shape for array in pair] for pair in drawn_copies((4,), (2,), "float32")]
        [[(4,), (2,)]]
    """
    count = 1
    if device.platform() == "gpu":
        enough = _ROTATED_BYTES // (math.prod(x) * jnp.dtype(dtype).itemsize)
        count = min(max(2, enough), _MOST_COPIES)
    draw = jax.jit(partial(jax.random.normal, dtype=dtype), static_argnames="shape")
    keys = jax.random.split(jax.random.key(0), (count, 2))
    return [(draw(of_x, shape=x), draw(of_dy, shape=dy)) for of_x, of_dy in keys]


def drawn_params(shape: Layer, dtype: str) -> dict[str, jax.Array]:
    """The parameters of our layer, by the names that it has for them.

    Args:
        shape: The layer.
        dtype: Dtype of all of them.

    Example:
        >>> layer = FOR_PLATFORM["gpu"]["audio"]
        >>> drawn_params(layer, "float32")["wavelet_kernel_0"].shape
        (5, 2, 256)
    """
    rng = np.random.default_rng(0)
    ndim, c = len(shape.x) - 2, shape.channels
    taps, bands = (shape.kernel_size,) * ndim, 2**ndim
    sizes = {"base_kernel": (*taps, 1, c), "base_bias": (c,), "base_scale": (c,)}
    for i in range(shape.levels):
        sizes |= {f"wavelet_kernel_{i}": (*taps, bands, c), f"wavelet_scale_{i}": (bands, c)}
    return {name: jnp.asarray(rng.normal(size=s), dtype) for name, s in sizes.items()}


def compiled_calls(
    function: Callable, params: Tree, copies: list[tuple[jax.Array, jax.Array]]
) -> dict[str, Contender]:
    """A function of x and parameters, and the same with its gradients, compiled.

    Args:
        function: The function.
        params: Its parameters.
        copies: What `drawn_copies` returns, which calls take in turn.

    Returns:
        A contender for each of `PASSES`.
    """

    def both(x: jax.Array, params: Tree, dy: jax.Array) -> Tree:
        y, pullback = jax.vjp(function, x, params)
        return y, pullback(dy)

    programs: dict[str, tuple[Callable, list[tuple[Tree, ...]]]] = {
        "forward": (function, [(x, params) for x, _ in copies]),
        "forward+backward": (both, [(x, params, dy) for x, dy in copies]),
    }
    size = copies[0][0].nbytes
    return {
        direction: compiled_call(compute, arguments, size)
        for direction, (compute, arguments) in programs.items()
    }


def compiled_call(
    function: Callable, arguments: Sequence[tuple[Tree, ...]], size: int
) -> Contender:
    """A function, compiled.

    Args:
        function: The function.
        arguments: Its arguments on one device, several of one kind, which calls take in turn.
        size: The bytes in which its memory is told, those of x.

    Returns:
        A contender.

    Example:
        >>> call = compiled_call(jnp.negative, [(jnp.ones(2),), (jnp.zeros(2),)], 8)
        >>> call.call().tolist(), call.call().tolist(), call.extra_memory
        ([-1.0, -1.0], [-0.0, -0.0], 1.0)
    """
    (chosen,) = jax.tree.leaves(arguments[0])[0].devices()
    with jax.default_device(chosen):  # A thread has a default of its own.
        compiled = jax.jit(function).lower(*arguments[0]).compile()
    used = compiled.memory_analysis()
    assert used is not None
    return Contender(
        partial(_next, compiled, cycle(arguments)),
        partial(compiled, *arguments[0]),
        used.temp_size_in_bytes / size,
        (used.temp_size_in_bytes + used.output_size_in_bytes) / size,
    )


def beside_each_other(
    jobs: Mapping[str, Callable[[], Result]], alone: Iterable[str] = ()
) -> dict[str, Result]:
    """The results of jobs that compile, each in a thread: a GPU's kernels take long.

    Args:
        jobs: The jobs by name.
        alone: The names of those that are done first, one by one, if they are there: XLA times its
            convolutions and products while it compiles them, and no thread may compile or tune.

    Example:
        >>> beside_each_other({"one": lambda: 1, "two": lambda: 2}, ["two"])
        {'one': 1, 'two': 2}
    """
    found = {name: jobs[name]() for name in alone if name in jobs}
    with ThreadPoolExecutor() as pool:
        begun = {name: pool.submit(job) for name, job in jobs.items() if name not in found}
        found |= {name: job.result() for name, job in begun.items()}
    return {name: found[name] for name in jobs}


def _next(compiled: Callable, arguments: Iterator[tuple[Tree, ...]]) -> Tree:
    return compiled(*next(arguments))


def _rival(shape: Layer) -> str:
    """The name of the depthwise convolution beside a layer."""
    return f"depthwise {'x'.join([str(_RIVAL_SIZE)] * (len(shape.x) - 2))}"


def _depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    axes = "HW"[: x.ndim - 2]
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(1,) * len(axes),
        padding="SAME",
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        feature_group_count=x.shape[-1],
    )


def _figures(
    shape: Layer,
    dtype: str,
    direction: str,
    contender: str,
    times: Mapping[str, Spread],
    measured: Mapping[str, float],
) -> dict[str, float]:
    """The times of a contender beside the floor, its multiply-adds, and its least traffic."""
    floor_bytes = PASSES[direction] * math.prod(shape.x) * jnp.dtype(dtype).itemsize
    floor_ms = floor_bytes / measured["copy_bytes_per_s"] * 1e3
    rival = _RIVAL_SIZE ** (len(shape.x) - 2) * math.prod(shape.x)
    forward = rival if contender == _rival(shape) else _multiply_adds(shape)
    return {
        **times[contender].row(),
        "floor_ms": floor_ms,
        "over_floor": times[contender].median / floor_ms,
        "floor_bytes": floor_bytes,
        # The gradients of x and of the kernels are each as many again.
        "multiply_adds": forward if direction == "forward" else 3 * forward,
    }


def _speedups(times: Mapping[str, Spread], contender: str, baseline: str) -> dict[str, float]:
    """The speed of a contender over the baseline's, and over that of plain JAX."""
    return {
        **comparison(times[contender], times[baseline]),
        "speedup_over_plain_jax": times[_PLAIN].median / times[contender].median,
    }


def _as_users_run(
    times: Mapping[str, Spread], contender: str, baseline: str
) -> dict[str, float] | None:
    """The times and speedups of a contender by the users' clock, None where it was not asked."""
    if not times:
        return None
    return times[contender].row() | _speedups(times, contender, baseline)


def _multiply_adds(shape: Layer) -> int:
    """The multiply-adds of our layer's convolutions; its transforms only add."""
    batch, *sides, channels = shape.x
    values = math.prod(sides)
    for _ in range(shape.levels):
        sides = [-(-side // 2) for side in sides]
        values += 2 ** len(sides) * math.prod(sides)
    return shape.kernel_size ** len(sides) * batch * channels * values


def _picked(shape: Layer, dtype: str) -> dict[str, str]:
    """The implementation that computes our layer here, by direction."""
    here, kind = device.platform(), device.kind()
    return {
        direction: OPERATOR.pick(direction, None, here, _problem(shape, dtype), kind)
        for direction in OPERATOR.directions
    }


def _problem(shape: Layer, dtype: str) -> Problem:
    return Problem(shape.x, jnp.dtype(dtype), shape.kernel_size, shape.levels, "haar")


def _registered(dtype: str) -> dict[str, RegisteredContender]:
    """The contenders of other packages that can be timed here, by name."""
    found: list[RegisteredContender] = [entry.load() for entry in entry_points(group=GROUP)]
    return {one.NAME: one for one in found if one.runs(dtype, on_cpu=on_cpu())}
