"""Packs images into few large files, scaled down once: `flash-wtconv data pack`."""

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flash_wtconv_jax.train.images import sources
from flash_wtconv_jax.train.images.decoding import decoded, reason, shrunk
from pallas_kernels.common.files import replacing, writing

KINDS = ("tar", "array_record")
"""Kinds of files that images are packed into."""
_QUALITY = 90


class Packed(NamedTuple):
    """The result of packing a part.

    Attributes:
        images: Images that were written.
        size: Bytes of all files.
        broken: The images that could not be read and were left out, with the reason.
    """

    images: int
    size: int
    broken: list[str]


def pack(
    source: sources.Source,
    out: Path,
    *,
    kind: str = "tar",
    size: int = 256,
    shard: int = 2048,
    compressed: bool = True,
    workers: int = 0,
    on_image: Callable[[int], None] = lambda done: None,
) -> Packed:
    """Writes the images of a source into shards, in their order, whole or not at all.

    Args:
        source: The images.
        out: The folder to make.
        kind: "tar" or "array_record".
        size: Pixels of the shorter side. Smaller JPEG and PNG files stay as they are, arrays become
            PNG, and the rest JPEG, if they are compressed.
        shard: Images a file.
        compressed: Whether they are JPEG or PNG. Otherwise they are BMP, which takes eight times
            the space and no decoding.
        workers: Processes that scale images; 0 does it in this one.
        on_image: Called with the number of images done.

    Returns:
        What was written, and what could not be read.

    Raises:
        FileExistsError: If there is something at `out`.
        OSError: If it cannot be written.
        ValueError: If an argument is out of range, the images have masks, or none can be read.
    """
    if isinstance(source, sources.Masks):
        raise ValueError(f"{source.folder} has masks, which are not packed: train on it as it is")
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    for name, value in (("size", size), ("shard", shard)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected 1 or more")
    broken: list[str] = []
    work = partial(_shrunk, source, size, compressed)
    with writing(out), replacing(out, force=False) as temporary:
        temporary.mkdir()
        writer = _Tars(temporary, shard) if kind == "tar" else _Records(temporary, shard)
        written = 0
        with ExitStack() as held:
            held.callback(writer.close)
            results: Iterable[_Shrunk] = map(work, range(len(source)))
            if workers:
                # Forked processes would share the locks of this one's threads.
                pool = held.enter_context(ProcessPoolExecutor(workers, get_context("spawn")))
                results = pool.map(work, range(len(source)), chunksize=32)
            for index, result in enumerate(results):
                if isinstance(result, str):
                    broken.append(f"{source.name(index)}: {result}")
                else:
                    writer.add(written, *result)
                    written += 1
                on_image(index + 1)
        if not written:
            raise ValueError(f"none of the {len(source)} images can be read: {broken[0]}")
        if kind == "tar":
            sources.index_shards(temporary, source.classes)
        else:
            (temporary / sources.CLASSES).write_text(json.dumps(source.classes))
        total = sum(path.stat().st_size for path in temporary.iterdir())
    return Packed(written, total, broken)


_Shrunk = tuple[bytes, str, int] | str
"""An image's file, its ending and its class; or the reason why there is none."""


def _shrunk(source: sources.Source, size: int, compressed: bool, index: int) -> _Shrunk:
    """The file of an image that is no larger than it has to be."""
    try:
        content, label = source[index]
        assert isinstance(label, int)  # Since masks are not packed.
        image = decoded(content)
        kept = {"JPEG": ".jpg", "PNG": ".png"}.get(image.format or "")
        if compressed and isinstance(content, bytes) and kept and min(image.size) <= size:
            image.load()  # Or its reason would only be found in training.
            return content, kept, label
        whole = shrunk(image, size)
    except Exception as error:  # Pillow raises whatever it stumbles over in a damaged file.
        return reason(error)
    file = io.BytesIO()
    if not compressed:
        whole.save(file, "BMP")
        return file.getvalue(), ".bmp", label
    if isinstance(content, np.ndarray):
        whole.save(file, "PNG")
        return file.getvalue(), ".png", label
    whole.save(file, "JPEG", quality=_QUALITY)
    return file.getvalue(), ".jpg", label


class _Tars:
    """Writes tar shards of so many images each.

    Args:
        folder: Where to; it exists.
        images: Images a shard.
    """

    def __init__(self, folder: Path, images: int) -> None:
        self.folder, self.images = folder, images
        self.archive: tarfile.TarFile | None = None

    def add(self, number: int, image: bytes, suffix: str, label: int) -> None:
        """Adds an image and its class."""
        if number % self.images == 0:
            self.close()
            path = self.folder / f"{number // self.images:05d}.tar"
            self.archive = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        assert self.archive is not None  # Since numbers begin at 0.
        for content, ending in ((image, suffix), (str(label).encode(), ".cls")):
            member = tarfile.TarInfo(f"{number:08d}{ending}")
            member.size = len(content)
            self.archive.addfile(member, io.BytesIO(content))

    def close(self) -> None:
        """Ends the shard that is being written."""
        if self.archive is not None:
            self.archive.close()
            self.archive = None


class _Records:
    """Writes ArrayRecord files of so many images each, as `_Tars` writes shards."""

    def __init__(self, folder: Path, images: int) -> None:
        self.folder, self.images = folder, images
        self.writer: Any = None

    def add(self, number: int, image: bytes, suffix: str, label: int) -> None:
        """Adds an image and its class."""
        from array_record.python.array_record_module import ArrayRecordWriter

        if number % self.images == 0:
            self.close()
            path = self.folder / f"{number // self.images:05d}.array_record"
            # A group is what one read decompresses, and any order is to be cheap.
            self.writer = ArrayRecordWriter(str(path), "group_size:1")
        self.writer.write(sources.write_example(image, label, f"{number:08d}{suffix}"))

    def close(self) -> None:
        """Ends the file that is being written."""
        if self.writer is not None:
            self.writer.close()
            self.writer = None
