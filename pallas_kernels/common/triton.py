"""Launches of Triton kernels for every operator: the protocol of a launch, and jax-triton's."""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pallas_kernels.common.types import DeviceArray, Output

if TYPE_CHECKING:
    import jax

AnyArray = TypeVar("AnyArray", bound=DeviceArray)
Launch = Callable[..., list[AnyArray]]
"""The function by which a framework allocates outputs and launches one kernel:

    launch(kernel, arguments, outputs, grid, **constants) -> list of arrays

`arguments` are arrays and integers; each output is `(shape, dtype)`, which is contiguous, or
`(shape, dtype, strides)`; `num_warps` is among the constants. The kernel takes its arguments first,
then its outputs. JAX's alone takes `written_over` among the constants: for places of arguments
those of the outputs that may be written over them.
"""
MAX_ROW = 1 << 28
"""The least number of elements of an image row that overflows the kernels' 32-bit offsets."""


def strides(x: DeviceArray) -> tuple[int, ...]:
    """The strides of `x [N, H, W, C]` in elements.

    Example:
        >>> import numpy as np
        >>> strides(np.zeros((2, 3, 4, 5)))
        (60, 20, 5, 1)
    """
    own = getattr(x, "stride", None)
    return own() if own else contiguous(x.shape)


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides, in elements, of a contiguous array `[N, H, W, C]`.

    Example:
        >>> contiguous((2, 3, 4, 5))
        (60, 20, 5, 1)
    """
    _, h, w, c = shape
    return h * w * c, w * c, c, 1


def cdiv(size: int, block: int) -> int:
    """The number of blocks that cover a size.

    Example:
        >>> cdiv(9, 4)
        3
    """
    return -(-size // block)


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, as it is told before it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(platform: str) -> str | None:
    """The reason why Triton kernels cannot run on a platform, or None where they can.

    They need a GPU, Triton and jax-triton.
    """
    if platform != "gpu":
        return f"needs a GPU, this is a {platform}"
    try:
        # Here, since it imports JAX, and PyTorch launches kernels without.
        from pallas_kernels.common._compat import import_jax_triton

        import_jax_triton()
    except ImportError as error:
        return f"needs jax-triton (the extra 'triton'): {error}"
    return None


def launch(
    kernel: object,
    arguments: "list[jax.Array | int]",
    outputs: Sequence[Output],
    grid: tuple[int, ...],
    written_over: dict[int, int] | None = None,
    **constants: Any,
) -> "list[jax.Array]":
    """Launches a kernel through jax-triton, as `Launch` says."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.common._compat import triton_call

    types = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in outputs]
    constants |= {"grid": grid, "written_over": written_over}
    return triton_call(*arguments, kernel=kernel, out_type=types, **constants)
