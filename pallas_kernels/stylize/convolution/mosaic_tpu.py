"""The convolution by Pallas on TPUs; the pass behind it is plain JAX, of which XLA makes one."""

from pallas_kernels.common.types import Json
from pallas_kernels.conv2d import mosaic_tpu as convolution
from pallas_kernels.conv2d.mosaic_tpu import unavailable
from pallas_kernels.conv2d.upsampling import implemented
from pallas_kernels.stylize.convolution.problem import Problem
from pallas_kernels.stylize.xla import normalise

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
