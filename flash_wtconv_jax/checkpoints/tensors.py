"""Arrays of any framework as NumPy arrays, and NumPy arrays as PyTorch tensors."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import ml_dtypes
import numpy as np

from pallas_kernels.common.types import Tree

if TYPE_CHECKING:
    import torch


class _Prefix(NamedTuple):
    """A prefix that stands before the names of whatever is inside a wrapper.

    Attributes:
        prefix: The prefix.
        kept: What may stand beside names with it, and stays as it is.
        dropped: What may stand beside them, and is no part of the network inside.
    """

    prefix: str
    kept: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


_PREFIXES = (
    # DistributedDataParallel, and AveragedModel, which counts its updates.
    _Prefix("module.", dropped=("n_averaged",)),
    # Lightning and others.
    _Prefix("model."),
    # mmsegmentation, mmdetection and mmpretrain, whose classifier has the names of timm's.
    _Prefix(
        "backbone.",
        kept=("head.",),
        dropped=(
            *("decode_head.", "auxiliary_head.", "neck.", "rpn_head.", "roi_head.", "bbox_head."),
            *("mask_head.", "data_preprocessor."),
        ),
    ),
)
# What torch.compile, checkpointing and FSDP put in front of any part of a name.
_INSERTED = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.|_fsdp_wrapped_module\.")


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """The names of tensors without what wrappers put before and into them.

    Args:
        names: Names of a state dict.

    Returns:
        The bare name by the name, of those that belong to the network inside all wrappers.

    Example:
        >>> bare_names(["n_averaged", "module._orig_mod.base_scale"])
        {'module._orig_mod.base_scale': 'base_scale'}
    """
    bare = {name: _INSERTED.sub("", name) for name in names}
    while wrapper := next((w for w in _PREFIXES if _applies(w, bare.values())), None):
        bare = {
            name: inner.removeprefix(wrapper.prefix)
            for name, inner in bare.items()
            if not inner.startswith(wrapper.dropped)
        }
    return bare


def _applies(wrapper: _Prefix, names: Collection[str]) -> bool:
    """Whether some names have the prefix of a wrapper, and all others may stand beside them."""
    others = [name for name in names if not name.startswith(wrapper.prefix)]
    expected = wrapper.kept + wrapper.dropped
    return len(others) < len(names) and all(name.startswith(expected) for name in others)


def to_array(value: object) -> np.ndarray:
    """A NumPy array of the same values and dtype, which may share memory with its source.

    Args:
        value: PyTorch tensor on any device, JAX or NumPy array, or a number.

    Returns:
        NumPy array in this machine's order of bytes; bfloat16 is that of ml_dtypes, as in JAX.

    Raises:
        ValueError: A tensor without plain values: quantized, sparse, of 8 bits or of none.
    """
    if not hasattr(value, "detach"):
        array = np.asarray(value)
        return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    import torch

    tensor = cast(torch.Tensor, value)
    # PyTorch tells these apart by attributes, not by classes.
    unfit = {
        "it is on the meta device, which holds no values: load them first": tensor.is_meta,
        f"it is quantized ({tensor.dtype}): tensor.dequantize()": tensor.is_quantized,
        f"it is sparse ({tensor.layout}): tensor.to_dense()": tensor.layout != torch.strided,
        f"it is {tensor.dtype}: tensor.float(), times its scale if it has one": (
            tensor.is_floating_point() and tensor.itemsize < 2
        ),
    }
    for reason, holds in unfit.items():
        if holds:
            raise ValueError(
                f"expected a dense tensor with values of 16 bits or more, but {reason}"
            )
    tensor = tensor.detach().cpu().contiguous()
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
        if not isinstance(name, str):
            raise ValueError(
                f"state_dict has the key {name!r}, expected names: this is a list of tensors or "
                "the state of an optimizer, which says of no tensor what it is"
            )
        try:
            array = None if isinstance(value, Mapping) else to_array(value)
        except ValueError as error:
            raise ValueError(f"state_dict[{name!r}]: {error}") from None
        if array is None or array.dtype.kind in "OSU":
            raise ValueError(
                f"state_dict[{name!r}] is of type {type(value).__name__}, expected a tensor; of a "
                "training checkpoint hand on the tensors by name alone"
            )
        arrays[name] = array
    return arrays


def weights_of(state_dict: Mapping[str, object]) -> dict[str, np.ndarray]:
    """The arrays of `to_arrays` by their bare names; two of one name are a ValueError."""
    arrays = to_arrays(state_dict)
    result: dict[str, np.ndarray] = {}
    for name, bare in bare_names(arrays).items():
        if bare in result:
            raise ValueError(f"state_dict has {bare!r} twice, the second time as {name!r}")
        result[bare] = arrays[name]
    return result


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
