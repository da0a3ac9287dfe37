"""The four bands of a level, and blocks whose four warpgroups filter one band each.

The kernels of `level2` and `fused_levels` are built on `BandsBlock`. All four warpgroups do the
same on different data, and the last one also issues the TMA loads. They agree that a pipeline stage
is read, or a row in shared memory written, by one barrier of all warpgroups a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common.types import Index, Ref
from pallas_kernels.wtconv.mosaic_gpu.tiles import CHANNELS, Divided, Launched, zeros

__all__ = ["WARPGROUPS", "BandsBlock"]

WARPGROUPS = 4
"""Warpgroups of a block, one for each band."""


class Banded(Divided, Protocol):
    """A division whose blocks have four warpgroups, each with a band."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one value a thread of a warpgroup."""


@dataclass(frozen=True, kw_only=True)
class BandsBlock(Launched):
    """A block whose four warpgroups filter one band each.

    Attributes:
        x: The image in global memory.
        taps: The taps of all levels in global memory.
        rows: The pipeline stages in shared memory, for rows of x.
        full: An mbarrier a stage, on which the TMA load into it arrives.
        arrived: The mbarrier of `warpgroup_barrier`.
    """

    tiling: Banded
    x: Ref
    taps: Ref
    rows: Ref
    full: Ref
    arrived: Ref

    @property
    def warpgroup(self) -> jax.Array:
        """The index of this warpgroup, and of its band: LL, LH, HL or HH."""
        return lax.axis_index("warpgroup")

    def warpgroup_barrier(self) -> None:
        """Waits until all warpgroups of the block have arrived here."""
        plgpu.barrier_arrive(self.arrived)
        plgpu.barrier_wait(self.arrived)

    def zeros(self, count: int) -> list[jax.Array]:
        """Returns `count` sums to begin with, in registers."""
        return zeros(count, self.tiling.shape)

    def view(self, row: Ref, columns: int, parts: int, j: Index, part: int = 0) -> Ref:
        """Returns a view of a part of column j of each strip.

        Args:
            row: A row in shared memory, `[images, strips * columns * parts, C]`.
            columns: Columns of a strip.
            parts: Parts of a column.
            j: The column in a strip.
            part: The part of the column.
        """
        images, strips, _ = self.tiling.shape
        if images == 1:
            # Mosaic (JAX 0.10 to 0.11) does not fold one image with a stride of its own.
            row = row.at[0]
        return row.reshape(images, strips, columns, parts, CHANNELS).at[:, :, j, part]

    def kernel(self, channel_block: Index, level: int) -> list[list[jax.Array]]:
        """Returns the taps of this warpgroup's band, of a level counted from 1."""
        pair, band = lax.div(self.warpgroup, 2), lax.rem(self.warpgroup, 2)
        # The base's taps come first.
        first = self.size**2 * (4 * level - 3 + 2 * pair) + band
        taps = self.taps.at[channel_block, pl.ds(first, 2 * self.size**2 - 1)]
        return [[taps[2 * (d * self.size + e)] for e in range(self.size)] for d in range(self.size)]

    def add_products(
        self, sums: Sequence[jax.Array | None], found: dict[int, jax.Array], taps: list[jax.Array]
    ) -> list[jax.Array]:
        """Adds a row's products with a row of taps to the sums of each column, which may be None.

        Args:
            sums: A sum for each column of a strip.
            found: Values by column, counted from the strip's first one; those left out are zero.
            taps: A row of taps, as many as the kernel is wide.

        Returns:
            The new sums.
        """
        totals = []
        for j, total in enumerate(sums):
            for e, tap in enumerate(taps, j - len(taps) // 2):
                if e in found:
                    product = found[e] * tap
                    total = product if total is None else total + product
            assert total is not None
            totals.append(total)
        return totals
