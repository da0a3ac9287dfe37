"""The operator's custom VJP: any forward implementation pairs with any backward one.

The backward one is chosen in the backward rule, so that a call that nobody differentiates asks no
implementation for gradients, and times none.

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
of `grad` and `hessian` work. Of modules that say `BIAS_GRADIENT = True` the gradient of the bias is
asked too: `kernel_shapes` ends with the bias's, and the gradients with its own. Both functions take
the parameters that `search_space` offers.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp

from pallas_kernels.common._compat import vary_like
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.measurement import JaxMeasurement, moved_here
from pallas_kernels.common.types import Taps, Tree
from pallas_kernels.common.vmap import vmap_folding, vmap_sequential
from pallas_kernels.dispatch import Operator, Request
from pallas_kernels.dispatch.backend import Implementation
from pallas_kernels.dispatch.tuner import TuningParams
from pallas_kernels.wtconv.problem import Problem

Shapes = tuple[tuple[int, ...], ...]


class Kernels(Protocol):
    """The functions of an implementation, which the docstring of this module describes.

    Attributes:
        BIAS_GRADIENT: Whether `weight_grad` sums dy on its way, for the gradient of the bias.
    """

    BIAS_GRADIENT: bool

    def forward(
        self,
        x: jax.Array,
        taps: Taps,
        bias: jax.Array | None,
        /,
        *,
        wavelet: str,
        transpose: bool,
        precision: jax.lax.Precision | None,
        **config: object,
    ) -> jax.Array:
        """The operator or its transpose."""

    def weight_grad(
        self,
        x: jax.Array,
        dy: jax.Array,
        /,
        *,
        kernel_shapes: Shapes,
        wavelet: str,
        precision: jax.lax.Precision | None,
        **config: object,
    ) -> Taps:
        """The gradients of the taps."""


class Plan(NamedTuple):
    """The static choices of one call: what computes it, and what is asked of its backward pass.

    Attributes:
        module: The implementation that computes the operator.
        config: Its parameters.
        wavelet: PyWavelets' name of the wavelet.
        precision: The precision of products on matrix units.
        backward: The request by which the backward rule chooses an implementation; None in a
            plan that is timed, which nobody differentiates.
    """

    module: Implementation
    config: TuningParams
    wavelet: str
    precision: jax.lax.Precision | None
    backward: Request | None

    def for_backward(self, x: jax.Array, taps: Taps, bias: bool) -> "Plan":
        """The plan of the backward pass, whose implementation is chosen here, where it is called.

        Args:
            x: `[N, *spatial, C]`.
            taps: The folded kernels.
            bias: Whether the operator has a bias.

        Raises:
            NotImplementedError: No allowed implementation can run here; says why for each.
        """
        assert self.backward is not None
        backward = moved_here(self.backward)
        problem = Problem(x.shape, x.dtype, taps[0].shape[0], len(taps) - 1, self.wavelet)
        operator = backward.operator
        static = problem, bias, self.precision
        chosen = backward.choose(problem, measurement, operator, "bwd", *static)
        return self._replace(module=operator.module(chosen.implementation), config=chosen.config)


@partial(jax.jit, static_argnums=(0, 1))
def wtconv(plan: Plan, stride: int, x: jax.Array, params: Mapping[str, jax.Array]) -> jax.Array:
    """Folds the scales into the kernels, where JAX differentiates it, convolves, and strides.

    Args:
        plan: The plan of the call.
        stride: The stride of the output.
        x: `[*batch, *spatial, C]`.
        params: The parameters by name.

    Returns:
        `[*batch, *strided, C]`.
    """
    taps = [_folded(params["base_kernel"], params["base_scale"])]
    while f"wavelet_kernel_{len(taps) - 1}" in params:
        i = len(taps) - 1
        taps.append(_folded(params[f"wavelet_kernel_{i}"], params[f"wavelet_scale_{i}"]))
    bias = None
    if "base_bias" in params:
        bias = _folded(params["base_bias"], params["base_scale"])
    # Here, since an eager reshape takes the host longer than all checks of the arguments.
    batch = x.shape[: 1 - params["base_kernel"].ndim]
    arrays = x.reshape(math.prod(batch), *x.shape[len(batch) :]), tuple(taps), bias
    y = _strided(_apply(plan, False, *vary_like(arrays, arrays)), stride)
    return y.reshape(*batch, *y.shape[1:])


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
    bare = plan.module.DIFFERENTIABLE
    y = (_forward if bare else _apply)(plan, transpose, x, taps, bias)
    return y, (x, taps, _like(bias))


def _apply_bwd(
    plan: Plan,
    transpose: bool,
    residuals: tuple[jax.Array, Taps, jax.Array | None],
    dy: jax.Array,
) -> tuple[jax.Array, Taps, jax.Array | None]:
    x, taps, bias = residuals
    return _gradients(plan.for_backward(x, taps, bias is not None), transpose, residuals, dy)


def _gradients(
    plan: Plan,
    transpose: bool,
    residuals: tuple[jax.Array, Taps, jax.Array | None],
    dy: jax.Array,
) -> tuple[jax.Array, Taps, jax.Array | None]:
    """The gradients of x, taps and bias, all by the plan's implementation."""
    x, taps, bias = residuals
    shapes = tuple(tap.shape for tap in taps)
    bare = plan.module.DIFFERENTIABLE
    apply, correlate = (_forward, _correlate) if bare else (_apply, _weight_grad)
    dx = apply(plan, not transpose, dy, taps, None)
    pair = (dy, x) if transpose else (x, dy)
    # Only the operator itself has a bias, its transpose has none.
    summed = bias is not None and cast(Kernels, plan.module).BIAS_GRADIENT
    found = correlate(plan, (*shapes, dy.shape[-1:]) if summed else shapes, *pair)
    dtaps = tuple(d.astype(tap.dtype) for d, tap in zip(found[: len(taps)], taps, strict=True))
    if bias is None:
        return dx, dtaps, None
    axes = tuple(range(dy.ndim - 1))
    dbias = found[-1] if summed else dy.sum(axes, dtype=accumulation_dtype(dy.dtype))
    return dx, dtaps, dbias.astype(bias.dtype)


_apply.defvjp(_apply_fwd, _apply_bwd)


def measurement(
    operator: Operator,
    direction: str,
    problem: Problem,
    bias: bool,
    precision: jax.lax.Precision | None,
) -> JaxMeasurement:
    """The measurement that runs and times an implementation on arrays like those of a call.

    Args:
        operator: The operator, in JAX.
        direction: "fwd" or "bwd".
        problem: The call.
        bias: Whether it has a bias.
        precision: The precision of products on matrix units.

    Returns:
        A measurement of `problem.measured_as()`.
    """
    problem = problem.measured_as()
    *spatial, channels = problem.shape[1:]
    acc = accumulation_dtype(problem.dtype)
    bands = [1, *[2 ** len(spatial)] * problem.levels]
    kernel = (problem.kernel_size,) * len(spatial)
    x = jax.ShapeDtypeStruct(problem.shape, problem.dtype)
    taps = tuple(jax.ShapeDtypeStruct((*kernel, band, channels), acc) for band in bands)
    inputs = x, taps, jax.ShapeDtypeStruct((channels,), acc) if bias else None

    def run(module: Implementation, config: TuningParams) -> Callable[..., Tree]:
        plan = Plan(module, config, problem.wavelet, precision, backward=None)
        return timed_function(plan, direction)

    return JaxMeasurement(
        run,
        inputs if direction == "fwd" else (*inputs, x),
        operator.module("xla"),
        {"bias": bias, "precision": precision and precision.name},
    )


def timed_function(plan: Plan, direction: str) -> Callable[..., Tree]:
    """The function of arrays that a plan's implementation computes in one direction.

    Args:
        plan: The plan of the call.
        direction: "fwd", a function of x, taps and bias, or "bwd", of these and dy.

    Returns:
        The function, of the output, or of the gradients of x, taps and bias.
    """
    if direction == "fwd":
        return partial(_apply, plan, False)

    def backward(x: jax.Array, taps: Taps, bias: jax.Array | None, dy: jax.Array) -> Tree:
        return _gradients(plan, False, (x, taps, _like(bias)), dy)

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
    correlate = _correlate if plan.module.DIFFERENTIABLE else _weight_grad
    return correlate(plan, shapes, x, dy), (x, dy)


def _weight_grad_bwd(
    plan: Plan, shapes: Shapes, residuals: tuple[jax.Array, jax.Array], dtaps: Taps
) -> tuple[jax.Array, jax.Array]:
    x, dy = residuals
    dbias = None
    if len(shapes[-1]) == 1:
        dtaps, dbias = dtaps[:-1], dtaps[-1]
    dtaps = tuple(dtaps)
    return _apply(plan, True, dy, dtaps, None), _apply(plan, False, x, dtaps, dbias)


_weight_grad.defvjp(_weight_grad_fwd, _weight_grad_bwd)


def _forward(
    plan: Plan, transpose: bool, x: jax.Array, taps: Taps, bias: jax.Array | None
) -> jax.Array:
    run = partial(
        cast(Kernels, plan.module).forward,
        wavelet=plan.wavelet,
        transpose=transpose,
        precision=plan.precision,
        **dict(plan.config),
    )
    return run(x, taps, bias) if plan.module.DIFFERENTIABLE else vmap_folding(run)(x, taps, bias)


def _correlate(plan: Plan, shapes: Shapes, x: jax.Array, dy: jax.Array) -> Taps:
    run = partial(
        cast(Kernels, plan.module).weight_grad,
        kernel_shapes=shapes,
        wavelet=plan.wavelet,
        precision=plan.precision,
        **dict(plan.config),
    )
    return run(x, dy) if plan.module.DIFFERENTIABLE else vmap_sequential(run)(x, dy)


def _like(bias: jax.Array | None) -> jax.Array | None:
    """A bias of no elements: the backward pass needs to know its dtype and nothing else."""
    return None if bias is None else bias[:0]
