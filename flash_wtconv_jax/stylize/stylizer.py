"""Runs a style network over pixels as they come from files, and gives pixels that go into files."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from flash_wtconv_jax import checkpoints
from flash_wtconv_jax.models.blending import blend_styles
from flash_wtconv_jax.models.transformer_net import TransformerNet
from flash_wtconv_jax.stylize.network import Moments, in_range, with_average
from flash_wtconv_jax.stylize.tiled import tiled
from pallas_kernels.common.types import Tree

STAINED_GLASS = Path(__file__).with_name("stained_glass.safetensors")
"""The weights of the style that comes with the package, see `stained_glass.drawn`."""
_LARGE = 2**24
"""Pixels of a picture from which on it is computed by tiles: about 3 GB of memory in 16 bits."""
_TILE = 1024
_NEW_FRAME = 0.2
"""Weight of a frame's own statistics in the average over a film's frames."""
_LUMA = (0.299, 0.587, 0.114)
"""The brightness of a colour, by ITU-R BT.601."""
_NO_NUMBERS = "the network gives infinities or NaN for this picture, even in float32"


class Stylizer:
    """A style network that maps uint8 or uint16 pixels to pixels of the same dtype and size.

    Args:
        styles: Files of weights of TransformerNets, of any kind that `checkpoints.load` reads, or
            Orbax folders.
        weights: How much of each style, see `models.blend_styles`.
        dtype: Dtype of the computation. A picture that overflows it is computed again in float32.
        strength: 1 for the style, 0 for the picture, and what lies between or beyond.
        keep_colour: Whether the style changes the brightness alone.
        tile: Side of tiles, by which every larger picture is computed; None takes tiles of 1024
            pixels for pictures of more than 16 million alone.

    Raises:
        ValueError: If a file holds weights of something else.
        OSError: If a file cannot be read.
    """

    def __init__(
        self,
        styles: Sequence[Path],
        weights: Sequence[float] = (1.0,),
        *,
        dtype: DTypeLike = jnp.float32,
        strength: float = 1.0,
        keep_colour: bool = False,
        tile: int | None = None,
    ) -> None:
        variables = blend_styles([_load(path) for path in styles], np.asarray(weights))
        self.tile = tile
        self._effects = {"strength": strength, "keep_colour": keep_colour}
        dtypes = dict.fromkeys([jnp.dtype(dtype), jnp.dtype("float32")])
        self._models = [_network(variables, each) for each in dtypes]

    def start(self, pixels: np.ndarray) -> Callable[[], np.ndarray]:
        """Starts to compute pictures `[N, H, W, 3]` of one size.

        Returns:
            A function that waits for the result: pixels of the same shape and dtype. It raises
            `ValueError` if the network gives no numbers even in float32.
        """
        height, width = pixels.shape[1:3]
        if self.tile is None and height * width > _LARGE:
            return partial(self._by_tiles, pixels, _TILE)
        if self.tile is not None and max(height, width) > self.tile:
            return partial(self._by_tiles, pixels, self.tile)
        x = jnp.asarray(pixels)
        return partial(self._fetched, x, *self._finished(x, _run(self._models[0], x)))

    def film(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The frames `[H, W, 3]` of a film, in turn, normalised by statistics averaged over them.

        Raises:
            ValueError: If the network gives no numbers even in float32.
        """
        moments: list[Moments] | None = None
        for frame in frames:
            pixels = jnp.asarray(frame[None])
            for model in self._models:
                images, kept = _run_with_average(model, pixels, moments)
                result, finite = self._finished(pixels, images)
                if finite:
                    break
            else:
                raise ValueError(_NO_NUMBERS)
            moments = kept
            yield np.asarray(result)[0]

    def _fetched(self, pixels: jax.Array, result: jax.Array, finite: jax.Array) -> np.ndarray:
        for model in self._models[1:]:
            if not finite:
                result, finite = self._finished(pixels, _run(model, pixels))
        if not finite:
            raise ValueError(_NO_NUMBERS)
        return np.asarray(result)

    def _by_tiles(self, pixels: np.ndarray, tile: int) -> np.ndarray:
        return np.stack([self._one_by_tiles(picture, tile) for picture in pixels])

    def _one_by_tiles(self, picture: np.ndarray, tile: int) -> np.ndarray:
        for model in self._models:
            whole = tiled(model, picture, tile)
            # Some rows at a time, since float32 of a whole picture is large.
            rows = [slice(row, row + tile) for row in range(0, len(picture), tile)]
            parts = [
                self._finished(jnp.asarray(picture[None, some]), jnp.asarray(whole[None, some]))
                for some in rows
            ]
            if all(finite for _, finite in parts):
                return np.concatenate([np.asarray(part)[0] for part, _ in parts])
        raise ValueError(_NO_NUMBERS)

    def _finished(self, pixels: jax.Array, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _finished(pixels, images, **self._effects)


def _load(path: Path) -> Tree:
    """The parameters in a file or a folder."""
    return checkpoints.restore(path) if path.is_dir() else checkpoints.load(path)


def _network(variables: Tree, dtype: DTypeLike) -> TransformerNet:
    model = nnx.eval_shape(lambda: TransformerNet(dtype=dtype, rngs=nnx.Rngs(0)))
    checkpoints.load_into(model, variables)
    return model


@nnx.jit
def _run(model: TransformerNet, pixels: jax.Array) -> jax.Array:
    return model(in_range(pixels))


@nnx.jit
def _run_with_average(
    model: TransformerNet, pixels: jax.Array, before: list[Moments] | None
) -> tuple[jax.Array, list[Moments]]:
    return with_average(model, in_range(pixels), before, _NEW_FRAME)


@partial(jax.jit, static_argnames=("strength", "keep_colour"))
def _finished(
    pixels: jax.Array, images: jax.Array, strength: float, keep_colour: bool
) -> tuple[jax.Array, jax.Array]:
    """The pixels of the network's images, and whether all of these are numbers."""
    x = in_range(pixels)
    y = images[:, : x.shape[1], : x.shape[2]].astype(jnp.float32)
    finite = jnp.isfinite(y).all()
    y = x + strength * (jnp.clip(y, 0, 255) - x)
    if keep_colour:
        # In YCbCr only Y differs, which adds the same to red, green and blue.
        y = x + ((y - x) @ jnp.asarray(_LUMA))[..., None]
    full = jnp.iinfo(pixels.dtype).max
    return jnp.round(jnp.clip(y, 0, 255) * (full / 255)).astype(pixels.dtype), finite
