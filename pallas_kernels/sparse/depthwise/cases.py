"""The correctness cases of depthwise sparse convolution: of the regular one, a channel a group.

Imports NumPy and the oracle alone.
"""

from typing import Any

from pallas_kernels.sparse import cases


class Case(cases.Case):
    """One call, whose groups and features are its channels, and whose weights are `[K, C]`."""

    def drawn(self) -> cases.Drawn:
        """Returns coordinates, x, w, no bias and dy, rounded; x is NaN where there is no voxel.

        Example:
            >>> CASES[0].drawn()[2].shape
            (27, 6)
        """
        coords, x, w, bias, dy = super().drawn()
        return coords, x, w[..., 0, 0], bias, dy


def _case(
    voxels: tuple[int, ...],
    extent: int,
    channels: int,
    kernel_size: int = 3,
    stride: int = 1,
    dilation: int = 1,
    **others: Any,
) -> Case:
    """A case of as many groups and features as channels."""
    sizes = kernel_size, stride, dilation, channels
    return Case(voxels, extent, channels, channels, *sizes, **others)


CASES: tuple[Case, ...] = (
    _case((64,), 4, 6),
    _case((40, 0, 23), 6, 5, 2, 2),
    _case((17, 9), 24, 33, 4, 1, 3, ndim=1),
    _case((12,), 24, 4, 3, 2),
    _case((0, 0), 4, 16),
    _case((60,), 6, 3, 5),
    _case((40, 3), 6, 4, 3, 2, transposed=True),
    _case((40, 23), 6, 8, dtype="bfloat16"),
    _case((40, 23), 6, 8, 3, 2, dtype="float16"),
    _case((40, 23), 6, 8, 3, 2, dtype="float64"),
)
"""Every kind of map once, and what others get wrong."""
