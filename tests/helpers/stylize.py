"""One implementation of the instance normalisation on one case against the oracle."""

import chex
import jax
import numpy as np
from helpers.sharded import over_the_batch

from pallas_kernels.common.conformance import bounds, expected, worst
from pallas_kernels.stylize import baseline_jax, conformance, instance_norm
from pallas_kernels.stylize.cases import Case


def plain_results(case):
    """The baseline's results of a case, and its gradients."""
    return jax.jit(conformance.baseline(case))(*case.drawn())


def assert_close(case, got):
    """Output and gradients are the oracle's, in shape and value; dtypes are the arguments'."""
    x, scale, bias, residual, _ = case.drawn()
    like = {"y": x, "dx": x, "dscale": scale, "dbias": bias, "dresidual": residual}
    want = expected(case)
    assert {name: value.dtype for name, value in got.items()} == {n: like[n].dtype for n in want}
    chex.assert_trees_all_equal_shapes(dict(got), dict(want))
    allowed = bounds(case, plain_results)
    found = {name: worst(value, want[name]) for name, value in got.items()}
    # NaN is not greater than its bound.
    assert {name: e for name, e in found.items() if not e <= allowed[name]} == {}


def assert_oracle(case, implementation=None):
    """Output and gradients of a case are the oracle's."""
    assert_close(case, jax.jit(conformance.computed(case, implementation))(*case.drawn()))


def assert_sharded(implementation, check_vma):
    """A `shard_map` over the batch, of one device, changes nothing; the images share parameters."""
    # As few channels as `mosaic_gpu` takes of so few pixels.
    case = Case(5, 6, 16, activation="relu", residual=True)
    x, scale, bias, residual, dy = case.drawn()

    def ours(x, residual, scale, bias):
        rest = {"activation": "relu", "implementation": implementation}
        return instance_norm(x, scale, bias, residual=residual, **rest)

    def plain(x, residual, scale, bias):
        return baseline_jax.instance_norm(x, scale, bias, residual, activation="relu")

    def run(function):
        pulled = jax.jit(lambda *arrays: jax.vjp(function, *arrays)[1](dy))
        return pulled(x, residual, scale, bias)

    local = over_the_batch(ours, (True, True, False, False), check_vma)
    for got, want in zip(run(local), run(plain), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
