"""The wavelet convolution on NVIDIA GPUs: the CUDA kernels that PyTorch launches too.

In 16 bits kernels of 3, 5 and 7 run on tensor cores, a level as one convolution of folded taps. In
float32 kernels of 3 and 5 go level by level, and no band is written to memory. Signals, of one
axis, have a kernel of their own, in all dtypes.
"""

import math
from collections.abc import Mapping
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common._compat import vary_like
from pallas_kernels.common.biased import summed
from pallas_kernels.common.cuda import DTYPES
from pallas_kernels.common.cuda_call import device_properties, launch, unavailable
from pallas_kernels.common.types import Dtype, Taps, Tree
from pallas_kernels.wtconv import (
    bands_launches,
    cuda_launches,
    folded_launches,
    folding,
    line_launches,
    scaled_launches,
    scaling,
)
from pallas_kernels.wtconv.cuda_launches import Images
from pallas_kernels.wtconv.gradients_launches import Parameters
from pallas_kernels.wtconv.line_launches import Signals
from pallas_kernels.wtconv.problem import Problem
from pallas_kernels.wtconv.scaling import Scales, Weights

__all__ = [
    "BIAS_GRADIENT",
    "DIFFERENTIABLE",
    "as_measured",
    "check",
    "forward",
    "in_turns",
    "products",
    "scale_launches",
    "scale_sums",
    "search_space",
    "unavailable",
    "weight_grad",
]

DIFFERENTIABLE = False
BIAS_GRADIENT = True
_TILE = "resident", "together", "apart"
"""The parameters of `search_space`; of signals and of float32, where it is not computed level by
level, the first."""
_LINE = 3
"""Axes of signals `[N, L, C]`."""
_WORTH_LAUNCHES = 1 << 22
"""Elements of the smallest images that were measured level by level in float32."""
_WARP = 32
"""Channels of a warp, level by level."""


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` where these kernels do not take a problem.

    Args:
        direction: "fwd" or "bwd".
        problem: The call.
    """
    launches = line_launches if len(problem.shape) == _LINE else cuda_launches
    launches.check(problem)


def as_measured(direction: str, problem: Problem) -> bool:
    """Whether a problem runs on the kernels that were measured; see `check`.

    In float32 those go level by level, through as many elements as are worth that many launches,
    and full warps. The kernel of all levels, which other kernel sizes take, is slower.
    """
    shape, dtype, kernel_size = problem.shape, problem.dtype, problem.kernel_size
    if len(shape) == _LINE or _folds(shape, dtype, kernel_size):
        return True
    large = math.prod(shape) >= _WORTH_LAUNCHES and shape[-1] >= _WARP
    return large and _streams(shape, dtype, kernel_size)


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The parameters that are worth timing; see `check` for the arguments."""
    if len(problem.shape) == _LINE:
        return line_launches.search_space(problem.kernel_size)
    if _folds(problem.shape, problem.dtype, problem.kernel_size):
        about = problem.shape, str(problem.dtype), problem.kernel_size, problem.levels
        return folded_launches.search_space(direction, *about, device_properties())
    if _streams(problem.shape, problem.dtype, problem.kernel_size):
        return [{}]
    return cuda_launches.search_space()


@partial(jax.jit, static_argnames=("wavelet", "transpose", "precision", *_TILE))
def forward(
    x: jax.Array,
    taps: Taps,
    bias: jax.Array | None,
    *,
    wavelet: str,
    transpose: bool,
    precision: lax.Precision | None,
    resident: int | None = None,
    together: int | None = None,
    apart: int = folded_launches.APART,
) -> jax.Array:
    """The operator on `x [N, H, W, C]` or `[N, L, C]`, or its transpose; see `vjp`.

    `resident`, `together` and `apart` are of `search_space`. `wavelet` is Haar. `precision` changes
    nothing: float32 is computed without tensor cores.
    """
    if x.ndim == _LINE:
        return _line_forward(x, taps, bias, transpose, resident)
    if _folds(x.shape, x.dtype, taps[0].shape[0]):
        tile = {"resident": resident, "together": together, "apart": apart}
        return _folded_forward(x, taps, bias, transpose, tile)
    offsets = None if bias is None else bias.astype(jnp.float32)
    if _streams(x.shape, x.dtype, taps[0].shape[0]):
        numbers = [tap.astype(jnp.float32) for tap in taps]
        about = x.shape, device_properties(), launch, transpose
        return vary_like((x, taps, bias), bands_launches.forward(x, numbers, offsets, *about))
    planes = [tap.astype(jnp.float32).transpose(3, 2, 0, 1) for tap in taps]
    where = Images(x.shape, str(x.dtype)), device_properties(), launch
    y = cuda_launches.forward(x, planes, offsets, *where, transpose, resident=resident)
    return vary_like((x, taps, bias), y)


@partial(jax.jit, static_argnames=("kernel_shapes", "wavelet", "precision", *_TILE))
def weight_grad(
    x: jax.Array,
    dy: jax.Array,
    *,
    kernel_shapes: tuple[tuple[int, ...], ...],
    wavelet: str,
    precision: lax.Precision | None,
    resident: int | None = None,
    together: int | None = None,
    apart: int = folded_launches.APART,
) -> Taps:
    """The gradients of the taps: each level's coefficients of x correlated with those of dy.

    Every sum has a fixed order, so results are bitwise reproducible.
    """
    if x.ndim == _LINE:
        return _line_weight_grad(x, dy, kernel_shapes, resident)
    if _folds(x.shape, x.dtype, kernel_shapes[0][0]):
        tile = {"resident": resident, "together": together, "apart": apart}
        return _folded_weight_grad(x, dy, kernel_shapes, tile)
    if _streams(x.shape, x.dtype, kernel_shapes[0][0]):
        return _streamed_weight_grad(x, dy, kernel_shapes)
    biased = len(kernel_shapes[-1]) == 1
    shapes = kernel_shapes[: len(kernel_shapes) - biased]
    kernel_size, levels = shapes[0][0], len(shapes) - 1
    images = Images(x.shape, str(x.dtype))
    sizes = images, kernel_size, levels, device_properties(), launch
    first, *rest = cuda_launches.weight_grad(x, dy, *sizes, resident=resident)
    bands = jnp.concatenate([first, *(sums[:, 1:] for sums in rest)], axis=1).transpose(2, 1, 0)
    starts = (0, *range(1, 4 * levels, 4), 1 + 4 * levels)
    sums = tuple(
        bands[:, start:stop].reshape(shape)
        for start, stop, shape in zip(starts[:-1], starts[1:], shapes, strict=True)
    )
    return vary_like((x, dy), (*sums, summed(dy)) if biased else sums)


def scale_launches(problem: Problem) -> frozenset[str]:
    """The directions in which `products` and `scale_sums` spare launches of XLA's.

    Not forward in 16 bits, where XLA multiplies in the launch that folds taps; nor where gradients
    come in one array, whose parts XLA would copy for a launch.

    Args:
        problem: The call.
    """
    if len(problem.shape) == _LINE or problem.levels == 0:
        return frozenset()
    about = problem.shape, problem.dtype, problem.kernel_size
    if _folds(*about):
        return frozenset({"bwd"})
    return frozenset({"fwd", "bwd"} if _streams(*about) else ())


def in_turns(problem: Problem) -> bool:
    """Whether the gradients of taps come before dx.

    Not where both, by their default parameters, read the same means of dy, which are made once.

    Args:
        problem: The call.
    """
    shape, dtype, k = about = problem.shape, problem.dtype, problem.kernel_size
    if len(shape) == _LINE:
        return False
    if not _folds(*about):
        return _streams(*about)
    levels, gpu = problem.levels, device_properties()
    return not folded_launches.reads_means(shape, str(dtype), k, levels, gpu)


def products(weights: Weights, scales: Scales, dtypes: Tree) -> Weights:
    """Kernels and bias times their scales; see `scaling.products`."""
    given, own, made = map(_dtype, (weights, scales, dtypes))
    backward = given == "float32" and own == made
    if own is None or not (backward or (given == own and made == "float32")):
        return scaling.products(weights, scales, dtypes)
    taps, bias = weights
    parameters = Parameters(taps, scales, bias, own)
    about = taps[0].shape[-1], taps[0].shape[0], launch
    # In float32 both directions share a kernel.
    backward = backward and own != "float32"
    found, offset = scaled_launches.scaled(
        parameters, *about, channels_last=True, backward=backward
    )
    return vary_like((weights, scales), (tuple(found), offset))


def scale_sums(gradients: Weights, weights: Weights, dtypes: Tree) -> Scales:
    """The gradients of the scales; see `scaling.scale_sums`."""
    given, own, made = map(_dtype, (gradients, weights, dtypes))
    if own is None or given != "float32" or own != made:
        return scaling.scale_sums(gradients, weights, dtypes)
    (dtaps, dbias), (taps, bias) = gradients, weights
    parameters = Parameters(taps, (), bias, own)
    about = taps[0].shape[-1], taps[0].shape[0], launch
    sums = scaled_launches.scale_sums(dtaps, dbias, parameters, *about)
    return vary_like((gradients, weights), tuple(sums))


def _dtype(arrays: Tree) -> str | None:
    """The name of the dtype that all arrays, or dtypes, are of; None where they differ."""
    found = {str(getattr(each, "dtype", each)) for each in jax.tree.leaves(arrays)}
    return found.pop() if len(found) == 1 and found <= {*DTYPES} else None


def _line_forward(
    x: jax.Array, taps: Taps, bias: jax.Array | None, transpose: bool, resident: int | None
) -> jax.Array:
    """The operator on signals, or its transpose: the same of flipped taps."""
    whole = jnp.concatenate([tap.astype(jnp.float32) for tap in taps], 1)
    offsets = None if bias is None else bias.astype(jnp.float32)
    where = Signals(x.shape, str(x.dtype)), device_properties(), launch
    y = line_launches.forward(
        x, whole[::-1] if transpose else whole, offsets, *where, resident=resident
    )
    return vary_like((x, taps, bias), y)


def _line_weight_grad(
    x: jax.Array,
    dy: jax.Array,
    kernel_shapes: tuple[tuple[int, ...], ...],
    resident: int | None,
) -> Taps:
    """The gradients of the taps of signals, and of the bias where its shape is the last one."""
    shapes = [shape for shape in kernel_shapes if len(shape) > 1]
    kernel_size, levels = shapes[0][0], len(shapes) - 1
    about = Signals(x.shape, str(x.dtype)), kernel_size, levels, device_properties(), launch
    sums = line_launches.weight_grad(x, dy, *about, resident=resident)
    whole = sums[:-1].reshape(kernel_size, 1 + 2 * levels, -1)
    found = *jnp.split(whole, [*range(1, 2 * levels + 1, 2)], 1), sums[-1]
    return vary_like((x, dy), found[: len(kernel_shapes)])


def _folds(shape: tuple[int, ...], dtype: Dtype, kernel_size: int) -> bool:
    """Whether a call runs on tensor cores."""
    return folded_launches.takes(shape, str(dtype), kernel_size, device_properties())


def _streams(shape: tuple[int, ...], dtype: Dtype, kernel_size: int) -> bool:
    """Whether a call goes level by level in float32."""
    return bands_launches.takes(shape, str(dtype), kernel_size, device_properties())


def _streamed_weight_grad(
    x: jax.Array, dy: jax.Array, kernel_shapes: tuple[tuple[int, ...], ...]
) -> Taps:
    """The gradients of the taps in float32, and of the bias where its shape is the last one."""
    kernel_size = kernel_shapes[0][0]
    levels = sum(len(shape) > 1 for shape in kernel_shapes) - 1
    about = x.shape, kernel_size, levels, device_properties(), launch
    found = bands_launches.weight_grad(x, dy, *about, channels_last=True)
    return vary_like((x, dy), tuple(found[: len(kernel_shapes)]))


def _folded_forward(
    x: jax.Array, taps: Taps, bias: jax.Array | None, transpose: bool, tile: Mapping[str, Any]
) -> jax.Array:
    """The operator in 16 bits, or its transpose: the same of flipped taps."""
    if transpose:
        taps = tuple(tap[::-1, ::-1] for tap in taps)
    y = folded_launches.forward(
        *(x, packed(folded(taps), bias, x.dtype), x.shape, str(x.dtype)),
        *(taps[0].shape[0], len(taps) - 1, device_properties(), launch),
        **tile,
    )
    return vary_like((x, taps, bias), y)


def folded(taps: Taps) -> jax.Array:
    """The taps of each level's one convolution, in the kernels' order.

    Args:
        taps: `[k, k, 1, C]` of the base, then `[k, k, 4, C]` of each level.

    Returns:
        float32 `[levels, 2, k, 2k, 2, 2, C]`: level, half of a pair of rows, pair and column of the
        input, column and row of the output, channel.
    """
    base, *bands = (tap.astype(jnp.float32) for tap in taps)
    kernel_size, channels = base.shape[0], base.shape[-1]
    # Nothing is indexed by an array, so that XLA makes one launch of all, and of the scales before.
    whole, factors = jnp.stack(bands), folding.factors()
    terms = (factors[band] * whole[:, None, :, :, None, None, None, band] for band in range(4))
    found = reduce(jnp.add, terms)
    found = found.reshape(len(bands), 2, kernel_size, 2 * kernel_size, 2, 2, channels)
    return found + jnp.pad(_placed(base[:, :, 0])[None], [(0, len(bands) - 1), *[(0, 0)] * 6])


def _placed(base: jax.Array) -> jax.Array:
    """The base's taps `[k, k, C]` where they are among those of the first level."""
    kernel_size, _, channels = base.shape
    radius, span = kernel_size // 2, 2 * kernel_size
    around = radius + 1, kernel_size - radius
    padded = jnp.pad(base, [around, around, (0, 0)])
    moved = [
        [padded[1 - row : 1 - row + span, 1 - column : 1 - column + span] for row in range(2)]
        for column in range(2)
    ]
    whole = jnp.stack([jnp.stack(rows, 2) for rows in moved], 2)
    return jnp.moveaxis(whole.reshape(kernel_size, 2, span, 2, 2, channels), 1, 0)


def packed(folded: jax.Array, bias: jax.Array | None, dtype: Dtype) -> jax.Array:
    """The bias, and the taps of two rows in one word, as the kernels read them.

    Args:
        folded: `[levels, 2, k, 2k, 2, 2, C]`, see `folded`.
        bias: `[C]`, or None.
        dtype: bfloat16 or float16.

    Returns:
        int32 `[1 + levels * k * 2k * 2 * 2, C]`: the bits of the bias in float32, then words with
        the taps of the upper row in the lower half.
    """
    channels = folded.shape[-1]
    upper, lower = (
        lax.bitcast_convert_type(folded[:, row].astype(dtype), jnp.uint16).astype(jnp.uint32)
        for row in range(2)
    )
    words = jnp.pad((upper | lower << 16).reshape(-1, channels), [(1, 0), (0, 0)])
    if bias is not None:
        # In their array, so that XLA makes no launch of its scale. It would make a launch of its
        # own of a concatenation.
        first = lax.bitcast_convert_type(bias.astype(jnp.float32), jnp.uint32)
        words = jnp.where(jnp.arange(len(words))[:, None] == 0, first, words)
    return lax.bitcast_convert_type(words, jnp.int32)


def _folded_weight_grad(
    x: jax.Array, dy: jax.Array, kernel_shapes: tuple[tuple[int, ...], ...], tile: Mapping[str, Any]
) -> Taps:
    """The gradients of the taps in 16 bits, and of the bias where its shape is the last one."""
    kernel_size = kernel_shapes[0][0]
    levels = sum(len(shape) > 1 for shape in kernel_shapes) - 1
    table = jnp.asarray(folding.products(kernel_size))
    found = folded_launches.weight_grad(
        *(x, dy, table, x.shape, str(x.dtype), kernel_size, levels, device_properties(), launch),
        channels_last=True,
        **tile,
    )
    return vary_like((x, dy), tuple(found[: len(kernel_shapes)]))
