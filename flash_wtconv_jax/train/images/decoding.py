"""Pixels of stored images: decoding, crops and their boxes, by Pillow."""

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

Box = tuple[int, int, int, int]
"""Left, upper, right and lower edge in pixels."""

# From three times the wanted pixels a side on, only every second one is decoded of a JPEG.
_SPARE = 1.5
# Pillow takes means of blocks where many pixels become one, but leaves this factor to bicubic.
_GAP = 2.0


def decoded(content: bytes | NDArray[np.uint8]) -> Image.Image:
    """The image of a file's bytes, upright by its EXIF data and not yet read, or of pixels.

    Raises:
        Exception: Whatever Pillow raises where the bytes are no image.

    Example:
        >>> decoded(np.zeros((2, 3), np.uint8)).size
        (3, 2)
    """
    if isinstance(content, np.ndarray):
        return Image.fromarray(content[..., 0] if content.shape[2:] == (1,) else content)
    try:
        image = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        # Pillow's own message names an object in memory.
        raise UnidentifiedImageError("cannot identify image file by its content") from None
    turned = image.getexif().get(0x0112, 1) != 1
    return ImageOps.exif_transpose(image) if turned else image


def reason(error: Exception) -> str:
    """The words of an error in reading an image, whose name is told beside it.

    Example:
        >>> reason(FileNotFoundError(2, "No such file or directory", "a.png"))
        'No such file or directory'
    """
    told = error.strerror if isinstance(error, OSError) else None
    return told or str(error) or type(error).__name__


def random_box(
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> Box:
    """A box of a random share and shape within an image, as torchvision's RandomResizedCrop.

    Args:
        size: Width and height of the image.
        scale: Least and greatest share of its area.
        ratio: Least and greatest width by height.
        rng: What chooses.

    Example:
        >>> random_box((8, 4), (1.0, 1.0), (2.0, 2.0), np.random.default_rng(0))
        (0, 0, 8, 4)
    """
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        shape = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        wide, high = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < wide <= width and 0 < high <= height:
            left = int(rng.integers(width - wide + 1))
            upper = int(rng.integers(height - high + 1))
            return left, upper, left + wide, upper + high
    # The largest box of a shape that is allowed, from the centre.
    shape = min(max(width / height, ratio[0]), ratio[1])
    return _centred(size, min(width, height * shape), min(height, width / shape))


def centre_box(size: tuple[int, int], share: float) -> Box:
    """The square in the centre that has a share of the shorter side, in whole pixels.

    Example:
        >>> centre_box((8, 4), 0.5)
        (3, 1, 5, 3)
    """
    side = min(size) * share
    return _centred(size, side, side)


def cropped(image: Image.Image, box: Box, side: int, largest: int) -> Image.Image:
    """A box of an image, in RGB or grey, as it is or scaled where it is large.

    Args:
        image: The image.
        box: The box.
        side: Pixels that an axis of the crop is scaled to if it has more than `largest`.
        largest: Pixels up to which it is kept.

    Example:
        >>> cropped(decoded(np.zeros((4, 8, 3), np.uint8)), (0, 0, 8, 3), 4, 5).size
        (4, 3)
    """
    extents = box[2] - box[0], box[3] - box[1]
    wide, high = (extent if extent <= largest else side for extent in extents)
    if (wide, high) == extents:
        return _plain(image.crop(box))
    return _resized(image, box, (wide, high))


def cropped_mask(mask: Image.Image, box: Box, side: int) -> NDArray[np.uint8]:
    """The classes `[side, side]` of a box of a mask, each that of the nearest pixel.

    Raises:
        ValueError: If the mask has several channels, or more than 8 bits.

    Example:
        >>> cropped_mask(decoded(np.eye(4, dtype=np.uint8)), (0, 0, 4, 2), 2).tolist()
        [[0, 0], [1, 0]]
    """
    if mask.mode not in ("1", "L", "P"):
        raise ValueError(f"its mask is of mode {mask.mode}, expected 8 bits of one channel")
    return np.asarray(mask.resize((side, side), Image.Resampling.NEAREST, box)).astype(np.uint8)


def shrunk(image: Image.Image, shorter: int) -> Image.Image:
    """The whole image, with at most so many pixels along its shorter side.

    Example:
        >>> shrunk(decoded(np.zeros((4, 8, 3), np.uint8)), 2).size
        (4, 2)
    """
    scale = min(1.0, shorter / min(image.size))
    width, height = image.size
    return resized(image, (max(1, round(width * scale)), max(1, round(height * scale))))


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The whole image with so many pixels across and down, in RGB or grey.

    Example:
        >>> resized(decoded(np.zeros((4, 8, 3), np.uint8)), (2, 2)).size
        (2, 2)
    """
    return _resized(image, (0, 0, *image.size), size)


def pixels_of(image: Image.Image, channels: int) -> NDArray[np.uint8]:
    """Pixels `[H, W, channels]`, in colours or in grey.

    Example:
        >>> pixels_of(decoded(np.zeros((2, 2, 3), np.uint8)), 1).shape
        (2, 2, 1)
    """
    mode = "L" if channels == 1 else "RGB"
    # Pillow would copy an image that is of this mode already.
    array = np.asarray(image if image.mode == mode else image.convert(mode))
    return array.reshape(*array.shape[:2], channels)


def _resized(image: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
    whole = image.size
    if isinstance(image, JpegImageFile):
        extents = box[2] - box[0], box[3] - box[1]
        wide, high = (
            round(_SPARE * wanted * pixels / extent)
            for wanted, pixels, extent in zip(size, whole, extents, strict=True)
        )
        image.draft(None, (wide, high))
    edges = None
    if image.size == whole:
        # Cut out first, as Pillow takes time along an axis of a box that needs no scaling, too.
        image = image.crop(box)
    else:
        across, down = image.size[0] / whole[0], image.size[1] / whole[1]
        edges = box[0] * across, box[1] * down, box[2] * across, box[3] * down
    return _plain(image).resize(size, Image.Resampling.BICUBIC, edges, reducing_gap=_GAP)


def _centred(size: tuple[int, int], wide: float, high: float) -> Box:
    whole = max(1, round(wide)), max(1, round(high))
    left, upper = (size[0] - whole[0]) // 2, (size[1] - whole[1]) // 2
    return left, upper, left + whole[0], upper + whole[1]


def _plain(image: Image.Image) -> Image.Image:
    """The image in RGB or in grey of 8 bits, in which pixels can be averaged."""
    if image.mode in ("RGB", "L"):
        return image
    if image.mode.startswith("I"):
        # Pillow would cut what is above 255.
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")
