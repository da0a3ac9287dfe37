"""The pointwise half of a ConvNeXt block for any layer library: LayerNorm, MLP and layer scale.

A product of matrices does not care whether what scales its rows or columns is multiplied with the
images or with the kernel. Where there are more pixels than hidden channels the kernel is smaller:
there LayerNorm's scale and bias go into the first kernel and bias, layer scale into the second. So
nothing but the normalised images, the hidden ones and the output are in memory, and the gradients
of scales are sums over kernels, not over pixels.
"""

import math
import operator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from pallas_kernels.common import sharding
from pallas_kernels.common.arguments import Precision, checked_array, checked_precision, surely
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.gelu import gelu
from pallas_kernels.common.types import Keywords, Tree
from pallas_kernels.dispatch import Choice
from pallas_kernels.mlp import mlp
from pallas_kernels.mlp.norm import normalized

__all__ = ["MlpParams", "gelu", "mlp", "norm_mlp", "normalized", "response_norm"]


def response_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float = 1e-6
) -> jax.Array:
    """ConvNeXt V2's global response normalisation: channels compete by their norm over the map.

    Source: Woo et al., "ConvNeXt V2", CVPR 2023.

    Args:
        x: Images `[..., H, W, C]`, floating point.
        scale: `[C]`; with zeros, and a bias of zeros, x comes back.
        bias: `[C]`.
        epsilon: What is added to the mean of the norms.

    Returns:
        An array of the shape and dtype of x, computed in float32 or better.

    Example:
        >>> response_norm(jnp.ones((1, 2, 2, 4)), jnp.zeros(4), jnp.ones(4))[0, 0, 0].tolist()
        [2.0, 2.0, 2.0, 2.0]
    """
    dtype = accumulation_dtype(x.dtype)
    wide, scale, bias = (a.astype(dtype) for a in (x, scale, bias))
    scale, bias = (jnp.expand_dims(a, range(x.ndim - 1)) for a in (scale, bias))
    square = jnp.sum(wide * wide, axis=(-3, -2), keepdims=True)
    # The root has no derivative at a channel of zeros; PyTorch takes 0 there, and so do we.
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    share = norm / (jnp.mean(norm, axis=-1, keepdims=True) + epsilon)
    return (wide + scale * (wide * share) + bias).astype(x.dtype)


class MlpParams(NamedTuple):
    """The parameters of `norm_mlp`, of any floating dtype.

    Attributes:
        kernels: Those of both linear layers, `[C, hidden]` and `[hidden, features]`.
        biases: Theirs, `[hidden]` and `[features]`.
        norm: LayerNorm's scale and bias, `[C]` each.
        response: The scale and bias `[hidden]` of the response normalisation that follows GELU;
            None leaves it out.
        layer_scale: `[features]`, which multiplies the output; None leaves it out.
    """

    kernels: tuple[jax.Array, jax.Array]
    biases: tuple[jax.Array, jax.Array]
    norm: tuple[jax.Array, jax.Array]
    response: tuple[jax.Array, jax.Array] | None = None
    layer_scale: jax.Array | None = None


def norm_mlp(
    x: ArrayLike,
    params: MlpParams,
    *,
    residual: jax.Array | None = None,
    epsilon: float = 1e-6,
    dtype: DTypeLike | None = None,
    precision: Precision = None,
    implementation: Choice = None,
) -> jax.Array:
    """LayerNorm, a linear layer, exact GELU, a linear layer and layer scale, for each pixel.

    Args:
        x: Images `[..., C]`, floating point.
        params: The parameters.
        residual: `[..., features]`, which is added to the output; None leaves it out.
        epsilon: What LayerNorm adds to the variance.
        dtype: The dtype of images and products; None is that of x and all parameters together.
        precision: The precision of both products, as `jax.lax.dot_general` takes it.
        implementation: Filter on the implementations of `pallas_kernels.mlp.mlp`.

    Returns:
        Images `[..., features]` of the dtype.

    Raises:
        ValueError: If x is not floating point, or a shape does not fit.
        NotImplementedError: If no allowed implementation can run here.

    Example:
        >>> x = jnp.ones((2, 8, 8, 4))
        >>> params = MlpParams(
        ...     kernels=(jnp.ones((4, 16)), jnp.ones((16, 4))),
        ...     biases=(jnp.zeros(16), jnp.zeros(4)),
        ...     norm=(jnp.ones(4), jnp.zeros(4)),
        ...     layer_scale=jnp.full(4, 1e-6),
        ... )
        >>> norm_mlp(x, params, residual=x).shape
        (2, 8, 8, 4)
    """
    x = checked_array(x, "x")
    _check(x, params, residual)
    dtype = jnp.result_type(*jax.tree.leaves((x, params))) if dtype is None else jnp.dtype(dtype)
    precision = checked_precision(precision)
    rows, hidden = math.prod(x.shape[:-1]), params.kernels[0].shape[1]
    # Scaling kernels for fewer rows would cost more than it saves; symbolic rows are many.
    few = surely(operator.le, rows, hidden)
    # float16 has no exponents for a kernel times the 1e-6 that layer scale begins with.
    scaled = params.layer_scale is not None and (few or dtype == jnp.float16)
    # What is scaled, or widened, has its residual afterwards.
    last = None if scaled or residual is None or residual.dtype != dtype else residual
    y = x.astype(dtype)
    inside: float | None = epsilon
    # What is scaled, or has another norm inside, is normalised on its own.
    if few or params.response is not None:
        # Scopes are what profiles call the parts of a network.
        with jax.named_scope("norm"):
            inside = None
            if few:
                scale, shift = (one.astype(dtype) for one in params.norm)
                y = layer_norm(y, scale, shift, epsilon)
            else:
                y = sharding.by_pixel(partial(normalized, epsilon=epsilon), y)
    with jax.named_scope("fold"):
        kernels, biases = _folded(params, dtype, norm=not few, scale=not scaled)
    if params.response is None:
        how: Keywords = {"precision": precision, "implementation": implementation}
        y = mlp(y, kernels, biases, residual=last, epsilon=inside, **how)
    else:
        y = gelu(_linear(y, kernels[0], biases[0], precision))
        y = response_norm(y, *params.response)
        y = _linear(y, kernels[1], biases[1], precision)
        y = y if last is None else y + last
    if params.layer_scale is not None and scaled:
        y = y * jnp.expand_dims(params.layer_scale.astype(dtype), range(y.ndim - 1))
    return y if residual is None or last is not None else y + residual


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """LayerNorm of each pixel.

    Args:
        x: Images `[..., C]`.
        scale: `[C]` of the dtype of x.
        bias: `[C]` of the dtype of x.
        epsilon: What is added to the variance.

    Example:
        >>> layer_norm(jnp.array([[1.0, 3.0]]), jnp.ones(2), jnp.zeros(2), 0.0).tolist()
        [[-1.0, 1.0]]
    """

    def norm(rows: jax.Array) -> jax.Array:
        factors, offsets = (jnp.expand_dims(one, range(rows.ndim - 1)) for one in (scale, bias))
        return normalized(rows, epsilon=epsilon) * factors + offsets

    return sharding.by_pixel(norm, x)


@partial(jax.jit, static_argnums=1, static_argnames=("norm", "scale"))
def _folded(
    params: MlpParams, dtype: jnp.dtype, *, norm: bool, scale: bool
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """The kernels, in a dtype, and biases of the MLP, with LayerNorm's and layer scale in them.

    Args:
        params: The parameters.
        dtype: The dtype of the kernels.
        norm: Whether LayerNorm's scale and bias go into the first.
        scale: Whether layer scale, if there is one, goes into the second.
    """
    wide = accumulation_dtype(dtype)
    (first, second), (inner, outer), (factor, shift), _, gamma = jax.tree.map(
        lambda one: one.astype(wide), params
    )
    if norm:
        inner = inner + jnp.sum(first * shift[:, None], axis=0)
        first = first * factor[:, None]
    if gamma is not None and scale:
        second, outer = second * gamma[None], outer * gamma
    return (first.astype(dtype), second.astype(dtype)), (inner, outer)


def _linear(x: jax.Array, kernel: jax.Array, bias: jax.Array, precision: Precision) -> jax.Array:
    """A linear layer in the dtype of x."""
    product = jnp.matmul(x, kernel, precision=precision)
    return product + jnp.expand_dims(bias.astype(x.dtype), range(x.ndim - 1))


def _check(x: jax.Array, params: MlpParams, residual: jax.Array | None) -> None:
    """Raises a `ValueError` for an array whose shape does not fit the others."""
    channels, hidden = x.shape[-1:], params.kernels[0].shape[-1:]
    features = params.kernels[1].shape[-1:]
    expected: dict[str, Tree] = {
        "kernels": (channels + hidden, hidden + features),
        "biases": (hidden, features),
        "norm": (channels, channels),
        "response": None if params.response is None else (hidden, hidden),
        "layer_scale": None if params.layer_scale is None else features,
    }
    for name, shapes in expected.items():
        got = jax.tree.map(jnp.shape, getattr(params, name))
        if got != shapes:
            raise ValueError(
                f"{name}: expected {shapes} for x {x.shape}, {hidden[0]} hidden channels and "
                f"{features[0]} features, got {got}"
            )
    if residual is not None and residual.shape != x.shape[:-1] + features:
        raise ValueError(
            f"residual: expected shape {x.shape[:-1] + features}, got {residual.shape}"
        )
