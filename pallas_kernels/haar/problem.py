"""What an implementation is told of a call."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from pallas_kernels.haar.filters import beyond_images


class Problem(NamedTuple):
    """What an implementation's `check` is told of a call; shape is that of the whole signal."""

    shape: tuple[int, ...]
    dtype: Any
    ndim: int
    levels: int
    wavelet: str

    def __str__(self) -> str:
        """As errors tell it."""
        return f"a signal {self.shape} {self.dtype}, {self.levels} levels of {self.wavelet}"

    def beyond(self, dtypes: Sequence[str], max_levels: int) -> list[str]:
        """What of it kernels for images and the Haar wavelet do not do.

        Args:
            dtypes: Those that they take.
            max_levels: The most levels that they take.

        Returns:
            A phrase for each, none if they take it.

        Example:
            >>> Problem((2, 8, 4), "float32", 1, 3, "haar").beyond(["float32"], 2)
            ['1-D signals, 2-D alone', '3 levels, up to 2']
        """
        reasons = beyond_images(self.ndim, self.dtype, self.wavelet, dtypes)
        if self.levels > max_levels:
            reasons.append(f"{self.levels} levels, up to {max_levels}")
        if not all(isinstance(size, int) for size in self.shape):
            reasons.append("arrays of symbolic size")
        elif 0 in self.shape:
            reasons.append("an empty array")
        return reasons
