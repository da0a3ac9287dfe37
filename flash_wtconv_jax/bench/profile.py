"""Where the time of a compiled step goes: the kernels of a trace, by parts of the network.

XLA keeps of each operation the scopes (`jax.named_scope`) that it was traced in, and the profiler
names the operation that launched a kernel. A fusion counts as its last operation does.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax

from flash_wtconv_jax.bench import clocks
from flash_wtconv_jax.bench.clocks import Call, Event

_CALLS = 5
_OTHER = "other"
_INSTRUCTION = re.compile(
    r'^\s*(?:ROOT )?%?([\w.\-]+) = .*?metadata=\{[^}]*?op_name="([^"]*)"', re.M
)


class Share(NamedTuple):
    """The share of a step that one part of a network takes.

    Attributes:
        part: The name of the part, "other" for what is in none.
        direction: "forward" or "backward".
        ms: Milliseconds a call.
        launches: Kernels and copies a call.
    """

    part: str
    direction: str
    ms: float
    launches: float


def shares(program: str, call: Call, parts: Sequence[str]) -> list[Share]:
    """Traces some calls of a compiled program, and adds up their kernels by part.

    Args:
        program: The program's text, `compiled.as_text()`.
        call: Enqueues one call and returns the arrays to wait for.
        parts: Names of scopes; an operation belongs to the first of them that it was traced in.

    Returns:
        What each part takes forward and backward, the parts' order kept, without those of nothing.

    Raises:
        RuntimeError: The profiler shows no event of a GPU.
    """
    jax.block_until_ready(call())

    def run() -> None:
        for _ in range(_CALLS):
            result = call()
        jax.block_until_ready(result)

    events = clocks.traced(run)
    if not events:
        raise RuntimeError("a profile needs a GPU whose events JAX's profiler shows (by CUPTI)")
    return summed(events, scopes(program), parts, _CALLS)


def scopes(program: str) -> dict[str, str]:
    """The scopes of each operation of a compiled program, by the operation's name.

    Args:
        program: The program's text.

    Example:
        >>> scopes('  %dot.1 = f32[2] dot(%a, %b), metadata={op_name="jit(f)/mlp/dot_general"}')
        {'dot.1': 'jit(f)/mlp/dot_general'}
    """
    return dict(_INSTRUCTION.findall(program))


def summed(
    events: Iterable[Event], scopes: Mapping[str, str], parts: Sequence[str], calls: int
) -> list[Share]:
    """Adds up events by part and direction.

    Args:
        events: The events of all calls.
        scopes: The scopes of each operation.
        parts: As of `shares`.
        calls: The number of calls.

    Example:
        >>> events = [Event("gemm", 0.0, 4e6, "dot.1"), Event("gemm", 0.0, 2e6, "dot.2")]
        >>> of = {"dot.1": "jit(f)/jvp(mlp)/dot", "dot.2": "jit(f)/transpose(jvp(mlp))/dot"}
        >>> [share.ms for share in summed(events, of, ["mlp"], calls=2)]
        [2.0, 1.0]
    """
    found: dict[tuple[str, str], list[float]] = {}
    for event in events:
        scope = scopes.get(event.operation, "")
        words = set(re.findall(r"\w+", scope))
        part = next((part for part in parts if part in words), _OTHER)
        direction = "backward" if "transpose" in scope else "forward"
        found.setdefault((part, direction), []).append((event.end - event.start) / 1e6)
    order = [*parts, _OTHER]
    return [
        Share(*key, sum(times) / calls, len(times) / calls)
        for key, times in sorted(
            found.items(), key=lambda one: (order.index(one[0][0]), one[0][1] == "backward")
        )
    ]
