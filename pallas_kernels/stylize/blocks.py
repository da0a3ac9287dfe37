"""Convolutions with an instance norm behind, as functions of arrays.

They are compositions of `conv2d` and `instance_norm`, each by an implementation of its own.
`pallas_kernels.oracle.conv2d_instance_norm` and `residual_block` are the definitions.
"""

from collections.abc import Sequence

import jax
from jax.typing import ArrayLike

from pallas_kernels.common.arguments import Precision, checked_array
from pallas_kernels.common.types import Keywords
from pallas_kernels.conv2d.api import OPERATOR as CONV2D
from pallas_kernels.conv2d.api import conv2d
from pallas_kernels.dispatch import Choice
from pallas_kernels.oracle.conv2d import Padding
from pallas_kernels.stylize.api import OPERATOR, checked_activation, checked_eps, instance_norm

Branch = Sequence[ArrayLike | None]
"""The filters of a convolution, and the scale and bias of the norm behind."""


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
    conv_implementation: Choice = None,
    norm_implementation: Choice = None,
) -> jax.Array:
    """A dense convolution of images, and the instance norm of its output.

    A bias of the convolution would cancel, so there is none. The convolution's output is rounded to
    x's dtype, of which the statistics are.

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
        conv_implementation: Filter on the implementations of `conv2d`.
        norm_implementation: Filter on those of `instance_norm`.

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
    CONV2D.check_names(conv_implementation, "conv_implementation")
    OPERATOR.check_names(norm_implementation, "norm_implementation")
    rest: Keywords = {"activation": checked_activation(activation), "eps": checked_eps(eps)}
    z = conv2d(
        x,
        w,
        stride=stride,
        padding=padding,
        upsample=upsample,
        precision=precision,
        implementation=conv_implementation,
    )
    if residual is not None:
        residual = checked_array(residual, "residual")
        if (residual.shape, residual.dtype) != (z.shape, z.dtype):
            raise ValueError(
                f"residual: expected the output's shape and dtype, {z.shape} {z.dtype}, got "
                f"{residual.shape} {residual.dtype}"
            )
    return instance_norm(
        z, scale, bias, residual=residual, implementation=norm_implementation, **rest
    )


def residual_block(
    x: ArrayLike,
    first: Branch,
    second: Branch,
    *,
    padding: Padding = "reflect",
    eps: float = 1e-5,
    precision: Precision = None,
    conv_implementation: Choice = None,
    norm_implementation: Choice = None,
) -> jax.Array:
    """Convolution, norm, ReLU, convolution, norm, and x added; no ReLU behind.

    A pass is one tensor of x's size, read or written. As a composition this is 11: each convolution
    reads and writes one, each norm reads its input for the statistics and once more and writes one,
    and the second reads x too. Where a norm's second read comes from a cache it is 9.

    Args:
        x: Images `[*batch, H, W, C]`.
        first: Filters `[HF, WF, C, C]`, scale and bias of the first convolution and norm.
        second: Those of the second.
        padding: Of both convolutions, as `conv2d` takes it; it keeps the size.
        eps: Is added to both variances.
        precision: As `conv2d_instance_norm` takes it.
        conv_implementation: As `conv2d_instance_norm` takes it.
        norm_implementation: As `conv2d_instance_norm` takes it.

    Returns:
        An array of x's shape and dtype.

    Raises:
        ValueError: A bad argument: which, what came, and what was expected.
        NotImplementedError: No allowed implementation can run here; says why for each.

    Example:
        >>> import jax.numpy as jnp
        >>> branch = jnp.ones((3, 3, 4, 4)), jnp.ones(4), jnp.zeros(4)
        >>> residual_block(jnp.ones((2, 9, 8, 4)), branch, branch).shape
        (2, 9, 8, 4)
    """
    x = checked_array(x, "x")
    of_first, of_second = _checked_branch(x, first, "first"), _checked_branch(x, second, "second")
    rest: Keywords = {
        "padding": padding,
        "eps": eps,
        "precision": precision,
        "conv_implementation": conv_implementation,
        "norm_implementation": norm_implementation,
    }
    inner = conv2d_instance_norm(x, *of_first, activation="relu", **rest)
    if inner.shape != x.shape:
        raise ValueError(
            f"padding={padding!r}: expected one that keeps the size of x, {x.shape}; the first "
            f"convolution made {inner.shape} of it"
        )
    return conv2d_instance_norm(inner, *of_second, residual=x, **rest)


def _checked_branch(
    x: jax.Array, branch: Branch, name: str
) -> tuple[jax.Array, ArrayLike | None, ArrayLike | None]:
    """Filters, scale and bias; raises ValueError where they are none or do not fit x."""
    if not isinstance(branch, Sequence) or len(branch) != 3 or branch[0] is None:
        raise ValueError(f"{name}: expected (filters, scale, bias), got {type(branch).__name__}")
    w, scale, bias = branch
    assert w is not None
    w = checked_array(w, f"{name}[0]")
    channels = x.shape[-1:]
    if w.shape[2:] != 2 * channels or w.ndim != 4:
        raise ValueError(
            f"{name}[0]: expected filters [HF, WF, C, C] of the {channels[0] if channels else 0} "
            f"channels of x {x.shape}, got shape {w.shape}"
        )
    return w, scale, bias
