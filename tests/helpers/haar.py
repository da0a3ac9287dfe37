"""One implementation of the wavelet transforms on one case against the oracle."""

import math
from functools import partial, reduce

import chex
import jax
import jax.numpy as jnp
import numpy as np
from helpers.reference import quick_jit
from jax import lax

from pallas_kernels import haar, oracle
from pallas_kernels.haar.cases import Case, inputs
from pallas_kernels.haar.filters import filter_bank
from pallas_kernels.haar.problem import Problem

WAVEDEC = {1: haar.wavedec, 2: haar.wavedec2, 3: haar.wavedec3}
WAVEREC = {1: haar.waverec, 2: haar.waverec2, 3: haar.waverec3}
LOW = ("bfloat16", "float16")
# Band s is high along spatial axis a where bit a of s is set; PyWavelets' letters name the axes.
DETAILS3 = ("daa", "ada", "dda", "aad", "dad", "add", "ddd")


def takes(module, case):
    """Whether an implementation's module is made for a case; refusals have tests of their own."""
    shape = (math.prod(case.batch), *case.spatial, case.channels)
    problem = Problem(shape, jnp.dtype(case.dtype), case.ndim, case.level, case.wavelet)
    try:
        module.check("fwd", problem)
    except NotImplementedError:
        return False
    return case.level > 0


def layout(low, details, ndim):
    """The oracle's high bands (finest first, on one axis) as PyWavelets arranges them."""
    bands = [tuple(d[..., s, :] for s in range(2**ndim - 1)) for d in reversed(details)]
    if ndim == 1:
        bands = [band for (band,) in bands]
    if ndim == 3:
        bands = [dict(zip(DETAILS3, band, strict=True)) for band in bands]
    return [low, *bands]


def cascade(analysis, x, ndim, level):
    """A cascade of any one-level analysis `x -> [*batch, *half, 2**ndim, C]`."""
    low, details = x, []
    for _ in range(level):
        bands = analysis(low)
        low, details = bands[..., 0, :], [*details, bands[..., 1:, :]]
    return layout(low, details, ndim)


def oracle_wavedec(x, ndim, level, wavelet="haar"):
    dec, _ = filter_bank(wavelet)
    return cascade(partial(oracle.analysis, ndim=ndim, dec=dec), x, ndim, level)


def oracle_waverec(low, details, ndim, spatial, bank):
    if not details:
        return low
    lows = [np.zeros_like(d[..., 0, :]) for d in details[:-1]] + [low]
    full = [np.concatenate([a[..., None, :], d], -2) for a, d in zip(lows, details, strict=True)]
    return oracle.waverec(full, ndim, spatial, bank)


def plain_analysis(x, ndim, bank):
    """One level as one strided convolution in x's dtype, without further care."""
    spatial, reach = x.shape[-1 - ndim : -1], bank.shape[1] // 2 - 1
    taps = [
        reduce(np.multiply.outer, [bank[s >> a & 1] for a in range(ndim)]) for s in range(2**ndim)
    ]
    axes = "DHW"[:ndim]
    out = lax.conv_general_dilated(
        jnp.moveaxis(x, -1, 0).reshape(-1, *spatial, 1),
        jnp.asarray(np.stack(taps, -1)[..., None, :], x.dtype),
        window_strides=(2,) * ndim,
        padding=[(reach, reach + n % 2) for n in spatial],
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
    )
    out = out.reshape(x.shape[-1], *x.shape[: -1 - ndim], *out.shape[1:])
    return jnp.moveaxis(out, 0, -1)


def plain_wavedec(x, ndim, level, bank):
    return cascade(partial(plain_analysis, ndim=ndim, bank=bank), x, ndim, level)


def transforms(dec, rec, x, coeffs, jit=jax.jit):
    """Analysis, its transpose and synthesis as one program, so that a case compiles once."""

    def run(x, coeffs):
        y, pullback = jax.vjp(dec, x)
        return {"wavedec": y, "vjp": pullback(coeffs)[0], "waverec": rec(coeffs)}

    return jit(run)(x, coeffs)


def ours(case, x, coeffs, implementation):
    keys = {"wavelet": case.wavelet, "implementation": implementation}
    dec = partial(WAVEDEC[case.ndim], level=case.level, **keys)
    rec = partial(WAVEREC[case.ndim], shape=case.spatial, **keys)
    return transforms(dec, rec, x, coeffs)


def plain(case, x, coeffs):
    """The transforms of `plain_analysis`; synthesis is the transpose of analysis."""
    dec, rec = (
        partial(plain_wavedec, ndim=case.ndim, level=case.level, bank=bank)
        for bank in filter_bank(case.wavelet)
    )
    return transforms(dec, lambda c: jax.vjp(rec, x)[1](c)[0], x, coeffs, quick_jit)


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
    x, low, details = jax.tree.map(lambda a: a.astype(jnp.dtype(case.dtype)), inputs(case))
    return x, layout(low, details, case.ndim)


def expected(case):
    """The oracle's transforms of the numbers that the case's dtype can hold."""
    x, low, details = jax.tree.map(
        lambda a: np.asarray(a.astype(jnp.dtype(case.dtype)), np.float64), inputs(case)
    )
    dec, rec = filter_bank(case.wavelet)
    return {
        "wavedec": oracle_wavedec(x, case.ndim, case.level, case.wavelet),
        "vjp": oracle_waverec(low, details, case.ndim, case.spatial, dec),
        "waverec": oracle_waverec(low, details, case.ndim, case.spatial, rec),
    }


def assert_close(case, got, want):
    """Each transform is the oracle's, in structure, shape, dtype and value."""
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(case.dtype)}
    if case.dtype in LOW:
        rounding, bar = float(jnp.finfo(case.dtype).eps), plain(case, *arrays(case))
        bounds = {name: max(2 * error(bar[name], want[name]), rounding) for name in want}
    else:
        bounds = dict.fromkeys(want, {"float32": 1e-5, "float64": 1e-13}[case.dtype])
    found = {name: error(got[name], want[name]) for name in want}
    # NaN is not greater than its bound.
    assert {name: e for name, e in found.items() if not e <= bounds[name]} == {}


def assert_oracle(case, implementation=None):
    """Analysis, its transpose and synthesis of a case are the oracle's."""
    assert_close(case, ours(case, *arrays(case), implementation), expected(case))


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
    batch = jax.sharding.PartitionSpec("n")
    call = partial(WAVEDEC[2], level=4, implementation=implementation)
    local = jax.shard_map(
        call,
        mesh=jax.make_mesh((1,), ("n",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=batch,
        out_specs=batch,
        check_vma=check_vma,
    )

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
