"""Tables of what is the fastest on a kind of device: looked up, written, and those kept here."""

import json
import sys
from enum import StrEnum
from types import ModuleType
from typing import NamedTuple

import pytest

from pallas_kernels.dispatch import Operator, operator, table

pytestmark = pytest.mark.core

ABACUS = "Abacus 3000 (PCIe)"


class Fake(StrEnum):
    FAST = "fast"
    NEAT = "neat"
    SLOW = "slow"


class Problem(NamedTuple):
    shape: tuple
    dtype: str
    kernel_size: int
    wavelet: str = "haar"


IMAGE = Problem((8, 64, 64, 32), "float32", 5)


def entry(implementation, problem=IMAGE, direction="fwd", name="fake"):
    return {
        "operator": name,
        "direction": direction,
        "implementation": implementation,
        "problem": problem._asdict(),
        "ms": {implementation: 1.0},
        "date": "2026-11-21",
        "versions": {},
    }


@pytest.fixture
def write(monkeypatch, tmp_path):
    """Writes entries into the table of the abacus, in a folder of the test's own."""
    monkeypatch.setattr(table, "FOLDER", tmp_path)

    def write(*entries):
        table.path(ABACUS).write_text(table.merged(ABACUS, entries))
        table.entries.cache_clear()

    table.entries.cache_clear()
    yield write
    table.entries.cache_clear()


def fastest(problem, direction="fwd", name="fake"):
    return table.fastest(name, direction, problem, ABACUS)


def test_without_a_table_nothing_is_known(write):
    assert fastest(IMAGE) is None
    write()
    assert fastest(IMAGE) is None


def test_only_the_same_operator_direction_and_dtype_compare(write):
    write(entry("neat"))
    assert fastest(IMAGE) == "neat"
    assert fastest(IMAGE, direction="bwd") is None
    assert fastest(IMAGE, name="other") is None
    assert fastest(IMAGE._replace(dtype="bfloat16")) is None
    assert fastest(IMAGE._replace(shape=(8, 64, 32))) is None
    # The batch and the wavelet do not count; a symbolic size cannot.
    assert fastest(IMAGE._replace(shape=(0, 64, 64, 32), wavelet="db2")) == "neat"
    assert fastest(IMAGE._replace(shape=("n", 64, 64, 32))) is None


@pytest.mark.parametrize(
    ("call", "want"),
    [
        (IMAGE, "neat"),
        (IMAGE._replace(shape=(1, 40, 90, 31)), "neat"),
        (IMAGE._replace(shape=(8, 7, 7, 1024)), "slow"),
        (IMAGE._replace(shape=(8, 4096, 4096, 3)), "neat"),
        (IMAGE._replace(kernel_size=9), "fast"),
        (IMAGE._replace(kernel_size=6), "neat"),
    ],
)
def test_the_nearest_problem_decides(write, call, want):
    write(
        entry("neat"),
        entry("slow", IMAGE._replace(shape=(8, 8, 8, 512))),
        entry("fast", IMAGE._replace(kernel_size=9)),
    )
    assert fastest(call) == want


def test_new_entries_replace_those_of_their_problem(write):
    write(entry("neat"), entry("slow", direction="bwd"))
    write(entry("fast"), entry("neat", IMAGE._replace(dtype="bfloat16")))
    text = json.loads(table.path(ABACUS).read_text())
    assert table.path(ABACUS).name == "abacus_3000_pcie.json"
    assert text["device_kind"] == ABACUS
    found = {(e["direction"], e["problem"]["dtype"]): e["implementation"] for e in text["entries"]}
    assert found == {
        ("fwd", "float32"): "fast",
        ("fwd", "bfloat16"): "neat",
        ("bwd", "float32"): "slow",
    }


@pytest.fixture
def fake(monkeypatch):
    """An operator of three implementations, of which `slow` refuses the backward."""

    def implementation(refuses=None):
        module = ModuleType("fake")

        def check(direction, problem):
            if direction == refuses:
                raise NotImplementedError(f"no {direction}")

        module.unavailable = lambda platform: None
        module.check = check
        return module

    monkeypatch.setattr(operator, "_REGISTRY", {})
    monkeypatch.setitem(sys.modules, "fake_op", ModuleType("fake_op"))
    monkeypatch.setitem(sys.modules, "fake_op.fast", implementation())
    monkeypatch.setitem(sys.modules, "fake_op.neat", implementation())
    monkeypatch.setitem(sys.modules, "fake_op.slow", implementation(refuses="bwd"))
    monkeypatch.delenv("FLASH_WTCONV_FAKE_FWD", raising=False)
    return Operator("fake", "fake_op", Fake, {"cpu": ["fast", "neat", "slow"]})


def test_what_was_measured_goes_before_the_rule(write, fake):
    write(entry("slow"), entry("slow", direction="bwd"), entry("gone", IMAGE._replace(dtype="f2")))

    def pick(direction, choice=None, problem=IMAGE, kind=ABACUS):
        return fake.pick(direction, choice, "cpu", problem, kind)

    assert pick("fwd") == "slow"
    assert pick("fwd", kind="NVIDIA H200") == pick("fwd", kind=None) == "fast"
    # What cannot run, or is no more, is passed over.
    assert pick("bwd") == "fast"
    assert pick("fwd", problem=IMAGE._replace(dtype="f2")) == "fast"
    # A filter is one still, and of several the measured one is the best.
    assert pick("fwd", "neat") == "neat"
    assert pick("fwd", ["fast", "neat"]) == "fast"
    assert pick("fwd", ["fast", "slow"]) == "slow"


def test_the_environment_goes_before_the_table(write, fake, monkeypatch):
    write(entry("slow"))
    monkeypatch.setenv("FLASH_WTCONV_FAKE_FWD", "neat")
    assert fake.pick("fwd", None, "cpu", IMAGE, ABACUS) == "neat"


def test_the_tables_kept_here_are_of_today():
    """They name operators, problems and implementations that exist."""
    from pallas_kernels.haar import api as haar
    from pallas_kernels.wtconv import api as wtconv

    known = {api.OPERATOR.name: api for api in (haar, wtconv)}
    for path in table.FOLDER.glob("*.json"):
        kept = json.loads(path.read_text())
        assert table.path(kept["device_kind"]) == path
        assert kept["entries"]
        for entry in kept["entries"]:
            api = known[entry["operator"]]
            assert entry["direction"] in api.OPERATOR.directions
            assert set(entry["problem"]) == set(api.Problem._fields)
            assert entry["ms"][entry["implementation"]] == min(entry["ms"].values())
            assert set(entry["ms"]) <= set(api.Implementation)
