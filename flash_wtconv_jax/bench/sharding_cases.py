"""Every operator over every axis that it can be split along, for `flash-wtconv bench sharding`."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from pallas_kernels import haar
from pallas_kernels.common.types import Tree
from pallas_kernels.conv2d import conv2d
from pallas_kernels.depthwise import depthwise_conv2d
from pallas_kernels.sparse import from_coords, spatially_sparse_conv
from pallas_kernels.sparse.shapes import room
from pallas_kernels.stylize import conv2d_instance_norm, instance_norm
from pallas_kernels.wtconv import wtconv1d, wtconv2d, wtconv3d


class Case(NamedTuple):
    """A call of an operator, and the axes along which it is split.

    Attributes:
        name: The name of the operator.
        function: Function of arrays that is differentiated, and of what is not.
        arrays: The arrays that it is differentiated by, trees of NumPy's.
        axes: Their axes, by names of letters, as trees of the same form.
        splits: The axes that are split, one after the other.
        given: What it is not differentiated by, whose first axis is `s`.
        rounding: The most that gradients, sums in another order, may be off over their RMS.
    """

    name: str
    function: Callable[..., Tree]
    arrays: tuple[Tree, ...]
    axes: tuple[Tree, ...]
    splits: str
    given: tuple[Tree, ...] = ()
    rounding: float = 1e-4


def cases(small: bool, devices: int) -> Iterator[Case]:
    """The cases, of images that take a device some milliseconds.

    Args:
        small: Whether they are of a size that a test on a CPU has time for.
        devices: The number of devices, which divides every axis that is split.

    Example:
        >>> [case.name for case in cases(True, 2)][:4]
        ['wtconv1d', 'wtconv2d', 'wtconv3d', 'depthwise']
    """
    n, c = (devices, 2 * devices) if small else (4 * devices, 16 * devices)
    c = max(c, 64) if not small else c
    for ndim, large, tiny in ((1, 4096, 64), (2, 128, 8), (3, 32, 4)):
        side = tiny * (devices if small else 1)
        yield _wtconv(ndim, n, tuple([side if small else large] * ndim), c, 1 if small else 2)
    side = 8 * devices if small else 128
    x = _drawn((n, side, 16 if small else 128, c), 0)
    of_x, taps = "n h w c", _filters((3, 3, c, c), 1)
    vectors = [_drawn((c,), seed) for seed in (2, 3)]
    yield Case(
        "depthwise",
        depthwise_conv2d,
        (x, _filters((7, 7, 1, c), 1), vectors[0]),
        (of_x, "_ _ _ c", "c"),
        "nch",
    )
    dense = partial(_conv2d, padding=1)
    yield Case("conv2d", dense, (x, taps, vectors[0]), (of_x, "_ _ c f", "f"), "ncfh")
    strided = partial(_conv2d, stride=2, padding=((1, 0), (1, 0)))
    yield Case("conv2d stride 2", strided, (x, taps, vectors[0]), (of_x, "_ _ c f", "f"), "nfh")
    groups = partial(_conv2d, padding=1, groups=devices)
    of_group = _filters((3, 3, c // devices, c), 1)
    yield Case("conv2d groups", groups, (x, of_group, vectors[0]), (of_x, "_ _ _ c", "c"), "nch")
    yield Case("haar", _haar, (x,), (of_x,), "nch")
    yield Case("instance_norm", instance_norm, (x, *vectors), (of_x, "c", "c"), "nc")
    normed = partial(conv2d_instance_norm, padding=1)
    # Of sums 20 times as large a norm leaves the filters' gradient: two GPUs are 6.5e-4 off one.
    yield Case(
        "conv2d_instance_norm",
        normed,
        (x, taps, *vectors),
        (of_x, "_ _ c f", "f", "f"),
        "nf",
        rounding=1e-3,
    )
    yield _scenes(devices, 32 if small else 4096, c)


def _drawn(shape: tuple[int, ...], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def _filters(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Taps that keep the RMS of an image: sines of large numbers turn rounding into errors."""
    return _drawn(shape, seed) / np.float32(math.sqrt(math.prod(shape[:-1])))


def _wtconv(ndim: int, n: int, size: tuple[int, ...], c: int, levels: int) -> Case:
    k = (3,) * ndim
    shapes = {"base_kernel": (*k, 1, c), "base_scale": (c,), "base_bias": (c,)}
    for i in range(levels):
        shapes[f"wavelet_kernel_{i}"] = (*k, 2**ndim, c)
        shapes[f"wavelet_scale_{i}"] = (2**ndim, c)
    params = {
        name: _filters(shape, seed) if "kernel" in name else _drawn(shape, seed)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    axes = {name: " ".join([*"_" * (len(shape) - 1), "c"]) for name, shape in shapes.items()}
    spatial = ("h", "h w", "h w _")[ndim - 1]
    function = (wtconv1d, wtconv2d, wtconv3d)[ndim - 1]
    arrays = _drawn((n, *size, c), 99), params
    return Case(f"wtconv{ndim}d", function, arrays, (f"n {spatial} c", axes), "nch")


def _conv2d(x: jax.Array, w: jax.Array, bias: jax.Array, **options: Any) -> jax.Array:
    return conv2d(x, w, bias=bias, **options)


def _haar(x: jax.Array) -> Tree:
    bands = haar.wavedec2(x, level=2)
    return bands, haar.waverec2([bands[0], None, bands[2]], shape=x.shape[1:3])


def _scenes(devices: int, capacity: int, c: int) -> Case:
    """Scenes of voxels that are stacked, of each its own map."""
    coords = room(capacity, batch=1, ndim=3)
    scenes = [
        from_coords(coords[: capacity - 8 * i], _drawn((capacity - 8 * i, c), i), capacity=capacity)
        for i in (0, 1)
    ]
    stacked = jax.tree.map(lambda *each: np.stack(each), *scenes * devices)

    def function(features: jax.Array, w: jax.Array, bias: jax.Array, scenes: Any) -> jax.Array:
        def one(features: jax.Array, scene: Any) -> jax.Array:
            return spatially_sparse_conv(scene.with_features(features), w, 3, bias=bias).features

        return jax.vmap(one)(features, scenes)

    arrays = np.asarray(stacked.features), _filters((27, c, c), 7), _drawn((c,), 8)
    axes = "s _ c", "_ c f", "f"
    return Case("sparse scenes", function, arrays, axes, "scf", (stacked,))
