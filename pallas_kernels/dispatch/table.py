"""The fastest implementation by problem: a JSON table a kind of device, kept in the package.

`flash-wtconv bench wtconv --write-defaults`, and those of other operators, make them. A table, of
the device in `device_kind`, holds one entry for each operator, direction and problem that was
measured:

    {"operator": "wtconv", "direction": "fwd", "implementation": "triton",
     "problem": {"shape": [128, 56, 56, 96], "dtype": "float32", "kernel_size": 5, ...},
     "ms": {"triton": 0.45, "xla": 1.2}, "date": "2026-11-21", "versions": {"jax": "0.11.2", ...}}

A call takes the nearest entry of its operator and direction, by its own `Problem.distance`, which
the operator defines. Whether the implementation can take the call, its `check` says.
"""

import json
import math
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from pallas_kernels.common.types import Json
from pallas_kernels.dispatch.backend import Problem

FOLDER = Path(__file__).parent / "defaults"
"""The folder of the tables; a device without one goes by the operators' rules."""
ALIKE = dict.fromkeys(("NVIDIA H100", "NVIDIA H200", "NVIDIA GH200"), "NVIDIA H200")
"""Devices of one chip with another memory: the table that stands in for what a kind's own has not,
by the beginning of its name."""

Entry = Json


def path(device_kind: str) -> Path:
    """The path that the table of a kind of device has, or would have.

    Example:
        >>> path("NVIDIA H200").name
        'nvidia_h200.json'
    """
    return FOLDER / file_name(device_kind)


def file_name(device_kind: str) -> str:
    """The name of a file about a kind of device.

    Example:
        >>> file_name("Abacus 3000 (PCIe)")
        'abacus_3000_pcie.json'
    """
    return re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_") + ".json"


def check_fields(name: str, value: object, types: Mapping[str, type]) -> None:
    """Checks that a value of JSON is an object whose fields have these types.

    Args:
        name: The value as the error names it.
        value: Any value of JSON.
        types: The type of each field that it has to have.

    Raises:
        ValueError: It is no object, or a field is missing or of another type.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{name} is not one of ours: {value!r:.40}")
    for field, wanted in types.items():
        if not isinstance(value.get(field), wanted):
            raise ValueError(f"{name} is not one of ours: its {field!r} is no {wanted.__name__}")


def is_time(value: object) -> bool:
    """Whether a value of JSON is a time: a positive number that a float can hold.

    Example:
        >>> [is_time(value) for value in (0.5, 0, None, "1", True, float("inf"))]
        [True, False, False, False, False, False]
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value <= sys.float_info.max


def entries(device_kind: str) -> tuple[Entry, ...]:
    """The entries measured on a kind of device, and of what was not those of one of `ALIKE`.

    Args:
        device_kind: As JAX names it, e.g. "NVIDIA H200".

    Returns:
        The entries of the table, then those of the other kind's for operators, directions and
        dtypes that the table has none for; none, after a warning, of a table with an entry that is
        not as it should be.

    Example:
        >>> entries("an abacus")
        ()
        >>> entries("NVIDIA H100 PCIe") == entries("NVIDIA H200")
        True
    """
    own = _own_entries(device_kind)
    measured = set(map(_measured, own))
    alike = {name for start, name in ALIKE.items() if device_kind.startswith(start)}
    others = (entry for name in alike - {device_kind} for entry in _own_entries(name))
    return *own, *(entry for entry in others if _measured(entry) not in measured)


def _measured(entry: Entry) -> tuple[str, str, str]:
    """The operator, direction and dtype of an entry."""
    return entry["operator"], entry["direction"], entry["problem"]["dtype"]


def _own_entries(device_kind: str) -> tuple[Entry, ...]:
    """The entries of the table of a kind, none where it has none."""
    file = path(device_kind)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        check_fields("the table", found, {"entries": list})
        for entry in found["entries"]:
            _check(entry)
    except FileNotFoundError:
        return ()
    except (ValueError, RecursionError) as error:
        warnings.warn(
            f"{file} is not used: {error}; the rule of the device chooses",
            RuntimeWarning,
            stacklevel=2,
        )
        return ()
    return tuple(found["entries"])


@lru_cache(1024)
def fastest(operator: str, direction: str, problem: Problem, device_kind: str) -> str | None:
    """The implementation that was the fastest for the nearest problem measured on such a device.

    Args:
        operator: Name of the operator.
        direction: Its direction, e.g. "fwd".
        problem: The operator's description of a call.
        device_kind: As JAX names it.

    Returns:
        A name, or None where nothing comparable was measured or a size is symbolic. Looked up
        once, so `dispatch.forget()` after a table is written.

    Example:
        >>> from pallas_kernels.wtconv.problem import Problem
        >>> problem = Problem((8, 56, 56, 96), "float32", 5, 5, "haar")
        >>> fastest("wtconv", "fwd", problem, "an abacus") is None
        True
    """
    measured = [
        entry
        for entry in entries(device_kind)
        if (entry["operator"], entry["direction"]) == (operator, direction)
    ]
    if not measured:
        return None
    distances = [problem.distance(entry["problem"]) for entry in measured]
    least = min(distances)
    return None if math.isinf(least) else measured[distances.index(least)]["implementation"]


def merged(device_kind: str, new: Iterable[Entry]) -> str:
    """The text of a table with new entries in it, which replace those of the same problem.

    Args:
        device_kind: As JAX names it.
        new: Entries as `entries` returns them.

    Returns:
        JSON, an entry a line.

    Example:
        >>> print(merged("an abacus", []))
        {
          "device_kind": "an abacus",
          "entries": [
        <BLANKLINE>
          ]
        }
        <BLANKLINE>
    """
    by_problem = {_key(entry): entry for entry in (*_own_entries(device_kind), *new)}
    lines = ",\n".join("    " + json.dumps(by_problem[key]) for key in sorted(by_problem))
    return f'{{\n  "device_kind": {json.dumps(device_kind)},\n  "entries": [\n{lines}\n  ]\n}}\n'


def _check(entry: Entry) -> None:
    """Checks that an entry tells a problem, and the time of its implementation."""
    texts = dict.fromkeys(("operator", "direction", "implementation"), str)
    check_fields("an entry", entry, {**texts, "problem": dict, "ms": dict})
    check_fields("an entry's problem", entry["problem"], {"shape": list, "dtype": str})
    if not all(isinstance(size, int) and size > 0 for size in entry["problem"]["shape"]):
        raise ValueError(f"an entry has a problem of shape {entry['problem']['shape']}")
    if not is_time(entry["ms"].get(entry["implementation"])):
        raise ValueError(f"an entry has no time of its implementation {entry['implementation']!r}")


def _key(entry: Entry) -> tuple[str, ...]:
    problem = json.dumps(entry["problem"], sort_keys=True)
    return entry["operator"], entry["direction"], entry["problem"]["dtype"], problem
