"""Moving pictures: animated GIF, PNG and WebP files."""

from pathlib import Path
from typing import NamedTuple

from PIL import ImageSequence

from flash_wtconv_jax.pictures.still import (
    MAX_PIXELS,
    Picture,
    from_pillow,
    opened,
    to_pillow,
)
from pallas_kernels.common.files import replacing, writing
from pallas_kernels.common.types import Keywords

_FORMATS = {".gif": "GIF", ".png": "PNG", ".webp": "WEBP"}


class Clip(NamedTuple):
    """The frames of an animation.

    Attributes:
        frames: Pictures of one size, as they are shown: what a frame leaves of the one before is
            in it.
        durations: Milliseconds for which each is shown.
        loop: How often it is shown, 0 for ever.
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


def check_writable_clip(path: Path) -> None:
    """Raises ValueError where a file of this name cannot hold an animation."""
    if path.suffix.lower() not in _FORMATS:
        ends = ", ".join(sorted(_FORMATS))
        raise ValueError(f"{path}: the ending is {path.suffix!r}, an animation wants one of {ends}")


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
            durations.append(float(frame.info.get("duration", 0)))
            frames.append(from_pillow(frame))
        loop = image.info.get("loop")
        if image.format == "GIF":
            # It says how often the animation is repeated, and nothing where it is not.
            loop = 1 if loop is None else loop and loop + 1
        return Clip(frames, durations, loop or 0)


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
    check_writable_clip(path)
    form = _FORMATS[path.suffix.lower()]
    frames = [to_pillow(frame) for frame in clip.frames]
    transparent = any(frame.alpha is not None for frame in clip.frames)
    first, *others = [frame.convert("RGBA") for frame in frames] if transparent else frames
    keys: Keywords = {"loop": clip.loop}
    if clip.frames[0].profile:
        keys["icc_profile"] = clip.frames[0].profile
    if form == "WEBP":
        keys["lossless"] = True  # Pillow 13 drops the transparency of frames that lose.
    if form == "GIF":
        keys["loop"] = {0: 0, 1: None}.get(clip.loop, clip.loop - 1)
        if transparent:
            keys["disposal"] = 2  # Else the frame before would show through.
    with writing(path), replacing(path, force) as temporary:
        first.save(
            temporary,
            form,
            save_all=True,
            append_images=others,
            duration=[round(one) for one in clip.durations],
            **keys,
        )
