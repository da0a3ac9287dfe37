"""Float64 arrays, and operations along one axis that every operator's definition uses."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def pad_axis(x: Array, axis: int, before: int, after: int) -> Array:
    """The array with zeros before and after it along one axis."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = (before, after)
    return np.pad(x, pads)


def slice_axis(x: Array, axis: int, start: int, count: int, step: int) -> Array:
    """`count` samples along one axis from `start` on, `step` apart."""
    window = [slice(None)] * x.ndim
    window[axis] = slice(start, start + step * (count - 1) + 1, step)
    return x[tuple(window)]
