"""Which implementation was the fastest where: a JSON table a kind of device, kept in the package.

`flash-wtconv bench wtconv --write-defaults`, and `bench conv2d`, make them. A table, of the device
in `device_kind`, holds one entry for each operator, direction and problem that was measured:

    {"operator": "wtconv", "direction": "fwd", "implementation": "triton",
     "problem": {"shape": [128, 56, 56, 96], "dtype": "float32", "kernel_size": 5, ...},
     "ms": {"triton": 0.45, "xla": 1.2}, "date": "2026-11-21", "versions": {"jax": "0.11.2", ...}}

A call takes the nearest entry of those of its operator and direction that compare: dtype and number
of axes are the call's, and so is all that is nested in the problem (of a dense convolution's
`window` the stride, dilation, groups, ...). The distance is the sum of the differences in log2 of
the number of samples (H W of an image), in log2 of the channels and of `features`, and in each
other integer of the problem (kernel sizes, levels). Nothing else is looked at, neither the batch
nor the wavelet: whether the implementation can take the call, its `check` says.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "defaults"
"""Where the tables are; a device of which none is there goes by the operators' rules."""

Entry = dict[str, Any]


def path(device_kind: str) -> Path:
    """Where the table of a kind of device is, or would be.

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
    """What was measured on a kind of device: nothing where there is no table of it.

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
def fastest(operator: str, direction: str, problem: Any, device_kind: str) -> str | None:
    """The implementation that was the fastest for the nearest problem measured on such a device.

    Args:
        operator: Name of the operator.
        direction: Its direction, e.g. "fwd".
        problem: The operator's description of a call, a NamedTuple with the fields `shape`
            (batch, sizes, channels) and `dtype`, and any others; what nests is a NamedTuple too.
        device_kind: As JAX names it.

    Returns:
        A name, or None where nothing comparable was measured or a size is symbolic. Looked up
        once, so `fastest.cache_clear()` after a table is written.

    Example:
        >>> fastest("wtconv", "fwd", None, "an abacus") is None
        True
    """
    measured = [
        entry
        for entry in entries(device_kind)
        if (entry["operator"], entry["direction"]) == (operator, direction)
    ]
    if not measured:
        return None
    call = problem._asdict()
    distances = [_distance(entry["problem"], call) for entry in measured]
    least = min(distances)
    return None if math.isinf(least) else measured[distances.index(least)]["implementation"]


def merged(device_kind: str, new: Iterable[Entry]) -> str:
    """The text of a table with new entries in it; those of the same problem they replace.

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


def _distance(measured: Mapping[str, Any], call: Mapping[str, Any]) -> float:
    """How unlike a call is to a measured problem, infinite if they cannot be compared."""
    if measured["dtype"] != str(call["dtype"]) or len(measured["shape"]) != len(call["shape"]):
        return math.inf
    nested = [name for name, value in measured.items() if isinstance(value, dict)]
    if not all(_same(measured[name], call[name]) for name in nested):
        return math.inf
    integers = [name for name, value in measured.items() if isinstance(value, int)]
    if not all(isinstance(n, int) for n in (*call["shape"], *map(call.__getitem__, integers))):
        return math.inf
    sizes = zip(_sizes(measured["shape"]), _sizes(call["shape"]), strict=True)
    return sum(abs(one - other) for one, other in sizes) + sum(
        abs(_scaled(name, measured[name]) - _scaled(name, call[name])) for name in integers
    )


def _same(measured: Mapping[str, Any], call: Any) -> bool:
    """Whether a call's tuple has the measured fields, whose tuples are lists in JSON."""
    return all(
        (tuple(value) if isinstance(value, list) else value) == getattr(call, name)
        for name, value in measured.items()
    )


def _scaled(name: str, value: int) -> float:
    """An integer of a problem, on the scale that it differs on."""
    return math.log2(value) if name == "features" else value


def _sizes(shape: Iterable[int]) -> tuple[float, float]:
    """Log2 of the number of samples and of the channels of `[batch, *sizes, channels]`."""
    _, *sizes, channels = shape
    return math.log2(math.prod(sizes)), math.log2(channels)
