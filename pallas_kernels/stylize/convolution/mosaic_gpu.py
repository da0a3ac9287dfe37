"""The convolution by Mosaic on Hopper GPUs; the pass behind it by Triton, else by plain JAX."""

import jax

from pallas_kernels.common import device
from pallas_kernels.common.types import Json, Keywords
from pallas_kernels.conv2d import mosaic_gpu as convolution
from pallas_kernels.conv2d.moments import Moments
from pallas_kernels.conv2d.mosaic_gpu import unavailable
from pallas_kernels.conv2d.upsampling import implemented
from pallas_kernels.stylize import triton, xla
from pallas_kernels.stylize.convolution.problem import Problem
from pallas_kernels.stylize.problem import Problem as Norm

__all__ = [
    "DIFFERENTIABLE",
    "check",
    "convolution",
    "normalise",
    "search_space",
    "unavailable",
]

DIFFERENTIABLE = False


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` where the convolution's kernel does not take a problem.

    Args:
        direction: "fwd".
        problem: The call.
    """
    convolution.check(direction, implemented(problem.convolution))


def search_space(direction: str, problem: Problem) -> list[Json]:
    """The convolution's tiles that are worth timing; see `check` for the arguments."""
    return convolution.search_space(direction, implemented(problem.convolution))


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
    """The pass of `stylize.vjp`; XLA makes one of plain JAX, too, where Triton is not here."""
    problem = Norm(x.shape, x.dtype, activation, residual is not None)
    room = triton if _launches(problem) else xla
    how: Keywords = {"eps": eps, "activation": activation, "in_place": in_place}
    return room.normalise(x, tiles, scale, bias, residual, **how)


def _launches(problem: Norm) -> bool:
    """Whether Triton's kernel takes a norm here."""
    try:
        triton.check("fwd", problem)
    except (ImportError, NotImplementedError):
        return False
    return triton.unavailable(device.platform()) is None
