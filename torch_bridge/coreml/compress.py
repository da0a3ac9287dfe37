"""Smaller weights by coremltools: palettes of 4, 6 or 8 bits, or integers of 8."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np

from torch_bridge.coreml.evaluator import Package
from torch_bridge.coreml.inputs import formula
from torch_bridge.coreml.program import Array
from torch_bridge.coreml.tools import quiet


class Compression(StrEnum):
    """The form of compressed weights: the nearest of 16, 64 or 256 numbers, or an integer."""

    PALETTE4 = "palettize4"
    PALETTE6 = "palettize6"
    PALETTE8 = "palettize8"
    INT8 = "int8"


class Change(NamedTuple):
    """The outcome of a compression.

    Attributes:
        before: Bytes of the package.
        after: Bytes of the compressed one.
        what: What is compared: "logits" or "outputs".
        most: The greatest change of a number among them.
        rms: The root mean square of what they were before.
    """

    before: int
    after: int
    what: str
    most: float
    rms: float


def compressed(model: Any, compression: Compression) -> Any:
    """A model with weights of fewer bits; arrays of fewer than 2049 numbers stay as they are.

    Args:
        model: What `package.converted` returns.
        compression: How.

    Returns:
        A model of coremltools.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed, which makes palettes.
    """
    with quiet() as ct, _warnings_of_axes():
        optimize = ct.optimize.coreml
        if compression is Compression.INT8:
            int8 = optimize.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8")
            return optimize.linear_quantize_weights(
                model, optimize.OptimizationConfig(global_config=int8)
            )
        bits = int(compression.removeprefix("palettize"))
        palette = optimize.OpPalettizerConfig(mode="kmeans", nbits=bits)
        return optimize.palettize_weights(model, optimize.OptimizationConfig(global_config=palette))


@contextmanager
def _warnings_of_axes() -> Iterator[None]:
    """Sends what coremltools tells the root logger, of weights used twice, to its own."""
    from coremltools.optimize import _utils

    with patch.object(_utils, "_logger", logging.getLogger("coremltools")):
        yield


def change(before: Path, after: Path) -> Change:
    """Compares a package with its compressed twin, on the input that `inputs.formula` makes.

    Args:
        before: The package as it was.
        after: The compressed one.

    Returns:
        Sizes, and the change of the logits, or of the outputs of what is no classifier.
    """
    plain, other = map(Package, (before, after))
    inputs = example(plain)
    one, two = (
        np.concatenate([v.ravel() for v in package.predict(inputs, package.results).values()])
        for package in (plain, other)
    )
    most = np.abs(two.astype(np.float64) - one).max()
    rms = np.sqrt(np.mean(one.astype(np.float64) ** 2))
    classifies = plain.results != tuple(plain.outputs) or "logits" in plain.outputs
    what = "logits" if classifies else "outputs"
    return Change(size_of(before), size_of(after), what, float(most), float(rms))


def example(package: Package) -> dict[str, Array]:
    """Inputs of a package: numbers of `inputs.formula`, of images from 0 to 255."""
    images = package.images
    found = {}
    for name, (_, *shape) in package.inputs.items():
        numbers = formula(*shape)
        found[name] = (numbers + 1) * np.float32(127.5) if name in images else numbers
    return found


def size_of(path: Path) -> int:
    """The bytes of all files of a package."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
