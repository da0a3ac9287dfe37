"""The demo: a small WTConv network learns scikit-learn's handwritten digits.

The network is `models.ConvNeXt` with one stage at the full 8 x 8 resolution. Its twin without
wavelet levels is trained alike, so that the receptive fields of two trained networks are compared.
"""

import dataclasses
import json
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from flash_wtconv_jax import environment, models, plots
from flash_wtconv_jax.models.pretrained import save_network
from flash_wtconv_jax.receptive_field import SHARES, contribution_side, network_field
from flash_wtconv_jax.train.history import History
from flash_wtconv_jax.train.loop import BACKGROUND, Digits, predict, train
from pallas_kernels.common.arguments import checked_seed
from pallas_kernels.common.files import making_folder, replacing
from pallas_kernels.common.types import Json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NETWORKS = {"WTConv": 2, "plain depthwise": 0}
"""Wavelet levels of the two networks of the demo."""

FILES = {
    "checkpoint": "the trained WTConv network",
    "checkpoint_plain": "its twin with plain depthwise convolutions",
    "metrics.json": "accuracy, curves, versions, device",
    "training_curve.png": "loss and error by epoch",
    "predictions.png": "what it reads in held-out digits, every mistake among them",
    "receptive_field.png": "what the centre of each network sees",
}
"""The files that the demo writes."""

_SPLIT_SEED = 0
_FIELD_SHAPE = (48, 48, 1)
_CONFIG = models.ConvNeXtConfig(
    depths=(3,),
    dims=(48,),
    levels=(2,),
    kernel_size=3,
    patch_size=1,
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


def digits_network(*, levels: int = 2, seed: int = 0) -> models.ConvNeXt:
    """The demo's network: three residual blocks of 48 channels with 3 x 3 kernels.

    Args:
        levels: Wavelet levels of each block; 0 is the same network with plain depthwise
            convolutions.
        seed: Seed of the initial parameters.

    Returns:
        A model from images `[N, H, W, 1]` to logits `[N, 10]`, of about 70 000 parameters.

    Raises:
        ValueError: If `levels` is none, or the seed has more than 64 bits.

    Example:
        >>> digits_network(levels=0)(np.zeros((2, 8, 8, 1), np.float32)).shape
        (2, 10)
    """
    rngs = nnx.Rngs(checked_seed(seed))
    return models.ConvNeXt(dataclasses.replace(_CONFIG, levels=(levels,)), rngs=rngs)


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    epochs: int = 40,
    on_epoch: Callable[[str, History], None] | None = None,
) -> Json:
    """Trains both networks and writes checkpoints, metrics and pictures into `out`.

    Everything is written beside its place and moved there at the end: an error or an interrupt
    leaves `out` as it was. A picture that cannot be drawn is left out, with a warning.

    Args:
        out: Folder, made if need be; other files in it stay.
        seed: Seed of the initial parameters and of the training.
        epochs: Passes over the training images.
        on_epoch: Called with the network's name and its history after each epoch.

    Returns:
        What `metrics.json` holds.

    Raises:
        ValueError: If `epochs` is below 1, or the seed has more than 64 bits.
        OSError: If `out` cannot be written.
        ImportError: If scikit-learn or matplotlib is not installed.
    """
    started = time.perf_counter()
    digits = load_digits()
    with making_folder(out):
        runs = {
            name: _run(name, levels, digits, seed, epochs, on_epoch)
            for name, levels in NETWORKS.items()
        }
        metrics = {
            "dataset": "scikit-learn digits, a stratified 20 % held out",
            "seed": seed,
            "epochs": epochs,
            "seconds": round(time.perf_counter() - started, 1),
            "device": environment.device(),
            "versions": environment.versions(),
            "networks": {name: run.summary() for name, run in runs.items()},
        }
        _write(out, digits, runs, metrics)
    return metrics


class _Run(NamedTuple):
    """One trained network and what was measured on it."""

    model: models.ConvNeXt
    history: History
    field: NDArray[np.float64]

    def summary(self) -> Json:
        """The network's entry in `metrics.json`."""
        parameters = jax.tree.leaves(nnx.state(self.model, nnx.Param))
        return {
            "accuracy": self.history.accuracy[-1],
            "parameters": sum(array.size for array in parameters),
            "receptive_field_sides": {
                f"{share:.0%}": contribution_side(self.field, share) for share in SHARES
            },
            "loss_by_epoch": self.history.loss,
            "accuracy_by_epoch": self.history.accuracy,
        }


def _run(
    name: str,
    levels: int,
    digits: Digits,
    seed: int,
    epochs: int,
    on_epoch: Callable[[str, History], None] | None,
) -> _Run:
    model = digits_network(levels=levels, seed=seed)
    report = None if on_epoch is None else partial(on_epoch, name)
    history = train(model, digits, epochs=epochs, seed=seed, on_epoch=report)
    return _Run(model, history, network_field(model, _FIELD_SHAPE))


def _write(out: Path, digits: Digits, runs: Mapping[str, _Run], metrics: Json) -> None:
    """Writes every file of the demo, then moves them all to their places."""
    wtconv, plain = runs.values()
    probabilities = predict(wtconv.model, digits.test_images)
    read = digits.test_images, digits.test_labels, probabilities
    histories = {name: run.history for name, run in runs.items()}
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
