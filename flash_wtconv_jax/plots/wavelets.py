"""Pictures of receptive fields and of the coefficients of a wavelet cascade."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike, NDArray

from flash_wtconv_jax.plots.style import DPI, SKY, drawn
from flash_wtconv_jax.receptive_field import LEAST, SHARES, contribution_side, reaches_border
from pallas_kernels.common.types import Tree


@drawn
def receptive_fields(fields: Mapping[str, np.ndarray]) -> Figure:
    """Effective receptive fields side by side, each relative to its maximum, one log scale.

    Args:
        fields: Field `[H, W]` by name.

    Returns:
        The figure; squares mark the shares `receptive_field.SHARES` of each field. Ticks are pixels
        from the centre. Below a field that goes on where its picture ends stands that it does.
    """
    figure = Figure(figsize=(4.2 * len(fields) + 0.9, 5.4), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(fields), squeeze=False)[0]
    norm = LogNorm(vmin=LEAST, vmax=1.0, clip=True)
    for axes, (name, field) in zip(panels, fields.items(), strict=True):
        # Nothing at all is drawn in the colour of the scale's lower end.
        height, width = field.shape
        edges = (-width / 2, width / 2, height / 2, -height / 2)
        shown = np.maximum(field / field.max(), LEAST)
        axes.imshow(shown, cmap="magma", norm=norm, extent=edges)
        axes.set_title(f"{name}\n{height} x {width} px", wrap=True, parse_math=False)
        for axis, size in ((axes.xaxis, width), (axes.yaxis, height)):
            axis.set_ticks([-size / 2, -size / 4, 0, size / 4, size / 2])
            axis.set_major_formatter("{x:g}")
        _mark_shares(axes, field)
    scale = ScalarMappable(norm, "magma")
    label = "mean |gradient| of the centre, relative"
    figure.colorbar(scale, ax=list(panels), label=label, extend="min")
    return figure


@drawn
def wavelet_cascade(coefficients: Sequence[Tree], title: str = "") -> Figure:
    """The subbands of one image as the usual nested squares, each with its own grey scale.

    Args:
        coefficients: Result of `pallas_kernels.haar.wavedec2` for an image `[H, W, C]`: the
            approximation, then for each level from the deepest a tuple of three details.
        title: Title of the figure.

    Returns:
        The figure, of the first channel. Beside the approximation stand the details along W,
        below it those along H.
    """
    mosaic = _scaled(coefficients[0], signed=False)
    for details in coefficients[1:]:
        low_high, high_low, high_high = (_scaled(band, signed=True) for band in details)
        height, width = low_high.shape
        mosaic = mosaic[:height, :width]
        mosaic = np.block([[mosaic, high_low], [low_high, high_high]])
    figure = Figure(figsize=(5.0, 5.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.imshow(mosaic, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set_title(title, parse_math=False)
    axes.set_axis_off()
    return figure


def _mark_shares(axes: Axes, field: np.ndarray) -> None:
    texts = []
    for share, (style, word) in zip(SHARES, (("-", "solid"), ("--", "dashed")), strict=True):
        side = contribution_side(field, share)
        corner = (-side / 2, -side / 2)
        axes.add_patch(
            Rectangle(corner, side, side, fill=False, edgecolor=SKY, linestyle=style, linewidth=1.5)
        )
        texts.append(f"{share:.0%} in {side} x {side} px ({word})")
    if reaches_border(field):
        texts.append("the field reaches the border and is larger")
    axes.set_xlabel("\n".join(("pixels from the centre", *texts)))


def _scaled(band: ArrayLike, *, signed: bool) -> NDArray[np.float64]:
    """The first channel of a subband in [0, 1]; a signed one has zero in the middle."""
    values = np.asarray(band, np.float64)[..., 0]
    if signed:
        # The few largest edges may clip, or all others would be grey.
        return 0.5 + 0.5 * values / max(np.quantile(np.abs(values), 0.99), 1e-12)
    low, high = np.min(values), np.max(values)
    return (values - low) / max(high - low, 1e-12)
