"""The wavelet convolution on Hopper GPUs, in Pallas' Mosaic GPU: the operator's implementation.

`forward` runs up to three kinds of kernels. `level1` is the last launch: level 1 and the base
convolution, which read the image and write the result. What it adds to its low band comes from
`fused_levels`, one launch for all deeper levels, where an image is small enough for shared memory;
else from `level2`, and from one or more launches for the levels below that. `weights` has the
kernel of `weight_grad`. `tiles` and `bands` hold the pipelines and tilings that these share.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.common._compat import in_32_bits, vary_like
from pallas_kernels.common.mosaic_gpu import aligned, unavailable
from pallas_kernels.common.refusals import refuse
from pallas_kernels.common.types import Taps
from pallas_kernels.wtconv.mosaic_gpu import fused_levels, level1, level2
from pallas_kernels.wtconv.mosaic_gpu.tiles import CHANNELS, STRIPS, handoff_dtype
from pallas_kernels.wtconv.mosaic_gpu.weights import weight_grad
from pallas_kernels.wtconv.problem import Problem

__all__ = [
    "BIAS_GRADIENT",
    "DIFFERENTIABLE",
    "check",
    "forward",
    "unavailable",
    "weight_grad",
]

DIFFERENTIABLE = False
BIAS_GRADIENT = True

_MAX_KERNEL = 5
_MAX_LEVELS = 5


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` for what these kernels do not do.

    Args:
        direction: "fwd" or "bwd".
        problem: The call.
    """
    dtypes = ("float32", "bfloat16", "float16")
    reasons = problem.unsupported(dtypes, _MAX_KERNEL, range(1, _MAX_LEVELS + 1), odd=True)
    refuse(reasons)


@partial(jax.jit, static_argnames=("wavelet", "transpose", "precision"))
@in_32_bits
def forward(
    x: jax.Array,
    taps: Taps,
    bias: jax.Array | None,
    *,
    wavelet: str,
    transpose: bool,
    precision: lax.Precision | None,
) -> jax.Array:
    """Returns the operator on `x [N, H, W, C]`, or its transpose; see `vjp` for the arguments.

    `wavelet` is Haar, and `precision` is float32's whatever it says: no tensor core is used.
    """
    inputs = x, taps, bias
    if transpose:
        taps = tuple(jnp.flip(tap, (0, 1)) for tap in taps)
    channels, x = x.shape[-1], aligned(x, x.dtype)
    levels, kernel_size = len(taps) - 1, taps[0].shape[0]
    packed = _packed(taps, bias)
    below: Taps = ()
    if fused_levels.fits(x, levels, kernel_size):
        below = (fused_levels.fused_levels(x, packed, levels, kernel_size, handoff_dtype(x)),)
    elif levels > 1:
        half, low = level2.level2(x, packed, kernel_size, handoff_dtype(x))
        below = half, *_levels_from_third(low, packed, levels, kernel_size)
    y = level1.level1(x, below, packed, 1, kernel_size, bias is not None, x.dtype)
    return vary_like(inputs, y[..., :channels])


def _levels_from_third(low: jax.Array, taps: jax.Array, levels: int, kernel_size: int) -> Taps:
    """Returns half the synthesis of the levels from 3 on, if any, of level 2's low band."""
    if fused_levels.fits(low, levels, kernel_size, 3):
        return (fused_levels.fused_levels(low, taps, levels, kernel_size, low.dtype, 3),)
    lows = _lows(low, levels - 2)
    below: Taps = ()
    for level in range(levels, 2, -1):
        below = (level1.level1(lows[level - 3], below, taps, level, kernel_size, False, low.dtype),)
    return below


def _lows(x: jax.Array, levels: int) -> list[jax.Array]:
    """Returns the image and its low bands, down to the one that the deepest level reads."""
    lows = [x]
    while len(lows) < levels:
        low = lows[-1]
        odd = [(0, size % 2) for size in low.shape[1:3]]
        low = jnp.pad(low, ((0, 0), *odd, (0, 0))).astype(jnp.float32)
        left, right = low[:, :, ::2], low[:, :, 1::2]
        both = left + right
        lows.append((0.5 * (both[:, ::2] + both[:, 1::2])).astype(handoff_dtype(x)))
    return lows


def _packed(taps: Taps, bias: jax.Array | None) -> jax.Array:
    """Returns all taps and the bias, `[channel_blocks, rows, STRIPS, CHANNELS]`.

    They are one array, because each more is one more launch, and the same for all strips. The
    base's taps come first, then for each level (LL, LH) and (HL, HH), a row for each tap and band;
    the bias is last. A level's taps hold the factors 1/2 of analysis and of synthesis, and 1/2 for
    each level above it: so its result is ready to be added to the low band of the level above.
    """
    size, channels = taps[0].shape[0] ** 2, taps[0].shape[-1]
    rows = [taps[0].reshape(size, channels)]
    for level, tap in enumerate(taps[1:]):
        bands = tap.astype(jnp.float32) * (0.25 * 0.5**level)
        rows.append(jnp.moveaxis(bands.reshape(size, 2, 2, channels), 1, 0).reshape(-1, channels))
    if bias is not None:
        rows.append(bias[None])
    flat = jnp.concatenate([row.astype(jnp.float32) for row in rows])
    channel_blocks = pl.cdiv(channels, CHANNELS)
    flat = jnp.pad(flat, ((0, 0), (0, channel_blocks * CHANNELS - channels)))
    flat = jnp.moveaxis(flat.reshape(-1, channel_blocks, 1, CHANNELS), 1, 0)
    return jnp.broadcast_to(flat, (*flat.shape[:2], STRIPS, CHANNELS))
