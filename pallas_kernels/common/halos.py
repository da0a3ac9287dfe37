"""The samples of its neighbours that a shard of an image computes with.

The shards of a split axis lie in the order of the mesh's axes. What lies beyond the image is zero.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.common.sharding import Shard


def surrounded(
    x: jax.Array, axis: int, shard: Shard, name: str, before: int, after: int
) -> jax.Array:
    """An array with so many of the neighbours' samples before and after its own, along an axis.

    More than the next neighbour has come from those behind it.

    Args:
        x: The shard's own samples.
        axis: The axis.
        shard: The place of the shard.
        name: The rule's name of the axis.
        before: The number of samples before.
        after: The number after; less than zero cuts the shard's own.
    """
    axes, count, own = shard.axes[name], shard.counts[name], x.shape[axis]
    parts, missing = [x], [before, after]
    for end, step in ((0, 1), (1, -1)):
        hop = 1
        while missing[end] > 0 and hop < count:
            take = min(missing[end], own)
            start = own - take if end == 0 else 0
            piece = lax.slice_in_dim(x, start, start + take, axis=axis)
            there = range(count - hop) if end == 0 else range(hop, count)
            pairs = [(i, i + step * hop) for i in there]
            parts.insert(0 if end == 0 else len(parts), lax.ppermute(piece, axes, pairs))
            missing[end], hop = missing[end] - take, hop + 1
    whole = jnp.concatenate(parts, axis) if len(parts) > 1 else x
    edges = [(0, 0, 0)] * x.ndim
    edges[axis] = (missing[0], missing[1], 0)
    return lax.pad(whole, jnp.zeros((), x.dtype), edges)


class Window(NamedTuple):
    """The samples of one axis that a shard of a cascade reads: its own, and a halo.

    A cascade of L levels halves L times, so the window begins at a multiple of `2**L` of the whole
    image, and one exchange serves all levels, since the raw low band is what goes down.

    Attributes:
        axis: The axis of the array.
        name: The rule's name of it.
        own: The shard's own samples.
        align: `2**L`.
        halo: Samples on either side that the operator reaches over, a multiple of `align`.
    """

    axis: int
    name: str
    own: int
    align: int
    halo: int

    @property
    def size(self) -> int:
        """Samples of the window.

        Example:
            >>> Window(1, "h", 16, 4, 8).size, Window(1, "h", 5, 4, 8).size
            (32, 24)
        """
        odd = self.own % self.align
        inner = self.own + self.align - 1 if odd else self.own
        return 2 * self.halo + -(-inner // self.align) * self.align

    @property
    def _fetched(self) -> tuple[int, int]:
        """Samples before and after the shard that hold the window wherever it begins."""
        if self.own % self.align == 0:
            return self.halo, self.halo
        return self.halo + self.align - 1, self.halo + 2 * self.align - 2

    def _begin(self, shard: Shard) -> jax.Array | int:
        """The samples of the window before the shard's own that belong to its first cell."""
        if self.own % self.align == 0:
            return 0
        return lax.axis_index(shard.axes[self.name]) * self.own % self.align

    def extended(self, x: jax.Array, shard: Shard) -> jax.Array:
        """The window of an image, of which the shard's own samples are given."""
        return self._cut(surrounded(x, self.axis, shard, self.name, *self._fetched), shard)

    def neighbours(self, x: jax.Array, shard: Shard) -> tuple[jax.Array, jax.Array]:
        """The halo's samples before the shard's own, and those after, zeros beyond the image.

        They are the next neighbours', which must have as many. Two shards exchange theirs at once:
        only those of the side where they meet may be read, the other repeats them.
        """
        axes, count = shard.axes[self.name], shard.counts[self.name]
        first = lax.slice_in_dim(x, 0, self.halo, axis=self.axis)
        last = lax.slice_in_dim(x, self.own - self.halo, self.own, axis=self.axis)
        if self.is_of_two(shard):
            ours = jnp.where(self.is_second(shard), first, last)
            theirs = lax.ppermute(ours, axes, [(0, 1), (1, 0)])
            return theirs, theirs
        before = lax.ppermute(last, axes, [(i, i + 1) for i in range(count - 1)])
        return before, lax.ppermute(first, axes, [(i, i - 1) for i in range(1, count)])

    def is_of_two(self, shard: Shard) -> bool:
        """Whether a shard is one of two, which meet at one edge."""
        return shard.counts[self.name] == 2

    def is_second(self, shard: Shard) -> jax.Array:
        """Whether a shard, one of two, is the one that comes after the other."""
        return lax.axis_index(shard.axes[self.name]) == 1

    def padded(self, dy: jax.Array, shard: Shard) -> jax.Array:
        """The window with the shard's own samples, and zeros in place of the neighbours'."""
        edges = [(0, 0, 0)] * dy.ndim
        edges[self.axis] = (*self._fetched, 0)
        return self._cut(lax.pad(dy, jnp.zeros((), dy.dtype), edges), shard)

    def cropped(self, y: jax.Array, shard: Shard) -> jax.Array:
        """The shard's own samples of a window."""
        start = self.halo + self._begin(shard)
        return lax.dynamic_slice_in_dim(y, start, self.own, self.axis)

    def _cut(self, fetched: jax.Array, shard: Shard) -> jax.Array:
        if self.own % self.align == 0:
            return fetched
        start = self.align - 1 - self._begin(shard)
        return lax.dynamic_slice_in_dim(fetched, start, self.size, self.axis)
