"""Reports of benchmarks as entries of `pallas_kernels.dispatch.table`."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from pallas_kernels.common import device
from pallas_kernels.common.types import Json
from pallas_kernels.dispatch import Operator
from pallas_kernels.dispatch.backend import Problem
from pallas_kernels.dispatch.table import Entry

OURS = "flash"
"""The name of our contender, alone where the rule picks, else before an implementation's name."""

QUICK, NEARLY = "cuda", 1.07
"""The implementation that compiles in a second, where others take five to twenty, and how many
times the fastest one's time it may take and still be taken."""
_VERSIONS = ("flash-wtconv", "jax", "jaxlib", "jax-triton", "triton")
"""The packages whose versions an entry keeps, because measured times depend on them."""


def able(operator: Operator, problem: Problem) -> list[str]:
    """The implementations of an operator that can compute a problem here, in every direction.

    Args:
        operator: One of `pallas_kernels.dispatch.operators()`.
        problem: The operator's description of a call.

    Returns:
        Their names.

    Example:
        >>> import jax
        >>> from pallas_kernels.wtconv.api import OPERATOR
        >>> from pallas_kernels.wtconv.problem import Problem
        >>> with jax.default_device(jax.devices("cpu")[0]):
        ...     able(OPERATOR, Problem((1, 8, 8, 4), "float32", 5, 1, "haar"))
        ['xla']
    """
    found = []
    for name in map(str, operator.implementations):
        try:
            for direction in operator.directions:
                operator.pick(direction, name, device.platform(), problem)
        except NotImplementedError:
            continue
        found.append(name)
    return found


def each(function: Callable[..., Any], names: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """Our contender and, of several implementations, one for each.

    Args:
        function: Our function, which takes the filter `implementation`.
        names: The implementations that can compute what is timed.

    Returns:
        Functions by the names of contenders.

    Example:
        >>> list(each(print, ["xla", "cuda"])), list(each(print, ["xla"]))
        (['flash', 'flash xla', 'flash cuda'], ['flash'])
    """
    several = names if len(names) > 1 else []
    found = {f"{OURS} {name}": partial(function, implementation=name) for name in several}
    return {OURS: function, **found}


def entries(
    operator: Operator,
    report: Json,
    problem: Callable[[Json], Json],
) -> list[Entry]:
    """The fastest implementations of a report, as entries of the table of defaults.

    Nearly as fast is enough for one whose first call takes a second instead of five to twenty.

    The time of a backward pass is that of both passes less that of the forward pass. Where noise
    leaves nothing of it, the implementation does not count. But of an operator with a direction
    "whole", a call that nothing differentiates, the forward pass is that, and for both passes of
    the others the same implementation is the fastest.

    Args:
        operator: The operator that was timed.
        report: With `date`, `versions` and `rows`, each of a `direction` ("forward" or
            "forward+backward"), a `contender` ("flash xla") and its `median_ms`.
        problem: The problem of a row, JSON-able.

    Returns:
        An entry for each direction of each problem that several implementations have computed.

    Example:
        >>> from pallas_kernels.wtconv.api import OPERATOR
        >>> entries(OPERATOR, {"date": "2026-11-21", "versions": {}, "rows": []}, dict)
        []
    """
    about = {
        "date": report["date"],
        "versions": {name: v for name, v in report["versions"].items() if name in _VERSIONS},
    }
    measured: dict[str, tuple[Json, dict[tuple[str, str], float]]] = {}
    for row in report["rows"]:
        of = problem(row)
        _, ms = measured.setdefault(json.dumps(of), (of, {}))
        who, _, name = row["contender"].partition(" ")
        if who == OURS and name:
            ms[row["direction"], name] = row["median_ms"]
    found = []
    for of, ms in measured.values():
        forward = {name: time for (direction, name), time in ms.items() if direction == "forward"}
        # A report may not be whole.
        timed_both = [name for name in forward if ("forward+backward", name) in ms]
        both = {name: ms["forward+backward", name] for name in timed_both}
        rest = {name: time - forward[name] for name, time in both.items()}
        backward = {name: time for name, time in rest.items() if time > 0}
        timed = {"fwd": forward, "bwd": backward}
        if "whole" in operator.directions:
            timed = {"whole": forward, "fwd": both, "bwd": both}
        found += [
            {
                "operator": operator.name,
                "direction": direction,
                "implementation": _taken(times),
                "problem": of,
                "ms": {name: float(f"{times[name]:.4g}") for name in sorted(times)},
                **about,
            }
            for direction, times in timed.items()
            if len(times) > 1
        ]
    return found


def _taken(times: Mapping[str, float]) -> str:
    """The implementation to take of those whose times are known."""
    fastest = min(times, key=times.__getitem__)
    quick = times.get(QUICK, math.inf) <= NEARLY * times[fastest]
    return QUICK if quick else fastest
