"""One implementation of WTConv on one case against the oracle: what every test file calls."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
from helpers.sharded import over_the_batch

from pallas_kernels.common.conformance import bounds, expected, worst
from pallas_kernels.wtconv import baseline_jax, wtconv1d, wtconv2d, wtconv3d
from pallas_kernels.wtconv.cases import Case
from pallas_kernels.wtconv.conformance import problem

WTCONV = {1: wtconv1d, 2: wtconv2d, 3: wtconv3d}
WHOLE = Case((9, 10), 2, 3, batch=(2,))
"""The image of the tests of transformations."""


def takes(module, case):
    """Whether an implementation's module is made for a case; refusals have tests of their own."""
    try:
        module.check("fwd", problem(case))
    except NotImplementedError:
        return False
    return True


def arrays(case):
    """x, params and dy of a case in its dtype."""
    return jax.tree.map(jax.device_put, case.drawn())


def value_and_grads(function, case, jit=jax.jit):
    """Output and gradients of x and the parameters, compiled as one program."""

    def run(x, params, dy):
        y, pullback = jax.vjp(function, x, params)
        return y, pullback(dy)

    return jit(run)(*arrays(case))


def results(function, case, jit=jax.jit):
    """The same by the names of `conformance`."""
    y, (dx, dparams) = value_and_grads(function, case, jit)
    return {"y": y, "dx": dx, **dparams}


def plain_results(case):
    """Plain JAX's results of a case, every array in the case's dtype."""
    call = partial(baseline_jax.wtconv, ndim=case.ndim, stride=case.stride)
    return results(call, case)


def assert_oracle(case, implementation=None):
    """Output and every gradient of a case are the oracle's, in dtype, shape and value."""
    call = partial(
        WTCONV[case.ndim],
        wavelet=case.wavelet,
        stride=case.stride,
        implementation=implementation,
    )
    got, want = results(call, case), expected(case)
    assert {name: a.dtype for name, a in got.items()} == dict.fromkeys(want, jnp.dtype(case.dtype))
    chex.assert_trees_all_equal_shapes(got, want)
    allowed = bounds(case, plain_results)
    errors = {name: worst(got[name], want[name]) for name in want}
    # NaN is not greater than its bound.
    assert {n: e for n, e in errors.items() if not e <= allowed[n]} == {}


def misses_oracle(case, implementation):
    """Whether `assert_oracle` fails, by a kernel's own error too, as JAX tells it."""
    try:
        assert_oracle(case, implementation)
    except (AssertionError, RuntimeError, ValueError):
        return True
    return False


def assert_reproducible(implementation, case):
    """Output and gradients are bitwise equal from run to run."""
    call = partial(WTCONV[case.ndim], implementation=implementation)
    first, again = (jax.tree.leaves(value_and_grads(call, case)) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def assert_sharded(implementation, check_vma):
    """A `shard_map` over the batch, of one device, changes nothing."""
    case = WHOLE
    call = partial(wtconv2d, implementation=implementation)
    local = over_the_batch(call, (True, False), check_vma)
    got, want = (value_and_grads(call, case) for call in (local, wtconv2d))
    chex.assert_trees_all_close(got, want, rtol=1e-7, atol=1e-4)


def assert_transformed(implementation, case=WHOLE):
    """Second derivatives, `vmap`, `remat` and `jit` of them are those of plain JAX."""
    x, params, _ = arrays(case)
    function = WTCONV[case.ndim]

    def second(implementation):
        def curved(x, params):
            y = jax.remat(partial(function, implementation=implementation))(x, params)
            return jnp.sin(y).sum()

        squared = lambda x, params: (jax.grad(curved)(x, params) ** 2).sum()  # noqa: E731
        both = jax.vmap(jax.grad(squared), (0, None))(x, params)
        return both, jax.jit(jax.vmap(jax.grad(curved, 1), (0, None)))(x, params)

    for got, want in zip(*map(jax.tree.leaves, map(second, (implementation, "xla"))), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
