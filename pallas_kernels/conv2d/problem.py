"""The description of a call that implementations, tables and the tuner get."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from pallas_kernels.common.types import Dtype, Json, Pair
from pallas_kernels.dispatch.backend import dtype_distance, size_distance

Each = TypeVar("Each")

LAYOUTS = ("nhwc_hwcf", "nchw_fchw")
"""The layouts of images and filters: channels last, or channels first."""


class Window(NamedTuple):
    """The samples that taps read: output `o` and tap `i` sample `stride o + dilation i - pad`.

    `reflect` mirrors the image about its edge samples where it is padded; otherwise pads are zero.
    With `upsample` 2 the image is one whose pixels are repeated twice along H and along W, and the
    samples, and the pads, are those of the larger image.
    """

    stride: Pair = (1, 1)
    pads: tuple[Pair, Pair] = ((0, 0), (0, 0))
    dilation: Pair = (1, 1)
    groups: int = 1
    reflect: bool = False
    layout: str = "nhwc_hwcf"
    upsample: int = 1

    def output(self, size: Sequence[int], taps: Sequence[int]) -> Pair:
        """Height and width of the output; less than one where the taps do not fit.

        Args:
            size: Height and width of the images.
            taps: Height and width of the filters.

        Example:
            >>> Window(stride=(2, 1), pads=((1, 1), (0, 0))).output((8, 8), (3, 3))
            (4, 6)
            >>> Window(pads=((1, 1), (1, 1)), upsample=2).output((8, 8), (3, 3))
            (16, 16)
        """
        height, width = (
            (self.upsample * n + before + after - d * (k - 1) - 1) // s + 1
            for n, k, s, (before, after), d in zip(
                size, taps, self.stride, self.pads, self.dilation, strict=True
            )
        )
        return height, width

    def images(self, shape: Sequence[int]) -> tuple[int, int, int, int]:
        """The axes `(N, H, W, C)` of a shape of images, or of their strides.

        Example:
            >>> Window(layout="nchw_fchw").images((2, 3, 8, 9))
            (2, 8, 9, 3)
        """
        if self.layout == "nhwc_hwcf":
            n, h, w, c = shape
        else:
            n, c, h, w = shape
        return n, h, w, c

    def filters(self, shape: Sequence[int]) -> tuple[int, int, int, int]:
        """The axes `(HF, WF, C / groups, NF)` of a shape of filters, or of their strides.

        Example:
            >>> Window(layout="nchw_fchw").filters((8, 4, 3, 5))
            (3, 5, 4, 8)
        """
        if self.layout == "nhwc_hwcf":
            h, w, c, f = shape
        else:
            f, c, h, w = shape
        return h, w, c, f

    def laid_out(self, n: Each, h: Each, w: Each, c: Each) -> tuple[Each, Each, Each, Each]:
        """A value for each axis of images in the order of this layout: the inverse of `images`.

        Example:
            >>> Window(layout="nchw_fchw").laid_out(2, 8, 9, 3)
            (2, 3, 8, 9)
        """
        return (n, h, w, c) if self.layout == "nhwc_hwcf" else (n, c, h, w)

    def filters_laid_out(self, h: Each, w: Each, c: Each, f: Each) -> tuple[Each, Each, Each, Each]:
        """The shape of filters of this layout: the inverse of `filters`.

        Example:
            >>> Window(layout="nchw_fchw").filters_laid_out(3, 5, 4, 8)
            (8, 4, 3, 5)
        """
        return (h, w, c, f) if self.layout == "nhwc_hwcf" else (f, c, h, w)


class Joint(NamedTuple):
    """Four phases whose windows are of one size: a convolution to the features of all of them.

    Phases of odd outputs read windows that begin `shift` samples after those of even ones, so that
    output `2 p + 1` is of window `p + shift`, and there are `shift` windows more than samples. The
    filters are those of `joint_filters`.

    Attributes:
        window: The samples that the windows read; those beyond the edges are 0, or the edge.
        shifts: The shifts along H and W, 0 or 1 each.
        windows: The numbers of windows along H and W.
        repeats: Whether the edge is repeated.
    """

    window: Window
    shifts: Pair
    windows: Pair
    repeats: bool

    def counts(self, block: int) -> list[int]:
        """The numbers of outputs of each phase in each block of so many windows, row by row.

        Example:
            >>> Joint(Window(), shifts=(1, 1), windows=(2, 3), repeats=False).counts(4)
            [2, 2, 1, 0, 0, 0, 1, 2]
        """
        n = math.prod(self.windows)
        row, column = np.divmod(np.arange(-(-n // block) * block), self.windows[1])
        high, wide = (size - shift for size, shift in zip(self.windows, self.shifts, strict=True))
        found = []
        for below, right in itertools.product(range(2), repeat=2):
            v, u = row - below * self.shifts[0], column - right * self.shifts[1]
            own = (v >= 0) & (v < high) & (u >= 0) & (u < wide)
            found.append(own.reshape(-1, block).sum(1))
        return [int(count) for count in np.stack(found, 1).ravel()]


class Problem(NamedTuple):
    """A call as implementations see it; shape is `(N, H, W, C)` in any layout."""

    shape: tuple[int, ...]
    dtype: Dtype
    kernel_height: int
    kernel_width: int
    features: int
    window: Window
    out_dtype: Dtype

    def __str__(self) -> str:
        """The problem as errors name it."""
        taps = f"{self.kernel_height}x{self.kernel_width}"
        return f"x {self.shape} {self.dtype}, {self.features} filters of {taps}, {self.window}"

    def measured_as(self) -> "Problem":
        """The problem whose times count for this one: itself."""
        return self

    def distance(self, measured: Json) -> float:
        """The distance to a measured problem, see `dispatch.backend.Problem`.

        Neither the batch nor the output's dtype counts. What a table says of the window (stride,
        dilation, groups, ...) must be this problem's; a table from before there was upsampling
        says nothing of it, and means 1.

        Example:
            >>> problem = Problem((2, 8, 8, 4), "float32", 3, 3, 8, Window(), "float32")
            >>> measured = {"shape": [8, 8, 8, 8], "dtype": "float32", "features": 16}
            >>> problem.distance(measured)
            2.0
            >>> problem.distance(measured | {"window": {"stride": [2, 2]}})
            inf
        """
        window = self.window._asdict()
        # JSON has lists for tuples.
        told = {"upsample": 1} | measured.get("window", {})
        comparable = all(_as_json(window[name]) == value for name, value in told.items())
        if not comparable or not isinstance(self.features, int):
            return math.inf
        return (
            size_distance(self.shape, measured["shape"])
            + dtype_distance(self.dtype, measured["dtype"])
            + abs(math.log2(self.features) - math.log2(measured.get("features", self.features)))
            + abs(self.kernel_height - measured.get("kernel_height", self.kernel_height))
            + abs(self.kernel_width - measured.get("kernel_width", self.kernel_width))
        )


def _as_json(value: object) -> object:
    return [_as_json(one) for one in value] if isinstance(value, tuple) else value
