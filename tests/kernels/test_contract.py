"""The contract of `dispatch.backend` and `common.conformance`, over every operator there is.

A new operator is in these tables without a line of its own: `dispatch.operators` finds its folder.
"""

import inspect
import json
import logging
from importlib import import_module
from itertools import product
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.common import conformance, device
from pallas_kernels.dispatch import tuning
from pallas_kernels.dispatch.backend import Implementation, missing, search_space

pytestmark = pytest.mark.core

OPERATORS = {
    operator.name: operator
    for operator in dispatch.operators()
    if operator.package.startswith("pallas_kernels.")
}
ROOMS = [
    (operator, str(name)) for operator, each in OPERATORS.items() for name in each.implementations
]
FORMS = ["None", "name", "list", "auto", "environment"]


def names_of(operator):
    return [str(name) for name in OPERATORS[operator].implementations]


def module_of(operator, name):
    try:
        return OPERATORS[operator].module(name)
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported here: {error}")


def room_of(operator):
    return import_module(f"{OPERATORS[operator].package}.conformance")


def smallest(operator, name):
    """The smallest case of an operator that an implementation takes, in float32 if it can be."""
    room = room_of(operator)
    taken = [case for case in room.CASES if takes(operator, name, room.problem(case))]
    return min(
        taken,
        key=lambda case: (
            case.dtype != "float32",
            sum(np.size(array) for array in jax.tree.leaves(case.drawn())),
        ),
    )


def takes(operator, name, problem):
    module = OPERATORS[operator].module(name)
    try:
        for direction in OPERATORS[operator].directions:
            module.check(direction, problem)
    except (ImportError, NotImplementedError):
        return False
    return True


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_platform_has_a_rule_that_ends_with_plain_jax_somewhere(operator):
    each = OPERATORS[operator]
    assert set(each.rule) == {"cpu", "gpu", "tpu"}
    for names in each.rule.values():
        assert "xla" in names and set(names) <= set(names_of(operator))
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_rooms_are_there(operator):
    package = OPERATORS[operator].package
    for room in ("api", "problem", "vjp", "xla", "shapes", "cases", "conformance"):
        import_module(f"{package}.{room}")
    assert set(import_module(package).__all__) >= {"Implementation"}


@pytest.mark.parametrize(("operator", "name"), ROOMS)
def test_an_implementation_offers_what_the_contract_says(operator, name):
    module = module_of(operator, name)
    assert isinstance(module, Implementation) and isinstance(module.DIFFERENTIABLE, bool)
    for platform in ("cpu", "gpu", "tpu", "abacus"):
        reason = module.unavailable(platform)
        assert reason is None or isinstance(reason, str)
    assert module.unavailable("abacus") is None or "abacus" in module.unavailable("abacus")
    for direction, functions in OPERATORS[operator].directions.items():
        lacking = missing(module, functions)
        # Of a direction that it does not compute it has no function, not some.
        assert lacking == [] or direction != "fwd", lacking
        for function in set(functions) - set(lacking):
            assert keywords(getattr(module, function)) == keywords(
                getattr(OPERATORS[operator].module("xla"), function)
            )


def keywords(function):
    """Names and kinds of a function's arguments, without the parameters of its search space."""
    arguments = inspect.signature(function).parameters.values()
    return [
        (one.name, one.kind)
        for one in arguments
        if one.kind is not inspect.Parameter.VAR_KEYWORD and one.default is one.empty
    ]


@pytest.mark.parametrize(("operator", "name"), ROOMS)
def test_refusals_and_search_spaces(operator, name):
    module, room = module_of(operator, name), room_of(operator)
    took = 0
    for case, direction in product(room.CASES, OPERATORS[operator].directions):
        problem = room.problem(case)
        try:
            module.check(direction, problem)
        except NotImplementedError as error:
            # Nothing but the reason: who reads it knows of what.
            assert str(error).startswith("does not"), error
            continue
        took += 1
        offered = search_space(module, direction, problem)
        assert offered and json.loads(json.dumps(offered)) == [
            json.loads(json.dumps(dict(one))) for one in offered
        ]
        assert len({json.dumps(one, sort_keys=True) for one in offered}) == len(offered)
    assert took


@pytest.mark.parametrize("operator", OPERATORS)
def test_problems_are_keys_and_say_how_unlike_they_are(operator):
    room = room_of(operator)
    problems = [room.problem(case) for case in room.CASES]
    for problem in problems:
        assert len({problem, problem}) == 1
        assert problem.measured_as().measured_as() == problem.measured_as()
        as_json = {"shape": list(problem.shape), "dtype": str(problem.dtype)}
        if 0 not in problem.shape:
            assert problem.distance(as_json) == 0
        assert problem.distance(as_json | {"dtype": "int3"}) == np.inf
        assert isinstance(str(problem), str)


def choices():
    """Each form of a choice on each of two platforms; some are for `make test-all`.

    Two forms stand for what another computes, and each kernel's own tests choose it by its name.
    """
    for platform, form in product(("xla", "mosaic_tpu"), FORMS):
        wide = form in ("list", "environment") or (platform, form) == ("mosaic_tpu", "name")
        yield pytest.param(platform, form, marks=[pytest.mark.wide] * wide)


@pytest.fixture
def platform(request):
    """Plain JAX on the CPU, and kernels of a TPU that Pallas' interpreter plays, by name."""
    if request.param == "xla":
        yield "xla"
        return
    from jax.experimental.pallas import tpu as pltpu

    with pltpu.force_tpu_interpret_mode():
        yield "mosaic_tpu"


@pytest.mark.parametrize(("platform", "form"), choices(), indirect=["platform"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_form_of_a_choice(operator, form, platform, monkeypatch, searches, caplog):
    """Each computes what the oracle says, with gradients, and measures where it should."""
    each, room, kernel = OPERATORS[operator], room_of(operator), platform
    if kernel not in names_of(operator):
        pytest.skip(f"{operator} has no {kernel}")
    case = smallest(operator, kernel)
    choice = {"name": kernel, "list": [kernel, "xla", "triton"], "auto": "auto"}
    if form == "environment":
        for direction in each.directions:
            monkeypatch.setenv(f"FLASH_WTCONV_{operator}_{direction}".upper(), f"[{kernel}, xla]")
    with caplog.at_level(logging.INFO, "flash_wtconv"):
        got = room.computed(case, choice.get(form))(*case.drawn())
    want = conformance.expected(case)
    for name, value in want.items():
        assert conformance.worst(got[name], value) <= case.tolerance(name), name
    several = form in ("list", "auto", "environment")
    space = sum(
        len(search_space(each.module(name), direction, room.problem(case)))
        for name in {kernel, "xla"}
        for direction in each.directions
    )
    assert bool(searches) == (several and space > len(each.directions))
    left_out = [record for record in caplog.records if "is left out of" in record.getMessage()]
    if form in ("list", "auto"):
        assert any(": triton is left out of" in record.getMessage() for record in left_out)
        assert {r.levelname for r in left_out} == {"WARNING" if form == "list" else "INFO"}
    else:
        assert not left_out


@pytest.mark.parametrize(("operator", "form"), list(product(OPERATORS, FORMS)))
def test_every_form_of_a_choice_on_a_gpu(operator, form, monkeypatch):
    """Traced for a Hopper GPU that is not here; what is fastest nobody can measure."""
    each, room = OPERATORS[operator], room_of(operator)
    kernel = "mosaic_gpu" if "mosaic_gpu" in names_of(operator) else "xla"
    case = smallest(operator, kernel)
    gpu = SimpleNamespace(
        platform="gpu", device_kind="NVIDIA H100 80GB HBM3", compute_capability="9.0"
    )
    monkeypatch.setattr(device, "current", lambda: gpu)
    choice = {"name": kernel, "list": [*{kernel, "xla"}], "auto": "auto"}.get(form)
    if form == "environment":
        for direction in each.directions:
            monkeypatch.setenv(f"FLASH_WTCONV_{operator}_{direction}".upper(), kernel)
    with tuning("off"):
        got = jax.eval_shape(room.computed(case, choice), *case.drawn())
    want = conformance.expected(case)
    assert jax.tree.map(lambda a: a.shape, got) == jax.tree.map(np.shape, dict(want))
