"""Inputs that Swift and Python make alike, and raw files of them."""

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pallas_kernels.common.files import replacing, writing

__all__ = ["formula"]

Float32 = NDArray[np.float32]

_FACTOR, _OFFSET = 2654435761, 12345


def formula(channels: int, height: int, width: int) -> Float32:
    """The input that stands for none: numbers in [-1, 1) that float32 holds exactly.

    The flat element i is `((i * 2654435761 + 12345) mod 2**32 >> 8) / 2**23 - 1`.

    Args:
        channels: Number of channels C.
        height: Number of rows H.
        width: Number of columns W.

    Returns:
        `[1, C, H, W]`.

    Raises:
        ValueError: One of them is less than 1.

    Example:
        >>> formula(1, 1, 3)
        array([[[[-0.9999943 ,  0.23607361, -0.5278584 ]]]], dtype=float32)
    """
    shape = _shape(channels, height, width)
    i = np.arange(np.prod(shape), dtype=np.uint64)
    bits = (i * _FACTOR + _OFFSET) % 2**32 >> 8
    return (bits.astype(np.float32) / np.float32(2**23) - np.float32(1)).reshape(shape)


def read_raw(path: str | os.PathLike[str], channels: int, height: int, width: int) -> Float32:
    """An array of a raw file: `C * H * W` little-endian float32 numbers and nothing else.

    Args:
        path: The file.
        channels: Number of channels C.
        height: Number of rows H.
        width: Number of columns W.

    Returns:
        `[1, C, H, W]`.

    Raises:
        FileNotFoundError: There is no file.
        ValueError: It has another length, or one of the sizes is less than 1.
    """
    shape = _shape(channels, height, width)
    expected, size = int(np.prod(shape)) * 4, Path(path).stat().st_size
    if size != expected:
        raise ValueError(
            f"{path} has {size} bytes, expected {expected}: {channels} x {height} x {width} "
            "little-endian float32 numbers"
        )
    return np.fromfile(path, "<f4").astype(np.float32, copy=False).reshape(shape)


def write_raw(path: str | os.PathLike[str], array: Float32, *, force: bool = False) -> None:
    """Writes the file that `read_raw` reads, whole or not at all.

    Args:
        path: The file.
        array: Float32 numbers of any shape.
        force: Replace a file that is there.

    Raises:
        FileExistsError: There is a file and force is False.
        ValueError: The array is not of float32.
    """
    if array.dtype != np.float32:
        raise ValueError(f"array is of {array.dtype}, expected float32; cast it")
    path = Path(path)
    with replacing(path, force) as temporary, writing(path):
        temporary.write_bytes(array.astype("<f4").tobytes())


def _shape(channels: int, height: int, width: int) -> tuple[int, int, int, int]:
    for name, value in (("channels", channels), ("height", height), ("width", width)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    return 1, channels, height, width
