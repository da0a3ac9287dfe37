"""The maps between the taps of a level and the one convolution that the `folded_*.cu` compute.

One level with Haar wavelets, and the base convolution, repeat every two pixels. At place `(p, q)`
of a square of two rows and columns they are a convolution of 2k x 2k taps,

    folded[p, q, i, j] = sum_s sign[s, p, q] sign[s, i % 2, j % 2] taps[i // 2, j // 2, s] / 4
                         + base[i - p - k // 2, j - q - k // 2]

of the pixels from `2 (k // 2)` before the square on. Applied to the means of the squares of the
level above, of which low bands are a power of two, that is all that a deeper level adds.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

_SIGNS = np.array(
    [[[1, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]], np.float32
)
"""The sign of each band at each place of a square."""


class Sources(NamedTuple):
    """Returns what folded taps are made of, each array of one shape, followed by 4 of `signs`.

    Attributes:
        tap: The number `i * k + j` of the tap of all four bands.
        signs: The factors of the four bands' taps.
        base: The number of the base's tap.
        based: The factor of the base's tap.
    """

    tap: np.ndarray
    signs: np.ndarray
    base: np.ndarray
    based: np.ndarray


@cache
def taps(kernel_size: int) -> Sources:
    """The folded taps, in the kernels' order.

    Args:
        kernel_size: 3, 5 or 7.

    Returns:
        Arrays `[k, 2k, 2, 2, 2]`: pair of rows and column of the input, column and row of the
        output, row of the input.
    """
    radius = kernel_size // 2
    pair, j, column, row, half = np.indices((kernel_size, 2 * kernel_size, 2, 2, 2))
    i = 2 * pair + half
    signs = _SIGNS[:, row, column] * _SIGNS[:, half, j % 2] / 4
    down, across = i - row - radius, j - column - radius
    based = (0 <= down) & (down < kernel_size) & (0 <= across) & (across < kernel_size)
    return Sources(
        pair * kernel_size + j // 2,
        np.moveaxis(signs, 0, -1),
        np.where(based, down * kernel_size + across, 0),
        based.astype(np.float32),
    )


@cache
def products(kernel_size: int) -> np.ndarray:
    """The two products of a weight gradient that the gradient of each folded tap is the sum of.

    Args:
        kernel_size: 3, 5 or 7.

    Returns:
        int32 `[16 * k * k]`, in the kernels' order: the number of one result of a channel, and
        65536 times that of the other.
    """
    mixed, whole = kernel_size == 5, 2 if kernel_size == 7 else 1
    pair, j, column, row, half = np.indices((kernel_size, 2 * kernel_size, 2, 2, 2))

    def number(more: int) -> np.ndarray:
        """Returns the results of two columns further of x and of dy."""
        at, n = j + more, 4 * row + column + more
        product, m = whole * pair + at // 8, 8 * half + at % 8
        if mixed:
            # The last four columns: pairs 1 and 0, 4 and 3, and 2.
            last = at >= 8
            product = np.where(last, kernel_size + np.array([0, 0, 2, 1, 1])[pair], product)
            above = np.array([8, 0, 0, 8, 0])[pair]
            m = np.where(last, above + 4 * half + at % 4, m)
        return (product * 16 + m) * 8 + n

    return (number(0) + (number(2) << 16)).ravel().astype(np.int32)
