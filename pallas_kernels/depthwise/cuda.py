"""The depthwise convolution of 16-bit images on the tensor cores of NVIDIA GPUs, in CUDA."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common._compat import vary_like
from pallas_kernels.common.cuda_call import device_properties, launch, unavailable
from pallas_kernels.common.types import Pair
from pallas_kernels.conv2d.problem import Window
from pallas_kernels.depthwise import cuda_launches
from pallas_kernels.depthwise.problem import Problem

__all__ = [
    "BIAS_GRADIENT",
    "DIFFERENTIABLE",
    "check",
    "forward",
    "input_grad",
    "unavailable",
    "weight_grad",
]

DIFFERENTIABLE = False
BIAS_GRADIENT = True


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` where these kernels do not take a problem.

    Args:
        direction: "fwd" or "bwd".
        problem: The call.
    """
    cuda_launches.check(problem, device_properties())


@partial(jax.jit, static_argnames=("window", "precision"))
def forward(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array | None,
    *,
    window: Window,
    precision: lax.Precision | None,
) -> jax.Array:
    """The operator; see `vjp` for the arguments.

    `precision` changes nothing: products of 16-bit numbers are summed in float32.
    """
    offsets = None if bias is None else bias.astype(jnp.float32)
    return vary_like((x, kernel, bias), _convolved(x, kernel, offsets, transpose=False))


@partial(jax.jit, static_argnames=("size", "window", "precision"))
def input_grad(
    dy: jax.Array,
    kernel: jax.Array,
    *,
    size: Pair,
    window: Window,
    precision: lax.Precision | None,
) -> jax.Array:
    """The transpose of the convolution in x, applied to dy: an array `[N, *size, C]`."""
    return vary_like((dy, kernel), _convolved(dy, kernel, None, transpose=True))


@partial(jax.jit, static_argnames=("kernel_size", "bias", "window", "precision"))
def weight_grad(
    x: jax.Array,
    dy: jax.Array,
    *,
    kernel_size: Pair,
    bias: bool = False,
    window: Window,
    precision: lax.Precision | None,
) -> tuple[jax.Array, jax.Array | None]:
    """The transpose of the convolution in kernel and bias, applied to dy; see `vjp`.

    Every sum has a fixed order, so results are bitwise reproducible.
    """
    about = x.shape, str(x.dtype), kernel_size[0], bias, device_properties(), launch
    sums = cuda_launches.weight_grad(x, dy, *about)
    taps = sums[:, : kernel_size[0] ** 2].T.reshape(*kernel_size, 1, x.shape[-1])
    return vary_like((x, dy), (taps, sums[:, -1] if bias else None))


def _convolved(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None, transpose: bool
) -> jax.Array:
    """The convolution of images by a kernel, or by its adjoint."""
    taps = kernel.astype(x.dtype).reshape(*kernel.shape[:2], x.shape[-1])
    about = x.shape, str(x.dtype), kernel.shape[0], transpose, device_properties(), launch
    return cuda_launches.forward(x, taps, bias, *about)
