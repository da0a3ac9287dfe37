"""The wavelet convolution as functions: validate, pick, call.

Source: Finder, Amoyal, Treister, Freifeld, "Wavelet Convolutions for Large Receptive Fields",
ECCV 2024. `pallas_kernels.oracle.wtconv` is the definition.
"""

import math
import operator
from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.common import sharding
from pallas_kernels.common.arguments import (
    Precision,
    checked_array,
    checked_integer,
    checked_precision,
    remembered,
    surely,
)
from pallas_kernels.common.measurement import request
from pallas_kernels.dispatch import Choice, Operator
from pallas_kernels.haar.filters import wavelet_name
from pallas_kernels.wtconv import shards, vjp
from pallas_kernels.wtconv.problem import Problem


class Implementation(StrEnum):
    """Implementations of the wavelet convolution."""

    CUDA = "cuda"
    MOSAIC_GPU = "mosaic_gpu"
    MOSAIC_TPU = "mosaic_tpu"
    TRITON = "triton"
    XLA = "xla"


OPERATOR = Operator(
    name="wtconv",
    package="pallas_kernels.wtconv",
    implementations=Implementation,
    rule={
        "tpu": ("mosaic_tpu", "xla"),
        "gpu": ("mosaic_gpu", "triton", "cuda", "xla"),
        "cpu": ("xla",),
    },
    directions={"fwd": ("forward",), "bwd": ("forward", "weight_grad")},
)


def wtconv1d(
    x: ArrayLike,
    params: Mapping[str, ArrayLike],
    *,
    wavelet: str = "haar",
    stride: int = 1,
    implementation: Choice = None,
    precision: Precision = None,
    out_sharding: sharding.OutSharding = None,
) -> jax.Array:
    """Wavelet convolution of signals `[*batch, L, C]`; stride averages each `stride` samples.

    As `wtconv2d`, with `base_kernel [k, 1, C]`, `wavelet_kernel_{i} [k, 2, C]` and
    `wavelet_scale_{i} [2, C]`. An incomplete last group of a stride is dropped, as the published
    1-D layer does.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"base_kernel": jnp.ones((3, 1, 8)), "base_scale": jnp.ones(8)}
        >>> wtconv1d(jnp.ones((2, 100, 8)), params, stride=2).shape
        (2, 50, 8)
    """
    return _wtconv(1, x, params, wavelet, stride, implementation, precision, out_sharding)


def wtconv2d(
    x: ArrayLike,
    params: Mapping[str, ArrayLike],
    *,
    wavelet: str = "haar",
    stride: int = 1,
    implementation: Choice = None,
    precision: Precision = None,
    out_sharding: sharding.OutSharding = None,
) -> jax.Array:
    """Wavelet convolution of images `[*batch, H, W, C]`, any number of batch dimensions.

    Sums run in float32 or better. Gradients save x and the scaled kernels and nothing else. Every
    implementation has derivatives of every order, in reverse and in forward mode (`jvp`,
    `linearize`, `hessian`).

    Args:
        x: Images, float16, bfloat16, float32 or float64; any H, W, C, odd ones included.
        params: `base_kernel [k, k, 1, C]`, `base_scale [C]`, optionally `base_bias [C]`, and for
            each level i from 0 `wavelet_kernel_{i} [k, k, 4, C]` and `wavelet_scale_{i} [4, C]`;
            subbands in the order LL, LH, HL, HH. Any floating dtype. The number of levels is the
            number of wavelet kernels; none is a plain depthwise convolution.
        wavelet: `"haar"` or any discrete wavelet of PyWavelets, in any case.
        stride: Keep every stride-th pixel of each axis.
        implementation: Filter on the implementations: a name, a sequence of names or `"auto"`
            for the fastest of them, which is measured once and remembered, or `None` for the
            environment's (`FLASH_WTCONV_WTCONV_FWD`, `..._BWD`) or the device's rule.
        precision: For implementations on matrix units; elementwise ones always use full float32.
        out_sharding: How the output is split over a mesh, a `jax.P` or a `NamedSharding`, and so x;
            batch and channels can be. None takes x's sharding. On a TPU it is what lets kernels run
            on Auto axes; see `docs/sharding.md`.

    Returns:
        `[*batch, ceil(H / stride), ceil(W / stride), C]` in x's dtype.

    Raises:
        ValueError: A bad argument: which, what came, and what was expected.
        NotImplementedError: No allowed implementation can run here; says why for each.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {
        ...     "base_kernel": jnp.ones((5, 5, 1, 8)),
        ...     "base_scale": jnp.ones(8),
        ...     "wavelet_kernel_0": jnp.ones((5, 5, 4, 8)),
        ...     "wavelet_scale_0": jnp.full((4, 8), 0.1),
        ... }
        >>> wtconv2d(jnp.ones((2, 14, 14, 8)), params).shape
        (2, 14, 14, 8)
    """
    return _wtconv(2, x, params, wavelet, stride, implementation, precision, out_sharding)


def wtconv3d(
    x: ArrayLike,
    params: Mapping[str, ArrayLike],
    *,
    wavelet: str = "haar",
    stride: int = 1,
    implementation: Choice = None,
    precision: Precision = None,
    out_sharding: sharding.OutSharding = None,
) -> jax.Array:
    """Wavelet convolution of volumes `[*batch, D, H, W, C]`.

    As `wtconv2d`, with `base_kernel [k, k, k, 1, C]`, `wavelet_kernel_{i} [k, k, k, 8, C]` and
    `wavelet_scale_{i} [8, C]`; subband `b_D + 2 b_H + 4 b_W`, b = 1 for the high band.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"base_kernel": jnp.ones((3, 3, 3, 1, 4)), "base_scale": jnp.ones(4)}
        >>> wtconv3d(jnp.ones((8, 8, 8, 4)), params, stride=2).shape
        (4, 4, 4, 4)
    """
    return _wtconv(3, x, params, wavelet, stride, implementation, precision, out_sharding)


def _wtconv(
    ndim: int,
    x: ArrayLike,
    params: Mapping[str, ArrayLike],
    wavelet: str,
    stride: int,
    implementation: Choice,
    precision: Precision,
    out_sharding: sharding.OutSharding,
) -> jax.Array:
    x, params = checked_array(x, "x"), _checked_arrays(params)
    signature = tuple((name, value.shape, value.dtype) for name, value in params.items())
    call = remembered(_checked_call)(ndim, x.shape, x.dtype, signature, wavelet, stride, precision)
    fwd, bwd = (request(OPERATOR, direction, implementation) for direction in OPERATOR.directions)
    spread = sharding.spread(shards.rule(ndim, wavelet=call.problem.wavelet), [x], out_sharding)
    fwd, bwd = spread.allowed(fwd, bwd)
    problem, bias = shards.of_shard(call.problem, spread.shard), "base_bias" in params
    chosen = fwd.choose(problem, vjp.measurement, OPERATOR, "fwd", problem, bias, call.precision)
    module = OPERATOR.module(chosen.implementation)
    static = problem.wavelet, call.precision, bwd, fwd, spread.stated
    plan = vjp.Plan(module, chosen.config, *static)
    return vjp.wtconv(plan, call.stride, x, params)


class _Call(NamedTuple):
    """The checked arguments of a call."""

    problem: Problem
    stride: int
    precision: jax.lax.Precision | None


def _checked_call(
    ndim: int,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    params: tuple[tuple[str, tuple[int, ...], jnp.dtype], ...],
    wavelet: str,
    stride: int,
    precision: Precision,
) -> _Call:
    """Checks all that shapes and plain arguments tell; raises ValueError."""
    axes = ("L", "H, W", "D, H, W")[ndim - 1]
    if len(shape) < ndim + 1:
        raise ValueError(f"x: expected an array [*batch, {axes}, C], got shape {shape}")
    if any(size == 0 for size in shape[-1 - ndim :]):
        raise ValueError(
            f"x: expected [*batch, {axes}, C] of at least one sample and channel, got shape {shape}"
        )
    shapes = {name: sizes for name, sizes, _ in params}
    kernel_size, levels = _check_params(shapes, ndim, shape[-1])
    name = wavelet_name(wavelet)
    stride = checked_integer(stride, "stride", least=1)
    if ndim == 1 and surely(operator.lt, shape[-2], stride):
        raise ValueError(
            f"stride={stride} averages groups of {stride} samples, but x has {shape[-2]}"
        )
    flat = (math.prod(shape[: -1 - ndim]), *shape[-1 - ndim :])
    problem = Problem(flat, dtype, kernel_size, levels, name)
    return _Call(problem, stride, checked_precision(precision))


def _checked_arrays(params: Mapping[str, ArrayLike]) -> dict[str, jax.Array]:
    if not isinstance(params, Mapping):
        raise ValueError(f"params: expected a dict of arrays by name, got {type(params).__name__}")
    if set(params) == {"params"}:
        raise ValueError('params: got linen variables; hand on what is inside, variables["params"]')
    return {name: checked_array(value, f"params[{name!r}]") for name, value in params.items()}


def _check_params(
    params: Mapping[str, tuple[int, ...]], ndim: int, channels: int
) -> tuple[int, int]:
    """Checks that the shapes of all parameters are there and fit; returns (kernel size, levels)."""
    levels = 0
    while f"wavelet_kernel_{levels}" in params:
        levels += 1
    missing = [name for name in ("base_kernel", "base_scale") if name not in params]
    if missing:
        raise ValueError(f"params: missing {missing}, got {sorted(params)}")
    kernel_size = (*params["base_kernel"], 0)[0]
    if kernel_size < 1:
        raise ValueError(
            f"params['base_kernel']: expected shape {('k',) * ndim + (1, channels)} with k >= 1, "
            f"got {params['base_kernel']}"
        )
    taps, bands = (kernel_size,) * ndim, 2**ndim
    expected = {"base_kernel": (*taps, 1, channels), "base_scale": (channels,)}
    if "base_bias" in params:
        expected["base_bias"] = (channels,)
    for i in range(levels):
        expected[f"wavelet_kernel_{i}"] = (*taps, bands, channels)
        expected[f"wavelet_scale_{i}"] = (bands, channels)
    problems = [f"missing {name!r}" for name in expected if name not in params]
    problems += [
        f"unexpected {name!r} (levels are counted from wavelet_kernel_0 without a gap)"
        for name in params
        if name not in expected
    ]
    for name, shape in expected.items():
        if name in params and params[name] != shape:
            problems.append(f"{name!r}: expected shape {shape}, got {params[name]}")
    if problems:
        raise ValueError(
            f"params (for x with {channels} channels, which come last): " + "; ".join(problems)
        )
    return kernel_size, levels
