"""The wavelet convolution on NVIDIA GPUs: the CUDA kernels that PyTorch launches too."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common._compat import vary_like
from pallas_kernels.common.cuda_call import device_properties, launch, unavailable
from pallas_kernels.common.types import Taps
from pallas_kernels.wtconv import cuda_launches
from pallas_kernels.wtconv.cuda_launches import Images
from pallas_kernels.wtconv.problem import Problem

__all__ = [
    "BIAS_GRADIENT",
    "DIFFERENTIABLE",
    "check",
    "forward",
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
    cuda_launches.check(problem)


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The numbers of resident blocks that are worth timing; see `check` for the arguments."""
    return cuda_launches.search_space()


@partial(jax.jit, static_argnames=("wavelet", "transpose", "precision", "resident"))
def forward(
    x: jax.Array,
    taps: Taps,
    bias: jax.Array | None,
    *,
    wavelet: str,
    transpose: bool,
    precision: lax.Precision | None,
    resident: int | None = None,
) -> jax.Array:
    """The operator on `x [N, H, W, C]`, or its transpose; see `vjp` for the arguments.

    `resident` is of `search_space`. `wavelet` is Haar. `precision` changes nothing: the kernels
    compute in float32 and do not use tensor cores.
    """
    planes = [tap.astype(jnp.float32).transpose(3, 2, 0, 1) for tap in taps]
    offsets = None if bias is None else bias.astype(jnp.float32)
    where = Images(x.shape, str(x.dtype)), device_properties(), launch
    y = cuda_launches.forward(x, planes, offsets, *where, transpose, resident=resident)
    return vary_like((x, taps, bias), y)


@partial(jax.jit, static_argnames=("kernel_shapes", "wavelet", "precision", "resident"))
def weight_grad(
    x: jax.Array,
    dy: jax.Array,
    *,
    kernel_shapes: tuple[tuple[int, ...], ...],
    wavelet: str,
    precision: lax.Precision | None,
    resident: int | None = None,
) -> Taps:
    """The gradients of the taps: each level's coefficients of x correlated with those of dy.

    Every sum has a fixed order, so results are bitwise reproducible.
    """
    kernel_size, levels = kernel_shapes[0][0], len(kernel_shapes) - 1
    images = Images(x.shape, str(x.dtype))
    sizes = images, kernel_size, levels, device_properties(), launch
    first, *rest = cuda_launches.weight_grad(x, dy, *sizes, resident=resident)
    bands = jnp.concatenate([first, *(sums[:, 1:] for sums in rest)], axis=1).transpose(2, 1, 0)
    starts = (0, *range(1, 4 * levels, 4), 1 + 4 * levels)
    sums = tuple(
        bands[:, start:stop].reshape(shape)
        for start, stop, shape in zip(starts[:-1], starts[1:], kernel_shapes, strict=True)
    )
    return vary_like((x, dy), sums)
