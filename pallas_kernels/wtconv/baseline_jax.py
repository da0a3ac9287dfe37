"""WTConv as one writes it in JAX without this package; frozen, because figures refer to it.

Grouped `conv_general_dilated` for every convolution, reshapes for Haar, JAX's own autodiff, every
array in x's dtype. It is a baseline for benchmarks and for the error of low precision.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

_LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


def wtconv(
    x: jax.Array, params: Mapping[str, jax.Array], *, ndim: int = 2, stride: int = 1
) -> jax.Array:
    """Haar wavelet convolution; arguments as `pallas_kernels.wtconv`, but one dtype for all.

    Args:
        x: `[*batch, *spatial, C]`.
        params: As `pallas_kernels.wtconv.wtconv2d`, in x's dtype.
        ndim: Number of spatial axes.
        stride: 2-D and 3-D keep every stride-th sample, 1-D averages.

    Returns:
        `[*batch, *spatial, C]` for stride 1, in x's dtype.

    Example:
        >>> params = {"base_kernel": jnp.ones((3, 3, 1, 8)), "base_scale": jnp.ones(8)}
        >>> wtconv(jnp.ones((1, 4, 4, 8)), params).shape
        (1, 4, 4, 8)
    """
    batch = x.shape[: -1 - ndim]
    x = x.reshape(math.prod(batch), *x.shape[-1 - ndim :])
    low, sizes = x, []
    filtered: list[jax.Array] = []
    while f"wavelet_kernel_{len(filtered)}" in params:
        level = len(filtered)
        sizes.append(low.shape[1:-1])
        bands = _analysis(low, ndim)
        scale = params[f"wavelet_scale_{level}"]
        filtered.append(scale * _depthwise(bands, params[f"wavelet_kernel_{level}"], ndim))
        low = bands[..., 0, :]
    y = _depthwise(x[..., None, :], params["base_kernel"], ndim)[..., 0, :]
    y = params["base_scale"] * (y + params.get("base_bias", jnp.zeros((), x.dtype)))
    deeper = None
    for bands, size in zip(reversed(filtered), reversed(sizes), strict=True):
        if deeper is not None:
            bands = bands.at[..., 0, :].add(deeper)
        deeper = _synthesis(bands, ndim)[(slice(None), *(slice(n) for n in size))]
    if deeper is not None:
        y = y + deeper
    y = _strided(y, ndim, stride)
    return y.reshape(*batch, *y.shape[1:])


def _depthwise(x: jax.Array, kernel: jax.Array, ndim: int) -> jax.Array:
    """Depthwise convolution of `[N, *spatial, bands, C]`: one group a band and channel."""
    *taps, bands, channels = kernel.shape
    groups = bands * channels
    out = lax.conv_general_dilated(
        x.reshape(*x.shape[: ndim + 1], groups),
        kernel.reshape(*taps, 1, groups),
        window_strides=(1,) * ndim,
        padding=[((k - 1) // 2, k // 2) for k in taps],
        dimension_numbers=_LAYOUTS[ndim],
        feature_group_count=groups,
    )
    return out.reshape(x.shape)


def _analysis(x: jax.Array, ndim: int) -> jax.Array:
    x = jnp.pad(x, [(0, 0), *((0, n % 2) for n in x.shape[1:-1]), (0, 0)])
    n, *sizes, c = x.shape
    pairs = x.reshape(n, *(k for size in sizes for k in (size // 2, 2)), c)
    bands = [pairs]
    for axis in range(2 * ndim, 0, -2):
        halves = [jnp.split(band, 2, axis) for band in bands]
        bands = [band for even, odd in halves for band in (even + odd, even - odd)]
    half = [size // 2 for size in sizes]
    bands = [band.reshape(n, *half, c) * 2 ** (-ndim / 2) for band in bands]
    return jnp.stack(bands, axis=-2)


def _synthesis(bands: jax.Array, ndim: int) -> jax.Array:
    n, *half, _, c = bands.shape
    parts = [bands[..., s, :] for s in range(2**ndim)]
    for axis in range(1, ndim + 1):
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [
            jnp.stack([low + high, low - high], axis + 1).reshape(
                n, *(2 * h if i < axis else h for i, h in enumerate(half)), c
            )
            for low, high in pairs
        ]
    return parts[0] * 2 ** (-ndim / 2)


def _strided(y: jax.Array, ndim: int, stride: int) -> jax.Array:
    if ndim == 1:
        n, length, c = y.shape
        groups = y[:, : length // stride * stride].reshape(n, length // stride, stride, c)
        return groups.mean(axis=2)
    return y[(slice(None), *(slice(None, None, stride),) * ndim)]
