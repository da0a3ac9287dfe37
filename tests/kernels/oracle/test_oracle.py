"""The definition itself: against PyWavelets, dense matrices and values worked by hand."""

from itertools import product

import numpy as np
import pytest
import pywt

from pallas_kernels import oracle
from pallas_kernels.haar.filters import filter_bank

SIZES = {
    1: [(1,), (2,), (5,), (8,), (14,), (28,)],
    2: [(1, 1), (2, 3), (7, 7), (8, 8), (14, 14), (28, 28), (5, 18)],
    3: [(1, 1, 1), (2, 3, 4), (5, 5, 5), (4, 4, 4)],
}
NDIM_SIZES = [(ndim, size) for ndim, sizes in SIZES.items() for size in sizes]
KERNEL_SIZES = (1, 2, 3, 5, 7)
# Any two of a size, a number of levels and a size of kernels.
PAIRWISE = [
    (ndim, size, levels, KERNEL_SIZES[(i + levels) % len(KERNEL_SIZES)])
    for i, (ndim, size) in enumerate(NDIM_SIZES)
    for levels in range(7)
]


def signal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def parameters(ndim, levels, kernel_size, channels, seed=1):
    rng = np.random.default_rng(seed)
    taps, bands = (kernel_size,) * ndim, 2**ndim
    params = {
        "base_kernel": rng.normal(size=(*taps, 1, channels)),
        "base_bias": rng.normal(size=channels),
        "base_scale": rng.normal(size=channels),
    }
    for i in range(levels):
        params[f"wavelet_kernel_{i}"] = rng.normal(size=(*taps, bands, channels))
        params[f"wavelet_scale_{i}"] = rng.normal(size=(bands, channels))
    return params


def pywt_bands(x, ndim, wavelet="haar"):
    """PyWavelets' coefficients in our order: band s is high along axis a where bit a is set."""
    found = pywt.dwtn(x, wavelet, mode="zero", axes=range(ndim))
    names = ("".join("ad"[s >> a & 1] for a in range(ndim)) for s in range(2**ndim))
    return np.stack([found[name] for name in names], axis=-2)


@pytest.mark.parametrize(("ndim", "size"), NDIM_SIZES)
def test_haar_cascade_is_nested_pywavelets(ndim, size):
    x = signal(*size, 2)
    low = x
    for level in oracle.wavedec(x, ndim, 6):
        want = pywt_bands(low, ndim)
        np.testing.assert_allclose(level, want, atol=1e-12)
        low = want[..., 0, :]


def test_two_dimensional_bands_are_cA_cH_cV_cD():
    x = signal(6, 9)
    low, (horizontal, vertical, diagonal) = pywt.dwt2(x, "haar", mode="zero")
    got = oracle.analysis(x[..., None], 2)[..., 0]
    np.testing.assert_allclose(got, np.stack([low, horizontal, vertical, diagonal], -1), atol=1e-12)


@pytest.mark.parametrize("wavelet", pywt.wavelist(kind="discrete"))
def test_every_filter_bank_is_pywavelets_at_the_published_phase(wavelet):
    dec, _ = filter_bank(wavelet)
    length = dec.shape[1]
    x = signal(21, 1)
    got = oracle.analysis(x, 1, dec)
    # PyWavelets reads x[2k + 1 - j], the published layer x[2i + F/2 - j]: where F/2 is even, that
    # is the signal with one zero in front.
    late = int(length // 2 % 2 == 0)
    want = pywt_bands(np.concatenate([np.zeros((late, 1)), x, np.zeros((1, 1))]), 1, wavelet)
    first = (length // 2 - 1 + late) // 2
    np.testing.assert_allclose(got, want[first : first + 11], atol=1e-12)


@pytest.mark.parametrize("wavelet", ["haar", "db2", "bior2.2", "coif1"])
@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_synthesis_is_the_transpose_of_analysis(ndim, wavelet):
    _, rec = filter_bank(wavelet)
    size = (6, 4, 2)[:ndim]
    x, c = signal(*size, 1), signal(*(n // 2 for n in size), 2**ndim, 1, seed=1)
    there = (oracle.analysis(x, ndim, rec) * c).sum()
    np.testing.assert_allclose(there, (x * oracle.synthesis(c, ndim, rec)).sum(), atol=1e-12)


@pytest.mark.parametrize("wavelet", ["db3", "sym4", "bior2.4", "rbio3.1"])
def test_banks_reconstruct_away_from_the_border(wavelet):
    dec, rec = filter_bank(wavelet)
    x = np.zeros((80, 1))
    x[30:50] = signal(20, 1)
    back = oracle.synthesis(oracle.analysis(x, 1, dec), 1, rec)
    np.testing.assert_allclose(back, x, atol=1e-6)


@pytest.mark.parametrize(("ndim", "size"), NDIM_SIZES)
@pytest.mark.parametrize("levels", range(7))
def test_haar_reconstructs_every_size(ndim, size, levels):
    x = signal(2, *size, 2)
    coefficients = oracle.wavedec(x, ndim, levels)
    for level in coefficients[:-1]:
        level[..., 0, :] = 0
    if levels:
        np.testing.assert_allclose(oracle.waverec(coefficients, ndim, size), x, atol=1e-12)


def test_parseval_where_no_size_is_odd():
    x = signal(8, 16, 3)
    coefficients = oracle.wavedec(x, 2, 3)
    energy = sum((c[..., 1:, :] ** 2).sum() for c in coefficients)
    energy += (coefficients[-1][..., 0, :] ** 2).sum()
    np.testing.assert_allclose(energy, (x**2).sum())


@pytest.mark.parametrize("kernel_size", KERNEL_SIZES)
@pytest.mark.parametrize(("ndim", "size"), NDIM_SIZES)
def test_depthwise_is_a_sum_over_neighbours(ndim, size, kernel_size):
    x, kernel = signal(*size, 2), signal(*(kernel_size,) * ndim, 2, seed=1)
    before = (kernel_size - 1) // 2
    want = np.zeros_like(x)
    for place in product(*map(range, size)):
        for tap in product(range(kernel_size), repeat=ndim):
            source = tuple(p + t - before for p, t in zip(place, tap, strict=True))
            if all(0 <= s < n for s, n in zip(source, size, strict=True)):
                want[place] += kernel[tap] * x[source]
    np.testing.assert_allclose(oracle.depthwise(x, kernel, ndim), want, atol=1e-12)


def closed_form(x, params, ndim):
    """All levels' synthesis in one step, each pixel by itself."""
    levels = sum(name.startswith("wavelet_kernel") for name in params)
    size = x.shape[:-1]
    y = params["base_scale"] * (
        oracle.depthwise(x, params["base_kernel"][..., 0, :], ndim) + params["base_bias"]
    )
    places = np.meshgrid(*map(np.arange, size), indexing="ij")
    low = x
    for level in range(1, levels + 1):
        low = np.pad(low, [(0, n % 2) for n in low.shape[:-1]] + [(0, 0)])
        bands = pywt_bands(low, ndim)
        filtered = params[f"wavelet_scale_{level - 1}"] * oracle.depthwise(
            bands, params[f"wavelet_kernel_{level - 1}"], ndim
        )
        read = filtered[tuple(p >> level for p in places)]
        signs = [1 - 2 * (p >> (level - 1) & 1) for p in places]
        for s in range(2**ndim):
            sign = np.prod([signs[a] for a in range(ndim) if s >> a & 1], axis=0)
            y = y + 2 ** (-level * ndim / 2) * np.asarray(sign)[..., None] * read[..., s, :]
        low = bands[..., 0, :]
    return y


@pytest.mark.parametrize(("ndim", "size", "levels", "kernel_size"), PAIRWISE)
def test_wtconv_is_its_closed_form(ndim, size, levels, kernel_size):
    if ndim == 3 and kernel_size > 5:
        size = size[:1] + (2, 1)
    x, params = signal(*size, 2), parameters(ndim, levels, kernel_size, 2)
    got = oracle.wtconv(x, params, ndim)
    want = closed_form(x, params, ndim)
    np.testing.assert_allclose(got, want, atol=1e-9 * max(1, np.abs(want).max()))


def test_values_worked_by_hand():
    """[[1 2] [3 4]] has LL 5, LH (1+2-3-4)/2 = -2, HL (1-2+3-4)/2 = -1, HH (1-2-3+4)/2 = 0."""
    x = np.array([[1.0, 2.0], [3.0, 4.0]])[..., None]
    assert oracle.analysis(x, 2).ravel().tolist() == pytest.approx([5, -2, -1, 0])
    params = {
        "base_kernel": np.full((1, 1, 1, 1), 10.0),
        "base_bias": np.array([1.0]),
        "base_scale": np.array([2.0]),
        "wavelet_kernel_0": np.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 4, 1),
        "wavelet_scale_0": np.array([1.0, 0.5, 2.0, 7.0]).reshape(4, 1),
    }
    # The bands become 5, -2, -6, 0, which synthesise to (5-2-6)/2, (5-2+6)/2, (5+2-6)/2, (5+2+6)/2;
    # the base is 2 (10 x + 1).
    want = np.array([[22 - 1.5, 42 + 4.5], [62 + 0.5, 82 + 6.5]])
    np.testing.assert_allclose(oracle.wtconv(x, params, 2)[..., 0], want)


def test_strides_average_in_1d_and_subsample_otherwise():
    y = np.arange(7.0)[:, None]
    assert oracle.subsample(y, 1, 3)[:, 0].tolist() == [1.0, 4.0]
    y = np.arange(12.0).reshape(3, 4, 1)
    assert oracle.subsample(y, 2, 2)[..., 0].tolist() == [[0.0, 2.0], [8.0, 10.0]]
    assert oracle.subsample(signal(5, 4, 3, 2), 3, 2).shape == (3, 2, 2, 2)


@pytest.mark.parametrize("size", [(7, 9), (14, 14), (8, 8)])
def test_wtconv_is_its_own_adjoint_up_to_a_flip(size):
    params = parameters(2, 3, 5, 2)
    params["base_bias"] *= 0
    flipped = {n: p[::-1, ::-1] if "kernel" in n else p for n, p in params.items()}
    x, y = signal(*size, 2), signal(*size, 2, seed=3)
    there = (oracle.wtconv(x, params, 2) * y).sum()
    np.testing.assert_allclose(there, (x * oracle.wtconv(y, flipped, 2)).sum(), rtol=1e-12)


def test_constant_and_delta_input():
    params = {
        "base_kernel": np.ones((1, 1, 1, 1)),
        "base_scale": np.zeros(1),
        "wavelet_kernel_0": np.ones((1, 1, 4, 1)),
        "wavelet_scale_0": np.ones((4, 1)),
    }
    # A constant lives in the low band alone; with unit taps the layer is then the identity.
    assert np.allclose(oracle.wtconv(np.full((6, 8, 1), 3.0), params, 2), 3.0)
    params["wavelet_scale_0"] = np.array([1.0, 0.0, 0.0, 0.0])[:, None]
    delta = np.zeros((6, 8, 1))
    delta[3, 4] = 1.0
    # The low band alone spreads a delta evenly over its 2x2 block.
    want = np.zeros((6, 8, 1))
    want[2:4, 4:6] = 0.25
    np.testing.assert_allclose(oracle.wtconv(delta, params, 2), want, atol=1e-15)


@pytest.mark.parametrize(
    ("ndim", "size", "levels", "kernel_size", "stride", "wavelet"),
    [
        (1, (7,), 2, 2, 3, "haar"),
        (1, (9,), 1, 3, 1, "bior2.2"),
        (2, (3, 5), 2, 2, 1, "haar"),
        (2, (4, 3), 1, 3, 2, "db2"),
        (3, (2, 3, 2), 1, 2, 2, "haar"),
    ],
)
def test_gradients_are_every_derivative(ndim, size, levels, kernel_size, stride, wavelet):
    """The operator is linear in each argument, so a difference of any width is exact."""
    dec, rec = filter_bank(wavelet)
    keys = {"stride": stride, "dec": dec, "rec": rec}
    x, params = signal(1, *size, 2), parameters(ndim, levels, kernel_size, 2)
    dy = signal(*oracle.subsample(x, ndim, stride).shape, seed=5)
    dx, dparams = oracle.wtconv_vjp(x, params, dy, ndim, **keys)

    def loss(x, params):
        return (oracle.wtconv(x, params, ndim, **keys) * dy).sum()

    def differences(array, at):
        found = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            up, down = array.copy(), array.copy()
            up[index] += 0.5
            down[index] -= 0.5
            found[index] = at(up) - at(down)
        return found

    np.testing.assert_allclose(dx, differences(x, lambda a: loss(a, params)), atol=1e-10)
    for name, value in params.items():
        want = differences(value, lambda a, name=name: loss(x, params | {name: a}))
        np.testing.assert_allclose(dparams[name], want, atol=1e-10, err_msg=name)
