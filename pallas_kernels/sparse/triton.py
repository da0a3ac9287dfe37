"""The sparse convolution on GPUs: the kernels of `triton_kernels`, launched by jax-triton."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.common._compat import vary_like
from pallas_kernels.common.tiles import TileConfig
from pallas_kernels.common.triton import launch, unavailable
from pallas_kernels.sparse.maps import RowTable
from pallas_kernels.sparse.problem import Problem, Window
from pallas_kernels.sparse.voxels import Keys

__all__ = [
    "DIFFERENTIABLE",
    "check",
    "forward",
    "input_grad",
    "search",
    "search_space",
    "unavailable",
    "weight_grad",
]

DIFFERENTIABLE = False

_STATIC = ("precision", "splits", "ordered", "pairs", *TileConfig._fields)
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
    from pallas_kernels.sparse import triton_launches

    triton_launches.check(problem)


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The parameters that are worth timing, the default ones first; see `check`."""
    from pallas_kernels.sparse import triton_launches

    return triton_launches.search_space(direction, problem)


def search(keys: Keys, sites: Keys, columns: np.ndarray, window: Window) -> jax.Array:
    """The table of a map, `int32 [K, M]`.

    Args:
        keys: The sorted keys of what is read.
        sites: Those of what reads.
        columns: `[columns, D]`: the first step of each column of offsets along the last axis.
        window: The offsets.
    """
    from pallas_kernels.sparse import triton_launches

    padded = np.pad(columns, ((0, 0), (3 - columns.shape[1], 0)))

    found = triton_launches.search(keys, sites, jnp.asarray(padded), window, launch)
    return vary_like((keys, sites), found)


@partial(jax.jit, static_argnames=_STATIC)
def forward(
    x: jax.Array,
    w: jax.Array,
    rows: RowTable,
    *,
    precision: lax.Precision | None,
    splits: int | None = None,
    ordered: bool = True,
    pairs: int | None = None,
    **tiles: int,
) -> jax.Array:
    """The convolution `y [M, F]`; see `vjp` for the arguments.

    The parameters are those of `triton_launches.search_space`; `pairs` is for the gradient of w.
    """
    from pallas_kernels.sparse import triton_launches

    config = TileConfig(**tiles) if tiles else None
    rest = _PRECISIONS[precision], config, splits, ordered, launch
    parts = triton_launches.forward(x, w, rows, *rest)
    y = parts[0] if len(parts) == 1 else parts.sum(0).astype(x.dtype)
    return vary_like((x, w, rows), y)


def input_grad(
    dy: jax.Array,
    w: jax.Array,
    rows: RowTable,
    *,
    precision: lax.Precision | None,
    **parameters: int,
) -> jax.Array:
    """The transpose of the convolution in x, `dx [N, C]`, gathered by the reverse table."""
    return forward(dy, w.swapaxes(2, 3), rows, precision=precision, **parameters)


@partial(jax.jit, static_argnames=("shape", *_STATIC))
def weight_grad(
    x: jax.Array,
    dy: jax.Array,
    rows: RowTable,
    *,
    shape: tuple[int, ...],
    precision: lax.Precision | None,
    splits: int | None = None,
    ordered: bool = True,
    pairs: int | None = None,
    **tiles: int,
) -> jax.Array:
    """The transpose of the convolution in w, an array of its shape.

    Every sum has a fixed order, so results are bitwise reproducible. Its sums are always divided,
    and rows taken in their order, whatever `splits` and `ordered` say of the gradient of x.
    """
    from pallas_kernels.sparse import triton_launches

    config = TileConfig(**tiles) if tiles else None
    rest = shape, _PRECISIONS[precision], config, pairs, launch
    pieces = triton_launches.weight_grad(x, dy, rows, *rest)
    return vary_like((x, dy, rows), jnp.concatenate(pieces))
