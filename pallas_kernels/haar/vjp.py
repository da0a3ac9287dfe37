"""Derivatives of kernels that JAX cannot look into: Haar is orthonormal.

The transpose of the analysis, zero padding included, is the synthesis with its crops, and the
other way round; so each is the other's derivative, of every order. Plain JAX needs none of this.

An implementation is a module with `wavedec` and `waverec` as `_analyse` and `_synthesise` call
them; both take the parameters that its `search_space`, where there is one, offers.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple, Protocol, TypeVar, cast

import jax
import jax.numpy as jnp

from pallas_kernels.common import sharding
from pallas_kernels.common.measurement import JaxMeasurement
from pallas_kernels.common.multilinear import multilinear
from pallas_kernels.common.types import Bands, Tree
from pallas_kernels.common.vmap import vmap_folding
from pallas_kernels.dispatch import Operator, Request
from pallas_kernels.dispatch.backend import Implementation
from pallas_kernels.dispatch.tuner import TuningParams
from pallas_kernels.haar.filters import IS_HAAR
from pallas_kernels.haar.problem import Problem

_SPATIAL = "dhw"
"""The rule's names of spatial axes."""
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
    """The static choices of one call: the implementation's module and static arguments.

    Attributes:
        module: The implementation.
        shape: The sizes of the signal.
        levels: The levels of the cascade.
        wavelet: PyWavelets' name of the wavelet.
        config: The implementation's parameters.
        request: The request by which `module` was chosen, None in a plan that is timed.
        stated: How the caller has stated that arrays are split over a mesh.
    """

    module: Implementation
    shape: tuple[int, ...]
    levels: int
    wavelet: str
    config: TuningParams = ()
    request: Request | None = None
    stated: sharding.Stated | None = None

    def by(self, module: Implementation) -> "Plan":
        """The plan with another implementation, which takes its own parameters."""
        return self._replace(module=module, config=())

    def problem(self, shard: sharding.Shard, x: jax.Array) -> Problem:
        """The description of a shard's cascade of signals, or of coefficients, of x's batch."""
        shape = x.shape[0], *self.local(shard), x.shape[-1]
        return Problem(shape, x.dtype, len(self.shape), self.levels, self.wavelet)

    def local(self, shard: sharding.Shard) -> tuple[int, ...]:
        """The sizes of a shard of the signal."""
        return shard.local(self.shape, " ".join(_SPATIAL[-len(self.shape) :]))

    def rule(self) -> sharding.Rule:
        """The axes of the signal and its coefficients."""
        return rule(self.shape, self.levels, self.wavelet)


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
    return jax.tree.map(lambda a: sharding.flat(a, len(batch)), arrays)


def _batched(batch: tuple[int, ...], arrays: R) -> R:
    """The inverse of `_flat`."""
    return jax.tree.map(lambda a: sharding.unflat(a, batch), arrays)


def _analyse(plan: Plan, x: jax.Array) -> Coefficients:
    def shard(plan: Plan, _: sharding.Shard, x: jax.Array) -> Coefficients:
        return cast(Kernels, plan.module).wavedec(
            x,
            ndim=len(plan.shape),
            levels=plan.levels,
            wavelet=plan.wavelet,
            **dict(plan.config),
        )

    return sharding.split(shard, plan.rule(), plan, plan.problem, x, mapped=vmap_folding)


def _synthesise(plan: Plan, low: jax.Array, details: Details) -> jax.Array:
    def shard(plan: Plan, place: sharding.Shard, low: jax.Array, details: Details) -> jax.Array:
        return cast(Kernels, plan.module).waverec(
            low, details, shape=plan.local(place), wavelet=plan.wavelet, **dict(plan.config)
        )

    (signal,), bands, free, cells = plan.rule()
    return sharding.split(
        shard,
        sharding.Rule(bands, (signal,), free, cells),
        plan,
        lambda place, low, _: plan.problem(place, low),
        low,
        details,
        mapped=partial(vmap_folding, own=2),
    )


def _opaque_analyse(plan: Plan, x: jax.Array) -> Coefficients:
    def transpose(bands: Coefficients) -> jax.Array:
        return _opaque_synthesise(plan, *bands)

    return multilinear(partial(_analyse, plan), (transpose,), x)


def _opaque_synthesise(plan: Plan, low: jax.Array, details: Details) -> jax.Array:
    # One argument: the synthesis is linear in all bands together.
    def run(bands: Coefficients) -> jax.Array:
        return _synthesise(plan, *bands)

    return multilinear(run, (partial(_opaque_analyse, plan),), (low, details))


@cache
def rule(size: tuple[int, ...], levels: int, wavelet: str) -> sharding.Rule:
    """The axes of a signal, and of its coefficients: images and channels do not mix.

    Shards of an image have all of their coefficients where they hold whole cells of the deepest
    level; other filters than Haar's reach further.

    Args:
        size: The sizes of the signal.
        levels: The levels of the cascade.
        wavelet: PyWavelets' name of the wavelet.

    Example:
        >>> rule((8,), 2, "haar").results
        ('n w c', 'n w c', 'n w c')
    """
    spatial, cell = _SPATIAL[-len(size) :], 2**levels
    signal = f"n {' '.join(spatial)} c"
    bands = 1 + levels * (2 ** len(size) - 1)
    whole = [isinstance(n, int) and n % cell == 0 and wavelet in IS_HAAR for n in size]
    cells = tuple(
        (name, n // cell) for name, n, even in zip(spatial, size, whole, strict=True) if even
    )
    return sharding.Rule((signal,), (signal,) * bands, frozenset("nc"), cells)
