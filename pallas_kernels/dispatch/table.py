"""The fastest implementation by problem: a JSON table a kind of device, kept in the package.

`flash-wtconv bench wtconv --write-defaults`, and `bench conv2d`, make them. A table, of the device
in `device_kind`, holds one entry for each operator, direction and problem that was measured:

    {"operator": "wtconv", "direction": "fwd", "implementation": "triton",
     "problem": {"shape": [128, 56, 56, 96], "dtype": "float32", "kernel_size": 5, ...},
     "ms": {"triton": 0.45, "xla": 1.2}, "date": "2026-11-21", "versions": {"jax": "0.11.2", ...}}

A call takes the nearest entry of its operator and direction, by its own `Problem.distance`, which
the operator defines. Whether the implementation can take the call, its `check` says.
"""

import json
import math
import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from pallas_kernels.common.types import Json
from pallas_kernels.dispatch.backend import Problem

FOLDER = Path(__file__).parent / "defaults"
"""The folder of the tables; a device without one goes by the operators' rules."""

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


def entries(device_kind: str) -> tuple[Entry, ...]:
    """The entries measured on a kind of device: none where there is no table of it.

    Args:
        device_kind: As JAX names it, e.g. "NVIDIA H200".

    Returns:
        The entries of the table.

    Example:
        >>> entries("an abacus")
        ()
    """
    try:
        text = path(device_kind).read_text(encoding="utf-8")
    except FileNotFoundError:
        return ()
    return tuple(json.loads(text)["entries"])


@lru_cache(1024)
def fastest(operator: str, direction: str, problem: Problem | None, device_kind: str) -> str | None:
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
        >>> fastest("wtconv", "fwd", None, "an abacus") is None
        True
    """
    measured = [
        entry
        for entry in entries(device_kind)
        if (entry["operator"], entry["direction"]) == (operator, direction)
    ]
    if not measured or problem is None:
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
    by_problem = {_key(entry): entry for entry in (*entries(device_kind), *new)}
    lines = ",\n".join("    " + json.dumps(by_problem[key]) for key in sorted(by_problem))
    return f'{{\n  "device_kind": {json.dumps(device_kind)},\n  "entries": [\n{lines}\n  ]\n}}\n'


def _key(entry: Entry) -> tuple[str, ...]:
    problem = json.dumps(entry["problem"], sort_keys=True)
    return entry["operator"], entry["direction"], entry["problem"]["dtype"], problem
