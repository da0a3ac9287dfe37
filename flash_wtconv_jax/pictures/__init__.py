"""Pictures in files: read as RGB pixels beside what else they hold, written back with it.

It needs the extra `stylize`: Pillow, and imagecodecs and tifffile for 16 bits a sample, which
Pillow reads as 8.
"""

from flash_wtconv_jax.pictures.clip import Clip, check_writable_clip, is_clip, read_clip, write_clip
from flash_wtconv_jax.pictures.still import (
    MAX_PIXELS,
    SUFFIXES,
    Picture,
    check_writable,
    read,
    resized,
    write,
)

__all__ = [
    "MAX_PIXELS",
    "SUFFIXES",
    "Clip",
    "Picture",
    "check_writable",
    "check_writable_clip",
    "is_clip",
    "read",
    "read_clip",
    "resized",
    "write",
    "write_clip",
]
