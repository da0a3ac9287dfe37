"""The convolution of few channels, or to few features, with a row of taps as one.

Matrix units multiply blocks of 16 channels or more, and of three they leave most idle. Where the
channels are the fewer, what a row of taps reads becomes the channels of one tap: 9 taps of 3
channels are 27 values, and a 9x9 filter is 9x1. Where the features are, a row of taps becomes one
tap to the features of all: 9x1 to 27 features, of which 9 are added, each at its tap's place. The
27 are filled up to 32, so that each pixel's begin where kernels read them 16 bytes at once.

What is gathered, or added, is larger than the images. Two neighbouring outputs read 10 columns of 3
channels, 30 values: as one pixel of twice the features they take half of the values for as many
products. And where the features of all taps exceed what caches hold, rows are computed strip by
strip.

Any implementation multiplies. What is here is plain JAX around it, linear in x, in w and in what
is multiplied. On a GPU it is taken unasked for long rows, see `unasked`; which is the faster, the
tuner finds out, see `offered`.
"""

import math
from collections.abc import Callable
from functools import partial, reduce
from itertools import pairwise
from operator import add

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.common.device import platform
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.linear import transposed
from pallas_kernels.common.types import Json, Keywords, Pair, Tree
from pallas_kernels.conv2d.moments import each_apart, of_rows, together
from pallas_kernels.conv2d.problem import Problem, Window
from pallas_kernels.conv2d.xla import epilogue, mirrored

Run = Callable[..., Tree]
"""A function of an implementation, whose first argument is the window."""

NAME = "whole_rows"
"""The key of a search space by which `vjp` takes this form, beside those of tiles."""

_FEW = 16
"""The least channels that a matrix unit multiplies at once."""
_LONG = 7
"""The fewest taps of a row that is taken as one unasked: 9 were measured to be worth it."""
_ALIGNED = 8
"""Channels, or features, are filled up to a multiple of these, 16 bytes of 16 bits each."""
_CACHED = 1 << 25
"""The bytes that the features of all taps may take; a GPU's cache holds so many."""
_STRIPS = 8
"""The most strips that a convolution is cut into."""


def offered(problem: Problem) -> list[Json]:
    """The form that a search space has more where channels or features are few.

    It is the one that a kernel of ours does not take unasked.

    Example:
        >>> with jax.default_device(jax.devices("cpu")[0]):
        ...     offered(Problem((2, 64, 64, 3), "bfloat16", 9, 9, 32, Window(), "bfloat16"))
        [{'whole_rows': True}]
        >>> offered(Problem((2, 64, 64, 32), "bfloat16", 9, 9, 32, Window(), "bfloat16"))
        []
    """
    filters = problem.kernel_height, problem.kernel_width, problem.shape[-1], problem.features
    if not _possible(problem.window, filters):
        return []
    return [{NAME: not unasked(problem.window, filters, problem.dtype, rounds=False)}]


def unasked(
    window: Window, filters: tuple[int, int, int, int], dtype: DTypeLike, *, rounds: bool
) -> bool:
    """Whether this form is taken where nothing was measured: for long rows of taps, on a GPU.

    cuDNN writes what it reads in 16 bits, and where features are fewer than channels an output is a
    sum of what was written, a number for each tap of a row, which needs more.

    Args:
        window: The window.
        filters: `(HF, WF, C / groups, NF)`.
        dtype: The dtype of images and filters.
        rounds: Whether XLA computes an output, and so rounds what is multiplied to the dtype.

    Example:
        >>> with jax.default_device(jax.devices("cpu")[0]):
        ...     unasked(Window(), (9, 9, 3, 32), "bfloat16", rounds=False)
        False
    """
    _, taps, channels, features = filters
    narrow = jnp.dtype(dtype).itemsize == 2 and channels > features and rounds
    return _possible(window, filters) and taps >= _LONG and platform() == "gpu" and not narrow


def _possible(window: Window, filters: tuple[int, int, int, int]) -> bool:
    """Whether channels or features are so few that there is something to win."""
    _, taps, channels, features = filters
    return min(channels, features) < _FEW and taps > 1 and window.groups == 1


def forward(
    run: Run,
    window: Window,
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
    *,
    activation: str | None,
    out_dtype: DTypeLike,
    moments: bool = False,
) -> Tree:
    """The convolution with its epilogue.

    Args:
        run: Function of a window, images, filters and bias, with the other keywords: an
            implementation's `forward`.
        window: The window, of one group.
        x: The images.
        w: The filters.
        bias: `[NF]`, or None.
        activation: See `vjp`.
        out_dtype: Dtype of the output.
        moments: Whether to return its moments, too.
    """
    form = _Form(window, x.shape, w.shape)
    rest: Keywords = {"activation": activation, "out_dtype": out_dtype}
    rest |= {"moments": True} if moments else {}
    if form.gathers:
        bias = None if bias is None else jnp.tile(bias, form.joined)
        found = run(form.window, form.prepared(x), form.folded(w), bias, **rest)
        if not moments:
            return form.apart(found)
        y, tiles = found
        return form.apart(y), each_apart(tiles, form.joined)
    wide = accumulation_dtype(x.dtype)
    own, cuts = form.strips(jnp.dtype(wide).itemsize)
    each: list[jax.Array] = []
    tiles = []
    for cut in cuts:
        if each:
            # The features of a strip are added before those of the next one are computed.
            x, each[-1] = lax.optimization_barrier((x, each[-1]))
        products = run(own, cut(x), form.folded(w), None, activation=None, out_dtype=wide)
        y = epilogue(form.added(products), bias, window, activation)
        each.append(y.astype(out_dtype))
        tiles += [of_rows(y, window)] if moments else []
    y = jnp.concatenate(each, form.down)
    return (y, together(tiles)) if moments else y


def input_grad(
    run: Run,
    window: Window,
    dy: jax.Array,
    w: jax.Array,
    *,
    shape: tuple[int, ...],
    dtype: DTypeLike,
) -> jax.Array:
    """The transpose of the convolution in x, applied to dy: an array `[N, *shape]`.

    Args:
        run: Function of a window, dy and filters, with the other keywords: an implementation's
            `input_grad`.
        window: The window, of one group.
        dy: The gradient of the output.
        w: The filters.
        shape: Shape of an image.
        dtype: Dtype of the gradient.
    """
    image, wide = (dy.shape[0], *shape), accumulation_dtype(dtype)
    form = _Form(window, image, w.shape)
    seen = jax.eval_shape(form.prepared, jax.ShapeDtypeStruct(image, wide)).shape[1:]
    dx = run(form.window, form.spread(dy), form.folded(w), shape=seen, dtype=wide)
    over_batch = jax.P(jax.typeof(dy).sharding.spec[0])
    return transposed(form.prepared, image, dx, w, spec=over_batch).astype(dtype)


def weight_grad(
    run: Run,
    window: Window,
    x: jax.Array,
    dy: jax.Array,
    *,
    shape: tuple[int, ...],
    dtype: DTypeLike,
) -> jax.Array:
    """The transpose of the convolution in w, applied to dy: an array of the filters' shape.

    Args:
        run: Function of a window, images and dy, with the other keywords: an implementation's
            `weight_grad`.
        window: The window, of one group.
        x: The images.
        dy: The gradient of the output.
        shape: Shape of the filters.
        dtype: Dtype of the gradient.
    """
    form = _Form(window, x.shape, shape)
    filters = jax.eval_shape(form.folded, jax.ShapeDtypeStruct(shape, dtype)).shape
    dw = run(form.window, form.prepared(x), form.spread(dy), shape=filters, dtype=dtype)
    return transposed(form.folded, shape, dw)


class _Form:
    """The convolution that is computed in the place of a given one, and the way there and back.

    Attributes:
        gathers: Whether taps are gathered as channels; otherwise they are added as features.
        joined: The number of neighbouring outputs that are computed as one, to the features of
            all of them, from the columns that any of them reads.
        window: The window of what is computed, whose filters are one tap wide.
    """

    def __init__(self, window: Window, images: tuple[int, ...], filters: tuple[int, ...]) -> None:
        _, *size, channels = window.images(images)
        self._height, self._taps, _, self._features = window.filters(filters)
        self.gathers = channels <= self._features
        self._given = window
        self._images = images
        self._rows, self._outputs = window.output(size, (self._height, self._taps))
        # Rows are mirrored by what gathers the taps, or else by what multiplies, which may do so
        # as it reads.
        mirrors = window.reflect and self.gathers
        self.window = window._replace(
            stride=(window.stride[0], 1),
            pads=((0, 0) if mirrors else window.pads[0], (0, 0)),
            dilation=(window.dilation[0], 1),
            reflect=window.reflect and not mirrors,
        )
        self._columns = size[1]
        few = min(channels, self._features)
        self.joined = 2 if self._pairs(channels) else 1
        self._fill = -(self._taps + self.joined - 1) * few % _ALIGNED

    def _pairs(self, channels: int) -> bool:
        """Whether two outputs read no more than one does when that is filled up."""
        filled = [-(-taps * channels // _ALIGNED) for taps in (self._taps, self._taps + 1)]
        return (
            self.gathers
            and self._given.layout == "nhwc_hwcf"
            and self._given.stride[1] == self._given.dilation[1] == 1
            and isinstance(self._outputs, int)
            and self._outputs % 2 == 0
            and filled[0] == filled[1]
        )

    @property
    def _across(self) -> int:
        """The axis W of images."""
        return 2 if self._given.layout == "nhwc_hwcf" else 3

    @property
    def down(self) -> int:
        """The axis H of images."""
        return self._across - 1

    def _read(self, padded: jax.Array) -> list[jax.Array]:
        """For each tap of a row, of all that are joined, the columns that it reads."""
        stride, dilation = self.joined * self._given.stride[1], self._given.dilation[1]
        span = stride * (self._outputs // self.joined - 1) + 1
        return [
            lax.slice_in_dim(padded, dilation * j, dilation * j + span, stride, self._across)
            for j in range(self._taps + self.joined - 1)
        ]

    def _padded(self, x: jax.Array, pads: tuple[Pair, Pair]) -> jax.Array:
        """Zeros, or what is mirrored, around the rows and the columns; zeros may be < 0."""
        if self._given.reflect:
            return mirrored(x, self._given._replace(pads=pads))
        rows, columns = ((*edge, 0) for edge in pads)
        none = (0, 0, 0)
        edges = self._given.laid_out(none, rows, columns, none)
        return lax.pad(x, jnp.zeros((), x.dtype), edges)

    def prepared(self, x: jax.Array) -> jax.Array:
        """The images, or those whose channels are those of a row of taps."""
        if not self.gathers:
            return x
        # Zeros above and below are left to what multiplies.
        rows = self._given.pads[0] if self._given.reflect else (0, 0)
        channels = 3 if self._given.layout == "nhwc_hwcf" else 1
        reads = self._read(self._padded(x, (rows, self._given.pads[1])))
        return self._filled(jnp.concatenate(reads, channels), channels)

    def _filled(self, array: jax.Array, axis: int) -> jax.Array:
        """The array with as many zeros after an axis as make it aligned."""
        return jnp.pad(array, [(0, self._fill * (at == axis)) for at in range(4)])

    def folded(self, w: jax.Array) -> jax.Array:
        """The filters of one tap a row, with its taps as channels, or as features."""
        if self._given.layout == "nchw_fchw":
            w = w.transpose(2, 3, 1, 0)
        height, taps, channels, features = w.shape
        if self.gathers:
            last = self.joined - 1
            moved = [
                jnp.pad(w, ((0, 0), (i, last - i), (0, 0), (0, 0))) for i in range(self.joined)
            ]
            w = jnp.concatenate(moved, 3)
            w = self._filled(w.reshape(height, 1, (taps + last) * channels, -1), 2)
        else:
            w = w.transpose(0, 2, 1, 3).reshape(height, 1, channels, taps * features)
            w = self._filled(w, 3)
        return w if self._given.layout == "nhwc_hwcf" else w.transpose(3, 2, 0, 1)

    def apart(self, y: jax.Array) -> jax.Array:
        """The output, of which neighbouring pixels were computed as one."""
        if self.joined == 1:
            return y
        n, height, width, features = y.shape
        return y.reshape(n, height, width * self.joined, features // self.joined)

    def strips(self, itemsize: int) -> tuple[Window, list[Callable[[jax.Array], jax.Array]]]:
        """The window of all strips, and for each the function that cuts it out of the images.

        Their outputs are the rows of the whole, in order. Those of one height are one kernel.

        Args:
            itemsize: The bytes of a feature of a tap.
        """
        n, height, columns, _ = self._given.images(self._images)
        sizes = n, self._rows, columns, self._taps * self._features + self._fill
        count, (above, below) = 1, self.window.pads[0]
        if all(isinstance(size, int) for size in (height, *sizes)):
            # What is mirrored has to be in the same strip.
            most = min(_STRIPS, self._rows // (2 * max(0, above, below) + 1))
            count = min(most, -(-math.prod(sizes) * itemsize // _CACHED))
        if count <= 1:
            return self.window, [lambda x: x]
        cuts: list[Callable[[jax.Array], jax.Array]] = []
        for first, end in pairwise(self._rows * i // count for i in range(count + 1)):
            top = self.window.stride[0] * first - above
            bottom = self.window.stride[0] * (end - 1) - above
            bottom += self.window.dilation[0] * (self._height - 1) + 1
            pads = max(0, -top), max(0, bottom - height)
            cuts.append(partial(self._cut, max(0, top), min(height, bottom), pads))
        return self.window._replace(pads=((0, 0), (0, 0)), reflect=False), cuts

    def _cut(self, first: int, end: int, pads: Pair, x: jax.Array) -> jax.Array:
        """Rows of the images, padded as the images are."""
        return self._padded(lax.slice_in_dim(x, first, end, axis=self.down), (pads, (0, 0)))

    def added(self, products: jax.Array) -> jax.Array:
        """The output: of each tap of a row its features, at the columns that it reads."""
        channels = 3 if self._given.layout == "nhwc_hwcf" else 1
        reads = self._read(self._padded(products, ((0, 0), self._given.pads[1])))
        own = (
            lax.slice_in_dim(read, j * self._features, (j + 1) * self._features, axis=channels)
            for j, read in enumerate(reads)
        )
        return reduce(add, own)

    def spread(self, dy: jax.Array) -> jax.Array:
        """The gradient of what is computed: the transpose of `apart` or of `added`."""
        if self.gathers:
            n, height, width, features = dy.shape
            two = n, height, width // self.joined, features * self.joined
            return dy if self.joined == 1 else dy.reshape(two)
        shape = self._given.laid_out(
            dy.shape[0], self._rows, self._columns, self._taps * self._features + self._fill
        )
        return transposed(self.added, shape, dy)
