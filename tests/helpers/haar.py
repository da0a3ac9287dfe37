"""One implementation of the wavelet transforms on one case against the oracle."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sharded import over_the_batch

from pallas_kernels import haar, oracle
from pallas_kernels.common import conformance
from pallas_kernels.common.conformance import LOW
from pallas_kernels.haar import baseline_jax
from pallas_kernels.haar.cases import Case
from pallas_kernels.haar.conformance import problem, to_pywavelets
from pallas_kernels.haar.filters import filter_bank

WAVEDEC = {1: haar.wavedec, 2: haar.wavedec2, 3: haar.wavedec3}
WAVEREC = {1: haar.waverec, 2: haar.waverec2, 3: haar.waverec3}


def takes(module, case):
    """Whether an implementation's module is made for a case; refusals have tests of their own."""
    try:
        module.check("fwd", problem(case))
    except NotImplementedError:
        return False
    return case.level > 0


def oracle_wavedec(x, ndim, level, wavelet="haar"):
    """The oracle's coefficients as PyWavelets arranges them."""
    dec, _ = filter_bank(wavelet)
    levels = oracle.wavedec(x, ndim, level, dec)
    low = levels[-1][..., 0, :] if levels else x
    return to_pywavelets([low, *(bands[..., 1:, :] for bands in levels)], ndim)


def transforms(dec, rec, x, coeffs):
    """Analysis, its transpose and synthesis as one program, so that a case compiles once."""

    def run(x, coeffs):
        y, pullback = jax.vjp(dec, x)
        return {"wavedec": y, "vjp": pullback(coeffs)[0], "waverec": rec(coeffs)}

    return jax.jit(run)(x, coeffs)


def ours(case, x, coeffs, implementation):
    keys = {"wavelet": case.wavelet, "implementation": implementation}
    dec = partial(WAVEDEC[case.ndim], level=case.level, **keys)
    rec = partial(WAVEREC[case.ndim], shape=case.spatial, **keys)
    return transforms(dec, rec, x, coeffs)


def plain(case, x, coeffs):
    """The transforms of the baseline."""
    dec, rec = filter_bank(case.wavelet)
    analyse, adjoint = (
        lambda x, bank=bank: to_pywavelets(
            baseline_jax.wavedec(x, ndim=case.ndim, level=case.level, bank=bank), case.ndim
        )
        for bank in (dec, rec)
    )
    return transforms(analyse, lambda c: jax.vjp(adjoint, x)[1](c)[0], x, coeffs)


def error(got, want):
    """Greatest error of a tree of arrays as a fraction of its root mean square."""
    chex.assert_trees_all_equal_shapes(got, want)
    got, want = (
        np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])
        for tree in (got, want)
    )
    if want.size == 0:
        return 0.0
    return np.abs(got - want).max() / np.sqrt(np.mean(want**2))


def arrays(case):
    """The signal of a case in its dtype, and coefficients as PyWavelets arranges them."""
    x, coefficients = case.drawn()
    return x, to_pywavelets(coefficients, case.ndim)


def expected(case):
    """The oracle's transforms of the numbers that the case's dtype can hold."""
    want = conformance.expected(case)
    return {
        "wavedec": to_pywavelets(want["wavedec"], case.ndim),
        "vjp": want["dwavedec"],
        "waverec": want["waverec"],
    }


def assert_close(case, got, want):
    """Each transform is the oracle's, in structure, shape, dtype and value."""
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(case.dtype)}
    if case.dtype in LOW:
        rounding, bar = float(jnp.finfo(case.dtype).eps), plain(case, *arrays(case))
        bounds = {name: max(2 * error(bar[name], want[name]), rounding) for name in want}
    else:
        bounds = {name: case.tolerance(name) for name in want}
    found = {name: error(got[name], want[name]) for name in want}
    # NaN is not greater than its bound.
    assert {name: e for name, e in found.items() if not e <= bounds[name]} == {}


def assert_oracle(case, implementation=None):
    """Analysis, its transpose and synthesis of a case are the oracle's."""
    assert_close(case, ours(case, *arrays(case), implementation), expected(case))


LARGE = [
    (2, 4096, 4096, 3),
    # More than 2**31 elements, for which tests beside it leave a GPU too little memory.
    pytest.param((1, 4096, 4096, 144), marks=pytest.mark.slow),
]


def assert_large(implementation, shape):
    """Five levels of an image in bfloat16, and back, are those of plain JAX."""
    x = jax.random.normal(jax.random.key(0), shape, "bfloat16")

    @jax.jit
    def furthest(x):
        got, want = (
            haar.wavedec2(x, level=5, implementation=name) for name in (implementation, "xla")
        )
        back = haar.waverec2(got, shape=shape[1:3], implementation=implementation)
        far = lambda a, b: jnp.abs(a.astype("float32") - b.astype("float32")).max()  # noqa: E731
        return jax.tree.leaves(jax.tree.map(far, (got, back), (want, x)))

    assert max(map(float, furthest(x))) <= 0.1


def assert_sharded(implementation, check_vma):
    """A `shard_map` over the batch, of one device, changes nothing."""
    case = Case((9, 10), 4, batch=(2,))
    call = partial(WAVEDEC[2], level=4, implementation=implementation)
    local = over_the_batch(call, (True,), check_vma)

    def both(function, x, coeffs):
        y, pullback = jax.vjp(function, x)
        return y, pullback(coeffs)

    got, want = (jax.jit(partial(both, function))(*arrays(case)) for function in (local, call))
    chex.assert_trees_all_equal(got, want)


def assert_transformed(implementation):
    """Derivatives of gradients, `vmap`, `remat` and `jit` of them are those of plain JAX."""
    x, _ = arrays(Case((9, 10), 4, batch=(2,)))

    def curved(x, implementation):
        coeffs = haar.wavedec2(x, level=4, implementation=implementation)
        bent = jax.tree.map(jnp.sin, coeffs)
        return haar.waverec2(bent, shape=(9, 10), implementation=implementation).sum()

    def second(implementation):
        slope = jax.remat(jax.grad(partial(curved, implementation=implementation)))
        return jax.jit(jax.vmap(jax.grad(lambda x: (slope(x) ** 2).sum())))(x)

    want = second("xla")
    np.testing.assert_allclose(second(implementation), want, atol=1e-5 * np.abs(want).max())
