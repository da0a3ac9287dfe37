"""Wavelet transforms as one writes them in JAX without this package.

One strided convolution a level, and its transpose, every array in x's dtype. It is a baseline for
the error of low precision. Coefficients are a list: the coarsest low band `[*batch, *size, C]`,
then the high bands of each level, finest first, `[*batch, *size, 2**ndim - 1, C]`.
"""

from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.oracle import Array


def wavedec(x: jax.Array, *, ndim: int, level: int, bank: Array) -> list[jax.Array]:
    """Analysis cascade.

    Args:
        x: Signal `[*batch, *spatial, C]`.
        ndim: Number of spatial axes.
        level: Number of levels.
        bank: Low and high analysis filter `[2, F]`.

    Returns:
        Coefficients in x's dtype.

    Example:
        >>> from pallas_kernels.oracle import HAAR
        >>> [band.shape for band in wavedec(jnp.ones((7, 9, 3)), ndim=2, level=1, bank=HAAR)]
        [(4, 5, 3), (4, 5, 3, 3)]
    """
    details = []
    for _ in range(level):
        bands = _analysis(x, ndim, bank)
        x = bands[..., 0, :]
        details.append(bands[..., 1:, :])
    return [x, *details]


def waverec(coefficients: list[jax.Array], *, shape: tuple[int, ...], bank: Array) -> jax.Array:
    """Synthesis cascade: the transpose of `wavedec` with the bank's synthesis filters.

    Args:
        coefficients: The coefficients as `wavedec` returns them.
        shape: Spatial size of the signal.
        bank: Low and high synthesis filter `[2, F]`.

    Returns:
        Signal `[*batch, *shape, C]` in the coefficients' dtype.

    Example:
        >>> from pallas_kernels.oracle import HAAR
        >>> waverec([jnp.ones((4, 5, 3)), jnp.ones((4, 5, 3, 3))], shape=(7, 9), bank=HAAR).shape
        (7, 9, 3)
    """
    low, ndim = coefficients[0], len(shape)
    x = jax.ShapeDtypeStruct((*low.shape[: -1 - ndim], *shape, low.shape[-1]), low.dtype)
    analyse = partial(wavedec, ndim=ndim, level=len(coefficients) - 1, bank=bank)
    (signal,) = jax.linear_transpose(analyse, x)(coefficients)
    return signal


def _analysis(x: jax.Array, ndim: int, bank: Array) -> jax.Array:
    """One level: `[*batch, *half, 2**ndim, C]`."""
    spatial, before = x.shape[-1 - ndim : -1], bank.shape[1] // 2 - 1
    taps = [
        reduce(np.multiply.outer, [bank[s >> a & 1] for a in range(ndim)]) for s in range(2**ndim)
    ]
    axes = "DHW"[:ndim]
    out = lax.conv_general_dilated(
        jnp.moveaxis(x, -1, 0).reshape(-1, *spatial, 1),
        jnp.asarray(np.stack(taps, -1)[..., None, :], x.dtype),
        window_strides=(2,) * ndim,
        padding=[(before, before + n % 2) for n in spatial],
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
    )
    out = out.reshape(x.shape[-1], *x.shape[: -1 - ndim], *out.shape[1:])
    return jnp.moveaxis(out, 0, -1)
