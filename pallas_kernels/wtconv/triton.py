"""The wavelet convolution on GPUs: the kernels of `triton_kernels`, launched by jax-triton."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common._compat import vary_over, varying_axes
from pallas_kernels.common.triton import launch, unavailable

__all__ = ["DIFFERENTIABLE", "check", "forward", "search_space", "unavailable", "weight_grad"]

DIFFERENTIABLE = False

Taps = tuple[jax.Array, ...]

_SIZES = "columns", "strips"
"""Names of what `search_space` offers."""


def check(direction: str, problem: Any) -> None:
    """Raises `NotImplementedError` for what these kernels do not do.

    Args:
        direction: "fwd" or "bwd".
        problem: `pallas_kernels.wtconv.problem.Problem`.
    """
    from pallas_kernels.wtconv import triton_launches

    triton_launches.check(problem)


def search_space(direction: str, problem: Any) -> list[dict[str, int]]:
    """Sizes of a program that are worth timing; see `check`."""
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

    `sizes` are of `search_space`, `wavelet` is Haar, and `precision` is float32's whatever is
    asked: no matrix unit is used.
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
    y = triton_launches.forward(x, flat, bias, kernel_size, launch, **sizes)
    # jax-triton knows nothing of meshes.
    return vary_over(varying_axes((x, flat, bias)), y)


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
    """Gradients of the taps: each level's coefficients of x correlated with those of dy.

    Every sum runs in a fixed order, so they are bitwise reproducible.
    """
    from pallas_kernels.wtconv import triton_launches

    kernel_size, levels = kernel_shapes[0][0], len(kernel_shapes) - 1
    found = triton_launches.weight_grad(x, dy, kernel_size, levels, launch, **sizes)
    sums = tuple(
        jnp.concatenate(parts, axis=1).reshape(shape) * (0.25 if level else 1)
        for level, (parts, shape) in enumerate(zip(found, kernel_shapes, strict=True))
    )
    return vary_over(varying_axes((x, dy)), sums)
