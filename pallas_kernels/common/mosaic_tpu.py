"""Tiles, register layouts and loops that the Pallas TPU kernels of every operator share.

Arrays are `[N, H, W, C]`. A vector register has 8 sublanes of 128 lanes: channels lie in the lanes,
and eight columns of one image in the sublanes. For small images arrays are `[H, W, N, C]`, and the
same column of eight images lies in the sublanes.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common._compat import interpreting_tpu, tpu_vmem_bytes
from pallas_kernels.common.types import Pair, Ref, Slice

LANES, SUBLANES = 128, 8
VMEM_SHARE = 0.75
"""The share of VMEM for blocks and scratch; the compiler's stack and spills need the rest."""
SIZES = "images", "rows", "cols", "images_per_register"
"""Names of what a search space of tilings offers."""
STEP_BYTES = 1 << 20
"""The least size of x for a grid step, so that the step's fixed cost is small beside its work."""


class Tiled(Protocol):
    """A tiling of any operator: how many images and which part of them a grid step takes."""

    @property
    def images(self) -> int:
        """Images of a step."""

    @property
    def size(self) -> Pair:
        """Rows and columns of a tile."""

    @property
    def images_per_register(self) -> int:
        """Images that share registers, or one."""


AnyTiled = TypeVar("AnyTiled", bound=Tiled)


def unavailable(platform: str) -> str | None:
    """The reason why TPU kernels cannot run on a platform, or None where they can.

    They need a TPU, or Pallas' TPU interpreter.
    """
    if platform == "tpu" or interpreting_tpu():
        return None
    return f"needs a TPU, this is a {platform} (or pltpu.force_tpu_interpret_mode())"


def round_up(value: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not less than `value`.

    Example:
        >>> round_up(13, 8)
        16
    """
    return -(-value // multiple) * multiple


def columns_per_register(images_per_register: int) -> int:
    """The number of columns that fill whole registers.

    Args:
        images_per_register: 1, or a multiple of eight where images share registers.

    Example:
        >>> columns_per_register(1), columns_per_register(16)
        (8, 1)
    """
    return max(1, SUBLANES // images_per_register)


def halved(size: Sequence[int], levels: int) -> list[Pair]:
    """The height and width of each level's bands; level 0 is the image.

    Example:
        >>> halved((7, 4), 2)
        [(7, 4), (4, 2), (2, 1)]
    """
    height, width = size
    sizes = [(height, width)]
    for _ in range(levels):
        height, width = (height + 1) // 2, (width + 1) // 2
        sizes.append((height, width))
    return sizes


def launch_grid(shape: Sequence[int], images: int, tile: Pair) -> tuple[int, int, int, int]:
    """The grid of a kernel: blocks of channels, blocks of images, rows and columns of tiles."""
    n, h, w, channels = shape
    down, across = math.ceil(h / tile[0]), math.ceil(w / tile[1])
    return math.ceil(channels / LANES), n // images, down, across


def compiler_params() -> pltpu.CompilerParams:
    """The compiler's parameters of a kernel on `launch_grid` that carries scratch between steps."""
    # Cores may share the blocks of channels; the other axes run in order.
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary", "arbitrary"),
        vmem_limit_bytes=tpu_vmem_bytes(),
    )


def loop(count: int, body: Callable[[jax.Array], None]) -> None:
    """Runs `body` for 0 to `count - 1` inside a kernel."""

    def step(i: jax.Array, carry: int) -> int:
        body(i)
        return carry

    lax.fori_loop(0, count, step, 0)


def hwnc_shape(shape: Sequence[int], images_per_register: int) -> tuple[int, ...]:
    """The shape of the array that `to_hwnc` returns for an `x` of this shape."""
    n, h, w, c = shape
    return (h, w, n, c) if images_per_register > 1 else (n, h, w, c)


def to_hwnc(x: jax.Array, images_per_register: int) -> jax.Array:
    """`x [N, H, W, C]` as `[H, W, N, C]` where images share registers, else unchanged.

    XLA lays out arrays in this order whose width would leave sublanes empty, so the transpose
    copies nothing.
    """
    return x.transpose(1, 2, 0, 3) if images_per_register > 1 else x


def from_hwnc(y: jax.Array, images_per_register: int) -> jax.Array:
    """The inverse of `to_hwnc`."""
    return y.transpose(2, 0, 1, 3) if images_per_register > 1 else y


def pick_images_per_register(
    shape: Sequence[int], dtype: jnp.dtype, most: int, fits: Callable[[int], bool]
) -> int:
    """The number of images that share registers in a grid step: a multiple of eight, or 1.

    Args:
        shape: Shape of `x [N, H, W, C]`.
        dtype: Dtype of x.
        most: Number of images beyond which a grid step gains nothing.
        fits: Function that says whether this many images fit in VMEM.
    """
    n, _, w, channels = shape
    full = SUBLANES * 4 // dtype.itemsize
    if w % full == 0:
        # XLA keeps `[N, H, W, C]` where the width fills registers, so a transpose would copy.
        return 1
    for images in range(min(n, max(most, full)), SUBLANES - 1, -1):
        whole = n % images == 0 and (images % full == 0 or images == n and n % SUBLANES == 0)
        # The pipeline overlaps copies with compute only if there are at least two grid steps.
        if whole and math.ceil(channels / LANES) * (n // images) > 1 and fits(images):
            return images
    return 1


def whole_images(
    shape: Sequence[int], dtype: jnp.dtype, fits: Callable[[int, int], bool]
) -> list[Pair]:
    """The ways to take whole images in a grid step, the one to take unasked first.

    Args:
        shape: Of x, `[N, H, W, C]`.
        dtype: Of x.
        fits: Whether so many images, so many of them in a register, fit in VMEM.

    Returns:
        Images of a step and images in a register; none where not even one image fits.
    """
    n, h, w, channels = shape
    image = h * w * min(channels, LANES) * dtype.itemsize
    found: list[Pair] = []
    for step in (STEP_BYTES, 4 * STEP_BYTES, STEP_BYTES // 4):
        most = max(1, step // image)
        shared = pick_images_per_register(shape, dtype, most, lambda images: fits(images, images))
        if shared > 1:
            found.append((shared, shared))
            continue
        whole = [images for images in range(min(n, most), 0, -1) if n % images == 0]
        found += [(images, 1) for images in whole if fits(images, 1)][:1]
        if not found:
            return []
    return list(dict.fromkeys(found))


def offered(tilings: Iterable[Tiled]) -> list[dict[str, int]]:
    """A search space of tilings: nothing for the first, which is taken unasked."""
    _, *others = map(sizes, tilings)
    return [{}, *others]


def sizes(tiling: Tiled) -> dict[str, int]:
    """A tiling as parameters of a search space."""
    rows, cols = tiling.size
    return {
        "images": tiling.images,
        "rows": rows,
        "cols": cols,
        "images_per_register": tiling.images_per_register,
    }


def chosen(tilings: Iterable[AnyTiled], parameters: Mapping[str, int]) -> AnyTiled:
    """The tiling that parameters of a search space name, without any the first."""
    return next(one for one in tilings if not parameters or sizes(one) == parameters)


class Part(NamedTuple):
    """The columns that one transform takes at once.

    They are all of a row of one image, or a single column of the images that share registers.
    """

    col: int
    cols: int
    images_per_register: int

    def bands(self, first: int) -> Slice:
        """The index of these columns' coefficients in a row of scratch."""
        start = (first + self.col) * self.images_per_register
        return pl.ds(start, self.cols * self.images_per_register)

    def pixels(self, first: int, odd: int) -> Slice:
        """The index of the even or odd pixels that these coefficients are made from."""
        start = (first + 2 * self.col + odd) * self.images_per_register
        if self.images_per_register == 1:
            return pl.ds(start, self.cols, stride=2)
        return pl.ds(start, self.images_per_register)


def parts(cols: int, images_per_register: int) -> list[Part]:
    """The parts that a row of `cols` coefficients is transformed in."""
    if images_per_register == 1:
        return [Part(0, cols, 1)]
    return [Part(col, 1, images_per_register) for col in range(cols)]


def load_hwnc_row(block: Ref, i: jax.Array) -> jax.Array:
    """Row i of a block `[H, W, N, C]` in float32, as `[W * N, C]`."""
    value = block[i].astype(jnp.float32)
    return value.reshape(-1, value.shape[-1])


def store_row(
    source: Ref, out: Ref, index: jax.Array, images_per_register: int, i: jax.Array
) -> None:
    """Copies row i of image `index`, or of all images of a step, from float32 scratch to `out`."""
    if images_per_register > 1:
        value = source[i, : out.shape[1] * images_per_register]
        out[i] = value.reshape(out.shape[1:]).astype(out.dtype)
    else:
        out[index, i] = source[i, : out.shape[2]].astype(out.dtype)
