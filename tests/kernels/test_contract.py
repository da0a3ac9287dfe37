"""The contract of `dispatch.backend` and `common.conformance`, over every operator there is.

A new operator is in these tables without a line of its own: `dispatch.operators` finds its folder.
"""

import contextlib
import inspect
import json
from importlib import import_module
from itertools import product
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from helpers.contract import FORMS, MODES, Forms, smallest
from helpers.cuda import emulate
from helpers.interpreters import called_back_in_numpy

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


def names_of(operator):
    return [str(name) for name in OPERATORS[operator].implementations]


def module_of(operator, name):
    try:
        return OPERATORS[operator].module(name)
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported here: {error}")


def room_of(operator):
    return import_module(f"{OPERATORS[operator].package}.conformance")


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
    assert isinstance(module, Implementation)
    flags = inspect.get_annotations(import_module(f"{OPERATORS[operator].package}.vjp").Kernels)
    for flag in ("DIFFERENTIABLE", *(name for name in flags if name.isupper())):
        assert isinstance(getattr(module, flag), bool), flag
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


@contextlib.contextmanager
def interpreted_tpu():
    from jax.experimental.pallas import tpu as pltpu

    with pltpu.force_tpu_interpret_mode(), called_back_in_numpy():
        yield


@pytest.fixture
def forms(request, operator, name, measured, monkeypatch):
    """The forms of a choice, where an interpreter plays an implementation's platform."""
    module, here = module_of(operator, name), contextlib.nullcontext()
    if name == "mosaic_tpu":
        here = interpreted_tpu()
    elif name == "triton":
        from helpers.triton import interpret

        for part in getattr(module, "PARTS", [module]):
            interpret(monkeypatch, part)
        monkeypatch.setattr(module, "unavailable", lambda platform: None)
    elif name == "cuda":
        emulate(monkeypatch, module)
    elif name == "mosaic_gpu":
        request.getfixturevalue("gpu_launches")
        monkeypatch.setattr(module, "unavailable", lambda platform: None)
    elif module.unavailable("cpu") is not None:
        pytest.skip(f"no interpreter plays {name}")
    with here:
        yield Forms(OPERATORS[operator], room_of(operator), name, measured, monkeypatch)


def cells(values, quick):
    """Every implementation of every operator with each value; wide unless `quick` has it.

    Of implementations that an interpreter plays every seventh value is wide, of the next operator
    the next; the others are slow, and all of wtconv, whose kernels take interpreters longest: what
    a form chooses does not depend on the operator, and plain JAX has each form of it.

    Args:
        values: The values.
        quick: Those of plain JAX that `make test` takes.
    """

    def marks(operator, name, value):
        if name == "xla":
            return [pytest.mark.wide] * (value not in quick)
        turn = list(OPERATORS).index(operator) + list(values).index(value)
        return [pytest.mark.slow if turn % 7 or operator == "wtconv" else pytest.mark.wide]

    return [
        pytest.param(operator, name, value, marks=marks(operator, name, value))
        for (operator, name), value in product(ROOMS, values)
        # Of some operators one implementation computes both directions.
        if value not in ("fwd", "bwd") or value in OPERATORS[operator].directions
    ]


@pytest.mark.parametrize(
    ("operator", "name", "form"),
    cells(FORMS, ["None", "auto"]),
)
def test_every_form_of_a_choice(forms, form, searches, caplog):
    """Each computes what the oracle says, with gradients, and measures where it should."""
    forms.assert_form(form, searches, caplog)


@pytest.mark.parametrize(("operator", "name", "mode"), cells(MODES, ["search"]))
def test_the_environment_says_when_to_measure(forms, mode, searches):
    forms.assert_tuning(mode, searches)


@pytest.mark.parametrize(("operator", "form"), list(product(OPERATORS, FORMS[:5])))
def test_every_form_of_a_choice_on_a_gpu(operator, form, monkeypatch):
    """Traced for a Hopper GPU that is not here; what is fastest nobody can measure."""
    each, room = OPERATORS[operator], room_of(operator)
    kernel = "mosaic_gpu" if "mosaic_gpu" in names_of(operator) else "xla"
    case = smallest(each, room, kernel)
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
