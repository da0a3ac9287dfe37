"""The shards of a convolution's arrays, dense or depthwise, and the samples that they read.

Whoever convolves a shard first brings the samples that taps reach in its neighbours, then uses a
window that pads nothing there.
"""

from collections.abc import Sequence
from functools import cache

import jax

from pallas_kernels.common import halos, sharding
from pallas_kernels.conv2d.problem import Window


@cache
def rule(window: Window, size: tuple[int, ...], taps: tuple[int, ...]) -> sharding.Rule:
    """The axes of images, filters and the output.

    Channels and features may be split where there is one group; several groups may be split
    themselves, with the channels and the features of each. Rows and columns may be where each shard
    of the image has the outputs of its own samples: as many as `size / stride` in all.

    Args:
        window: The window.
        size: Height and width of the images.
        taps: Height and width of the filters.

    Example:
        >>> found = rule(Window(pads=((1, 1), (1, 1)), stride=(2, 1)), (8, 8), (3, 3))
        >>> found.operands, found.results, found.cells
        (('n h w c', '_ _ c f'), ('n h w f',), (('h', 4), ('w', 8)))
    """
    known = all(isinstance(n, int) for n in size) and window.upsample == 1 and not window.reflect
    outputs = window.output(size, taps) if known else (0, 0)
    ends = zip("hw", size, outputs, window.stride, strict=True)
    cells = [(name, out) for name, n, out, step in ends if out and n == out * step]
    rows, columns = (name if name in dict(cells) else "_" for name in "hw")
    before, each, after = ("c", "c", "f") if window.groups == 1 else ("g", "_", "g")
    if window.groups > 1:
        cells.append(("g", window.groups))
    images, output = (" ".join(window.laid_out("n", rows, columns, c)) for c in (before, after))
    filters = " ".join(window.filters_laid_out("_", "_", each, after))
    free = frozenset("ncf" if window.groups == 1 else "n")
    return sharding.Rule((images, filters), (output,), free, tuple(cells))


def rule_of(window: Window, images: tuple[int, ...], filters: tuple[int, ...]) -> sharding.Rule:
    """The rule for images and filters of these shapes; batches of images may have any rank."""
    shape = window.images(images[-4:] if len(images) > 3 else (1, *images))
    return rule(window, shape[1:3], window.filters(filters)[:2])


def local_shape(
    shape: tuple[int, ...], window: Window, taps: Sequence[int], shard: sharding.Shard
) -> tuple[int, ...]:
    """The shape `(N, H, W, C)` of what a shard of images of this shape reads.

    Args:
        shape: The shape of all images.
        window: The window of all.
        taps: Height and width of the filters.
        shard: The place of the shard.

    Example:
        >>> halves = sharding.Shard({"h": ("rows",)}, {"h": 2})
        >>> local_shape((1, 8, 8, 4), Window(pads=((1, 1), (1, 1))), (3, 3), halves)
        (1, 6, 8, 4)
    """
    channels = "c" if window.groups == 1 else "g"
    n, height, width, c = shard.local(shape, f"n h w {channels}")
    return n, *read((height, width), window, taps, shard), c


def read(
    size: Sequence[int], window: Window, taps: Sequence[int], shard: sharding.Shard
) -> tuple[int, ...]:
    """Height and width of what a shard of this height and width reads."""
    around = _around(window, taps, shard)
    return tuple(n + sum(around.get(name, (0, 0))) for name, n in zip("hw", size, strict=True))


def surrounded(
    x: jax.Array, window: Window, taps: Sequence[int], shard: sharding.Shard
) -> jax.Array:
    """The images that a shard reads, of which x has its own samples."""
    for name, (before, after) in _around(window, taps, shard).items():
        axis = window.laid_out("n", "h", "w", "c").index(name)
        x = halos.surrounded(x, axis, shard, name, before, after)
    return x


def inside(window: Window, shard: sharding.Shard) -> Window:
    """The window of a shard: its own groups, and no padding where it has its neighbours' samples.

    Example:
        >>> halves = sharding.Shard({"h": ("rows",)}, {"h": 2})
        >>> inside(Window(pads=((1, 1), (1, 1))), halves).pads
        ((0, 0), (1, 1))
    """
    rows, columns = (
        (0, 0) if shard.splits(name) else pads for name, pads in zip("hw", window.pads, strict=True)
    )
    groups = window.groups // shard.counts.get("g", 1)
    return window._replace(pads=(rows, columns), groups=groups)


def _around(
    window: Window, taps: Sequence[int], shard: sharding.Shard
) -> dict[str, tuple[int, int]]:
    """The samples that a shard reads around its own, along each axis of an image that is split."""
    found = {}
    for i, name in enumerate("hw"):
        if shard.splits(name):
            before, reach = window.pads[i][0], window.dilation[i] * (taps[i] - 1)
            found[name] = before, reach - before - window.stride[i] + 1
    return found
