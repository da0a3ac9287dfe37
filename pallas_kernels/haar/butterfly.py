"""The Haar butterfly of 2 x 2 pixels: their four sums and differences, and back.

Both functions take anything that adds and subtracts: numbers, arrays, and values inside a Pallas
kernel. They leave out the factor 1/2 of the orthonormal transform, which callers apply or fold into
taps. `triton_kernels` has Triton's form of `split`, `xla` XLA's of both for any number of axes.
"""

from typing import Protocol, Self, TypeVar


class Additive(Protocol):
    """A number, an array, or a value inside a kernel."""

    def __add__(self, other: Self, /) -> Self: ...
    def __sub__(self, other: Self, /) -> Self: ...


Value = TypeVar("Value", bound=Additive)


def split(a: Value, b: Value, c: Value, d: Value) -> tuple[Value, Value, Value, Value]:
    """The four bands of pixels `[[a, b], [c, d]]`, twice as large as those of the transform.

    Returns:
        The low, vertical, horizontal and diagonal band: LL, LH, HL and HH.

    Example:
        >>> split(4, 2, 1, 1)
        (8, 4, 2, 2)
    """
    top, bottom, right, cross = a + b, c + d, a - b, c - d
    return top + bottom, top - bottom, right + cross, right - cross


def merge(
    low: Value, vertical: Value, horizontal: Value, diagonal: Value
) -> tuple[Value, Value, Value, Value]:
    """The pixels `a, b, c, d` of four bands, twice as large as those of the transform.

    Example:
        >>> [value / 4 for value in merge(*split(4, 2, 1, 1))]
        [4.0, 2.0, 1.0, 1.0]
    """
    top, bottom = low + vertical, low - vertical
    right, cross = horizontal + diagonal, horizontal - diagonal
    return top + right, top - right, bottom + cross, bottom - cross
