"""Batches of images by grain: the order, the crops in workers, and the place to go on from.

The images of a step depend on the seed and the step alone: not on the number of workers, devices
or processes.
"""

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple, TypeVar

import grain
import numpy as np
from absl import flags
from grain.multiprocessing import SharedMemoryArray
from numpy.typing import NDArray

from flash_wtconv_jax.train.images import decoding, randaugment
from flash_wtconv_jax.train.images.settings import Data
from flash_wtconv_jax.train.images.sources import UNLABELLED, Masks, Source

NO_CLASS = -1
"""The label of an image that could not be read, of a row that only fills a batch, and of a pixel
that is of no class."""
_THREADS = 16
# Images that cross from a worker in one message.
_CHUNK = 32
# Bytes from which on memory is shared with a worker: to copy fewer costs less.
_SHARED = 1 << 16
# What the scheduler takes from workers where something else wants a core.
_NICENESS = 10

Arrays = dict[str, NDArray[Any]]
"""`image` uint8 `[N, B, B, C]`, where B is `largest_crop`, of each of which a crop fills the upper
left corner, and the rest is undefined; `extent` int32 `[N, 2]`, the crop's height and width;
`label` int32 `[N]` or of masks int16 `[N, S, S]`; `index` int32 `[N]`; and `read` bool `[N]`, which
is False of rows without an image."""

_Ready = TypeVar("_Ready")

_MakeArray = Callable[[tuple[int, ...], np.dtype[Any]], NDArray[Any]]
"""Makes an array of a shape and a dtype."""


class Share(NamedTuple):
    """The part of each batch that one process reads.

    Attributes:
        process: Its number.
        processes: Processes in all.
    """

    process: int = 0
    processes: int = 1


_WHOLE = Share()


def training(
    source: Source,
    data: Data,
    *,
    batch: int,
    seed: int,
    steps: range,
    share: Share = _WHOLE,
) -> grain.IterDataset[Arrays]:
    """The batches of steps: shuffled anew each epoch, cropped, and changed by RandAugment.

    Args:
        source: The images.
        data: What is done to them.
        batch: Images of a step, of all processes together.
        seed: Of the order and the crops.
        steps: The steps, counted from 0 over all epochs.
        share: The process that reads.

    Returns:
        grain's dataset, whose iterators keep their place: see `iterating`.
    """
    order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    crops = order.random_map(partial(_sample, source, data))
    return _batches(crops, data, batch, steps, share)


def evaluation(
    source: Source, data: Data, *, batch: int, share: Share = _WHOLE
) -> grain.IterDataset[Arrays]:
    """All images once, in their order, cropped from the centre; the last batch is filled up.

    Args:
        source: The images.
        data: What is done to them.
        batch: Images of a step, of all processes together.
        share: The process that reads.
    """
    count = len(source)
    steps = -(-count // batch)
    crops = grain.MapDataset.range(steps * batch).map(partial(_sample, source, data))
    return _batches(crops, data, batch, range(steps), share)


def largest_crop(size: int) -> int:
    """Pixels a side up to which crops stay as they are, for the device to scale.

    For 224 they are the 256 that `data pack` leaves of an image's shorter side.

    Args:
        size: Pixels a side of the images that the network sees.

    Example:
        >>> largest_crop(224)
        256
    """
    return size + size // 7


def ahead(
    batches: grain.IterDataset[Arrays], make: Callable[[Arrays], _Ready]
) -> grain.IterDataset[_Ready]:
    """Makes something of each batch, in a thread that has two ready before they are asked for.

    Another thread has the batches themselves ready for it. The place of the iterators is that of
    the batch that was taken last.

    Args:
        batches: The batches.
        make: What the thread does with each: sends it to the devices, for one.
    """
    prefetched = grain.experimental.ThreadPrefetchIterDataset
    # One waits in the buffer, and the other to get into it.
    read = prefetched(batches, prefetch_buffer_size=1)
    return prefetched(read.map(make), prefetch_buffer_size=1)


def begin(iterator: grain.DatasetIterator[Any]) -> None:
    """Starts all readers of an iterator; grain would start each when its first chunk is due.

    Args:
        iterator: One that nothing has started yet, as grain does where it restores a place: two
            threads would fill one buffer.
    """
    for parent in iterator._parents:
        begin(parent)
    iterator.start_prefetch()


def speed(
    source: Source, data: Data, *, batch: int, batches: int, seconds: float = math.inf
) -> float:
    """Images a second that are read and cropped for training, with nothing to learn.

    Args:
        source: The images.
        data: What is done to them.
        batch: Images of a step.
        batches: Steps that are timed.
        seconds: Time after which no other step is begun.
    """
    # As many first as may be made already when the clock starts.
    ahead = min(batches, 3 + 2 * _THREADS * _CHUNK // batch)
    steps = range(ahead + batches)
    with iterating(training(source, data, batch=batch, seed=0, steps=steps)) as iterator:
        for _ in range(ahead):
            next(iterator)
        begun, passed, done = time.perf_counter(), 0.0, 0
        while done < batches and passed < seconds:
            next(iterator)
            done, passed = done + 1, time.perf_counter() - begun
    return done * batch / passed


@contextmanager
def iterating(dataset: grain.IterDataset[Arrays]) -> Iterator[grain.DatasetIterator[Arrays]]:
    """Yields an iterator of a dataset, whose workers end when the block does."""
    if not flags.FLAGS.is_parsed():
        # Its workers are handed the flags of absl, which nothing here parses.
        flags.FLAGS.mark_as_parsed()
    iterator = iter(dataset)
    try:
        yield iterator
    finally:
        iterator.close()
        # Its last chunks lie in memory shared with its workers, and are held in a circle.
        gc.collect()


def reason(source: Source, data: Data, index: int) -> str:
    """The name of an image that could not be read, and why, from a second attempt."""
    try:
        _read(source, data, index, None)
    except Exception as error:  # See `_sample`.
        return f"{source.name(index)}: {decoding.reason(error)}"
    return f"{source.name(index)}: it could be read the second time"


def _batches(
    crops: grain.MapDataset[Arrays], data: Data, batch: int, steps: range, share: Share
) -> grain.IterDataset[Arrays]:
    workers = data.workers
    local = batch // share.processes
    chunk = max(size for size in range(1, min(local, _CHUNK) + 1) if local % size == 0)
    first = steps.start * local
    rows = grain.MapDataset.range(first, first + len(steps) * local).map(
        partial(_row, crops, batch, local, share.process)
    )
    # Whole chunks go to workers in turn, so that their order is that of one process.
    if workers:
        # Stacked by the worker's main thread: memory that is shared is only given back when it has
        # been sent, and its other thread may be ahead when it ends.
        images = rows.batch(chunk, batch_fn=list).to_iter_dataset(grain.ReadOptions(1, 2))
        options = grain.experimental.DatasetOptions(min_shm_size=_SHARED)
        stacked = images.map(partial(_stacked, _shared))
        chunks = grain.experimental.WithOptionsIterDataset(stacked, options)
        buffered = max(1, 2 * local // (chunk * workers))
        ready = chunks.mp_prefetch(grain.MultiprocessingOptions(workers, buffered), _give_way)
    else:
        threads = min(_THREADS, os.cpu_count() or 1)
        chunks = rows.batch(chunk, batch_fn=partial(_stacked, np.empty))
        ready = chunks.to_iter_dataset(grain.ReadOptions(threads, 2 * threads))
    return ready.batch(local // chunk, batch_fn=partial(_joined, data))


def _give_way(worker: int, workers: int) -> None:
    """Lets the process that keeps the devices busy go before its workers, which take every core."""
    if hasattr(os, "nice"):
        os.nice(_NICENESS)


def _row(crops: grain.MapDataset[Arrays], batch: int, local: int, process: int, row: int) -> Arrays:
    """The image of a process's row: rows of a batch that follow each other are its own."""
    return crops[row // local * batch + process * local + row % local]


def _sample(
    source: Source, data: Data, index: int, rng: np.random.Generator | None = None
) -> Arrays:
    read = False
    if index < len(source):
        # Pillow raises whatever it stumbles over; the trainer counts, and asks for the reason.
        with suppress(Exception):
            label, pixels = _read(source, data, index, rng)
            read = True
    if not read:
        pixels = np.zeros((data.size, data.size, data.channels), np.uint8)
        label = np.asarray(NO_CLASS, np.int32)
        if isinstance(source, Masks):
            label = np.full((data.size, data.size), NO_CLASS, np.int16)
    return {
        "image": pixels,
        "label": label,
        "index": np.asarray(index, np.int32),
        "read": np.asarray(read),
    }


def _read(
    source: Source, data: Data, index: int, rng: np.random.Generator | None
) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """The class or mask and the pixels of a random crop, or without `rng` of the centre's.

    A mask is scaled here, by its nearest pixels; the pixels may be left to the device.
    """
    content, label = source[index]
    whole = decoding.decoded(content)
    if rng is None:
        box = decoding.centre_box(whole.size, data.eval_crop)
    else:
        box = decoding.random_box(whole.size, data.scale, data.ratio, rng)
    if isinstance(label, bytes):
        classes = _mask(label, whole.size, box, data.size, len(source.classes))
    elif 0 <= label < len(source.classes):
        classes = np.asarray(label, np.int32)
    else:
        raise ValueError(f"its class is {label}, expected 0 to {len(source.classes) - 1}")
    image = decoding.cropped(whole, box, data.size, largest_crop(data.size))
    if rng is not None and data.randaugment:
        image = randaugment.randaugment(image, data.randaugment, data.randaugment_ops, rng)
    return classes, decoding.pixels_of(image, data.channels)


def _mask(
    content: bytes, size: tuple[int, int], box: decoding.Box, side: int, classes: int
) -> NDArray[np.int16]:
    """The classes of the pixels of a crop."""
    mask = decoding.decoded(content)
    if mask.size != size:
        raise ValueError(f"its mask has {mask.size} pixels, the image {size}")
    found = decoding.cropped_mask(mask, box, side).astype(np.int16)
    found[found == UNLABELLED] = NO_CLASS
    if found.max() >= classes:
        raise ValueError(
            f"its mask has the class {found.max()}, expected 0 to {classes - 1}, or {UNLABELLED} "
            "where there is none"
        )
    return found


def _stacked(new: _MakeArray, rows: Sequence[Arrays]) -> Arrays:
    """The rows as one array each; of crops, which differ in size, all pixels one after the other.

    No memory is shared, nor any page of it made, for what is not there.

    Args:
        new: Makes the arrays.
        rows: The rows.
    """

    def stacked(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
        return np.stack(parts, out=new((len(parts), *parts[0].shape), parts[0].dtype))

    chunk = {name: stacked([row[name] for row in rows]) for name in rows[0] if name != "image"}
    crops = [row["image"] for row in rows]
    chunk["extent"] = stacked([np.asarray(crop.shape[:2], np.int32) for crop in crops])
    pixels = new((sum(crop.size for crop in crops),), crops[0].dtype)
    chunk["image"] = np.concatenate([crop.ravel() for crop in crops], out=pixels)
    return chunk


def _shared(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """A new array, a large one in memory that the trainer's process sees too."""
    large = math.prod(shape) * dtype.itemsize >= _SHARED
    return SharedMemoryArray(shape, dtype) if large else np.empty(shape, dtype)


def _joined(data: Data, chunks: Sequence[Arrays]) -> Arrays:
    """A batch of chunks, copied out of the memory that is shared with their workers."""
    names = chunks[0].keys() - {"image"}
    batch = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in names}
    side, channels = largest_crop(data.size), data.channels
    # To clear it would take as long as the copies, and `scaled` gives no weight to the rest.
    batch["image"] = np.empty((len(batch["index"]), side, side, channels), np.uint8)
    rows = iter(batch["image"])
    for chunk in chunks:
        pixels, start = np.asarray(chunk["image"]), 0
        for height, width in chunk["extent"].tolist():
            end = start + height * width * channels
            next(rows)[:height, :width] = pixels[start:end].reshape(height, width, channels)
            start = end
    return batch
