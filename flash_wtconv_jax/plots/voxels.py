"""Pictures of voxels with a class each."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike, NDArray

from flash_wtconv_jax.plots.style import COLOURS, DPI, drawn

_INCHES = 3.6


class View(NamedTuple):
    """A view of voxels from far away.

    Attributes:
        name: Where it is from.
        direction: What it looks along, of any length.
        up: What is above in the picture.
    """

    name: str
    direction: tuple[float, float, float]
    up: tuple[float, float, float]


@drawn
def voxel_labels(
    coords: ArrayLike,
    normals: ArrayLike,
    labels: Mapping[str, ArrayLike],
    classes: Sequence[str],
    views: Sequence[View],
) -> Figure:
    """Voxels in the colours of their classes: a column for each labelling, a row for each view.

    Args:
        coords: `[n, 3]`.
        normals: `[n, 3]`; what faces away from a view is not drawn, so that it looks into rooms.
        labels: Classes `[n]` by the name of what tells them.
        classes: Names of the classes.
        views: Where they are seen from.

    Returns:
        The figure.
    """
    places, facing = np.asarray(coords, float), np.asarray(normals, float)
    projected = [_projected(places, facing, view) for view in views]
    spans = [np.ptp(across, axis=0) + 3 for _, across, _ in projected]
    heights = [_INCHES * height / width for width, height in spans]
    size = len(labels) * _INCHES, sum(heights) + 0.5 * len(views) + 0.4
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    grid = figure.subplots(len(views), len(labels), squeeze=False, height_ratios=heights)
    colours = np.array([to_rgb(colour) for colour in COLOURS[: len(classes)]])
    for row, view, (seen, across, shade), (width, _) in zip(
        grid, views, projected, spans, strict=True
    ):
        for axes, (name, own) in zip(row, labels.items(), strict=True):
            axes.set_axis_off()
            axes.set_aspect("equal")
            axes.set_title(f"{name}\n{view.name}", fontsize=9)
            axes.set_xlim(across[:, 0].min() - 1.5, across[:, 0].max() + 1.5)
            axes.set_ylim(across[:, 1].min() - 1.5, across[:, 1].max() + 1.5)
            # A voxel's edge in points, a little more, so that no gaps are left.
            edge = 1.3 * 72 * _INCHES / width
            axes.scatter(
                *across.T,
                s=edge**2,
                marker="s",
                linewidths=0,
                color=colours[np.asarray(own)[seen]] * shade[:, None],
            )
    handles = [
        Line2D([], [], marker="s", linestyle="", color=colour, label=name)
        for colour, name in zip(colours, classes, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(classes), frameon=False)
    return figure


def _projected(
    places: NDArray[np.float64], normals: NDArray[np.float64], view: View
) -> tuple[NDArray[np.intp], NDArray[np.float64], NDArray[np.float64]]:
    """The voxels that face a view, the furthest first, where they are in it, and their shades."""
    along = np.array(view.direction, float) / np.linalg.norm(view.direction)
    right = np.cross(along, view.up)
    right /= np.linalg.norm(right)
    towards = -normals @ along
    # Nothing may face a view, of few voxels: then all of them are drawn.
    facing = towards > 0 if (towards > 0).any() else np.ones(len(towards), bool)
    order = np.argsort(-(places @ along), kind="stable")
    seen = order[facing[order]]
    across = places[seen] @ np.stack([right, np.cross(right, along)], 1)
    lengths = np.maximum(np.linalg.norm(normals[seen], axis=1), 1e-6)
    return seen, across, 0.45 + 0.55 * np.maximum(towards[seen], 0) / lengths
