"""The Haar butterfly: sums and differences of neighbouring samples, along any number of axes.

Both functions take anything that adds and subtracts: numbers, NumPy and JAX arrays, and values
inside a Pallas kernel. They leave out the factor `2**(-ndim / 2)` of the orthonormal transform,
which callers apply once or fold into taps. Triton's form stands in `triton_kernels`.
"""

from typing import Any


def split(*samples: Any) -> tuple[Any, ...]:
    """The unnormalised subbands of `2**ndim` neighbouring samples.

    Args:
        *samples: One sample for each parity in row-major order; pixels `[[a, b], [c, d]]` are
            `a, b, c, d`.

    Returns:
        The subbands in the order of the checkpoint format: subband `s` is high along axis `i` where
        bit `i` of `s` is 1.

    Example:
        >>> split(4, 2, 1, 1)
        (8, 4, 2, 2)
    """
    if len(samples) == 1:
        return samples
    even, odd = samples[::2], samples[1::2]
    low = [a + b for a, b in zip(even, odd, strict=True)]
    high = [a - b for a, b in zip(even, odd, strict=True)]
    return *split(*low), *split(*high)


def merge(*subbands: Any) -> tuple[Any, ...]:
    """The inverse of `split`, `2**ndim` times too large.

    Args:
        *subbands: Subbands in the order that `split` returns.

    Returns:
        One sample for each parity in the order that `split` takes.

    Example:
        >>> [value / 4 for value in merge(*split(4, 2, 1, 1))]
        [4.0, 2.0, 1.0, 1.0]
    """
    if len(subbands) == 1:
        return subbands
    pairs = [
        (low + high, low - high) for low, high in zip(subbands[::2], subbands[1::2], strict=True)
    ]
    return *merge(*(even for even, _ in pairs)), *merge(*(odd for _, odd in pairs))
