"""The description of a call that implementations, tables and the tuner get."""

import math
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple, Self

from pallas_kernels.common.types import Dtype, Json
from pallas_kernels.dispatch.backend import size_distance

TILE_ROWS = 16
"""Rows whose offsets `maps.RowTable.tile_masks` tells together: the smallest tile of a kernel."""


class Window(NamedTuple):
    """The voxels that offsets read: output `u` and offset `i` read voxel `stride u + dilation i`.

    Attributes:
        kernel_size: Offsets along each axis.
        stride: Distance of the voxels that neighbouring outputs read, along each axis.
        dilation: Distance of the voxels that neighbouring offsets read, along each axis.
        groups: Channels and features fall into so many groups, each convolved apart.
        transposed: Whether inputs and outputs change places: voxel `u` is then read by output
            `stride u + dilation i`.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

    @property
    def taps(self) -> int:
        """The number of offsets, K.

        Example:
            >>> Window((3, 1, 3), (1, 1, 1), (1, 1, 1)).taps
            9
        """
        return math.prod(self.kernel_size)

    @property
    def mirrored(self) -> bool:
        """Whether offset `K - 1 - i` is minus offset `i`, and outputs lie as the inputs do.

        Example:
            >>> Window((3, 3), (1, 1), (2, 2)).mirrored, Window((2, 2), (1, 1), (1, 1)).mirrored
            (True, False)
        """
        return all(k % 2 for k in self.kernel_size) and set(self.stride) == {1}

    def offsets(self) -> list[tuple[int, ...]]:
        """The steps `dilation i` from the voxel at `stride u`, the first axis slowest.

        Those of an odd size are centred, those of an even one begin with 0.

        Example:
            >>> Window((3, 2), (1, 1), (2, 1)).offsets()
            [(-2, 0), (-2, 1), (0, 0), (0, 1), (2, 0), (2, 1)]
        """
        axes = [
            [d * (i - k // 2 * (k % 2)) for i in range(k)]
            for k, d in zip(self.kernel_size, self.dilation, strict=True)
        ]
        return list(product(*axes))


class Problem(NamedTuple):
    """A call as implementations see it.

    Attributes:
        shape: `(batch, capacity, C)`: the samples, the rows of all of them, the channels.
        dtype: The dtype of features and weights.
        features: Channels of the output.
        window: Which voxels an offset reads.
    """

    shape: tuple[int, ...]
    dtype: Dtype
    features: int
    window: Window

    def __str__(self) -> str:
        """The problem as errors name it."""
        return f"x {self.shape} {self.dtype}, {self.features} features, {self.window}"

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The weights as implementations get them, `[K, G, C / G, F / G]`."""
        groups = self.window.groups
        return self.window.taps, groups, self.shape[-1] // groups, self.features // groups

    def measured_as(self) -> Self:
        """The problem whose times count for this one: its capacity a power of two, rounded down.

        Example:
            >>> window = Window((3,), (1,), (1,))
            >>> Problem((2, 1000, 4), "float32", 8, window).measured_as().shape
            (2, 512, 4)
        """
        batch, capacity, channels = self.shape
        if not isinstance(capacity, int) or capacity == 0:
            return self
        return self._replace(shape=(batch, 1 << (capacity.bit_length() - 1), channels))

    def distance(self, measured: Json) -> float:
        """The distance to a measured problem, see `dispatch.backend.Problem`.

        What a table says of the window (stride, groups, ...) must be this problem's.

        Example:
            >>> problem = Problem((1, 1024, 4), "float32", 8, Window((3,), (1,), (1,)))
            >>> measured = {"shape": [8, 2048, 8], "dtype": "float32", "features": 16}
            >>> problem.distance(measured)
            3.0
            >>> problem.distance(measured | {"window": {"stride": [2]}})
            inf
        """
        window = self.window._asdict()
        comparable = str(self.dtype) == measured["dtype"] and all(
            _as_json(window[name]) == value for name, value in measured.get("window", {}).items()
        )
        if not comparable:
            return math.inf
        return size_distance(self.shape, measured["shape"]) + abs(
            math.log2(self.features) - math.log2(measured.get("features", self.features))
        )

    def unsupported(self, dtypes: Sequence[str]) -> list[str]:
        """The reasons why kernels that take some dtypes refuse this problem, a phrase each.

        Example:
            >>> window = Window((3,), (1,), (1,))
            >>> Problem((1, 8, 4), "float64", 8, window).unsupported(["float32"])
            ['float64, float32 alone']
        """
        reasons = [] if self.dtype in dtypes else [f"{self.dtype}, {', '.join(dtypes)} alone"]
        if not all(isinstance(size, int) for size in self.shape):
            reasons.append("arrays of symbolic size")
        return reasons


def _as_json(value: object) -> object:
    """A tuple as the list that JSON has for it."""
    return list(value) if isinstance(value, tuple) else value
