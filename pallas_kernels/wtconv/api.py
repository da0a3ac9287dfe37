"""The wavelet convolution as functions: validate, pick, call.

Source: Finder, Amoyal, Treister, Freifeld, "Wavelet Convolutions for Large Receptive Fields",
ECCV 2024. `pallas_kernels.oracle.wtconv` is the definition.
"""

import math
from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import partial
from types import ModuleType
from typing import Any

import jax
from jax.typing import ArrayLike

from pallas_kernels.common import device
from pallas_kernels.common.arguments import (
    Precision,
    check_unsharded,
    checked_array,
    checked_integer,
    checked_precision,
)
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.measurement import JaxMeasurement
from pallas_kernels.dispatch import Choice, Operator
from pallas_kernels.dispatch.tuner import TuningParams
from pallas_kernels.haar.filters import filter_bank
from pallas_kernels.wtconv import vjp
from pallas_kernels.wtconv.problem import Problem


class Implementation(StrEnum):
    """Implementations of the wavelet convolution."""

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
        "gpu": ("mosaic_gpu", "triton", "xla"),
        "cpu": ("xla",),
    },
)


def wtconv1d(
    x: ArrayLike,
    params: Mapping[str, ArrayLike],
    *,
    wavelet: str = "haar",
    stride: int = 1,
    implementation: Choice = None,
    precision: Precision = None,
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
    return _wtconv(1, x, params, wavelet, stride, implementation, precision)


def wtconv2d(
    x: ArrayLike,
    params: Mapping[str, ArrayLike],
    *,
    wavelet: str = "haar",
    stride: int = 1,
    implementation: Choice = None,
    precision: Precision = None,
) -> jax.Array:
    """Wavelet convolution of images `[*batch, H, W, C]`, any number of batch dimensions.

    Sums run in float32 or better. Gradients save x and the scaled kernels and nothing else, and
    can be differentiated again in reverse mode; forward mode over them (`hessian`, `jvp` of
    `grad`) needs `implementation="xla"`.

    Args:
        x: Images, float16, bfloat16, float32 or float64; any H, W, C, odd ones included.
        params: `base_kernel [k, k, 1, C]`, `base_scale [C]`, optionally `base_bias [C]`, and for
            each level i from 0 `wavelet_kernel_{i} [k, k, 4, C]` and `wavelet_scale_{i} [4, C]`;
            subbands in the order LL, LH, HL, HH. Any floating dtype. The number of levels is the
            number of wavelet kernels; none is a plain depthwise convolution.
        wavelet: `"haar"` or any discrete wavelet of PyWavelets.
        stride: Keep every stride-th pixel of each axis.
        implementation: Filter on the implementations: a name, a sequence of names or `"auto"`
            for the fastest of them, which is measured once and remembered, or `None` for the
            environment's (`FLASH_WTCONV_WTCONV_FWD`, `..._BWD`) or the device's rule.
        precision: For implementations on matrix units; elementwise ones always use full float32.

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
    return _wtconv(2, x, params, wavelet, stride, implementation, precision)


def wtconv3d(
    x: ArrayLike,
    params: Mapping[str, ArrayLike],
    *,
    wavelet: str = "haar",
    stride: int = 1,
    implementation: Choice = None,
    precision: Precision = None,
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
    return _wtconv(3, x, params, wavelet, stride, implementation, precision)


def _wtconv(
    ndim: int,
    x: ArrayLike,
    params: Mapping[str, ArrayLike],
    wavelet: str,
    stride: int,
    implementation: Choice,
    precision: Precision,
) -> jax.Array:
    x = _checked_signal(x, ndim)
    params = _checked_arrays(params)
    kernel_size, levels = _check_params(params, ndim, x.shape[-1])
    filter_bank(wavelet)
    stride = checked_integer(stride, "stride", least=1)
    if ndim == 1 and x.shape[-2] < stride:
        raise ValueError(
            f"stride={stride} averages groups of {stride} samples, but x has {x.shape[-2]}"
        )
    batch, spatial, channels = x.shape[: -1 - ndim], x.shape[-1 - ndim : -1], x.shape[-1]
    flat = x.reshape(math.prod(batch), *spatial, channels)
    problem = Problem(flat.shape, flat.dtype, kernel_size, levels, wavelet)
    precision = checked_precision(precision)
    here, kind, measured_as = device.platform(), device.kind(), problem.measured_as()
    chosen = [
        OPERATOR.choose(
            direction,
            implementation,
            here,
            problem,
            partial(_measurement, direction, measured_as, "base_bias" in params, precision),
            kind,
            measured_as,
        )
        for direction in OPERATOR.directions
    ]
    fwd, bwd = (OPERATOR.module(one.implementation) for one in chosen)
    plan = vjp.Plan(fwd, bwd, wavelet, precision, *(one.config for one in chosen))
    y = vjp.wtconv(plan, stride, flat, params)
    return y.reshape(*batch, *y.shape[1:])


def _measurement(
    direction: str, problem: Problem, bias: bool, precision: jax.lax.Precision | None
) -> JaxMeasurement:
    """How the tuner runs an implementation on arrays like those of a call."""
    *spatial, channels = problem.shape[1:]
    acc = accumulation_dtype(problem.dtype)
    bands = [1, *[2 ** len(spatial)] * problem.levels]
    kernel = (problem.kernel_size,) * len(spatial)
    x = jax.ShapeDtypeStruct(problem.shape, problem.dtype)
    taps = tuple(jax.ShapeDtypeStruct((*kernel, band, channels), acc) for band in bands)
    inputs = x, taps, jax.ShapeDtypeStruct((channels,), acc) if bias else None

    def run(module: ModuleType, config: TuningParams) -> Callable[..., Any]:
        plan = vjp.Plan(module, module, problem.wavelet, precision, config, config)
        return vjp.one_pass(plan, direction)

    return JaxMeasurement(
        run,
        inputs if direction == "fwd" else (*inputs, x),
        OPERATOR.module("xla"),
        {"bias": bias, "precision": precision and precision.name},
    )


def _checked_signal(value: ArrayLike, ndim: int) -> jax.Array:
    x = checked_array(value, "x")
    axes = ("L", "H, W", "D, H, W")[ndim - 1]
    if x.ndim < ndim + 1:
        raise ValueError(f"x: expected an array [*batch, {axes}, C], got shape {x.shape}")
    if any(size == 0 for size in x.shape[-1 - ndim :]):
        raise ValueError(
            f"x: expected [*batch, {axes}, C] of at least one sample and channel, got "
            f"shape {x.shape}"
        )
    check_unsharded(x, "x")
    return x


def _checked_arrays(params: Mapping[str, ArrayLike]) -> dict[str, jax.Array]:
    if not isinstance(params, Mapping):
        raise ValueError(f"params: expected a dict of arrays by name, got {type(params).__name__}")
    if set(params) == {"params"}:
        raise ValueError('params: got linen variables; hand on what is inside, variables["params"]')
    return {name: checked_array(value, f"params[{name!r}]") for name, value in params.items()}


def _check_params(params: Mapping[str, jax.Array], ndim: int, channels: int) -> tuple[int, int]:
    """Checks every parameter's presence, shape and dtype; returns (kernel size, levels)."""
    levels = 0
    while f"wavelet_kernel_{levels}" in params:
        levels += 1
    missing = [name for name in ("base_kernel", "base_scale") if name not in params]
    if missing:
        raise ValueError(f"params: missing {missing}, got {sorted(params)}")
    kernel_size = params["base_kernel"].shape[0] if params["base_kernel"].ndim else 0
    if kernel_size < 1:
        raise ValueError(
            f"params['base_kernel']: expected shape {('k',) * ndim + (1, channels)} with k >= 1, "
            f"got {params['base_kernel'].shape}"
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
        if name in params and params[name].shape != shape:
            problems.append(f"{name!r}: expected shape {shape}, got {params[name].shape}")
    if problems:
        raise ValueError(
            f"params (for x with {channels} channels, which come last): " + "; ".join(problems)
        )
    return kernel_size, levels
