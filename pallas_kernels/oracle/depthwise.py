"""Depthwise 2-D convolution, and its gradients: a dense one of as many groups as channels."""

import numpy as np
from numpy.typing import ArrayLike

from pallas_kernels.oracle.arrays import Array
from pallas_kernels.oracle.conv2d import Padding, conv2d, conv2d_vjp


def depthwise_conv2d(
    x: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: Padding = "SAME",
    dilation: int | tuple[int, int] = 1,
) -> Array:
    """Depthwise 2-D convolution (cross-correlation): each channel by a kernel of its own.

    Args:
        x: Images `[*batch, H, W, C]`.
        kernel: Taps `[KH, KW, 1, C]`.
        bias: `[C]`, or None.
        stride: As `conv2d` takes it.
        padding: As `conv2d` takes it; an even kernel's "SAME" pads the odd sample behind.
        dilation: As `conv2d` takes it.

    Returns:
        `[*batch, H_out, W_out, C]` in float64, of the height and width that `conv2d` returns.

    Example:
        >>> x = np.stack([np.arange(4.0), np.ones(4)], axis=-1)[None]
        >>> depthwise_conv2d(x, np.ones((1, 2, 1, 2)), [0.0, 5.0], padding="VALID")[0].T
        array([[1., 3., 5.],
               [7., 7., 7.]])
    """
    groups = np.shape(kernel)[-1]
    return conv2d(
        *(x, kernel), stride=stride, padding=padding, dilation=dilation, groups=groups, bias=bias
    )


def depthwise_conv2d_vjp(
    x: ArrayLike,
    kernel: ArrayLike,
    dy: ArrayLike,
    *,
    stride: int | tuple[int, int] = 1,
    padding: Padding = "SAME",
    dilation: int | tuple[int, int] = 1,
) -> tuple[Array, Array, Array]:
    """Gradients of `sum(dy * depthwise_conv2d(x, kernel, bias))`.

    Args:
        x: As `depthwise_conv2d` takes it.
        kernel: As `depthwise_conv2d` takes it.
        dy: Gradient of the output, of the output's shape.
        stride: As `depthwise_conv2d` takes it.
        padding: As `depthwise_conv2d` takes it.
        dilation: As `depthwise_conv2d` takes it.

    Returns:
        `(dx, dkernel, dbias)`: float64 arrays of the shapes of x, of the kernel, and `[C]`.

    Example:
        >>> x, kernel = np.arange(4.0).reshape(1, 4, 1), np.ones((1, 2, 1, 1))
        >>> dx, dkernel, _ = depthwise_conv2d_vjp(x, kernel, np.ones((1, 3, 1)), padding="VALID")
        >>> dx[0, :, 0], dkernel[0, :, 0, 0]
        (array([1., 2., 2., 1.]), array([3., 6.]))
    """
    groups = np.shape(kernel)[-1]
    return conv2d_vjp(
        x, kernel, dy, stride=stride, padding=padding, dilation=dilation, groups=groups
    )
