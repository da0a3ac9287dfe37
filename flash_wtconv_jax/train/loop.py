"""A step of a training as a pure function, and the training of digits that lie in memory.

The trainer of image files takes the same step: see `images.steps`.
"""

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
from pallas_kernels.common.types import Tree

_BATCH = 64
_RATE = 8e-3
BACKGROUND = -1.0
"""The grey value around a digit."""


class Digits(NamedTuple):
    """Images `[N, 8, 8, 1]`, float32 in [-1, 1], and labels `[N]`, int32."""

    train_images: NDArray[np.float32]
    train_labels: NDArray[np.int32]
    test_images: NDArray[np.float32]
    test_labels: NDArray[np.int32]


class State(NamedTuple):
    """All that a step changes.

    Attributes:
        step: Steps done.
        params: The parameters.
        ema: Their averages; None where there are none.
        memory: The optimizer's.
    """

    step: jax.Array
    params: nnx.State
    ema: nnx.State | None
    memory: optax.OptState


class Sums(NamedTuple):
    """A loss over a part of a batch.

    Attributes:
        loss: The sum of its terms.
        terms: Their number.
        images: Images that could be read.
    """

    loss: jax.Array
    terms: jax.Array
    images: jax.Array


class Metrics(NamedTuple):
    """The figures of a step.

    Attributes:
        loss: Mean over the terms of the batch.
        norm: Norm of the gradients before they are clipped.
        images: Images that could be read.
    """

    loss: jax.Array
    norm: jax.Array
    images: jax.Array


Loss = Callable[[nnx.State, Tree, jax.Array], Sums]
"""The loss of parameters on a part of a batch, with a key of its own."""


def begun(
    optimizer: optax.GradientTransformation, params: nnx.State, *, averaging: bool = False
) -> State:
    """The state before the first step.

    Args:
        optimizer: What changes the parameters.
        params: The first ones.
        averaging: Whether their averages are kept.
    """
    ema = jax.tree.map(jnp.copy, params) if averaging else None
    return State(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))


def step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    state: State,
    batch: Tree,
    key: jax.Array,
    *,
    parts: int = 1,
    ema: float = 0.0,
) -> tuple[State, Metrics]:
    """One step: the gradients of a batch, the optimizer, the averages.

    Args:
        loss: See `Loss`.
        optimizer: What changes the parameters.
        state: What was before.
        batch: Arrays with a row for each image, the same number in all.
        key: Of everything by chance in the step.
        parts: Parts that the batch is computed in, one after the other, to save memory.
        ema: Decay of the averages, if the state has some; see `averaged`.

    Returns:
        What is after it, and its figures.
    """
    keys = jax.random.split(key, parts)

    def differentiated(part: Tree, key: jax.Array) -> tuple[nnx.State, Sums]:
        def value(params: nnx.State) -> tuple[jax.Array, Sums]:
            found = loss(params, part, key)
            return found.loss, found

        (_, found), gradients = jax.value_and_grad(value, has_aux=True)(state.params)
        return gradients, found

    if parts == 1:
        gradients, found = differentiated(batch, keys[0])
    else:

        def add(
            sums: tuple[nnx.State, Sums], one: tuple[Tree, jax.Array]
        ) -> tuple[tuple[nnx.State, Sums], None]:
            return jax.tree.map(jnp.add, sums, differentiated(*one)), None

        # Every part takes rows of every device.
        split = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)
        none = jnp.zeros((), jnp.int32)
        sums = jax.tree.map(jnp.zeros_like, state.params), Sums(jnp.zeros(()), none, none)
        (gradients, found), _ = jax.lax.scan(add, sums, (split, keys))
    # Not before: in float16 the gradients of a mean over many terms would vanish.
    terms = jnp.maximum(found.terms, 1)
    gradients = jax.tree.map(lambda one: one / terms, gradients)
    with jax.named_scope("optimizer"):
        updates, memory = optimizer.update(gradients, state.memory, state.params)
        params = optax.apply_updates(state.params, updates)
    means = state.ema
    if means is not None:
        means = averaged(means, params, state.step, ema)
    metrics = Metrics(found.loss / terms, optax.tree.norm(gradients), found.images)
    return State(state.step + 1, params, means, memory), metrics


def averaged(ema: Tree, params: Tree, step: jax.Array, decay: float) -> Tree:
    """The averaged parameters after a step; the first steps, in which all is new, count less.

    Args:
        ema: The averages before it.
        params: The parameters after it.
        step: Steps done before it.
        decay: What stays of the averages in the long run.
    """
    kept = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(
        lambda mean, one: (kept * mean + (1 - kept) * one).astype(mean.dtype), ema, params
    )


def train(
    model: models.ConvNeXt,
    digits: Digits,
    *,
    epochs: int = 40,
    seed: int = 0,
    on_epoch: Callable[[History], None] | None = None,
) -> History:
    """Trains a model in place: AdamW, cosine schedule, images shifted by up to one pixel.

    An epoch is one compiled call, so that Python costs nothing beside the arithmetic; models of one
    architecture share it. The same seed on the same machine gives the same parameters.

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
    steps = epochs * (len(digits.train_images) // _BATCH)
    state = begun(demo_optimizer(_RATE, steps), params)
    history = History()
    for epoch in range(epochs):
        key = jax.random.fold_in(first_key, epoch)
        state, loss = _epoch(definition, steps, rest, digits, state, key)
        predicted = np.asarray(_read(definition, rest, state.params, digits.test_images))
        history.loss.append(float(loss))
        history.accuracy.append(float((predicted == digits.test_labels).mean()))
        if on_epoch is not None:
            on_epoch(history)
    nnx.update(model, state.params)
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


def demo_optimizer(rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW of the demos: an eighth of warm-up, then a cosine; gradients have norm 1 at most.

    Args:
        rate: The greatest learning rate.
        steps: Steps in all.
    """
    # A single step has none to warm up in.
    warmup = min(max(1, steps // 8), steps - 1)
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, warmup, steps)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, weight_decay=0.05, mask=weight_decay_mask),
    )


def _loss(
    logits: Callable[[nnx.State, jax.Array], jax.Array],
    params: nnx.State,
    part: tuple[jax.Array, jax.Array],
    key: jax.Array,
) -> Sums:
    images, labels = part
    # Smoothed labels keep the loss of easy digits from vanishing.
    targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), 0.1)
    losses = optax.softmax_cross_entropy(logits(params, _shift(images, key)), targets)
    count = jnp.asarray(len(labels), jnp.int32)
    return Sums(losses.sum(), count, count)


def _logits(
    definition: nnx.GraphDef[models.ConvNeXt],
    rest: list[nnx.State],
    params: nnx.State,
    images: jax.Array,
) -> jax.Array:
    return cast(jax.Array, nnx.merge(definition, params, *rest)(images))


@partial(jax.jit, static_argnums=0)
def _read(
    definition: nnx.GraphDef[models.ConvNeXt],
    rest: list[nnx.State],
    params: nnx.State,
    images: jax.Array,
) -> jax.Array:
    """The digits that images are read as."""
    return _logits(definition, rest, params, images).argmax(-1)


@partial(jax.jit, static_argnums=(0, 1))
def _epoch(
    definition: nnx.GraphDef[models.ConvNeXt],
    steps: int,
    rest: list[nnx.State],
    digits: Digits,
    state: State,
    key: jax.Array,
) -> tuple[State, jax.Array]:
    """One pass over the training images in random order, of `steps` in all; and the mean loss."""
    images, labels = digits.train_images, digits.train_labels
    loss = partial(_loss, partial(_logits, definition, rest))
    optimizer = demo_optimizer(_RATE, steps)
    order_key, shift_key = jax.random.split(key)
    batches = len(images) // _BATCH
    order = jax.random.permutation(order_key, len(images))[: batches * _BATCH]

    def one(state: State, batch: tuple[jax.Array, jax.Array]) -> tuple[State, jax.Array]:
        chosen, key = batch
        state, metrics = step(loss, optimizer, state, (images[chosen], labels[chosen]), key)
        return state, metrics.loss

    drawn = order.reshape(batches, _BATCH), jax.random.split(shift_key, batches)
    state, losses = jax.lax.scan(one, state, drawn)
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
