"""Weights and arrays between JAX and PyTorch, by the one mapping of names in `checkpoints`."""

from collections.abc import Mapping
from typing import TypeVar, overload

import torch
from torch import Tensor, nn
from torch.utils.dlpack import DLDeviceType

from pallas_kernels.common.types import Tree
from torch_bridge.wtconv.layers import LAYERS, WTConv1d, WTConv2d, WTConv3d

Layer = WTConv1d | WTConv2d | WTConv3d
_Module = TypeVar("_Module", bound=nn.Module)


@overload
def from_jax(
    value: Mapping[str, Tree], module: None = None, *, wavelet: str = ..., stride: int = ...
) -> Layer: ...
@overload
def from_jax(value: Mapping[str, Tree], module: _Module, *, wavelet: str = ...) -> _Module: ...
@overload
def from_jax(value: Tree) -> Tensor: ...
def from_jax(
    value: Tree, module: nn.Module | None = None, *, wavelet: str = "haar", stride: int = 1
) -> Tree:
    """A PyTorch layer or model with the weights of Flax variables; or an array as a tensor.

    Args:
        value: `{"params": ...}` of a Flax `WTConv1d`, `WTConv2d` or `WTConv3d`, or of a WTConvNeXt,
            which needs a `module`. Or an array, which becomes a tensor on the same device that
            shares its memory: do not write into it.
        module: The module to load the variables into, strictly: a layer or a WTConvNeXt of any of
            the layouts of `checkpoints.from_torch`, as it is or inside of `torch.compile`,
            `AveragedModel` and the like. None makes a layer.
        wavelet: The wavelet of the Flax layer: variables do not hold it.
        stride: Its stride, which they do not hold either.

    Returns:
        `module`, or a new `WTConv1d`, `WTConv2d` or `WTConv3d` on the device of the variables, with
        copies of them, in the dtype of `base_kernel`; of an array a tensor.

    Raises:
        TypeError: Neither variables nor an array.
        ValueError: The variables are not those of one layer, or the module is of no known layout;
            every missing, surplus or misshapen name is in the message.
        RuntimeError: They do not fit the module; every name is in the message.

    Example:
        >>> layer = WTConv2d(4, 4, wt_levels=2, device="cpu")
        >>> x = torch.ones(1, 4, 9, 9)
        >>> bool(torch.equal(from_jax(to_jax(layer))(x), layer(x)))
        True
    """
    from flash_wtconv_jax import checkpoints
    from flash_wtconv_jax.checkpoints.tensors import bare_names

    if not isinstance(value, Mapping):
        if not hasattr(value, "__dlpack__"):
            raise TypeError(
                f"value is of type {type(value).__name__}, expected the variables of a layer or "
                "an array; of an nnx model checkpoints.variables_of(model) makes variables"
            )
        return torch.from_dlpack(value)
    if module is not None:
        own = module.state_dict()
        arrays = checkpoints.to_torch(value, wavelet=wavelet, like=own)
        # Wrappers keep counts beside the weights, which stay.
        inside = bare_names(own)
        beside = {name: tensor for name, tensor in own.items() if name not in inside}
        module.load_state_dict(beside | checkpoints.to_tensors(arrays))
        return module
    arrays = checkpoints.to_torch(value, layout="published", wavelet=wavelet)
    tensors = checkpoints.to_tensors(arrays)
    weight = tensors["base_conv.weight"]
    layer = LAYERS[weight.ndim - 2](
        len(weight),
        len(weight),
        weight.shape[2],
        stride,
        "base_conv.bias" in tensors,
        sum(name.startswith("wavelet_convs.") for name in tensors),
        wavelet,
        _device_of(value),
        weight.dtype,
    )
    layer.load_state_dict(tensors)
    return layer


def to_jax(value: nn.Module | Tensor) -> Tree:
    """The variables of the Flax layer or model that computes what a PyTorch module computes.

    Args:
        value: A `WTConv1d`, `WTConv2d` or `WTConv3d` of this package, or a layer or a WTConvNeXt of
            any of the layouts of `checkpoints.from_torch`, as it is or inside of `torch.compile`,
            `AveragedModel` and the like. Or a dense tensor, which becomes a JAX array on the same
            device that shares its memory: do not write into the tensor.
            One of 64 bits is copied to 32, unless JAX is told to have 64 (`jax_enable_x64`).

    Returns:
        `{"params": ...}` with NumPy arrays, ready for `apply` of the Flax layer with the same
        wavelet and stride; of a tensor a JAX array.

    Raises:
        TypeError: No module, but its state dict: `checkpoints.from_torch` takes one.
        ValueError: The state dict of the module is none of a known layout; or the tensor has gaps
            between its elements, or some of them twice.

    Example:
        >>> sorted(to_jax(WTConv2d(4, 4, kernel_size=3, wt_levels=0))["params"])
        ['base_bias', 'base_kernel', 'base_scale']
    """
    if isinstance(value, Tensor):
        from jax import dlpack

        if value.stride() != torch.empty_like(value, device="meta").stride():
            raise ValueError(
                f"value has shape {tuple(value.shape)} and strides {value.stride()}, expected a "
                "dense tensor, as JAX's arrays are; value.contiguous() is one"
            )
        return dlpack.from_dlpack(value.detach())
    from flash_wtconv_jax import checkpoints

    if not isinstance(value, nn.Module):
        raise TypeError(
            f"value is of type {type(value).__name__}, expected a torch.nn.Module or a tensor; of "
            "a state dict flash_wtconv_jax.checkpoints.from_torch makes variables"
        )
    state_dict = value.state_dict()
    wavelet = checkpoints.recognise(state_dict).wavelet
    return checkpoints.from_torch(state_dict, wavelet=wavelet)


def _device_of(variables: Mapping[str, Tree]) -> torch.device:
    """The device of the first array, if PyTorch has it too, else the CPU."""
    value: Tree = variables
    while isinstance(value, Mapping):
        value = next(iter(value.values()))
    try:
        kind, index = value.__dlpack_device__()
    # An array of a TPU, or of several devices.
    except (BufferError, RuntimeError, ValueError):
        return torch.device("cpu")
    return torch.device("cuda", index) if kind == DLDeviceType.kDLCUDA else torch.device("cpu")
