"""Moving pictures: animated GIF, PNG and WebP files."""

from pathlib import Path
from typing import NamedTuple

from PIL import ImageSequence

from flash_wtconv_jax.pictures.still import (
    MAX_PIXELS,
    Picture,
    check_writable,
    from_pillow,
    opened,
    to_pillow,
)
from pallas_kernels.common.files import replacing, writing
from pallas_kernels.common.types import Keywords

_FORMATS = {".gif": "GIF", ".png": "PNG", ".webp": "WEBP"}
_USUAL_MS = 100.0


class Clip(NamedTuple):
    """The frames of an animation.

    Attributes:
        frames: Pictures of one size, as they are shown: what a frame leaves of the one before is
            in it.
        durations: Milliseconds for which each is shown.
        loop: How often it is repeated, 0 for ever.
    """

    frames: list[Picture]
    durations: list[float]
    loop: int = 0


def is_clip(path: Path, max_pixels: int = MAX_PIXELS) -> bool:
    """Whether a file that can be read has several frames; pages of a TIFF file are none.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no picture.
    """
    if path.suffix.lower() not in _FORMATS:
        return False
    with opened(path, max_pixels) as image:
        return getattr(image, "n_frames", 1) > 1


def read_clip(path: Path, max_pixels: int = MAX_PIXELS) -> Clip:
    """The frames of an animated file.

    Args:
        path: A GIF, PNG or WebP file.
        max_pixels: The number of pixels of all frames together from which on it is refused.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no picture, or too large.
    """
    with opened(path, max_pixels) as image:
        count = getattr(image, "n_frames", 1)
        width, height = image.size
        if width * height * count > max_pixels:
            raise ValueError(
                f"{count} frames of {width} x {height} pixels, more than {max_pixels:,} pixels"
            )
        frames, durations = [], []
        for frame in ImageSequence.Iterator(image):
            frame.load()  # Before, WebP's durations are not known.
            durations.append(float(frame.info.get("duration", _USUAL_MS)))
            frames.append(from_pillow(path, frame))
        return Clip(frames, durations, image.info.get("loop", 0))


def write_clip(path: Path, clip: Clip, force: bool = False) -> None:
    """Writes an animation whole or not at all.

    Args:
        path: A file that ends in .gif, .png or .webp.
        clip: The frames.
        force: Whether a file there is replaced.

    Raises:
        ValueError: If the ending is another.
        OSError: If the file cannot be written, or is there already without `force`.
    """
    check_writable(path)
    form = _FORMATS.get(path.suffix.lower())
    if form is None:
        ends = ", ".join(sorted(_FORMATS))
        raise ValueError(f"{path}: the ending is {path.suffix!r}, an animation wants one of {ends}")
    first, *others = map(to_pillow, clip.frames)
    profile = {"icc_profile": clip.frames[0].profile} if clip.frames[0].profile else {}
    keys: Keywords = {}
    if form == "WEBP":
        keys = {"lossless": True}  # Pillow 13 drops the transparency of frames that lose.
    elif form == "GIF" and clip.frames[0].alpha is not None:
        keys = {"disposal": 2}  # Else the frame before would show through.
    with writing(path), replacing(path, force) as temporary:
        first.save(
            temporary,
            form,
            save_all=True,
            append_images=others,
            duration=[round(one) for one in clip.durations],
            loop=clip.loop,
            **keys,
            **profile,
        )
