"""The convolution by XLA, whose rows' moments are added, and plain JAX behind it."""

from pallas_kernels.conv2d import xla as convolution
from pallas_kernels.stylize.convolution.problem import Problem
from pallas_kernels.stylize.xla import DIFFERENTIABLE, normalise, unavailable

__all__ = ["DIFFERENTIABLE", "check", "convolution", "normalise", "unavailable"]


def check(direction: str, problem: Problem) -> None:
    """Does nothing: plain JAX takes every problem."""
