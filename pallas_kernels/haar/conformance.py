"""JAX computes the cases of the wavelet transforms; see `common.conformance.Room`."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.common.types import Tree
from pallas_kernels.haar import api, baseline_jax
from pallas_kernels.haar.cases import CASES, Case
from pallas_kernels.haar.filters import filter_bank
from pallas_kernels.haar.problem import Problem

__all__ = ["CASES", "baseline", "computed", "problem", "to_pywavelets"]

Transform = Callable[..., Tree]

_WAVEDEC: dict[int, Transform] = {1: api.wavedec, 2: api.wavedec2, 3: api.wavedec3}
_WAVEREC: dict[int, Transform] = {1: api.waverec, 2: api.waverec2, 3: api.waverec3}
# Band s is high along spatial axis a where bit a of s is set; PyWavelets' letters name the axes.
_BANDS3 = ("daa", "ada", "dda", "aad", "dad", "add", "ddd")


def problem(case: Case) -> Problem:
    """Returns the problem of a case, which an implementation's `check` takes.

    Example:
        >>> problem(Case((7, 9), 1, batch=(2, 3))).shape
        (6, 7, 9, 3)
    """
    shape = (math.prod(case.batch), *case.spatial, case.channels)
    return Problem(shape, jnp.dtype(case.dtype), case.ndim, case.level, case.wavelet)


def computed(case: Case, implementation: str) -> Callable[..., dict[str, Tree]]:
    """Returns the function of a case's arrays that one implementation computes.

    Example:
        >>> case = Case((4,), 1)
        >>> sorted(computed(case, "xla")(*case.drawn()))
        ['dwavedec', 'dwaverec', 'wavedec', 'waverec']
    """
    wavedec: Transform = partial(
        _WAVEDEC[case.ndim],
        wavelet=case.wavelet,
        level=case.level,
        implementation=implementation,
    )
    waverec: Transform = partial(
        _WAVEREC[case.ndim],
        wavelet=case.wavelet,
        shape=case.spatial,
        implementation=implementation,
    )

    def analyse(x: jax.Array) -> list[jax.Array]:
        return _from_pywavelets(wavedec(x))

    def synthesise(coefficients: list[jax.Array]) -> jax.Array:
        named = to_pywavelets(coefficients, case.ndim)
        return waverec(named)

    return partial(_with_gradients, analyse, synthesise)


def baseline(case: Case) -> Callable[..., dict[str, Tree]]:
    """Returns the same in plain JAX, every array in the case's dtype."""
    dec, rec = filter_bank(case.wavelet)
    analyse = partial(baseline_jax.wavedec, ndim=case.ndim, level=case.level, bank=dec)
    synthesise = partial(baseline_jax.waverec, shape=case.spatial, bank=rec)
    return partial(_with_gradients, analyse, synthesise)


def _with_gradients(
    analyse: Transform, synthesise: Transform, x: jax.Array, coefficients: list[jax.Array]
) -> dict[str, Tree]:
    """The transforms and their transposes; each array is the gradient where it is no argument."""
    analysed, analysed_vjp = jax.vjp(analyse, x)
    synthesised, synthesised_vjp = jax.vjp(synthesise, coefficients)
    (dwavedec,), (dwaverec,) = analysed_vjp(coefficients), synthesised_vjp(x)
    return {
        "wavedec": analysed,
        "dwavedec": dwavedec,
        "waverec": synthesised,
        "dwaverec": dwaverec,
    }


def to_pywavelets(coefficients: list[Tree], ndim: int) -> list[Tree]:
    """Returns the coefficients of a case as PyWavelets arranges them: coarse first, a name a band.

    Args:
        coefficients: The low band, then the high bands of each level, finest first.
        ndim: Number of spatial axes.

    Example:
        >>> low, (horizontal, vertical, diagonal) = to_pywavelets(Case((7, 9), 1).drawn()[1], 2)
        >>> low.shape, diagonal.shape
        ((2, 4, 5, 3), (2, 4, 5, 3))
    """
    low, *details = coefficients
    levels: list[Tree] = [
        [high[..., s, :] for s in range(2**ndim - 1)] for high in reversed(details)
    ]
    if ndim == 1:
        return [low, *(band for (band,) in levels)]
    if ndim == 2:
        return [low, *map(tuple, levels)]
    return [low, *(dict(zip(_BANDS3, bands, strict=True)) for bands in levels)]


def _from_pywavelets(coefficients: list[Tree]) -> list[jax.Array]:
    """The inverse of `to_pywavelets`."""
    low, *levels = coefficients
    details = []
    for level in reversed(levels):
        if isinstance(level, dict):
            level = tuple(level[name] for name in _BANDS3)
        bands = level if isinstance(level, tuple) else (level,)
        details.append(jnp.stack(bands, axis=-2))
    return [low, *details]
