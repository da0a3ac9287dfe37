"""One step of a training, and one of an evaluation, as pure functions of a state.

A mesh splits the batch over `data` and `fsdp`, the parameters over `fsdp`, and channels over
`model`; XLA adds what the devices have to tell each other. Parameters are gathered over `fsdp`
before they are used.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from flash_wtconv_jax.train import loop
from flash_wtconv_jax.train.images import optimizers
from flash_wtconv_jax.train.images.augment import augmented, normalised
from flash_wtconv_jax.train.images.scaling import scaled
from flash_wtconv_jax.train.images.settings import AXES, Data, Settings
from flash_wtconv_jax.train.images.vectors import Vectors

# Smaller arrays are kept whole: to gather them costs more than they take.
_LEAST_SPLIT = 4096

Batch = dict[str, jax.Array]
"""`image` `[N, B, B, C]` of uint8 and `extent` `[N, 2]`, crops and their sizes: see `scaled`;
`label`, the class of each image `[N]` or of each pixel `[N, S, S]`, below 0 where there is none;
and `read` `[N]`, whether there is an image."""

Sums = dict[str, jax.Array]
"""The sums that `means` makes scores of: sums over the images of one batch or of several."""


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


def placed(state: loop.State, mesh: Mesh) -> loop.State:
    """The shardings of the arrays of a state, of which shapes are enough."""
    return jax.tree.map(lambda leaf: NamedSharding(mesh, _split(leaf.shape, mesh)), state)


def _gathered(params: nnx.State, mesh: Mesh) -> nnx.State:
    """The shardings of parameters where they are used: whole but for their channels.

    Left to itself, XLA splits sums inside the network over `fsdp` too, which also splits the batch:
    on `data=2,fsdp=2,model=2` the gradients of two stages came out wrong (JAX 0.10.2, CPU).
    """

    def sharding(leaf: jax.Array) -> NamedSharding:
        kept = ("model" if axis == "model" else None for axis in _split(leaf.shape, mesh))
        return NamedSharding(mesh, PartitionSpec(*kept))

    return jax.tree.map(sharding, params)


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


Leaves = list[jax.Array]
"""The arrays of a state of `Vectors`, in the order of `jax.tree.leaves`.

Between steps a state is no more than that: to take a thousand parameters of nnx apart and to put
them together again can take Python as long as a GPU takes for a step.
"""


class Program(NamedTuple):
    """The compiled functions of a training.

    Attributes:
        start: Makes the arrays of the first state.
        train: The arrays of the state, and the metrics, after a batch; those given are used up.
        state: The state of some arrays, each parameter by itself.
        weights: The parameters of such a state and their averages alone.
        leaves: The arrays of such a state.
        shardings: Where the arrays of such a state lie.
        rows: Where the rows of a batch lie.
    """

    start: Callable[[], Leaves]
    train: Callable[[Leaves, Batch], tuple[Leaves, loop.Metrics]]
    state: Callable[[Leaves], loop.State]
    weights: Callable[[Leaves], tuple[nnx.State, nnx.State | None]]
    leaves: Callable[[loop.State], Leaves]
    shardings: loop.State
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
        model: Maps images `[N, H, W, C]` to logits, of the images `[N, classes]` or of the pixels
            `[N, H, W, classes]`. Its parameters are the first.
        settings: What is asked for.
        mesh: See `mesh_of`.
        optimizer: See `optimizers.made`.
        classes: Their number.
    """
    definition, params, *rest = nnx.split(model, nnx.Param, ...)
    forward = partial(_logits, definition, rest, mesh)
    vectors = _vectors(params, settings, mesh)

    def begun(params: nnx.State) -> loop.State:
        averaging = bool(settings.optimizer.ema)
        return loop.begun(optimizer, vectors.joined(params), averaging=averaging)

    shapes = jax.eval_shape(begun, params)
    places, structure = jax.tree.flatten(placed(shapes, mesh))
    of_vectors = partial(jax.tree.unflatten, structure)
    shardings = placed(jax.eval_shape(vectors.cut, shapes), mesh)
    rows = split_rows(mesh)
    loss = partial(_loss, forward, vectors, settings, classes)
    train = jax.jit(
        partial(_train, loss, optimizer, settings, of_vectors),
        in_shardings=(places, rows),
        out_shardings=(places, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )

    def weights(leaves: Leaves) -> tuple[nnx.State, nnx.State | None]:
        state = of_vectors(leaves)
        return vectors.cut((state.params, state.ema))

    first = jax.jit(lambda params: jax.tree.leaves(begun(params)), out_shardings=places)
    return Program(
        partial(first, params),
        train,
        jax.jit(lambda leaves: vectors.cut(of_vectors(leaves)), out_shardings=shardings),
        jax.jit(weights, out_shardings=(shardings.params, shardings.ema)),
        jax.jit(lambda state: jax.tree.leaves(vectors.joined(state)), out_shardings=places),
        shardings,
        rows,
    )


def _vectors(params: nnx.State, settings: Settings, mesh: Mesh) -> Vectors:
    """The vectors of parameters on a mesh; where it splits these, each stays by itself."""
    if mesh.shape["fsdp"] * mesh.shape["model"] > 1:
        return Vectors(params, range(len(jax.tree.leaves(params))))
    kinds = optimizers.kinds(settings.optimizer, params, settings.model.freeze)
    return Vectors(params, kinds)


def evaluator(
    model: nnx.Module, data: Data, mesh: Mesh
) -> Callable[[nnx.State, Batch], tuple[Sums, jax.Array]]:
    """The function of parameters and a batch that gives sums for `means`, and what it says.

    That is the logits of images, and of pixels the likeliest class alone.

    Args:
        model: Maps images `[N, H, W, C]` to logits.
        data: Size, mean and deviation of the images.
        mesh: The devices.
    """
    definition, _, *rest = nnx.split(model, nnx.Param, ...)
    whole = NamedSharding(mesh, PartitionSpec())
    forward = partial(_logits, definition, rest, mesh)
    return jax.jit(partial(_evaluate, forward, data), out_shardings=whole)


def on_devices(arrays: dict[str, np.ndarray], rows: NamedSharding) -> Batch:
    """A batch on the devices, from the rows of it that this process has read."""
    return {
        name: jax.make_array_from_process_local_data(rows, arrays[name])
        for name in ("image", "extent", "label", "read")
    }


_Forward = Callable[[nnx.State, jax.Array, jax.Array | None], jax.Array]
"""Logits of parameters and images, in training with a key, in evaluation without."""


def _logits(
    definition: nnx.GraphDef,
    rest: Sequence[nnx.State],
    mesh: Mesh,
    params: nnx.State,
    images: jax.Array,
    key: jax.Array | None,
) -> jax.Array:
    params = jax.lax.with_sharding_constraint(params, _gathered(params, mesh))
    # Copied, since `rest` is of the trace outside, whose variables none inside may change.
    model = nnx.merge(definition, params, *rest, copy=True)
    if key is None:
        return model(images, deterministic=True).astype(jnp.float32)
    # Of the step's key, so that no state of chance has to be kept.
    nnx.reseed(model, dropout=key)
    return model(images, deterministic=False).astype(jnp.float32)


def _seen(batch: Batch, data: Data) -> jax.Array:
    """The images of a batch as a network sees them."""
    return normalised(scaled(batch["image"], batch["extent"], data.size), data)


def _loss(
    forward: _Forward,
    vectors: Vectors,
    settings: Settings,
    classes: int,
    joined: nnx.State,
    part: Batch,
    key: jax.Array,
) -> loop.Sums:
    augment_key, drop_key = jax.random.split(key)
    # Where there is no class the target is all zeros, and so is the loss.
    targets = jax.nn.one_hot(part["label"], classes)
    images = _seen(part, settings.data)
    images, targets = augmented(augment_key, images, targets, settings.augment)
    smoothing = settings.augment.smoothing
    targets = (1 - smoothing) * targets + smoothing / classes * targets.sum(-1, keepdims=True)
    logits = forward(vectors.parameters(joined), images, drop_key)
    losses = optax.softmax_cross_entropy(logits, targets)
    return loop.Sums(losses.sum(), (part["label"] >= 0).sum(), part["read"].sum())


def _train(
    loss: loop.Loss,
    optimizer: optax.GradientTransformation,
    settings: Settings,
    state_of: Callable[[Leaves], loop.State],
    arrays: Leaves,
    batch: Batch,
) -> tuple[Leaves, loop.Metrics]:
    state = state_of(arrays)
    key = jax.random.fold_in(jax.random.key(settings.run.seed), state.step)
    parts, ema = settings.run.accumulate, settings.optimizer.ema
    state, metrics = loop.step(loss, optimizer, state, batch, key, parts=parts, ema=ema)
    return jax.tree.leaves(state), metrics


def _evaluate(
    forward: _Forward, data: Data, params: nnx.State, batch: Batch
) -> tuple[Sums, jax.Array]:
    valid = batch["label"] >= 0
    label = jnp.maximum(batch["label"], 0)
    logits = forward(params, _seen(batch, data), None)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    sums = {
        "loss": jnp.where(valid, losses, 0).sum(),
        "terms": valid.sum(),
        "images": batch["read"].sum(),
    }
    if label.ndim == 1:
        return sums | _ranks(logits, label, valid), logits
    said = logits.argmax(-1)
    return sums | _overlaps(said, label, valid, logits.shape[-1]), said


def _ranks(logits: jax.Array, label: jax.Array, valid: jax.Array) -> Sums:
    """The images whose class has the highest score, or one of the five highest."""
    # As many as stand before the class; the one that comes first wins a tie.
    own = jnp.take_along_axis(logits, label[:, None], 1)
    before = (logits > own).sum(1)
    before += ((logits == own) & (jnp.arange(logits.shape[1]) < label[:, None])).sum(1)
    return {"top1": (valid & (before < 1)).sum(), "top5": (valid & (before < 5)).sum()}


def _overlaps(said: jax.Array, label: jax.Array, valid: jax.Array, classes: int) -> Sums:
    """The pixels `[classes]` that truth and prediction give to each class, both and either."""

    def counted(chosen: jax.Array, of: jax.Array) -> jax.Array:
        return jnp.zeros(classes, jnp.int32).at[of.ravel()].add(chosen.ravel().astype(jnp.int32))

    both = counted(valid & (said == label), label)
    return {"both": both, "either": counted(valid, label) + counted(valid, said) - both}


def means(sums: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The scores of images that an evaluation has summed up.

    Returns:
        "loss" and of images "top1" and "top5", the shares whose class is the first or of the first
        five; of pixels "pixels", the share that is right, and "miou", the mean over the classes
        that occur of their intersection over union.

    Example:
        >>> counts = {"terms": 4, "both": np.array([1, 2]), "either": np.array([2, 3])}
        >>> scores = means({name: np.asarray(one) for name, one in counts.items()} | {"loss": 2.0})
        >>> {name: round(score, 3) for name, score in scores.items()}
        {'loss': 0.5, 'pixels': 0.75, 'miou': 0.583}
    """
    terms = max(float(sums["terms"]), 1.0)
    scores = {"loss": float(sums["loss"]) / terms}
    if "both" not in sums:
        return scores | {name: float(sums[name]) / terms for name in ("top1", "top5")}
    found = overlaps(sums)
    scores["pixels"] = float(sums["both"].sum()) / terms
    return scores | {"miou": float(np.nanmean(found)) if np.isfinite(found).any() else 0.0}


def overlaps(sums: Mapping[str, np.ndarray]) -> NDArray[np.float64]:
    """The intersection over union of each class; not a number of one that does not occur."""
    either = np.asarray(sums["either"], np.float64)
    return np.where(either > 0, sums["both"] / np.maximum(either, 1), np.nan)
