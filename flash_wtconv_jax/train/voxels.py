"""The demos of sparse convolution: a small `SparseUNet` labels voxels, beside a linear model.

The linear model sees what the network sees of each voxel, its normal, and none of its neighbours.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from numpy.typing import NDArray

from flash_wtconv_jax import environment, models, plots
from flash_wtconv_jax.nnx import SpatiallySparseConv
from flash_wtconv_jax.train import cortex, rooms
from flash_wtconv_jax.train.segmentation import Labelled, overlaps, predict, train
from pallas_kernels.common.arguments import checked_seed
from pallas_kernels.common.files import making_folder, replacing
from pallas_kernels.common.types import Json


class Task(NamedTuple):
    """A data set of voxels with a class each.

    Attributes:
        data: What it is, for reports.
        load: Returns the voxels to learn from and those held out, by the edge of a voxel.
        classes: Names of the classes.
        unit: The unit of the edge.
        voxel_size: The edge, unless a user gives another.
        least: The least edge, whose points a machine has memory for.
        views: Directions that the picture looks along.
    """

    data: str
    load: Callable[[float], tuple[Labelled, Labelled]]
    classes: tuple[str, ...]
    unit: str
    voxel_size: float
    least: float
    views: tuple[plots.View, ...]


TASKS = {
    "voxels": Task(
        "white surface of fsaverage5, trained on the left half, tested on the mirrored right",
        cortex.load_cortex,
        cortex.CLASSES,
        "mm",
        2.0,
        1.0,
        (
            plots.View("from the side", (1, 0, 0), (0, 0, 1)),
            plots.View("medial", (-1, 0, 0), (0, 0, 1)),
        ),
    ),
    "rooms": Task(
        "generated rooms, trained on four, tested on two others",
        rooms.load_rooms,
        rooms.CLASSES,
        "m",
        0.1,
        0.02,
        (plots.View("from above", (1, 1, -1.2), (0, 0, 1)),),
    ),
}
"""The demos by their names on the command line."""

NETWORKS: dict[str, float] = {"SparseUNet": 1e-2, "linear": 1e-1}
"""The learning rates of the two models of a demo."""

EPOCHS = 40

FILES = {
    "metrics.json": "intersection over union by class, losses, versions, device",
    "predictions.png": "held-out voxels: the truth, and what each model says",
}
"""The files that a demo writes."""


def network(name: str, classes: int, *, seed: int = 0) -> nnx.Module:
    """A model of the demo, from voxels with normals to the same with a score of each class.

    Args:
        name: One of `NETWORKS`.
        classes: Their number.
        seed: Seed of the initial parameters.

    Example:
        >>> sorted(nnx.state(network("linear", 2), nnx.Param))
        ['bias', 'kernel']
    """
    rngs = nnx.Rngs(checked_seed(seed))
    if name == "linear":
        return SpatiallySparseConv(3, classes, 1, rngs=rngs)
    return models.SparseUNet(
        3, classes, stem_dim=16, dims=(16, 16), depths=(1, 1), stem_kernel_sizes=(3,), rngs=rngs
    )


def run_demo(
    out: Path,
    task: str,
    *,
    voxel_size: float | None = None,
    seed: int = 0,
    epochs: int = EPOCHS,
    on_epoch: Callable[[str, Sequence[float]], None] | None = None,
) -> Json:
    """Trains both models and writes metrics and a picture into `out`.

    Everything is written beside its place and moved there at the end: an error or an interrupt
    leaves `out` as it was.

    Args:
        out: Folder, made if need be; other files in it stay.
        task: One of `TASKS`.
        voxel_size: Edge of a voxel; None takes the task's.
        seed: Seed of the initial parameters.
        epochs: Passes over the voxels to learn from, a step each.
        on_epoch: Called with the model's name and its losses after each epoch.

    Returns:
        What `metrics.json` holds.

    Raises:
        ValueError: If `epochs` is below 1, or the voxels are too small.
        OSError: If `out` cannot be written.
        ImportError: If nilearn, which has the cortex, or matplotlib is not installed.
    """
    started = time.perf_counter()
    chosen = TASKS[task]
    size = chosen.voxel_size if voxel_size is None else voxel_size
    if not size >= chosen.least:
        raise ValueError(
            f"voxel_size={size:g}: expected at least {chosen.least:g} {chosen.unit}, for smaller "
            "voxels take too much memory"
        )
    training, held_out = chosen.load(size)
    with making_folder(out):
        runs = {
            name: _run(name, len(chosen.classes), training, held_out, seed, epochs, on_epoch)
            for name in NETWORKS
        }
        metrics = {
            "dataset": chosen.data,
            "voxel_size": f"{size:g} {chosen.unit}",
            "voxels": {"training": len(training.labels), "held_out": len(held_out.labels)},
            "seed": seed,
            "epochs": epochs,
            "seconds": round(time.perf_counter() - started, 1),
            "device": environment.device(),
            "versions": environment.versions(),
            "networks": {
                name: run.summary(held_out.labels, chosen.classes) for name, run in runs.items()
            },
        }
        _write(out, chosen, held_out, runs, metrics)
    return metrics


class _Run(NamedTuple):
    """One trained model and what it says of the held-out voxels."""

    parameters: int
    losses: list[float]
    predicted: NDArray[np.int32]

    def summary(self, labels: NDArray[np.int32], classes: Sequence[str]) -> Json:
        """The model's entry in `metrics.json`."""
        found = overlaps(self.predicted, labels, len(classes))
        return {
            "miou": float(found.mean()),
            "iou": dict(zip(classes, found.tolist(), strict=True)),
            "accuracy": float((self.predicted == labels).mean()),
            "parameters": self.parameters,
            "loss_by_epoch": self.losses,
        }


def _run(
    name: str,
    classes: int,
    training: Labelled,
    held_out: Labelled,
    seed: int,
    epochs: int,
    on_epoch: Callable[[str, Sequence[float]], None] | None,
) -> _Run:
    model = nnx.jit(lambda: network(name, classes, seed=seed))()
    losses = train(
        model,
        training,
        epochs=epochs,
        learning_rate=NETWORKS[name],
        on_epoch=None if on_epoch is None else lambda losses: on_epoch(name, losses),
    )
    parameters = sum(array.size for array in jax.tree.leaves(nnx.state(model, nnx.Param)))
    return _Run(parameters, losses, predict(model, held_out.voxels))


def _write(out: Path, task: Task, held_out: Labelled, runs: dict[str, _Run], metrics: Json) -> None:
    """Writes every file of the demo, then moves them all to their places."""
    labels = {"truth": held_out.labels}
    for name, run in runs.items():
        labels[f"{name}, mIoU {metrics['networks'][name]['miou']:.1%}"] = run.predicted
    coords, normals = (np.asarray(a) for a in (held_out.voxels.coords, held_out.voxels.features))
    first = coords[:, 0] == 0
    shown = {name: each[first] for name, each in labels.items()}
    picture = plots.voxel_labels(coords[first, 1:], normals[first], shown, task.classes, task.views)
    with ExitStack() as places:
        for name, content in (
            ("predictions.png", plots.png(picture)),
            ("metrics.json", f"{json.dumps(metrics, indent=2)}\n".encode()),
        ):
            places.enter_context(replacing(out / name, force=True)).write_bytes(content)
