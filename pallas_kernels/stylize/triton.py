"""Instance normalisation on GPUs: the kernels of `triton_kernels`, launched by jax-triton."""

from functools import partial

import jax

from pallas_kernels.common._compat import vary_like
from pallas_kernels.common.triton import launch, unavailable
from pallas_kernels.conv2d.moments import Moments
from pallas_kernels.stylize.formulas import Gradients
from pallas_kernels.stylize.problem import Problem

__all__ = [
    "DIFFERENTIABLE",
    "backward",
    "check",
    "forward",
    "normalise",
    "search_space",
    "unavailable",
]

DIFFERENTIABLE = False

_SIZES = "pixels", "channels", "slices", "warps"
"""The names of the sizes that `search_space` offers."""


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` where these kernels do not take a problem.

    Args:
        direction: "fwd" or "bwd".
        problem: The call.
    """
    from pallas_kernels.stylize import triton_launches

    triton_launches.check(problem)


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The tiles that are worth timing, the default ones first; see `check` for the arguments."""
    from pallas_kernels.stylize import triton_launches

    return triton_launches.search_space(direction, problem)


@partial(jax.jit, static_argnames=("eps", "activation", *_SIZES))
def forward(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None,
    *,
    eps: float,
    activation: str | None,
    **sizes: int,
) -> tuple[jax.Array, jax.Array]:
    """The operator and the statistics; see `vjp` for the arguments.

    The sizes are those of `triton_launches.Tiles`.
    """
    from pallas_kernels.stylize import triton_launches

    tiles = triton_launches.Tiles(**sizes) if sizes else None
    found = triton_launches.forward(x, scale, bias, residual, eps, activation, tiles, launch)
    return vary_like((x, scale, bias, residual), found)


@partial(jax.jit, static_argnames=("eps", "activation", "in_place"))
def normalise(
    x: jax.Array,
    tiles: Moments,
    scale: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None,
    *,
    eps: float,
    activation: str | None,
    in_place: bool,
) -> tuple[jax.Array, jax.Array]:
    """The operator and the statistics, from the moments of a convolution's tiles; see `vjp`."""
    from pallas_kernels.stylize import triton_launches

    found = triton_launches.normalise(
        *(x, tiles, scale, bias, residual, eps, activation, launch), in_place=in_place
    )
    return vary_like((x, tiles, scale, bias, residual), found)


@partial(jax.jit, static_argnames=("activation", *_SIZES))
def backward(
    x: jax.Array,
    statistics: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None,
    dy: jax.Array,
    *,
    activation: str | None,
    **sizes: int,
) -> Gradients:
    """The gradients; see `vjp` for the arguments."""
    from pallas_kernels.stylize import triton_launches

    tiles = triton_launches.Tiles(**sizes) if sizes else None
    arrays = x, statistics, scale, bias, residual, dy
    found = triton_launches.backward(*arrays, activation, tiles, launch)
    return vary_like(arrays, Gradients(*found))
