"""A check finds what is wrong of an implementation, and every operator takes part in it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

import pallas_kernels
from flash_wtconv_jax.cli.check import rooms
from pallas_kernels.common import conformance
from pallas_kernels.wtconv.cases import Case

pytestmark = pytest.mark.core

OPERATORS = {name: operator for name, (operator, _) in rooms().items()}
ROOMS = {name: room for name, (_, room) in rooms().items()}
CASE = Case((4, 5), 1, 3)


def row_of(case, compute):
    """The row of one case, whose results are those of the oracle, changed."""
    backend = conformance.Backend("own", [case], lambda case: None, compute)
    (row,) = conformance.run([backend], conformance.expected)
    json.dumps(row, allow_nan=False)
    return row


def test_every_folder_with_an_operator_is_checked():
    root = Path(pallas_kernels.__file__).parents[1]
    apis = Path(pallas_kernels.__file__).parent.rglob("api.py")
    folders = {".".join(path.parent.relative_to(root).parts) for path in apis}
    assert folders == {operator.package for operator in OPERATORS.values()}


@pytest.mark.parametrize("operator", ROOMS)
def test_names_are_unique_and_problems_are_those_of_the_cases(operator):
    room = ROOMS[operator]
    assert len({case.name for case in room.CASES}) == len(room.CASES)
    for case in room.CASES:
        assert str(room.problem(case).dtype) == case.dtype


@pytest.mark.parametrize("operator", ROOMS)
def test_an_error_in_any_result_is_found(operator):
    case = next(case for case in ROOMS[operator].CASES if case.dtype == "float32")
    want = conformance.expected(case)
    assert len(want) >= 3
    for name, value in want.items():
        arrays = [a.copy() for a in (value if isinstance(value, list) else [value])]
        arrays[-1].flat[-1] += 1e-3
        off = arrays if isinstance(value, list) else arrays[0]
        assert row_of(case, lambda case, off=off, name=name: want | {name: off})["array"] == name
    assert row_of(case, conformance.expected)["status"] == "pass"


def taken(implementation, operator, case):
    """Whether an implementation takes a case in every direction."""
    module, problem = OPERATORS[operator].module(implementation), ROOMS[operator].problem(case)
    try:
        for direction in OPERATORS[operator].directions:
            module.check(direction, problem)
    except NotImplementedError:
        return False
    return True


@pytest.mark.parametrize("operator", ROOMS)
def test_every_implementation_takes_some_cases(operator):
    for name in OPERATORS[operator].implementations:
        found = [case for case in ROOMS[operator].CASES if taken(name, operator, case)]
        assert len(found) >= 3, name


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda got: got | {"y": got["y"] + 1e-3}, "y is off by"),
        (lambda got: got | {"dx": np.full_like(got["dx"], np.nan)}, "dx is off by nan"),
        (lambda got: got | {"base_scale": np.ones(2)}, r"base_scale has shape \(2,\), expected"),
        (lambda got: got | {"dx": [got["dx"]]}, r"dx has shape \[\(2, 4, 5, 3\)\], expected \(2"),
        (lambda got: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_wrong_is_a_failure(change, reason):
    row = row_of(CASE, lambda case: change(dict(conformance.expected(case))))
    assert row["status"] == "fail"
    assert re.match(reason, row["reason"]), row


def test_plain_operations_are_computed_once_a_case():
    calls = []

    def plain(case):
        calls.append(case)
        return conformance.expected(case)

    case = Case((4, 5), 1, 3, "float16")
    backend = conformance.Backend("own", [case], lambda case: None, conformance.expected)
    rows = list(conformance.run([backend, backend], plain))
    assert [row["status"] for row in rows] == ["pass", "pass"] and calls == [case]
