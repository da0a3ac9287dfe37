"""Instance normalisation as a function: validate, pick, call.

`pallas_kernels.oracle.instance_norm` is the definition.
"""

import math
from enum import StrEnum

import jax
from jax.typing import ArrayLike

from pallas_kernels.common import sharding
from pallas_kernels.common.arguments import checked_array, checked_eps
from pallas_kernels.common.measurement import request
from pallas_kernels.dispatch import Choice, Operator
from pallas_kernels.stylize import vjp
from pallas_kernels.stylize.problem import Problem

ACTIVATIONS = ("relu",)


class Implementation(StrEnum):
    """Implementations of the instance normalisation."""

    TRITON = "triton"
    MOSAIC_GPU = "mosaic_gpu"
    XLA = "xla"
    MOSAIC_TPU = "mosaic_tpu"


OPERATOR = Operator(
    name="instance_norm",
    package="pallas_kernels.stylize",
    implementations=Implementation,
    # On a TPU nothing of ours has run, and XLA fuses the norm into what stands around it.
    rule={"tpu": ("xla", "mosaic_tpu"), "gpu": ("mosaic_gpu", "triton", "xla"), "cpu": ("xla",)},
    directions={"fwd": ("forward",), "bwd": ("backward",)},
)


def instance_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: ArrayLike | None = None,
    implementation: Choice = None,
    out_sharding: sharding.OutSharding = None,
) -> jax.Array:
    """Instance normalisation of images, with activation and residual in the same pass.

    Each channel of each image less its mean, over its standard deviation, times the scale, plus the
    bias; then the residual is added, then comes the activation. The variance is biased, as all
    frameworks take it. Statistics are always those of the images at hand; they are computed in
    float32 or better, in a fixed order, and a mean of 10,000 deviations costs no digits. An image
    of one pixel, or of pixels that are all alike, becomes the bias. NaN or infinity anywhere in a
    channel of an image makes all of that channel NaN, and no other.

    Derivatives exist of every order, in reverse and in forward mode. Saved are x, its statistics,
    scale and bias, and with an activation the residual.

    Args:
        x: Images `[*batch, H, W, C]`; float16, bfloat16, float32 or float64.
        scale: `[C]`, or of each image its own, `[*batch, C]`, any floating dtype; None is 1.
        bias: The same; None is 0.
        eps: Is added to the variance, greater than 0.
        activation: None or "relu".
        residual: Of x's shape and dtype, or None.
        implementation: Filter on the implementations: a name, a sequence of names or `"auto"`
            for the fastest of them, which is measured once and remembered, or `None` for the
            environment's (`FLASH_WTCONV_INSTANCE_NORM_FWD`, `..._BWD`), the one that was the
            fastest for such a call on this kind of device, or the device's rule.
        out_sharding: How the output is split over a mesh, as `wtconv2d` takes it.

    Returns:
        An array of x's shape and dtype.

    Raises:
        ValueError: A bad argument: which, what came, and what was expected.
        NotImplementedError: No allowed implementation can run here; says why for each.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.asarray([[[1.0], [3.0]]])
        >>> instance_norm(x, jnp.full(1, 2.0), jnp.ones(1), activation="relu").round(2).tolist()
        [[[0.0], [3.0]]]
    """
    x = checked_array(x, "x")
    factor, shift = (
        None if value is None else checked_array(value, name)
        for name, value in (("scale", scale), ("bias", bias))
    )
    added = None if residual is None else checked_array(residual, "residual")
    check_shapes(x, factor, shift, added)
    problem = Problem(
        (math.prod(x.shape[:-3]), *x.shape[-3:]),
        x.dtype,
        checked_activation(activation),
        added is not None,
    )
    spread = sharding.spread(vjp.RULE, [x], out_sharding)
    problem = vjp.of_shard(problem, spread.shard)
    fwd, bwd = (request(OPERATOR, direction, implementation) for direction in OPERATOR.directions)
    fwd, bwd = spread.allowed(fwd, bwd)
    chosen = fwd.choose(problem, vjp.measurement, OPERATOR, "fwd", problem)
    module = OPERATOR.module(chosen.implementation)
    static = checked_eps(eps), activation, bwd, fwd, spread.stated
    plan = vjp.Plan(module, chosen.config, *static)
    return vjp.instance_norm(plan, x, factor, shift, added)


def checked_activation(value: object) -> str | None:
    """The argument `activation=`.

    Raises:
        ValueError: It is none of the activations.

    Example:
        >>> checked_activation("relu")
        'relu'
    """
    if value is None or isinstance(value, str) and value in ACTIVATIONS:
        return value
    raise ValueError(f"activation={value!r}: expected None or 'relu'")


def check_shapes(
    x: jax.Array | jax.ShapeDtypeStruct,
    scale: jax.Array | None,
    bias: jax.Array | None,
    residual: jax.Array | None,
    of: str = "x's",
) -> None:
    """Checks that shapes and dtypes fit each other.

    Args:
        x: What is normalised.
        scale: The scale, or None.
        bias: The bias, or None.
        residual: The residual, or None.
        of: Says whose shape the residual's must be, in errors.

    Raises:
        ValueError: They do not; says which.
    """
    if x.ndim < 3 or any(size == 0 for size in x.shape[-3:]):
        raise ValueError(
            f"x: expected [*batch, H, W, C] of at least one pixel and channel, got shape {x.shape}"
        )
    (*batch, _, _, channels) = x.shape
    for name, value in (("scale", scale), ("bias", bias)):
        if value is not None and value.shape not in ((channels,), (*batch, channels)):
            own = f", or {(*batch, channels)}, one of each image its own" if batch else ""
            raise ValueError(
                f"{name}: expected shape {(channels,)}, one a channel{own}, got {value.shape}"
            )
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"residual: expected {of} shape and dtype, {x.shape} {x.dtype}, got {residual.shape} "
            f"{residual.dtype}"
        )
