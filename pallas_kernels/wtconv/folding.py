"""The maps between the taps of a level and the one convolution that the `folded_*.cu` compute.

One level with Haar wavelets, and the base convolution, repeat every two pixels. At place `(p, q)`
of a square of two rows and columns they are a convolution of 2k x 2k taps,

    folded[p, q, i, j] = sum_s sign[s, p, q] sign[s, i % 2, j % 2] taps[i // 2, j // 2, s] / 4
                         + base[i - p - k // 2, j - q - k // 2]

of the pixels from `2 (k // 2)` before the square on. Applied to the means of the squares of the
level above, of which low bands are a power of two, that is all that a deeper level adds.
"""

from functools import cache

import numpy as np

_SIGNS = np.array(
    [[[1, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]], np.float32
)
"""The sign of each band at each place of a square."""


@cache
def factors() -> np.ndarray:
    """The factor that each band's tap has in each folded tap that it is part of.

    Returns:
        float32 `[4, 2, 1, 1, 2, 2, 2, 1]`: band, half of a pair of rows of the input, pairs, pairs
        of columns, half of such a pair, column and row of the output, channels.
    """
    found = np.einsum("sij,spq->sijqp", _SIGNS, _SIGNS) / 4
    return found[:, :, None, None, :, :, :, None]


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
