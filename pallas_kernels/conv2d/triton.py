"""The dense convolution on GPUs: the kernels of `triton_kernels`, launched by jax-triton."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.common._compat import vary_like
from pallas_kernels.common.dtypes import common_dtype
from pallas_kernels.common.linear import transposed
from pallas_kernels.common.tiles import TileConfig
from pallas_kernels.common.triton import launch, unavailable
from pallas_kernels.conv2d.moments import WithMoments, of_tiles
from pallas_kernels.conv2d.problem import Joint, Problem, Window
from pallas_kernels.conv2d.whole_rows import offered
from pallas_kernels.conv2d.xla import mirrored

__all__ = [
    "DIFFERENTIABLE",
    "check",
    "forward",
    "input_grad",
    "search_space",
    "unavailable",
    "upsampled_with_moments",
    "weight_grad",
]

DIFFERENTIABLE = False

_STATIC = ("window", "precision", "config")
_PRECISIONS = {
    None: "ieee",
    lax.Precision.HIGHEST: "ieee",
    lax.Precision.HIGH: "tf32x3",
    lax.Precision.DEFAULT: "tf32",
}


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` where these kernels do not take a problem.

    Args:
        direction: "fwd" or "bwd".
        problem: The call.
    """
    from pallas_kernels.conv2d import triton_launches

    triton_launches.check(problem)


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The tiles that are worth timing, the default ones first; see `check` for the arguments."""
    from pallas_kernels.conv2d import triton_launches

    return [{}, *offered(problem), *triton_launches.search_space(problem)]


@partial(jax.jit, static_argnames=(*_STATIC, "activation", "out_dtype", "moments"))
def forward(
    x: jax.Array,
    w: jax.Array,
    bias: jax.Array | None,
    *,
    window: Window,
    activation: str | None,
    out_dtype: DTypeLike,
    precision: lax.Precision | None,
    config: TileConfig | None,
    moments: bool = False,
) -> jax.Array | WithMoments:
    """The operator; see `vjp` for the arguments."""
    from pallas_kernels.conv2d import triton_launches

    if bias is not None:
        bias = bias.astype(jnp.float32)
    how = window, activation, out_dtype, _PRECISIONS[precision], config, launch
    if not moments:
        return vary_like((x, w, bias), triton_launches.forward(x, w, bias, *how))
    y, counts, mean, squares = triton_launches.forward_with_moments(x, w, bias, *how)
    return vary_like((x, w, bias), (y, of_tiles(counts, mean, squares)))


@partial(jax.jit, static_argnames=("joint", "out_dtype", "precision", "config"))
def upsampled_with_moments(
    x: jax.Array,
    w: jax.Array,
    *,
    joint: Joint,
    out_dtype: DTypeLike,
    precision: lax.Precision | None,
    config: TileConfig | None,
) -> WithMoments:
    """The convolution of upsampled images, whose phases are one launch; see `vjp`."""
    from pallas_kernels.conv2d import triton_launches

    how = joint, out_dtype, _PRECISIONS[precision], config, launch
    y, counts, *found = triton_launches.upsampled_with_moments(x, w, *how)
    # Each phase of a tile is a tile of its own.
    mean, squares = (one.reshape(one.shape[0], len(counts), -1) for one in found)
    return vary_like((x, w), (y, of_tiles(counts, mean, squares)))


@partial(jax.jit, static_argnames=(*_STATIC, "shape", "dtype"))
def input_grad(
    dy: jax.Array,
    w: jax.Array,
    *,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    window: Window,
    precision: lax.Precision | None,
    config: TileConfig | None,
) -> jax.Array:
    """The transpose of the convolution in x, applied to dy: an array `[N, *shape]`."""
    from pallas_kernels.conv2d import triton_launches

    common = common_dtype(dy.dtype, w.dtype)
    dy, w = dy.astype(common), w.astype(common)
    image, written, mirror = (dy.shape[0], *shape), dtype, None
    padded = image
    if window.reflect:
        # The kernel computes the gradient of the padded images; the transpose of mirroring follows.
        mirror, written = partial(mirrored, window=window), jnp.float32
        padded = jax.eval_shape(mirror, jax.ShapeDtypeStruct(image, written)).shape
        window = window._replace(pads=((0, 0), (0, 0)), reflect=False)
    dx = triton_launches.input_grad(
        dy, w, padded, window, written, _PRECISIONS[precision], config, launch
    )
    dx = vary_like((dy, w), dx)
    return dx if mirror is None else transposed(mirror, image, dx).astype(dtype)


@partial(jax.jit, static_argnames=(*_STATIC, "shape", "dtype"))
def weight_grad(
    x: jax.Array,
    dy: jax.Array,
    *,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    window: Window,
    precision: lax.Precision | None,
    config: TileConfig | None,
) -> jax.Array:
    """The transpose of the convolution in w, applied to dy: an array of the filters' shape.

    Every sum has a fixed order, so results are bitwise reproducible.
    """
    from pallas_kernels.conv2d import triton_launches

    common = common_dtype(dy.dtype, x.dtype)
    sums = triton_launches.weight_grad(
        *(x.astype(common), dy.astype(common), shape, window, _PRECISIONS[precision]),
        config,
        launch,
    )
    return vary_like((x, dy), sums.sum(axis=0)).astype(dtype)
