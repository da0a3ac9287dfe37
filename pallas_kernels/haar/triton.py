"""The Haar cascade on GPUs: the kernels of `triton_kernels`, launched by jax-triton."""

from functools import partial

import jax

from pallas_kernels.common._compat import vary_like
from pallas_kernels.common.refusals import refuse
from pallas_kernels.common.triton import MAX_ROW, launch, unavailable
from pallas_kernels.common.types import Bands, Pair
from pallas_kernels.haar.problem import Problem

__all__ = ["DIFFERENTIABLE", "check", "search_space", "unavailable", "wavedec", "waverec"]

DIFFERENTIABLE = False


_MAX_LEVELS = 5
_SIZES = "fused", "warps"
"""The names of the sizes that `search_space` offers."""


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` where these kernels do not take a problem.

    Args:
        direction: "fwd", the only one.
        problem: The call.
    """
    reasons = problem.unsupported(("float32", "bfloat16", "float16"), _MAX_LEVELS)
    if not reasons:
        images, height, width, channels = problem.shape
        if width * channels >= MAX_ROW:
            reasons.append(f"rows of {width} pixels of {channels} channels, which are too long")
        if images * height >= 1 << 31:
            reasons.append(f"{images} images of {height} rows, which are too many")
    refuse(reasons)


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The ways to launch the cascade that are worth timing; see `check` for the arguments."""
    from pallas_kernels.haar import triton_launches

    return triton_launches.search_space(problem.levels)


@partial(jax.jit, static_argnames=("ndim", "levels", "wavelet", *_SIZES))
def wavedec(
    x: jax.Array, *, ndim: int, levels: int, wavelet: str, **sizes: int
) -> tuple[jax.Array, tuple[Bands, ...]]:
    """The low band of `x [N, H, W, C]`, and three details for each level from coarse to fine."""
    from pallas_kernels.haar import triton_launches

    low, details = triton_launches.wavedec(x, levels, launch, **sizes)
    return vary_like(x, (low, tuple(details)))


@partial(jax.jit, static_argnames=("shape", "wavelet", *_SIZES))
def waverec(
    low: jax.Array,
    details: tuple[Bands, ...],
    *,
    shape: Pair,
    wavelet: str,
    **sizes: int,
) -> jax.Array:
    """The inverse of `wavedec`: an image `[N, *shape, C]`."""
    from pallas_kernels.haar import triton_launches

    image = triton_launches.waverec(low, details, shape, launch, **sizes)
    return vary_like((low, details), image)
