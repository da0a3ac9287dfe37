"""The depthwise sparse convolution on GPUs: Triton kernels, launched by jax-triton."""

from functools import partial

import jax
from jax import lax

from pallas_kernels.common._compat import vary_like
from pallas_kernels.common.triton import launch, unavailable
from pallas_kernels.sparse.depthwise.problem import Problem
from pallas_kernels.sparse.maps import RowTable

__all__ = [
    "DIFFERENTIABLE",
    "check",
    "forward",
    "input_grad",
    "search_space",
    "unavailable",
    "weight_grad",
]

DIFFERENTIABLE = False

_STATIC = ("precision", "block_m", "block_n", "warps", "ordered")


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` where these kernels do not take a problem.

    Args:
        direction: "fwd" or "bwd".
        problem: The call.
    """
    from pallas_kernels.sparse.depthwise import triton_launches

    triton_launches.check(problem)


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The parameters that are worth timing, the default ones first; see `check`."""
    from pallas_kernels.sparse.depthwise import triton_launches

    return triton_launches.search_space(direction, problem)


@partial(jax.jit, static_argnames=_STATIC)
def forward(
    x: jax.Array, w: jax.Array, rows: RowTable, *, precision: lax.Precision | None, **tiles: int
) -> jax.Array:
    """The convolution `y [M, C]`; see `vjp` for the arguments.

    The parameters are those of `triton_launches.search_space`.
    """
    from pallas_kernels.sparse.depthwise import triton_launches

    own = triton_launches.Tiles(**tiles) if tiles else None
    return vary_like((x, w, rows), triton_launches.forward(x, w, rows, own, launch))


def input_grad(
    dy: jax.Array, w: jax.Array, rows: RowTable, *, precision: lax.Precision | None, **tiles: int
) -> jax.Array:
    """The transpose of the convolution in x, `dx [N, C]`: the convolution by the reverse table."""
    return forward(dy, w, rows, precision=precision, **tiles)


@partial(jax.jit, static_argnames=("shape", *_STATIC))
def weight_grad(
    x: jax.Array,
    dy: jax.Array,
    rows: RowTable,
    *,
    shape: tuple[int, ...],
    precision: lax.Precision | None,
    **tiles: int,
) -> jax.Array:
    """The transpose of the convolution in w, `dw [K, C]`.

    Every sum has a fixed order, so results are bitwise reproducible.
    """
    from pallas_kernels.sparse.depthwise import triton_launches

    own = triton_launches.Tiles(**tiles) if tiles else None
    parts = triton_launches.weight_grad(x, dy, rows, own, launch)
    return vary_like((x, dy, rows), parts.sum(0)).astype(x.dtype)
