"""A convolution and the norm behind it as a function: validate, pick, call.

`pallas_kernels.oracle.conv2d_instance_norm` is the definition.
"""

from collections.abc import Sequence
from enum import StrEnum

import jax
from jax.typing import ArrayLike

from pallas_kernels.common import sharding
from pallas_kernels.common.arguments import Precision, checked_array, checked_eps
from pallas_kernels.common.measurement import request
from pallas_kernels.common.types import Keywords
from pallas_kernels.conv2d import vjp as conv2d_vjp
from pallas_kernels.conv2d.api import OPERATOR as CONV2D
from pallas_kernels.conv2d.api import checked_call, conv2d
from pallas_kernels.dispatch import Choice, Operator, Request, table
from pallas_kernels.oracle.conv2d import Padding
from pallas_kernels.stylize import vjp as norm_vjp
from pallas_kernels.stylize.api import OPERATOR as NORM
from pallas_kernels.stylize.api import (
    check_shapes,
    checked_activation,
    instance_norm,
)
from pallas_kernels.stylize.convolution import vjp
from pallas_kernels.stylize.convolution.problem import Problem


class Implementation(StrEnum):
    """Implementations of a convolution that leaves its moments, with its norm."""

    TRITON = "triton"
    XLA = "xla"
    MOSAIC_GPU = "mosaic_gpu"
    MOSAIC_TPU = "mosaic_tpu"


PARTS = "parts"
"""The name by which a table says that the parts one by one were the fastest."""

OPERATOR = Operator(
    name="conv2d_instance_norm",
    package="pallas_kernels.stylize.convolution",
    implementations=Implementation,
    # Where nothing was measured the parts are computed one by one, see below.
    rule={
        "tpu": ("xla", "mosaic_tpu"),
        "gpu": ("xla", "triton", "mosaic_gpu"),
        "cpu": ("xla",),
    },
    directions={"fwd": ("normalise",)},
)


def conv2d_instance_norm(
    x: ArrayLike,
    w: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    upsample: int = 1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: ArrayLike | None = None,
    precision: Precision = None,
    implementation: Choice = None,
    conv_implementation: Choice = None,
    norm_implementation: Choice = None,
    out_sharding: sharding.OutSharding = None,
) -> jax.Array:
    """A dense convolution of images, and the instance norm of its output.

    The convolution leaves the mean and the squared deviations of each of its tiles, in float32 or
    better. They are added in a fixed order, and one pass reads the output, which is rounded to x's
    dtype, and normalises it: three passes over the output with the one that writes it. Where
    neither a filter, nor the environment, nor what was measured on this kind of device says so, the
    parts are computed one by one, `conv2d`, then `instance_norm`, which reads its input twice.

    A bias of the convolution would cancel, so there is none, and its gradient would be 0.
    Derivatives exist of every order, in reverse and in forward mode. Saved are x, w, the
    convolution's output, its statistics, scale and bias, and with an activation the residual.

    Args:
        x: Images `[*batch, H, W, C]`; float16, bfloat16, float32 or float64.
        w: Filters `[HF, WF, C, NF]`, of x's dtype.
        scale: `[NF]` or `[*batch, NF]`, as `instance_norm` takes it.
        bias: The same.
        stride: As `conv2d` takes it.
        padding: As `conv2d` takes it.
        upsample: As `conv2d` takes it.
        eps: Is added to the variance.
        activation: None or "relu".
        residual: Is added before the activation; of the output's shape and x's dtype, or None.
        precision: The precision of float32 products on matrix units; None is full float32.
        implementation: Filter on the implementations that compute both at once: a name, a sequence
            of names or `"auto"` for the fastest of them, or `None` for the environment's
            (`FLASH_WTCONV_CONV2D_INSTANCE_NORM_FWD`), or the one that was the fastest for such a
            call on this kind of device.
        conv_implementation: Filter on the implementations of `conv2d`, in the backward pass, and
            in the forward pass where the parts are computed one by one: a filter here, without
            `implementation`, has them computed so.
        norm_implementation: Filter on those of `instance_norm`, likewise.
        out_sharding: How the output is split over a mesh, as `wtconv2d` takes it: over the batch
            and the features.

    Returns:
        `[*batch, H_out, W_out, NF]` of x's dtype, see `conv2d`.

    Raises:
        ValueError: A bad argument: which, what came, and what was expected.
        NotImplementedError: No allowed implementation can run here; says why for each.

    Example:
        >>> import jax.numpy as jnp
        >>> x, w = jnp.ones((2, 9, 8, 4)), jnp.ones((3, 3, 4, 16))
        >>> rest = {"stride": 2, "padding": ("reflect", 1), "activation": "relu"}
        >>> conv2d_instance_norm(x, w, jnp.ones(16), jnp.ones(16), **rest).shape
        (2, 5, 4, 16)
    """
    parts = conv_implementation, norm_implementation
    for operator, part, name in zip((CONV2D, NORM), parts, ("conv", "norm"), strict=True):
        operator.check_names(part, f"{name}_implementation")
    activation, eps = checked_activation(activation), checked_eps(eps)
    x, w = checked_array(x, "x"), checked_array(w, "w")
    factor, shift, added = (
        None if value is None else checked_array(value, name)
        for name, value in (("scale", scale), ("bias", bias), ("residual", residual))
    )
    of_window: Keywords = {"stride": stride, "padding": padding, "upsample": upsample}
    call = checked_call(x, w, None, precision=precision, **of_window)
    problem = Problem(*call.problem[:6], activation, added is not None)
    output = jax.ShapeDtypeStruct((*x.shape[:-3], *problem.norm.shape[1:]), x.dtype)
    check_shapes(output, factor, shift, added, "the output's")

    spread = sharding.spread(vjp.RULE, [x, w], out_sharding)

    def one_by_one() -> jax.Array:
        z = conv2d(
            *(x, w),
            precision=precision,
            implementation=conv_implementation,
            out_sharding=out_sharding,
            **of_window,
        )
        return instance_norm(
            *(z, factor, shift),
            eps=eps,
            activation=activation,
            residual=added,
            implementation=norm_implementation,
            out_sharding=out_sharding,
        )

    fwd = request(OPERATOR, "fwd", implementation)
    own = vjp.of_shard(problem, spread.shard)
    fastest = _fastest(fwd, own)
    apart = spread.plain or parts != (None, None) or fastest == PARTS
    if implementation is None and (apart or sharding.is_split(x, x.ndim - 1)):
        return one_by_one()
    (fwd,) = spread.allowed(fwd)
    # By any implementation, before one is chosen.
    room = OPERATOR.module(str(Implementation.XLA))
    of_conv, of_norm = (
        request(operator, "bwd", part) for operator, part in zip((CONV2D, NORM), parts, strict=True)
    )
    plan = vjp.Plan(
        room,
        conv2d_vjp.Plan(
            *(room, None, call.problem.window, call.precision, None, of_conv), stated=spread.stated
        ),
        norm_vjp.Plan(room, (), eps, activation, of_norm, stated=vjp.of_norm(spread.stated)),
        fwd,
        spread.stated,
    )
    chosen = fwd.choose(own, vjp.measurement, OPERATOR, "fwd", own, plan)
    if fastest not in (None, chosen.implementation):
        # What was measured does not take this call.
        return one_by_one()
    module = OPERATOR.module(chosen.implementation)
    return vjp.conv2d_instance_norm(plan.by(module, chosen.config), x, w, factor, shift, added)


def _fastest(fwd: Request, problem: Problem) -> str | None:
    """The name that the table says was the fastest, the parts where it says nothing.

    None where a filter, the environment or times of this machine choose.
    """
    if fwd.names is not None or fwd.epoch is not None:
        return None
    kind = fwd.device_kind
    found = None if kind is None else table.fastest(OPERATOR.name, "fwd", problem, kind)
    return found or PARTS
