"""The exact GELU, `x` times the normal distribution function of `x`, and what 16 bits need of it.

`erf` costs XLA about a hundred instructions a value, which in 16 bits is more than reading and
writing the value takes. There a rational formula does, whose error is far below a unit in the last
place: Abramowitz and Stegun, "Handbook of Mathematical Functions", 7.1.26. Its exponential is the
density too, so that a slope costs next to nothing more, and is computed anew in the backward pass,
for which nothing but `x` is kept.

Kernels for GPUs take GELU between two products, where each instruction counts. There the normal
distribution's tail is a power of two of a polynomial, at two thirds of the instructions, one of
them slow instead of two. (By XLA on a CPU this takes longer than the other.)
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common import _compat

_ERF = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
_HALVES = tuple(coefficient / 2 for coefficient in _ERF)
"""The coefficients of 7.1.26 of the error function, and of the normal distribution's."""
_STEP = 0.3275911 * 0.7071067811865476
"""The coefficient of its argument, which is `|x| sqrt(1 / 2)`."""
_TAIL = (
    *(-0.99999994, -1.151107, -0.45919257, -0.052550908, 0.0071554328),
    *(-0.00021835419, -0.00014757768, 3.0158515e-05, -1.9688596e-06),
)
"""The polynomial whose power of two is the normal distribution's tail, of the argument's size.

Fitted to the tail's error, where the argument is less than 6; beyond it falls at least as fast, and
tail and error are less than 1e-9. The error is at most 4e-8, and times the argument 6e-8.
"""
_FAR = 1e4
"""An argument whose tail is zero, and for which the polynomial does not overflow."""
_DENSITY = 0.3989422804014327
"""The density of the normal distribution at 0, `1 / sqrt(2 pi)`."""
_HALF_LOG2_E = 0.7213475204444817
"""The factor that turns `exp(-x x / 2)` into a power of two, which is one instruction of a GPU."""


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU: `x` times the normal distribution function of `x`.

    Args:
        x: Floating point, of any shape.

    Returns:
        An array of the shape and dtype of x. In 16 bits it is the exact one, rounded, but for
        `1.5e-7 |x|`, by a formula that costs half of `erf`; in float32 and float64 it is JAX's.

    Example:
        >>> import jax.numpy as jnp
        >>> gelu(jnp.array([-1.0, 0.0, 1.0], jnp.bfloat16)).tolist()
        [-0.158203125, 0.0, 0.83984375]
    """
    return _recomputed(x) if x.dtype.itemsize == 2 else _compat.gelu(x)


@jax.custom_jvp
def _cheap(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * _normal(wide)[0]).astype(x.dtype)


@_cheap.defjvp
def _cheap_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    wide = x.astype(jnp.float32)
    share, density = _normal(wide)
    slope = share + wide * density
    return (wide * share).astype(x.dtype), (slope * tangent.astype(jnp.float32)).astype(x.dtype)


# With a barrier: else XLA keeps the exponential of the forward pass in float32.
_recomputed = jax.checkpoint(_cheap)


def in_kernel(x: jax.Array) -> jax.Array:
    """The GELU of float32 values within `1.5e-7 |x|`, by operations that kernels have too.

    Example:
        >>> [round(float(y), 6) for y in in_kernel(jnp.array([-1.0, 0.0, 1.0, jnp.inf]))]
        [-0.158655, 0.0, 0.841345, inf]
    """
    size = jnp.minimum(jnp.abs(x), _FAR)
    power = _TAIL[-1] * size + _TAIL[-2]
    for coefficient in _TAIL[-3::-1]:
        power = power * size + coefficient
    return jnp.maximum(x, 0.0) - size * jnp.exp2(power)


def slope_in_kernel(x: jax.Array) -> jax.Array:
    """The slope of GELU at float32 values, by operations that kernels have too."""
    share, density = _normal(x)
    return share + x * density


def _normal(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The normal distribution function and its density, for float32."""
    # A reciprocal root is one instruction of a GPU, a division is eight.
    root = lax.rsqrt(1 + _STEP * jnp.abs(x))
    r = root * root
    # A product before a sum is one instruction, a sum before a product is two.
    sums = _HALVES[-1] * r + _HALVES[-2]
    for coefficient in _HALVES[-3::-1]:
        sums = sums * r + coefficient
    exponential = jnp.exp2(x * x * -_HALF_LOG2_E)
    tail = sums * r * exponential
    return jnp.where(x < 0, tail, 1 - tail), exponential * _DENSITY
