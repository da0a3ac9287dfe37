"""`flash-wtconv bench sparse`: maps and sparse convolutions beside plain JAX, in one run."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import entry_points
from time import monotonic
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flash_wtconv_jax import environment
from flash_wtconv_jax.bench import clocks, roofline
from flash_wtconv_jax.bench.clocks import Call
from flash_wtconv_jax.bench.defaults import OURS, able, entries
from flash_wtconv_jax.bench.reports import Keep, head, unkept
from flash_wtconv_jax.bench.timing import Spread, comparison
from flash_wtconv_jax.bench.wtconv import check_dtype
from pallas_kernels.common.device import platform
from pallas_kernels.common.types import Json, Tree
from pallas_kernels.dispatch import Operator
from pallas_kernels.dispatch.table import Entry
from pallas_kernels.sparse import (
    KernelMap,
    Voxels,
    api,
    from_coords,
    kernel_map,
    spatially_sparse_conv,
    spatially_sparse_depthwise_conv,
)
from pallas_kernels.sparse.checks import checked_window
from pallas_kernels.sparse.depthwise import api as depthwise
from pallas_kernels.sparse.depthwise.problem import Problem as DepthwiseProblem
from pallas_kernels.sparse.depthwise.shapes import SHAPES as DEPTHWISE
from pallas_kernels.sparse.problem import Problem
from pallas_kernels.sparse.shapes import SHAPES, Shape, room
from pallas_kernels.sparse.xla import contracted, take

NAMES = (*SHAPES, *(f"depthwise_{name}" for name in DEPTHWISE))
"""Names of the layers."""

DIRECTIONS = ("forward", "forward+backward", "gradient of x", "gradient of w")
"""The parts of a layer that are timed, besides its map."""

GROUP = "flash_wtconv.bench.sparse"
"""The entry points by which other packages register contenders of layers of stride 1."""

_SCATTER, _IM2COL, _PRODUCT = "gather, dot, scatter-add", "im2col", 8192


class RegisteredContender(Protocol):
    """A contender of another package: the module or object that its entry point names."""

    NAME: str

    def runs(self, dtype: str, *, platform: str) -> bool:
        """Whether it can be timed here."""
        ...

    def versions(self) -> dict[str, str]:
        """The versions of the packages that its times depend on, by name."""
        ...

    def times(
        self, voxels: int, channels: int, features: int, kernel_size: int, dtype: str
    ) -> Mapping[str, Sequence[float]]:
        """Fields of a `timing.Spread`, by direction; `RuntimeError` where it fails."""
        ...


def run(
    shapes: list[str],
    progress: Callable[[str, int], Callable[[], None]],
    dtype: str = "bfloat16",
    minutes: float | None = None,
    before: Json | None = None,
    keep: Keep = unkept,
) -> Json:
    """Times the map, plain JAX, and every implementation that can compute a layer here.

    "flash" is what a call takes unasked; "flash triton" is named, so that its parameters are
    measured before. What other packages register under `GROUP` is timed beside.

    Args:
        shapes: Names of layers, from `NAMES`.
        progress: Told a label and a number of steps, returns what to call after each step.
        dtype: Dtype of x and the weights, one of `wtconv.DTYPES`.
        minutes: After so many no layer is begun; None times them all.
        before: An earlier report, whose layers are not timed again if it has the same dtype,
            device, versions and XLA's flags.
        keep: Told the report of the layers so far, after each.

    Returns:
        A JSON-able report: device, versions, date, `clock` and `no_device_events` as in
        `wtconv.run`; `roofs`, as `roofline.measure`, and `product_flops_per_s` of a matrix product;
        for each layer its `pairs`; a row for each layer, direction and contender with its times in
        milliseconds, `tflops_per_s` of valid pairs, `over_arithmetic`, the time over that of the
        arithmetic at the product's rate, `over_memory`, over that of every array read or written
        once at the copy's, `over_forward` over the contender's own forward pass, `speedup` over the
        first plain form, and `temporaries` in sizes of x, None of other packages; rows of the
        direction "map", whose voxels are "sorted" or "shuffled"; and the layers that are `left` to
        time.

    Raises:
        ValueError: An unknown layer or dtype.
    """
    begun = monotonic()
    unknown = sorted(set(shapes) - set(NAMES))
    if unknown:
        raise ValueError(f"shape: {unknown} is not one of {sorted(NAMES)}")
    check_dtype(dtype)
    clock, no_device_events = clocks.best()
    roofs = roofline.measure(clock) | {"product_flops_per_s": _product_rate(clock, dtype)}
    others = _registered(dtype)
    report: Json = {
        **head("sparse", clock, no_device_events, others),
        "dtype": dtype,
        "baseline": _SCATTER,
        "roofs": roofs,
        "rows": [],
        "left": list(dict.fromkeys(shapes)),
    }
    alike = "device", "versions", "xla_flags", "dtype", "clock"
    if before is not None and all(before.get(name) == report[name] for name in alike):
        report["rows"] = [row for row in before["rows"] if row["shape"] in shapes]
        timed = {row["shape"] for row in report["rows"]}
        report["left"] = [name for name in report["left"] if name not in timed]
    while report["left"]:
        if minutes is not None and monotonic() - begun > 60 * minutes:
            break
        report["rows"] += _rows(report, report["left"][0], clock, progress, others)
        del report["left"][0]
        keep(report)
    return report


def _registered(dtype: str) -> list[RegisteredContender]:
    """The contenders of other packages that can be timed here."""
    found: list[RegisteredContender] = [entry.load() for entry in entry_points(group=GROUP)]
    return [one for one in found if one.runs(dtype, platform=platform())]


def _rows(
    report: Json,
    name: str,
    clock: clocks.Clock,
    progress: Callable[[str, int], Callable[[], None]],
    others: Sequence[RegisteredContender],
) -> list[Json]:
    """The rows of one layer, those of its map if the report has none of the same sites."""
    layer, roofs = _Layer.of(name, report["dtype"]), report["roofs"]
    about: Json = {"shape": name, "pairs": layer.pairs}
    rows: list[Json] = []
    mapped = {_sites(row["shape"]) for row in report["rows"] if row["direction"] == "map"}
    if _sites(name) not in mapped:
        times = _map_times(layer, clock, progress)
        rows += [{**about, "direction": "map", "contender": who, **ms} for who, ms in times]
    programs = _programs(layer)
    theirs = {other.NAME: _times_of(other, layer) for other in others}
    forward: dict[str, float] = {}
    for direction in DIRECTIONS:
        step = progress(f"{name} {direction}", clock.turns(len(programs)))
        calls = {who: both[direction][0] for who, both in programs.items()}
        times_of = clock.take_turns(calls, step)
        times_of |= {who: ms[direction] for who, ms in theirs.items() if direction in ms}
        forward = forward or {who: spread.median for who, spread in times_of.items()}
        flops, moved = layer.work(direction)
        rows += [
            {
                **about,
                "direction": direction,
                "contender": who,
                **{f"{key}_ms": value for key, value in spread._asdict().items()},
                "tflops_per_s": flops / spread.median / 1e9,
                "over_arithmetic": spread.median * roofs["product_flops_per_s"] / flops / 1e3,
                "over_memory": spread.median * roofs["copy_bytes_per_s"] / moved / 1e3,
                "over_forward": spread.median / forward[who],
                **comparison(spread, times_of[_SCATTER]),
                "temporaries": (
                    programs[who][direction][1] / layer.x.nbytes if who in programs else None
                ),
            }
            for who, spread in times_of.items()
        ]
    return rows


def _times_of(other: RegisteredContender, layer: "_Layer") -> dict[str, Spread]:
    """Times of another package's contender by direction; none of what it is not made for."""
    shape = layer.shape
    if not layer.regular or shape.stride != 1:
        return {}
    sizes = shape.voxels, shape.channels, shape.features, shape.kernel_size
    try:
        times = other.times(*sizes, layer.dtype)
    except RuntimeError as error:
        warnings.warn(f"{layer.name} has no row of {other.NAME}: {error}", stacklevel=2)
        return {}
    return {direction: Spread(*spread) for direction, spread in times.items()}


def implementations(name: str, dtype: str) -> list[str]:
    """The names of the implementations that can compute a layer here, in both directions.

    Args:
        name: One of `NAMES`.
        dtype: Dtype of x and the weights.

    Example:
        >>> with jax.default_device(jax.devices("cpu")[0]):
        ...     implementations("room_10000_32_32_s1", "float32")
        ['xla']
    """
    return able(*_problem(name, dtype))


def defaults(report: Json) -> list[Entry]:
    """The fastest implementations of a report, as `defaults.entries` returns them.

    Args:
        report: A report of `run`.

    Returns:
        An entry for each direction of each layer that several implementations can compute; its
        problem has neither size nor dilation of the kernel, which a call need not share, nor the
        groups of depthwise layers, which are their channels.
    """
    found = []
    for operator in (api.OPERATOR, depthwise.OPERATOR):
        own = [row for row in report["rows"] if _problem(row["shape"], "")[0] is operator]

        def problem(row: Json) -> Json:
            _, of = _problem(row["shape"], report["dtype"])
            window = of.window._asdict()
            for name in ("kernel_size", "dilation", *["groups"] * (row["shape"] not in SHAPES)):
                del window[name]
            return of._asdict() | {"dtype": report["dtype"], "window": window}

        found += entries(operator, report | {"rows": own}, problem)
    return found


def _shape(name: str) -> Shape:
    """The shape of a layer of a name, one of `NAMES`."""
    return SHAPES.get(name) or DEPTHWISE[name.removeprefix("depthwise_")]


def _sites(name: str) -> tuple[int, int, int]:
    """The key of all that the map of a layer depends on."""
    shape = _shape(name)
    return shape.voxels, shape.kernel_size, shape.stride


def _problem(name: str, dtype: str) -> tuple[Operator, Problem]:
    """The operator of a layer, and its description of the call."""
    shape = _shape(name)
    window = checked_window(shape.kernel_size, shape.stride, 1, 3)
    sizes = (1, shape.voxels, shape.channels), dtype, shape.features
    if name in SHAPES:
        return api.OPERATOR, Problem(*sizes, window)
    grouped = window._replace(groups=shape.channels)
    return depthwise.OPERATOR, DepthwiseProblem(*sizes, grouped)


class _Layer(NamedTuple):
    """A layer over the room, with its arrays."""

    name: str
    shape: Shape
    dtype: str
    voxels: Voxels
    found: KernelMap
    out: Voxels
    x: jax.Array
    w: jax.Array
    dy: jax.Array
    pairs: int

    @classmethod
    def of(cls, name: str, dtype: str) -> "_Layer":
        """The layer of a name; its output has as many rows as there are voxels in it."""
        shape = _shape(name)
        coords = room(shape.voxels)
        voxels = from_coords(coords, jnp.zeros((len(coords), 0), dtype), capacity=len(coords))
        given = shape.kernel_size, shape.stride
        found, out = kernel_map(voxels, *given)
        if shape.stride > 1:
            found, out = kernel_map(voxels, *given, out_capacity=out.num_valid.item())
        taps, keys = len(found.table), jax.random.split(jax.random.key(0), 3)
        sizes = (taps, shape.channels) + ((shape.features,) if name in SHAPES else ())
        draw = partial(jax.random.normal, dtype=dtype)
        x = draw(keys[0], (len(coords), shape.channels))
        w = draw(keys[1], sizes) / np.sqrt(taps * shape.channels).astype(dtype)
        dy = draw(keys[2], (out.capacity, shape.features))
        pairs = int((found.table >= 0).sum())
        return cls(name, shape, dtype, voxels, found, out, x, w, dy, pairs)

    @property
    def regular(self) -> bool:
        """Whether it is no depthwise layer."""
        return self.w.ndim == 3

    def work(self, direction: str) -> tuple[float, float]:
        """Operations of the valid pairs, and bytes of every array, each once."""
        flops = 2.0 * self.pairs * self.shape.channels
        flops *= self.shape.features if self.regular else 1
        moved = self.x.nbytes + self.w.nbytes + self.dy.nbytes + self.found.table.nbytes
        return (3 * flops, 3 * moved) if direction == "forward+backward" else (flops, moved)

    def contenders(self) -> "dict[str, _Contender]":
        """Functions of arrays of the map, x and w, with those arrays, by name."""
        lists = _padded_pairs(self.found)
        plain = _scattered if self.regular else _depthwise_scattered
        found: dict[str, _Contender] = {_SCATTER: (partial(plain, self.out.capacity), lists)}
        if self.regular:
            found[_IM2COL] = _im2col, self.found.table
        sites = self.found, self.voxels, self.out
        ours = _ours if self.regular else _ours_depthwise
        found[OURS] = partial(ours, None), sites
        for name in implementations(self.name, self.dtype):
            found[f"{OURS} {name}"] = partial(ours, name), sites
        return found


_Contender = tuple[Callable[[Any, jax.Array, jax.Array], jax.Array], Tree]


def _ours(
    name: str | None, sites: tuple[KernelMap, Voxels, Voxels], x: jax.Array, w: jax.Array
) -> jax.Array:
    found, voxels, out = sites
    return spatially_sparse_conv(
        voxels.with_features(x),
        w,
        found.window.kernel_size,
        found.window.stride,
        kernel_map=found,
        output_voxels=out,
        fwd_algo=name,
        bwd_algo=name,
    ).features


def _ours_depthwise(
    name: str | None, sites: tuple[KernelMap, Voxels, Voxels], x: jax.Array, w: jax.Array
) -> jax.Array:
    found, _, out = sites
    return spatially_sparse_depthwise_conv(x, w, found, out.capacity, name, name)


def _programs(layer: _Layer) -> dict[str, dict[str, tuple[Call, int]]]:
    """The programs of each contender, those of `DIRECTIONS`, each with its temporary bytes."""
    calls, lowered = {}, {}
    # What a program does not return it does not compute.
    returned = slice(0, 1), slice(0, 3), slice(1, 2), slice(2, 3)
    for who, (function, own) in layer.contenders().items():
        arrays = own, layer.x, layer.w, layer.dy
        for direction, which in zip(DIRECTIONS, returned, strict=True):
            some = partial(_some, function, which)
            calls[who, direction] = arrays
            lowered[who, direction] = jax.jit(some, keep_unused=True).lower(*arrays)
    found: dict[str, dict[str, tuple[Call, int]]] = {}
    for (who, direction), program in clocks.compiled(lowered).items():
        used = program.memory_analysis()
        assert used is not None
        call = partial(program, *calls[who, direction])
        found.setdefault(who, {})[direction] = call, used.temp_size_in_bytes
    return found


def _some(
    function: Callable[[Any, jax.Array, jax.Array], jax.Array],
    which: slice,
    own: Tree,
    x: jax.Array,
    w: jax.Array,
    dy: jax.Array,
) -> Tree:
    """Some of a convolution's output and its gradients in x and w.

    The map's arrays are arguments: constants would be part of the program.
    """
    y, pullback = jax.vjp(partial(function, own), x, w)
    return (y, *pullback(dy))[which]


def _map_times(
    layer: _Layer, clock: clocks.Clock, progress: Callable[[str, int], Callable[[], None]]
) -> list[tuple[str, Json]]:
    """Times of the map and of what it is made from, of sorted voxels and of shuffled ones."""
    order = np.random.default_rng(0).permutation(layer.voxels.capacity)
    shuffled = layer.voxels.coords[order]
    rest = layer.shape.kernel_size, layer.shape.stride

    def made(coords: jax.Array) -> KernelMap:
        voxels = replace(layer.voxels, coords=coords)
        return kernel_map(voxels, *rest, out_capacity=layer.out.capacity)[0]

    compiled = jax.jit(made).lower(shuffled).compile()
    calls: dict[str, Call] = {
        "sorted": partial(compiled, layer.voxels.coords),
        "shuffled": partial(compiled, shuffled),
    }
    step = progress(f"{layer.shape.voxels} voxels, stride {rest[1]}, map", clock.turns(len(calls)))
    times = clock.take_turns(calls, step).items()
    return [
        (who, {f"{key}_ms": value for key, value in spread._asdict().items()})
        for who, spread in times
    ]


def _product_rate(clock: clocks.Clock, dtype: str) -> float:
    """Operations in a second of a large matrix product of a dtype."""
    size = 256 if environment.device()["platform"] == "cpu" else _PRODUCT
    matrix = jnp.ones((size, size), dtype)
    product = jax.jit(partial(contracted, "ab,bc->ac", precision=None)).lower(matrix, matrix)
    compiled = product.compile()
    times = clock.take_turns({"product": lambda: compiled(matrix, matrix)}, lambda: None)
    return 2e3 * size**3 / times["product"].median


def _padded_pairs(found: KernelMap) -> tuple[jax.Array, jax.Array]:
    """For each offset rows of the input and of the output, as many as the longest list has.

    Behind the end of a list stand -1 and the number of rows. It is kinder than what one could write
    without knowing the voxels.
    """
    table = np.asarray(found.table)
    longest = max(int((table >= 0).sum(1).max()), 1)
    rows_in = np.full((len(table), longest), -1, np.int32)
    rows_out = np.full((len(table), longest), found.out_capacity, np.int32)
    for k, column in enumerate(table):
        (there,) = np.nonzero(column >= 0)
        rows_in[k, : len(there)], rows_out[k, : len(there)] = column[there], there
    return jnp.asarray(rows_in), jnp.asarray(rows_out)


def _scattered(
    rows: int, lists: tuple[jax.Array, jax.Array], x: jax.Array, w: jax.Array
) -> jax.Array:
    """The convolution as one writes it: gather the pairs' rows, multiply, scatter-add."""

    def step(y: jax.Array, tap: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        rows_in, rows_out, weights = tap
        added = contracted("lc,cf->lf", take(x, rows_in), weights, None)
        return y.at[rows_out].add(added, mode="drop"), None

    zeros = jnp.zeros((rows, w.shape[2]), jnp.float32)
    return lax.scan(step, zeros, (*lists, w))[0].astype(x.dtype)


def _depthwise_scattered(
    rows: int, lists: tuple[jax.Array, jax.Array], x: jax.Array, w: jax.Array
) -> jax.Array:
    """The depthwise convolution likewise."""

    def step(y: jax.Array, tap: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        rows_in, rows_out, weights = tap
        added = take(x, rows_in).astype(jnp.float32) * weights
        return y.at[rows_out].add(added, mode="drop"), None

    zeros = jnp.zeros((rows, x.shape[1]), jnp.float32)
    return lax.scan(step, zeros, (*lists, w))[0].astype(x.dtype)


def _im2col(table: jax.Array, x: jax.Array, w: jax.Array) -> jax.Array:
    """The convolution as one gather of `[M, K C]`, and one product."""
    taps, channels, features = w.shape
    gathered = take(x, table.T.ravel()).reshape(-1, taps * channels)
    weights = w.reshape(taps * channels, features)
    return contracted("mc,cf->mf", gathered, weights, None).astype(x.dtype)
