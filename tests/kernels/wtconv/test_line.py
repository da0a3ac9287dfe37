"""WTConv of signals by its CUDA kernel: run on the CPU with faults planted, traced, on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cuda import EMULATED, emulate, gpu_of, plant, recorded
from helpers.wtconv import (
    WTCONV,
    assert_oracle,
    assert_reproducible,
    assert_transformed,
    misses_oracle,
)

from pallas_kernels.common.cuda import Device
from pallas_kernels.wtconv import cuda as cuda_jax
from pallas_kernels.wtconv import line_launches as launches
from pallas_kernels.wtconv.api import OPERATOR
from pallas_kernels.wtconv.cases import Case
from pallas_kernels.wtconv.line_launches import Signals
from pallas_kernels.wtconv.problem import Problem

SMALL = Device(shared=232448, multiprocessors=1)
"""On which segments have several blocks, and weight gradients several segments a warp."""
ALWAYS = Case((130,), 2, 3, "bfloat16", batch=(7,), channels=36)
LONG = [
    # Several blocks and segments, channels of two warps; copies of each size, single channels.
    Case((777,), 5, 5, "float16", batch=(1,), channels=34),
    Case((300,), 5, 5, batch=(), channels=8),
    Case((200,), 5, 9, "bfloat16", batch=(9,), channels=5),
    Case((95,), 4, 7, batch=(2, 2), channels=12),
    Case((161,), 0, 9, "float16", channels=16),
    Case((66,), 3, 1, "bfloat16", channels=33),
]
WHOLE = Case((70,), 2, 3, batch=(2,), channels=4)


def described(case):
    return case.name


@EMULATED
def test_signals_are_the_oracles_on_the_cpu(monkeypatch):
    emulate(monkeypatch, cuda_jax, SMALL)
    assert_oracle(ALWAYS, "cuda")


@EMULATED
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=pytest.mark.slow if number else pytest.mark.wide)
        for number, case in enumerate(LONG)
    ],
)
def test_long_signals_on_the_cpu(case, monkeypatch):
    launcher = emulate(monkeypatch, cuda_jax, SMALL)
    for launcher.order in (0, 1, 2):
        assert_oracle(case, "cuda")


@EMULATED
@pytest.mark.slow
def test_transformations_on_the_cpu(monkeypatch):
    emulate(monkeypatch, cuda_jax)
    assert_transformed("cuda", WHOLE)


@EMULATED
def test_constants_of_a_long_signal_sum_to_their_product(monkeypatch):
    emulate(monkeypatch, cuda_jax, SMALL)
    case = Case((16384,), 1, 3, batch=(1,), channels=1)
    x, dy = (jnp.full((1, *case.spatial, 1), number) for number in (0.1, 0.3))
    shapes = (3, 1, 1), (3, 2, 1), (1,)
    # All of it by one warp.
    about = {"kernel_shapes": shapes, "wavelet": "haar", "precision": None, "resident": 1}
    base, bands, bias = (np.asarray(sums, float) for sums in cuda_jax.weight_grad(x, dy, **about))
    length, product = case.spatial[0], float(x[0, 0, 0]) * float(dy[0, 0, 0])
    apart = np.array([1, 0, 1])
    low = 2 * product * (length // 2 - apart)
    assert np.allclose(base.ravel(), product * (length - apart), case.tolerance("base_kernel"), 0)
    assert np.allclose(bands[:, 0, 0], low, case.tolerance("wavelet_kernel_0"), 0)
    assert not bands[:, 1].any()
    assert np.allclose(bias, length * float(dy[0, 0, 0]), case.tolerance("base_bias"), 0)


@EMULATED
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_what_is_not_finite_reaches_what_it_does_of_plain_jax(number, monkeypatch):
    emulate(monkeypatch, cuda_jax, SMALL)
    x, params, _ = ALWAYS.drawn()
    x = np.array(x)
    x[2, 61, 33] = number
    reached = [
        ~np.isfinite(np.asarray(WTCONV[1](x, params, implementation=name), float))
        for name in ("cuda", "xla")
    ]
    assert np.array_equal(*reached)
    others = np.delete(reached[0], 33, -1)
    assert reached[0][2, 61, 33] and not reached[0].all(1).any() and not others.any()


FAULTS = {
    "results of other lanes": ("__syncwarp();\n      store", "store"),
    "samples of other lanes": ("__syncwarp();\n    if (block", "if (block"),
    "a wait": ("wait<0>();", ""),
    "a slot too few": ("AROUND + 2;", "AROUND + 1;"),
    "a block that is read": ("before(slot) * SLOT", "slot * SLOT"),
    "zeros outside of the signal": ("(there, from, place.inside)", "(there, from, true)"),
    "another sign": ("one - other", "other - one"),
    "another end of the block": (
        "window.low[LEVEL][i] = window.low[LEVEL][count_at(LEVEL) + i]",
        "window.low[LEVEL][i] = window.low[LEVEL][i]",
    ),
    "a high band behind": ("if (i < R)\n", "if (i < R - 1)\n"),
    "another slot behind": ("slots + after(slot) * SLOT", "slots + slot * SLOT"),
    "dy of another block": ("others + (block + 1) % 2", "others + block % 2"),
    "the factor of a level": ("(band + 1) / 2)", "band / 2)"),
    "a segment of another signal": ("signal * length * channels", "0 * length * channels"),
}


@EMULATED
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault, monkeypatch):
    launcher = emulate(monkeypatch, cuda_jax, SMALL)
    found = plant(monkeypatch, *FAULTS[fault])

    def caught(order):
        launcher.order = order
        return misses_oracle(ALWAYS, "cuda")

    assert any(map(caught, (0, 1, 2))) and any(found)


def test_signals_reach_the_launches(monkeypatch):
    found = recorded(monkeypatch, cuda_jax)
    gpu_of(monkeypatch, "7.5", core_count=40)
    x, params, _ = Case((1000,), 4, 5, "float16", channels=48).drawn()
    run = lambda x: WTCONV[1](x, params, implementation="cuda")  # noqa: E731
    jax.eval_shape(lambda x: jax.vjp(run, x)[1](x), x)
    names, macros, numbers, blocks = zip(*found, strict=True)
    assert names == ("line_forward", "line_forward")
    assert macros[0] == macros[1]
    asked = {"DTYPE": 2, "KERNEL_SIZE": 5, "LEVELS": 4, "CHANNELS_LAST": 1, "VECTOR": 8}
    # A Turing GPU's shared memory holds the blocks of nine warps.
    assert macros[0] == {"FORWARD": 1, **asked, "RESIDENT": 9}
    # The length, the channels and the blocks of a segment: one each, since that is one wave.
    assert numbers[0] == [1000, 48, 1] and blocks[0] == 2 * 2 * 32


def test_segments_end_at_the_same_time():
    h200 = Device(shared=232448, multiprocessors=132)
    shape = 32, 16384, 256
    about = Signals(shape, "bfloat16"), 5, 5, h200
    forward, weights = (launches.planned(kernel, *about) for kernel in ("forward", "weights"))
    # Six segments of a signal are 1536 warps, of 1584 at once.
    assert (forward.span, forward.segments(shape), forward.at_once(h200)) == (86, 192, 1584)
    assert forward.shared() == 4 * 32 * 32 * 2 and weights.shared() == 6 * 32 * 32 * 2


def test_registers_are_of_the_warps_that_fit():
    h200 = Device(shared=232448, multiprocessors=132)
    signals = Signals((32, 16384, 256), "float32")
    weights = launches.planned("weights", signals, 5, 5, h200)
    assert (weights.resident, weights.at_once(h200)) == (9, 9 * 132)
    for kernel_size in (1, 3, 5, 7, 9):
        sizes = launches.search_space(kernel_size)
        about = "forward", signals, kernel_size, 5, h200
        assert len({launches.planned(*about, **size) for size in sizes}) == 2


REFUSED = {
    "float64": {"dtype": np.dtype("float64")},
    "'db2'": {"wavelet": "db2"},
    "kernels of 4": {"kernel_size": 4},
    "kernels of 11": {"kernel_size": 11},
    "6 levels, 0 to 5": {"levels": 6},
    "an empty array": {"shape": (0, 8, 4)},
    "symbolic size": {"shape": (*jax.export.symbolic_shape("b"), 8, 4)},
    "signals of 2000000000 samples": {"shape": (1, 2_000_000_000, 1)},
    "2147483648 blocks of 32 samples of 32 channels": {"shape": (2**25, 1024, 33)},
    "3-D signals, 1-D and 2-D alone": {"shape": (2, 8, 8, 8, 4)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_done_says_so(reason):
    problem = Problem((2, 8, 4), np.dtype("float32"), 5, 2, "haar")._replace(**REFUSED[reason])
    with pytest.raises(NotImplementedError, match=f"does not take .*{reason}"):
        cuda_jax.check("fwd", problem)


def test_signals_are_taken_unasked(monkeypatch):
    gpu_of(monkeypatch)
    monkeypatch.setattr(cuda_jax, "unavailable", lambda platform: None)
    problem = Problem((2, 8, 4), np.dtype("float32"), 5, 0, "haar")
    assert OPERATOR.pick("fwd", None, "gpu", problem) == "cuda"
    assert OPERATOR.pick("bwd", None, "gpu", problem._replace(kernel_size=4)) == "xla"


@pytest.mark.gpu
@pytest.mark.parametrize("case", [ALWAYS, *LONG], ids=described)
def test_signals_are_the_oracles_on_a_gpu(case):
    assert_oracle(case, "cuda")


@pytest.mark.gpu
def test_gradients_of_signals_are_bitwise_reproducible():
    assert_reproducible("cuda", LONG[0])


@pytest.mark.gpu
def test_transformations_of_signals():
    assert_transformed("cuda", WHOLE)
