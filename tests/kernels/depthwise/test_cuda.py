"""The depthwise convolution on tensor cores: run on the CPU, with faults planted."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cuda import EMULATED, folder

from pallas_kernels.common import cuda_call
from pallas_kernels.common.on_cpu.cuda import Launcher
from pallas_kernels.oracle.wtconv import depthwise
from pallas_kernels.wtconv import tensor_core_launches as launches

SOURCE = launches.SOURCE.read_text()
CASES = {
    # Channels in part, rows and columns that are no multiples; strips below each other.
    "odd": ((1, 9, 10, 5), 5, "bfloat16", True),
    "pairs of channels": ((2, 7, 14, 34), 3, "float16", False),
    "four channels": ((1, 6, 13, 36), 7, "bfloat16", True),
    "one pixel": ((3, 1, 1, 1), 3, "bfloat16", True),
    "a block's width": ((1, 33, 70, 4), 7, "float16", True),
    "several bands": ((1, 63, 64, 4), 5, "bfloat16", True),
}
ALWAYS = ("odd",)


def drawn(shape, kernel_size, dtype, biased):
    generator = np.random.default_rng(sum(shape))
    c = shape[-1]
    x = generator.standard_normal(shape).astype(dtype)
    taps = generator.standard_normal((kernel_size, kernel_size, 1, c)).astype(dtype)
    bias = generator.standard_normal(c).astype("float32") if biased else None
    return x, taps, bias


def registers(taps):
    """Taps `[k, k, 1, C]` as the kernel reads them."""
    kernel_size, channels = taps.shape[0], taps.shape[-1]
    flat = np.zeros((channels, kernel_size**2 + 1), taps.dtype)
    flat[:, :-1] = taps.reshape(-1, channels).T
    return np.ascontiguousarray(flat[:, launches.toeplitz(kernel_size)])


def computed(launcher, x, taps, bias):
    matrices = registers(taps)
    about = x.shape, str(x.dtype), taps.shape[0]
    return launches.forward(x, matrices, bias, *about, launcher.launch)


def error(y, x, taps, bias):
    """The largest error, as a part of what rounding the exact result may cause."""
    want = depthwise(x.astype(np.float64), taps[:, :, 0].astype(np.float64), 2)
    want = want if bias is None else want + bias
    rounding = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[str(x.dtype)]
    return (np.abs(y.astype(np.float64) - want) / (rounding * np.abs(want) + 1e-5)).max()


@EMULATED
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.wide] * (n not in ALWAYS)) for n in CASES]
)
def test_the_convolution_is_exact_but_for_its_rounding_in_every_order_of_threads(name):
    x, taps, bias = drawn(*CASES[name])
    launcher = Launcher(folder())
    for launcher.order in (0, 1, 2):
        assert error(computed(launcher, x, taps, bias), x, taps, bias) <= 1.01


FAULTS = {
    "a barrier": ("__syncthreads();", ""),
    "a wait": ("wait<STAGES - 2>();", ""),
    "a wait for too few": ("wait<STAGES - 2>();", "wait<STAGES - 1>();"),
    "a bound of the rows": ("row >= 0 && row < height && ", "row < height + 1 && "),
    "a bound of the columns": ("&& column >= 0 && column < width", "&& column < width"),
    "the other channel": ("0x7632 : 0x5410", "0x5410 : 0x7632"),
    "another pair's taps": ("(REACHED - 1 - i) * PARTS", "i * PARTS"),
    "one buffer of results": ("step % 2 * OUT_STAGE", "0"),
}


@EMULATED
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault):
    old, new = FAULTS[fault]
    assert old in SOURCE
    launcher = Launcher(folder(), source=SOURCE.replace(old, new))
    x, taps, bias = drawn((1, 13, 9, 8), 5, "bfloat16", True)
    # A margin of zeros around x, since what is read beyond it must not crash.
    wide = np.zeros(3 * x.size, x.dtype)
    wide[x.size : 2 * x.size] = x.ravel()
    wide[: x.size] = wide[2 * x.size :] = 1
    inside = wide[x.size : 2 * x.size].reshape(x.shape)

    def caught(order):
        launcher.order = order
        try:
            # Not "error > 1.01": NaN is never more.
            return not error(computed(launcher, inside, taps, bias), x, taps, bias) <= 1.01
        except RuntimeError:
            return True

    assert any(map(caught, (0, 1, 2)))


@EMULATED
@pytest.mark.slow
def test_an_infinite_pixel_reaches_no_further_than_its_blocks():
    """Four columns and two rows of each side's blocks more than it reaches by itself."""
    x, taps, _ = drawn((1, 16, 24, 4), 5, "float16", False)
    x[0, 8, 12, 1] = np.inf
    y = computed(Launcher(folder()), x, taps, None)
    rows, columns, channels = np.nonzero(~np.isfinite(y.astype(np.float32)))[1:]
    assert set(channels) == {1}
    assert {*range(6, 11)} <= set(rows) <= {*range(6, 12)}
    assert {*range(10, 15)} <= set(columns) <= {*range(8, 16)}


@pytest.mark.parametrize("kernel_size", launches.KERNEL_SIZES)
def test_every_tap_is_in_the_matrices_as_often_as_it_is_used(kernel_size):
    """Four columns and two rows of the output use each tap once."""
    numbers = np.bincount(launches.toeplitz(kernel_size).ravel())
    assert (numbers[:-1] == 8).all() and len(numbers) == kernel_size**2 + 1


def test_narrow_images_are_cut_into_strips():
    planned = launches.planned((2, 14, 14, 384), "bfloat16", 5)
    assert (planned.across, planned.pairs, planned.vector) == (4, 2, 4)
    assert planned.blocks((2, 14, 14, 384)) == 2 * 12


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kernel_size", launches.KERNEL_SIZES)
@pytest.mark.parametrize(
    "shape", [(2, 56, 57, 96), (3, 7, 7, 40), (1, 130, 223, 5), (2, 14, 1, 34)]
)
def test_the_convolution_on_a_gpu(shape, kernel_size, dtype):
    x, taps, bias = drawn(shape, kernel_size, dtype, True)
    arrays = map(jnp.asarray, (x, registers(taps), bias))
    y = launches.forward(*arrays, shape, dtype, kernel_size, cuda_call.launch)
    assert error(np.asarray(y), x, taps, bias) <= 1.01
