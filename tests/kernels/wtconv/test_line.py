"""WTConv of signals by its CUDA kernel: run on the CPU with faults planted, traced, on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cuda import EMULATED, emulate, gpu_of
from helpers.wtconv import WTCONV, assert_oracle, assert_reproducible, assert_transformed

from pallas_kernels.common.cuda import Device, Kernel, source_text
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
    old, new = FAULTS[fault]
    launcher = emulate(monkeypatch, cuda_jax, SMALL)
    assert old in source_text(launches.SOURCE)
    monkeypatch.setattr(Kernel, "text", lambda self: source_text(self.source).replace(old, new))

    def caught(order):
        launcher.order = order
        try:
            assert_oracle(ALWAYS, "cuda")
        # The kernel's own errors come through JAX.
        except (AssertionError, RuntimeError, ValueError):
            return True
        return False

    assert any(map(caught, (0, 1, 2)))


def test_signals_reach_the_launches(monkeypatch):
    found = []

    def launch(kernel, arguments, outputs, blocks):
        numbers = [a for a in arguments if isinstance(a, int)]
        found.append((kernel.name, dict(kernel.macros), numbers, blocks))
        return [jnp.zeros(shape, dtype) for shape, dtype in outputs]

    monkeypatch.setattr(cuda_jax, "launch", launch)
    monkeypatch.setattr(cuda_jax, "unavailable", lambda platform: None)
    gpu_of(monkeypatch, "7.5", core_count=40)
    x, params, _ = Case((1000,), 4, 5, "float16", channels=48).drawn()
    run = lambda x: WTCONV[1](x, params, implementation="cuda")  # noqa: E731
    jax.eval_shape(lambda x: jax.vjp(run, x)[1](x), x)
    names, macros, numbers, blocks = zip(*found, strict=True)
    assert names == ("line_forward", "line_forward")
    assert macros[0] == macros[1]
    asked = {"DTYPE": 2, "KERNEL_SIZE": 5, "LEVELS": 4, "CHANNELS_LAST": 1, "VECTOR": 8}
    assert macros[0] == {"FORWARD": 1, **asked, "RESIDENT": 12}
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


REFUSED = {
    "float64": {"dtype": np.dtype("float64")},
    "'db2'": {"wavelet": "db2"},
    "kernels of 4": {"kernel_size": 4},
    "kernels of 11": {"kernel_size": 11},
    "6 levels, 0 to 5": {"levels": 6},
    "an empty array": {"shape": (0, 8, 4)},
    "symbolic size": {"shape": (*jax.export.symbolic_shape("b"), 8, 4)},
    "signals of 2000000000 samples": {"shape": (1, 2_000_000_000, 1)},
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
