"""The training loop of the demo, and the predictions of the network that it trains."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike
from numpy.typing import NDArray

from flash_wtconv_jax import models
from flash_wtconv_jax.functional.weight_decay import weight_decay_mask
from flash_wtconv_jax.train.history import History
from pallas_kernels.common.arguments import checked_seed

_BATCH = 64
BACKGROUND = -1.0
"""The grey value around a digit."""


class Digits(NamedTuple):
    """Images `[N, 8, 8, 1]`, float32 in [-1, 1], and labels `[N]`, int32."""

    train_images: NDArray[np.float32]
    train_labels: NDArray[np.int32]
    test_images: NDArray[np.float32]
    test_labels: NDArray[np.int32]


_TrainState = tuple[nnx.State, optax.OptState]
_Logits = Callable[[nnx.State, jax.Array], jax.Array]


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
        digits: The images to train on and to evaluate with.
        epochs: Passes over the training images.
        seed: Seed of the order and the shifts of the images.
        on_epoch: Called with the history so far after each epoch.

    Returns:
        Mean training loss and held-out accuracy of each epoch.

    Raises:
        ValueError: If `epochs` is below 1, or the seed has more than 64 bits.
    """
    first_key = jax.random.key(checked_seed(seed))
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
        state, loss = run_epoch(state, jax.random.fold_in(first_key, epoch))
        predicted = np.asarray(evaluate(state[0]))
        history.loss.append(float(loss))
        history.accuracy.append(float((predicted == digits.test_labels).mean()))
        if on_epoch is not None:
            on_epoch(history)
    nnx.update(model, state[0])
    return history


def predict(model: models.ConvNeXt, images: ArrayLike) -> NDArray[np.float32]:
    """The class probabilities of images.

    Args:
        model: Maps images to logits.
        images: `[N, H, W, 1]`, scaled as `load_digits` scales them.

    Returns:
        Probabilities `[N, 10]`.

    Example:
        >>> from flash_wtconv_jax.train.digits import digits_network
        >>> predict(digits_network(), np.zeros((1, 8, 8, 1), np.float32)).sum(axis=1).round(3)
        array([1.], dtype=float32)
    """
    logits = nnx.jit(type(model).__call__)(model, jnp.asarray(images))
    return np.asarray(jax.nn.softmax(cast(jax.Array, logits)))


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
        images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=jnp.asarray(BACKGROUND)
    )
    return jax.vmap(
        lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:])
    )(padded, corners)
