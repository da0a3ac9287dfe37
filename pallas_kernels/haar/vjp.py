"""Derivatives of kernels that JAX cannot look into: Haar is orthonormal.

The transpose of the analysis, zero padding included, is the synthesis with its crops, and the
other way round; so each is the other's derivative, of every order. Plain JAX needs none of this.

An implementation is a module with `wavedec` and `waverec` as `_analyse` and `_synthesise` call
them; both take the parameters that its `search_space`, where there is one, offers.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, TypeVar, cast

import jax
import jax.numpy as jnp

from pallas_kernels.common.measurement import JaxMeasurement
from pallas_kernels.common.multilinear import multilinear
from pallas_kernels.common.types import Bands, Tree
from pallas_kernels.common.vmap import vmap_folding
from pallas_kernels.dispatch import Operator
from pallas_kernels.dispatch.backend import Implementation
from pallas_kernels.dispatch.tuner import TuningParams
from pallas_kernels.haar.problem import Problem

R = TypeVar("R")
Details = tuple[Bands, ...]
Coefficients = tuple[jax.Array, Details]


class Kernels(Protocol):
    """The functions of an implementation; `config` is what its `search_space` offers."""

    def wavedec(
        self, x: jax.Array, /, *, ndim: int, levels: int, wavelet: str, **config: object
    ) -> Coefficients:
        """The analysis."""

    def waverec(
        self,
        low: jax.Array,
        details: Details,
        /,
        *,
        shape: tuple[int, ...],
        wavelet: str,
        **config: object,
    ) -> jax.Array:
        """The synthesis."""


class Plan(NamedTuple):
    """The static choices of one call: the implementation's module and static arguments."""

    module: Implementation
    shape: tuple[int, ...]
    levels: int
    wavelet: str
    config: TuningParams = ()


def measurement(operator: Operator, problem: Problem) -> JaxMeasurement:
    """The measurement that runs and times an implementation on an array like that of a call.

    Analysis and synthesis are each other's transpose: the analysis is timed for both.

    Args:
        operator: The operator, in JAX.
        problem: The call.

    Returns:
        A measurement of the problem.
    """

    def run(module: Implementation, config: TuningParams) -> Callable[..., Tree]:
        plan = Plan(module, problem.shape[1:-1], problem.levels, problem.wavelet, config)
        return partial(wavedec, plan)

    x = jax.ShapeDtypeStruct(problem.shape, problem.dtype)
    return JaxMeasurement(run, (x,), operator.module("xla"), {})


@partial(jax.jit, static_argnums=0)
def wavedec(plan: Plan, x: jax.Array) -> Coefficients:
    """The cascade of `x [*batch, *shape, C]`: the low band, and the details from coarse to fine."""
    analyse = _analyse if plan.module.DIFFERENTIABLE else _opaque_analyse
    batch = _batch(plan, x)
    return _batched(batch, analyse(plan, _flat(batch, x)))


@partial(jax.jit, static_argnums=0)
def waverec(plan: Plan, low: jax.Array, details: Details) -> jax.Array:
    """The inverse cascade `[*batch, *shape, C]`, in the dtype that all bands can be had in."""
    synthesise = _synthesise if plan.module.DIFFERENTIABLE else _opaque_synthesise
    batch, dtype = _batch(plan, low), jnp.result_type(low, *jax.tree.leaves(details))
    bands = jax.tree.map(lambda band: band.astype(dtype), (low, details))
    return _batched(batch, synthesise(plan, *_flat(batch, bands)))


def _batch(plan: Plan, x: jax.Array) -> tuple[int, ...]:
    return x.shape[: -1 - len(plan.shape)]


def _flat(batch: tuple[int, ...], arrays: Tree) -> Tree:
    """Arrays with one axis for their batch, as implementations take them."""
    return jax.tree.map(lambda a: a.reshape(math.prod(batch), *a.shape[len(batch) :]), arrays)


def _batched(batch: tuple[int, ...], arrays: R) -> R:
    """The inverse of `_flat`."""
    return jax.tree.map(lambda a: a.reshape(*batch, *a.shape[1:]), arrays)


def _analyse(plan: Plan, x: jax.Array) -> Coefficients:
    return cast(Kernels, plan.module).wavedec(
        x,
        ndim=len(plan.shape),
        levels=plan.levels,
        wavelet=plan.wavelet,
        **dict(plan.config),
    )


def _synthesise(plan: Plan, low: jax.Array, details: Details) -> jax.Array:
    return cast(Kernels, plan.module).waverec(
        low, details, shape=plan.shape, wavelet=plan.wavelet, **dict(plan.config)
    )


def _opaque_analyse(plan: Plan, x: jax.Array) -> Coefficients:
    def transpose(bands: Coefficients) -> jax.Array:
        return _opaque_synthesise(plan, *bands)

    return multilinear(vmap_folding(partial(_analyse, plan)), (transpose,), x)


def _opaque_synthesise(plan: Plan, low: jax.Array, details: Details) -> jax.Array:
    # One argument: the synthesis is linear in all bands together.
    def run(bands: Coefficients) -> jax.Array:
        return vmap_folding(partial(_synthesise, plan), own=2)(*bands)

    return multilinear(run, (partial(_opaque_analyse, plan),), (low, details))
