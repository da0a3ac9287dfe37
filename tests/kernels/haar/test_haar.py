"""The wavelet transforms against the oracle and PyWavelets, and JAX's transformations of them."""

from functools import partial
from itertools import combinations, product
from typing import get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pywt
from helpers.haar import WAVEDEC, WAVEREC, assert_oracle, error, oracle_wavedec
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pallas_kernels import haar
from pallas_kernels.common.conformance import LOW
from pallas_kernels.dispatch import Operator
from pallas_kernels.haar import Implementation, modes, xla
from pallas_kernels.haar import api as haar_api
from pallas_kernels.haar.cases import HARD, PAIRWISE

DWT = {1: haar.dwt, 2: haar.dwt2, 3: haar.dwt3}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


# Every third row of the pairs has each value of each column; the others widen that, half of them
# by hand.
NARROW, WIDE = PAIRWISE[::3], PAIRWISE[1::3]


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=case.name) for case in NARROW),
        *(pytest.param(case, id=case.name, marks=pytest.mark.wide) for case in WIDE),
        *(pytest.param(case, id=case.name, marks=pytest.mark.slow) for case in PAIRWISE[2::3]),
    ],
)
def test_transforms_are_the_oracles(case):
    assert_oracle(case)


@pytest.mark.core
@pytest.mark.parametrize(
    "case",
    [
        # Compiled as a user's it is computed below.
        pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (case.wavelet == "sym4"))
        for case in HARD
    ],
)
def test_hard_cases_are_the_oracles(case):
    assert_oracle(case)


@pytest.mark.core
@pytest.mark.usefixtures("optimised")
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (case.wavelet != "sym4"))
        for case in HARD
    ],
)
def test_optimised_hard_cases_are_the_oracles(case):
    """Compiled as a user's programs are, long filters at `make test`."""
    assert_oracle(case)


def test_the_table_covers_every_pair():
    kinds = {
        1: [(16,), (7,), (28,), (1,)],
        2: [(8, 8), (7, 7), (28, 28), (2, 3)],
        3: [(4, 4, 4), (5, 5, 5), (6, 6, 6), (1, 3, 2)],
    }
    rows = [(c.ndim, kinds[c.ndim].index(c.spatial), *c[1:5]) for c in PAIRWISE]
    values = [
        (1, 2, 3),
        range(4),
        range(7),
        ("haar", "db2", "db3", "bior2.2"),
        ("float32", "float64", *LOW),
        ((), (2,), (2, 3)),
    ]
    narrow = [rows[PAIRWISE.index(case)] for case in NARROW]
    assert [set(column) for column in zip(*narrow, strict=True)] == list(map(set, values))
    for i, j in combinations(range(len(values)), 2):
        missing = set(product(values[i], values[j])) - {(row[i], row[j]) for row in rows}
        assert not missing


@pytest.mark.wide
@pytest.mark.core
@settings(max_examples=8)
@given(st.lists(st.integers(1, 13), min_size=1, max_size=2), st.integers(0, 3))
@example([28, 14], 4)
@example([1, 1], 3)
@example([5, 2, 3], 2)
def test_haar_reconstructs_any_size(spatial, level):
    ndim = len(spatial)
    x = np.random.default_rng(0).normal(size=(*spatial, 2))

    @jax.jit
    def there_and_back(x):
        coeffs = WAVEDEC[ndim](x, level=level)
        return coeffs, WAVEREC[ndim](coeffs, shape=spatial)

    coeffs, back = there_and_back(x)
    np.testing.assert_allclose(back, x, atol=1e-13)
    assert error(coeffs, oracle_wavedec(x, ndim, level)) <= 1e-13


def pywt_cascades(x, ndim, level):
    """PyWavelets' Haar coefficients and the signal that it makes of them."""
    axes = tuple(range(-1 - ndim, -1))
    if ndim == 1:
        coeffs = pywt.wavedec(x, "haar", "zero", level, axis=-2)
        return coeffs, pywt.waverec(coeffs, "haar", "zero", axis=-2)
    if ndim == 2:
        coeffs = pywt.wavedec2(x, "haar", "zero", level, axes=axes)
        return coeffs, pywt.waverec2(coeffs, "haar", "zero", axes=axes)
    coeffs = pywt.wavedecn(x, "haar", "zero", level, axes=axes)
    return coeffs, pywt.waverecn(coeffs, "haar", "zero", axes=axes)


@pytest.mark.core
@pytest.mark.parametrize("spatial", [(13,), (9, 14), (5, 4, 6)], ids=str)
def test_cascades_are_laid_out_as_pywavelets_does(spatial):
    ndim, x = len(spatial), np.random.default_rng(0).normal(size=(2, *spatial, 3))
    want, restored = pywt_cascades(x, ndim, level=2)
    got = jax.jit(partial(WAVEDEC[ndim], level=2))(x)
    # The same lists, tuples and names, or this fails on the structure.
    chex.assert_trees_all_close(got, want, rtol=1e-7, atol=1e-12)
    back = jax.jit(WAVEREC[ndim])(want)
    # Without a shape the padding stays.
    np.testing.assert_allclose(back, restored, atol=1e-12)
    assert back.shape == (2, *(n + n % 2 for n in spatial), 3)


@pytest.mark.core
def test_one_level_is_laid_out_as_pywavelets_does():
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 2))

    @jax.jit
    def there_and_back(x):
        coeffs = haar.dwt(x), haar.dwt2(x), haar.dwt3(x)
        return coeffs, (haar.idwt(*coeffs[0]), haar.idwt2(coeffs[1]), haar.idwt3(coeffs[2]))

    coeffs, back = there_and_back(x)
    want = (
        pywt.dwt(x, "haar", "zero", axis=-2),
        pywt.dwt2(x, "haar", "zero", axes=(-3, -2)),
        pywt.dwtn(x, "haar", "zero", axes=(-4, -3, -2)),
    )
    chex.assert_trees_all_close(coeffs, want, rtol=1e-7, atol=1e-13)
    np.testing.assert_allclose(back, [x, x, x], atol=1e-13)


MODES = get_args(modes.Mode)


@pytest.mark.core
@pytest.mark.filterwarnings("ignore:Level value")
@pytest.mark.parametrize(("spatial", "wavelet"), [((3, 11), "haar"), ((5,), "bior2.2")])
def test_modes_are_those_of_pywavelets(spatial, wavelet):
    """Odd sizes, at deeper levels too, and signals shorter than the filters."""
    x, axes = np.random.default_rng(0).normal(size=(*spatial, 2)), tuple(range(len(spatial)))

    @jax.jit
    def there_and_back(x):
        found = {}
        for mode in MODES:
            coeffs = haar.wavedecn(x, wavelet, 2, mode=mode)
            found[mode] = coeffs, haar.waverecn(coeffs, wavelet, mode)
        return found

    for mode, (coeffs, back) in there_and_back(x).items():
        want = pywt.wavedecn(x, wavelet, mode, 2, axes=axes)
        chex.assert_trees_all_close(coeffs, want, rtol=1e-7, atol=1e-12)
        np.testing.assert_allclose(back, pywt.waverecn(want, wavelet, mode, axes), atol=1e-12)
        np.testing.assert_allclose(back[tuple(map(slice, spatial))], x, atol=1e-12)


WAVELETS = ("haar", "db2", "db3", "sym4", "coif2", "rbio3.1")
# Each mode with the longest filters and with one of those between; with Haar's above.
MODES_AND_WAVELETS = [
    pytest.param(mode, wavelet, marks=[pytest.mark.slow] * (j not in (4, (1, 2, 3, 5)[i % 4])))
    for i, mode in enumerate(MODES)
    for j, wavelet in enumerate(WAVELETS)
]


@pytest.mark.wide
@pytest.mark.core
@pytest.mark.parametrize(("mode", "wavelet"), MODES_AND_WAVELETS)
def test_modes_of_any_size_are_those_of_pywavelets(mode, wavelet):
    for size in (1, 2, 5, 10)["reflect" in mode :]:
        x = np.random.default_rng(0).normal(size=(size, 1))
        want = pywt.dwt(x, wavelet, mode, axis=0)
        chex.assert_trees_all_close(haar.dwt(x, wavelet, mode), want, atol=1e-12)
        back = pywt.idwt(*want, wavelet, mode, axis=0)
        np.testing.assert_allclose(haar.idwt(*want, wavelet, mode), back, atol=1e-12)


@pytest.mark.core
def test_a_mode_where_zeros_do_is_the_transform_without_one(monkeypatch):
    """Kernels then compute the whole cascade; otherwise a level at a time, in float32."""
    levels, plan = [], haar_api._plan
    monkeypatch.setattr(haar_api, "_plan", lambda *args: levels.append(args[3]) or plan(*args))
    x = np.random.default_rng(0).normal(size=(8, 12, 2)).astype(np.float16)
    want = haar.wavedec2(x, level=2)
    for mode in ("zero", "symmetric"):
        chex.assert_trees_all_equal(haar.wavedec2(x, level=2, mode=mode), want)
    odd = haar.wavedec2(x[:, :9], level=2, mode="constant")
    assert levels == [2, 2, 2, 1, 1]
    assert {band.dtype for band in jax.tree.leaves(odd)} == {jnp.dtype("float16")}
    near = haar.wavedec2(x[:, :9].astype(np.float64), level=2, mode="constant")
    chex.assert_trees_all_close(odd, near, atol=2e-3)


@pytest.mark.core
def test_axes_names_and_objects_are_taken_as_pywavelets_takes_them():
    x = np.random.default_rng(0).normal(size=(5, 6, 8))
    db2 = pywt.Wavelet("db2")

    @jax.jit
    def ours(x):
        pair = haar.dwt(x, "Db2", "symmetric", axis=-1)
        two = haar.dwt2(x, db2, "zero", axes=(2, 1))
        named = haar.wavedecn(x, "DB1", level=None, mode="periodization", axes=(0, -1))
        back = haar.waverecn(named, "db1", "periodization", (0, -1), shape=(5, 8))
        return (
            *(pair, haar.idwt(*pair, db2, "symmetric", axis=-1)),
            *(two, haar.idwt2(two, db2, "zero", (2, 1)), named, back),
            *(haar.dwtn(x, axes=(0, 1, 2)), haar.dwtn(x)),
        )

    pair = pywt.dwt(x, "db2", "symmetric")
    two = pywt.dwt2(x, "db2", "zero", axes=(2, 1))
    named = pywt.wavedecn(x, "haar", "periodization", axes=(0, -1))
    want = (
        *(pair, x, two, x, named, x),
        *(pywt.dwtn(x, "haar", "zero"), pywt.dwtn(x, "haar", "zero", (0, 1))),
    )
    chex.assert_trees_all_close(ours(x), want, rtol=1e-7, atol=1e-12)


@pytest.mark.core
@pytest.mark.filterwarnings("ignore:Level value")
@pytest.mark.parametrize("mode", ["zero", "periodization"])
def test_bands_that_are_none_are_zeros(mode):
    x = np.random.default_rng(0).normal(size=(6, 4, 1))
    low, high, (cH, cV, cD) = pywt.wavedec2(x, "db2", mode, 2, axes=(0, 1))
    keys, ours = {"axes": (0, 1)}, {"wavelet": "db2", "mode": mode}
    for coeffs in ([None, high, (cH, None, cD)], [low, None, (None, None, cD)], [low, high, None]):
        want = pywt.waverec2(
            [c if c is not None else (None,) * 3 if i else None for i, c in enumerate(coeffs)],
            *("db2", mode),
            **keys,
        )
        np.testing.assert_allclose(haar.waverec2(coeffs, **ours), want, atol=1e-12)
    one = {"da": cH}
    want = pywt.idwtn(one, "db2", mode, **keys)
    np.testing.assert_allclose(haar.idwtn(one, **ours), want, atol=1e-12)
    want = pywt.idwt(None, cD, "db2", mode, axis=0)
    np.testing.assert_allclose(haar.idwt(None, cD, "db2", mode, 0), want, atol=1e-12)


@pytest.mark.core
def test_the_deepest_level_is_that_of_pywavelets():
    for wavelet in ("haar", "db2", pywt.Wavelet("sym4"), 6, np.int64(4)):
        for size in (0, 1, 2, 5, 6, 7, 8, 63, 64, 100):
            assert haar.dwt_max_level(size, wavelet) == pywt.dwt_max_level(size, wavelet)
    assert len(haar.wavedec(np.ones((20, 1)), "db2", None)) == 1 + pywt.dwt_max_level(20, 4)


@pytest.mark.core
@pytest.mark.parametrize(
    ("spatial", "wavelet"),
    [
        ((7,), "bior2.2"),
        ((3, 5), "haar"),
        *(
            pytest.param(*case, marks=pytest.mark.wide)
            for case in (((4, 3), "db2"), ((3, 2, 2), "haar"))
        ),
    ],
)
def test_forward_and_reverse_mode_of_linear_maps(spatial, wavelet):
    """A tangent is transformed like a signal, and the transpose satisfies <A x, c> = <x, A' c>."""
    ndim, level, rng = len(spatial), 2, np.random.default_rng(0)
    dec = partial(WAVEDEC[ndim], wavelet=wavelet, level=level)
    rec = partial(WAVEREC[ndim], wavelet=wavelet, shape=spatial)
    x, t = rng.normal(size=(2, *spatial, 1))
    want = oracle_wavedec(t, ndim, level, wavelet)
    c = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), want)

    @jax.jit
    def differentiated(x, t, c):
        forward = jax.jvp(dec, (x,), (t,))[1], jax.jvp(rec, (c,), (c,))
        return forward, jax.vjp(dec, x)[1](c)[0], jax.vjp(rec, c)[1](x)[0]

    (analysed, (synthesised, tangent)), of_dec, of_rec = differentiated(x, t, c)
    assert error(analysed, want) <= 1e-13
    np.testing.assert_allclose(tangent, synthesised, atol=1e-13)
    np.testing.assert_allclose((of_dec * t).sum(), inner(c, want), atol=1e-12)
    np.testing.assert_allclose(inner(of_rec, c), (x * synthesised).sum(), atol=1e-12)


@pytest.mark.core
def test_forward_and_reverse_mode_of_kernels(monkeypatch):
    class Kernel:
        DIFFERENTIABLE = False
        unavailable, check = xla.unavailable, xla.check
        wavedec, waverec = xla.wavedec, xla.waverec

    monkeypatch.setattr(Operator, "module", lambda self, name: Kernel)
    test_forward_and_reverse_mode_of_linear_maps((3, 5), "haar")


def test_signals_of_any_size_are_exported():
    def back(x):
        return haar.waverec2(haar.wavedec2(x, level=2), shape=x.shape[:2])

    shape = jax.ShapeDtypeStruct(jax.export.symbolic_shape("h, w, 1"), jnp.float64)
    x = np.random.default_rng(0).normal(size=(7, 5, 1))
    y = jax.export.export(jax.jit(back))(shape).call(x)
    np.testing.assert_allclose(y, x, atol=1e-12)


def inner(a, b):
    return sum(jax.tree.leaves(jax.tree.map(lambda a, b: np.sum(np.asarray(a) * b), a, b)))


@pytest.mark.core
def test_second_derivatives_in_mixed_modes():
    def curved(x):
        return sum(jnp.sum(jnp.sin(c)) for c in jax.tree.leaves(haar.wavedec2(x, "db2", 2)))

    x = np.random.default_rng(0).normal(size=(3, 5, 1))
    way = np.cos(x)
    tangent = jax.jit(lambda x: jax.jvp(jax.grad(curved), (x,), (way,))[1])(x)
    gradient = jax.jit(jax.grad(curved))
    numeric = (gradient(x + 1e-5 * way) - gradient(x - 1e-5 * way)) / 2e-5
    np.testing.assert_allclose(tangent, numeric, atol=1e-8)


@pytest.mark.core
@pytest.mark.parametrize("wavelet", ["haar", "db2"])
def test_vmap_is_one_more_batch_dimension(wavelet):
    x = np.random.default_rng(0).normal(size=(3, 5, 6, 2))
    dec, rec = partial(haar.dwt2, wavelet=wavelet), partial(haar.idwt2, wavelet=wavelet)
    want = dec(x)
    got, back = jax.jit(lambda x, c: (jax.vmap(dec)(x), jax.vmap(rec)(c)))(x, want)
    assert error(got, want) <= 1e-14
    assert error(back, rec(want)) <= 1e-14


X = np.ones((4, 6, 3), np.float32)
BAD = {
    "data rank": (lambda: haar.dwt2(X[0]), r"data: expected an array .*H, W, C\].*\(6, 3\)"),
    "data integer": (lambda: haar.dwt(X.astype(int)), "data: expected a floating-point.*int"),
    "no level integer": (lambda: haar.wavedec2(X.astype(int), level=0), "data: .*floating"),
    "no level rank": (lambda: haar.wavedec3(X, level=0), r"data: .*D, H, W, C\]"),
    "wavelet": (lambda: haar.dwt2(X, "no"), "wavelet='no' is not a discrete wavelet"),
    "continuous": (lambda: haar.idwt(X, X, "morl"), "wavelet='morl' is not.*: haar, db, sym"),
    "no level wavelet": (lambda: haar.wavedec(X, "no", 0), "wavelet='no'"),
    "wavelet type": (lambda: haar.wavedec(X, 2), "wavelet=2: expected the name"),
    "level": (lambda: haar.wavedec2(X, level=-1), "level=-1: expected an integer >= 0"),
    "level large": (lambda: haar.wavedec2(X, level=10**9), "level=1000000000: .* integer <= 63"),
    "level type": (lambda: haar.wavedec2(X, level=1.0), "level=1.0: expected an integer >= 0"),
    "coeffs empty": (lambda: haar.waverec([]), "coeffs is empty"),
    "coeffs shapes": (lambda: haar.idwt(X, X[:3]), r"coeffs: .*'cD': \(3, 6, 3\)"),
    "coeffs integer": (lambda: haar.idwt(X, X.astype(int)), r"coeffs \(cD\): .*floating"),
    "coeffs pair": (lambda: haar.idwt2((X,)), r"coeffs: expected \(cA, \(cH, cV, cD\)\)"),
    "coeffs triple": (lambda: haar.idwt2((X, (X, X))), r"coeffs: expected \(cA, \(cH, cV, cD\)\)"),
    "coeffs names": (lambda: haar.idwt3({"aaa": X[None]}), r"coeffs: .*'ddd'\], got \['aaa'\]"),
    "coeffs levels": (
        lambda: haar.waverec([X[:, :2], X[:, :2], X]),
        r"coeffs\[2\]: expected spatial size \(4,\).*got \(6,\)",
    ),
    "shape": (
        lambda: haar.waverec2([X, (X, X, X)], shape=(8, 10)),
        r"shape=\(8, 10\): .*\(8, 12\)",
    ),
    "shape rank": (
        lambda: haar.waverec2([X, (X, X, X)], shape=(8,)),
        r"shape=\(8,\): .*2 integers",
    ),
    "shape type": (lambda: haar.waverec([X, X], shape=12), "shape=12: expected 1 integers"),
    "no level shape": (lambda: haar.waverec2([X], shape=(4, 5)), r"shape=\(4, 5\): .*no level"),
    "data none": (lambda: haar.dwt(None), "data: expected an array, got NoneType"),
    "data string": (lambda: haar.wavedec2("no"), "data: expected an array, got str"),
    "data float8": (lambda: haar.dwt2(jnp.ones((4, 4, 1), "float8_e5m2")), "data: .*float8"),
    "level bool": (lambda: haar.wavedec2(X, level=True), "level=True: expected an integer"),
    "wavelet list": (lambda: haar.dwt2(X, ["haar"]), r"wavelet=\['haar'\]: expected the name"),
    "coeffs none": (lambda: haar.idwt2(None), r"coeffs: expected \(cA.*got NoneType"),
    "coeffs hole": (lambda: haar.idwt(None, None), "coeffs: every band is None"),
    "coeffs holes": (
        lambda: haar.waverec2([None, None, (X, X, X)]),
        "coeffs: every band of the coarsest level is None",
    ),
    "coeffs unknown": (lambda: haar.idwtn({"ax": X}, axes=(0, 1)), r"the bands \['aa', 'da'"),
    "mode": (
        lambda: haar.dwt(X, mode="smooth"),
        "mode='smooth': expected None.*zero, constant, symmetric, reflect, periodic, antireflect",
    ),
    "mode of synthesis": (lambda: haar.waverec2([X], mode="zpd"), "mode='zpd': expected None"),
    "level and mode": (lambda: haar.wavedec(X, "haar", "zero"), "level='zero': .* mode='zero'"),
    "axis": (lambda: haar.dwt(X, axis=3), r"axes=\(3,\): .* of data, of shape \(4, 6, 3\)"),
    "axes twice": (lambda: haar.dwt2(X, axes=(1, -2)), r"axes=\(1, -2\): expected different"),
    "axes count": (lambda: haar.idwt3({}, axes=(0, 1)), r"the bands \['aaa'"),
    "axes number": (lambda: haar.wavedec2(X, axes=(0, 1, 2)), r"axes=\(0, 1, 2\): expected 2 int"),
    "axes none": (lambda: haar.dwtn(X[0, 0]), "axes=None is all axes but the last, of an array of"),
    "wavelet of its own": (
        lambda: haar.dwt(X, pywt.Wavelet("haar", pywt.Wavelet("db2").filter_bank)),
        "this pywt.Wavelet has the name 'haar' and filters of its own",
    ),
    "max level": (lambda: haar.dwt_max_level(8, 1), "filter_len=1: expected an integer >= 2"),
    "coeffs number": (lambda: haar.waverec2(3), r"coeffs: expected \[cA_n, .*got int"),
    "coeffs short": (
        lambda: haar.waverec2([X, (X, X, X), ()]),
        r"coeffs\[2\]: expected \(cH, cV, cD\), got \(\)",
    ),
    "coeffs keys": (lambda: haar.idwt3({"aaa": X, 1: X}), r"got \['aaa', 1\]"),
    "coeffs list": (lambda: haar.idwt3([X, X]), r"coeffs: expected the bands \['aaa'.*got \("),
    "implementation": (lambda: haar.dwt(X, implementation="no"), r"implementation names \['no'\]"),
}


@pytest.mark.core
@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_named(bad):
    call, message = BAD[bad]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.core
def test_no_level_is_the_signal():
    for ndim, spatial in ((1, (5,)), (2, (4, 5)), (3, (3, 4, 5))):
        x = np.ones((*spatial, 1))
        (low,) = WAVEDEC[ndim](x, level=0)
        np.testing.assert_array_equal(WAVEREC[ndim]([low], shape=spatial), x)


@pytest.mark.core
def test_implementations_by_name_member_and_environment(monkeypatch):
    want = haar.dwt(X)
    for choice in ("xla", Implementation.XLA, ["xla"]):
        np.testing.assert_array_equal(haar.dwt(X, implementation=choice), want)
    monkeypatch.setenv("FLASH_WTCONV_HAAR_FWD", "nothing")
    with pytest.raises(ValueError, match="FLASH_WTCONV_HAAR_FWD"):
        haar.dwt(X)
