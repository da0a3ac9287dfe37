"""What the Mosaic GPU kernels of every operator share."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import device

__all__ = [
    "ALIGNMENT",
    "MULTIPROCESSORS",
    "SHARED",
    "UNSYNCHRONISED",
    "aligned",
    "following",
    "size_in_bytes",
    "unavailable",
]

ALIGNMENT = 16
"""Bytes that the copy engine needs all strides to be a multiple of."""

MULTIPROCESSORS = 132
"""Of an H100 and an H200; others run as well, in a round more or less."""

SHARED = 225 * 1024
"""Bytes of shared memory a block, of 227 KiB some of which barriers take."""
_WHOLE_SHARED = 227 * 1024

UNSYNCHRONISED = plgpu.CompilerParams(
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    # Kernels order loads, stores and copies themselves: a barrier for each would take the time.
    unsafe_no_auto_barriers=True,
)
"""How kernels are compiled that say themselves where threads wait for each other."""


def unavailable(platform: str) -> str | None:
    """Needs an NVIDIA GPU for data centres, of compute capability 9.0 or newer."""
    if platform != "gpu":
        return f"needs a GPU, this is a {platform}"
    gpu = device.current()
    capability = str(getattr(gpu, "compute_capability", None))
    # AMD's are words.
    if not capability.replace(".", "").isdigit() or float(capability) < 9:
        return f"needs compute capability 9.0 or newer, this has {capability}"
    # GPUs of capability 12 have less than half of it.
    shared = getattr(gpu, "shared_memory_per_block_optin", 0 if float(capability) >= 12 else None)
    if shared is not None and shared < _WHOLE_SHARED:
        return f"needs 227 KiB of shared memory a block, capability {capability} has less"
    return None


def following(slot: Any, slots: int) -> Any:
    """The slot after one of a ring; a remainder would be computed anew for every use.

    Example:
        >>> [int(following(slot, 3)) for slot in range(3)]
        [1, 2, 0]
    """
    return jnp.where(slot == slots - 1, 0, slot + 1)


def aligned(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x [..., C]` with channels filled up with zeros to what the copy engine takes in a dtype.

    Example:
        >>> aligned(jnp.ones((2, 3)), jnp.dtype("float16")).shape
        (2, 8)
    """
    fill = -x.shape[-1] % (ALIGNMENT // dtype.itemsize)
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, fill)]) if fill else x


def size_in_bytes(shape: Sequence[int], dtype: jnp.dtype) -> int:
    """Of an array in shared memory.

    Example:
        >>> size_in_bytes((4, 32), jnp.dtype("float32"))
        512
    """
    return math.prod(shape) * dtype.itemsize
