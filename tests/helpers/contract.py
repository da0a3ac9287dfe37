"""The forms of a choice, which every operator of either framework takes."""

import logging

import jax
import numpy as np

from pallas_kernels.common import conformance
from pallas_kernels.dispatch import Request, tuner
from pallas_kernels.dispatch.backend import search_space

FORMS = ["None", "name", "list", "auto", "environment", "fwd", "bwd"]
"""No choice, one of `implementation=`, a list in the environment, and one direction's kernel there.

The other direction of the last two is computed by plain operations.
"""

MODES = ["off", "cached", "search"]
"""The values of FLASH_WTCONV_TUNING."""


def takes(operator, name, problem):
    """Whether an implementation is made for a problem in every direction."""
    try:
        for direction in operator.directions:
            operator.module(name).check(direction, problem)
    except (ImportError, NotImplementedError):
        return False
    return True


def smallest(operator, room, name):
    """The smallest case of an operator that an implementation takes, in float32 if it can be."""
    taken = [case for case in room.CASES if takes(operator, name, room.problem(case))]
    return min(
        taken,
        key=lambda case: (
            case.dtype != "float32",
            sum(np.size(array) for array in jax.tree.leaves(case.drawn())),
        ),
    )


class Forms:
    """Calls of an operator by each form of a choice, on the platform of one of its kernels.

    The CPU plays that platform: its rule counts, and the kernel is interpreted. Of each search
    space two elements are timed, once, and JAX's choices are seen where the forms differ.

    Args:
        operator: The operator.
        room: Its `common.conformance.Room`.
        kernel: The implementation.
        measured: The fixture of this name, the cache of the test.
        monkeypatch: pytest's.
    """

    def __init__(self, operator, room, kernel, measured, monkeypatch):
        self.operator, self.room, self.kernel = operator, room, kernel
        self._measured = measured
        self.case = smallest(operator, room, kernel)
        self.plain = operator.rule["cpu"][-1]
        self.variables = {
            direction: f"FLASH_WTCONV_{operator.name}_{direction}".upper()
            for direction in operator.directions
        }
        self._monkeypatch = monkeypatch
        names = list(map(str, operator.implementations))
        self.absent = [name for name, reason in operator.status("cpu") if reason is not None]
        problem = room.problem(self.case)
        self.able = [n for n in names if n not in self.absent and takes(operator, n, problem)]
        # The first rule that names the kernel; plain operations are on a CPU.
        rules = sorted(operator.rule.items(), key=lambda rule: rule[0] != "cpu")
        rule = next(names for _, names in rules if kernel in names)
        monkeypatch.setitem(operator.rule, "cpu", rule)
        self.first = next(name for name in rule if name in self.able)
        monkeypatch.setattr(tuner, "_RUNS", 1)
        monkeypatch.setattr(tuner, "_TIE_RUNS", 0)
        for name in self.able:
            self._two_of_the_search_space(operator.module(name))
        self.chosen = []
        choose = Request.choose

        def seen(request, *rest):
            found = choose(request, *rest)
            # Operators of which this one is made choose for themselves what it does not compute.
            if request.operator is operator or request.direction == "fwd":
                self.chosen.append((request.direction, found.implementation))
            return found

        monkeypatch.setattr(Request, "choose", seen)

    def _two_of_the_search_space(self, module):
        if hasattr(module, "search_space"):
            offered = module.search_space
            two = lambda direction, problem: offered(direction, problem)[:2]  # noqa: E731
            self._monkeypatch.setattr(module, "search_space", two)

    def several(self, names):
        """Whether these implementations leave something to time."""
        problem = self.room.problem(self.case)
        return any(
            sum(len(search_space(self.operator.module(n), d, problem)) for n in names) > 1
            for d in self.operator.directions
        )

    def assert_right(self, choice):
        """A call's results are the oracle's, and so were those of all that was timed."""
        got = self.room.computed(self.case, choice)(*self.case.drawn())
        want = conformance.expected(self.case)
        plain = lambda case: self.room.baseline(case)(*case.drawn())  # noqa: E731
        allowed = conformance.bounds(self.case, plain)
        found = {name: conformance.worst(got[name], value) for name, value in want.items()}
        assert {name: e for name, e in found.items() if not e <= allowed[name]} == {}
        for kind in self._measured.kinds():
            for entry in self._measured.entries(kind):
                assert [one for one in entry["measured"] if "failed" in one] == []

    def assert_form(self, form, searches, caplog):
        """A form computes what the oracle says, by what it names, and measures where it should."""
        pair = [self.kernel, self.plain]
        lists = {"list": [*pair, *self.absent[:1]], "environment": pair, "auto": self.able}
        if form == "environment":
            for variable in self.variables.values():
                self._monkeypatch.setenv(variable, f"[{', '.join(pair)}]")
        if form in ("fwd", "bwd"):
            for direction, variable in self.variables.items():
                name = self.kernel if direction == form else self.plain
                self._monkeypatch.setenv(variable, name)
        choice = {"name": self.kernel, "list": lists["list"], "auto": "auto"}.get(form)
        with caplog.at_level(logging.INFO, "flash_wtconv"):
            self.assert_right(choice)
        # JAX traces derivatives of equal choices once, and what they choose is chosen then.
        assert any(direction in ("fwd", "whole") for direction, _ in self.chosen)
        for direction, name in self.chosen:
            allowed = {
                "None": [self.first],
                "name": [self.kernel],
                "fwd": [self.kernel if direction == "fwd" else self.plain],
                "bwd": [self.kernel if direction == "bwd" else self.plain],
            } | lists
            assert name in allowed[form], (direction, name)
        measures = form in lists and self.several(set(lists[form]) & set(self.able))
        if form in ("name", "fwd", "bwd") and self.operator.measures_names:
            # One name asks for no times of an interpreter.
            problem = self.room.problem(self.case)
            named = {
                direction: self.kernel if form in ("name", direction) else self.plain
                for direction in self.operator.directions
            }
            measures = any(
                name != "triton"
                and len(search_space(self.operator.module(name), direction, problem)) > 1
                for direction, name in named.items()
            )
        assert bool(searches) == measures
        left_out = [record for record in caplog.records if "is left out of" in record.getMessage()]
        if form in ("list", "auto") and self.absent:
            assert any(f": {self.absent[0]} is left out of" in r.getMessage() for r in left_out)
            assert {r.levelname for r in left_out} == {"WARNING" if form == "list" else "INFO"}
        else:
            assert not left_out

    def assert_tuning(self, mode, searches):
        """FLASH_WTCONV_TUNING says when a process measures: never, or whatever it chooses."""
        self._monkeypatch.setenv("FLASH_WTCONV_TUNING", mode)
        choice = self.kernel if mode == "search" else "auto"
        self.assert_right(choice)
        assert bool(searches) == (mode == "search" and self.several([self.kernel]))
