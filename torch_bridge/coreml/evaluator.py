"""Evaluates a Core ML package in NumPy, on any machine: its saved program, with its saved weights.

Sums are in float32 and every value is rounded to the dtype that the program declares, so that a
float16 package is as exact here as one on a device that sums in float32.
"""

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from torch_bridge.coreml.operations import OPERATIONS
from torch_bridge.coreml.program import Argument, Array, Operation, Result, read

__all__ = ["Package"]

Shape = tuple[int, ...]


class Package:
    """A package that can be evaluated.

    Args:
        path: An `.mlpackage`.

    Attributes:
        constants: The program's constants by name, those decompressed that are compressed.
        operations: What is computed with them, in the order in which it is.

    Raises:
        FileNotFoundError: There is no such folder.
        ModuleNotFoundError: coremltools, which reads it, is not installed.
        NotImplementedError: It has an operation that is not known here; its name is in the message.
        ValueError: It is no package, a damaged one or that of another kind of model.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._program = read(path)
        self.constants: dict[str, Array] = {}
        steps = []
        names = set(self.inputs)
        for operation in self._program.operations:
            _check_known(operation)
            _check_whole(operation, names)
            names |= {result.name for result in operation.results}
            if operation.type.startswith("const"):
                self.constants |= _computed(operation, self.constants)
            else:
                steps.append(operation)
        self.operations = tuple(steps)
        self._last_use = _last_use(self.operations)

    @property
    def inputs(self) -> dict[str, Shape]:
        """The default shape of each input by name; an image is `(1, channels, height, width)`."""
        return {one.name: _shape(one.type) for one in self._program.description.input}

    @property
    def outputs(self) -> dict[str, Shape]:
        """The shape of each output by name, `()` of a label or where it depends on the input's."""
        return {one.name: _shape(one.type) for one in self._program.description.output}

    @property
    def images(self) -> frozenset[str]:
        """The inputs that are images, of numbers from 0 to 255."""
        described = self._program.description.input
        return frozenset(one.name for one in described if one.type.HasField("imageType"))

    @property
    def results(self) -> tuple[str, ...]:
        """The names of what it computes: its outputs, of a classifier its logits."""
        softmax = [one.arguments["x"] for one in self.operations if one.type == "softmax"]
        return tuple(map(str, softmax)) or self._program.outputs

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata that the package holds under its own keys, e.g. "flash_wtconv.kind"."""
        return dict(self._program.description.metadata.userDefined)

    def predict(
        self, inputs: Mapping[str, Array], names: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """The outputs for inputs.

        Args:
            inputs: An array for each input by name, of its default shape or another one that the
                package takes; an image as `[1, channels, height, width]` of numbers from 0 to 255.
            names: What to return, any values of the program; None is its outputs.

        Returns:
            Arrays by name. Of a classifier the label, and the probabilities in the order of the
            labels.

        Raises:
            ValueError: A missing or surplus input, one of a shape that the package does not take
                or of no numbers; or a value comes out in another shape than the program declares.
        """
        values = self.constants | self._checked(inputs)
        wanted = self._program.outputs if names is None else tuple(names)
        for operation, last in zip(self.operations, self._last_use, strict=True):
            values |= _computed(operation, values)
            for name in set(last).difference(wanted):
                del values[name]
        unknown = sorted(set(wanted).difference(values))
        if unknown:
            raise ValueError(f"names: {unknown} are no values of the program")
        return {name: values[name] for name in wanted}

    def _checked(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        described = {one.name: one.type for one in self._program.description.input}
        if set(inputs) != set(described):
            raise ValueError(f"inputs are {sorted(inputs)}, expected {sorted(described)}")
        for name, kind in described.items():
            problem = _problem(np.shape(inputs[name]), kind)
            if problem:
                raise ValueError(f"input {name} has shape {np.shape(inputs[name])}, {problem}")
        return {name: np.asarray(value, np.float32) for name, value in inputs.items()}


def _check_known(operation: Operation) -> None:
    function = OPERATIONS.get(operation.type)
    made = ", ".join(result.name for result in operation.results)
    if function is None:
        raise NotImplementedError(
            f"operation {operation.type} (which computes {made}) is not known to the evaluator, "
            f"which knows {', '.join(sorted(OPERATIONS))}"
        )
    surplus = set(operation.arguments) - set(inspect.signature(function).parameters)
    if surplus:
        raise NotImplementedError(
            f"operation {operation.type} (which computes {made}) has arguments that the evaluator "
            f"does not know: {', '.join(sorted(surplus))}"
        )


def _check_whole(operation: Operation, names: set[str]) -> None:
    """Raises where an argument is missing, or names nothing that is computed before."""
    parameters = inspect.signature(OPERATIONS[operation.type]).parameters.values()
    needed = {one.name for one in parameters if one.default is one.empty}
    missing = needed - set(operation.arguments)
    for argument in operation.arguments.values():
        several = argument if isinstance(argument, list) else [argument]
        missing |= {one for one in several if isinstance(one, str)} - names
    if missing:
        raise ValueError(
            f"operation {operation.type} lacks {', '.join(sorted(missing))}: the program is "
            "damaged, export it again"
        )


def _computed(operation: Operation, values: Mapping[str, Array]) -> dict[str, Array]:
    """The results of an operation, by name."""
    arguments = {name: _taken(one, values) for name, one in operation.arguments.items()}
    # A float16 beyond its largest number is infinite on a device too.
    with np.errstate(over="ignore"):
        found = OPERATIONS[operation.type](**arguments)
        several = found if isinstance(found, tuple) else (found,)
        return {
            result.name: _declared(result, np.asarray(value), operation)
            for result, value in zip(operation.results, several, strict=True)
        }


def _taken(argument: Argument, values: Mapping[str, Array]) -> Any:
    """An argument's numbers, float16 as float32, which sums are in."""
    if isinstance(argument, list):
        return [_taken(one, values) for one in argument]
    value = values[argument] if isinstance(argument, str) else argument
    if value.dtype == np.float16:
        return value.astype(np.float32)
    return value


def _declared(result: Result, value: Array, operation: Operation) -> Array:
    """A computed value in the dtype that is declared, if it has the shape."""
    fits = len(value.shape) == len(result.shape) and all(
        n in (None, own) for n, own in zip(result.shape, value.shape, strict=True)
    )
    if result.dtype is None:
        return value
    if not fits:
        raise ValueError(
            f"operation {operation.type} computes {result.name} of shape {value.shape}, but the "
            f"program declares {result.shape}"
        )
    return value if result.dtype is np.str_ else value.astype(result.dtype, copy=False)


def _last_use(operations: Sequence[Operation]) -> list[list[str]]:
    """The names of the values that each operation is the last to take, or that none takes."""
    last: dict[str, int] = {}
    for place, operation in enumerate(operations):
        last |= {result.name: place for result in operation.results}
        for argument in operation.arguments.values():
            several = argument if isinstance(argument, list) else [argument]
            last |= {one: place for one in several if isinstance(one, str)}
    names: list[list[str]] = [[] for _ in operations]
    for name, place in last.items():
        names[place].append(name)
    return names


def _shape(kind: Any) -> Shape:
    """The shape that Apple's description of an input or output gives."""
    match kind.WhichOneof("Type"):
        case "multiArrayType":
            return tuple(kind.multiArrayType.shape)
        case "imageType":
            image = kind.imageType
            return 1, _image_channels(image), image.height, image.width
        case _:
            return ()


def _image_channels(image: Any) -> int:
    return 3 if image.ColorSpace.Name(image.colorSpace) in ("RGB", "BGR") else 1


def _problem(shape: Shape, kind: Any) -> str | None:
    """The reason why an input cannot have a shape."""
    array = kind.multiArrayType
    if kind.WhichOneof("Type") == "imageType":
        sizes = kind.imageType.enumeratedSizes.sizes
        channels = _image_channels(kind.imageType)
        known: list[Shape] = [(1, channels, size.height, size.width) for size in sizes]
        ranges = None
    else:
        known = [tuple(one.shape) for one in array.enumeratedShapes.shapes]
        ranges = [(one.lowerBound, one.upperBound) for one in array.shapeRange.sizeRanges]
    if ranges:
        fits = len(shape) == len(ranges) and all(
            low <= n and (high < 0 or n <= high)
            for n, (low, high) in zip(shape, ranges, strict=False)
        )
        return None if fits else f"expected one within {ranges}"
    known = known or [_shape(kind)]
    if shape in known:
        return None
    others = f" or one of {len(known) - 1} others up to {max(known)}" if len(known) > 1 else ""
    return f"expected {known[0]}{others}"
