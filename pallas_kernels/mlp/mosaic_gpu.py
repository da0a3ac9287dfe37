"""The MLP on Hopper GPUs: whole in one launch, or by the dense convolution's kernel.

That computes the two products beside GELU, for derivatives, and where a whole MLP is too wide.
"""

from functools import partial

import jax
from jax import lax

from pallas_kernels.common.mosaic_gpu import unavailable
from pallas_kernels.common.refusals import refuse, unsupported_sizes
from pallas_kernels.common.tiles import TileConfig
from pallas_kernels.conv2d.mosaic_gpu import DTYPES, TILES, mlp_product
from pallas_kernels.mlp import mosaic_gpu_whole
from pallas_kernels.mlp.problem import Problem
from pallas_kernels.mlp.xla import composed

__all__ = [
    "DIFFERENTIABLE",
    "check",
    "narrowed_grad",
    "search_space",
    "unavailable",
    "whole",
    "widened",
]

DIFFERENTIABLE = False


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` for what these kernels do not do.

    Args:
        direction: "fwd", "bwd" or "whole".
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
    if direction != "whole":
        return [{}, *(tile._asdict() for tile in TILES)]
    offered = (tile._asdict() for tile in mosaic_gpu_whole.TILES)
    others = [one for one in offered if mosaic_gpu_whole.tiling(problem, **one) is not None]
    # The first of them is the default.
    return [{}, *others[1:]]


def whole(
    x: jax.Array,
    kernels: tuple[jax.Array, jax.Array],
    biases: tuple[jax.Array, jax.Array],
    residual: jax.Array | None,
    *,
    epsilon: float | None,
    precision: lax.Precision | None,
    **tile: int,
) -> jax.Array:
    """The MLP of rows, in one launch where its sums fit in registers; see `vjp`.

    `precision` is ignored: it is about float32, which these kernels do not take.
    """
    problem = Problem(x.shape, x.dtype, *kernels[1].shape)
    cut = mosaic_gpu_whole.tiling(problem, **tile)
    if cut is None:
        first = partial(widened, kept=False, precision=precision)
        return composed(first, x, kernels, biases, residual, epsilon, precision)
    with jax.named_scope("fc1_fc2"):
        return mosaic_gpu_whole.whole(x, kernels, biases, residual, epsilon=epsilon, cut=cut)


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
