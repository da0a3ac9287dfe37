"""Pictures of a training: its curve, and what the network reads in images."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import ArrayLike, NDArray

from flash_wtconv_jax.plots.style import COLOURS, DPI, VERMILION, drawn, label
from pallas_kernels.common.types import Keywords

_NAMED = 24
"""Classes that a legend has room for."""


class Curve(Protocol):
    """The mean training loss and the held-out accuracy of each epoch, as `train.History` has."""

    loss: list[float]
    accuracy: list[float]


@drawn
def training_curve(histories: Mapping[str, Sequence[Curve]]) -> Figure:
    """Training loss and held-out error over the epochs, a line a training, a colour a network.

    Args:
        histories: The curves by the network's name, such as `train.history.History`, one a seed.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(9.0, 3.8), dpi=DPI, layout="constrained")
    loss_axes, error_axes = figure.subplots(1, 2)
    for colour, (name, seeds) in zip(COLOURS, histories.items(), strict=False):
        last = [100 * (1 - history.accuracy[-1]) for history in seeds]
        text = f"{name}: {np.mean(last):.1f} %"
        if len(seeds) > 1:
            text += f" ({min(last):.1f} to {max(last):.1f})"
        for i, history in enumerate(seeds):
            epochs = np.arange(1, len(history.loss) + 1)
            errors = 100 * (1 - np.asarray(history.accuracy))
            style: Keywords = {"color": colour, "linewidth": 1.4, "marker": "o", "markersize": 2}
            loss_axes.plot(epochs, history.loss, label=None if i else name, **style)
            error_axes.plot(epochs, errors, label=None if i else text, **style)
    # Below 1 % a step is one image of the test set, and no error at all must still have a place.
    error_axes.set_yscale("symlog", linthresh=1.0)
    ticks = (0, 0.5, 1, 2, 5, 10, 20, 50, 100)
    error_axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    error_axes.set_ylim(0, 100)
    label(loss_axes, "Training loss", "epoch", "cross entropy")
    label(error_axes, "Held-out images read wrongly", "epoch", "error in %")
    return figure


@drawn
def run_curves(
    steps: Sequence[Mapping[str, float]], evaluations: Sequence[Mapping[str, float]]
) -> Figure:
    """Loss, held-out error and learning rate of one training over its steps.

    Args:
        steps: Rows with `step`, `loss` and `rate`.
        evaluations: Rows with `step`, `loss` and `top1`, the share that was told rightly, or of
            pixels `miou`; and with the same of averaged weights, such as `ema_loss`.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(13.0, 3.8), dpi=DPI, layout="constrained")
    loss_axes, error_axes, rate_axes = figure.subplots(1, 3)

    def draw(axes: Axes, rows: Sequence[Mapping[str, float]], name: str, **style: Any) -> None:
        known = [row for row in rows if name in row]
        values = [row[name] for row in known]
        if name.endswith(score):
            values = [100 * (1 - value) for value in values]
        axes.plot([row["step"] for row in known], values, linewidth=1.8, **style)

    score = "miou" if any("miou" in row for row in evaluations) else "top1"
    dots: Keywords = {"marker": "o", "markersize": 2.5}
    draw(loss_axes, steps, "loss", color=COLOURS[0], label="training")
    for axes, name in ((loss_axes, "loss"), (error_axes, score)):
        draw(axes, evaluations, name, color=COLOURS[1], label="held out", **dots)
        if any(f"ema_{name}" in row for row in evaluations):
            averaged: Keywords = {"color": COLOURS[2], "linestyle": "--", **dots}
            draw(axes, evaluations, f"ema_{name}", label="held out, averaged weights", **averaged)
    draw(rate_axes, steps, "rate", color=COLOURS[3], label="AdamW")
    label(loss_axes, "Loss", "step", "cross entropy")
    missed = {"top1": "Held-out images told wrongly", "miou": "What mIoU lacks of held-out images"}
    label(error_axes, missed[score], "step", "error in %" if score == "top1" else "100 % - mIoU")
    label(rate_axes, "Learning rate", "step", "rate")
    return figure


@drawn
def masks(
    images: ArrayLike, truths: ArrayLike, predicted: ArrayLike, classes: Sequence[str]
) -> Figure:
    """Images above their true masks and those of a network, in the colours of the classes.

    Args:
        images: uint8 `[N, H, W, C]` of 1 or 3 channels.
        truths: Classes of the pixels `[N, H, W]`, below 0 where there is none.
        predicted: The same of the network.
        classes: Their names.

    Returns:
        The figure.
    """
    images, truths, predicted = map(np.asarray, (images, truths, predicted))
    table = class_colours(len(classes))
    figure = Figure(figsize=(1.9 * len(images) + 0.4, 6.4), dpi=DPI, layout="constrained")
    grid = figure.subplots(3, len(images), squeeze=False)
    pictures = np.broadcast_to(images, (*images.shape[:3], 3))
    # What has no class is black, and nothing is held against the network there.
    coloured = [np.where((truths >= 0)[..., None], table[one], 0) for one in (truths, predicted)]
    for row, name, shown in zip(
        grid, ("image", "truth", "network"), (pictures, *coloured), strict=True
    ):
        row[0].set_ylabel(name)
        for axes, picture in zip(row, shown, strict=True):
            axes.set(xticks=[], yticks=[])
            axes.imshow(picture.astype(np.uint8), interpolation="nearest")
    handles = [
        Patch(color=colour / 255, label=name)
        for colour, name in zip(table, classes[:_NAMED], strict=False)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
    return figure


def class_colours(count: int) -> NDArray[np.uint8]:
    """Colours of classes, `[count, 3]`: those of all pictures first, then ones around the circle.

    Example:
        >>> class_colours(2).tolist()
        [[0, 114, 178], [213, 94, 0]]
    """
    more = max(1, count - len(COLOURS))
    circle = [hsv_to_rgb((place / more, 0.6, 0.9)) for place in range(more)]
    chosen = [*map(to_rgb, COLOURS), *circle][:count]
    return (255 * np.array(chosen)).round().astype(np.uint8)


@drawn
def predictions(
    images: ArrayLike, labels: ArrayLike, probabilities: ArrayLike, *, count: int = 24
) -> Figure:
    """Every wrongly read image, worst first, and then correct ones, least sure first.

    Args:
        images: `[N, H, W]` or `[N, H, W, 1]`, background darkest.
        labels: True classes `[N]`.
        probabilities: `[N, K]`.
        count: Number of pictures; more if there are more mistakes.

    Returns:
        The figure.
    """
    images, labels, probabilities = map(np.asarray, (images, labels, probabilities))
    wrong = int((probabilities.argmax(axis=1) != labels).sum())
    shown = _most_doubtful(labels, probabilities)[: max(count, wrong)]
    columns = min(max(8, math.isqrt(len(shown))), len(shown))
    rows = -(-len(shown) // columns)
    # In inches. One Axes for all: one for each of hundreds takes matplotlib half a minute.
    side, title_high = 1.25, 0.3
    tall = max(side * images.shape[1] / images.shape[2], 0.4)
    figure = Figure(
        figsize=(side * columns, (tall + title_high) * rows + 0.6), dpi=DPI, layout="constrained"
    )
    title = f"{wrong} of {len(labels)} held-out images read wrongly"
    figure.suptitle(title + ("; then the least sure ones" if wrong < len(shown) else ""))
    axes = figure.subplots()
    for place, index in enumerate(shown):
        row, column = divmod(place, columns)
        left, top = side * column, (tall + title_high) * row + title_high
        axes.imshow(
            images[index].reshape(images.shape[1:3]),
            cmap="gray_r",
            extent=(left + 0.04, left + side - 0.04, top + tall - 0.08, top),
        )
        guess = int(probabilities[index].argmax())
        right = guess == labels[index]
        verdict = f"{guess}" if right else f"{guess}, is {labels[index]}"
        axes.text(
            left + side / 2,
            top - 0.05,
            f"{verdict} ({probabilities[index, guess]:.0%})",
            ha="center",
            fontsize=9,
            color="black" if right else VERMILION,
            fontweight="normal" if right else "bold",
        )
    axes.set(xlim=(0, side * columns), ylim=((tall + title_high) * rows, 0), aspect="equal")
    axes.set_axis_off()
    return figure


def _most_doubtful(labels: np.ndarray, probabilities: np.ndarray) -> NDArray[np.intp]:
    """Indices by the probability of the truth, the wrong ones before all others."""
    truth = probabilities[np.arange(len(labels)), labels]
    right = probabilities.argmax(axis=1) == labels
    return np.lexsort((truth, right))
