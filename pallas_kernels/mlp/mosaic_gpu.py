"""The MLP's two products beside GELU on Hopper GPUs: those of the dense convolution's kernel."""

import jax
from jax import lax

from pallas_kernels.common.mosaic_gpu import unavailable
from pallas_kernels.common.refusals import refuse, unsupported_sizes
from pallas_kernels.common.tiles import TileConfig
from pallas_kernels.conv2d.mosaic_gpu import DTYPES, TILES, mlp_product
from pallas_kernels.mlp.problem import Problem

__all__ = [
    "DIFFERENTIABLE",
    "check",
    "narrowed_grad",
    "search_space",
    "unavailable",
    "widened",
]

DIFFERENTIABLE = False


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` for what these kernels do not do.

    Args:
        direction: "fwd" or "bwd".
        problem: The call.
    """
    reasons = []
    if problem.dtype not in DTYPES:
        reasons.append(f"{problem.dtype}, {' and '.join(DTYPES)} alone")
    sizes = unsupported_sizes((*problem.shape, problem.hidden, problem.features))
    reasons += sizes
    if not sizes and problem.shape[0] >= 1 << 30:
        reasons.append(f"{problem.shape[0]} rows, which are too many")
    refuse(reasons)


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The tiles that are worth timing, the default for the shape first; see `check`."""
    return [{}, *(tile._asdict() for tile in TILES)]


def widened(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    *,
    kept: bool,
    precision: lax.Precision | None,
    **tile: int,
) -> tuple[jax.Array, ...]:
    """GELU of the first layer, and if it is kept the layer itself; see `vjp`.

    `precision` is ignored: it is about float32, which these kernels do not take.
    """
    return mlp_product(x, kernel, bias, kept=kept, config=_config(tile))


def narrowed_grad(
    dy: jax.Array,
    kernel: jax.Array,
    before: jax.Array,
    *,
    precision: lax.Precision | None,
    **tile: int,
) -> tuple[jax.Array, jax.Array]:
    """The gradient of the first layer's output, and its sum over the rows; see `vjp`."""
    dx, sums = mlp_product(dy, kernel, None, before, transposed=True, config=_config(tile))
    return dx, sums


def _config(tile: dict[str, int]) -> TileConfig | None:
    return TileConfig(**tile) if tile else None
