"""What the TPU kernels of every operator share: tiles, rows of small images, loops.

Arrays are `[N, H, W, C]`: channels lie in the 128 lanes of a register, columns in its eight
sublanes, or, of small images of a batch, a column of eight images.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common._compat import interpreting_tpu, tpu_vmem_bytes

Pair = tuple[int, int]

LANES, SUBLANES = 128, 8
VMEM_SHARE = 0.75
"""What blocks and scratch may take of VMEM; the compiler's stack and spills need the rest."""
STEP_BYTES = 1 << 20
"""Least size of x that a grid step should work on, so that its fixed cost is small beside it."""


def unavailable(platform: str) -> str | None:
    """Needs a TPU, or Pallas' interpreter."""
    if platform == "tpu" or interpreting_tpu():
        return None
    return f"needs a TPU, this is a {platform} (or pltpu.force_tpu_interpret_mode())"


def up(value: int, multiple: int) -> int:
    """The least multiple that is not less.

    Example:
        >>> up(13, 8)
        16
    """
    return -(-value // multiple) * multiple


def whole_columns(together: int) -> int:
    """Columns that fill whole registers, with so many images together.

    Example:
        >>> whole_columns(1), whole_columns(16)
        (8, 1)
    """
    return max(1, SUBLANES // together)


def halved(size: Sequence[int], levels: int) -> list[Pair]:
    """Rows and columns of each level's bands, level 0 being the image.

    Example:
        >>> halved((7, 4), 2)
        [(7, 4), (4, 2), (2, 1)]
    """
    sizes = [tuple(size)]
    for _ in range(levels):
        sizes.append(tuple((n + 1) // 2 for n in sizes[-1]))
    return sizes


def launch_grid(shape: Sequence[int], images: int, tile: Pair) -> tuple[int, int, int, int]:
    """Steps along blocks of channels, images, rows and columns of tiles."""
    n, h, w, channels = shape
    tiles = (math.ceil(s / t) for s, t in zip((h, w), tile, strict=True))
    return math.ceil(channels / LANES), n // images, *tiles


def compiler_params() -> pltpu.CompilerParams:
    """For a kernel on `launch_grid` that hands scratch or sums on from step to step."""
    # Channels may be shared between cores; all else runs in order.
    semantics = ("parallel", "arbitrary", "arbitrary", "arbitrary")
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=tpu_vmem_bytes())


def loop(count: int, body: Callable[[Any], None]) -> None:
    """Runs `body` for 0 to `count - 1` inside a kernel."""

    def step(i: jax.Array, carry: int) -> int:
        body(i)
        return carry

    lax.fori_loop(0, count, step, 0)


def turned_shape(shape: Sequence[int], together: int) -> tuple[int, ...]:
    """The shape of `turned`."""
    n, h, w, c = shape
    return (h, w, n, c) if together > 1 else (n, h, w, c)


def turned(x: jax.Array, together: int) -> jax.Array:
    """`x [N, H, W, C]`, for images together as `[H, W, N, C]`.

    That is how XLA lays arrays out in memory whose widths would leave sublanes empty, so nothing
    is copied.
    """
    return x.transpose(1, 2, 0, 3) if together > 1 else x


def turned_back(y: jax.Array, together: int) -> jax.Array:
    """The inverse of `turned`."""
    return y.transpose(2, 0, 1, 3) if together > 1 else y


def side_by_side(
    shape: Sequence[int], dtype: jnp.dtype, most: int, fits: Callable[[int], bool]
) -> int:
    """How many images should share registers in a step: a multiple of eight, or one.

    Args:
        shape: Of x, `[N, H, W, C]`.
        dtype: Of x.
        most: Images that a step needs not be larger than.
        fits: Whether so many fit in VMEM.
    """
    n, _, w, channels = shape
    full = SUBLANES * 4 // dtype.itemsize
    if w % full == 0:
        # XLA lays images whose width fills registers out as they come, and would copy them.
        return 1
    for images in range(min(n, max(most, full)), SUBLANES - 1, -1):
        whole = n % images == 0 and (images % full == 0 or images == n and n % SUBLANES == 0)
        # A single step would have nothing to copy while it computes.
        if whole and math.ceil(channels / LANES) * (n // images) > 1 and fits(images):
            return images
    return 1


class Part(NamedTuple):
    """Columns that one transform treats at once: a row of one image, or a column of several."""

    col: int
    cols: int
    together: int

    def bands(self, first: int) -> Any:
        """Where the coefficients of these columns lie in scratch."""
        return pl.ds((first + self.col) * self.together, self.cols * self.together)

    def pixels(self, first: int, odd: int) -> Any:
        """Where the even, or odd, columns that they come from lie."""
        start = (first + 2 * self.col + odd) * self.together
        if self.together == 1:
            return pl.ds(start, self.cols, stride=2)
        return pl.ds(start, self.together)


def parts(cols: int, together: int) -> list[Part]:
    """The parts of a row of coefficients."""
    if together == 1:
        return [Part(0, cols, 1)]
    return [Part(col, 1, together) for col in range(cols)]


def row_together(block: Any, i: jax.Array) -> jax.Array:
    """Row i of all images of a step, a block `[H, W, N, C]`, in float32 as `[W * N, C]`."""
    value = block[i].astype(jnp.float32)
    return value.reshape(-1, value.shape[-1])


def store_row(source: Any, out: Any, index: jax.Array, together: int, i: jax.Array) -> None:
    """Copies a row of one image, or of all images of a step, out of float32 scratch."""
    if together > 1:
        value = source[i, : out.shape[1] * together]
        out[i] = value.reshape(out.shape[1:]).astype(out.dtype)
    else:
        out[index, i] = source[i, : out.shape[2]].astype(out.dtype)
