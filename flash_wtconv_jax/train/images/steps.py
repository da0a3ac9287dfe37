"""One step of a training, and one of an evaluation, as pure functions of a state.

A mesh splits the batch over `data` and `fsdp`, the parameters over `fsdp`, and channels over
`model`; XLA adds what the devices have to tell each other.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flash_wtconv_jax.train.images import optimizers
from flash_wtconv_jax.train.images.augment import augmented, normalised
from flash_wtconv_jax.train.images.settings import AXES, Data, Settings

# Smaller arrays are kept whole: to gather them costs more than they take.
_LEAST_SPLIT = 4096

Batch = dict[str, jax.Array]
"""`image` `[N, H, W, C]` of uint8 and `label` `[N]`, below 0 where there is no image."""


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


class Metrics(NamedTuple):
    """The figures of a step.

    Attributes:
        loss: Mean over the images of the batch.
        norm: Norm of the gradients before they are cut.
        images: Images that could be read.
    """

    loss: jax.Array
    norm: jax.Array
    images: jax.Array


class Scores(NamedTuple):
    """Sums over the images of a batch.

    Attributes:
        loss: Of the cross entropies.
        top1: Of those whose class has the highest score.
        top5: Of those whose class is among the five highest.
        images: Their number.
    """

    loss: jax.Array
    top1: jax.Array
    top5: jax.Array
    images: jax.Array


def mesh_of(axes: dict[str, int], batch: int, accumulate: int = 1) -> Mesh:
    """The mesh of the settings over all devices.

    Args:
        axes: Devices along each axis; empty: all along "data".
        batch: Images of a step, which the axes "data" and "fsdp" split.
        accumulate: Parts that the batch is computed in.

    Raises:
        ValueError: If the axes do not take all devices, or do not divide the batch.
    """
    devices = jax.devices()
    sizes = [axes.get(axis, 1) for axis in AXES] if axes else [len(devices), 1, 1]
    if math.prod(sizes) != len(devices):
        said = ",".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ValueError(
            f"run.mesh {said} takes {math.prod(sizes)} devices, and there are {len(devices)}"
        )
    rows = sizes[0] * sizes[1] * accumulate
    if batch % rows:
        raise ValueError(
            f"run.batch is {batch}, which {sizes[0] * sizes[1]} devices along data and fsdp and "
            f"{accumulate} parts do not divide; {max(1, batch // rows) * rows} they would"
        )
    processes = jax.process_count()
    if (sizes[0] * sizes[1]) % processes:
        raise ValueError(
            f"run.mesh has {sizes[0] * sizes[1]} devices along data and fsdp, expected a multiple "
            f"of the {processes} processes, each of which reads rows of its own"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def split_rows(mesh: Mesh) -> NamedSharding:
    """The sharding of the rows of a batch."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def placed(state: State, mesh: Mesh) -> State:
    """The shardings of the arrays of a state, of which shapes are enough."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _split(leaf.shape, mesh)), state)


def _split(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Channels, the last axis, over `model`, and over `fsdp` the longest of the others."""
    axes: list[str | None] = [None] * len(shape)
    if math.prod(shape) >= _LEAST_SPLIT:
        if mesh.shape["model"] > 1 and shape[-1] % mesh.shape["model"] == 0:
            axes[-1] = "model"
        if mesh.shape["fsdp"] > 1:
            free = [
                axis
                for axis, extent in enumerate(shape)
                if axes[axis] is None and extent % mesh.shape["fsdp"] == 0
            ]
            if free:
                axes[max(free, key=lambda axis: shape[axis])] = "fsdp"
    return PartitionSpec(*axes)


class Program(NamedTuple):
    """The compiled functions of a training.

    Attributes:
        start: Makes the first state.
        train: The state and the metrics after a batch.
        shardings: Where the arrays of a state lie.
        rows: Where the rows of a batch lie.
    """

    start: Callable[[], State]
    train: Callable[[State, Batch], tuple[State, Metrics]]
    shardings: State
    rows: NamedSharding


def program(
    model: nnx.Module,
    settings: Settings,
    mesh: Mesh,
    *,
    optimizer: optax.GradientTransformation,
    classes: int,
) -> Program:
    """The functions of a training on a mesh.

    Args:
        model: Maps images `[N, H, W, C]` to logits `[N, classes]`. Its parameters are the first.
        settings: What is asked for.
        mesh: See `mesh_of`.
        optimizer: See `optimizers.made`.
        classes: Their number.
    """
    definition, params, *rest = nnx.split(model, nnx.Param, ...)
    forward = partial(_logits, definition, rest)

    def start(params: nnx.State) -> State:
        ema = jax.tree.map(jnp.copy, params) if settings.optimizer.ema else None
        return State(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params))

    shardings = placed(jax.eval_shape(start, params), mesh)
    rows = split_rows(mesh)
    train = jax.jit(
        partial(_train, forward, optimizer, settings, classes),
        in_shardings=(shardings, rows),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )
    return Program(partial(jax.jit(start, out_shardings=shardings), params), train, shardings, rows)


def evaluator(
    model: nnx.Module, data: Data, mesh: Mesh
) -> Callable[[nnx.State, Batch], tuple[Scores, jax.Array]]:
    """The function of parameters and a batch that gives the scores and the logits.

    Args:
        model: Maps images `[N, H, W, C]` to logits.
        data: Mean and deviation of the images.
        mesh: The devices.
    """
    definition, _, *rest = nnx.split(model, nnx.Param, ...)
    whole = NamedSharding(mesh, PartitionSpec())
    forward = partial(_logits, definition, rest)
    return jax.jit(partial(_evaluate, forward, data), out_shardings=whole)


def on_devices(arrays: dict[str, np.ndarray], rows: NamedSharding) -> Batch:
    """A batch on the devices, from the rows of it that this process has read."""
    return {
        name: jax.make_array_from_process_local_data(rows, arrays[name])
        for name in ("image", "label")
    }


_Forward = Callable[[nnx.State, jax.Array, jax.Array | None], jax.Array]
"""Logits of parameters and images, in training with a key, in evaluation without."""


def _logits(
    definition: nnx.GraphDef,
    rest: Sequence[nnx.State],
    params: nnx.State,
    images: jax.Array,
    key: jax.Array | None,
) -> jax.Array:
    # Copied, since `rest` is of the trace outside, whose variables none inside may change.
    model = nnx.merge(definition, params, *rest, copy=True)
    if key is None:
        return model(images, deterministic=True).astype(jnp.float32)
    # Of the step's key, so that no state of chance has to be kept.
    nnx.reseed(model, dropout=key)
    return model(images, deterministic=False).astype(jnp.float32)


def _train(
    forward: _Forward,
    optimizer: optax.GradientTransformation,
    settings: Settings,
    classes: int,
    state: State,
    batch: Batch,
) -> tuple[State, Metrics]:
    key = jax.random.fold_in(jax.random.key(settings.run.seed), state.step)
    parts = settings.run.accumulate
    # Every part takes rows of every device.
    split = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)

    def loss(params: nnx.State, part: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        augment_key, drop_key = jax.random.split(key)
        valid = part["label"] >= 0
        targets = jax.nn.one_hot(part["label"], classes)
        images = normalised(part["image"], settings.data)
        images, targets = augmented(augment_key, images, targets, settings.augment)
        smoothing = settings.augment.smoothing
        targets = (1 - smoothing) * targets + smoothing / classes * targets.sum(-1, keepdims=True)
        losses = optax.softmax_cross_entropy(forward(params, images, drop_key), targets)
        return losses.sum(), valid.sum()

    def add(
        sums: tuple[nnx.State, jax.Array, jax.Array], one: tuple[Batch, jax.Array]
    ) -> tuple[tuple[nnx.State, jax.Array, jax.Array], None]:
        (value, count), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, *one)
        return jax.tree.map(jnp.add, sums, (gradients, value, count)), None

    zero = jax.tree.map(jnp.zeros_like, state.params), jnp.zeros(()), jnp.zeros((), jnp.int32)
    keys = jax.random.split(key, parts)
    if parts == 1:
        sums, _ = add(zero, (jax.tree.map(lambda a: a[0], split), keys[0]))
    else:
        sums, _ = jax.lax.scan(add, zero, (split, keys))
    gradients, value, count = sums
    images = jnp.maximum(count, 1)
    gradients = jax.tree.map(lambda one: one / images, gradients)
    updates, memory = optimizer.update(gradients, state.memory, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = optimizers.averaged(ema, params, state.step, settings.optimizer.ema)
    metrics = Metrics(value / images, optax.tree.norm(gradients), count)
    return State(state.step + 1, params, ema, memory), metrics


def _evaluate(
    forward: _Forward, data: Data, params: nnx.State, batch: Batch
) -> tuple[Scores, jax.Array]:
    valid = batch["label"] >= 0
    label = jnp.maximum(batch["label"], 0)
    logits = forward(params, normalised(batch["image"], data), None)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    # As many as stand before the class; the one that comes first wins a tie.
    own = jnp.take_along_axis(logits, label[:, None], 1)
    before = (logits > own).sum(1)
    before += ((logits == own) & (jnp.arange(logits.shape[1]) < label[:, None])).sum(1)

    def total(values: jax.Array) -> jax.Array:
        return jnp.where(valid, values, 0).sum()

    scores = Scores(total(losses), total(before < 1), total(before < 5), valid.sum())
    return scores, logits
