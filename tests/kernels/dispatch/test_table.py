"""Tables of what is the fastest on a kind of device: looked up, written, and those kept here."""

import json
import sys
from collections import ChainMap
from enum import StrEnum
from importlib import import_module
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from flash_wtconv_jax.bench.defaults import NEARLY, QUICK
from pallas_kernels.common import device
from pallas_kernels.conv2d import api as conv2d
from pallas_kernels.conv2d.problem import Problem, Window
from pallas_kernels.dispatch import Operator, operator, table
from pallas_kernels.stylize.convolution.api import PARTS

pytestmark = pytest.mark.core

ABACUS = "Abacus 3000 (PCIe)"


class Fake(StrEnum):
    FAST = "fast"
    NEAT = "neat"
    SLOW = "slow"


IMAGE = Problem((8, 64, 64, 32), "float32", 5, 5, 32, Window(), "float32")


def entry(implementation, problem=IMAGE, direction="fwd", name="fake"):
    window = {"stride": list(problem.window.stride), "groups": problem.window.groups}
    return {
        "operator": name,
        "direction": direction,
        "implementation": implementation,
        "problem": problem._asdict() | {"window": window},
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
        table.fastest.cache_clear()

    table.fastest.cache_clear()
    yield write
    table.fastest.cache_clear()


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
    # Of what is nested everything counts that the entry tells.
    for window in (Window(stride=(2, 1)), Window(groups=2)):
        assert fastest(IMAGE._replace(window=window)) is None
    assert fastest(IMAGE._replace(window=Window(pads=((1, 1), (1, 1))))) == "neat"
    # An entry from before there was upsampling tells of images as they are.
    assert fastest(IMAGE._replace(window=Window(upsample=2))) is None
    # The batch and the output's dtype do not count; a symbolic size cannot.
    assert fastest(IMAGE._replace(shape=(0, 64, 64, 32), out_dtype="float16")) == "neat"
    for symbolic in ({"shape": ("n", 64, 64, 32)}, {"features": "n"}):
        assert fastest(IMAGE._replace(**symbolic)) is None


def test_either_dtype_of_16_bits_says_who_is_fast_in_the_other(write):
    half = IMAGE._replace(dtype="float16")
    write(entry("wide"), entry("brain", IMAGE._replace(dtype="bfloat16")))
    assert (fastest(IMAGE), fastest(half)) == ("wide", "brain")
    write(entry("brain", IMAGE._replace(dtype="bfloat16")), entry("half", half))
    assert fastest(half) == "half"


@pytest.mark.parametrize(
    ("call", "want"),
    [
        (IMAGE, "neat"),
        (IMAGE._replace(shape=(1, 40, 90, 31)), "neat"),
        (IMAGE._replace(shape=(8, 7, 7, 1024)), "slow"),
        (IMAGE._replace(shape=(8, 4096, 4096, 3)), "neat"),
        (IMAGE._replace(kernel_height=9), "fast"),
        (IMAGE._replace(kernel_width=6), "neat"),
        # Features by their ratio, as channels: otherwise these 20 more would outdo all else.
        (IMAGE._replace(shape=(8, 8, 8, 512), features=52), "slow"),
        (IMAGE._replace(features=4096), "many"),
        (IMAGE._replace(window=Window(groups=2)), "apart"),
    ],
)
def test_the_nearest_problem_decides(write, call, want):
    write(
        entry("neat"),
        entry("slow", IMAGE._replace(shape=(8, 8, 8, 512))),
        entry("fast", IMAGE._replace(kernel_height=9)),
        entry("many", IMAGE._replace(features=1024)),
        entry("apart", IMAGE._replace(shape=(1, 1, 1, 1), window=Window(groups=2))),
    )
    assert fastest(call) == want


@pytest.mark.parametrize(
    "damage",
    [
        {"ms": {"fast": "1"}},
        {"ms": {"neat": 1.0}},
        {"ms": None},
        {"implementation": ["fast"]},
        {"problem": {"shape": [8, 64, 64, 32]}},
        {"problem": {"shape": None, "dtype": "float32"}},
        {"problem": {"shape": [8, "64", 64, 32], "dtype": "float32"}},
    ],
    ids=str,
)
def test_entries_without_a_time_or_a_problem_do_not_count(write, damage):
    kept = {"device_kind": ABACUS, "entries": [entry("neat"), entry("fast") | damage]}
    table.path(ABACUS).write_text(json.dumps(kept))
    with pytest.warns(RuntimeWarning, match="is not used: an entry.*; the rule") as told:
        assert fastest(IMAGE) is None
    assert len(told) == 1


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"entries": 1}', '{"entries": [1]}', "[" * 10**5, "\xff"], ids=repr
)
def test_a_table_that_cannot_be_read_is_none(write, text):
    table.path(ABACUS).write_bytes(text.encode("latin-1"))
    with pytest.warns(RuntimeWarning, match="abacus_3000_pcie.json is not used: .*; the rule"):
        assert fastest(IMAGE) is None


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
    return Operator(
        "fake", "fake_op", Fake, {"cpu": ["fast", "neat", "slow"]}, {"fwd": (), "bwd": ()}
    )


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


def test_a_problem_that_other_kernels_compute_goes_by_the_rule(write, fake):
    write(entry("slow"))
    told = []

    def as_measured(direction, problem):
        told.append((direction, problem))
        return problem == IMAGE

    sys.modules["fake_op.slow"].as_measured = as_measured
    other = IMAGE._replace(kernel_height=3)
    assert fake.pick("fwd", None, "cpu", IMAGE, ABACUS) == "slow"
    assert fake.pick("fwd", None, "cpu", other, ABACUS) == "fast"
    assert told == [("fwd", IMAGE), ("fwd", other)]


def test_a_module_that_cannot_be_imported_is_refused_and_no_error(write, fake, monkeypatch):
    write(entry("slow"))
    monkeypatch.setitem(sys.modules, "fake_op.slow", None)
    assert fake.pick("fwd", None, "cpu", IMAGE, ABACUS) == "fast"


TOLD = "operator", "direction", "implementation"


def test_a_device_of_the_same_chip_goes_by_its_table_where_its_own_has_nothing(write, monkeypatch):
    write(entry("slow"), entry("slow", direction="bwd"), entry("slow", name="other"))
    monkeypatch.setattr(table, "ALIKE", {"Abacus 3": ABACUS})
    assert table.entries("Abacus 300") == table.entries(ABACUS) != ()
    assert table.entries("Abacus 2") == ()
    assert json.loads(table.merged("Abacus 300", []))["entries"] == []
    table.path("Abacus 300").write_text(table.merged("Abacus 300", [entry("neat")]))
    kept = [tuple(map(one.get, TOLD)) for one in table.entries("Abacus 300")]
    assert kept == [("fake", "fwd", "neat"), ("fake", "bwd", "slow"), ("other", "fwd", "slow")]


def test_the_environment_goes_before_the_table(write, fake, monkeypatch):
    write(entry("slow"))
    monkeypatch.setenv("FLASH_WTCONV_FAKE_FWD", "neat")
    assert fake.pick("fwd", None, "cpu", IMAGE, ABACUS) == "neat"


def test_the_tables_kept_here_are_of_today():
    """They name operators, problems and implementations that exist."""
    known = {each.name: each for each in operator.operators()}
    paths = list(table.FOLDER.glob("*.json"))
    assert table.path("NVIDIA H200") in paths
    for path in paths:
        kept = json.loads(path.read_text())
        assert table.path(kept["device_kind"]) == path
        assert kept["entries"]
        for entry in kept["entries"]:
            own, problem = known[entry["operator"]], entry["problem"]
            problem_type = import_module(f"{own.package}.problem").Problem
            hints = ChainMap(
                *(vars(one).get("__annotations__", {}) for one in problem_type.__mro__)
            )
            assert entry["direction"] in own.directions
            # What a call need not share is left out.
            assert {"shape", "dtype"} <= set(problem) <= set(problem_type._fields)
            for name in (name for name, value in problem.items() if isinstance(value, dict)):
                assert set(problem[name]) <= set(hints[name]._fields)
            # What compiles in a second may take a little longer.
            times, name = entry["ms"], entry["implementation"]
            assert times[name] <= (NEARLY if name == QUICK else 1.0) * min(times.values())
            assert set(entry["ms"]) <= {*map(str, own.implementations), PARTS}


@pytest.fixture
def on_an_h200(monkeypatch):
    """The names that `conv2d` picks there, forward and backward, where all can run."""

    def picked(plan, activation, dtype, x, w, bias):
        plans.append((plan, x, w, dtype))
        return x

    def pick(x, w, **keys):
        conv2d.conv2d(x, w, **keys)
        plan, *arrays = plans.pop()
        both = plan, plan.for_backward(*arrays)
        return tuple(one.module.__name__.rpartition(".")[2] for one in both)

    plans = []
    monkeypatch.setattr(conv2d.vjp, "conv2d", picked)
    gpu = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200")
    monkeypatch.setattr(device, "current", lambda: gpu)
    monkeypatch.setattr(Operator, "_unavailable", lambda *_: None)
    return pick


NARROW = {"x": (2, 128, 128, 16), "w": (3, 3, 16, 320)}
DEEP = {"x": (2, 32, 32, 1280), "w": (3, 3, 1280, 1280)}


@pytest.mark.parametrize(
    ("call", "want"),
    [
        (NARROW, ("mosaic_gpu", "mosaic_gpu")),
        (NARROW | {"out_dtype": "float32", "padding": "VALID"}, ("mosaic_gpu", "mosaic_gpu")),
        (DEEP, ("mosaic_gpu", "xla")),
        (DEEP | {"x": (7, 30, 40, 1280)}, ("mosaic_gpu", "xla")),
        (NARROW | {"padding": "reflect"}, ("mosaic_gpu", "xla")),
        (NARROW | {"dtype": "float16"}, ("mosaic_gpu", "mosaic_gpu")),
        # What nothing like it was measured of goes by the rule.
        (NARROW | {"stride": 2}, ("xla", "xla")),
        (NARROW | {"stride": (1, 2)}, ("xla", "xla")),
        (NARROW | {"dilation": 2}, ("xla", "xla")),
        (NARROW | {"w": (3, 3, 8, 320), "groups": 2}, ("xla", "xla")),
        (NARROW | {"dtype": "float32"}, ("xla", "xla")),
        (
            {"x": (2, 16, 128, 128), "w": (320, 16, 3, 3), "layout": "nchw_fchw"},
            ("xla", "xla"),
        ),
    ],
)
def test_a_dense_convolution_on_an_h200_takes_what_was_measured(call, want, on_an_h200):
    keys = {"padding": "SAME"} | call
    dtype = keys.pop("dtype", "bfloat16")
    x, w = (jnp.zeros(keys.pop(name), dtype) for name in ("x", "w"))
    assert on_an_h200(x, w, **keys) == want


def test_on_an_h200_explicit_axes_change_nothing(on_an_h200):
    mesh = jax.make_mesh((1,), ("n",), axis_types=(jax.sharding.AxisType.Explicit,))
    x, w = jnp.zeros(NARROW["x"], "bfloat16"), jnp.zeros(NARROW["w"], "bfloat16")
    with jax.set_mesh(mesh):
        assert on_an_h200(x, w, padding=1) == ("mosaic_gpu", "mosaic_gpu")
        x = jax.device_put(x, jax.NamedSharding(mesh, jax.P("n")))
        assert on_an_h200(x, w, padding=1) == ("mosaic_gpu", "mosaic_gpu")
