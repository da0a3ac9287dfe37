"""One picture in a file: its pixels upright in RGB, its transparency, profile and EXIF data."""

import io
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import imagecodecs
import numpy as np
import tifffile
from PIL import ExifTags, Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError

from pallas_kernels.common.files import replacing, writing

MAX_PIXELS = 2**29
"""Pixels of the largest picture that is read unless the caller allows more: 23,170 squared."""

_FORMATS = {
    ".bmp": "BMP",
    ".gif": "GIF",
    ".jpeg": "JPEG",
    ".jpg": "JPEG",
    ".png": "PNG",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}
SUFFIXES = frozenset(_FORMATS)
"""Endings of the files that are read and written."""

_OPAQUE = ("BMP", "JPEG")
_SIXTEEN = ("PNG", "TIFF")
_QUALITY = 95
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_TIFF_COLOURS: dict[int, int] = {
    tifffile.PHOTOMETRIC.MINISWHITE: 1,
    tifffile.PHOTOMETRIC.MINISBLACK: 1,
    tifffile.PHOTOMETRIC.RGB: 3,
}
_FULL = 65535
"""The largest sample of 16 bits."""
_OTHER_SAMPLES = {"I": "32-bit integers", "F": "floating-point numbers", "LAB": "L*a*b* colours"}
_DESCRIPTIONS = (
    ExifTags.Base.ImageDescription,
    ExifTags.Base.Make,
    ExifTags.Base.Model,
    ExifTags.Base.Software,
    ExifTags.Base.DateTime,
    ExifTags.Base.Artist,
    ExifTags.Base.Copyright,
)
"""Tags of TIFF files that are EXIF data, not the layout of the file."""
# Pillow keeps its own limit in a global, and looks at it while it opens a file alone.
_OPENING = threading.Lock()
# Exif's number for each way of turning pixels upright: transposed first, then flipped.
_UPRIGHT = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


class Picture(NamedTuple):
    """A picture with what its file holds beside the colours.

    Attributes:
        pixels: RGB `[H, W, 3]`, uint8, or uint16 where the file has 16 bits a sample.
        alpha: Opacity `[H, W]` of the same dtype, None where every pixel is opaque.
        profile: The ICC profile of the colours, None for sRGB.
        exif: EXIF data without an orientation, since the pixels are upright; None if there is none.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    profile: bytes | None = None
    exif: bytes | None = None


def read(path: Path, max_pixels: int = MAX_PIXELS) -> Picture:
    """The first picture of a file, upright.

    Grey, palette and CMYK become RGB, CMYK and grey of 8 bits by the profile in the file if it has
    one. A profile is kept where it describes RGB. EXIF data of TIFF files with 16 bits a sample
    are not read.

    Args:
        path: A file that Pillow knows, of whatever name.
        max_pixels: The number of pixels from which on a file is refused.

    Raises:
        OSError: If the file is missing, cannot be read, or ends too early; the message names it.
        ValueError: If it is no picture, too large, or has samples of a kind that is not read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "grey.png")
        ...     Image.new("L", (3, 2), 7).save(path)
        ...     read(path).pixels.shape
        (2, 3, 3)
    """
    with _named(path):
        deep = _deep_tiff(path, max_pixels)
    if deep is not None:
        return deep
    with opened(path, max_pixels) as image:
        if image.format == "PNG" and any(";16" in str(tile[3]) for tile in image.tile):
            return _deep_png(path, image)
        picture = from_pillow(ImageOps.exif_transpose(image))
        return picture._replace(exif=_exif_of(image))


def write(path: Path, picture: Picture, force: bool = False) -> None:
    """Writes a picture whole or not at all, in the format that the name's ending says.

    16 bits a sample stay in PNG and TIFF; other formats get 8.

    Args:
        path: The file; its ending is one of `SUFFIXES`.
        picture: The picture.
        force: Whether a file there is replaced.

    Raises:
        ValueError: If the ending is not known, or the format cannot hold the transparency.
        OSError: If the file cannot be written, or is there already without `force`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "black.png")
        ...     write(path, Picture(np.zeros((2, 3, 3), np.uint8)))
        ...     read(path).pixels.max()
        np.uint8(0)
    """
    check_writable(path, picture)
    form = _FORMATS[path.suffix.lower()]
    with writing(path), replacing(path, force) as temporary:
        if picture.pixels.dtype == np.uint16 and form in _SIXTEEN:
            (_write_png if form == "PNG" else _write_tiff)(temporary, picture)
            return
        quality = {"JPEG": {"quality": _QUALITY}, "WEBP": {"quality": _QUALITY}}.get(form, {})
        beside = {"icc_profile": picture.profile, "exif": picture.exif}
        kept = {name: data for name, data in beside.items() if data}
        to_pillow(picture).save(temporary, form, **quality, **kept)


def check_writable(path: Path, picture: Picture | None = None) -> None:
    """Raises ValueError where a file of this name cannot be written, or not with this picture.

    Example:
        >>> check_writable(Path("a.jpg"), Picture(np.zeros((1, 1, 3)), alpha=np.zeros((1, 1))))
        Traceback (most recent call last):
        ...
        ValueError: a.jpg: JPEG holds no transparency, name a .png, .tiff or .webp file
    """
    form = _FORMATS.get(path.suffix.lower())
    if form is None:
        ends = ", ".join(sorted(SUFFIXES))
        raise ValueError(f"{path}: the ending is {path.suffix!r}, expected one of {ends}")
    if picture is not None and picture.alpha is not None and form in _OPAQUE:
        raise ValueError(f"{path}: {form} holds no transparency, name a .png, .tiff or .webp file")


def resized(picture: Picture, longer: int) -> Picture:
    """The picture with a longer side of so many pixels, by Lanczos' filter.

    Example:
        >>> resized(Picture(np.zeros((4, 6, 3), np.uint8)), 3).pixels.shape
        (2, 3, 3)
    """
    height, width = picture.pixels.shape[:2]
    scale = longer / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))

    def filtered(plane: np.ndarray) -> np.ndarray:
        # Pillow filters 16 bits a sample as floating-point numbers alone, which it does not clip.
        full = np.iinfo(plane.dtype).max
        image = Image.fromarray(plane.astype(np.float32)).resize(size, Image.Resampling.LANCZOS)
        return np.rint(np.asarray(image).clip(0, full)).astype(plane.dtype)

    planes = [filtered(picture.pixels[..., channel]) for channel in range(3)]
    alpha = None if picture.alpha is None else filtered(picture.alpha)
    return picture._replace(pixels=np.dstack(planes), alpha=alpha)


@contextmanager
def opened(path: Path, max_pixels: int) -> Iterator[ImageFile.ImageFile]:
    """Yields Pillow's image of a file; whatever it raises names the file in one line."""
    with _named(path), path.open("rb") as file:
        with _OPENING:
            # Ours is the limit: Pillow's warns at 89 million pixels.
            limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                image = Image.open(file)
            finally:
                Image.MAX_IMAGE_PIXELS = limit
        _check_size(*image.size, max_pixels)
        yield image


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Makes the errors of libraries that decode a file name it, in one line."""
    try:
        yield
    except UnidentifiedImageError:
        raise ValueError(f"{path} is no picture of a kind that can be read") from None
    except OSError as error:
        # Those of the system name their file; Pillow's are about what is in it.
        if error.filename is not None:
            raise
        raise OSError(f"{path} cannot be read: {error}") from None
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        # A file that is broken has decoders raise anything, an IndexError without a text too.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read: {reason}") from None


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ValueError(f"{width} x {height} pixels, more than the {max_pixels:,} allowed")


def from_pillow(image: Image.Image) -> Picture:
    """The picture of an upright image, without EXIF data; 16 bits a sample if they are greys."""
    profile = image.info.get("icc_profile")
    if image.mode in _OTHER_SAMPLES:
        found = _OTHER_SAMPLES[image.mode]
        raise ValueError(f"samples are {found}, expected 8 or 16 bits of RGB")
    if image.mode.startswith("I;16"):
        return _from_samples(np.asarray(image).astype(np.uint16)[..., None])
    if image.mode == "CMYK" or (image.mode == "L" and not image.has_transparency_data):
        return Picture(np.asarray(_in_srgb(image, profile)))
    if image.mode in ("1", "LA", "La", "L"):
        profile = None  # It is one of greys.
    if image.has_transparency_data:
        samples = np.asarray(image.convert("RGBA"))
        return Picture(samples[..., :3], samples[..., 3], profile)
    return Picture(np.asarray(image.convert("RGB")), None, profile)


def _exif_of(image: Image.Image) -> bytes | None:
    """The EXIF data without the orientation; of a TIFF file what says nothing of its layout."""
    exif = image.getexif()
    if image.format == "TIFF":
        described = Image.Exif()
        described.update({tag: exif[tag] for tag in _DESCRIPTIONS if tag in exif})
        for folder in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
            if inside := exif.get_ifd(folder):
                described.get_ifd(folder).update(inside)
        exif = described
    exif.pop(ExifTags.Base.Orientation, None)
    return exif.tobytes() if len(exif) else None


def to_pillow(picture: Picture) -> Image.Image:
    """The image of 8 bits a sample that Pillow writes."""
    pixels, alpha = eight_bits(picture.pixels), picture.alpha
    if alpha is None:
        return Image.fromarray(pixels)
    return Image.fromarray(np.dstack([pixels, eight_bits(alpha)]))


def eight_bits(samples: np.ndarray) -> np.ndarray:
    """The samples as uint8, rounded where they were uint16."""
    if samples.dtype == np.uint8:
        return samples
    return ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The image of inks or greys in sRGB, by its profile where it has one that can be used."""
    if profile:
        try:
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(
                image, own, ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError):
            pass  # A broken profile says nothing about the colours.
    return image.convert("RGB")


def _deep_png(path: Path, image: ImageFile.ImageFile) -> Picture:
    """The picture of a PNG file with 16 bits a sample, of which Pillow would keep 8."""
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    samples = imagecodecs.png_decode(path.read_bytes())
    samples = samples.reshape(*samples.shape[:2], -1)
    colours = samples.shape[2] - (samples.shape[2] in (2, 4))
    alpha = samples[..., colours] if samples.shape[2] > colours else None
    profile = image.info.get("icc_profile")
    return _from_samples(samples[..., :colours], alpha, orientation, profile)._replace(
        exif=_exif_of(image)
    )


def _deep_tiff(path: Path, max_pixels: int) -> Picture | None:
    """The first page of a TIFF file with 9 to 16 bits a sample, None of any other file."""
    with path.open("rb") as file:
        if file.read(4) not in _TIFF:
            return None
        file.seek(0)
        try:
            page = tifffile.TiffFile(file).pages.first
        except tifffile.TiffFileError:
            return None  # Pillow says what is wrong with it.
        if page.dtype != np.uint16:
            return None
        _check_size(page.imagewidth, page.imagelength, max_pixels)
        colours = _TIFF_COLOURS.get(page.photometric)
        if colours is None:
            kind = tifffile.PHOTOMETRIC(page.photometric).name
            raise ValueError(f"{kind} in 16 bits a sample, expected grey or RGB")
        samples = page.asarray()
        orientation = page.tags.valueof("Orientation", default=1)
        profile = page.tags.valueof("InterColorProfile")
    if page.axes.startswith("S"):
        samples = np.moveaxis(samples, 0, -1)
    full = 2**page.bitspersample - 1
    if full < _FULL:
        samples = ((samples.astype(np.uint32) * _FULL + full // 2) // full).astype(np.uint16)
    samples = samples.reshape(*samples.shape[:2], -1)
    pixels, others = samples[..., :colours], samples[..., colours:]
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
        pixels = _FULL - pixels
    # A sample more than the colours is opacity, unless the file says that it is something else.
    extra = page.extrasamples[0] if page.extrasamples else tifffile.EXTRASAMPLE.UNASSALPHA
    alpha = None
    if others.shape[2] and extra != tifffile.EXTRASAMPLE.UNSPECIFIED:
        alpha = others[..., 0]
        if extra == tifffile.EXTRASAMPLE.ASSOCALPHA:  # The colours are multiplied by it.
            exact = pixels.astype(np.float64) * _FULL / np.maximum(alpha, 1)[..., None]
            pixels = np.rint(exact.clip(0, _FULL)).astype(np.uint16)
    return _from_samples(pixels, alpha, orientation, profile)


def _from_samples(
    pixels: np.ndarray,
    alpha: np.ndarray | None = None,
    orientation: int = 1,
    profile: bytes | None = None,
) -> Picture:
    """The picture of uint16 samples `[H, W, 1]` of greys or `[H, W, 3]`, and opacity `[H, W]`."""
    return Picture(
        _upright(np.broadcast_to(pixels, (*pixels.shape[:2], 3)), orientation),
        None if alpha is None else _upright(alpha, orientation),
        profile if pixels.shape[2] == 3 else None,  # Of grey pictures it is one of greys.
    )


def _upright(samples: np.ndarray, orientation: int) -> np.ndarray:
    transposed, upside_down, mirrored = _UPRIGHT.get(orientation, _UPRIGHT[1])
    if transposed:
        samples = samples.swapaxes(0, 1)
    return np.ascontiguousarray(
        samples[:: -1 if upside_down else 1, :: -1 if mirrored else 1],
    )


def _write_png(path: Path, picture: Picture) -> None:
    """Writes 16 bits a sample, with the chunks of profile and EXIF data behind the header."""
    encoded = imagecodecs.png_encode(_stacked(picture))
    chunks = b""
    if picture.profile:
        chunks += _chunk(b"iCCP", b"icc\0\0" + zlib.compress(picture.profile))
    if picture.exif:
        chunks += _chunk(b"eXIf", picture.exif.removeprefix(b"Exif\0\0"))
    # A signature of 8 bytes, then the header's chunk of 25.
    path.write_bytes(encoded[:33] + chunks + encoded[33:])


def _chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)


def _write_tiff(path: Path, picture: Picture) -> None:
    tifffile.imwrite(
        path,
        _stacked(picture),
        photometric="rgb",
        compression="zlib",
        iccprofile=picture.profile,
        metadata=None,
        extrasamples=None if picture.alpha is None else ["unassalpha"],
    )


def _stacked(picture: Picture) -> np.ndarray:
    if picture.alpha is None:
        return np.ascontiguousarray(picture.pixels)
    return np.dstack([picture.pixels, picture.alpha])
