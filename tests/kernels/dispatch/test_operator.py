"""The rule that picks an implementation, on operators whose implementations are stand-ins."""

import sys
from enum import StrEnum
from types import ModuleType

import pytest

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Operator, operator

pytestmark = pytest.mark.core


class Fake(StrEnum):
    FAST = "fast"
    NEAT = "neat"
    SLOW = "slow"
    BROKEN = "broken"


def implementation(unavailable=None, refuses=None, error=NotImplementedError):
    """A module of one implementation: where it cannot run, and which problems it refuses."""
    module = ModuleType("fake")

    def check(direction, problem):
        if (direction, problem) == refuses:
            raise error(f"no {direction} of {problem}")

    module.unavailable = lambda platform: unavailable if platform == "cpu" else None
    module.check = check
    return module


@pytest.fixture
def fake(monkeypatch):
    """`fast` needs a GPU, `neat` refuses the backward of "odd", `broken` cannot be imported."""
    # Those of the package are registered when they are imported, which must not be later.
    dispatch.operators()
    monkeypatch.setattr(operator, "_REGISTRY", {})
    monkeypatch.setitem(sys.modules, "fake_op", ModuleType("fake_op"))
    monkeypatch.setitem(sys.modules, "fake_op.fast", implementation("no GPU here"))
    monkeypatch.setitem(sys.modules, "fake_op.neat", implementation(refuses=("bwd", "odd")))
    monkeypatch.setitem(sys.modules, "fake_op.slow", implementation())
    monkeypatch.delenv("FLASH_WTCONV_FAKE_FWD", raising=False)
    monkeypatch.delenv("FLASH_WTCONV_FAKE_BWD", raising=False)
    rule = {"cpu": ["broken", "fast", "neat", "slow"], "gpu": ["fast", "neat", "slow"]}
    return Operator("fake", "fake_op", Fake, rule, {"fwd": (), "bwd": ()})


@pytest.mark.parametrize(
    ("choice", "direction", "platform", "problem", "want"),
    [
        (None, "fwd", "cpu", "odd", "neat"),
        (None, "bwd", "cpu", "odd", "slow"),
        (None, "fwd", "gpu", "odd", "fast"),
        (None, "fwd", "rocm", "even", "fast"),
        ("slow", "fwd", "gpu", "even", "slow"),
        (Fake.NEAT, "fwd", "gpu", "even", "neat"),
        (["slow", "neat"], "fwd", "cpu", "even", "neat"),
        (("slow", Fake.FAST), "fwd", "cpu", "even", "slow"),
        (["slow", "slow"], "fwd", "cpu", "even", "slow"),
        (["neat", "slow"], "bwd", "gpu", "odd", "slow"),
        # Last, because the rule of a GPU does not name it, and so never imported.
        (["broken", "slow"], "fwd", "gpu", "even", "slow"),
        # Measures nothing either: all there are, best first.
        ("auto", "fwd", "gpu", "even", "fast"),
        ("auto", "bwd", "cpu", "odd", "slow"),
    ],
)
def test_the_best_candidate_that_can_run(fake, choice, direction, platform, problem, want):
    assert fake.pick(direction, choice, platform, problem) == want


@pytest.mark.parametrize(
    ("value", "want"),
    [
        ("", "neat"),
        ("   ", "neat"),
        ("slow", "slow"),
        ("SLOW", "slow"),
        (" Slow ", "slow"),
        ("[slow]", "slow"),
        ("[slow, NEAT]", "neat"),
        ("fast , slow", "slow"),
        ("[ fast,slow, ]", "slow"),
        ("AUTO", "neat"),
    ],
)
def test_the_environment_is_asked_when_used(fake, monkeypatch, value, want):
    monkeypatch.setenv("FLASH_WTCONV_FAKE_FWD", value)
    assert fake.pick("fwd", None, "cpu", "even") == want
    # Of this direction alone; an argument wins over it.
    assert fake.pick("bwd", None, "cpu", "even") == "neat"
    assert fake.pick("fwd", ["neat"], "cpu", "even") == "neat"


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("none", r"implementation names \['none'\], but fake has the implementations \['fast'"),
        (["auto", "slow"], r"implementation=\['auto', 'slow'\]: 'auto' is all .* stands alone"),
        ("FAST", r"implementation names \['FAST'\]"),
        ("", r"implementation names \[''\]"),
        ([], "implementation is empty: name at least one of .*or use None"),
        (["slow", "none"], r"implementation names \['none'\]"),
        (["slow", 3], r"implementation names \[3\]"),
        (["slow", None], r"implementation names \[None\]"),
        (["slow", ["fast"]], r"implementation names \[\['fast'\]\]"),
        (3, "implementation=3: expected None, a name or a sequence of names"),
        (b"fast", "implementation=b'fast': expected None, a name"),
    ],
)
def test_a_filter_that_is_wrong(fake, choice, message):
    with pytest.raises(ValueError, match=message):
        fake.pick("fwd", choice, "cpu", "even")


@pytest.fixture
def renamed(fake):
    """`fake` with an argument for each direction, and names of algorithms."""
    aliases = {"quick": {"cpu": "neat", "gpu": "fast"}, "plain": {"cpu": "slow", "gpu": "slow"}}
    given = {"argument": "{direction}_algo", "aliases": aliases, "measures_names": True}
    return Operator("fake", "fake_op", Fake, fake.rule, fake.directions, **given)


@pytest.mark.parametrize(
    ("choice", "platform", "want"),
    [
        ("quick", "cpu", "neat"),
        ("quick", "gpu", "fast"),
        (["plain", "quick"], "cpu", "neat"),
        (["plain", Fake.SLOW], "gpu", "slow"),
    ],
)
def test_other_names_mean_an_implementation_on_each_platform(renamed, choice, platform, want):
    assert renamed.pick("fwd", choice, platform, "even") == want


def test_each_direction_has_an_argument_of_its_own(renamed, monkeypatch):
    message = r"bwd_algo names \['none'\], but .*'broken'\], also called \['quick', 'plain'\], and"
    with pytest.raises(ValueError, match=message):
        renamed.pick("bwd", "none", "cpu", "even")
    with pytest.raises(NotImplementedError, match="cpu with fwd_algo='fast' for even"):
        renamed.pick("fwd", Fake.FAST, "cpu", "even")
    with pytest.raises(NotImplementedError, match="with bwd_algo=None for odd"):
        Operator("fake", "fake_op", Fake, {"cpu": ["neat"]}, {"bwd": ()}, "{direction}_algo").pick(
            "bwd", None, "cpu", "odd"
        )
    monkeypatch.setenv("FLASH_WTCONV_FAKE_FWD", "QUICK")
    assert renamed.pick("fwd", None, "cpu", "even") == "neat"


@pytest.mark.parametrize("value", ["none", "[slow,none]", "[]", "[,]", "[auto,slow]"])
def test_an_environment_that_is_wrong_is_named(fake, monkeypatch, value):
    monkeypatch.setenv("FLASH_WTCONV_FAKE_BWD", value)
    with pytest.raises(ValueError, match="FLASH_WTCONV_FAKE_BWD"):
        fake.pick("bwd", None, "cpu", "even")


def test_when_nothing_can_run_each_says_why(fake):
    with pytest.raises(NotImplementedError) as error:
        fake.pick("bwd", ["neat", "broken", "fast"], "cpu", "odd")
    message = str(error.value)
    assert message.startswith("fake (bwd) cannot run on cpu with implementation=['neat'")
    assert " for odd: " in message
    assert "neat: no bwd of odd" in message
    assert "fast: no GPU here" in message
    assert "broken: import failed: No module named 'fake_op.broken'" in message


def test_when_the_environments_cannot_run_the_variable_is_named(fake, monkeypatch):
    monkeypatch.setenv("FLASH_WTCONV_FAKE_FWD", " Fast ")
    with pytest.raises(NotImplementedError, match="with FLASH_WTCONV_FAKE_FWD='fast' for even: "):
        fake.pick("fwd", None, "cpu", "even")


def test_one_name_never_falls_through(fake):
    with pytest.raises(NotImplementedError, match="fast: no GPU here"):
        fake.pick("fwd", "fast", "cpu", "even")


def test_a_wrong_argument_never_falls_through(fake, monkeypatch):
    strict = implementation(refuses=("fwd", "even"), error=ValueError)
    monkeypatch.setitem(sys.modules, "fake_op.neat", strict)
    with pytest.raises(ValueError, match="no fwd of even"):
        fake.pick("fwd", None, "cpu", "even")


def test_a_mistake_inside_a_module_is_not_hidden(fake, monkeypatch):
    mistaken = implementation(refuses=("fwd", "even"), error=AttributeError)
    monkeypatch.setitem(sys.modules, "fake_op.neat", mistaken)
    with pytest.raises(AttributeError):
        fake.pick("fwd", None, "cpu", "even")


def test_status_and_registry(fake):
    other = Operator("another", "fake_op", Fake, {"cpu": ["slow"]}, directions={"fwd": ()})
    assert dispatch.operators() == [other, fake]
    reasons = dict(fake.status("cpu"))
    assert list(reasons) == ["fast", "neat", "slow", "broken"]
    assert reasons["fast"] == "no GPU here"
    assert reasons["neat"] is reasons["slow"] is None
    assert "import failed" in reasons["broken"]
    assert dict(fake.status("gpu"))["fast"] is None
