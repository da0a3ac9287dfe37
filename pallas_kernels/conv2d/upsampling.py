"""The convolution of images upsampled by 2 to the nearest, without the upsampled images.

Output `o` and tap `i` read sample `(stride o + dilation i - pad) // 2` of the images as they are.
Along an axis the outputs of even and of odd `o` are two phases (with an even stride there is one).
Within a phase a tap moves on by whole samples from one output to the next, and neighbouring taps
may read the same sample, so their weights add up. The phase is therefore a convolution of the small
images by a smaller filter: k taps become at most `ceil((k + 1) / 2)`, a 3x3 filter four of 2x2,
with 4/9 of the products. The outputs of the phases are interleaved.

Zeros around the large images are zeros around the small ones. One mirrored sample is the edge
repeated. More than one are no upsampling of anything small, so there the images are upsampled.

Any implementation computes the phases, whose windows say nothing of upsampling. What is here is
plain JAX around it, linear in x and in w. On a GPU phases that are alike are one convolution, to
the features of four, see `joint`; an implementation may write each phase at its place then. The
gradients are those of that one, too, but where arrays lie on Explicit axes.
"""

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.common.arguments import sharded, surely
from pallas_kernels.common.device import platform
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.linear import transposed
from pallas_kernels.common.types import Tree
from pallas_kernels.conv2d.moments import WithMoments, together
from pallas_kernels.conv2d.problem import Joint, Pair, Problem, Window
from pallas_kernels.conv2d.xla import mirrored

Run = Callable[..., jax.Array]
"""A function of an implementation, whose first argument is the window."""

_LARGE = 1 << 30
"""Elements of an output that a kernel no longer counts in 32 bits."""


class _Along(NamedTuple):
    """A phase along one axis: a convolution of the small images.

    Attributes:
        outputs: Their number.
        stride: The distance of the samples that neighbouring outputs read.
        pads: Samples before and after the images, less than zero where some are left out.
        dilation: The distance of the samples that neighbouring folded taps read.
        places: For each tap the folded one that it is added to.
    """

    outputs: int
    stride: int
    pads: Pair
    dilation: int
    places: tuple[int, ...]

    @property
    def taps(self) -> int:
        """The number of folded taps."""
        return max(self.places) + 1


class Phase(NamedTuple):
    """The outputs of one remainder modulo 2 along H, and of one along W.

    Attributes:
        window: The samples that the folded taps read.
        taps: Height and width of the folded filters.
        outputs: The numbers of outputs along H and W.
        places: For each row, and for each column, of taps the folded one that it is added to.
    """

    window: Window
    taps: Pair
    outputs: Pair
    places: tuple[tuple[int, ...], tuple[int, ...]]


def phases(window: Window, size: Sequence[int], taps: Sequence[int]) -> list[list[Phase]]:
    """The phases of a convolution, by remainders along H, then along W.

    Args:
        window: The window, with `upsample` 2.
        size: Height and width of the images.
        taps: Height and width of the filters.

    Example:
        >>> window = Window(pads=((1, 1), (1, 1)), upsample=2)
        >>> [[phase.window.pads for phase in row] for row in phases(window, (8, 8), (3, 3))]
        [[((1, 0), (1, 0)), ((1, 0), (0, 1))], [((0, 1), (1, 0)), ((0, 1), (0, 1))]]
    """
    if _upsampled(window):
        places = tuple(range(taps[0])), tuple(range(taps[1]))
        whole = window._replace(upsample=1, pads=((0, 0), (0, 0)), reflect=False)
        return [[Phase(whole, (taps[0], taps[1]), window.output(size, taps), places)]]
    rows, columns = (_along(window, axis, size[axis], taps[axis]) for axis in range(2))
    return [[_phase(window, row, column) for column in columns] for row in rows]


def joint(window: Window, images: tuple[int, ...], filters: tuple[int, ...]) -> Joint | None:
    """The phases as one convolution; None where they are not alike, or an output is too large.

    Args:
        window: The window, with `upsample` 2.
        images: The shape of the images.
        filters: The shape of the filters.

    Example:
        >>> window = Window(pads=((1, 1), (1, 1)), upsample=2)
        >>> joint(window, (1, 8, 8, 4), (3, 3, 4, 2)).windows
        (9, 9)
    """
    _, *size, _ = window.images(images)
    *taps, _, features = window.filters(filters)
    if _upsampled(window) or window.groups > 1 or not all(isinstance(n, int) for n in images):
        return None
    if 4 * math.prod(size) * features >= _LARGE:
        return None
    grid = phases(window, size, taps)
    first, last = grid[0][0], grid[-1][-1]
    shifts = [a[0] - b[0] for a, b in zip(first.window.pads, last.window.pads, strict=True)]
    alike = (
        len(grid) == len(grid[0]) == 2
        and first.taps == last.taps
        and first.window.dilation == last.window.dilation
        and first.window.stride == (1, 1)
        and first.outputs == last.outputs == tuple(size)
        and set(shifts) <= {0, 1}
    )
    if not alike:
        return None
    edges = window.pads if window.reflect else ((0, 0), (0, 0))
    # As what lies beyond the edges need not be in memory, nothing is said of what lies behind.
    pads = tuple((own[0] + edge[0], 0) for own, edge in zip(first.window.pads, edges, strict=True))
    return Joint(
        first.window._replace(pads=cast(tuple[Pair, Pair], pads)),
        (shifts[0], shifts[1]),
        (size[0] + shifts[0], size[1] + shifts[1]),
        window.reflect,
    )


def joint_filters(w: jax.Array, window: Window, size: Sequence[int]) -> jax.Array:
    """The filters of all phases, those of one after those of another along their features.

    Args:
        w: The filters.
        window: The window, with `upsample` 2.
        size: Height and width of the images.
    """
    each = [
        _folded(w, phase)
        for row in phases(window, size, window.filters(w.shape)[:2])
        for phase in row
    ]
    return jnp.concatenate(each, 3 if window.layout == "nhwc_hwcf" else 0)


def implemented(problem: Problem) -> Problem:
    """The convolution that implementations compute: itself, the largest of its phases, or all.

    All are one convolution on a GPU.

    Example:
        >>> window = Window(pads=((1, 1), (1, 1)), upsample=2)
        >>> problem = implemented(Problem((2, 8, 8, 4), "float32", 3, 3, 16, window, "float32"))
        >>> problem.kernel_height, problem.window.pads, problem.window.upsample
        (2, ((1, 0), (1, 0)), 1)
    """
    window = problem.window
    if window.upsample == 1:
        return problem
    n, *size, channels = problem.shape
    taps = problem.kernel_height, problem.kernel_width
    every = [phase for row in phases(window, size, taps) for phase in row]
    largest = max(every, key=lambda phase: math.prod(phase.taps))
    image = jax.ShapeDtypeStruct(window.laid_out(n, size[0], size[1], channels), problem.dtype)
    prepared = jax.eval_shape(partial(_prepared, window=window), image)
    computed = problem._replace(
        shape=window.images(prepared.shape),
        kernel_height=largest.taps[0],
        kernel_width=largest.taps[1],
        window=largest.window,
    )
    filters = window.filters_laid_out(*taps, channels // window.groups, problem.features)
    found = _at_once(window, image.shape, filters)
    if found is None:
        return computed
    features = 4 * problem.features
    folded = window.filters_laid_out(*largest.taps, channels // window.groups, features)
    own = _window_at_once(found, window, prepared.shape, folded)
    return computed._replace(features=features, window=own)


def forward(
    run: Run, window: Window, x: jax.Array, w: jax.Array, bias: jax.Array | None
) -> jax.Array:
    """The convolution of upsampled images.

    Args:
        run: Function of a window, images, filters and bias: an implementation's `forward`.
        window: The window, with `upsample` 2.
        x: The images, not upsampled.
        w: The filters.
        bias: `[NF]`, or None.
    """
    found = _at_once(window, x.shape, w.shape, w)
    if found is None:
        grid = _computed(run, window, x, w, bias)
    else:
        # Of four times the features, which fill a GPU's tiles, and which read the images once.
        grid = _computed_at_once(run, window, found, x, w, bias)
    return _assembled(grid, window)


def forward_with_moments(
    run: Run, window: Window, x: jax.Array, w: jax.Array, bias: jax.Array | None
) -> WithMoments:
    """The same, and its moments: the phases' tiles are the image's.

    Args:
        run: As `forward` takes it, but the function returns the moments, too.
        window: See `forward`.
        x: See `forward`.
        w: See `forward`.
        bias: See `forward`.
    """
    grid = _computed(run, window, x, w, bias)
    y = _assembled([[y for y, _ in row] for row in grid], window)
    return y, together([moments for row in grid for _, moments in row])


def input_grad(
    run: Run,
    window: Window,
    dy: jax.Array,
    w: jax.Array,
    *,
    shape: tuple[int, ...],
    dtype: DTypeLike,
) -> jax.Array:
    """The transpose of `forward` in x, applied to dy: an array `[N, *shape]`.

    Args:
        run: Function of a window, dy and filters, with the keywords shape and dtype: an
            implementation's `input_grad`.
        window: The window, with `upsample` 2.
        dy: The gradient of the output.
        w: The filters.
        shape: Shape of an image.
        dtype: Dtype of the gradient; sums over the phases are kept in float32 or better.
    """
    image, wide = (dy.shape[0], *shape), accumulation_dtype(dtype)
    prepare = partial(_prepared, window=window)
    seen = jax.eval_shape(prepare, jax.ShapeDtypeStruct(image, wide)).shape[1:]
    size = window.images(image)[1:3]
    found = _at_once(window, image, w.shape, w, dy)
    if found is None:
        parts = [
            run(phase.window, part, _folded(w, phase), shape=seen, dtype=wide)
            for phase, part in _parts(window, size, w.shape, dy)
        ]
        total = reduce(operator.add, parts)
    else:
        filters = joint_filters(w, window, size)
        own = _window_at_once(found, window, (image[0], *seen), filters.shape)
        spread = _spread(dy, window, found, size)
        total = run(own, spread, filters, shape=seen, dtype=wide)
    over_batch = jax.P(jax.typeof(dy).sharding.spec[0])
    return transposed(prepare, image, total, w, spec=over_batch).astype(dtype)


def weight_grad(
    run: Run,
    window: Window,
    x: jax.Array,
    dy: jax.Array,
    *,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    rounds: bool,
) -> jax.Array:
    """The transpose of `forward` in w, applied to dy: an array of the filters' shape.

    Args:
        run: Function of a window, images and dy, with the keywords shape and dtype: an
            implementation's `weight_grad`.
        window: The window, with `upsample` 2.
        x: The images, not upsampled.
        dy: The gradient of the output.
        shape: Shape of the filters.
        dtype: Dtype of the gradient; sums over the phases are kept in float32 or better.
        rounds: Whether `run` rounds what it returns to the dtype of its arrays, as XLA on a GPU.
    """
    images, wide = _prepared(x, window), accumulation_dtype(dtype)
    size = window.images(x.shape)[1:3]
    joined = _at_once(window, x.shape, shape, x, dy)
    if joined is not None:
        together = partial(joint_filters, window=window, size=size)
        filters = jax.eval_shape(together, jax.ShapeDtypeStruct(shape, wide)).shape
        own = _window_at_once(joined, window, images.shape, filters)
        dw = run(own, images, _spread(dy, window, joined, size), shape=filters, dtype=wide)
        return transposed(together, shape, dw).astype(dtype)
    _, _, *channels = window.filters(shape)
    parts = list(_parts(window, size, shape, dy))
    # Of phases that are not alike, which no network has, the gradients are added. Those of arrays
    # on Explicit axes go phase by phase whatever they are, too slowly if all were computed wide.
    if rounds and len(parts) > 1 and _whole_on_gpu(x, dy):
        images, parts = images.astype(wide), [(phase, part.astype(wide)) for phase, part in parts]
    found = []
    for phase, part in parts:
        folded = window.filters_laid_out(*phase.taps, *channels)
        of_phase = run(phase.window, images, part, shape=folded, dtype=wide)
        # Taps are never split, features may be.
        spec = jax.typeof(of_phase).sharding.spec
        found.append(transposed(partial(_folded, phase=phase), shape, of_phase, spec=spec))
    return reduce(operator.add, found).astype(dtype)


def _upsampled(window: Window) -> bool:
    """Whether the images are upsampled after all, since more than one sample is mirrored."""
    return window.reflect and max(map(max, window.pads)) > 1


def _at_once(
    window: Window, images: tuple[int, ...], filters: tuple[int, ...], *arrays: jax.Array
) -> Joint | None:
    """The phases as one convolution, on a GPU where no array is sharded over Explicit axes."""
    return joint(window, images, filters) if _whole_on_gpu(*arrays) else None


def _whole_on_gpu(*arrays: jax.Array) -> bool:
    """Whether this is a GPU, and no array is sharded over Explicit axes."""
    return platform() == "gpu" and not any(map(sharded, arrays))


def _along(window: Window, axis: int, n: int, taps: int) -> list[_Along]:
    """The phases along an axis of so many samples."""
    stride, dilation, pads = window.stride[axis], window.dilation[axis], window.pads[axis]
    outputs = window.output((n, n), (taps, taps))[axis]
    edges = pads if window.reflect else (0, 0)
    found = []
    for first in range(1 if stride % 2 == 0 else 2):
        reads = [(stride * first + dilation * i - pads[0]) // 2 for i in range(taps)]
        own, count = stride // 2, outputs
        if stride % 2:
            # So written, a number of outputs that is symbolic stays a sum.
            own, count = stride, n + (outputs - 2 * n - first + 1) // 2
        if surely(operator.lt, count, 1):
            continue
        low, high = min(reads), max(reads)
        step = math.gcd(*(at - low for at in reads)) or 1
        places = tuple((at - low) // step for at in reads)
        after = own * (count - 1) + high + 1 - n - edges[1]
        found.append(_Along(count, own, (-low - edges[0], after), step, places))
    return found


def _phase(window: Window, row: _Along, column: _Along) -> Phase:
    own = window._replace(
        stride=(row.stride, column.stride),
        pads=(row.pads, column.pads),
        dilation=(row.dilation, column.dilation),
        reflect=False,
        upsample=1,
    )
    outputs = row.outputs, column.outputs
    return Phase(own, (row.taps, column.taps), outputs, (row.places, column.places))


def _computed(
    run: Callable[..., Tree], window: Window, x: jax.Array, w: jax.Array, bias: jax.Array | None
) -> list[list[Tree]]:
    """The results of an implementation's function of each phase."""
    _, *size, _ = window.images(x.shape)
    images = _prepared(x, window)
    return [
        [run(phase.window, images, _folded(w, phase), bias) for phase in row]
        for row in phases(window, size, window.filters(w.shape)[:2])
    ]


def _computed_at_once(
    run: Run, window: Window, found: Joint, x: jax.Array, w: jax.Array, bias: jax.Array | None
) -> list[list[jax.Array]]:
    """The outputs of each phase, computed by one convolution."""
    _, *size, _ = window.images(x.shape)
    images, filters = _prepared(x, window), joint_filters(w, window, size)
    own = _window_at_once(found, window, images.shape, filters.shape)
    y = run(own, images, filters, None if bias is None else jnp.tile(bias, 4))
    return _cut(y, window, found, size)


def _cut(y: jax.Array, window: Window, found: Joint, size: Sequence[int]) -> list[list[jax.Array]]:
    """The outputs of each phase, cut out of those of one convolution."""
    n, *_, features = window.images(y.shape)

    def cut(below: int, right: int) -> jax.Array:
        v, u = below * found.shifts[0], right * found.shifts[1]
        first = (2 * below + right) * (features // 4)
        start = window.laid_out(0, v, u, first)
        end = window.laid_out(n, v + size[0], u + size[1], first + features // 4)
        return lax.slice(y, start, end)

    return [[cut(below, right) for right in range(2)] for below in range(2)]


def _spread(dy: jax.Array, window: Window, found: Joint, size: Sequence[int]) -> jax.Array:
    """The gradient of what the phases as one convolution are, of which dy is the output's."""
    n, *_, features = window.images(dy.shape)
    outputs = window.laid_out(n, *found.windows, 4 * features)
    return transposed(lambda y: _assembled(_cut(y, window, found, size), window), outputs, dy)


def _window_at_once(
    found: Joint, window: Window, images: tuple[int, ...], filters: tuple[int, ...]
) -> Window:
    """The window of the phases as one convolution, of the shapes of prepared images and filters."""
    _, *size, _ = window.images(images)
    *taps, _, _ = window.filters(filters)
    pads = []
    for axis in range(2):
        edge = window.pads[axis][0] if window.reflect else 0
        before = found.window.pads[axis][0] - edge
        read = found.windows[axis] + found.window.dilation[axis] * (taps[axis] - 1)
        pads.append((before, read - before - size[axis]))
    return found.window._replace(pads=(pads[0], pads[1]))


def _assembled(grid: list[list[jax.Array]], window: Window) -> jax.Array:
    """The whole output."""
    down, across = image_axes(window)
    return _interleaved([_interleaved(row, across) for row in grid], down)


def image_axes(window: Window) -> Pair:
    """The axes H and W of images."""
    return (1, 2) if window.layout == "nhwc_hwcf" else (2, 3)


def _prepared(x: jax.Array, window: Window) -> jax.Array:
    """The images that the phases read."""
    if _upsampled(window):
        for axis in image_axes(window):
            x = _interleaved([x, x], axis)
        return mirrored(x, window)
    if window.reflect:
        # Not by "edge" of `jnp.pad`, which does not take what is sharded over Explicit axes.
        for axis, (before, after) in zip(image_axes(window), window.pads, strict=True):
            first = lax.slice_in_dim(x, 0, before, axis=axis)
            last = lax.slice_in_dim(x, x.shape[axis] - after, None, axis=axis)
            x = jnp.concatenate([first, x, last], axis)
    return x


def _folded(w: jax.Array, phase: Phase) -> jax.Array:
    """The filters of a phase; weights are added in float32 or better."""
    folded = w.astype(accumulation_dtype(w.dtype))
    axes = (0, 1) if phase.window.layout == "nhwc_hwcf" else (2, 3)
    for axis, places in zip(axes, phase.places, strict=True):
        if places == tuple(range(len(places))):
            continue
        each = [lax.index_in_dim(folded, i, axis, keepdims=False) for i in range(len(places))]
        zero = jnp.zeros_like(each[0])
        sums = [
            sum((one for one, place in zip(each, places, strict=True) if place == at), zero)
            for at in range(max(places) + 1)
        ]
        folded = jnp.stack(sums, axis)
    return folded.astype(w.dtype)


def _interleaved(parts: list[jax.Array], axis: int) -> jax.Array:
    """The outputs of one or two phases, in turn along an axis."""
    if len(parts) == 1:
        return parts[0]
    first, second = parts
    counts = [part.shape[axis] for part in parts]
    if counts[0] != counts[1]:
        end = [(0, 0)] * first.ndim
        end[axis] = (0, 1)
        second = jnp.pad(second, end)
    both = jnp.stack([first, second], axis + 1)
    both = both.reshape(*both.shape[:axis], 2 * counts[0], *both.shape[axis + 2 :])
    return both if counts[0] == counts[1] else lax.slice_in_dim(both, 0, -1, axis=axis)


def _parts(
    window: Window, size: Sequence[int], filters: tuple[int, ...], dy: jax.Array
) -> list[tuple[Phase, jax.Array]]:
    """Each phase, and the part of dy that is the gradient of its outputs."""
    down, across = image_axes(window)
    rows = phases(window, size, window.filters(filters)[:2])
    parts = _divided(dy, down, [row[0].outputs[0] for row in rows])
    return [
        (phase, part)
        for row, rest in zip(rows, parts, strict=True)
        for phase, part in zip(
            row, _divided(rest, across, [phase.outputs[1] for phase in row]), strict=True
        )
    ]


def _divided(dy: jax.Array, axis: int, counts: list[int]) -> list[jax.Array]:
    """The parts that `_interleaved` makes one array of, with so many samples each."""
    if len(counts) == 1:
        return [dy]
    odd = counts[0] != counts[1]
    if odd:
        end = [(0, 0)] * dy.ndim
        end[axis] = (0, 1)
        dy = jnp.pad(dy, end)
    both = dy.reshape(*dy.shape[:axis], counts[0], 2, *dy.shape[axis + 1 :])
    first, second = (lax.index_in_dim(both, i, axis + 1, keepdims=False) for i in range(2))
    return [first, lax.slice_in_dim(second, 0, -1, axis=axis) if odd else second]
