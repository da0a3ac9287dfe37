"""What the Triton kernels of every operator share: launches, for any framework and from JAX."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

Launch = Callable[..., list[Any]]
"""A framework's way to allocate outputs and run one kernel, whose arguments they follow:

    launch(kernel, arguments, outputs, grid, **constants) -> list of arrays

with arrays and integers as arguments, `(shape, dtype)` for each output, which is contiguous, or
`(shape, dtype, strides)`, and `num_warps` among the constants.
"""
MAX_ROW = 1 << 28
"""Elements of a row of pixels, of which some are counted in 32 bits."""


def strides(x: Any) -> tuple[int, ...]:
    """Elements between neighbours along each axis of `x [N, H, W, C]`.

    Example:
        >>> import numpy as np
        >>> strides(np.zeros((2, 3, 4, 5)))
        (60, 20, 5, 1)
    """
    return x.stride() if hasattr(x, "stride") else contiguous(x.shape)


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of an array `[N, H, W, C]` that lies in memory as it is read.

    Example:
        >>> contiguous((2, 3, 4, 5))
        (60, 20, 5, 1)
    """
    _, h, w, c = shape
    return h * w * c, w * c, c, 1


def cdiv(size: int, block: int) -> int:
    """How many blocks cover a size.

    Example:
        >>> cdiv(9, 4)
        3
    """
    return -(-size // block)


def unavailable(platform: str) -> str | None:
    """Needs a GPU, Triton and jax-triton."""
    if platform != "gpu":
        return f"needs a GPU, this is a {platform}"
    try:
        import jax_triton  # noqa: F401
    except ImportError as error:
        return f"needs jax-triton (the extra 'triton'): {error}"
    return None


def launch(
    kernel: Any, arguments: list[Any], outputs: list[Any], grid: tuple[int, ...], **constants: Any
) -> "list[jax.Array]":
    """Runs a kernel by jax-triton, as `Launch` says."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.common._compat import triton_call

    types = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in outputs]
    return triton_call(*arguments, kernel=kernel, out_type=types, grid=grid, **constants)
