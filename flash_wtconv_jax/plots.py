"""Every picture of the package: functions from arrays to `matplotlib.figure.Figure`.

No pyplot: nothing here has global state, opens a window or needs a display. Colours are those of
Okabe and Ito, which colour-blind people tell apart, and hatches or labels say the same again.
"""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray

from .checkpoints.files import replacing
from .receptive_field import SHARES, contribution_side

if TYPE_CHECKING:
    from .training import History

BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#CC79A7",
    "#56B4E9",
)
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)

_DPI = 150
_MARKERS = "osD^vP"
_LABEL_SHARE = 0.05
"""Of an axis: the height of a small label in a panel of a roofline."""
_LEAST = 1e-4


def save(figure: Figure, path: str | Path) -> None:
    """Writes a picture, whole or not at all; a picture that is there is replaced.

    Args:
        figure: What to draw.
        path: Where to; the extension names the format.

    Raises:
        FileNotFoundError: The folder that it goes into does not exist.
        ValueError: The extension names no format of matplotlib.
    """
    check_path(path)
    with replacing(Path(path), force=True) as temporary:
        figure.savefig(temporary)


def check_path(path: str | Path) -> None:
    """Raises what `save` would raise, for those who compute for long before they draw.

    Args:
        path: Where a picture is to go.

    Raises:
        FileNotFoundError: The folder that it goes into does not exist.
        ValueError: The extension names no format of matplotlib.
    """
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {path.absolute().parent} to write {path.name} into")
    formats = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in formats:
        raise ValueError(
            f"{path} has the extension {path.suffix!r}, expected one of: {', '.join(formats)}"
        )


def training_curve(histories: "Mapping[str, History]") -> Figure:
    """Training loss and held-out error over the epochs, one line a network.

    Args:
        histories: History by the network's name.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(9.0, 3.8), dpi=_DPI, layout="constrained")
    loss_axes, error_axes = figure.subplots(1, 2)
    for colour, (name, history) in zip(COLOURS, histories.items(), strict=False):
        epochs = np.arange(1, len(history.loss) + 1)
        errors = 100 * (1 - np.asarray(history.accuracy))
        style: dict[str, Any] = {
            "color": colour,
            "linewidth": 1.8,
            "marker": "o",
            "markersize": 2.5,
        }
        loss_axes.plot(epochs, history.loss, label=name, **style)
        error_axes.plot(epochs, errors, label=f"{name}: {errors[-1]:.1f} % at the end", **style)
    # Below 1 % a step is one image of the test set, and no error at all must still have a place.
    error_axes.set_yscale("symlog", linthresh=1.0)
    ticks = (0, 0.5, 1, 2, 5, 10, 20, 50, 100)
    error_axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    error_axes.set_ylim(0, 100)
    _label(loss_axes, "Training loss", "epoch", "cross entropy")
    _label(error_axes, "Held-out digits read wrongly", "epoch", "error in %")
    return figure


def predictions(
    images: ArrayLike, labels: ArrayLike, probabilities: ArrayLike, *, count: int = 24
) -> Figure:
    """Every wrongly read image, worst first, and then correct ones, least sure first.

    Args:
        images: `[N, H, W]` or `[N, H, W, 1]`, background darkest.
        labels: True classes `[N]`.
        probabilities: `[N, K]`.
        count: Number of pictures at most.

    Returns:
        The figure.
    """
    images, labels, probabilities = map(np.asarray, (images, labels, probabilities))
    shown = _most_doubtful(labels, probabilities)[:count]
    columns = min(8, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(1.25 * columns, 1.55 * rows + 0.6), dpi=_DPI, layout="constrained")
    wrong = int((probabilities.argmax(axis=1) != labels).sum())
    figure.suptitle(
        f"{wrong} of {len(labels)} held-out digits read wrongly; then the least sure ones"
    )
    for axes in np.ravel(figure.subplots(rows, columns, squeeze=False)):
        axes.set_axis_off()
    for axes, index in zip(figure.axes, shown, strict=False):
        guess = int(probabilities[index].argmax())
        right = guess == labels[index]
        axes.imshow(images[index].reshape(images.shape[1:3]), cmap="gray_r")
        verdict = f"{guess}" if right else f"{guess}, is {labels[index]}"
        axes.set_title(
            f"{verdict} ({probabilities[index, guess]:.0%})",
            fontsize=9,
            color="black" if right else VERMILION,
            fontweight="normal" if right else "bold",
        )
    return figure


def receptive_fields(fields: Mapping[str, NDArray[Any]]) -> Figure:
    """Effective receptive fields side by side, each relative to its maximum, one log scale.

    Args:
        fields: Field `[H, W]` by name.

    Returns:
        The figure; squares mark the shares `receptive_field.SHARES` of each field.
    """
    figure = Figure(figsize=(4.2 * len(fields) + 0.9, 4.9), dpi=_DPI, layout="constrained")
    panels = figure.subplots(1, len(fields), squeeze=False)[0]
    norm = LogNorm(vmin=_LEAST, vmax=1.0, clip=True)
    for axes, (name, field) in zip(panels, fields.items(), strict=True):
        # Nothing at all is drawn in the colour of the scale's lower end.
        axes.imshow(np.maximum(field / field.max(), _LEAST), cmap="magma", norm=norm)
        axes.set_title(name, wrap=True)
        axes.set_xticks([])
        axes.set_yticks([])
        _mark_shares(axes, field)
    scale = ScalarMappable(norm, "magma")
    label = "mean |gradient| of the centre, relative"
    figure.colorbar(scale, ax=list(panels), label=label, extend="min")
    return figure


def wavelet_cascade(coefficients: Sequence[Any], title: str = "") -> Figure:
    """The subbands of one image as the usual nested squares, each with its own grey scale.

    Args:
        coefficients: What `pallas_kernels.haar.wavedec2` returns for an image `[H, W, C]`: the
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
    figure = Figure(figsize=(5.0, 5.2), dpi=_DPI, layout="constrained")
    axes = figure.subplots()
    axes.imshow(mosaic, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set_title(title)
    axes.set_axis_off()
    return figure


def speedups(report: Mapping[str, Any]) -> Figure:
    """Bars of each contender's speed over the baseline, a panel a direction, log scale.

    Args:
        report: What `bench.wtconv.run` returns.

    Returns:
        The figure.
    """
    rows = report["rows"]
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    shapes = {row["shape"]: f"{tuple(row['x'])}\n{row['levels']} levels" for row in rows}
    figure = Figure(figsize=(2.0 + 2.0 * len(shapes), 6.4), dpi=_DPI, layout="constrained")
    for axes, direction in zip(figure.subplots(len(directions), 1), directions, strict=True):
        for i, contender in enumerate(contenders):
            speed = [
                row["speedup"]
                for row in rows
                if (row["direction"], row["contender"]) == (direction, contender)
            ]
            width = 0.8 / len(contenders)
            places = np.arange(len(shapes)) + (i - (len(contenders) - 1) / 2) * width
            colour = COLOURS[i % len(COLOURS)]
            bars = axes.bar(places, speed, 0.92 * width, color=colour, label=contender)
            texts = [f"{value:.0f}" if value >= 10 else f"{value:.2g}" for value in speed]
            axes.bar_label(bars, texts, fontsize=8, padding=1)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.margins(y=0.15)
        axes.set_xticks(np.arange(len(shapes)), shapes.values(), fontsize=8)
        axes.set_title(direction)
        axes.set_ylabel(f"speed over {report['baseline']}")
        axes.axhline(1.0, color="0.4", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    device = report["device"]["kind"]
    figure.suptitle(f"WTConv, {report['dtype']}, {device}, {report['date']}")
    return figure


def roofline(report: Mapping[str, Any]) -> Figure:
    """Multiply-adds a second of each contender under the device's two roofs, log scales.

    Args:
        report: What `bench.wtconv.run` returns.

    Returns:
        The figure: a row of panels a direction, a panel a shape. Right of each contender is its
        share of the roof above it; the intensity is that of the least traffic.
    """
    rows, roofs = report["rows"], report["roofs"]
    copy, fma = roofs["copy_bytes_per_s"], roofs["fma_per_s"]
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure = Figure(
        figsize=(1.2 + 2.6 * max(2, len(shapes)), 1.6 + 3.0 * len(directions)),
        dpi=_DPI,
        layout="constrained",
    )
    panels = figure.subplots(len(directions), len(shapes), sharex=True, sharey=True, squeeze=False)
    intensity = np.geomspace(fma / copy / 16, fma / copy * 16, 100)
    rates = [row["multiply_adds"] / row["median_ms"] * 1e3 for row in rows]
    lowest, highest = min(rates) / 2, 3 * max(*rates, fma)
    panels[0, 0].set(xscale="log", yscale="log", ylim=(lowest, highest))
    for (i, direction), (j, shape) in product(enumerate(directions), enumerate(shapes)):
        axes = panels[i, j]
        axes.plot(intensity, np.minimum(intensity * copy, fma), color="0.4", linewidth=1.2)
        shown = [row for row in rows if (row["shape"], row["direction"]) == (shape, direction)]
        labels = []
        for row in shown:
            at = row["multiply_adds"] / row["floor_bytes"]
            rate = row["multiply_adds"] / row["median_ms"] * 1e3
            place = contenders.index(row["contender"])
            style: dict[str, Any] = {
                "color": COLOURS[place % len(COLOURS)],
                "marker": _MARKERS[place % len(_MARKERS)],
                # Later ones are smaller, so that one at the same place can be seen.
                "markersize": 9 - min(place, 4),
            }
            axes.plot(at, rate, linestyle="", label=row["contender"], **style)
            labels.append((rate, at, f"{100 * rate / min(at * copy, fma):.2g} %", style["color"]))
        _label_right(axes, labels, np.log10(highest / lowest) * _LABEL_SHARE)
        axes.grid(True, color="0.93")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{shape}\n{tuple(shown[0]['x'])}, {direction}", fontsize=8)
    for axes in panels[:, 0]:
        axes.set_ylabel("multiply-adds a second", fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("multiply-adds a byte, at least traffic", fontsize=8)
    panels[0, 0].yaxis.set_major_formatter(EngFormatter(sep=" "))
    panels[0, 0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    unit = EngFormatter(places=1, sep=" ")
    figure.suptitle(
        f"WTConv, {report['dtype']}, {report['device']['kind']}, {report['date']}\n"
        f"roofs, measured: {unit(copy)}B/s, {unit(fma)} float32 multiply-adds/s\n"
        "labels: share of the roof",
        fontsize=10,
    )
    return figure


def _label_right(axes: Axes, labels: Sequence[tuple[float, float, str, str]], apart: float) -> None:
    """Writes labels in a column right of their points, `apart` decades or more from each other."""
    column = 1.8 * max(at for _, at, _, _ in labels)
    place = -np.inf
    for rate, at, text, colour in sorted(labels):
        place = max(np.log10(rate), place + apart)
        ends = (at, column), (rate, 10**place)
        axes.plot(*ends, color=colour, linewidth=0.5, zorder=1)
        axes.annotate(
            text,
            (column, 10**place),
            (2, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color=colour,
        )


def throughput(report: Mapping[str, Any]) -> Figure:
    """Bars of images a second, a panel a kind of work.

    Args:
        report: What `bench.wtconvnext.run` returns.

    Returns:
        The figure.
    """
    rows = report["rows"]
    works = list(dict.fromkeys(row["work"] for row in rows))
    figure = Figure(figsize=(3.6 * len(works), 4.0), dpi=_DPI, layout="constrained")
    for axes, work in zip(figure.subplots(1, len(works)), works, strict=True):
        shown = [row for row in rows if row["work"] == work]
        names = [row["contender"] for row in shown]
        rates = [row["images_per_s"] for row in shown]
        bars = axes.bar(names, rates, 0.6, color=COLOURS[: len(shown)])
        axes.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=2)
        axes.margins(y=0.12)
        axes.set_title(work)
        axes.set_ylabel("images a second")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{report['model']}, batch {report['batch']}, {report['size']} x {report['size']}, "
        f"{report['dtype']}\n{report['device']['kind']}, {report['date']}",
        fontsize=10,
    )
    return figure


def static_cycles(report: Mapping[str, Any]) -> Figure:
    """Bars of static cycles: ours, XLA's and the floor, a panel a kernel and direction, log scale.

    Args:
        report: What `bench.tpu.report.run` returns.

    Returns:
        The figure.
    """
    rows = report["rows"]
    panels = list(dict.fromkeys((row["kernel"], row["direction"]) for row in rows))
    bars = {
        "floor_cycles": "floor (arithmetic or traffic)",
        "cycles": "our kernels (without waiting for memory)",
        "xla_cycles": "XLA (its cost model)",
    }
    number = EngFormatter(places=0, sep="")
    figure = Figure(figsize=(12.0, 3.4 * len(panels)), dpi=_DPI, layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), 1), panels, strict=True):
        shown = [row for row in rows if (row["kernel"], row["direction"]) == panel]
        for i, (key, label) in enumerate(bars.items()):
            places = np.arange(len(shown)) + (i - 1) * 0.27
            heights = [row[key] or np.nan for row in shown]
            drawn = axes.bar(places, heights, 0.25, color=COLOURS[i], label=label)
            texts = [number(height) if height > 0 else "?" for height in heights]
            axes.bar_label(drawn, texts, fontsize=6, padding=1)
        axes.set_yscale("log")
        axes.margins(y=0.12)
        names = [f"{row['name']}\n{row['dtype']}".replace("_t_", "_t\n") for row in shown]
        axes.set_xticks(np.arange(len(shown)), names, fontsize=6)
        axes.set_title(" ".join(panel))
        axes.set_ylabel("static cycles")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(
        f"TPU {report['chip']}: the compiler's static figures, no measurement ({report['date']})"
    )
    return figure


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def _most_doubtful(labels: NDArray[Any], probabilities: NDArray[Any]) -> NDArray[np.intp]:
    """Indices by the probability of the truth, the wrong ones before all others."""
    truth = probabilities[np.arange(len(labels)), labels]
    right = probabilities.argmax(axis=1) == labels
    return np.lexsort((truth, right))


def _mark_shares(axes: Axes, field: NDArray[Any]) -> None:
    height, width = field.shape
    texts = []
    for share, (style, word) in zip(SHARES, (("-", "solid"), ("--", "dashed")), strict=True):
        side = contribution_side(field, share)
        corner = ((width - side) / 2 - 0.5, (height - side) / 2 - 0.5)
        axes.add_patch(
            Rectangle(corner, side, side, fill=False, edgecolor=SKY, linestyle=style, linewidth=1.5)
        )
        texts.append(f"{share:.0%} in {side} x {side} px ({word})")
    axes.set_xlabel("\n".join(texts))


def _scaled(band: ArrayLike, *, signed: bool) -> NDArray[np.float64]:
    """The first channel of a subband in [0, 1]; a signed one has zero in the middle."""
    values = np.asarray(band, np.float64)[..., 0]
    if signed:
        # The few largest edges may clip, or all others would be grey.
        return 0.5 + 0.5 * values / max(np.quantile(np.abs(values), 0.99), 1e-12)
    low, high = values.min(), values.max()
    return (values - low) / max(high - low, 1e-12)
