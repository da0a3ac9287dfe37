"""Reads the program and the weights of an `.mlpackage`: MIL operations with NumPy's arrays."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from torch_bridge.coreml.tools import quiet

Array = np.ndarray
Argument = str | Array | list[str | Array]
"""The name of a value, a constant, or several of them."""

_DTYPES = {
    "BOOL": np.bool_,
    "STRING": np.str_,
    "FLOAT16": np.float16,
    "FLOAT32": np.float32,
    "INT8": np.int8,
    "INT16": np.int16,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "UINT16": np.uint16,
    "UINT32": np.uint32,
}
_READERS = {
    "FLOAT16": "read_fp16_data",
    "FLOAT32": "read_float_data",
    "INT8": "read_int8_data",
    "INT32": "read_int32_data",
    "UINT8": "read_uint8_data",
    "UINT16": "read_uint16_data",
}
"""Which function of coremltools reads weights of a type."""


class Result(NamedTuple):
    """The declaration of a value that an operation computes.

    Attributes:
        name: Its name.
        dtype: Its dtype; None of a dictionary.
        shape: Its shape, None for an axis that is told when the program runs.
    """

    name: str
    dtype: type[np.generic] | None
    shape: tuple[int | None, ...]


class Operation(NamedTuple):
    """An operation of MIL.

    Attributes:
        type: Its name in MIL, e.g. "conv".
        arguments: Its arguments by their names in MIL, those that the file calls attributes too.
        results: What it computes.
    """

    type: str
    arguments: dict[str, Argument]
    results: tuple[Result, ...]


class Program(NamedTuple):
    """The function `main` of a package.

    Attributes:
        description: The message `ModelDescription` of Apple's format: the interface and metadata.
        operations: In the order in which they run.
        outputs: Names of the values that it returns.
    """

    description: Any
    operations: tuple[Operation, ...]
    outputs: tuple[str, ...]


def read(path: str | os.PathLike[str]) -> Program:
    """The program of a package.

    Args:
        path: An `.mlpackage`.

    Returns:
        Its program, with its weights as arrays.

    Raises:
        FileNotFoundError: There is no such folder.
        ModuleNotFoundError: coremltools is not installed.
        ValueError: It is no package, a damaged one or that of another kind of model.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no package {path}: a package is a folder, NAME.mlpackage")
    with quiet() as ct:
        from coremltools.libmilstoragepython import _BlobStorageReader
        from coremltools.libmodelpackage import ModelPackage

        spec = ct.proto.Model_pb2.Model()
        try:
            root = Path(ModelPackage(str(path)).getRootModel().path())
            spec.ParseFromString(root.read_bytes())
            main = spec.mlProgram.functions["main"]
            block = main.block_specializations[main.opset]
            if not block.outputs:
                raise ValueError("it holds no ML program")
            weights = _Weights(root.parent, _BlobStorageReader)
            operations = tuple(_operation(one, weights) for one in block.operations)
        # The libraries raise whatever they stumble over.
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path} is no package that can be read: {reason}") from error
    return Program(spec.description, operations, tuple(block.outputs))


class _Weights:
    """The files of weights beside a model, each opened once."""

    def __init__(self, folder: Path, reader: Any) -> None:
        self._folder, self._reader = folder, reader
        self._open: dict[str, Any] = {}

    def read(self, name: str, offset: int, dtype: str) -> Array:
        """The numbers of a type that lie in a file from an offset on."""
        if dtype not in _READERS:
            raise ValueError(f"weights of {dtype} are not known here")
        if name not in self._open:
            file = self._folder / name.removeprefix("@model_path/")
            self._open[name] = self._reader(str(file))
        values = np.asarray(getattr(self._open[name], _READERS[dtype])(offset))
        # Of float16 the bits, as integers.
        return values.view(np.float16) if dtype == "FLOAT16" else values


def _operation(message: Any, weights: _Weights) -> Operation:
    arguments = {name: _argument(one, weights) for name, one in message.inputs.items()}
    for name, value in message.attributes.items():
        if name != "name":
            arguments[name] = _constant(value, weights)
    return Operation(message.type, arguments, tuple(map(_result, message.outputs)))


def _argument(message: Any, weights: _Weights) -> Argument:
    bound: list[str | Array] = [
        one.name if one.WhichOneof("binding") == "name" else _constant(one.value, weights)
        for one in message.arguments
    ]
    return bound[0] if len(bound) == 1 else bound


def _result(message: Any) -> Result:
    kind = message.type.WhichOneof("type")
    if kind != "tensorType":
        return Result(message.name, None, ())
    tensor = message.type.tensorType
    shape = tuple(
        axis.constant.size if axis.WhichOneof("dimension") == "constant" else None
        for axis in tensor.dimensions
    )
    return Result(message.name, _DTYPES[_type_name(tensor)], shape)


def _constant(value: Any, weights: _Weights) -> Array:
    """The array of a constant: a tensor, here or in a file, or a list of texts."""
    if value.type.WhichOneof("type") == "listType":
        return np.array([_constant(one, weights) for one in value.immediateValue.list.values])
    tensor = value.type.tensorType
    name = _type_name(tensor)
    shape = [axis.constant.size for axis in tensor.dimensions]
    if value.WhichOneof("value") == "blobFileValue":
        blob = value.blobFileValue
        return weights.read(blob.fileName, blob.offset, name).reshape(shape)
    immediate = value.immediateValue.tensor
    numbers = getattr(immediate, immediate.WhichOneof("value")).values
    if isinstance(numbers, bytes):
        return np.frombuffer(numbers, _DTYPES[name]).reshape(shape)
    return np.array(numbers, _DTYPES[name]).reshape(shape)


def _type_name(tensor: Any) -> str:
    """The name of a tensor's dtype in Apple's format."""
    kinds: Mapping[int, str] = (
        type(tensor).DESCRIPTOR.fields_by_name["dataType"].enum_type.values_by_number
    )
    return kinds[tensor.dataType].name  # type: ignore[attr-defined]
