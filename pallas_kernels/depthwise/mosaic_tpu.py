"""The depthwise convolution as Pallas TPU kernels: the base convolution of `wtconv.mosaic_tpu`.

They are the kernels of the wavelet convolution at 0 levels, and read x once and write y once.
"""

import jax
from jax import lax

from pallas_kernels.common.mosaic_tpu import unavailable
from pallas_kernels.common.refusals import refuse
from pallas_kernels.common.types import Pair
from pallas_kernels.conv2d.problem import Window
from pallas_kernels.depthwise.problem import Problem
from pallas_kernels.wtconv import mosaic_tpu as wtconv

__all__ = [
    "BIAS_GRADIENT",
    "DIFFERENTIABLE",
    "check",
    "forward",
    "input_grad",
    "search_space",
    "unavailable",
    "weight_grad",
]

DIFFERENTIABLE = False
BIAS_GRADIENT = False


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` where these kernels do not take a problem.

    Args:
        direction: "fwd" or "bwd".
        problem: The call.
    """
    refuse(problem.not_plain())
    wtconv.check(direction, problem.as_wtconv())


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The tilings that are worth timing, the one that is taken unasked first; see `check`."""
    return wtconv.search_space(direction, problem.as_wtconv())


def forward(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    *,
    window: Window,
    precision: lax.Precision | None,
    **tile: int,
) -> jax.Array:
    """The operator; see `vjp` for the arguments.

    `tile` is of `search_space`. `precision` changes nothing: the kernel computes in float32.
    """
    static = {"wavelet": "haar", "transpose": False, "precision": precision}
    return wtconv.forward(x, (kernel,), bias, **static, **tile)


def input_grad(
    dy: jax.Array,
    kernel: jax.Array,
    *,
    size: Pair,
    window: Window,
    precision: lax.Precision | None,
    **tile: int,
) -> jax.Array:
    """The transpose of the convolution in x, applied to dy: an array `[N, *size, C]`."""
    static = {"wavelet": "haar", "transpose": True, "precision": precision}
    return wtconv.forward(dy, (kernel,), None, **static, **tile)


def weight_grad(
    x: jax.Array,
    dy: jax.Array,
    *,
    kernel_size: Pair,
    window: Window,
    precision: lax.Precision | None,
    **tile: int,
) -> jax.Array:
    """The transpose of the convolution in the kernel, applied to dy: `[*kernel_size, 1, C]`.

    Grid steps add to the accumulators in a fixed order, so results are bitwise reproducible.
    """
    shapes = ((*kernel_size, 1, x.shape[-1]),)
    static = {"kernel_shapes": shapes, "wavelet": "haar", "precision": precision}
    return wtconv.weight_grad(x, dy, **static, **tile)[0]
