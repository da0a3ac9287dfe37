"""The operator's custom VJP: any forward implementation pairs with any backward one.

The convolution is linear in x and linear in w, so it has two transposes, and the derivatives of
all three are the other two, of every order. Saved are x and w, and for the activation its output
(ReLU) or its input (GELU), in the output's dtype.

An implementation is a module with

    forward(x, w, bias, *, window, activation, out_dtype, precision, config) -> y
    input_grad(dy, w, *, shape, dtype, window, precision, config) -> dx [N, *shape]
    weight_grad(x, dy, *, shape, dtype, window, precision, config) -> dw [*shape]

for `x [N, H, W, C]`, `w [HF, WF, C / groups, NF]` of one dtype and `bias [NF]` or None, or the
layout "nchw_fchw" of `problem.Window`. Modules whose functions JAX can differentiate say so with
`DIFFERENTIABLE = True`; where sums are of x's dtype they are called bare in the backward pass, and
altogether if they compute both directions, so that `jvp` and `hessian` work.
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common._compat import vary_over, varying_axes
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.vmap import vmap_folding, vmap_sequential
from pallas_kernels.conv2d.problem import TileConfig, Window
from pallas_kernels.conv2d.xla import activate

Residuals = tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]


class Plan(NamedTuple):
    """The static choices of one call: the implementations' modules, and what they are told."""

    fwd: ModuleType
    bwd: ModuleType
    window: Window
    precision: jax.lax.Precision | None
    fwd_config: TileConfig | None
    bwd_config: TileConfig | None

    @property
    def backward(self) -> "Plan":
        """What the backward pass computes forward with."""
        return self._replace(fwd=self.bwd, fwd_config=self.bwd_config)

    def told(self, config: TileConfig | None) -> dict[str, object]:
        """What every function of an implementation is told."""
        return {"window": self.window, "precision": self.precision, "config": config}


@partial(jax.jit, static_argnums=(0, 1, 2))
def conv2d(
    plan: Plan,
    activation: str | None,
    out_dtype: jnp.dtype,
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
) -> jax.Array:
    """The convolution with its epilogue."""
    arrays = x, w, bias
    # Of its own operations JAX knows every derivative, forward mode too.
    apply = _forward if plan.fwd is plan.bwd and _bare(plan.fwd, x) else _apply
    return apply(plan, activation, out_dtype, *vary_over(varying_axes(arrays), arrays))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _apply(
    plan: Plan,
    activation: str | None,
    out_dtype: jnp.dtype,
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
) -> jax.Array:
    return _forward(plan, activation, out_dtype, x, w, bias)


def _apply_fwd(
    plan: Plan,
    activation: str | None,
    out_dtype: jnp.dtype,
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
) -> tuple[jax.Array, Residuals]:
    # Reverse mode over reverse mode differentiates this: a kernel has only the custom rule.
    apply = _forward if _bare(plan.fwd, x) else _apply
    kept = None
    if activation == "gelu":
        kept = apply(plan, None, out_dtype, x, w, bias)
        y = activate(kept.astype(accumulation_dtype(out_dtype)), activation).astype(out_dtype)
    else:
        y = apply(plan, activation, out_dtype, x, w, bias)
        if activation is not None:
            kept = y
    # Of the bias the backward pass needs to know its dtype and nothing else.
    return y, (x, w, None if bias is None else bias[:0], kept)


def _apply_bwd(
    plan: Plan,
    activation: str | None,
    out_dtype: jnp.dtype,
    residuals: Residuals,
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    x, w, bias, kept = residuals
    if activation == "relu":
        dy = jnp.where(kept > 0, dy, 0)
    elif activation == "gelu":
        acc = accumulation_dtype(out_dtype)
        _, pullback = jax.vjp(partial(activate, activation=activation), kept.astype(acc))
        dy = pullback(dy.astype(acc))[0].astype(out_dtype)
    bare = _bare(plan.bwd, x)
    input_grad, weight_grad = (_dx, _dw) if bare else (_input_grad, _weight_grad)
    dx = input_grad(plan, x.shape[1:], x.dtype, dy, w)
    dw = weight_grad(plan, w.shape, w.dtype, x, dy)
    if bias is None:
        return dx, dw, None
    *pixels, _ = plan.window.images(range(4))
    dbias = dy.sum(tuple(pixels), dtype=accumulation_dtype(dy.dtype))
    return dx, dw, dbias.astype(bias.dtype)


_apply.defvjp(_apply_fwd, _apply_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _input_grad(
    plan: Plan, shape: tuple[int, ...], dtype: jnp.dtype, dy: jax.Array, w: jax.Array
) -> jax.Array:
    return _dx(plan, shape, dtype, dy, w)


def _input_grad_fwd(
    plan: Plan, shape: tuple[int, ...], dtype: jnp.dtype, dy: jax.Array, w: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _input_grad(plan, shape, dtype, dy, w), (dy, w)


def _input_grad_bwd(
    plan: Plan,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    residuals: tuple[jax.Array, jax.Array],
    x: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    dy, w = residuals
    ddy = _apply(plan.backward, None, dy.dtype, x, w, None)
    return ddy, _weight_grad(plan, w.shape, w.dtype, x, dy)


_input_grad.defvjp(_input_grad_fwd, _input_grad_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _weight_grad(
    plan: Plan, shape: tuple[int, ...], dtype: jnp.dtype, x: jax.Array, dy: jax.Array
) -> jax.Array:
    return _dw(plan, shape, dtype, x, dy)


def _weight_grad_fwd(
    plan: Plan, shape: tuple[int, ...], dtype: jnp.dtype, x: jax.Array, dy: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _weight_grad(plan, shape, dtype, x, dy), (x, dy)


def _weight_grad_bwd(
    plan: Plan,
    shape: tuple[int, ...],
    dtype: jnp.dtype,
    residuals: tuple[jax.Array, jax.Array],
    w: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, dy = residuals
    ddy = _apply(plan.backward, None, dy.dtype, x, w, None)
    return _input_grad(plan, x.shape[1:], x.dtype, dy, w), ddy


_weight_grad.defvjp(_weight_grad_fwd, _weight_grad_bwd)


def one_pass(
    plan: Plan, direction: str, activation: str | None, out_dtype: jnp.dtype
) -> Callable[..., Any]:
    """One direction alone, which is what the tuner times.

    Args:
        plan: Of the call.
        direction: "fwd", a function of x, w and the bias, or "bwd", of x, w and dy.
        activation: Of the forward pass.
        out_dtype: Likewise.

    Returns:
        The function: the output, or the gradients of x and w.
    """
    if direction == "fwd":
        return partial(_forward, plan, activation, out_dtype)

    def backward(x: jax.Array, w: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        dx = _dx(plan, x.shape[1:], x.dtype, dy, w)
        return dx, _dw(plan, w.shape, w.dtype, x, dy)

    return backward


def _forward(
    plan: Plan,
    activation: str | None,
    out_dtype: jnp.dtype,
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
) -> jax.Array:
    run = partial(
        plan.fwd.forward, activation=activation, out_dtype=out_dtype, **plan.told(plan.fwd_config)
    )
    return run(x, w, bias) if plan.fwd.DIFFERENTIABLE else vmap_folding(run)(x, w, bias)


def _dx(
    plan: Plan, shape: tuple[int, ...], dtype: jnp.dtype, dy: jax.Array, w: jax.Array
) -> jax.Array:
    run = partial(plan.bwd.input_grad, shape=shape, dtype=dtype, **plan.told(plan.bwd_config))
    return run(dy, w) if plan.bwd.DIFFERENTIABLE else vmap_folding(run)(dy, w)


def _dw(
    plan: Plan, shape: tuple[int, ...], dtype: jnp.dtype, x: jax.Array, dy: jax.Array
) -> jax.Array:
    run = partial(plan.bwd.weight_grad, shape=shape, dtype=dtype, **plan.told(plan.bwd_config))
    return run(x, dy) if plan.bwd.DIFFERENTIABLE else vmap_sequential(run)(x, dy)


def _bare(module: ModuleType, x: jax.Array) -> bool:
    """Whether JAX itself differentiates: sums of a wider dtype than x's it cannot transpose."""
    return module.DIFFERENTIABLE and x.dtype == accumulation_dtype(x.dtype)
