"""PyTorch state dicts in `.safetensors` and `.pth` files, and checkpoints of any kind by path."""

import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from flash_wtconv_jax.checkpoints.names import from_torch
from flash_wtconv_jax.checkpoints.tensors import import_torch, to_arrays, to_tensors, weights_of
from pallas_kernels.common.files import replacing, writing
from pallas_kernels.common.types import Tree

_SAFETENSORS = (".safetensors",)
_TORCH = (".pth", ".pt", ".pth.tar")
# Where training scripts, timm's among them, keep the weights in a larger dict; averaged ones first.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")


# What training scripts pickle beside the weights: arguments, paths, losses and random states.
_BESIDE = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.ndarray",
    *(
        f"{p}.multiarray.{n}"
        for p in ("numpy.core", "numpy._core")
        for n in ("scalar", "_reconstruct")
    ),
    *(f"{p}.{n}" for p in ("pathlib", "pathlib._local") for n in ("PosixPath", "WindowsPath")),
)


def load(
    path: str | os.PathLike[str], layout: str | None = None, *, wavelet: str = "haar"
) -> dict[str, Tree]:
    """Variables from a checkpoint of any kind.

    Args:
        path: `.safetensors` or `.pth` file with a PyTorch state dict, or an Orbax folder.
        layout: Layout of the state dict, recognised if None; see `from_torch`. A folder has none.
        wavelet: The wavelet that the frozen filters of a state dict must be, or that the folder
            names, if it names one.

    Returns:
        `{"params": ...}` of NumPy arrays, or the whole tree that an Orbax folder holds.

    Raises:
        FileNotFoundError: There is nothing at path.
        ValueError: It cannot be read or does not fit its layout.
    """
    from flash_wtconv_jax.checkpoints.orbax import restore, wavelet_of

    path = Path(path)
    if path.is_dir():
        if layout is not None:
            raise ValueError(
                f"layout is {layout!r}, but {path} is a folder of variables, which have none"
            )
        wavelet_of(path, wavelet)
        return restore(path)
    return from_torch(read_state_dict(path), layout, wavelet=wavelet)


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """A PyTorch state dict from a file, without running anything that the file holds.

    Args:
        path: `.safetensors`, or `.pth`, `.pt` or `.pth.tar` (which need PyTorch and are read with
            `weights_only=True`). Of a training checkpoint the weights alone are taken, averaged
            (EMA) ones first, and what wrappers put before and into names goes; see `from_torch`.

    Returns:
        NumPy arrays by name, bfloat16 as that of ml_dtypes.

    Raises:
        FileNotFoundError: There is no file at path.
        ModuleNotFoundError: `.pth` without PyTorch installed.
        ValueError: Unknown extension, a damaged file, or a pickle of more than tensors.
    """
    path = Path(path)
    read = _read_safetensors if is_safetensors(path) else _read_torch
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    state_dict = read(path)
    try:
        return weights_of(state_dict)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def write_state_dict(
    path: str | os.PathLike[str], state_dict: Mapping[str, object], *, force: bool = False
) -> None:
    """Writes a PyTorch state dict, whole or not at all.

    Args:
        path: `.safetensors`, or `.pth` or `.pt` (which need PyTorch).
        state_dict: Tensors or arrays by name, as `to_torch` returns them.
        force: Replace a file that is there.

    Raises:
        FileExistsError: There is a file at path and force is False, or there is a folder.
        FileNotFoundError: Its folder does not exist.
        ModuleNotFoundError: `.pth` without PyTorch installed.
        OSError: It cannot be written, for want of space perhaps.
        TypeError: The state dict is no mapping, but a module.
        ValueError: Unknown extension, or an entry is no tensor.
    """
    path = Path(path)
    write = _write_safetensors if is_safetensors(path) else _write_torch
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder, expected the name of a file")
    arrays = {n: np.array(array, order="C") for n, array in to_arrays(state_dict).items()}
    with replacing(path, force) as temporary, writing(path):
        write(temporary, arrays)


def is_state_dict(path: Path) -> bool:
    """Whether a path has the extension of a file that holds a PyTorch state dict."""
    return path.name.lower().endswith(_SAFETENSORS + _TORCH)


def is_safetensors(path: Path) -> bool:
    """Whether a state dict at path is `.safetensors`; `.pth` and `.pt` are the other way."""
    if not is_state_dict(path):
        raise ValueError(
            f"path {path} has extension {path.suffix!r}, expected .safetensors, .pth, .pt or "
            ".pth.tar"
        )
    return path.name.lower().endswith(_SAFETENSORS)


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole .safetensors file: {error}") from error
    # NumPy has no such dtype: it has no attribute, or the table of them no entry.
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds tensors of {', '.join(_dtypes(path))}, expected values of 16 bits or "
            "more: convert it where it comes from, with its scales if it has some"
        ) from error


def _dtypes(path: Path) -> list[str]:
    """The dtypes in a `.safetensors` file, as the format names them."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return sorted({file.get_slice(name).get_dtype() for name in file.keys()})  # noqa: SIM118


def _write_safetensors(path: Path, arrays: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    # The mark that PyTorch's own readers of the format look for.
    save_file(arrays, path, metadata={"format": "pt"})


def _read_torch(path: Path) -> dict[str, Tree]:
    torch = import_torch()
    try:
        with warnings.catch_warnings():
            # It warns of pickles that it then refuses.
            warnings.simplefilter("ignore", UserWarning)
            with torch.serialization.safe_globals([(NotLoaded, name) for name in _BESIDE]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, or is damaged: it was not loaded, for such a file "
            "can run code. Where it comes from, save model.state_dict() alone"
        ) from error
    except Exception as error:  # PyTorch raises whatever it stumbles over in a damaged file.
        if "TorchScript" in str(error):
            raise ValueError(
                f"{path} is a TorchScript program, expected a state dict: save "
                "torch.jit.load(path).state_dict() where it comes from"
            ) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a whole PyTorch file: {reason}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a state dict")
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping):
            return dict(content[wrapper])
    return dict(content)


class NotLoaded:
    """Stands for an object beside the weights, which is neither made nor kept."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Takes what the object would be made of."""

    def __setstate__(self, state: object) -> None:
        """Takes what it would hold."""


def _write_torch(path: Path, arrays: dict[str, np.ndarray]) -> None:
    torch = import_torch()
    # Through Python's file, whose errors say more than PyTorch's.
    with path.open("wb") as file:
        torch.save(to_tensors(arrays), file)
