"""Stylises many files: decoding, the network and encoding go on at the same time."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from flash_wtconv_jax import pictures
from flash_wtconv_jax.pictures import Clip, Picture


class Network(Protocol):
    """A network that computes pictures, as `stylizer.Stylizer` does."""

    def start(self, pixels: np.ndarray) -> Callable[[], np.ndarray]:
        """Starts pictures `[N, H, W, 3]`, and returns what waits for their result."""

    def film(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The results of frames `[H, W, 3]`, one after the other."""


class Job(NamedTuple):
    """A file to stylise, and the file that the result goes into."""

    source: Path
    target: Path


class Settings(NamedTuple):
    """How a run treats its files.

    Attributes:
        size: Longer side that pictures are resized to first; None leaves them.
        batch: Pictures of one size that are computed together.
        smooth: Whether the files are the frames of a film, in order.
        force: Whether files are replaced.
        max_pixels: Pixels of the largest picture.
        workers: Threads that decode, and as many that encode.
    """

    size: int | None = None
    batch: int = 1
    smooth: bool = False
    force: bool = False
    max_pixels: int = pictures.MAX_PIXELS
    workers: int = 4


class Report(NamedTuple):
    """The outcome of a run.

    Attributes:
        failures: The files that could not be stylised, and why.
        busy: Seconds that each stage would take alone: "decoding", "network", "encoding".
    """

    failures: dict[Path, str]
    busy: dict[str, float]

    @property
    def limit(self) -> str:
        """The stage that the others wait for."""
        return max(self.busy, key=self.busy.__getitem__)


def run(
    jobs: Sequence[Job], network: Network, settings: Settings, on_done: Callable[[], None]
) -> Report:
    """Stylises files, each written whole or not at all; what fails stops no other.

    Args:
        jobs: The files.
        network: What computes pictures.
        settings: How.
        on_done: Called as each file is written or has failed.

    Returns:
        The failures, and which stage took how long.
    """
    with (
        ThreadPoolExecutor(settings.workers) as decoding,
        ThreadPoolExecutor(1) as waiting,
        ThreadPoolExecutor(settings.workers) as encoding,
    ):
        work = _Run(network, settings, decoding, waiting, encoding, on_done)
        try:
            return work.all(jobs)
        except BaseException:
            # What has begun is finished; nothing else is begun.
            for pool in (decoding, waiting, encoding):
                pool.shutdown(wait=False, cancel_futures=True)
            encoding.shutdown()
            work.tell_written()
            raise


class _Still(NamedTuple):
    job: Job
    picture: Picture


class _Moving(NamedTuple):
    job: Job
    clip: Clip


_Decoded = _Still | _Moving
_Pending = tuple[list[_Still], Future[tuple[np.ndarray, float]], float]
"""Pictures, their result and when it was there, and when they were started."""


class _Run:
    """One run: its queues, its clocks and its failures."""

    def __init__(
        self,
        network: Network,
        settings: Settings,
        decoding: ThreadPoolExecutor,
        waiting: ThreadPoolExecutor,
        encoding: ThreadPoolExecutor,
        on_done: Callable[[], None],
    ) -> None:
        self.network = network
        self.settings = settings
        self.decoding = decoding
        self.waiting = waiting
        self.encoding = encoding
        self.on_done = on_done
        self.failures: dict[Path, str] = {}
        self.seconds = {"decoding": 0.0, "network": 0.0, "encoding": 0.0}
        self.idle_since = 0.0
        self.written: deque[tuple[Job, Future[float]]] = deque()

    def all(self, jobs: Sequence[Job]) -> Report:
        decoded = self._decoded(jobs)
        if self.settings.smooth:
            self._film(decoded)
        else:
            self._pictures(decoded)
        self._wait_for_writers(0)
        order = {job.source: index for index, job in enumerate(jobs)}
        failures = dict(sorted(self.failures.items(), key=lambda one: order[one[0]]))
        busy = {
            stage: seconds / (1 if stage == "network" else self.settings.workers)
            for stage, seconds in self.seconds.items()
        }
        return Report(failures, busy)

    def _decoded(self, jobs: Sequence[Job]) -> Iterator[_Decoded]:
        """The contents of the files, in order; a few are read ahead."""
        ahead = self.settings.workers + self.settings.batch
        waiting: deque[tuple[Job, Future[tuple[Picture | Clip, float]]]] = deque()
        coming = iter(jobs)
        while True:
            for job in islice(coming, ahead - len(waiting)):
                waiting.append((job, self.decoding.submit(_decode, job, self.settings)))
            if not waiting:
                return
            job, future = waiting.popleft()
            try:
                content, seconds = future.result()
            except _FAILURES as error:
                self._failed(job, error)
                continue
            self.seconds["decoding"] += seconds
            yield _Moving(job, content) if isinstance(content, Clip) else _Still(job, content)

    def _pictures(self, decoded: Iterator[_Decoded]) -> None:
        """Stylises pictures by themselves; a batch is on its way while the one before computes."""
        under_way: deque[_Pending] = deque()
        for group in _batches(decoded, self.settings.batch):
            if isinstance(group, _Moving):
                self._clip(*group)
            else:
                under_way += self._started(group)
            while len(under_way) > 1:
                self._fetch(*under_way.popleft())
        while under_way:
            self._fetch(*under_way.popleft())

    def _started(self, group: list[_Still]) -> list[_Pending]:
        """The batch under way, or nothing of it where it failed."""
        begin = time.perf_counter()
        try:
            finish = self.network.start(_stack(group))
        except _FAILURES as error:
            self._apart(group, error)
            return []
        # In a thread, so that the time of its end is known whatever is waited for here.
        return [(group, self.waiting.submit(_with_end, finish), begin)]

    def _fetch(
        self, group: list[_Still], result: Future[tuple[np.ndarray, float]], begin: float
    ) -> None:
        """Waits for a batch and hands it to the writers."""
        try:
            found, end = result.result()
        except _FAILURES as error:
            self._apart(group, error)
            return
        self._computed(begin, end)
        for one, pixels in zip(group, found, strict=True):
            self._write(one.job, one.picture._replace(pixels=pixels))

    def _apart(self, group: list[_Still], error: Exception) -> None:
        """Tries each picture of a batch that failed alone; one alone has failed."""
        if len(group) == 1:
            self._failed(group[0].job, error)
            return
        for one in group:
            for alone in self._started([one]):
                self._fetch(*alone)

    def _film(self, decoded: Iterator[_Decoded]) -> None:
        """Stylises frames in turn by statistics averaged over them; a clip is a film of its own."""
        frames: deque[tuple[_Still, float]] = deque()

        def pixels() -> Iterator[np.ndarray]:
            for one in decoded:
                if isinstance(one, _Moving):
                    self._clip(*one)
                else:
                    frames.append((one, time.perf_counter()))
                    yield one.picture.pixels

        results = self.network.film(pixels())
        while True:
            try:
                result = next(results, None)
            except _FAILURES as error:
                # The film cannot go on without this frame's statistics.
                for one in [*(frame for frame, _ in frames), *decoded]:
                    self._failed(one.job, error)
                return
            if result is None:
                return
            one, begin = frames.popleft()
            self._computed(begin, time.perf_counter())
            self._write(one.job, one.picture._replace(pixels=result))

    def _clip(self, job: Job, clip: Clip) -> None:
        begin = time.perf_counter()
        pixels = [frame.pixels for frame in clip.frames]
        try:
            results = list(
                self.network.film(pixels) if self.settings.smooth else self._frames(pixels)
            )
        except _FAILURES as error:
            self._failed(job, error)
            return
        self._computed(begin, time.perf_counter())
        frames = [
            frame._replace(pixels=result)
            for frame, result in zip(clip.frames, results, strict=True)
        ]
        self._write(job, clip._replace(frames=frames))

    def _frames(self, frames: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
        """The results of a clip's frames by batches, each started before the one before is read."""
        before: Callable[[], np.ndarray] | None = None
        for index in range(0, len(frames), self.settings.batch):
            started = self.network.start(np.stack(frames[index : index + self.settings.batch]))
            if before is not None:
                yield from before()
            before = started
        if before is not None:
            yield from before()

    def _computed(self, begin: float, end: float) -> None:
        """Adds the seconds of a computation, from the end of the one before on."""
        self.seconds["network"] += max(0.0, end - max(begin, self.idle_since))
        self.idle_since = max(end, self.idle_since)

    def _write(self, job: Job, content: Picture | Clip) -> None:
        self.written.append((job, self.encoding.submit(_encode, job, content, self.settings.force)))
        self._wait_for_writers(self.settings.workers)

    def _wait_for_writers(self, most: int) -> None:
        """Waits until at most so many files are being written."""
        while len(self.written) > most:
            job, future = self.written.popleft()
            try:
                self.seconds["encoding"] += future.result()
            except _FAILURES as error:
                self._failed(job, error)
            else:
                self.on_done()

    def tell_written(self) -> None:
        """Tells of the files that were written though nobody waited for them."""
        for _, future in self.written:
            if not future.cancelled() and future.exception() is None:
                self.on_done()

    def _failed(self, job: Job, error: Exception) -> None:
        self.failures[job.source] = str(error) or type(error).__name__
        self.on_done()


_FAILURES = (ValueError, OSError, RuntimeError, MemoryError)


def _batches(decoded: Iterator[_Decoded], size: int) -> Iterator[list[_Still] | _Moving]:
    """Pictures that follow each other and have one size, at most so many; a clip by itself."""
    group: list[_Still] = []
    for one in decoded:
        if group and (isinstance(one, _Moving) or _kind(one) != _kind(group[0])):
            yield group
            group = []
        if isinstance(one, _Moving):
            yield one
            continue
        group.append(one)
        if len(group) == size:  # It does not wait for the next file.
            yield group
            group = []
    if group:
        yield group


def _kind(one: _Still) -> tuple[tuple[int, ...], np.dtype]:
    """The shape and dtype that pictures of a batch share."""
    return one.picture.pixels.shape, one.picture.pixels.dtype


def _with_end(finish: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    return finish(), time.perf_counter()


def _stack(group: Sequence[_Still]) -> np.ndarray:
    return np.stack([one.picture.pixels for one in group])


def _decode(job: Job, settings: Settings) -> tuple[Picture | Clip, float]:
    """The content of a file, and the seconds that it took."""
    begin = time.perf_counter()
    content: Picture | Clip
    if pictures.is_clip(job.source, settings.max_pixels):
        pictures.check_writable_clip(job.target)
        content = pictures.read_clip(job.source, settings.max_pixels)
        if settings.size is not None:
            frames = [pictures.resized(frame, settings.size) for frame in content.frames]
            content = content._replace(frames=frames)
    else:
        content = pictures.read(job.source, settings.max_pixels)
        pictures.check_writable(job.target, content)
        if settings.size is not None:
            content = pictures.resized(content, settings.size)
    return content, time.perf_counter() - begin


def _encode(job: Job, content: Picture | Clip, force: bool) -> float:
    """Writes a file and returns the seconds that it took."""
    begin = time.perf_counter()
    if isinstance(content, Clip):
        pictures.write_clip(job.target, content, force)
    else:
        pictures.write(job.target, content, force)
    return time.perf_counter() - begin
