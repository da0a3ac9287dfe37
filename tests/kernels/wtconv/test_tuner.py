"""WTConv chooses by measurement among what runs on a CPU: XLA's forms of it."""

import logging
import os
import socket
import subprocess
import sys
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.wtconv import arrays, assert_oracle

from flash_wtconv_jax import tune, tuning
from pallas_kernels import haar, oracle
from pallas_kernels.common import device, measurement
from pallas_kernels.haar import xla as haar_xla
from pallas_kernels.wtconv import Implementation, wtconv2d, xla
from pallas_kernels.wtconv.cases import Case
from pallas_kernels.wtconv.problem import Problem

pytestmark = pytest.mark.core

CASE = Case((6, 5), 1, 3)


@pytest.fixture
def kind():
    """The kind of device that this CPU is remembered as."""
    return measurement.JaxMeasurement(None, (), None, {}).device_kind


@pytest.mark.parametrize(
    ("form", "case"),
    [
        ({"shifted": True, "chunked": False}, CASE),
        ({"shifted": False}, Case((3, 4, 2), 1, 2, "bfloat16")),
    ],
    ids=str,
)
def test_every_form_is_the_oracle(monkeypatch, form, case):
    monkeypatch.setattr(xla, "search_space", lambda direction, problem: [form])
    with tuning("search"):
        assert_oracle(case)


def test_the_grid_offers_forms_that_differ(monkeypatch):
    problem = Problem((4, 8, 8, 4), np.dtype("float32"), 3, 1, "haar")
    assert xla.search_space("fwd", problem) == [{"shifted": True}, {"shifted": False}]
    assert xla.search_space("bwd", problem) == [{"shifted": True}]
    monkeypatch.setattr(xla, "_PART_BYTES", 1 << 10)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert len(xla.search_space("fwd", problem)) == 4
    assert xla.search_space("bwd", problem)[1] == {"shifted": True, "chunked": False}


def test_measured_once_eagerly_or_traced(measured, searches, kind):
    x, params, _ = arrays(CASE)
    want = wtconv2d(x, params)
    for implementation in (["xla"], "auto", (Implementation.XLA, "triton")):
        call = partial(wtconv2d, implementation=implementation)
        for function in (jax.jit(call), call):
            np.testing.assert_allclose(function(x, params), want, rtol=1e-5, atol=1e-5)
    # Of the backward pass there is one form.
    assert searches == ["wtconv fwd"]
    (entry,) = measured.entries(kind)
    assert entry["problem"]["shape"] == [2, 6, 5, 3]
    assert sorted(one["config"]["shifted"] for one in entry["measured"]) == [False, True]
    assert all(one["ms"] > 0 for one in entry["measured"])


@pytest.mark.wide
def test_batches_share_what_was_measured(measured, searches, kind):
    for batch, measured_as in ((4, 4), (7, 4), (5, 4), (8, 8), (1, 1)):
        x, params, _ = arrays(CASE._replace(batch=(batch,)))
        y = wtconv2d(x, params, implementation="auto")
        # The oracle, of which nothing is compiled for each batch.
        np.testing.assert_allclose(y, oracle.wtconv(x, params, 2), rtol=1e-5, atol=1e-5)
        shapes = [entry["problem"]["shape"] for entry in measured.entries(kind)]
        assert [measured_as, 6, 5, 3] in shapes
    assert len(searches) == len(shapes) == 3
    # A batch of symbolic size has no times, and one of none needs none.
    with pytest.warns(RuntimeWarning, match="symbolic size"):
        jax.export.export(jax.jit(partial(wtconv2d, implementation="auto", params=params)))(
            jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b"), 6, 5, 3), jnp.float32)
        )
    wtconv2d(x[:0], params, implementation="auto")
    assert len(searches) == 3


def test_gradients_with_what_was_measured(searches, monkeypatch):
    monkeypatch.setenv("FLASH_WTCONV_WTCONV_BWD", "auto")
    both = [{"shifted": True}, {"shifted": False}]
    monkeypatch.setattr(xla, "search_space", lambda direction, problem: both)
    assert_oracle(CASE, "auto")
    assert searches == ["wtconv fwd", "wtconv bwd"]


def test_a_form_that_is_wrong_is_disqualified(monkeypatch, caplog, searches):
    forward = xla.forward

    def wrong(*args, shifted=True, **keys):
        return forward(*args, **keys) * (1 if shifted else 2)

    monkeypatch.setattr(xla, "forward", wrong)
    x, params, _ = arrays(CASE)
    with caplog.at_level(logging.WARNING, "flash_wtconv"):
        y = wtconv2d(x, params, implementation="auto")
    assert "xla shifted=False is disqualified, an output is off" in caplog.text
    np.testing.assert_allclose(y, wtconv2d(x, params), rtol=1e-5, atol=1e-5)


def test_none_never_measures(searches):
    x, params, _ = arrays(CASE)
    for implementation in (None, "xla"):
        jax.jit(partial(wtconv2d, implementation=implementation))(x, params)
    with tuning("off"):
        wtconv2d(x, params, implementation="auto")
    with tuning("cached"):
        wtconv2d(x, params, implementation="auto")
    assert searches == []


@pytest.mark.wide
def test_float64_is_timed_as_float64(measured, kind):
    with jax.enable_x64(True):
        x, params, _ = arrays(CASE._replace(dtype="float64"))
        jax.jit(partial(wtconv2d, implementation="auto"))(x, params)
    (entry,) = measured.entries(kind)
    assert entry["problem"]["dtype"] == "float64" and "ms" in entry["measured"][1]


def test_tune_measures_what_a_jitted_step_calls(searches):
    x, params, _ = arrays(CASE)

    @jax.jit
    def step(x, params):
        return jax.grad(lambda p: wtconv2d(x, p).sum())(params)

    step(x, params)
    assert searches == []
    used = tune(step, x, params)
    assert [(entry["operator"], entry["direction"]) for entry in used] == [("wtconv", "fwd")]
    assert searches == ["wtconv fwd"]
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (x, params))
    assert tune(step, x, params) == tune(step, *shapes) == used
    wtconv2d(x, params, implementation="auto")
    assert searches == ["wtconv fwd"]


def test_the_transforms_choose_by_measurement_too(monkeypatch, measured, kind, searches):
    twin = ModuleType("triton")
    vars(twin).update({name: getattr(haar_xla, name) for name in vars(haar_xla) if name[0] != "_"})
    monkeypatch.setitem(sys.modules, "pallas_kernels.haar.triton", twin)
    x, _, _ = arrays(CASE)
    low, *details = haar.wavedec2(x, implementation="auto")
    haar.waverec2([low, *details], shape=x.shape[1:-1], implementation=["xla", "triton"])
    assert searches == ["haar fwd"]
    (entry,) = measured.entries(kind)
    assert sorted(one["implementation"] for one in entry["measured"]) == ["triton", "xla"]
    assert all("ms" in one for one in entry["measured"])


@pytest.mark.parametrize("pauses", [(), (1, 2)], ids=["nothing", "pauses"])
def test_calls_of_an_accelerator_are_timed_behind_other_work(monkeypatch, pauses):
    monkeypatch.setattr(device, "on_cpu", lambda: False)
    monkeypatch.setattr(measurement, "_PAUSE_SIZE", 256)
    monkeypatch.setattr(measurement, "_PAUSES", pauses)
    x = jax.ShapeDtypeStruct((8,), jnp.float32)
    timed = measurement.JaxMeasurement(lambda module, config: jnp.sin, (x,), None, {})
    call, calls = timed.prepared(None, ()), []

    def counted():
        calls.append(call())
        return calls[-1]

    assert timed.milliseconds(counted) > 0
    assert len(calls) > 1 and all(map(jnp.array_equal, calls, [call()] * len(calls)))


def test_ahead_of_time_the_rule_chooses():
    problem = jax.ShapeDtypeStruct((2, 6, 5, 3), jnp.float32)
    chip = jax.sharding.AbstractDevice(device_kind="abacus", num_cores=None, platform="cpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=chip)
    _, params, _ = arrays(CASE)
    with jax.sharding.use_abstract_mesh(mesh), pytest.warns(RuntimeWarning, match="ahead of time"):
        jax.eval_shape(partial(wtconv2d, implementation="auto"), problem, params)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_fastest_on_a_gpu(measured, kind, dtype):
    case = Case((56, 57), 2, 5, dtype, batch=(16,), channels=96)
    assert_oracle(case, "auto")
    entries = measured.entries(kind)
    assert [entry["direction"] for entry in entries] == ["bwd", "fwd"]
    for entry in entries:
        timed = {one["implementation"]: one["ms"] for one in entry["measured"] if "ms" in one}
        assert {"triton", "xla"} <= set(timed)
        assert timed["xla"] > min(timed.values())


TOGETHER = """
import sys
import jax
port, index, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, index)
import jax.numpy as jnp
from pathlib import Path
from pallas_kernels.dispatch import cache
from pallas_kernels.wtconv import wtconv2d, xla
store = cache.Cache(Path(folder) / str(index))
cache.user_cache = lambda: store
# Which form is the faster is for process 0 to say: the other one has a choice of one alone.
if index == 1:
    xla.search_space = lambda direction, problem: [{"nothing": "of", "the": "kind"}]
params = {"base_kernel": jnp.ones((3, 3, 1, 4)), "base_scale": jnp.ones(4)}
call = jax.jit(lambda x: wtconv2d(x, params, implementation="auto"))
print(float(call(jnp.ones((2, 6, 6, 4))).sum()), len(store.kinds()))
"""


@pytest.mark.wide
def test_processes_take_what_process_0_measured(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, port, str(index), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for index in range(2)
    ]
    told = [process.communicate(timeout=100) for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    # Both computed the same, and one of them measured.
    assert [out.split() for out, _ in told] == [["2048.0", "1"], ["2048.0", "0"]]
