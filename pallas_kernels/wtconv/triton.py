"""The wavelet convolution on GPUs: the kernels of `triton_kernels`, launched by jax-triton."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common._compat import vary_like
from pallas_kernels.common.triton import launch, unavailable
from pallas_kernels.common.types import Taps
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


_SIZES = "columns", "strips"
"""The names of the sizes that `search_space` offers."""


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` where these kernels do not take a problem.

    Args:
        direction: "fwd" or "bwd".
        problem: The call.
    """
    from pallas_kernels.wtconv import triton_launches

    triton_launches.check(problem)


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The sizes of a program that are worth timing; see `check` for the arguments."""
    from pallas_kernels.wtconv import triton_launches

    return triton_launches.search_space(direction, problem)


@partial(jax.jit, static_argnames=("wavelet", "transpose", "precision", *_SIZES))
def forward(
    x: jax.Array,
    taps: Taps,
    bias: jax.Array | None,
    *,
    wavelet: str,
    transpose: bool,
    precision: lax.Precision | None,
    **sizes: int,
) -> jax.Array:
    """The operator on `x [N, H, W, C]`, or its transpose; see `vjp` for the arguments.

    `sizes` are those of `search_space`. `wavelet` is Haar. `precision` changes nothing: the kernels
    compute in float32 and do not use tensor cores.
    """
    from pallas_kernels.wtconv import triton_launches

    kernel_size, channels = taps[0].shape[0], x.shape[-1]
    if transpose:
        taps = tuple(jnp.flip(tap, (0, 1)) for tap in taps)
    fill = triton_launches.padded(channels) - channels
    flat = [
        jnp.pad(
            tap.astype(jnp.float32).reshape(kernel_size**2, -1, channels) * (0.25 if level else 1),
            ((0, kernel_size), (0, 0), (0, fill)),
        )
        for level, tap in enumerate(taps)
    ]
    if bias is not None:
        bias = jnp.pad(bias.astype(jnp.float32), (0, fill))
    y = triton_launches.forward(x, flat, bias, kernel_size, launch, None, **sizes)
    return vary_like((x, flat, bias), y)


@partial(jax.jit, static_argnames=("kernel_shapes", "wavelet", "precision", *_SIZES))
def weight_grad(
    x: jax.Array,
    dy: jax.Array,
    *,
    kernel_shapes: tuple[tuple[int, ...], ...],
    wavelet: str,
    precision: lax.Precision | None,
    **sizes: int,
) -> Taps:
    """The gradients of the taps: each level's coefficients of x correlated with those of dy.

    Every sum has a fixed order, so results are bitwise reproducible.
    """
    from pallas_kernels.wtconv import triton_launches

    kernel_size, levels = kernel_shapes[0][0], len(kernel_shapes) - 1
    found = triton_launches.weight_grad(x, dy, kernel_size, levels, launch, **sizes)
    sums = tuple(
        jnp.concatenate(parts, axis=1).reshape(shape) * (0.25 if level else 1)
        for level, (parts, shape) in enumerate(zip(found, kernel_shapes, strict=True))
    )
    return vary_like((x, dy), sums)
