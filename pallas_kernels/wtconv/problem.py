"""The description of a call that implementations, tables and the tuner get, in either framework."""

from collections.abc import Sequence
from typing import NamedTuple

from pallas_kernels.common.refusals import unsupported_sizes
from pallas_kernels.common.types import Dtype, Json
from pallas_kernels.dispatch.backend import dtype_distance, size_distance
from pallas_kernels.haar.filters import unsupported


class Problem(NamedTuple):
    """A call as implementations see it: x is `[N, *spatial, C]`."""

    shape: tuple[int, ...]
    dtype: Dtype
    kernel_size: int
    levels: int
    wavelet: str

    def __str__(self) -> str:
        """The problem as errors name it."""
        kind = f"{self.dtype}, {self.levels} levels of kernel {self.kernel_size}, {self.wavelet}"
        return f"x {self.shape} {kind}"

    def measured_as(self) -> "Problem":
        """The problem whose times count for this one: of a batch of a power of two, not above.

        So a last batch that is smaller, or a growing one, is not measured each time.

        Example:
            >>> Problem((100, 8, 4), "float32", 5, 1, "haar").measured_as().shape
            (64, 8, 4)
        """
        images, *sizes = self.shape
        if isinstance(images, int) and images > 0:
            images = 1 << (images.bit_length() - 1)
        return self._replace(shape=(images, *sizes))

    def distance(self, measured: Json) -> float:
        """The distance to a measured problem, see `dispatch.backend.Problem`.

        Neither the batch nor the wavelet counts; a kernel size or a level more is as far as twice
        the channels.

        Example:
            >>> measured = {"shape": [8, 16, 16, 4], "dtype": "float32", "levels": 3}
            >>> Problem((2, 16, 16, 8), "float32", 5, 2, "haar").distance(measured)
            2.0
        """
        return (
            size_distance(self.shape, measured["shape"])
            + dtype_distance(self.dtype, measured["dtype"])
            + abs(self.kernel_size - measured.get("kernel_size", self.kernel_size))
            + abs(self.levels - measured.get("levels", self.levels))
        )

    def unsupported(
        self,
        dtypes: Sequence[str],
        max_kernel: int,
        levels: range | None = None,
        odd: bool = False,
        axes: Sequence[int] = (2,),
    ) -> list[str]:
        """The reasons why kernels for the Haar wavelet refuse this problem.

        Args:
            dtypes: The dtypes that the kernels take.
            max_kernel: The largest kernel size that they take.
            levels: The numbers of levels that they take; None if any.
            odd: Whether they take odd kernel sizes alone.
            axes: The numbers of spatial axes that they take.

        Returns:
            A phrase for each reason, none where they take the problem.

        Example:
            >>> Problem((2, 8, 4), "float32", 5, 1, "haar").unsupported(["float32"], 3)
            ['1-D signals, 2-D alone', 'kernels of 5, up to 3']
        """
        reasons = unsupported(len(self.shape) - 2, self.dtype, self.wavelet, dtypes, axes)
        if self.kernel_size > max_kernel:
            reasons.append(f"kernels of {self.kernel_size}, up to {max_kernel}")
        if odd and self.kernel_size % 2 == 0:
            reasons.append(f"kernels of {self.kernel_size}, odd ones alone")
        if levels is not None and self.levels not in levels:
            reasons.append(f"{self.levels} levels, {levels[0]} to {levels[-1]}")
        return reasons + unsupported_sizes(self.shape)
