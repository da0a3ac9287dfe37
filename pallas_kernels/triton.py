"""What the Triton kernels of every operator share on the side of JAX."""

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["launch", "unavailable"]


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
) -> list[jax.Array]:
    """Runs a kernel by jax-triton, as `pallas_kernels.triton_launches.Launch` says."""
    import jax_triton

    shapes = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in outputs]
    return jax_triton.triton_call(
        *arguments, kernel=kernel, out_shape=shapes, grid=grid, **constants
    )
