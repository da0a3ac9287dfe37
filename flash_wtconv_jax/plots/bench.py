"""Pictures of measurements: speedups, rooflines, throughput, static cycles."""

from collections.abc import Sequence
from itertools import product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, NullFormatter

from flash_wtconv_jax.plots.style import COLOURS, DPI, drawn
from pallas_kernels.common.types import Json, Keywords

_MARKERS = "osD^vP"
_LABEL_SHARE = 0.05
"""The share of its axis that a small label of a roofline is high."""


@drawn
def speedups(report: Json) -> Figure:
    """Bars of each contender's speed over the baseline, a panel a direction, log scale.

    Args:
        report: A report of `bench.wtconv.run`.

    Returns:
        The figure: speeds as users have them, where the report has such times.
    """
    # Reports of PyTorch's benchmark have one clock.
    as_users = report.get("users_clock") is not None
    rows = [row | row["users"] for row in report["rows"]] if as_users else report["rows"]
    directions = list(dict.fromkeys(row["direction"] for row in rows))
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    shapes = {row["shape"]: f"{tuple(row['x'])}\n{row['levels']} levels" for row in rows}
    figure = Figure(figsize=(2.0 + 2.0 * len(shapes), 6.4), dpi=DPI, layout="constrained")
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
    how = "\none jit, called back to back, caches warm, CUDA graphs on" if as_users else ""
    figure.suptitle(f"WTConv, {report['dtype']}, {device}, {report['date']}{how}")
    return figure


@drawn
def roofline(report: Json) -> Figure:
    """Multiply-adds a second of each contender under the device's two roofs, log scales.

    Args:
        report: A report of `bench.wtconv.run`.

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
        dpi=DPI,
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
            style: Keywords = {
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


@drawn
def throughput(report: Json) -> Figure:
    """Bars of images a second, a panel a kind of work.

    Args:
        report: A report of `bench.wtconvnext.run`.

    Returns:
        The figure: images as users have them, where the report has such times.
    """
    rows = [row | (row["users"] or {}) for row in report["rows"]]
    works = list(dict.fromkeys(row["work"] for row in rows))
    figure = Figure(figsize=(3.6 * len(works), 4.0), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(works), squeeze=False)[0]
    for axes, work in zip(panels, works, strict=True):
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


@drawn
def ladders(report: Json) -> Figure:
    """Bars of times, a panel a group of contenders, with the speed over the group's baseline.

    Args:
        report: A report of `bench.stylize.run`.

    Returns:
        The figure.
    """
    groups: dict[tuple[str, ...], list[Json]] = {}
    for row in report["rows"]:
        if "median_ms" in row:
            keys = ("work", "name", "dtype", "direction")
            groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    lines = [len(rows) + 2 for rows in groups.values()]
    figure = Figure(figsize=(8.0, 1.0 + 0.26 * sum(lines)), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=lines)[:, 0]
    for axes, (what, rows) in zip(panels, groups.items(), strict=True):
        names = [row["contender"] for row in rows]
        times = [row["median_ms"] for row in rows]
        own = [COLOURS[0] if name.startswith("flash") else "0.6" for name in names]
        bars = axes.barh(names, times, 0.7, color=own)
        texts = [
            f"{row['median_ms']:.3g} ms" + (f", {row['speedup']:.2f}x" if "speedup" in row else "")
            for row in rows
        ]
        axes.bar_label(bars, texts, fontsize=7, padding=2)
        axes.invert_yaxis()
        axes.margins(x=0.25)
        axes.tick_params(labelsize=7)
        axes.set_title(f"{', '.join(what)}; over {rows[0]['baseline']}", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"Style transfer, {report['device']['kind']}, {report['date']}")
    return figure


@drawn
def static_cycles(report: Json) -> Figure:
    """Bars of static cycles: ours, XLA's and the floor, a panel a kernel and direction, log scale.

    Args:
        report: A report of `aot.report.run`.

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
    figure = Figure(figsize=(12.0, 3.4 * len(panels)), dpi=DPI, layout="constrained")
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
