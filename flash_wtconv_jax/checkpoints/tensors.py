"""Arrays of any framework as NumPy arrays, and NumPy arrays as PyTorch tensors."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from pallas_kernels.common.types import Tree

if TYPE_CHECKING:
    import torch


def to_array(value: object) -> np.ndarray:
    """A NumPy array of the same values and dtype, which may share memory with its source.

    Args:
        value: PyTorch tensor on any device, JAX or NumPy array, or a number.

    Returns:
        NumPy array; bfloat16 is that of ml_dtypes, as in JAX.
    """
    if not hasattr(value, "detach"):
        return np.asarray(value)
    import torch

    tensor = value.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        # NumPy has no bfloat16 of its own, so the bits travel as integers.
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def to_arrays(state_dict: Mapping[str, object]) -> dict[str, np.ndarray]:
    """The tensors of a state dict as NumPy arrays by name, which may share memory with them.

    Args:
        state_dict: Tensors, arrays or numbers by name.

    Returns:
        NumPy arrays by name.

    Raises:
        TypeError: It is no mapping, but a module or a path.
        ValueError: An entry is no tensor.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict is a {type(state_dict).__name__}, expected tensors by name: "
            "read_state_dict(path) reads a file, model.state_dict() gives that of a module"
        )
    arrays = {}
    for name, value in state_dict.items():
        if isinstance(value, Mapping) or (array := to_array(value)).dtype.kind in "OSU":
            raise ValueError(
                f"state_dict[{name!r}] is of type {type(value).__name__}, expected a tensor; of a "
                "training checkpoint hand on the tensors by name alone"
            )
        arrays[str(name)] = array
    return arrays


def check_nested(variables: Tree, name: str = "variables") -> None:
    """Raises TypeError, with advice for those who have a model, unless it is a dict."""
    if not isinstance(variables, Mapping):
        raise TypeError(
            f"{name}: expected a nested dict of arrays, got {type(variables).__name__}; of an nnx "
            "model checkpoints.variables_of(model) makes one"
        )


def to_tensors(state_dict: Mapping[str, object]) -> dict[str, "torch.Tensor"]:
    """PyTorch tensors for `Module.load_state_dict`, copied from the arrays of `to_torch`.

    Args:
        state_dict: Arrays by name.

    Returns:
        CPU tensors of the same dtypes, bfloat16 included.

    Raises:
        ModuleNotFoundError: PyTorch is not installed.
        TypeError: It is no mapping, but a module or a path.
        ValueError: An entry is no tensor.

    Example:
        >>> to_tensors({"a": np.zeros(2, np.float32)})
        {'a': tensor([0., 0.])}
    """
    torch = import_torch()
    tensors = {}
    for name, value in to_arrays(state_dict).items():
        array = np.array(value, order="C")
        if array.dtype == ml_dtypes.bfloat16:
            tensors[name] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        else:
            tensors[name] = torch.from_numpy(array)
    return tensors


def import_torch() -> Any:
    """The module torch, which this package needs for `.pth` files and bfloat16 tensors alone."""
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "PyTorch is needed here and not installed: pip install 'flash-wtconv[torch]', or use "
            "a .safetensors file, which needs nothing more",
            name="torch",
        ) from error
    return torch
