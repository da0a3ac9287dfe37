"""Voxels with a class each: the training of networks that tell it, and how well they do."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from numpy.typing import NDArray

from flash_wtconv_jax.train.loop import demo_optimizer
from pallas_kernels.sparse import Voxels, from_coords


class Labelled(NamedTuple):
    """Voxels of which each belongs to a class.

    Attributes:
        voxels: The voxels, as many as there are rows.
        labels: `int32 [n]`, their classes.
    """

    voxels: Voxels
    labels: NDArray[np.int32]


def voxelised(
    samples: Sequence[tuple[NDArray[np.float64], NDArray[np.int32]]], voxel_size: float
) -> Labelled:
    """The voxels that points with normals fall into.

    Args:
        samples: For each its points and their normals, `[n, 6]`, and their classes, `[n]`.
        voxel_size: Edge of a voxel, in the unit of the points.

    Returns:
        The voxels, sorted; features are the mean of the normals, labels the class of most points,
        of two the one that comes first.

    Raises:
        ValueError: No positive size, or so small a one that voxels lie beyond the grid.

    Example:
        >>> points = np.array([[0.1, 0, 0, 0, 0, 1], [0.9, 0, 0, 0, 0, 1], [1.5, 0, 0, 0, 1, 0]])
        >>> found = voxelised([(points, np.array([4, 4, 2]))], 1.0)
        >>> found.voxels.features.tolist(), found.labels.tolist()
        ([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]], [4, 2])
    """
    if not np.isfinite(voxel_size) or voxel_size <= 0:
        raise ValueError(f"voxel_size={voxel_size}: expected a number > 0")
    coords, features, classes = [], [], []
    for sample, (points, own) in enumerate(samples):
        cells = np.floor(points[:, :3] / voxel_size).astype(np.int64)
        places, row = _unique(cells)
        counts = np.bincount(row)
        votes = np.stack([np.bincount(row, own == label) for label in range(own.max() + 1)], 1)
        normals = [np.bincount(row, column) / counts for column in points.T[3:]]
        coords.append(np.insert(places, 0, sample, axis=1))
        features.append(np.stack(normals, 1))
        classes.append(votes.argmax(1))
    rows = np.concatenate(coords)
    normals32 = np.concatenate(features).astype(np.float32)
    voxels = from_coords(rows, normals32, batch_size=len(samples), capacity=len(rows))
    return Labelled(voxels, np.concatenate(classes).astype(np.int32))


def train(
    model: nnx.Module,
    labelled: Labelled,
    *,
    epochs: int,
    learning_rate: float,
    on_epoch: Callable[[Sequence[float]], None] | None = None,
) -> list[float]:
    """Trains a network in place on all voxels at once: AdamW, cosine schedule.

    Args:
        model: A function from `Voxels` to the same with a score of each class.
        labelled: The voxels and their classes.
        epochs: Passes over them, a step each.
        learning_rate: The greatest of the schedule.
        on_epoch: Called with the losses so far after each epoch.

    Returns:
        The mean cross entropy at each epoch.

    Raises:
        ValueError: If `epochs` is below 1.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    optimizer = nnx.Optimizer(model, demo_optimizer(learning_rate, epochs), wrt=nnx.Param)

    @nnx.jit
    def step(
        model: nnx.Module, optimizer: nnx.Optimizer, voxels: Voxels, labels: jax.Array
    ) -> jax.Array:
        def loss(model: nnx.Module) -> jax.Array:
            scores = _scores(model, voxels)
            # By products, whose gradient scatters nothing.
            wanted = jax.nn.one_hot(labels, scores.shape[1])
            return optax.softmax_cross_entropy(scores, wanted).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    model.train()
    losses: list[float] = []
    labels = jnp.asarray(labelled.labels)
    for _ in range(epochs):
        losses.append(float(step(model, optimizer, labelled.voxels, labels)))
        if on_epoch is not None:
            on_epoch(losses)
    model.eval()
    return losses


def predict(model: nnx.Module, voxels: Voxels) -> NDArray[np.int32]:
    """The class of each voxel that a network finds the most likely, `int32 [n]`.

    Args:
        model: A function from `Voxels` to the same with a score of each class.
        voxels: The voxels, as many as there are rows.
    """
    return np.asarray(nnx.jit(_scores)(model, voxels).argmax(1), np.int32)


def overlaps(
    predicted: NDArray[np.int32], labels: NDArray[np.int32], classes: int
) -> NDArray[np.float64]:
    """The intersection over union of each class: voxels that both say are of it over those of any.

    Args:
        predicted: Classes, `[n]`.
        labels: The true ones, `[n]`.
        classes: Their number.

    Returns:
        `[classes]`; 1 for a class that nobody names. Their mean is the mIoU.

    Example:
        >>> overlaps(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]), 3).round(2).tolist()
        [0.5, 0.67, 1.0]
    """
    both = np.bincount(labels[predicted == labels], minlength=classes)
    either = np.bincount(predicted, minlength=classes) + np.bincount(labels, minlength=classes)
    either -= both
    return np.where(either == 0, 1.0, both / np.maximum(either, 1))


def _scores(model: nnx.Module, voxels: Voxels) -> jax.Array:
    return cast(Callable[[Voxels], Voxels], model)(voxels).features


def _unique(cells: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    """The different rows of integers, sorted, and which of them each is."""
    low = cells.min(0)
    sizes = cells.max(0) - low + 1
    # As one number each they are sorted many times as fast as rows.
    flat = np.ravel_multi_index(tuple((cells - low).T), tuple(sizes))
    found, row = np.unique(flat, return_inverse=True)
    return np.stack(np.unravel_index(found, tuple(sizes)), 1) + low, row
