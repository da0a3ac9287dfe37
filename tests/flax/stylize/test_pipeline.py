"""Many files at a time: what fails stops no other, batches have one size, frames stay in order."""

import threading

import numpy as np
import pytest
from PIL import Image

from flash_wtconv_jax import pictures
from flash_wtconv_jax.pictures import Clip, Picture
from flash_wtconv_jax.stylize import pipeline
from flash_wtconv_jax.stylize.pipeline import Job, Settings


class Negative:
    """A network that inverts, and refuses whatever holds the value 13."""

    def __init__(self):
        self.batches, self.filmed = [], 0

    def start(self, pixels):
        self.batches.append(pixels.shape)

        def finish():
            if (pixels == 13).any():
                raise ValueError("unlucky")
            return 255 - pixels

        return finish

    def film(self, frames):
        for frame in frames:
            self.filmed += 1
            if (frame == 13).any():
                raise ValueError("unlucky")
            yield 255 - frame


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path


def jobs(folder, values, size=(4, 3)):
    made = []
    for index, value in enumerate(values):
        path = folder / f"{index}.png"
        if value is None:
            path.write_text("no picture")
        else:
            Image.new("RGB", size if value < 200 else size[::-1], (value,) * 3).save(path)
        made.append(Job(path, folder / "out" / path.name))
    return made


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_each_file_is_written_or_has_a_reason(folder, batch):
    values = [1, 2, None, 13, 5, 200, 201, 8]
    work, network, done = jobs(folder, values), Negative(), []
    report = pipeline.run(work, network, Settings(batch=batch, workers=2), lambda: done.append(1))
    assert len(done) == len(work)
    assert list(report.failures) == [folder / "2.png", folder / "3.png"]
    assert report.failures[folder / "3.png"] == "unlucky"
    for job, value in zip(work, values, strict=True):
        if value not in (None, 13):
            assert (pictures.read(job.target).pixels == 255 - value).all()
    assert len(list((folder / "out").iterdir())) == 6
    if batch == 5:
        # One size each; the batch that failed was tried again one by one.
        assert [shape[0] for shape in network.batches] == [4, 2, 1, 1, 1, 1, 1]
    assert set(report.busy) == {"decoding", "network", "encoding"} and report.limit in report.busy


def test_frames_are_a_film_in_their_order(folder):
    work, network = jobs(folder, [1, 2, None, 4, 13, 6]), Negative()
    report = pipeline.run(work, network, Settings(smooth=True, workers=2), lambda: None)
    # What comes after a frame that failed has lost its statistics.
    assert [path.stem for path in report.failures] == ["2", "4", "5"]
    assert network.filmed == 4 and not network.batches
    assert (pictures.read(folder / "out" / "3.png").pixels == 251).all()


@pytest.mark.parametrize("smooth", [False, True])
def test_animations_keep_their_frames(folder, smooth):
    frames = [Picture(np.full((4, 6, 3), value, np.uint8)) for value in (10, 60, 110)]
    for name, each in (("a", frames), ("b", [*frames, Picture(np.full((4, 6, 3), 13, np.uint8))])):
        pictures.write_clip(folder / f"{name}.webp", Clip(each, [40.0] * len(each), 2))
    work = [Job(folder / f"{name}.webp", folder / "out" / f"{name}.webp") for name in "ab"]
    report = pipeline.run(work, Negative(), Settings(smooth=smooth, workers=1), lambda: None)
    assert list(report.failures) == [folder / "b.webp"]
    clip = pictures.read_clip(folder / "out" / "a.webp")
    assert [frame.pixels[0, 0, 0] for frame in clip.frames] == [245, 195, 145]
    assert clip.durations == [40.0] * 3 and clip.loop == 2


class Events(Negative):
    """A network that tells when it was asked what, and can refuse to start."""

    def __init__(self, events, refused=()):
        super().__init__()
        self.events, self.refused = events, refused

    def start(self, pixels):
        name = (*pixels[:, 0, 0, 0].tolist(),)
        self.events.append(("start", name))
        if name in self.refused:
            raise RuntimeError("out of memory")
        finish = super().start(pixels)

        def told():
            self.events.append(("finish", name))
            return finish()

        return told


def test_a_batch_is_on_its_way_while_one_computes(folder, monkeypatch):
    """The second batch is started though the first has no result before, nor is it written."""
    events, second = [], threading.Event()
    network = Events(events)
    start, encode = network.start, pipeline._encode

    def started(pixels):
        finish = start(pixels)
        if pixels[0, 0, 0, 0] == 2:
            second.set()

        def waits():
            assert second.wait(10)
            return finish()

        return waits

    def encoded(job, *args):
        events.append(("encode", threading.current_thread() is threading.main_thread()))
        return encode(job, *args)

    network.start = started
    monkeypatch.setattr(pipeline, "_encode", encoded)
    report = pipeline.run(jobs(folder, [1, 2, 3]), network, Settings(workers=1), lambda: None)
    assert not report.failures
    assert events.index(("start", (2,))) < events.index(("finish", (1,)))
    assert events.count(("encode", False)) == 3


def test_batches_that_cannot_start_are_tried_apart(folder):
    events = []
    network = Events(events, refused=[(1, 2), (2,), (13, 4), (13,)])
    work = jobs(folder, [1, 2, 13, 4])
    report = pipeline.run(work, network, Settings(batch=2), lambda: None)
    assert report.failures == {
        folder / "1.png": "out of memory",
        folder / "2.png": "out of memory",
    }
    # One that starts, fails at its end and cannot start again alone.
    network = Events(events, refused=[(13,)])
    report = pipeline.run(
        [Job(job.source, job.target.with_suffix(".webp")) for job in work[2:]],
        network,
        Settings(batch=2),
        lambda: None,
    )
    assert report.failures == {folder / "2.png": "out of memory"}


@pytest.mark.parametrize("smooth", [False, True])
def test_waiting_for_files_is_not_the_networks_time(folder, monkeypatch, smooth):
    """The clock ticks a thousand times for a file, which nothing is computed in."""
    clock, computed = iter(range(10**6)), threading.Semaphore()
    decode, with_end = pipeline._decode, pipeline._with_end
    monkeypatch.setattr(pipeline.time, "perf_counter", lambda: float(next(clock)))

    def slow(*args):
        assert computed.acquire(timeout=10)
        for _ in range(1000):
            next(clock)
        return decode(*args)

    def told(finish):
        result = with_end(finish)
        computed.release()
        return result

    class Film(Negative):
        def film(self, frames):
            for result in super().film(frames):
                yield result
                computed.release()

    monkeypatch.setattr(pipeline, "_decode", slow)
    monkeypatch.setattr(pipeline, "_with_end", told)
    settings = Settings(smooth=smooth, workers=1)
    # As many as are read ahead, so that each waits for the one before.
    report = pipeline.run(jobs(folder, [1, 2]), Film(), settings, lambda: None)
    assert not report.failures and report.busy["network"] < 100


def test_an_animation_wants_a_file_that_holds_it(folder):
    frames = [Picture(np.full((4, 6, 3), value, np.uint8)) for value in (10, 60, 110)]
    pictures.write_clip(folder / "a.webp", Clip(frames, [40.0] * 3))
    network = Negative()
    report = pipeline.run(
        [Job(folder / "a.webp", folder / "a.jpg")], network, Settings(), lambda: None
    )
    assert "an animation wants one of .gif" in report.failures[folder / "a.webp"]
    assert not network.batches
    pipeline.run(
        [Job(folder / "a.webp", folder / "b.webp")], network, Settings(batch=2), lambda: None
    )
    assert [shape[0] for shape in network.batches] == [2, 1]


def test_pictures_are_resized_first(folder):
    network = Negative()
    pipeline.run(jobs(folder, [1], (40, 30)), network, Settings(size=8), lambda: None)
    assert network.batches == [(1, 6, 8, 3)]


def test_a_disk_that_is_full_is_said_of_each_file(folder, monkeypatch):
    def full(*args, **keys):
        raise OSError(28, "No space left on device")

    work = jobs(folder, [1, 2])
    monkeypatch.setattr(Image.Image, "save", full)
    report = pipeline.run(work, Negative(), Settings(), lambda: None)
    assert len(report.failures) == 2
    assert all("No space left on device" in reason for reason in report.failures.values())
    assert not list((folder / "out").iterdir())


def test_an_interruption_leaves_whole_files_and_no_threads(folder):
    told = []

    def interrupt():
        told.append(1)
        if len(told) == 1:
            raise KeyboardInterrupt

    work = jobs(folder, range(1, 12))
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(work, Negative(), Settings(workers=2), interrupt)
    assert threading.active_count() == len(threading.enumerate())
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]
    written = list((folder / "out").iterdir())
    assert len(told) == len(written)
    for path in written:
        assert pictures.read(path).pixels.shape == (3, 4, 3)
