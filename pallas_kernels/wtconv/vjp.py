"""The operator's custom VJP: any forward implementation pairs with any backward one.

Two facts make the backward pass (Haar is orthonormal, and padding and cropping are each other's
transpose). The input gradient is the operator itself, transposed: taps flipped, padding swapped,
analysis and synthesis filters swapped. The weight gradient correlates the coefficients of x with
those of dy. So the residuals are x and the folded taps, and nothing else. Everything here is
linear in x and linear in the taps, so second derivatives are the same three functions again.

An implementation is a module with

    forward(x, taps, bias, *, wavelet, transpose, precision) -> y
    weight_grad(x, dy, *, kernel_shapes, wavelet, precision) -> gradients of the taps

for x `[N, *spatial, C]`, `taps = (base [*k, 1, C], level_0 [*k, 2**ndim, C], ...)` with the
scales folded in, and `bias [C]` or None. Modules whose functions JAX can differentiate say so
with `DIFFERENTIABLE = True`; they are then called bare in the backward pass, which makes `jvp`
of `grad` and `hessian` work. Modules that sum dy on the way, for the gradient of the bias, say so
with `BIAS_GRADIENT = True`; where it is wanted, `kernel_shapes` ends with the bias's, and the
gradients with its own. Both functions take the parameters that `search_space` offers.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common._compat import vary_over, varying_axes
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.vmap import vmap_folding, vmap_sequential
from pallas_kernels.dispatch.tuner import TuningParams

Taps = tuple[jax.Array, ...]
Shapes = tuple[tuple[int, ...], ...]


class Plan(NamedTuple):
    """The static choices of one call: the implementations' modules, and what they are told."""

    fwd: ModuleType
    bwd: ModuleType
    wavelet: str
    precision: jax.lax.Precision | None
    fwd_config: TuningParams = ()
    bwd_config: TuningParams = ()

    @property
    def of_backward(self) -> "Plan":
        """The plan of what the backward pass calls, where it calls the operator itself."""
        return self._replace(fwd=self.bwd, fwd_config=self.bwd_config)


@partial(jax.jit, static_argnums=(0, 1))
def wtconv(plan: Plan, stride: int, x: jax.Array, params: Mapping[str, jax.Array]) -> jax.Array:
    """Folds the scales into the kernels, where JAX differentiates it, convolves, and strides."""
    taps = [_folded(params["base_kernel"], params["base_scale"])]
    while f"wavelet_kernel_{len(taps) - 1}" in params:
        i = len(taps) - 1
        taps.append(_folded(params[f"wavelet_kernel_{i}"], params[f"wavelet_scale_{i}"]))
    bias = None
    if "base_bias" in params:
        bias = _folded(params["base_bias"], params["base_scale"])
    arrays = x, tuple(taps), bias
    arrays = vary_over(varying_axes(arrays), arrays)
    return _strided(_apply(plan, False, *arrays), stride)


def _folded(kernel: jax.Array, scale: jax.Array) -> jax.Array:
    dtype = accumulation_dtype(jnp.promote_types(kernel.dtype, scale.dtype))
    return kernel.astype(dtype) * scale.astype(dtype)


def _strided(y: jax.Array, stride: int) -> jax.Array:
    """The published layers' strides: the mean of a group in 1-D, subsampling otherwise."""
    if stride == 1:
        return y
    if y.ndim == 3:
        n, length, c = y.shape
        groups = y[:, : length // stride * stride].reshape(n, length // stride, stride, c)
        return groups.mean(axis=2, dtype=accumulation_dtype(y.dtype)).astype(y.dtype)
    return y[(slice(None), *(slice(None, None, stride),) * (y.ndim - 2))]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _apply(
    plan: Plan, transpose: bool, x: jax.Array, taps: Taps, bias: jax.Array | None
) -> jax.Array:
    """The operator or its transpose."""
    return _forward(plan, transpose, x, taps, bias)


def _apply_fwd(
    plan: Plan, transpose: bool, x: jax.Array, taps: Taps, bias: jax.Array | None
) -> tuple[jax.Array, tuple[jax.Array, Taps, jax.Array | None]]:
    # Reverse mode over reverse mode differentiates this line: a kernel has only the custom rule.
    bare = plan.fwd.DIFFERENTIABLE
    y = (_forward if bare else _apply)(plan, transpose, x, taps, bias)
    return y, (x, taps, _like(bias))


def _apply_bwd(
    plan: Plan,
    transpose: bool,
    residuals: tuple[jax.Array, Taps, jax.Array | None],
    dy: jax.Array,
) -> tuple[jax.Array, Taps, jax.Array | None]:
    x, taps, bias = residuals
    shapes = tuple(tap.shape for tap in taps)
    bare = plan.bwd.DIFFERENTIABLE
    apply, correlate = (_forward, _correlate) if bare else (_apply, _weight_grad)
    dx = apply(plan.of_backward, not transpose, dy, taps, None)
    pair = (dy, x) if transpose else (x, dy)
    # Only the operator itself has a bias, its transpose has none.
    summed = bias is not None and getattr(plan.bwd, "BIAS_GRADIENT", False)
    found = correlate(plan, (*shapes, dy.shape[-1:]) if summed else shapes, *pair)
    dtaps = tuple(d.astype(tap.dtype) for d, tap in zip(found[: len(taps)], taps, strict=True))
    if bias is None:
        return dx, dtaps, None
    axes = tuple(range(dy.ndim - 1))
    dbias = found[-1] if summed else dy.sum(axes, dtype=accumulation_dtype(dy.dtype))
    return dx, dtaps, dbias.astype(bias.dtype)


_apply.defvjp(_apply_fwd, _apply_bwd)


def one_pass(plan: Plan, direction: str) -> Callable[..., Any]:
    """The function of arrays that a plan computes in one direction, to be timed alone.

    Args:
        plan: Its implementations; of the backward pass `bwd` computes all.
        direction: "fwd", a function of x, taps and bias, or "bwd", of these and dy.

    Returns:
        The function, of the output, or of the gradients of x, taps and bias.
    """
    if direction == "fwd":
        return partial(_apply, plan, False)

    def backward(x: jax.Array, taps: Taps, bias: jax.Array | None, dy: jax.Array) -> Any:
        return _apply_bwd(plan, False, (x, taps, _like(bias)), dy)

    return backward


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _weight_grad(plan: Plan, shapes: Shapes, x: jax.Array, dy: jax.Array) -> Taps:
    """Gradient of the taps; bilinear in x and dy, so its own VJP is the operator twice.

    That of the bias, which may follow, is linear in dy, as if x had one more channel of ones.
    """
    return _correlate(plan, shapes, x, dy)


def _weight_grad_fwd(
    plan: Plan, shapes: Shapes, x: jax.Array, dy: jax.Array
) -> tuple[Taps, tuple[jax.Array, jax.Array]]:
    correlate = _correlate if plan.bwd.DIFFERENTIABLE else _weight_grad
    return correlate(plan, shapes, x, dy), (x, dy)


def _weight_grad_bwd(
    plan: Plan, shapes: Shapes, residuals: tuple[jax.Array, jax.Array], dtaps: Taps
) -> tuple[jax.Array, jax.Array]:
    x, dy = residuals
    plan = plan.of_backward
    dbias = None
    if len(shapes[-1]) == 1:
        *dtaps, dbias = dtaps
    dtaps = tuple(dtaps)
    return _apply(plan, True, dy, dtaps, None), _apply(plan, False, x, dtaps, dbias)


_weight_grad.defvjp(_weight_grad_fwd, _weight_grad_bwd)


def _forward(
    plan: Plan, transpose: bool, x: jax.Array, taps: Taps, bias: jax.Array | None
) -> jax.Array:
    run = partial(
        plan.fwd.forward,
        wavelet=plan.wavelet,
        transpose=transpose,
        precision=plan.precision,
        **dict(plan.fwd_config),
    )
    return run(x, taps, bias) if plan.fwd.DIFFERENTIABLE else vmap_folding(run)(x, taps, bias)


def _correlate(plan: Plan, shapes: Shapes, x: jax.Array, dy: jax.Array) -> Taps:
    run = partial(
        plan.bwd.weight_grad,
        kernel_shapes=shapes,
        wavelet=plan.wavelet,
        precision=plan.precision,
        **dict(plan.bwd_config),
    )
    return run(x, dy) if plan.bwd.DIFFERENTIABLE else vmap_sequential(run)(x, dy)


def _like(bias: jax.Array | None) -> jax.Array | None:
    """A bias of no elements: the backward pass needs to know its dtype and nothing else."""
    return None if bias is None else bias[:0]
