"""The collectives of a compiled program: what its devices send to each other."""

import math
import re

_COLLECTIVE = re.compile(
    # Of one that other work goes on beside it is its end that has the results alone.
    r"= (.*?) (all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter)(?:-done)?\("
)


def collectives(text: str) -> dict[str, tuple[int, int]]:
    r"""The number of each kind of collective in a compiled program, and its elements.

    Args:
        text: The program, as XLA writes it.

    Example:
        >>> collectives("%y = f32[4,8]{1,0} all-reduce(%x), channel_id=1")
        {'all-reduce': (1, 32)}
        >>> start = "%a = (f32[4]{0}, f32[8]{0}) all-gather-start(%x), channel_id=1"
        >>> collectives(f"{start}\n%y = f32[8]{{0}} all-gather-done(%a)")
        {'all-gather': (1, 8)}
    """
    found: dict[str, tuple[int, int]] = {}
    for shapes, kind in _COLLECTIVE.findall(text):
        sizes = re.findall(r"\w+\[([\d,]*)\]", shapes)
        elements = sum(math.prod(int(n) for n in size.split(",") if n) for size in sizes)
        count, before = found.get(kind, (0, 0))
        found[kind] = count + 1, before + elements
    return found
