"""The convolution and the pass behind it on GPUs, by the Triton kernels of both operators."""

from pallas_kernels.common.types import Json
from pallas_kernels.conv2d import triton as convolution
from pallas_kernels.conv2d.upsampling import implemented
from pallas_kernels.stylize import triton as norm
from pallas_kernels.stylize.convolution.problem import Problem
from pallas_kernels.stylize.triton import DIFFERENTIABLE, normalise, unavailable

__all__ = [
    "DIFFERENTIABLE",
    "PARTS",
    "check",
    "convolution",
    "normalise",
    "search_space",
    "unavailable",
]

PARTS = convolution, norm
"""The modules that launch the kernels."""


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` where one of the kernels does not take a problem.

    Args:
        direction: "fwd".
        problem: The call.
    """
    from pallas_kernels.conv2d import triton_launches

    convolution.check(direction, implemented(problem.convolution))
    norm.check(direction, problem.norm)
    triton_launches.check_moments(problem.shape[0])


def search_space(direction: str, problem: Problem) -> list[Json]:
    """The convolution's tiles that are worth timing; see `check` for the arguments."""
    return convolution.search_space(direction, implemented(problem.convolution))
