"""A training from its settings to the network that it leaves; `flash-wtconv train` is this.

Killed at any step, a run that goes on from its last checkpoint ends bitwise as if it had not been.
"""

import dataclasses
import math
import signal
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from flash_wtconv_jax import checkpoints, environment, models
from flash_wtconv_jax.models import pretrained
from flash_wtconv_jax.train import loop
from flash_wtconv_jax.train.images import (
    evaluation,
    loading,
    optimizers,
    reports,
    saving,
    sources,
    steps,
)
from flash_wtconv_jax.train.images import settings as settings_of
from flash_wtconv_jax.train.images.augment import normalised
from flash_wtconv_jax.train.images.scaling import scaled
from flash_wtconv_jax.train.images.settings import Settings
from pallas_kernels.common.files import replacing
from pallas_kernels.common.types import Json, Keywords

FILES = {
    "network": "the best network, for `eval`, `predict`, `convert` and `models.load_network`",
    "checkpoints": "what `--resume` goes on from, the best and the last",
    "settings.toml": "the settings as they were resolved",
    "images.json": "classes and size of its images",
    "steps.csv": "loss, norm of the gradients, rate, images a second by the step",
    "epochs.csv": "loss and accuracy on held-out images",
    "curves.png": "the same as pictures",
    "predictions.png": "masks of held-out images beside the truth, of a network that tells pixels",
    "tensorboard": "the same for TensorBoard",
    "summary.json": "how it ended",
}
"""Names in the folder of a run, and what they are."""
_DRAWN = 6
"""Held-out images whose masks are drawn."""
_RECENT_SECONDS = 5.0
"""The time over which images a second are told, at the least, once a training takes so long."""
_LOADER_SECONDS = 3.0
"""The time for which the loader alone is timed after a training."""


class Progress(NamedTuple):
    """A run's progress.

    Attributes:
        step: Steps done.
        steps: Steps in all.
        epoch: Passes over the images, a fraction.
        loss: Of the last step.
        images_per_s: Over the last steps.
        waiting: Share of the time in which the devices had nothing to do.
        scores: Of the last evaluation, empty before the first.
    """

    step: int
    steps: int
    epoch: float
    loss: float
    images_per_s: float
    waiting: float
    scores: dict[str, float]


class Run(NamedTuple):
    """Parts of a training, once everything about it is known to fit.

    Attributes:
        settings: What is asked for.
        train: The images to learn from.
        val: Those to evaluate with.
        model: The network with its first parameters.
        mesh: The devices.
        optimizer: See `optimizers.made`.
        rate: The learning rate by the step.
        steps: Steps in all.
    """

    settings: Settings
    train: sources.Source
    val: sources.Source
    model: models.ConvNeXt
    mesh: jax.sharding.Mesh
    optimizer: Any
    rate: Any
    steps: int

    @property
    def epoch_steps(self) -> float:
        """Steps of an epoch, a fraction: batches go on from one epoch into the next."""
        return len(self.train) / self.settings.run.batch


def prepared(settings: Settings) -> Run:
    """Makes everything that a training needs, and finds what is wrong before it begins.

    Raises:
        FileNotFoundError: If images or the checkpoint to begin from are missing.
        ValueError: If images, classes, mesh, batch, network or checkpoint do not fit.
    """
    train, val = sources.opened_pair(Path(settings.data.folder))
    run = settings.run
    mesh = steps.mesh_of(run.mesh, run.batch, run.accumulate)
    total = run.epochs * len(train) // run.batch
    if not total:
        raise ValueError(
            f"run.batch is {run.batch}, more than {run.epochs} epochs of {len(train)} images have"
        )
    of_pixels = isinstance(train, sources.Masks)
    if of_pixels:
        _check_for_masks(settings)
    model = network(settings, len(train.classes), of_pixels=of_pixels)
    rate = optimizers.schedule(settings.optimizer, len(train) / run.batch, total)
    params = nnx.state(model, nnx.Param)
    optimizer = optimizers.made(settings.optimizer, rate, params, settings.model.freeze)
    return Run(settings, train, val, model, mesh, optimizer, rate, total)


def _check_for_masks(settings: Settings) -> None:
    """Raises ValueError for changes of images that their masks would not follow."""
    for name, value in (
        ("data.randaugment", settings.data.randaugment),
        ("augment.mixup", settings.augment.mixup),
        ("augment.cutmix", settings.augment.cutmix),
    ):
        if value:
            raise ValueError(f"{name} is {value}, which masks do not follow; set {name} = 0.0")


def network(settings: Settings, classes: int, *, of_pixels: bool = False) -> models.ConvNeXt:
    """The network of the settings, with its first parameters.

    Args:
        settings: What is asked for.
        classes: Their number.
        of_pixels: Whether they are the classes of pixels: then it is a `models.Segmenter`.

    Raises:
        FileNotFoundError: If there is no checkpoint to begin from.
        ValueError: If the network is unknown, or does not fit the checkpoint or the images.
    """
    wanted = settings.model
    options = {**wanted.options, "num_classes": classes, "in_channels": settings.data.channels}
    begun = models.load_network(wanted.checkpoint) if wanted.checkpoint else None
    known = pretrained.constructors()
    if wanted.name not in known and not (begun and not wanted.name):
        raise ValueError(f"model.name is {wanted.name!r}, expected one of {', '.join(known)}")
    fields = {field.name for field in dataclasses.fields(models.ConvNeXtConfig)}
    if unknown := sorted(set(options) - fields):
        raise ValueError(f"model.options has {unknown[0]!r}, expected fields of ConvNeXtConfig")
    if begun is not None and not wanted.name:
        kept: Keywords = {"features_only": False, "feature_norms": False}
        config = dataclasses.replace(begun.config, **kept, **options)
    else:
        # Shapes alone, for what the name stands for.
        config = nnx.eval_shape(lambda: known[wanted.name](rngs=nnx.Rngs(0), **options)).config

    def make() -> models.ConvNeXt:
        rngs = nnx.Rngs(params=settings.run.seed, dropout=settings.run.seed)
        if of_pixels:
            return models.Segmenter(config, wanted.decoder, rngs=rngs)
        return models.ConvNeXt(config, rngs=rngs)

    model: models.ConvNeXt = nnx.jit(make)()
    if model.config.total_stride > settings.data.size:
        raise ValueError(
            f"data.size is {settings.data.size}, less than the {model.config.total_stride} pixels "
            "that the network takes for one of its last map"
        )
    if begun is not None:
        _begin_from(model, begun)
    return model


def _begin_from(model: models.ConvNeXt, begun: models.ConvNeXt) -> None:
    """Puts the parameters of another network in, its last layer if that has as many classes.

    What tells pixels apart begins with its first parameters where the other network has none.
    """
    fresh, found = (checkpoints.variables_of(one)["params"] for one in (model, begun))
    last = "decoder" if isinstance(model, models.Segmenter) else "head"
    if last == "decoder":
        found = {name: found.get(name, params) for name, params in fresh.items()}
    if begun.config.num_classes != model.config.num_classes:
        outer, inner = dict(found.get(last, {})), fresh.get(last, {})
        outer.pop("fc", None)
        if "fc" in inner:
            outer["fc"] = inner["fc"]
        found = {**found, last: outer}
    checkpoints.load_into(model, {"params": found})


def train(
    settings: Settings,
    out: Path,
    *,
    resume: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_message: Callable[[str], None] = lambda message: None,
) -> Json:
    """Trains a network on images, and writes it with all about it into a folder.

    Args:
        settings: What is asked for; see `settings.resolved`.
        out: The folder of the run, made if need be.
        resume: Whether to go on from the folder's last checkpoint, if it has one.
        on_progress: Called after every step.
        on_message: Called with what a person should know: an image that cannot be read.

    Of several processes the first writes. They leave no `network` in the folder, since what writes
    one is to be alone; checkpoints are read the same.

    Returns:
        The summary, which `summary.json` holds; "stopped" in it says whether SIGTERM came first.

    Raises:
        FileExistsError: If the folder holds a run and `resume` is False.
        FileNotFoundError: If images or the checkpoint to begin from are missing.
        NotADirectoryError: If there is a file in the place of the folder.
        OSError: If the folder cannot be written to; the last whole checkpoint stands.
        ValueError: If what is asked for does not fit, before the training; or if too many images
            are broken or the loss is no longer a number, during it.
    """
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file, expected the folder of a run")
    begun = (out / saving.FOLDER).is_dir()
    if begun and not resume:
        raise FileExistsError(f"{out} holds a run; resume it, or name another folder")
    if begun:
        _check_same(settings, out)
    run = prepared(settings)
    if jax.process_count() > 1:
        # All have looked before the first of them makes the folder.
        multihost_utils.sync_global_devices("begun")
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        saver = held.enter_context(saving.saving(out, settings.run.keep))
        if jax.process_index() == 0:
            _write_text(out / "settings.toml", settings_of.as_toml(settings))
            _write_text(out / evaluation.IMAGES, evaluation.described(settings, run.train.classes))
            config = pretrained.description(run.model)
            saving.write_network(out, config, run.model.config.wavelet)
        steps_of_run = _Steps(run, out, saver, on_progress, on_message)
        held.enter_context(steps_of_run.prepared())
        asked_to_stop = held.enter_context(_stopping())
        stopped = steps_of_run.run(asked_to_stop)
        saver.wait()
        summary = steps_of_run.summary(stopped)
        best = saver.best
    alone = jax.process_count() == 1
    if alone and not stopped:
        _write_best(run, out, best)
        # Not where something waits for the process to end.
        summary["loader_images_per_s"] = round(_loader_speed(run), 1)
    if jax.process_index() == 0:
        reports.draw_curves(out)
        reports.write_summary(out, summary)
    if not alone:
        # The first to end would wait for the others no longer than JAX lets it.
        multihost_utils.sync_global_devices("written")
    return summary


class _Sent(NamedTuple):
    """A step that was sent to the devices.

    Attributes:
        metrics: Its figures, once it is done.
        rate: Its learning rate, of a step that is told of. Made before the step: devices do what
            they are sent in turn.
        indices: Its images.
        ended: The time when it was done.
    """

    metrics: loop.Metrics
    rate: jax.Array | None
    indices: np.ndarray
    ended: Future[float]


class _Steps:
    """The steps of a training, one after the other.

    The host is one step ahead of the devices: it sends a step before it looks at the figures of
    the one before. Batches are sent by a thread of their own, before their steps.
    """

    def __init__(
        self,
        run: Run,
        out: Path,
        saver: saving.Saver,
        on_progress: Callable[[Progress], None],
        on_message: Callable[[str], None],
    ) -> None:
        self.run_, self.out, self.saver = run, out, saver
        self.on_progress, self.on_message = on_progress, on_message
        self.settings = run.settings
        self.share = loading.Share(jax.process_index(), jax.process_count())
        self.program = steps.program(
            run.model,
            run.settings,
            run.mesh,
            optimizer=run.optimizer,
            classes=len(run.train.classes),
        )
        self.rate = jax.jit(run.rate)
        self.evaluate = steps.evaluator(run.model, run.settings.data, run.mesh)
        self.first = self.done = 0
        self.broken = 0
        self.losses: list[float] = []
        self.scores: dict[str, float] = {}
        self.named: set[str] = set()
        self.started = time.perf_counter()
        self.clock = _Clock()
        self.pending: _Sent | None = None

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Makes or restores the state; the iterator and the files of figures live in the block."""
        last = self.saver.last
        same_readers = True
        if last is None:
            self.leaves = self.program.start()
        else:
            like = jax.eval_shape(lambda: self.program.state(self.program.start()))
            # Held by no name, or it would live as long as the block.
            self.leaves = self.program.leaves(
                self.saver.restore(last, like, self.program.shardings)
            )
            progress = self.saver.progress(last)
            self.done = progress["step"]
            self.broken, self.losses = progress["broken"], progress["losses"]
            self.scores = progress["scores"]
            # grain's place is that of each of its readers. Others begin at the step's batch.
            same_readers = progress["readers"] == self._readers()
            self.first = progress["first"] if same_readers else self.done
        dataset = loading.training(
            self.run_.train,
            self.settings.data,
            batch=self.settings.run.batch,
            seed=self.settings.run.seed,
            steps=range(self.first, self.run_.steps),
            share=self.share,
        )
        sent = loading.ahead(dataset, partial(_batch_on_devices, self.program.rows))
        with loading.iterating(sent) as self.batches, ExitStack() as held:
            self.watcher = held.enter_context(ThreadPoolExecutor(1))
            if last is not None and same_readers:
                self.saver.restore_place(last, self.batches)
            else:
                loading.begin(self.batches)
            self.reporter = None
            if self.share.process == 0:
                of_pixels = isinstance(self.run_.train, sources.Masks)
                self.reporter = held.enter_context(
                    reports.reporting(self.out, self.done, of_pixels=of_pixels)
                )
            yield

    def run(self, asked_to_stop: Callable[[int], bool]) -> bool:
        """Does the steps that are left; returns whether it was stopped before."""
        limit = self.settings.run.max_steps or self.run_.steps
        end = min(self.run_.steps, limit)
        self.clock.start()
        while self.done < end:
            self._step()
            ends_epoch = self._ends_epoch(self.done)
            every = self.settings.run.save_every
            halted = asked_to_stop(self.done)
            if ends_epoch or self.done == end:
                self._settle()
                scores = self._evaluate()
                self._save(scores)
            elif halted or (every and self.done % every == 0):
                self._settle()
                self._save(None)
            if halted and self.done < end:
                return True
        return False

    def summary(self, stopped: bool) -> Json:
        """The state of the run, as `summary.json` holds it."""
        params = jax.tree.leaves(nnx.state(self.run_.model, nnx.Param))
        seconds = time.perf_counter() - self.started
        return {
            "steps": self.done,
            "of_steps": self.run_.steps,
            "epochs": round(self.done / self.run_.epoch_steps, 3),
            "stopped": stopped,
            "images": len(self.run_.train),
            "held_out": len(self.run_.val),
            "classes": len(self.run_.train.classes),
            "parameters": sum(leaf.size for leaf in params),
            "scores": self.scores,
            "best_step": self.saver.best,
            "broken_rows": self.broken,
            "seconds": round(seconds, 1),
            "images_per_s": round(self.clock.rate(), 1),
            "waiting": round(self.clock.waiting(), 4),
            "peak_memory": reports.peak_memory(),
            "mesh": dict(self.run_.mesh.shape),
            "device": environment.device(),
            "versions": environment.versions(),
        }

    def _step(self) -> None:
        """Sends one step to the devices, and looks at the figures of the one before."""
        batch, read = next(self.batches)
        before = self.pending
        if before is not None:
            self.clock.sending(before.ended)
        told = (self.done + 1) % self.settings.run.log_every == 0
        rate = self.rate(self.done) if told else None
        self.leaves, metrics = self.program.train(self.leaves, batch)
        ended = self.watcher.submit(_end_of, metrics.loss)
        self.pending = _Sent(metrics, rate, read["index"], ended)
        self._name_broken(self.run_.train, read)
        self.done += 1
        if before is not None:
            self._look(self.done - 1, before)

    def _settle(self) -> None:
        """Looks at the figures of the last step."""
        if self.pending is not None:
            before, self.pending = self.pending, None
            self._look(self.done, before)

    def _look(self, step: int, sent: _Sent) -> None:
        loss, norm, images = (float(one) for one in jax.device_get(sent.metrics))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._fail_of_numbers(step, loss, norm, sent.indices)
        batch = self.settings.run.batch
        self.broken += batch - int(images)
        seen = max(step * batch, len(self.run_.train))
        if self.broken > self.settings.data.max_broken * seen:
            raise ValueError(
                f"step {step}: {self.broken} images could not be read, more than "
                f"data.max_broken, {self.settings.data.max_broken:.1%}, of {seen}"
            )
        self.clock.step(batch)
        self.losses.append(loss)
        epoch = step / self.run_.epoch_steps
        rate, waiting = self.clock.recent()
        if sent.rate is not None:
            if self.reporter is not None:
                row = {
                    "step": step,
                    "epoch": epoch,
                    "loss": math.fsum(self.losses) / len(self.losses),
                    "norm": norm,
                    "rate": float(sent.rate),
                    "images_per_s": round(rate, 1),
                    "waiting": round(waiting, 4),
                    "broken": self.broken,
                }
                self.reporter.add(reports.STEPS, row)
            self.losses.clear()
        self.on_progress(Progress(step, self.run_.steps, epoch, loss, rate, waiting, self.scores))

    def _fail_of_numbers(self, step: int, loss: float, norm: float, indices: np.ndarray) -> None:
        names = [self.run_.train.name(int(index)) for index in indices]
        listed = self.out / f"batch_of_step_{step}.txt"
        with suppress(OSError):
            _write_text(listed, "\n".join(names) + "\n")
        good = self.saver.last
        kept = (
            f"checkpoint {good} is the last good one" if good is not None else "no checkpoint yet"
        )
        raise ValueError(
            f"step {step}: the loss is {loss} and the norm of its gradients {norm}; {kept}. Its "
            f"images are listed in {listed}, the first is {names[0]}. A smaller optimizer.rate, or "
            "optimizer.clip = 1.0, may help"
        )

    def _name_broken(self, source: sources.Source, arrays: loading.Arrays) -> None:
        """Tells of each image that could not be read, once."""
        rows = ~arrays["read"] & (arrays["index"] < len(source))
        for index in arrays["index"][rows].tolist():
            name = source.name(index)
            if name not in self.named:
                self.named.add(name)
                self.on_message(f"left out, {loading.reason(source, self.settings.data, index)}")

    def _ends_epoch(self, step: int) -> bool:
        return int(step / self.run_.epoch_steps) > int((step - 1) / self.run_.epoch_steps)

    def _evaluate(self) -> dict[str, float]:
        """The scores of the parameters and of their averages on all held-out images."""
        row: dict[str, float] = {"step": self.done, "epoch": self.done / self.run_.epoch_steps}
        params, ema = self.program.weights(self.leaves)
        row |= self._scores(params)
        if ema is not None:
            averaged = self._scores(ema)
            row |= {f"ema_{name}": value for name, value in averaged.items()}
        if self.reporter is not None:
            self.reporter.add(reports.EPOCHS, row)
        self.scores = {name: row[name] for name in row if name not in ("step", "epoch")}
        self.clock.start()
        return self.scores

    def _scores(self, params: nnx.State) -> dict[str, float]:
        def name_broken(arrays: loading.Arrays, said: jax.Array) -> None:
            self._name_broken(self.run_.val, arrays)

        return evaluation.scores(
            self.evaluate,
            params,
            self.run_.val,
            self.settings.data,
            batch=self.settings.run.batch,
            rows=self.program.rows,
            on_batch=name_broken,
        )

    def _save(self, scores: dict[str, float] | None) -> None:
        progress = {
            "step": self.done,
            "first": self.first,
            "readers": self._readers(),
            "broken": self.broken,
            "losses": self.losses,
            "scores": self.scores,
        }
        score = None if scores is None else evaluation.leading(scores)
        self.saver.save(self.program.state(self.leaves), self.batches, progress, score)

    def _readers(self) -> list[int]:
        return [self.settings.data.workers, self.share.processes]


def _batch_on_devices(
    rows: jax.sharding.NamedSharding, arrays: loading.Arrays
) -> tuple[steps.Batch, loading.Arrays]:
    """A batch on the devices, and what the host keeps of it."""
    return steps.on_devices(arrays, rows), {name: arrays[name] for name in ("index", "read")}


def _end_of(figure: jax.Array) -> float:
    """The time when devices have computed a figure."""
    figure.block_until_ready()
    return time.perf_counter()


class _Clock:
    """Images a second, and how long devices had nothing to do."""

    def __init__(self) -> None:
        self.seconds = self.idle = 0.0
        self.images = 0
        self.compiled = False
        # Seconds, idle ones and images some seconds ago, and some seconds before that.
        self.last = self.before = (0.0, 0.0, 0)
        self.start()

    def start(self) -> None:
        """Begins to count; what went on before, an evaluation perhaps, is left out."""
        self.then = time.perf_counter()

    def sending(self, before: Future[float]) -> None:
        """Counts the time since the step before was done, if it was when the next could be sent.

        A GPU begins while the rest is being sent to it.
        """
        if self.compiled and before.done():
            self.idle += time.perf_counter() - before.result()

    def step(self, images: int) -> None:
        """Counts a step that is done."""
        now = time.perf_counter()
        if self.compiled:
            self.seconds += now - self.then
            self.images += images
        self.then, self.compiled = now, True

    def recent(self) -> tuple[float, float]:
        """Images a second and the share of waiting, over the last seconds."""
        if self.seconds - self.last[0] > _RECENT_SECONDS:
            self.before, self.last = self.last, (self.seconds, self.idle, self.images)
        seconds, idle, images = self.before
        passed = max(self.seconds - seconds, 1e-9)
        return (self.images - images) / passed, min(1.0, (self.idle - idle) / passed)

    def rate(self) -> float:
        """Images a second, over all."""
        return self.images / max(self.seconds, 1e-9)

    def waiting(self) -> float:
        """The share of the time in which devices had nothing to do."""
        return min(1.0, self.idle / max(self.seconds, 1e-9))


@contextmanager
def _stopping() -> Iterator[Callable[[int], bool]]:
    """Yields what says after a step whether SIGTERM came, alike in all processes."""
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()

    # Signals reach the main thread alone; elsewhere who calls decides.
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, ask) if main else None
    try:
        yield lambda step: asked.is_set()
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


# What may differ in a run that goes on: where it is computed and what it tells.
_FREE = ("run.mesh", "run.keep", "run.log_every", "run.max_steps", "run.save_every") + (
    "data.folder",
    "data.workers",
    "data.max_broken",
)


def _check_same(settings: Settings, out: Path) -> None:
    """Raises ValueError where a run was begun with settings under which it would end otherwise."""
    path = out / "settings.toml"
    try:
        kept = settings_of.resolved(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} does not tell how the run was begun: {error}") from error
    differ = []
    for section in dataclasses.fields(settings)[1:]:
        old, new = getattr(kept, section.name), getattr(settings, section.name)
        differ += [
            f"{section.name}.{field.name} is {getattr(new, field.name)}, was "
            f"{getattr(old, field.name)}"
            for field in dataclasses.fields(new)
            if f"{section.name}.{field.name}" not in _FREE
            and getattr(old, field.name) != getattr(new, field.name)
        ]
    if differ:
        raise ValueError(f"{out} was begun with other settings: {'; '.join(differ)}")


def _write_best(run: Run, out: Path, best: int | None) -> None:
    """Writes the network of the best checkpoint, with what its images are."""
    step = out / saving.FOLDER / str(best)
    model = pretrained.load_network(step)
    with replacing(out / "network", force=True) as temporary:
        pretrained.save_network(temporary, model)
        text = evaluation.described(run.settings, run.train.classes)
        (temporary / evaluation.IMAGES).write_text(text)
    if isinstance(run.val, sources.Masks):
        _draw_masks(run.val, model, run.settings, out)


def _draw_masks(val: sources.Masks, model: models.ConvNeXt, settings: Settings, out: Path) -> None:
    """Draws the masks of the first held-out images that can be read, beside the truth."""
    from flash_wtconv_jax import plots

    data = dataclasses.replace(settings.data, workers=0)
    with loading.iterating(loading.evaluation(val, data, batch=_DRAWN)) as batches:
        arrays = next(batches)
    crops, extents, truths = (arrays[name][arrays["read"]] for name in ("image", "extent", "label"))
    if not len(crops):
        return
    images = scaled(crops, extents, data.size)
    logits = nnx.jit(type(model).__call__)(model, normalised(images, data), deterministic=True)
    said = np.asarray(logits).argmax(-1)
    picture = plots.png(plots.masks(np.asarray(images, np.uint8), truths, said, val.classes))
    with replacing(out / "predictions.png", force=True) as temporary:
        temporary.write_bytes(picture)


def _loader_speed(run: Run) -> float:
    """Images a second that the loader would bring if nothing were learnt."""
    asked = run.settings
    return loading.speed(
        run.train, asked.data, batch=asked.run.batch, batches=run.steps, seconds=_LOADER_SECONDS
    )


def _write_text(path: Path, text: str) -> None:
    with replacing(path, force=True) as temporary:
        temporary.write_text(text, encoding="utf-8")
