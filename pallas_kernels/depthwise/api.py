"""Depthwise 2-D convolution as a function: validate, pick, call.

`pallas_kernels.oracle.depthwise_conv2d` is the definition.
"""

import math
from collections.abc import Sequence
from enum import StrEnum

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from pallas_kernels.common import sharding
from pallas_kernels.common.arguments import (
    Precision,
    checked_array,
    checked_precision,
    hashable,
    remembered,
)
from pallas_kernels.common.measurement import request
from pallas_kernels.conv2d.api import checked_window
from pallas_kernels.depthwise import vjp
from pallas_kernels.depthwise.problem import Problem
from pallas_kernels.dispatch import Choice, Operator
from pallas_kernels.oracle.conv2d import Padding


class Implementation(StrEnum):
    """Implementations of the depthwise convolution."""

    MOSAIC_TPU = "mosaic_tpu"
    CUDA = "cuda"
    XLA = "xla"


OPERATOR = Operator(
    name="depthwise",
    package="pallas_kernels.depthwise",
    implementations=Implementation,
    rule={"tpu": ("mosaic_tpu", "xla"), "gpu": ("cuda", "xla"), "cpu": ("xla",)},
    directions={"fwd": ("forward",), "bwd": ("input_grad", "weight_grad")},
)


def depthwise_conv2d(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    precision: Precision = None,
    implementation: Choice = None,
    out_sharding: sharding.OutSharding = None,
) -> jax.Array:
    """Depthwise convolution (cross-correlation) of images: each channel by a kernel of its own.

    It computes what `jax.lax.conv_general_dilated` does with as many groups as channels. Sums run
    in float32 or better, and the bias is added before they are rounded. Every implementation has
    derivatives of every order, in reverse and in forward mode (`jvp`, `linearize`, `hessian`),
    which save x and the kernel and nothing else.

    Args:
        x: Images `[*batch, H, W, C]`, float16, bfloat16, float32 or float64.
        kernel: Taps `[KH, KW, 1, C]`, any floating dtype: the kernel that `flax.linen.Conv` has
            with `feature_group_count=C`. Kernels of ours take square ones of 9 taps at most.
        bias: `[C]`, any floating dtype.
        stride: The stride of the output, an int or one for H and one for W.
        padding: "SAME" (`ceil(size / stride)` samples come out, as of `jax.lax`; an odd sample is
            padded behind), "VALID", or as `conv2d` takes it.
        dilation: Distance of the samples that neighbouring taps read, as stride.
        precision: The precision of float32 products on matrix units; None is full float32.
        implementation: Filter on the implementations: a name, a sequence of names or `"auto"`
            for the fastest of them, which is measured once and remembered, or `None` for the
            environment's (`FLASH_WTCONV_DEPTHWISE_FWD`, `..._BWD`) or the device's rule.
        out_sharding: How the output is split over a mesh, as `wtconv2d` takes it.

    Returns:
        `[*batch, H_out, W_out, C]` in x's dtype, with `H_out = (H + top + bottom - dilation *
        (KH - 1) - 1) // stride + 1`.

    Raises:
        ValueError: A bad argument: which, what came, and what was expected.
        NotImplementedError: No allowed implementation can run here; says why for each.

    Example:
        >>> import jax.numpy as jnp
        >>> x, kernel = jnp.ones((2, 9, 8, 4)), jnp.ones((7, 7, 1, 4))
        >>> depthwise_conv2d(x, kernel, jnp.ones(4)).shape
        (2, 9, 8, 4)
        >>> depthwise_conv2d(x, kernel, stride=2, padding=3).shape
        (2, 5, 4, 4)
    """
    x, kernel = checked_array(x, "x"), checked_array(kernel, "kernel")
    bias = None if bias is None else checked_array(bias, "bias")
    window = hashable(stride), hashable(padding), hashable(dilation)
    # `remembered` tells True and 2.0 from the integers that they equal, but not inside a tuple.
    plain = all(type(one) in (int, str) for one in window)
    problem, precision = (remembered(_checked_call) if plain else _checked_call)(
        x.shape, x.dtype, kernel.shape, None if bias is None else bias.shape, *window, precision
    )
    fwd, bwd = (request(OPERATOR, direction, implementation) for direction in OPERATOR.directions)
    spread = sharding.spread(vjp.rule(problem), [x], out_sharding)
    fwd, bwd = spread.allowed(fwd, bwd)
    own = vjp.of_shard(problem, spread.shard)
    chosen = fwd.choose(own, vjp.measurement, OPERATOR, "fwd", own, bias is not None, precision)
    module = OPERATOR.module(chosen.implementation)
    plan = vjp.Plan(module, chosen.config, problem, precision, bwd, fwd, spread.stated)
    return vjp.depthwise_conv2d(plan, x, kernel, bias)


def _checked_call(
    images: tuple[int, ...],
    dtype: jnp.dtype,
    taps: tuple[int, ...],
    bias: tuple[int, ...] | None,
    stride: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
    precision: Precision,
) -> tuple[Problem, jax.lax.Precision | None]:
    """Checks all that shapes and plain arguments tell; raises ValueError."""
    if len(images) < 3 or any(size == 0 for size in images[-3:]):
        raise ValueError(
            f"x: expected [*batch, H, W, C] of at least one sample and channel, got shape {images}"
        )
    channels = images[-1]
    if len(taps) != 4 or 0 in taps[:2] or taps[2:] != (1, channels):
        raise ValueError(
            f"kernel: expected [KH, KW, 1, C] of at least one tap for x with C = {channels} "
            f"channels, which come last, got shape {taps}"
        )
    if bias not in (None, (channels,)):
        raise ValueError(f"bias: expected shape {(channels,)}, one a channel, got {bias}")
    flat = math.prod(images[:-3]), *images[-3:]
    window = checked_window(flat, taps, stride, padding, dilation, channels, name="kernel")
    height, width = taps[:2]
    return Problem(flat, dtype, (height, width), window), checked_precision(precision)
