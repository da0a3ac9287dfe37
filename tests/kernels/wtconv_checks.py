"""One implementation of WTConv on one case against the oracle: what every test file calls."""

from functools import partial

import jax
import jax.numpy as jnp

from flash_wtconv_jax.bench import plain
from pallas_kernels.wtconv import wtconv1d, wtconv2d, wtconv3d
from pallas_kernels.wtconv.checking import bounds, drawn, expected, worst

WTCONV = {1: wtconv1d, 2: wtconv2d, 3: wtconv3d}


def arrays(case):
    """x, params and dy of a case in its dtype."""
    return jax.tree.map(jnp.asarray, drawn(case))


def value_and_grads(function, case):
    """Output and gradients of x and the parameters, compiled as one program."""

    @jax.jit
    def run(x, params, dy):
        y, pullback = jax.vjp(function, x, params)
        return y, pullback(dy)

    return run(*arrays(case))


def results(function, case):
    """The same by the names of `checking`."""
    y, (dx, dparams) = value_and_grads(function, case)
    return {"y": y, "dx": dx, **dparams}


def plain_results(case):
    """What plain JAX makes of a case, every array in the case's dtype."""
    return results(partial(plain.wtconv, ndim=case.ndim, stride=case.stride), case)


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
    assert {name: a.shape for name, a in got.items()} == {n: a.shape for n, a in want.items()}
    allowed = bounds(case, plain_results)
    errors = {name: worst(got[name], want[name]) for name in want}
    # NaN is not greater than its bound.
    assert {n: e for n, e in errors.items() if not e <= allowed[n]} == {}
