"""Instance normalisation in plain JAX: runs on every platform."""

import jax

from pallas_kernels.conv2d.moments import Moments
from pallas_kernels.stylize.formulas import (
    Gradients,
    Known,
    preactivation,
    pulled,
    statistics,
    statistics_of_tiles,
)
from pallas_kernels.stylize.problem import Problem

DIFFERENTIABLE = True


def unavailable(platform: str) -> str | None:
    """None: plain JAX runs on every platform."""
    return None


def check(direction: str, problem: Problem) -> None:
    """Does nothing: plain JAX takes every problem."""


def forward(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None,
    *,
    eps: float,
    activation: str | None,
) -> tuple[jax.Array, jax.Array]:
    """The operator and the statistics; see `vjp` for the arguments."""
    return _output(Known(x, statistics(x, eps), scale, bias, residual), activation)


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
    """The operator and the statistics, from the moments of a convolution's tiles; see `vjp`.

    XLA writes over what is not read again without being told.
    """
    return _output(Known(x, statistics_of_tiles(tiles, eps), scale, bias, residual), activation)


def _output(known: Known, activation: str | None) -> tuple[jax.Array, jax.Array]:
    """The output, and the statistics as they are known."""
    z = preactivation(known)
    return (z if activation is None else jax.nn.relu(z)).astype(known.x.dtype), known.statistics


def backward(
    x: jax.Array,
    statistics: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None,
    dy: jax.Array,
    *,
    activation: str | None,
) -> Gradients:
    """The gradients; see `vjp` for the arguments."""
    known = Known(x, statistics, scale, bias, residual)
    return pulled(activation, residual is not None, known, dy)
