"""Arrays of any framework as NumPy arrays, and NumPy arrays as PyTorch tensors."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    import torch


def to_array(value: Any) -> np.ndarray:
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


def to_tensors(state_dict: Mapping[str, Any]) -> dict[str, "torch.Tensor"]:
    """PyTorch tensors for `Module.load_state_dict`, copied from the arrays of `to_torch`.

    Args:
        state_dict: Arrays by name.

    Returns:
        CPU tensors of the same dtypes, bfloat16 included.

    Raises:
        ModuleNotFoundError: PyTorch is not installed.

    Example:
        >>> to_tensors({"a": np.zeros(2, np.float32)})
        {'a': tensor([0., 0.])}
    """
    torch = import_torch()
    tensors = {}
    for name, value in state_dict.items():
        array = np.array(to_array(value), order="C")
        if array.dtype == ml_dtypes.bfloat16:
            tensors[name] = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        else:
            tensors[name] = torch.from_numpy(array)
    return tensors


def import_torch() -> Any:
    """PyTorch, which this package needs for `.pth` files alone."""
    try:
        import torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "PyTorch is needed here and not installed: pip install 'flash-wtconv[torch]', or use "
            "a .safetensors file, which needs nothing more",
            name="torch",
        ) from error
    return torch
