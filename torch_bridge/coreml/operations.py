"""The MIL operations that our packages use, in NumPy.

Each function takes the arguments that MIL names, those that MIL may leave out with their defaults,
and computes in float32; the evaluator rounds what it returns to the dtype that is declared.
What they do is Apple's: see the reference of coremltools' `converters.mil.mil.ops.defs`.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import erf

Array = np.ndarray


def conv(
    x: Array,
    weight: Array,
    strides: Sequence[int] = (1, 1),
    pad_type: Array | str = "valid",
    pad: Sequence[int] = (0, 0, 0, 0),
    dilations: Sequence[int] = (1, 1),
    groups: int = 1,
    bias: Array | None = None,
) -> Array:
    """Cross-correlation of `[N, C, H, W]` with `[O, C / groups, h, w]`, tap by tap."""
    extent = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    x = np.pad(x, [(0, 0), (0, 0), *_around(pad_type, pad)])
    size = [(n - e) // s + 1 for n, e, s in zip(x.shape[2:], extent, strides, strict=True)]
    taps = weight.reshape(int(groups), -1, *weight.shape[1:])
    y = np.zeros((len(x), taps.shape[0], taps.shape[1], *size), np.float32)
    for i, j in np.ndindex(*weight.shape[2:]):
        rows, columns = (
            slice(t * d, t * d + (n - 1) * s + 1, s)
            for t, d, n, s in zip((i, j), dilations, size, strides, strict=True)
        )
        y += _mixed(taps[..., i, j], x[..., rows, columns])
    y = y.reshape(len(x), len(weight), *size)
    return y if bias is None else y + bias[:, None, None]


def conv_transpose(
    x: Array,
    weight: Array,
    strides: Sequence[int] = (1, 1),
    pad_type: Array | str = "valid",
    pad: Sequence[int] = (0, 0, 0, 0),
    dilations: Sequence[int] = (1, 1),
    groups: int = 1,
    bias: Array | None = None,
    output_shape: Sequence[int] | None = None,
) -> Array:
    """The transpose of `conv`: `[N, C, H, W]` and `[C, O / groups, h, w]`, unpadded."""
    if np.any(_around(pad_type, pad)):
        raise NotImplementedError(f"pad {list(pad)} of a transposed convolution is not known")
    taps = weight.reshape(int(groups), -1, *weight.shape[1:]).swapaxes(1, 2)
    size = [
        (n - 1) * s + (k - 1) * d + 1
        for n, s, k, d in zip(x.shape[2:], strides, weight.shape[2:], dilations, strict=True)
    ]
    y = np.zeros((len(x), taps.shape[0], taps.shape[1], *size), np.float32)
    for i, j in np.ndindex(*weight.shape[2:]):
        rows, columns = (
            slice(t * d, t * d + (n - 1) * s + 1, s)
            for t, d, n, s in zip((i, j), dilations, x.shape[2:], strides, strict=True)
        )
        y[..., rows, columns] += _mixed(taps[..., i, j], x)
    y = y.reshape(len(x), -1, *size)
    if output_shape is not None and tuple(output_shape) != y.shape:
        raise NotImplementedError(f"output_shape {list(output_shape)}, which crops, is not known")
    return y if bias is None else y + bias[:, None, None]


def _mixed(tap: Array, x: Array) -> Array:
    """The channels of `[N, groups * I, H, W]` mixed by `[groups, O, I]`, `[N, groups, O, H, W]`."""
    groups, outside, inside = tap.shape
    x = x.reshape(len(x), groups, inside, *x.shape[2:])
    if inside == 1:
        return x * tap[..., None]
    mixed = tap @ x.reshape(len(x), groups, inside, -1)
    return mixed.reshape(len(x), groups, outside, *x.shape[3:])


def _around(pad_type: Array | str, pad: Sequence[int]) -> list[tuple[int, int]]:
    """Zeros before and after each spatial axis."""
    if pad_type not in ("valid", "custom"):
        raise NotImplementedError(f"pad_type {pad_type} is not known to the evaluator")
    pairs = zip(pad[0::2], pad[1::2], strict=True)
    return [(0, 0), (0, 0)] if pad_type == "valid" else list(pairs)


def pad(
    x: Array, pad: Sequence[int], mode: Array | str = "constant", constant_val: float = 0.0
) -> Array:
    """The last axes with numbers before and after them: constant or mirrored ones."""
    pairs = list(zip(pad[0::2], pad[1::2], strict=True))
    widths = [(0, 0)] * (x.ndim - len(pairs)) + pairs
    if mode == "constant":
        return np.pad(x, widths, constant_values=constant_val)
    if mode == "reflect":
        return np.pad(x, widths, "reflect")
    raise NotImplementedError(f"pad of mode {mode} is not known to the evaluator")


def slice_by_size(x: Array, begin: Sequence[int], size: Sequence[int]) -> Array:
    """`size` numbers of each axis from `begin` on; all that follow where it is -1."""
    pairs = zip(begin, size, strict=True)
    return x[tuple(slice(b, None if n == -1 else b + n) for b, n in pairs)]


def upsample_nearest_neighbor(
    x: Array, scale_factor_height: float = 1, scale_factor_width: float = 1
) -> Array:
    """`[N, C, H, W]` with each row and column repeated."""
    for axis, factor in ((2, scale_factor_height), (3, scale_factor_width)):
        if factor != int(factor):
            raise NotImplementedError(f"scale factor {factor}: whole numbers alone are known")
        x = np.repeat(x, int(factor), axis)
    return x


def layer_norm(
    x: Array,
    axes: Sequence[int],
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: float = 1e-5,
) -> Array:
    """X less its mean over the axes, over its deviation, times gamma plus beta."""
    axes = tuple(int(axis) % x.ndim for axis in axes)
    shape = [n if axis in axes else 1 for axis, n in enumerate(x.shape)]
    centred = x - x.mean(axis=axes, keepdims=True)
    variance = np.square(centred).mean(axis=axes, keepdims=True)
    y = centred / np.sqrt(variance + epsilon)
    if gamma is not None:
        y = y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


def instance_norm(
    x: Array, gamma: Array | None = None, beta: Array | None = None, epsilon: float = 1e-5
) -> Array:
    """`[N, C, H, W]`, each channel of each image normalised by itself."""
    y = layer_norm(x, range(2, x.ndim), epsilon=epsilon)
    if gamma is not None:
        y = y * gamma[:, None, None]
    return y if beta is None else y + beta[:, None, None]


def gelu(x: Array, mode: Array | str = "EXACT") -> Array:
    """The product of x and the normal distribution up to x."""
    if mode != "EXACT":
        raise NotImplementedError(f"gelu of mode {mode} is not known to the evaluator")
    return 0.5 * x * (1 + erf(x / np.float32(np.sqrt(2))))


def softmax(x: Array, axis: int = -1) -> Array:
    """Exponentials along an axis, as parts of their sum."""
    powers = np.exp(x - x.max(axis=int(axis), keepdims=True))
    return powers / powers.sum(axis=int(axis), keepdims=True)


def reduce_mean(x: Array, axes: Sequence[int], keep_dims: bool = False) -> Array:
    """The mean over the axes."""
    return x.mean(axis=tuple(map(int, axes)), keepdims=bool(keep_dims))


def reduce_l2_norm(x: Array, axes: Sequence[int], keep_dims: bool = False) -> Array:
    """The root of the sum of squares over the axes."""
    return np.sqrt(np.square(x).sum(axis=tuple(map(int, axes)), keepdims=bool(keep_dims)))


def clip(x: Array, alpha: float, beta: float) -> Array:
    """x, but alpha where it is less, and beta where it is more."""
    return np.clip(x, alpha, beta)


def squeeze(x: Array, axes: Sequence[int] | None = None) -> Array:
    """X without axes of size 1."""
    return np.squeeze(x, None if axes is None else tuple(map(int, axes)))


def cast(x: Array, dtype: Array | str) -> Array:
    """X itself: the evaluator rounds it to the dtype that is declared."""
    return x


def classify(probabilities: Array, classes: Array) -> tuple[Array, Array]:
    """The likeliest of the classes, and the probabilities in their order."""
    flat = probabilities.reshape(-1)
    return classes[flat.argmax()], flat


def constexpr_lut_to_dense(indices: Array, lut: Array, shape: Sequence[int]) -> Array:
    """Weights of a palette: indices packed into bytes, the lowest bits first."""
    bits = int(np.log2(len(lut)))
    packed = np.unpackbits(indices.view(np.uint8), bitorder="little")
    groups = packed[: int(np.prod(shape)) * bits].reshape(-1, bits)
    numbers = np.packbits(groups, axis=1, bitorder="little")[:, 0]
    return lut[numbers].reshape([int(n) for n in shape])


def constexpr_affine_dequantize(
    quantized_data: Array, zero_point: Array, scale: Array, axis: int
) -> Array:
    """Integers less their zero point, times the scale of their channel."""
    shape = [-1 if i == int(axis) else 1 for i in range(quantized_data.ndim)]
    zero, factor = (np.asarray(one, np.float32).reshape(-1) for one in (zero_point, scale))
    return (quantized_data - zero.reshape(shape)) * factor.reshape(shape)


def _binary(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    def operation(x: Array, y: Array) -> Array:
        return function(x, y)

    return operation


OPERATIONS: dict[str, Callable[..., Array | tuple[Array, ...]]] = {
    "add": _binary(np.add),
    "mul": _binary(np.multiply),
    "sub": _binary(np.subtract),
    "real_div": _binary(np.divide),
    "relu": lambda x: np.maximum(x, 0),
    "const": lambda val: val,
    "cast": cast,
    "classify": classify,
    "clip": clip,
    "constexpr_affine_dequantize": constexpr_affine_dequantize,
    "constexpr_lut_to_dense": constexpr_lut_to_dense,
    "conv": conv,
    "conv_transpose": conv_transpose,
    "gelu": gelu,
    "identity": lambda x: x,
    "instance_norm": instance_norm,
    "layer_norm": layer_norm,
    "pad": pad,
    "reduce_l2_norm": reduce_l2_norm,
    "reduce_mean": reduce_mean,
    "slice_by_size": slice_by_size,
    "softmax": softmax,
    "squeeze": squeeze,
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
}
"""The functions by the names of MIL."""
