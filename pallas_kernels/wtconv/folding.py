"""The maps between the taps of a level and the one convolution that `folded_kernels.cu` computes.

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
"""Of each band at each place of a square."""


class Sources(NamedTuple):
    """What folded taps are made of, each array of one shape, followed by 4 of `signs`.

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
    pair, j, column, row, half = np.indices((kernel_size, 2 * kernel_size, 2, 2, 2))
    return _sources(kernel_size, row, column, 2 * pair + half, j)


@cache
def sums(kernel_size: int) -> np.ndarray:
    """The gradients of the taps as sums of the results of a weight gradient's products.

    Args:
        kernel_size: 3, 5 or 7.

    Returns:
        float32 `[sets * 32 * 4, k * k * 5 + 1]`: of each register the factors with which it is a
        part of the gradients of the base's taps, of the four bands' `(k, k, 4)`, and of the bias.
    """
    mixed, whole = kernel_size == 5, 2 if kernel_size == 7 else 1
    sets = whole * kernel_size + (3 if mixed else 1)
    number, lane, k = np.indices((sets, 32, 4))
    m, n = lane // 4 + 8 * (k // 2), 2 * (lane % 4) + k % 2
    row, column = n // 4, n % 4
    pair, i, j = number // whole, m // 8, m % 8 + 8 * (number % whole)
    last = number == sets - 1
    if mixed:
        # Pairs 1, 4 and 2 with their last columns, and the pairs above the first two of these.
        extra = number >= kernel_size
        pair = np.where(extra, np.array([1, 4, 2])[number % 3 - kernel_size % 3] - m // 8, pair)
        i, j = np.where(extra, m // 4 % 2, i), np.where(extra, 8 + m % 4, j)
    of_bias = last & (m == 8)
    i, j = 2 * pair + i, j - 2 * (column // 2)
    i = np.where(last & ((m >= 8) | (not mixed)), -1, i)
    found = _sources(kernel_size, row, column % 2, i, j)
    count = kernel_size**2
    result = np.zeros((number.size, 5 * count + 1), np.float32)
    at = np.arange(number.size)
    result[at, found.base.ravel()] = found.based.ravel()
    for band in range(4):
        result[at, count + 4 * found.tap.ravel() + band] = found.signs[..., band].ravel()
    result[at, -1] = of_bias.ravel()
    return result


def _sources(
    kernel_size: int, row: np.ndarray, column: np.ndarray, i: np.ndarray, j: np.ndarray
) -> Sources:
    """What the folded taps `(i, j)` of places `(row, column)` are made of, zeros outside."""
    radius = kernel_size // 2
    inside = (0 <= i) & (i < 2 * kernel_size) & (0 <= j) & (j < 2 * kernel_size)
    i, j = np.where(inside, i, 0), np.where(inside, j, 0)
    signs = _SIGNS[:, row, column] * _SIGNS[:, i % 2, j % 2] / 4 * inside
    down, across = i - row - radius, j - column - radius
    based = inside & (0 <= down) & (down < kernel_size) & (0 <= across) & (across < kernel_size)
    return Sources(
        i // 2 * kernel_size + j // 2,
        np.moveaxis(signs, 0, -1),
        np.where(based, down * kernel_size + across, 0),
        based.astype(np.float32),
    )
