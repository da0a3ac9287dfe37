"""The residual block of style transfer, which is made of two convolutions with their norms.

`pallas_kernels.oracle.residual_block` is the definition.
"""

from collections.abc import Sequence

import jax
from jax.typing import ArrayLike

from pallas_kernels.common.arguments import Precision, checked_array
from pallas_kernels.common.sharding import OutSharding
from pallas_kernels.common.types import Keywords
from pallas_kernels.dispatch import Choice
from pallas_kernels.oracle.conv2d import Padding
from pallas_kernels.stylize.convolution.api import conv2d_instance_norm

Branch = Sequence[ArrayLike | None]
"""The filters of a convolution, and the scale and bias of the norm behind."""


def residual_block(
    x: ArrayLike,
    first: Branch,
    second: Branch,
    *,
    padding: Padding = "reflect",
    eps: float = 1e-5,
    precision: Precision = None,
    implementation: Choice = None,
    conv_implementation: Choice = None,
    norm_implementation: Choice = None,
    out_sharding: OutSharding = None,
) -> jax.Array:
    """Convolution, norm, ReLU, convolution, norm, and x added; no ReLU behind.

    A pass is one tensor of x's size, read or written. Where the convolutions leave their moments it
    takes 9: each convolution reads and writes one, each norm reads and writes one, and the second
    reads x too. Where the parts are computed one by one it takes 11, since each norm reads its
    input for the statistics first; where that second read comes from a cache, 9 too. A backward
    pass reads what was saved: x, both convolutions' outputs and the first norm's, and no more.

    Args:
        x: Images `[*batch, H, W, C]`.
        first: Filters `[HF, WF, C, C]`, scale and bias of the first convolution and norm.
        second: Those of the second.
        padding: Of both convolutions, as `conv2d` takes it; it keeps the size.
        eps: Is added to both variances.
        precision: As `conv2d_instance_norm` takes it.
        implementation: As `conv2d_instance_norm` takes it.
        conv_implementation: As `conv2d_instance_norm` takes it.
        norm_implementation: As `conv2d_instance_norm` takes it.
        out_sharding: As `conv2d_instance_norm` takes it.

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
        "implementation": implementation,
        "conv_implementation": conv_implementation,
        "norm_implementation": norm_implementation,
        "out_sharding": out_sharding,
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
