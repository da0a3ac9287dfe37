"""PyTorch's operator and the contract: every form of a choice, on all platforms that a CPU plays.

A new implementation is in it without a line of its own, where `wtconv.on_cpu` has it.
"""

import contextlib
import os
from importlib import import_module
from importlib.util import find_spec
from itertools import product

import pytest

torch = pytest.importorskip("torch")

from helpers.contract import FORMS, MODES, Forms  # noqa: E402

from pallas_kernels.dispatch.backend import Implementation, missing  # noqa: E402
from pallas_kernels.wtconv import conformance  # noqa: E402
from torch_bridge import check  # noqa: E402
from torch_bridge.wtconv import ops  # noqa: E402

CPU = torch.device("cpu")


class Room:
    """The cases as the layers compute them, which draw their own arrays."""

    CASES = conformance.CASES
    problem = staticmethod(conformance.problem)

    @staticmethod
    def computed(case, implementation):
        return lambda *drawn: check.layer_results(
            implementation, CPU, torch.contiguous_format, case
        )

    @staticmethod
    def baseline(case):
        return Room.computed(case, "eager")


@pytest.mark.parametrize("name", ops.Implementation)
def test_an_implementation_offers_what_the_contract_says(name):
    module = ops.OPERATOR.module(name)
    # JAX differentiates no operation of PyTorch.
    assert isinstance(module, Implementation) and module.DIFFERENTIABLE is False
    assert "an abacus" in (module.unavailable("an abacus") or "an abacus")
    for functions in ops.OPERATOR.directions.values():
        assert missing(module, functions) == []


@pytest.fixture
def forms(name, measured, monkeypatch):
    """The forms of a choice, where the CPU plays an implementation's platform."""
    here = contextlib.nullcontext()
    if name == "triton":
        if os.environ.get("TRITON_INTERPRET") != "1" or not find_spec("triton"):
            pytest.skip("needs Triton's interpreter: a process has it or a GPU")
    else:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    on_cpu = f"torch_bridge.wtconv.on_cpu.{name}"
    if find_spec(on_cpu):
        played = import_module(on_cpu)
        if played.unavailable() is not None:
            pytest.skip(played.unavailable())
        here = played.emulated()
    with here:
        yield Forms(ops.OPERATOR, Room, name, measured, monkeypatch)


def cells(values, quick):
    """Every implementation with each value; wide unless `quick` has it for the implementation.

    Of Triton, whose interpreter takes seconds, the others are slow: JAX's contract has them.
    """

    def marks(name, value):
        if value in quick.get(name, ()):
            return []
        return [pytest.mark.slow if name == "triton" else pytest.mark.wide]

    return [
        pytest.param(str(name), value, marks=marks(name, value))
        for name, value in product(ops.Implementation, values)
    ]


@pytest.mark.parametrize(("name", "form"), cells(FORMS, {"eager": FORMS, "triton": ["fwd"]}))
def test_every_form_of_a_choice(forms, form, searches, caplog):
    forms.assert_form(form, searches, caplog)


@pytest.mark.parametrize(("name", "mode"), cells(MODES, {"eager": MODES}))
def test_the_environment_says_when_to_measure(forms, mode, searches):
    forms.assert_tuning(mode, searches)
