"""The programs of `tpu-report` with the shapes of their arguments: our kernels and plain JAX."""

from collections.abc import Callable
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp

from pallas_kernels.common.types import Keywords, Taps, Tree
from pallas_kernels.depthwise.baseline_jax import depthwise_conv2d
from pallas_kernels.sparse.maps import KernelMap, kernel_map
from pallas_kernels.sparse.shapes import Shape as VoxelShape
from pallas_kernels.wtconv import baseline_jax
from pallas_kernels.wtconv.shapes import Shape

Program = tuple[Callable[..., Tree], tuple[Tree, ...]]


def wtconv(shape: list[int], dtype: str, direction: str) -> Program:
    """Our TPU kernels of the layer: y, or the gradients of x and of the taps.

    Args:
        shape: The fields of a `Shape`.
        dtype: Dtype of x, y and their gradients; taps and bias are float32.
        direction: "forward" or "backward".

    Returns:
        The function and its arguments' shapes.

    Example:
        >>> function, (x, taps, bias) = wtconv([1, 8, 8, 128, 1, 5], "bfloat16", "forward")
        >>> x.shape, [tap.shape for tap in taps]
        ((1, 8, 8, 128), [(5, 5, 1, 128), (5, 5, 4, 128)])
    """
    from pallas_kernels.wtconv import mosaic_tpu

    layer = Shape(*shape)
    k, c = layer.kernel_size, layer.channels
    x = jax.ShapeDtypeStruct(layer.x, jnp.dtype(dtype))
    bands = (1, *[4] * layer.levels)
    taps = tuple(jax.ShapeDtypeStruct((k, k, b, c), jnp.float32) for b in bands)
    shapes = tuple(tap.shape for tap in taps)
    static: Keywords = {"wavelet": "haar", "precision": None}

    def forward(x: jax.Array, taps: Taps, bias: jax.Array) -> jax.Array:
        return mosaic_tpu.forward(x, taps, bias, transpose=False, **static)

    def backward(x: jax.Array, taps: Taps, dy: jax.Array) -> Tree:
        dx = mosaic_tpu.forward(dy, taps, None, transpose=True, **static)
        return dx, mosaic_tpu.weight_grad(x, dy, kernel_shapes=shapes, **static)

    if direction == "backward":
        return backward, (x, taps, x)
    return forward, (x, taps, jax.ShapeDtypeStruct((c,), jnp.float32))


def plain_wtconv(shape: list[int], dtype: str, direction: str) -> Program:
    """The layer in plain JAX, which XLA compiles by itself; the arguments are those of `wtconv`.

    Its gradients are those of x and of every parameter, the bias and the scales among them.

    Example:
        >>> function, (x, params) = plain_wtconv([1, 8, 8, 128, 1, 5], "bfloat16", "forward")
        >>> sorted(params)
        ['base_bias', 'base_kernel', 'base_scale', 'wavelet_kernel_0', 'wavelet_scale_0']
    """
    layer = Shape(*shape)
    k, c = layer.kernel_size, layer.channels
    sizes = {"base_kernel": (k, k, 1, c), "base_bias": (c,), "base_scale": (c,)}
    for i in range(layer.levels):
        sizes |= {f"wavelet_kernel_{i}": (k, k, 4, c), f"wavelet_scale_{i}": (4, c)}
    params = {name: jax.ShapeDtypeStruct(size, jnp.dtype(dtype)) for name, size in sizes.items()}
    x = jax.ShapeDtypeStruct(layer.x, jnp.dtype(dtype))

    def backward(x: jax.Array, params: Tree, dy: jax.Array) -> Tree:
        return jax.vjp(baseline_jax.wtconv, x, params)[1](dy)

    if direction == "backward":
        return backward, (x, params, x)
    return baseline_jax.wtconv, (x, params)


def depthwise(shape: list[int], dtype: str, direction: str) -> Program:
    """Our TPU kernels of the depthwise convolution; as `wtconv`, whose base convolution it is.

    Example:
        >>> function, (x, (kernel,), bias) = depthwise([1, 8, 8, 128, 0, 7], "float32", "forward")
        >>> kernel.shape
        (7, 7, 1, 128)
    """
    return wtconv(shape, dtype, direction)


def plain_depthwise(shape: list[int], dtype: str, direction: str) -> Program:
    """The depthwise convolution in plain JAX, which XLA compiles by itself.

    Its gradients are those of x, of the kernel and of the bias.

    Example:
        >>> function, (x, kernel, bias) = plain_depthwise(
        ...     [1, 8, 8, 128, 0, 7], "bfloat16", "forward"
        ... )
        >>> kernel.shape, bias.shape
        ((7, 7, 1, 128), (128,))
    """
    layer = Shape(*shape)
    k, c = layer.kernel_size, layer.channels
    sizes = layer.x, (k, k, 1, c), (c,)
    x, kernel, bias = (jax.ShapeDtypeStruct(size, jnp.dtype(dtype)) for size in sizes)

    def backward(x: jax.Array, kernel: jax.Array, bias: jax.Array, dy: jax.Array) -> Tree:
        return jax.vjp(depthwise_conv2d, x, kernel, bias)[1](dy)

    if direction == "backward":
        return backward, (x, kernel, bias, x)
    return depthwise_conv2d, (x, kernel, bias)


def haar(shape: list[int], dtype: str, direction: str) -> Program:
    """Our TPU kernels of the Haar cascade: analysis ("forward"), or synthesis ("backward").

    Args:
        shape: The fields of a `Shape`, its kernel size not used.
        dtype: Dtype of the image and the coefficients.
        direction: "forward" or "backward".

    Returns:
        The function and its arguments' shapes.

    Example:
        >>> function, (x,) = haar([1, 8, 8, 128, 2, 5], "float32", "forward")
        >>> x.shape
        (1, 8, 8, 128)
    """
    from pallas_kernels.haar import mosaic_tpu

    return _cascade(mosaic_tpu, shape, dtype, direction)


def plain_haar(shape: list[int], dtype: str, direction: str) -> Program:
    """The cascade in plain JAX, which XLA compiles by itself; the arguments are those of `haar`.

    Example:
        >>> function, (low, details) = plain_haar([1, 8, 8, 128, 2, 5], "float32", "backward")
        >>> low.shape, [bands[0].shape for bands in details]
        ((1, 2, 2, 128), [(1, 2, 2, 128), (1, 4, 4, 128)])
    """
    from pallas_kernels.haar import xla

    return _cascade(xla, shape, dtype, direction)


def sparse(shape: list[int], dtype: str, direction: str) -> Program:
    """A sparse convolution in plain JAX, or its map.

    Args:
        shape: The fields of a `pallas_kernels.sparse.shapes.Shape`.
        dtype: Dtype of features and weights.
        direction: "map", "forward", or "backward", the gradients of x and of the weights.

    Returns:
        The function and its arguments' shapes.

    Example:
        >>> function, (x, w, rows) = sparse([100, 8, 16, 3, 1], "bfloat16", "forward")
        >>> x.shape, w.shape, rows.table.shape
        ((100, 8), (27, 1, 8, 16), (27, 100))
    """
    from pallas_kernels.sparse import xla
    from pallas_kernels.sparse.voxels import Voxels

    layer = VoxelShape(*shape)

    def array(size: tuple[int, ...], of: str = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, jnp.dtype(of))

    def made(coords: jax.Array, count: jax.Array) -> tuple[KernelMap, Voxels]:
        none = jnp.zeros((layer.voxels, 0), dtype)
        voxels = Voxels(coords, none, count, jnp.zeros((), jnp.int32), 1, (1, 1, 1))
        return kernel_map(voxels, layer.kernel_size, layer.stride)

    sites = array((layer.voxels, 4), "int32"), array((), "int32")
    if direction == "map":
        return made, sites
    rows, _ = jax.eval_shape(made, *sites)
    x, dy = (array((layer.voxels, each)) for each in (layer.channels, layer.features))
    w = array((layer.kernel_size**3, 1, layer.channels, layer.features))
    if direction == "forward":
        return partial(xla.forward, precision=None), (x, w, rows.forward)

    def backward(x: jax.Array, w: jax.Array, dy: jax.Array, rows: KernelMap) -> Tree:
        reverse = rows.forward if rows.backward is None else rows.backward
        # The table of stride 1 serves the other direction with its offsets reversed.
        taps = w[::-1] if rows.backward is None else w
        dx = xla.input_grad(dy, taps, reverse, precision=None)
        return dx, xla.weight_grad(x, dy, rows.forward, shape=w.shape, precision=None)

    return backward, (x, w, dy, rows)


def _cascade(module: ModuleType, shape: list[int], dtype: str, direction: str) -> Program:
    layer = Shape(*shape)
    x = jax.ShapeDtypeStruct(layer.x, jnp.dtype(dtype))
    analyse = partial(module.wavedec, ndim=2, levels=layer.levels, wavelet="haar")
    if direction == "forward":
        return analyse, (x,)
    size = layer.x[1:3]
    return partial(module.waverec, shape=size, wavelet="haar"), jax.eval_shape(analyse, x)
