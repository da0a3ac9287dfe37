"""The types that several operators name. It imports no framework when it runs."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax

Pair = tuple[int, int]
"""One integer for each axis of an image: rows, then columns."""
Taps = tuple["jax.Array", ...]
"""The kernels of a wavelet convolution: the base's first, then those of each level."""
Bands = tuple["jax.Array", ...]
"""Subbands of one level of a wavelet transform."""
