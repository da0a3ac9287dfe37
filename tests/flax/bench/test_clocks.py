"""Clocks of benchmarks, on traces made up here; a test on a GPU reads a real one."""

import threading

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from flash_wtconv_jax.bench import clocks, roofline, timing
from flash_wtconv_jax.bench.clocks import DeviceEvents, Event, HostClock
from flash_wtconv_jax.bench.timing import Spread
from pallas_kernels.common import device

NAMES = {1: "mark", 2: "one", 3: "two"}


def lines(**by_name):
    """Lines of a plane as protocol text: triples of a name's number, start and duration in ns."""
    text = ""
    for number, (name, events) in enumerate(by_name.items()):
        text += f'lines {{ id: {number} name: "{name.replace("_", " #")}" timestamp_ns: 100\n'
        for kind, start, duration in events:
            text += f"events {{ metadata_id: {kind} offset_ps: {start}000 "
            text += f"duration_ps: {duration}000 }}\n"
        text += "}\n"
    for number, name in NAMES.items():
        text += f'event_metadata {{ key: {number} value {{ id: {number} name: "{name}" }} }}\n'
    return text


def profile(**planes):
    text = "".join(
        f'planes {{ id: {i} name: "{name}"\n{body}}}\n'
        for i, (name, body) in enumerate(planes.items())
    )
    return ProfileData.from_serialized_xspace(ProfileData.text_proto_to_serialized_xspace(text))


@pytest.mark.core
def test_calls_are_told_apart_by_the_marks():
    gpu = lines(
        **{
            # A kernel before the first mark, then a call of two kernels with a gap.
            "Stream_7(Compute)": [(2, 0, 5), (1, 10, 90), (2, 110, 10), (3, 130, 20), (1, 300, 90)],
            # Of the second call, whose copy on another stream outlasts its kernel.
            "Stream_8(MemcpyD2D)": [(2, 410, 40)],
            "Stream_9(Compute)": [(3, 400, 20)],
            "XLA Ops": [(3, 600, 99)],
        }
    )
    host = lines(python=[(1, 0, 1), (2, 700, 1)])
    traced = clocks._events(profile(**{"/device:GPU:0": gpu, "/host:CPU": host}))
    assert traced[:2] == [Event("one", 100.0, 105.0), Event("mark", 110.0, 200.0)]
    assert [event.name for event in traced] == ["one", "mark", "one", "two", "mark", "two", "one"]
    assert clocks._spans(traced, "mark") == pytest.approx([40e-6, 50e-6])


def test_contenders_take_turns(monkeypatch):
    monkeypatch.setattr(timing, "_REST_S", 0.0)
    monkeypatch.setattr(timing, "_TURN_S", 0.0)
    order = []
    times = timing.take_turns({name: lambda n=name: order.append(n) for name in "ab"})
    assert set(times) == {"a", "b"}
    turn = 1 + timing._CALLS
    assert order == (["a"] * turn + ["b"] * turn) * timing._ROUNDS


@pytest.fixture
def gpu(monkeypatch):
    """The clock of a made-up GPU; what is enqueued there takes as long as it says."""
    trace, now = [], [0.0]

    def enqueue(name, milliseconds):
        trace.append(Event(name, now[0], now[0] + milliseconds * 1e6))
        now[0] += (milliseconds + 1.0) * 1e6

    def traced(run):
        trace.clear()
        run()
        return list(trace) or [Event("mark", 0.0, 1.0), Event("small", 1.0, 1.5)]

    monkeypatch.setattr(clocks, "_PAUSE_BYTES", 2**10)
    monkeypatch.setattr(clocks, "traced", traced)
    clock = DeviceEvents()
    monkeypatch.setattr(clock, "_pause", lambda: enqueue("mark", 0.5))
    return clock, enqueue


def test_device_events_take_turns(gpu):
    clock, enqueue = gpu
    lasts = iter([7.0, *(1.0 + i for i in range(1 + clocks._ROUNDS))])

    def several():
        enqueue("one", 3.0)
        enqueue("two", 2.0)

    steps = []
    contenders = {"growing": lambda: enqueue("one", next(lasts)), "several": several}
    times = clock.take_turns(contenders, lambda: steps.append(1))
    # The warm-up and the first round do not count, the millisecond between two kernels does.
    assert times["growing"] == Spread(11.5, 2.0, 21.0)
    assert times["several"] == Spread(6.0, 6.0, 6.0)
    assert len(steps) == clock.turns(2)


def test_a_call_that_the_trace_does_not_show(gpu):
    clock, enqueue = gpu
    with pytest.raises(RuntimeError, match=r"shows 0 of 21 calls of \['nothing'\]"):
        clock.take_turns({"nothing": lambda: None}, lambda: None)


def test_without_events_of_a_gpu_the_host_is_asked(monkeypatch):
    monkeypatch.setattr(clocks, "_PAUSE_BYTES", 2**10)
    assert clocks.best()[1] is None
    monkeypatch.setattr(device, "platform", lambda: "gpu")
    # The profiler runs, and shows what a CPU did.
    clock, why_not = clocks.best()
    assert clock.name == "host" and "shows no event of the GPU" in why_not


def test_both_roofs_are_work_over_time(monkeypatch):
    monkeypatch.setattr(roofline, "_COPIED_BYTES_CPU", 2**10)
    monkeypatch.setattr(roofline, "_VALUES_CPU", 2**5)
    times = {"copy": Spread(2.0, 1.0, 3.0), "sums": Spread(4.0, 1.0, 9.0)}

    def take_turns(self, contenders, on_turn):
        pairs = [(1, 1 + i) for i in range(4)]
        for _ in range(128):
            pairs = [(b, a + b) for a, b in pairs]
        assert contenders["sums"]().mean() == pytest.approx(sum(a - b for a, b in pairs))
        assert contenders["copy"]().sum() == -(2**8)
        return times

    monkeypatch.setattr(HostClock, "take_turns", take_turns)
    assert roofline.measure(HostClock()) == {
        "copy_bytes_per_s": pytest.approx(2 * 2**10 / 2e-3),
        "fma_per_s": pytest.approx(2**5 * 512 / 4e-3),
    }


@pytest.mark.gpu
def test_a_gpu_shows_its_events():
    clock, why_not = clocks.best()
    assert (clock.name, why_not) == ("device events", None)
    x = jnp.ones((2048, 2048))
    once = jax.jit(jnp.dot).lower(x, x).compile()
    chain = jax.jit(lambda x: jnp.sort(x @ x @ x)).lower(x).compile()
    calls = {"one kernel": lambda: once(x, x), "several": lambda: chain(x)}
    for spread in clock.take_turns(calls, lambda: None).values():
        assert 0.0 < spread.least <= spread.median <= spread.greatest < 1e3
    measured = roofline.measure(clock)
    assert all(1e10 < rate < 1e15 for rate in measured.values())


def test_what_xla_chooses_by_time_is_compiled_first_and_by_no_thread():
    order = []

    class Program:
        def __init__(self, text):
            self.text = text

        def as_text(self):
            return self.text

        def compile(self):
            order.append((self.text, threading.current_thread() is threading.main_thread()))
            return self.text

    texts = ["stablehlo.add", "stablehlo.convolution", "stablehlo.sine", "stablehlo.dot_general"]
    assert clocks.compiled({text: Program(text) for text in texts}) == {
        text: text for text in texts
    }
    assert order[:2] == [(texts[1], True), (texts[3], True)]
    assert sorted(order[2:]) == [(texts[0], False), (texts[2], False)]
