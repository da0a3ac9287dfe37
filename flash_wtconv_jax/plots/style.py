"""Colours, labels and files of every picture.

No pyplot: nothing here has global state, opens a window or needs a display. Colours are those of
Okabe and Ito, which colour-blind people tell apart, and hatches or labels say the same again.
"""

from io import BytesIO
from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pallas_kernels.common.files import check_folder, replacing

BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#CC79A7",
    "#56B4E9",
)
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
DPI = 150

drawn = matplotlib.style.context("default")
"""A decorator of functions that draw, by matplotlib's own settings and no matplotlibrc's."""


@drawn
def png(figure: Figure) -> bytes:
    """A picture as the content of a PNG file.

    Example:
        >>> png(Figure())[1:4]
        b'PNG'
    """
    picture = BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


@drawn
def save(figure: Figure, path: str | Path) -> None:
    """Writes a picture, whole or not at all; a picture that is there is replaced.

    Args:
        figure: The picture.
        path: The file to write; its extension names the format.

    Raises:
        FileNotFoundError: The folder that it goes into does not exist.
        ValueError: The extension names no format of matplotlib.
    """
    check_path(path)
    with replacing(Path(path), force=True) as temporary:
        figure.savefig(temporary)


def check_path(path: str | Path) -> None:
    """Raises the errors of `save` early, for those who compute for long before they draw.

    Args:
        path: The file that a picture is to be written to.

    Raises:
        FileNotFoundError: The folder that it goes into does not exist.
        ValueError: The extension names no format of matplotlib.
    """
    path = Path(path)
    check_folder(path)
    formats = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in formats:
        raise ValueError(
            f"{path} has the extension {path.suffix!r}, expected one of: {', '.join(formats)}"
        )


def label(axes: Axes, title: str, x: str, y: str) -> None:
    """Sets title, axis labels, grid and legend as every chart over epochs has them."""
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(True, color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
