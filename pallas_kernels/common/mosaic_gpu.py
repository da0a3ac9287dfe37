"""Constants and helpers that the Mosaic GPU kernels of all operators share."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import device
from pallas_kernels.common.types import Index

__all__ = [
    "ALIGNMENT",
    "MANUAL_BARRIERS",
    "MULTIPROCESSORS",
    "SHARED",
    "Scratch",
    "aligned",
    "choose",
    "next_stage",
    "seen_twice",
    "size_in_bytes",
    "swizzled",
    "unavailable",
    "when",
]

ALIGNMENT = 16
"""Every stride that TMA reads or writes by is a multiple of this many bytes."""

MULTIPROCESSORS = 132
"""An H100 and an H200 have this many streaming multiprocessors; other numbers work as well."""

SHARED = 225 * 1024
"""Bytes of shared memory that a block uses for data; the rest of 227 KiB is left to mbarriers."""
_WHOLE_SHARED = 227 * 1024

MANUAL_BARRIERS = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    # The kernels order loads, stores and copies themselves: a barrier after each would cost time.
    unsafe_no_auto_barriers=True,
)
"""Compiler parameters of kernels that place all barriers and fences themselves."""


class Scratch(Protocol):
    """Memory or mbarriers that a kernel reserves, of which Pallas makes a ref."""

    def get_array_aval(self) -> Any:
        """The abstract value of what is reserved."""

    def get_ref_aval(self) -> Any:
        """The abstract value of the ref."""


def unavailable(platform: str) -> str | None:
    """Returns why the kernels do not run here, None on a data-centre GPU of Hopper or newer."""
    if platform != "gpu":
        return f"needs a GPU, this is a {platform}"
    gpu = device.current()
    capability = str(getattr(gpu, "compute_capability", None))
    # AMD's capabilities are words.
    if not capability.replace(".", "").isdigit() or float(capability) < 9:
        return f"needs compute capability 9.0 or newer, this has {capability}"
    # GPUs of capability 12 have less than half of the shared memory.
    shared = getattr(gpu, "shared_memory_per_block_optin", 0 if float(capability) >= 12 else None)
    if shared is not None and shared < _WHOLE_SHARED:
        return f"needs 227 KiB of shared memory a block, capability {capability} has less"
    return None


def next_stage(stage: Index, stages: int) -> jax.Array:
    """Returns the pipeline stage after this one, which is 0 after the last.

    It is a select: the compiler would compute a remainder anew at every use.

    Example:
        >>> [int(next_stage(stage, 3)) for stage in range(3)]
        [1, 2, 0]
    """
    return jnp.where(stage == stages - 1, 0, stage + 1)


def choose(
    condition: bool | jax.Array, true: Callable[[], None], false: Callable[[], None]
) -> None:
    """Runs one of two parts of a kernel, as `jax.lax.cond` does, which takes longer to lower.

    That makes a boolean a number, for which Mosaic (JAX 0.10 to 0.12) starts `ptxas` to ask it for
    its version, each time. By a select it is the same code.
    """
    lax.switch(jnp.where(condition, 1, 0), (false, true))


def when(condition: bool | jax.Array) -> Callable[[Callable[[], None]], None]:
    """Runs the decorated part of a kernel where a condition is met: `pl.when` by `choose`."""
    return lambda part: choose(condition, part, lambda: None)


def aligned(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns `x [..., C]` with channels of zeros appended until TMA can copy it in a dtype.

    Example:
        >>> aligned(jnp.ones((2, 3)), jnp.dtype("float16")).shape
        (2, 8)
    """
    fill = -x.shape[-1] % (ALIGNMENT // dtype.itemsize)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, fill)]) if fill else x


def size_in_bytes(shape: Sequence[int], dtype: jnp.dtype) -> int:
    """Returns the bytes that an array of this shape and dtype takes in shared memory.

    Example:
        >>> size_in_bytes((4, 32), jnp.dtype("float32"))
        512
    """
    return math.prod(shape) * dtype.itemsize


def swizzled(
    columns: int, dtype: jnp.dtype
) -> tuple[plgpu.TilingTransform, plgpu.SwizzleTransform]:
    """Returns the transforms of `wgmma` operands: tiles of 8 rows, with swizzled columns."""
    # JAX 0.11 inherits a method of both that it declares to be abstract.
    swizzle = plgpu.SwizzleTransform(  # type: ignore[abstract,unused-ignore]
        size_in_bytes((columns,), dtype)
    )
    tiling = plgpu.TilingTransform((8, columns))  # type: ignore[abstract,unused-ignore]
    return tiling, swizzle


def seen_twice(
    outer: tuple[int, ...], box: tuple[int, ...], columns: int, dtype: jnp.dtype
) -> plgpu.RefUnion:
    """Returns shared memory as TMA sees it, `[rows, width, C]`, and as `wgmma` does, `[M, C]`.

    Both are the same bytes: tiles of 8 pixels, each as wide as all channels, lie one after the
    other. Tiles of the image itself could not begin at any pixel.
    """
    tiles, swizzle = swizzled(columns, dtype)
    seen = plgpu.SMEM((*outer, *box, columns), dtype, transforms=(swizzle,))
    rows = (*outer, math.prod(box), columns)
    return plgpu.RefUnion(seen, plgpu.SMEM(rows, dtype, transforms=(tiles, swizzle)))
