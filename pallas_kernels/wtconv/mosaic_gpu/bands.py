"""What launches share whose four warpgroups filter a band each."""

from dataclasses import dataclass
from typing import Any

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.wtconv.mosaic_gpu.tiles import CHANNELS, Launched, zeros

__all__ = ["WARPGROUPS", "BandsBlock", "Square", "analysed", "synthesised"]

WARPGROUPS = 4
"""One for each band."""

Bands = tuple[Any, Any, Any, Any]
"""LL, LH, HL and HH."""
Square = tuple[tuple[Any, Any], tuple[Any, Any]]
"""Two rows of two values."""


def analysed(square: Square) -> Bands:
    """The bands of a square, twice as large.

    Example:
        >>> analysed(((1, 2), (3, 5)))
        (11, -5, -3, 1)
    """
    (a, b), (c, d) = square
    top, bottom, falls, rises = a + b, c + d, a - b, c - d
    return top + bottom, top - bottom, falls + rises, falls - rises


def synthesised(bands: Bands) -> Square:
    """The square of bands: of those of `analysed`, four times as large.

    Example:
        >>> synthesised(analysed(((1, 2), (3, 5))))
        ((4, 8), (12, 20))
    """
    low, vertical, horizontal, diagonal = bands
    top, bottom = low + vertical, low - vertical
    right, cross = horizontal + diagonal, horizontal - diagonal
    return (top + right, top - right), (bottom + cross, bottom - cross)


@dataclass(frozen=True, kw_only=True)
class BandsBlock(Launched):
    """A block of such a launch, and references that it has at least."""

    x: Any
    taps: Any
    rows: Any
    full: Any
    met: Any

    @property
    def warpgroup(self) -> Any:
        """Number of this warpgroup, and of its band: LL, LH, HL or HH."""
        return lax.axis_index("warpgroup")

    def meet(self) -> None:
        """Waits until all warpgroups have come here."""
        plgpu.barrier_arrive(self.met)
        plgpu.barrier_wait(self.met)

    def zeros(self, count: int) -> list[Any]:
        """Sums to begin with."""
        return zeros(count, self.tiling.shape)

    def view(self, row: Any, columns: int, parts: int, j: Any, part: int = 0) -> Any:
        """A part of column j of each strip: of a row `[images, strips * columns * parts, C]`."""
        images, strips, _ = self.tiling.shape
        if images == 1:
            # Mosaic (JAX 0.10 to 0.11) does not fold one image with a stride of its own.
            row = row.at[0]
        return row.reshape(images, strips, columns, parts, CHANNELS).at[:, :, j, part]

    def kernel(self, chunk: Any, level: int) -> list[list[Any]]:
        """The taps of this warpgroup's band: of a level, counted from 1."""
        pair, band = lax.div(self.warpgroup, 2), lax.rem(self.warpgroup, 2)
        # The base's taps come first.
        first = self.size**2 * (4 * level - 3 + 2 * pair) + band
        taps = self.taps.at[chunk, pl.ds(first, 2 * self.size**2 - 1)]
        return [[taps[2 * (d * self.size + e)] for e in range(self.size)] for d in range(self.size)]

    def add_products(self, sums: list[Any], found: dict[int, Any], taps: list[Any]) -> list[Any]:
        """Adds a row's products with a row of taps to the sums of each column, which may be None.

        Args:
            sums: One for each column of a strip.
            found: Its columns by number, from the strip's first on; those left out are zero.
            taps: As many as the kernel is wide.
        """
        totals = []
        for j, total in enumerate(sums):
            for e, tap in enumerate(taps, j - len(taps) // 2):
                if e in found:
                    product = found[e] * tap
                    total = product if total is None else total + product
            totals.append(total)
        return totals
