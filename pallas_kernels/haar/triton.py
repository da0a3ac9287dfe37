"""The Haar cascade on GPUs: the kernels of `triton_kernels`, launched by jax-triton."""

from functools import partial
from typing import Any

import jax

from pallas_kernels.common._compat import vary_over, varying_axes
from pallas_kernels.common.triton import MAX_ROW, launch, unavailable

__all__ = ["DIFFERENTIABLE", "check", "search_space", "unavailable", "wavedec", "waverec"]

DIFFERENTIABLE = False

Bands = tuple[jax.Array, ...]

_MAX_LEVELS = 5
_SIZES = "fused", "warps"
"""Names of what `search_space` offers."""


def check(direction: str, problem: Any) -> None:
    """Raises `NotImplementedError` for what these kernels do not do.

    Args:
        direction: "fwd", the only one.
        problem: `pallas_kernels.haar.problem.Problem`.
    """
    reasons = problem.unsupported(("float32", "bfloat16", "float16"), _MAX_LEVELS)
    if not reasons:
        images, height, width, channels = problem.shape
        if width * channels >= MAX_ROW:
            reasons.append(f"rows of {width} pixels of {channels} channels, which are too long")
        if images * height >= 1 << 31:
            reasons.append(f"{images} images of {height} rows, which are too many")
    if reasons:
        raise NotImplementedError(f"does not take {'; '.join(reasons)}")


def search_space(direction: str, problem: Any) -> list[dict[str, int]]:
    """Ways to launch the cascade that are worth timing; see `check`."""
    from pallas_kernels.haar import triton_launches

    return triton_launches.search_space(problem.levels)


@partial(jax.jit, static_argnames=("ndim", "levels", "wavelet", *_SIZES))
def wavedec(
    x: jax.Array, *, ndim: int, levels: int, wavelet: str, **sizes: int
) -> tuple[jax.Array, tuple[Bands, ...]]:
    """All levels of `x [N, H, W, C]`: the low band, and three details a level from coarse on."""
    from pallas_kernels.haar import triton_launches

    low, details = triton_launches.wavedec(x, levels, launch, **sizes)
    # jax-triton knows nothing of meshes.
    return vary_over(varying_axes(x), (low, tuple(details)))


@partial(jax.jit, static_argnames=("shape", "wavelet", *_SIZES))
def waverec(
    low: jax.Array,
    details: tuple[Bands, ...],
    *,
    shape: tuple[int, int],
    wavelet: str,
    **sizes: int,
) -> jax.Array:
    """The inverse of `wavedec`: an image `[N, *shape, C]`."""
    from pallas_kernels.haar import triton_launches

    image = triton_launches.waverec(low, details, shape, launch, **sizes)
    return vary_over(varying_axes((low, details)), image)
