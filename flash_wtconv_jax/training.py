"""The demo: a small WTConv network learns scikit-learn's handwritten digits.

The network is `models.ConvNeXt` with one stage at the full 8 x 8 resolution. Its twin without
wavelet levels is trained alike, so that the receptive fields of two trained networks are compared.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike
from numpy.typing import NDArray

from . import environment, models, plots
from .checkpoints.files import replacing
from .models.network import save_network
from .parameters import weight_decay_mask
from .receptive_field import SHARES, contribution_side, network_field

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
"""What the demo writes."""

_SPLIT_SEED = 0
_BATCH = 64
_BACKGROUND = -1.0
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


class Digits(NamedTuple):
    """Images `[N, 8, 8, 1]`, float32 in [-1, 1], and labels `[N]`, int32."""

    train_images: NDArray[np.float32]
    train_labels: NDArray[np.int32]
    test_images: NDArray[np.float32]
    test_labels: NDArray[np.int32]


@dataclasses.dataclass
class History:
    """Mean training loss and held-out accuracy of each epoch."""

    loss: list[float] = dataclasses.field(default_factory=list)
    accuracy: list[float] = dataclasses.field(default_factory=list)


_TrainState = tuple[nnx.State, optax.OptState]
_Logits = Callable[[nnx.State, jax.Array], jax.Array]


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
    images = pixels.reshape(-1, 8, 8, 1).astype(np.float32) / 8 + _BACKGROUND
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

    Example:
        >>> digits_network(levels=0)(jnp.zeros((2, 8, 8, 1))).shape
        (2, 10)
    """
    return models.ConvNeXt(dataclasses.replace(_CONFIG, levels=(levels,)), rngs=nnx.Rngs(seed))


def train(
    model: models.ConvNeXt,
    digits: Digits,
    *,
    epochs: int = 40,
    seed: int = 0,
    on_epoch: Callable[[History], None] | None = None,
) -> History:
    """Trains a model in place: AdamW, cosine schedule, images shifted by up to one pixel.

    An epoch is one compiled call, so that Python costs nothing beside the arithmetic. The same
    seed on the same machine gives the same parameters.

    Args:
        model: Maps `[N, 8, 8, 1]` to logits `[N, 10]`.
        digits: What to train on and to evaluate with.
        epochs: Passes over the training images.
        seed: Seed of the order and the shifts of the images.
        on_epoch: Called with the history so far after each epoch.

    Returns:
        Mean training loss and held-out accuracy of each epoch.

    Raises:
        ValueError: If `epochs` is below 1.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    definition, params, *rest = nnx.split(model, nnx.Param, ...)
    optimizer = _optimizer(epochs, len(digits.train_images) // _BATCH)
    state: _TrainState = (params, optimizer.init(params))

    def logits(params: nnx.State, images: jax.Array) -> jax.Array:
        return cast(jax.Array, nnx.merge(definition, params, *rest)(images))

    run_epoch = jax.jit(partial(_epoch, logits, optimizer, digits))
    evaluate = jax.jit(lambda params: logits(params, jnp.asarray(digits.test_images)).argmax(-1))
    history = History()
    for epoch in range(epochs):
        state, loss = run_epoch(state, jax.random.fold_in(jax.random.key(seed), epoch))
        predicted = np.asarray(evaluate(state[0]))
        history.loss.append(float(loss))
        history.accuracy.append(float((predicted == digits.test_labels).mean()))
        if on_epoch is not None:
            on_epoch(history)
    nnx.update(model, state[0])
    return history


def predict(model: models.ConvNeXt, images: ArrayLike) -> NDArray[np.float32]:
    """Class probabilities.

    Args:
        model: Maps images to logits.
        images: `[N, H, W, 1]`, scaled as `load_digits` scales them.

    Returns:
        Probabilities `[N, 10]`.

    Example:
        >>> predict(digits_network(), np.zeros((1, 8, 8, 1), np.float32)).sum(axis=1).round(3)
        array([1.], dtype=float32)
    """
    logits = nnx.jit(type(model).__call__)(model, jnp.asarray(images))
    return np.asarray(jax.nn.softmax(cast(jax.Array, logits)))


def run_demo(
    out: Path,
    *,
    seed: int = 0,
    epochs: int = 40,
    on_epoch: Callable[[str, History], None] | None = None,
) -> dict[str, Any]:
    """Trains both networks and writes checkpoints, metrics and pictures into `out`.

    Everything is written beside its place and moved there at the end: an error or an interrupt
    leaves `out` as it was.

    Args:
        out: Folder, made if need be; other files in it stay.
        seed: Seed of the initial parameters and of the training.
        epochs: Passes over the training images.
        on_epoch: Called with the network's name and its history after each epoch.

    Returns:
        What `metrics.json` holds.

    Raises:
        ValueError: If `epochs` is below 1.
        OSError: If `out` cannot be written.
        ImportError: If scikit-learn or matplotlib is not installed.
    """
    started = time.perf_counter()
    digits = load_digits()
    made = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
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
    finally:
        # An error or an interrupt leaves no empty folder behind either.
        if made and not any(out.iterdir()):
            out.rmdir()
    return metrics


class _Run(NamedTuple):
    """One trained network and what was measured on it."""

    model: models.ConvNeXt
    history: History
    field: NDArray[np.float64]

    def summary(self) -> dict[str, Any]:
        """What `metrics.json` says about the network."""
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


def _write(out: Path, digits: Digits, runs: Mapping[str, _Run], metrics: Any) -> None:
    """Writes every file of the demo, then moves them all to their places."""
    wtconv, plain = runs.values()
    probabilities = predict(wtconv.model, digits.test_images)
    figures = {
        "training_curve.png": plots.training_curve({n: run.history for n, run in runs.items()}),
        "predictions.png": plots.predictions(digits.test_images, digits.test_labels, probabilities),
        "receptive_field.png": plots.receptive_fields({n: run.field for n, run in runs.items()}),
    }
    with ExitStack() as places:

        def place(name: str) -> Path:
            return places.enter_context(replacing(out / name, force=True))

        save_network(place("checkpoint"), wtconv.model)
        save_network(place("checkpoint_plain"), plain.model)
        for name, figure in figures.items():
            figure.savefig(place(name))
        place("metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")


def _optimizer(epochs: int, steps: int) -> optax.GradientTransformation:
    total = epochs * steps
    schedule = optax.warmup_cosine_decay_schedule(0.0, 8e-3, max(1, total // 8), total)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, weight_decay=0.05, mask=weight_decay_mask),
    )


def _epoch(
    logits: _Logits,
    optimizer: optax.GradientTransformation,
    digits: Digits,
    state: _TrainState,
    key: jax.Array,
) -> tuple[_TrainState, jax.Array]:
    """One pass over the training images in random order; also returns the mean loss."""
    images, labels = jnp.asarray(digits.train_images), jnp.asarray(digits.train_labels)
    order_key, shift_key = jax.random.split(key)
    steps = len(images) // _BATCH
    order = jax.random.permutation(order_key, len(images))[: steps * _BATCH]

    def step(
        state: _TrainState, batch: tuple[jax.Array, jax.Array]
    ) -> tuple[_TrainState, jax.Array]:
        params, memory = state
        chosen, key = batch
        shifted = _shift(images[chosen], key)
        # Smoothed labels keep the loss of easy digits from vanishing.
        targets = optax.smooth_labels(jax.nn.one_hot(labels[chosen], 10), 0.1)
        loss, gradients = jax.value_and_grad(
            lambda p: optax.softmax_cross_entropy(logits(p, shifted), targets).mean()
        )(params)
        updates, memory = optimizer.update(gradients, memory, params)
        return (optax.apply_updates(params, updates), memory), loss

    batches = (order.reshape(steps, _BATCH), jax.random.split(shift_key, steps))
    state, losses = jax.lax.scan(step, state, batches)
    return state, losses.mean()


def _shift(images: jax.Array, key: jax.Array) -> jax.Array:
    """Moves each image `[N, H, W, C]` by -1, 0 or 1 pixel along each axis."""
    corners = jax.random.randint(key, (len(images), 2), 0, 3)
    padded = jnp.pad(
        images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=jnp.asarray(_BACKGROUND)
    )
    return jax.vmap(
        lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])
    )(padded, corners)
