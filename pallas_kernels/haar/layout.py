"""The axes of an array that a transform is along, and the array with channels last."""

import operator
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.common.types import Tree


class Layout(NamedTuple):
    """The place of a signal's samples in an array.

    Attributes:
        places: The axes of the samples, counted from the first.
        lifted: Whether the array's last axis is one of them: one channel is added after it.
        in_place: Whether they stand before the channels already, in order.
    """

    places: tuple[int, ...]
    lifted: bool
    in_place: bool

    def moved(self, x: jax.Array) -> jax.Array:
        """The array as `[*batch, *spatial, C]`.

        Example:
            >>> layout_of((5, 6, 7), "x", (1, 2)).moved(jnp.ones((5, 6, 7))).shape
            (5, 6, 7, 1)
        """
        x = x[..., None] if self.lifted else x
        return x if self.in_place else jnp.moveaxis(x, self.places, self._last)

    def restored(self, x: jax.Array) -> jax.Array:
        """An array like that which `moved` returns, laid out as before."""
        x = x if self.in_place else jnp.moveaxis(x, self._last, self.places)
        return x[..., 0] if self.lifted else x

    def moved_sharding(self, sharding: Any, ndim: int) -> Any:
        """A sharding, or a spec, of the array that `moved` returns; anything else as it is.

        Args:
            sharding: The sharding of the array before.
            ndim: The number of the moved array's axes.

        Example:
            >>> list(layout_of((5, 6, 7), "x", (0,)).moved_sharding(jax.P(None, "n"), 3))
            ['n', None, None]
        """
        if isinstance(sharding, jax.sharding.NamedSharding):
            return sharding.update(spec=self.moved_sharding(sharding.spec, ndim))
        if self.in_place or not isinstance(sharding, jax.P):
            return sharding
        entries = [*sharding, *[None] * (ndim - len(sharding))]
        others = [i for i in range(len(entries)) if i not in self.places]
        return jax.P(*(entries[i] for i in [*others[:-1], *self.places, others[-1]]))

    @property
    def _last(self) -> range:
        return range(-1 - len(self.places), -1)


# Arrays of the same shape are read again and again, and eager calls wait for this.
@lru_cache(1024)
def layout_of(shape: tuple[int, ...], name: str, axes: tuple[int, ...]) -> Layout:
    """The layout of an array.

    Args:
        shape: Its shape.
        name: Its name, for the error.
        axes: The axes of the samples, counted from the first or the last.

    Returns:
        Its layout.

    Raises:
        ValueError: The array has fewer axes, or one is named twice.

    Example:
        >>> layout_of((5, 6, 7), "x", (-2,))
        Layout(places=(1,), lifted=False, in_place=True)
    """
    ndim, count = len(shape), len(axes)
    if axes == tuple(range(-1 - count, -1)) and ndim <= count:
        spatial = ("L", "H, W", "D, H, W")[count - 1]
        raise ValueError(f"{name}: expected an array [*batch, {spatial}, C], got shape {shape}")
    within = all(-ndim <= axis < ndim for axis in axes)
    places = tuple(axis % ndim for axis in axes) if within else ()
    if len(set(places)) != count:
        raise ValueError(f"axes={axes}: expected different axes of {name}, of shape {shape}")
    lifted = ndim - 1 in places
    last = ndim - 1 + lifted
    return Layout(places, lifted, places == tuple(range(last - count, last)))


def checked_axes(axes: Sequence[int], count: int | None = None) -> tuple[int, ...]:
    """The argument `axes=` as integers.

    Args:
        axes: As the caller gave it.
        count: How many there must be; None takes one to three.

    Returns:
        The axes.

    Raises:
        ValueError: They are no integers, or another number of them.

    Example:
        >>> checked_axes([0, 1], 2)
        (0, 1)
    """
    try:
        found = tuple(operator.index(axis) for axis in axes)
    except TypeError:
        found = ()
    if len(found) not in ((1, 2, 3) if count is None else (count,)):
        raise ValueError(f"axes={axes!r}: expected {count or '1 to 3'} integers")
    return found


def all_but_last(arrays: Tree) -> tuple[int, ...]:
    """All axes but the last of an array, or of the first one of a tree.

    Raises:
        ValueError: There is no such axis, or there are more than three.

    Example:
        >>> all_but_last({"a": None, "d": jnp.ones((2, 3, 4))})
        (0, 1)
    """
    ndim = next((jnp.ndim(leaf) for leaf in jax.tree.leaves(arrays)), 0)
    if not 2 <= ndim <= 4:
        raise ValueError(
            f"axes=None is all axes but the last, of an array of {ndim} axes: name 1 to 3 of them"
        )
    return tuple(range(ndim - 1))
