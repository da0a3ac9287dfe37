"""The tuner, on implementations that are stand-ins and a clock that is told what to show."""

import io
import logging
import os
import re
import signal
import sys
import time
from enum import StrEnum
from types import ModuleType
from typing import NamedTuple

import numpy as np
import pytest
from rich.console import Console

from pallas_kernels.dispatch import Candidate, Operator, cache, forget, operator, tuner, tuning
from pallas_kernels.dispatch.tuner import recorded

pytestmark = pytest.mark.core

RIGHT = np.arange(1.0, 5.0, dtype=np.float32)


class Fake(StrEnum):
    ONE = "one"
    TWO = "two"
    GPU = "gpu"


class Problem(NamedTuple):
    shape: tuple = (4, 4)
    dtype: np.dtype = np.dtype("float32")

    def measured_as(self):
        return self


class Measurement:
    """Runs `module.result(**config)`, which takes `module.ms(**config)` milliseconds."""

    device_kind = "abacus"
    why_not = None
    interpreted = None

    def __init__(self, **static):
        self.static, self.versions = static, {"abacus": "1"}
        self.runs = []

    def from_process_0(self, question, answer):
        return answer()

    def untimeable(self):
        return self.why_not

    def interpreting(self, names):
        return self.interpreted in names

    def untraced(self, search):
        return search

    def prepared(self, module, config):
        def call():
            return module.result(**dict(config))

        call.of = module, config
        return call

    def milliseconds(self, call):
        module, config = call.of
        self.runs.append(Candidate(module.__name__, config))
        return module.ms(**dict(config))

    def arrays(self, result):
        return [("float32", result)]

    def reference(self):
        return [("float32", RIGHT)]


@pytest.fixture
def fake(monkeypatch):
    """`one` has two block sizes, `two` one form, `gpu` needs what is not here."""
    monkeypatch.setattr(operator, "_REGISTRY", {})
    monkeypatch.setitem(sys.modules, "fake_op", ModuleType("fake_op"))
    for name in Fake:
        module = ModuleType(str(name))
        module.unavailable = lambda platform, n=name: "no GPU" if n == "gpu" else None
        module.check = lambda direction, problem: None
        module.result = lambda **config: RIGHT * 1.001
        module.ms = lambda **config: 2.0
        monkeypatch.setitem(sys.modules, f"fake_op.{name}", module)
    one = sys.modules["fake_op.one"]
    one.search_space = lambda direction, problem: [{"block": 8}, {"block": 16}]
    one.ms = lambda block=8: 12.0 / block
    monkeypatch.delenv("FLASH_WTCONV_FAKE_FWD", raising=False)
    return Operator("fake", "fake_op", Fake, {"cpu": ["two", "one"]}, {"fwd": (), "bwd": ()})


@pytest.fixture
def choose(fake):
    measurement = Measurement()

    def choose(implementation="auto", direction="fwd", problem=None, measurement=measurement):
        problem = problem or Problem()
        return fake.request(direction, implementation, "cpu").choose(problem, lambda: measurement)

    choose.measurement = measurement
    return choose


BEST = Candidate("one", (("block", 16),))


@pytest.mark.parametrize("choice", ["auto", ["two", Fake.ONE], ("one", "two", "gpu"), ["one"]])
def test_the_fastest_of_a_filter_with_its_parameters(choose, choice):
    assert choose(choice) == BEST
    runs = len(choose.measurement.runs)
    assert runs > 0
    assert choose(choice) == BEST
    assert len(choose.measurement.runs) == runs


@pytest.mark.parametrize("choice", [None, "one", "two"])
def test_none_and_a_name_never_measure(choose, choice):
    assert choose(choice) == Candidate(choice or "two")
    assert choose.measurement.runs == []


def test_a_name_measures_where_the_operator_says_so(fake, choose, monkeypatch):
    """Its own parameters, once; where nothing can be timed it takes the first, and says nothing."""
    given = fake.rule, fake.directions, "implementation", {"uno": {"cpu": "one"}}, True
    named, runs = Operator("fake", "fake_op", Fake, *given), choose.measurement.runs

    def chosen(choice):
        request = named.request("fwd", choice, "cpu")
        return request.choose(Problem(), lambda: choose.measurement)

    assert chosen(None) == Candidate("two") and not runs
    with tuning("off"):
        assert chosen("one") == Candidate("one") and not runs
    monkeypatch.setattr(choose.measurement, "why_not", "no device")
    assert chosen("uno") == Candidate("one") and not runs
    monkeypatch.setattr(choose.measurement, "why_not", None)
    operator.forget()
    monkeypatch.setattr(choose.measurement, "interpreted", "one")
    assert chosen("uno") == Candidate("one") and not runs
    monkeypatch.setattr(choose.measurement, "interpreted", "two")
    operator.forget()
    assert chosen("uno") == chosen("one") == BEST
    assert {run.implementation for run in runs} == {"one"}
    measured = len(runs)
    assert chosen(Fake.ONE) == BEST and chosen("two") == Candidate("two")
    assert len(runs) == measured


def test_one_candidate_needs_no_clock(choose):
    assert choose(["two", "gpu"]) == Candidate("two")
    assert choose.measurement.runs == []


def test_the_environment_may_say_auto(choose, monkeypatch):
    monkeypatch.setenv("FLASH_WTCONV_FAKE_FWD", " Auto ")
    assert choose(None) == BEST
    assert choose("two") == choose(None, "bwd") == Candidate("two")
    monkeypatch.setenv("FLASH_WTCONV_FAKE_FWD", "[one, two]")
    assert choose(None) == BEST


def test_a_smaller_filter_is_answered_from_what_was_measured(choose):
    choose("auto")
    runs = len(choose.measurement.runs)
    assert choose(["two", "gpu"]) == Candidate("two")
    assert choose(["one"]) == BEST
    assert len(choose.measurement.runs) == runs


@pytest.mark.parametrize(
    "other",
    [
        {"direction": "bwd"},
        {"problem": Problem((4, 5))},
        {"problem": Problem(dtype=np.dtype("float64"))},
        {"measurement": Measurement(bias=True)},
    ],
)
def test_each_key_is_measured_apart(choose, measured, other):
    choose()
    choose(**other)
    assert len(measured.entries("abacus")) == 2


def test_modes(choose):
    runs = choose.measurement.runs
    with tuning("off"):
        assert choose("auto") == choose(["one", "two"]) == Candidate("two")
    with tuning("cached"):
        assert choose("auto") == choose(None) == Candidate("two")
        assert choose("one") == Candidate("one")
    assert runs == []
    with tuning("search"):
        assert choose("one") == BEST
        assert choose(None) == BEST
    with tuning("cached"):
        assert choose("one") == choose(None) == BEST
        with tuning("off"):
            assert choose(None) == Candidate("two")
    assert choose(None) == Candidate("two")
    with pytest.raises(ValueError, match=r"tuning\('on'\): expected one of \['off', 'cached'"):
        tuning("on").__enter__()


def test_what_fails_is_recorded_and_skipped(fake, choose, measured, caplog):
    def broken(**config):
        raise RuntimeError("out of shared memory\nand a long story")

    fake.module("one").result = broken
    with caplog.at_level(logging.INFO, "flash_wtconv"):
        assert choose() == Candidate("two")
    assert "one block=8 cannot run: RuntimeError: out of shared memory" in caplog.text
    (entry,) = measured.entries("abacus")
    assert [one.get("failed") for one in entry["measured"]] == [
        None,
        *["RuntimeError: out of shared memory"] * 2,
    ]
    assert choose() == Candidate("two")


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (RIGHT * 0, "an output is zero"),
        (RIGHT * np.nan, "an output is not finite"),
        (RIGHT + np.float32([0, 0, 0, np.inf]), "an output is not finite"),
        (RIGHT * 1.1, "an output is off by 0.4, its largest is 4"),
        (RIGHT[:2], r"an output has shape \(2,\), expected \(4,\)"),
    ],
)
def test_what_is_wrong_is_disqualified_and_reported(fake, choose, measured, caplog, result, reason):
    fake.module("one").result = lambda block: result if block == 16 else RIGHT
    assert choose() == Candidate("one", (("block", 8),))
    slow, told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert slow == "timing fake fwd: 3 candidates; only the first run is slow"
    assert told.startswith("fake fwd: one block=16 is disqualified, an output")
    assert re.search(reason, told)
    (entry,) = measured.entries("abacus")
    assert entry["measured"][-1]["failed"] in told


def test_when_nothing_can_be_timed_the_rule_chooses(fake, choose, measured):
    for name in ("one", "two"):
        fake.module(name).result = lambda **config: RIGHT * 0
    with pytest.warns(RuntimeWarning, match="no implementation could be timed: .*output is zero"):
        assert choose() == Candidate("two")
    # Nor is it tried again, in this process.
    for name in ("one", "two"):
        fake.module(name).result = None
    assert choose() == Candidate("two")
    assert choose(["one"]) == Candidate("one")


@pytest.mark.parametrize(
    ("why_not", "problem", "message"),
    [
        ("no device", Problem(), "fake fwd cannot be timed here: no device; the"),
        (None, Problem(("n", 4)), "of symbolic size have no values"),
    ],
)
def test_where_nothing_can_be_timed(choose, monkeypatch, why_not, problem, message):
    monkeypatch.setattr(choose.measurement, "why_not", why_not)
    with pytest.warns(RuntimeWarning, match=message):
        assert choose(problem=problem) == Candidate("two")
    assert choose.measurement.runs == []


def test_what_is_empty_needs_no_clock(choose):
    assert choose(problem=Problem((0, 4))) == Candidate("two")
    assert choose.measurement.runs == []


def test_ties_are_timed_again_and_the_hopeless_are_not(fake, choose):
    runs = choose.measurement.runs
    times = iter([1.0, 1.02, 5.0])
    fake.module("one").ms = lambda block: next(times, {8: 1.02, 16: 1.0}[block])
    fake.module("two").ms = lambda: 50.0
    assert choose() == BEST
    assert runs.count(Candidate("two")) == 1
    assert runs.count(BEST) > 10


def test_parameters_that_are_tuples_survive_the_file(fake, choose, measured):
    fake.module("one").search_space = lambda direction, problem: [{"block": (8, 16)}]
    fake.module("one").ms = lambda block: 1.0
    want = Candidate("one", (("block", (8, 16)),))
    assert choose() == want
    kept = cache.loaded(cache.dumped({"abacus": measured.entries("abacus")}))
    measured.clear()
    measured.put("abacus", kept["abacus"])
    runs = len(choose.measurement.runs)
    assert choose() == want
    assert len(choose.measurement.runs) == runs


@pytest.mark.parametrize(
    "config", [{"shift": True}, {}, {"block": [8, [9]]}, {"block": {"of": 8}}], ids=str
)
def test_parameters_that_are_not_offered_are_measured_anew(choose, measured, config):
    choose()
    (kept,) = measured.entries("abacus")
    (row,) = [one for one in kept["measured"] if one["config"] == {"block": 16}]
    row |= {"config": config, "ms": 1e-3}
    forget()
    told = "what was measured of fake fwd does not count, one offers other parameters now"
    with tuning("cached"), pytest.warns(RuntimeWarning, match=told) as warned:
        assert choose() == Candidate("two")
    with pytest.warns(RuntimeWarning, match=told) as again:
        assert choose() == BEST
    assert len(warned) == len(again) == 1
    # From then on it is known.
    runs = len(choose.measurement.runs)
    forget()
    assert choose() == BEST
    assert len(choose.measurement.runs) == runs


def test_what_is_offered_no_more_does_not_count_and_the_rest_does(fake, choose):
    choose()
    runs = len(choose.measurement.runs)
    forget()
    fake.module("one").search_space = lambda direction, problem: [{"block": 8}]
    with recorded() as used:
        assert choose() == Candidate("one", (("block", 8),))
    assert [one["config"] for one in used[0]["measured"]] == [{"block": 8}, {}]
    assert len(choose.measurement.runs) == runs


def test_one_line_says_who_won_and_by_how_much(choose, caplog):
    with caplog.at_level(logging.INFO, "flash_wtconv"):
        choose()
    assert caplog.records[-1].getMessage() == (
        "fake fwd: one block=16 takes 0.75 ms, 2.00 times faster than one block=8, best of 3"
    )


@pytest.mark.parametrize(
    ("choice", "level"), [("auto", "INFO"), (["two", "gpu"], "WARNING"), ("[two, gpu]", "WARNING")]
)
def test_what_is_left_out_is_logged_once(choose, choice, level, caplog, monkeypatch):
    if choice == "[two, gpu]":
        monkeypatch.setenv("FLASH_WTCONV_FAKE_FWD", choice)
        choice = None
    with caplog.at_level(logging.INFO, "flash_wtconv"):
        choose(choice), choose(choice)
    (record,) = [r for r in caplog.records if "left out" in r.getMessage()]
    assert record.levelname == level
    assert record.getMessage().startswith("fake fwd: gpu is left out of ")
    assert record.getMessage().endswith(", no GPU")


def test_a_variable_is_tuning_for_the_process(choose, monkeypatch):
    monkeypatch.setenv("FLASH_WTCONV_TUNING", "off")
    assert choose() == Candidate("two")
    with tuning("search"):
        assert choose(None) == BEST
    monkeypatch.setenv("FLASH_WTCONV_TUNING", "cached")
    assert choose(None) == BEST
    monkeypatch.setenv("FLASH_WTCONV_TUNING", "Search")
    assert choose(None, direction="bwd") == BEST
    monkeypatch.setenv("FLASH_WTCONV_TUNING", "sometimes")
    expected = r"FLASH_WTCONV_TUNING='sometimes': expected one of \['off', 'cached', 'search'\]"
    with pytest.raises(ValueError, match=expected):
        choose()


def test_recorded_names_the_entries_in_use(choose):
    with recorded() as used:
        choose(), choose(), choose(direction="bwd")
    assert [entry["direction"] for entry in used] == ["fwd", "bwd"]
    choose(problem=Problem((9, 9)))
    assert len(used) == 2


def test_an_interrupt_ends_the_search_after_the_run_that_is_under_way(choose, monkeypatch):
    search, milliseconds, runs = tuner._search, choose.measurement.milliseconds, []

    def watched(*arguments):
        def interrupted(call):
            runs.append(call)
            os.kill(os.getpid(), signal.SIGINT)
            # The main thread has the signal, and asks this one to stop.
            assert arguments[-1].wait(10)
            return milliseconds(call)

        monkeypatch.setattr(choose.measurement, "milliseconds", interrupted)
        return search(*arguments)

    monkeypatch.setattr(tuner, "_search", watched)
    # A shell starts what goes on in the background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            choose()
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(runs) == 1
    # Nothing was kept, and the next call measures.
    monkeypatch.setattr(tuner, "_search", search)
    monkeypatch.setattr(choose.measurement, "milliseconds", milliseconds)
    assert choose() == BEST


@pytest.mark.parametrize(("patience", "shown"), [(0.0, True), (60.0, False)])
def test_a_long_search_shows_a_bar_on_a_terminal(choose, monkeypatch, patience, shown):
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, force_interactive=True, width=80)
    monkeypatch.setattr("rich.console.Console", lambda stderr: console)
    monkeypatch.setattr(tuner, "_PATIENCE_S", patience)
    prepared = choose.measurement.prepared

    def slowly(module, config):
        time.sleep(0.1)
        return prepared(module, config)

    monkeypatch.setattr(choose.measurement, "prepared", slowly)
    choose()
    assert ("timing fake fwd" in terminal.getvalue()) is shown
    assert bool(terminal.getvalue()) is shown


def test_what_one_process_chose_all_take(choose, monkeypatch):
    asked = []

    def from_process_0(question, answer):
        asked.append(question)
        return '["two", [["block", 32]]]' if len(asked) < 3 else "null"

    monkeypatch.setattr(choose.measurement, "from_process_0", from_process_0)
    theirs = Candidate("two", (("block", 32),))
    assert choose("auto") == choose(["one", "two"]) == theirs
    with tuning("search"):
        assert choose("auto") == Candidate("two")
    assert choose.measurement.runs == []
    # Each filter and each mode is a question of its own, in which the order of names is none.
    assert len(set(asked)) == 2
