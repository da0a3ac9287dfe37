"""One implementation of WTConv on one case against the oracle: what every test file calls."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from flash_wtconv_jax.bench import plain
from pallas_kernels import oracle
from pallas_kernels.haar.filters import filter_bank
from pallas_kernels.wtconv import wtconv1d, wtconv2d, wtconv3d
from pallas_kernels.wtconv.cases import inputs

WTCONV = {1: wtconv1d, 2: wtconv2d, 3: wtconv3d}
LOW = ("bfloat16", "float16")


def arrays(case):
    """x, params and dy of a case in its dtype."""
    return jax.tree.map(lambda a: jnp.asarray(a, case.dtype), inputs(case))


def expected(case):
    """The oracle's output and gradients for the numbers that the case's dtype can hold."""
    x, params, dy = jax.tree.map(lambda a: np.asarray(a, np.float64), arrays(case))
    dec, rec = filter_bank(case.wavelet)
    keys = {"stride": case.stride, "dec": dec, "rec": rec}
    y = oracle.wtconv(x, params, case.ndim, **keys)
    return y, oracle.wtconv_vjp(x, params, dy, case.ndim, **keys)


def value_and_grads(function, case):
    """Output and gradients of x and the parameters, compiled as one program."""

    @jax.jit
    def run(x, params, dy):
        y, pullback = jax.vjp(function, x, params)
        return y, pullback(dy)

    return run(*arrays(case))


def worst(got, want):
    """Greatest error as a fraction of the output's root mean square."""
    got, want = np.asarray(got, np.float64), np.asarray(want)
    if want.size == 0:
        return 0.0
    return np.abs(got - want).max() / max(np.sqrt(np.mean(want**2)), 1e-30)


def tolerance(case, name, of_case):
    """Rounding of the dtype; a weight gradient is a sum over n terms."""
    if case.dtype == "float64":
        return 1e-12
    terms = of_case[0].size / case.channels if name.startswith(("base", "wavelet")) else 1
    return 1e-5 * max(1.0, terms**0.5 / 300)


def low_precision_bounds(case, want):
    """Twice the error of plain JAX, which is only told to compute in the low precision."""
    call = partial(plain.wtconv, ndim=case.ndim, stride=case.stride)
    y, (dx, dparams) = value_and_grads(call, case)
    got = {"y": y, "dx": dx, **dparams}
    rounding = float(jnp.finfo(case.dtype).eps)
    return {name: max(2 * worst(got[name], want[name]), rounding) for name in want}


def assert_oracle(case, implementation=None):
    """Output and every gradient of a case are the oracle's, in dtype, shape and value."""
    call = partial(
        WTCONV[case.ndim],
        wavelet=case.wavelet,
        stride=case.stride,
        implementation=implementation,
    )
    y, (dx, dparams) = value_and_grads(call, case)
    want_y, (want_dx, want_dparams) = expected(case)
    got = {"y": y, "dx": dx, **dparams}
    want = {"y": want_y, "dx": want_dx, **want_dparams}
    assert {name: a.dtype for name, a in got.items()} == dict.fromkeys(want, jnp.dtype(case.dtype))
    assert {name: a.shape for name, a in got.items()} == {n: a.shape for n, a in want.items()}
    if case.dtype in LOW:
        bounds = low_precision_bounds(case, want)
    else:
        bounds = {name: tolerance(case, name, inputs(case)) for name in want}
    errors = {name: worst(got[name], want[name]) for name in want}
    # NaN is not greater than its bound.
    assert {n: e for n, e in errors.items() if not e <= bounds[n]} == {}
