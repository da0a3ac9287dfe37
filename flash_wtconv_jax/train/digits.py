"""The demo: reading a digit needs a mark that lies far from it, beyond what small kernels see.

An image is a strip with one of scikit-learn's handwritten digits at its left end. A mark at its
right end says that the nines' complement is to be read: a 3 with the mark is a 6. The network is
`models.ConvNeXt` with one stage of two blocks. No place of its twin without wavelet levels sees
both the digit and the mark, so that the twin is left to guess between two classes.
"""

import dataclasses
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from flash_wtconv_jax import environment, models, plots
from flash_wtconv_jax.models.pretrained import save_network
from flash_wtconv_jax.receptive_field import (
    SHARES,
    contribution_side,
    network_field,
    reaches_border,
)
from flash_wtconv_jax.train.history import History
from flash_wtconv_jax.train.loop import BACKGROUND, Digits, predict, train
from pallas_kernels.common.arguments import checked_seed
from pallas_kernels.common.files import making_folder, replacing
from pallas_kernels.common.types import Json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NETWORKS = {"WTConv": 2, "plain depthwise": 0}
"""Wavelet levels of the two networks of the demo."""

SEEDS = 3
"""Trainings of each network, from as many seeds."""

EPOCHS = 24

FILES = {
    "checkpoint": "a trained WTConv network",
    "checkpoint_plain": "its twin with plain depthwise convolutions",
    "metrics.json": "accuracy of every seed, curves, costs, versions, device",
    "training_curve.png": "loss and error by epoch, of every seed",
    "predictions.png": "what it reads in held-out strips, every mistake among them",
    "receptive_field.png": "what the centre of each network sees",
}
"""The files that the demo writes."""

_SPLIT_SEED = 0
_FIELD_SHAPE = (64, 64, 1)
_WIDTH = 20
_MARK = slice(_WIDTH - 3, _WIDTH)
"""Columns of the mark."""
# The published standard deviation of initial kernels, 0.02, suits hundreds of channels. Of 24 it
# makes residual branches that hardly differ from zero, and many epochs pass before any learns.
_KERNEL_GAIN = 8.0
_CONFIG = models.ConvNeXtConfig(
    depths=(2,),
    dims=(24,),
    levels=(2,),
    kernel_size=3,
    patch_size=2,
    in_channels=1,
    num_classes=10,
    layer_scale=None,
)


def load_digits() -> Digits:
    """Scikit-learn's 1797 handwritten digits; a stratified fifth, always the same, is held out.

    Returns:
        The two parts. The dataset ships with scikit-learn: nothing is downloaded.

    Raises:
        ImportError: If scikit-learn is not installed.

    Example:
        >>> load_digits().test_images.shape
        (360, 8, 8, 1)
    """
    from sklearn import datasets, model_selection

    pixels, labels = datasets.load_digits(return_X_y=True)
    images = pixels.reshape(-1, 8, 8, 1).astype(np.float32) / 8 + BACKGROUND
    train_images, test_images, train_labels, test_labels = model_selection.train_test_split(
        images, labels.astype(np.int32), test_size=0.2, stratify=labels, random_state=_SPLIT_SEED
    )
    return Digits(train_images, train_labels, test_images, test_labels)


def load_strips() -> Digits:
    """Every digit at the left end of a strip, without a mark at the right end and with it.

    Returns:
        The two parts, of twice the images of `load_digits`, `[N, 8, 20, 1]`. The label of a strip
        without the mark is the digit, with it nine less the digit.

    Raises:
        ImportError: If scikit-learn is not installed.

    Example:
        >>> strips = load_strips()
        >>> strips.test_images.shape, int(strips.test_labels[0] + strips.test_labels[360])
        ((720, 8, 20, 1), 9)
    """
    digits = load_digits()
    return Digits(
        *_strips(digits.train_images, digits.train_labels),
        *_strips(digits.test_images, digits.test_labels),
    )


def _strips(
    images: NDArray[np.float32], labels: NDArray[np.int32]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    blank = ((0, 0), (0, 0), (0, _WIDTH - images.shape[2]), (0, 0))
    plain = np.pad(images, blank, constant_values=BACKGROUND)
    marked = plain.copy()
    marked[:, :, _MARK] = 1
    return np.concatenate([plain, marked]), np.concatenate([labels, 9 - labels])


def digits_network(*, levels: int = 2, seed: int = 0) -> models.ConvNeXt:
    """The demo's network: patches of 2 x 2, two residual blocks of 24 channels, 3 x 3 kernels.

    Args:
        levels: Wavelet levels of each block; 0 is the same network with plain depthwise
            convolutions.
        seed: Seed of the initial parameters.

    Returns:
        A model from images `[N, H, W, 1]` to logits `[N, 10]`, of about 14 000 parameters.

    Raises:
        ValueError: If `levels` is none, or the seed has more than 64 bits.

    Example:
        >>> digits_network(levels=0)(np.zeros((2, 8, 20, 1), np.float32)).shape
        (2, 10)
    """
    rngs = nnx.Rngs(checked_seed(seed))
    model = models.ConvNeXt(dataclasses.replace(_CONFIG, levels=(levels,)), rngs=rngs)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if "kernel" in str(path[-1]):
            variable[...] *= _KERNEL_GAIN
    return model


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    epochs: int = EPOCHS,
    on_epoch: Callable[[str, Sequence[History]], None] | None = None,
) -> Json:
    """Trains both networks from three seeds; writes checkpoints, metrics and pictures into `out`.

    Everything is written beside its place and moved there at the end: an error or an interrupt
    leaves `out` as it was. A picture that cannot be drawn is left out, with a warning.

    Args:
        out: Folder, made if need be; other files in it stay.
        seed: The first seed of the initial parameters and of the training; the others follow it.
            Checkpoints and pictures are those of the first.
        epochs: Passes over the training images.
        on_epoch: Called with the network's name and its histories, the last of which goes on, after
            each epoch.

    Returns:
        What `metrics.json` holds.

    Raises:
        ValueError: If `epochs` is below 1, or a seed has more than 64 bits.
        OSError: If `out` cannot be written.
        ImportError: If scikit-learn or matplotlib is not installed.
    """
    started = time.perf_counter()
    checked_seed(seed + SEEDS - 1)
    strips = load_strips()
    with making_folder(out):
        runs = {
            name: _run(name, levels, strips, seed, epochs, on_epoch)
            for name, levels in NETWORKS.items()
        }
        metrics = {
            "dataset": "scikit-learn digits in strips, a stratified 20 % of the digits held out",
            "seeds": list(range(seed, seed + SEEDS)),
            "epochs": epochs,
            "seconds": round(time.perf_counter() - started, 1),
            "device": environment.device(),
            "versions": environment.versions(),
            "networks": {name: run.summary() for name, run in runs.items()},
        }
        _write(out, strips, runs, metrics)
    return metrics


class _Run(NamedTuple):
    """The trainings of one network, the model of the first, and what was measured on it."""

    model: models.ConvNeXt
    histories: list[History]
    seconds: list[float]
    field: NDArray[np.float64]

    def summary(self) -> Json:
        """The network's entry in `metrics.json`."""
        parameters = jax.tree.leaves(nnx.state(self.model, nnx.Param))
        accuracies = [history.accuracy[-1] for history in self.histories]
        return {
            "accuracy": sum(accuracies) / len(accuracies),
            "least_accuracy": min(accuracies),
            "greatest_accuracy": max(accuracies),
            "parameters": sum(array.size for array in parameters),
            "seconds": round(sum(self.seconds) / len(self.seconds), 1),
            "receptive_field_sides": {
                f"{share:.0%}": contribution_side(self.field, share) for share in SHARES
            },
            "field_reaches_border": reaches_border(self.field),
            "loss_by_epoch": [history.loss for history in self.histories],
            "accuracy_by_epoch": [history.accuracy for history in self.histories],
        }


def _run(
    name: str,
    levels: int,
    strips: Digits,
    seed: int,
    epochs: int,
    on_epoch: Callable[[str, Sequence[History]], None] | None,
) -> _Run:
    networks, histories, seconds = [], list[History](), []
    for one in range(seed, seed + SEEDS):
        started = time.perf_counter()
        networks.append(digits_network(levels=levels, seed=one))

        def report(history: History) -> None:
            if on_epoch is not None:
                on_epoch(name, [*histories, history])

        histories.append(train(networks[-1], strips, epochs=epochs, seed=one, on_epoch=report))
        seconds.append(time.perf_counter() - started)
    return _Run(networks[0], histories, seconds, network_field(networks[0], _FIELD_SHAPE))


def _write(out: Path, strips: Digits, runs: Mapping[str, _Run], metrics: Json) -> None:
    """Writes every file of the demo, then moves them all to their places."""
    wtconv, plain = runs.values()
    probabilities = predict(wtconv.model, strips.test_images)
    read = strips.test_images, strips.test_labels, probabilities
    histories = {name: run.histories for name, run in runs.items()}
    fields = {name: run.field for name, run in runs.items()}
    pictures = {
        "training_curve.png": _drawn(lambda: plots.training_curve(histories)),
        "predictions.png": _drawn(lambda: plots.predictions(*read)),
        "receptive_field.png": _drawn(lambda: plots.receptive_fields(fields)),
    }
    with ExitStack() as places:

        def place(name: str) -> Path:
            return places.enter_context(replacing(out / name, force=True))

        save_network(place("checkpoint"), wtconv.model)
        save_network(place("checkpoint_plain"), plain.model)
        for name, picture in pictures.items():
            if picture is not None:
                place(name).write_bytes(picture)
        place("metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    for name, picture in pictures.items():
        if picture is None:
            # One of an earlier run would show other networks.
            (out / name).unlink(missing_ok=True)


def _drawn(draw: Callable[[], "Figure"]) -> bytes | None:
    """A picture; None after a warning where it cannot be drawn, which loses no training."""
    try:
        return plots.png(draw())
    except Exception as error:  # Matplotlib fails in its own ways.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(f"a picture could not be drawn: {reason}", RuntimeWarning, stacklevel=2)
        return None
