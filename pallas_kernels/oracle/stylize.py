"""Instance normalisation, alone and behind convolutions, and its gradients.

Source: Ulyanov, Vedaldi and Lempitsky, "Instance Normalization: The Missing Ingredient for Fast
Stylization", 2016; the block of two convolutions is that of Johnson, Alahi and Fei-Fei, "Perceptual
Losses for Real-Time Style Transfer and Super-Resolution", ECCV 2016.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from pallas_kernels.oracle.arrays import Array
from pallas_kernels.oracle.conv2d import Padding, conv2d, conv2d_vjp


def instance_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: ArrayLike | None = None,
) -> Array:
    """Each channel of each image less its mean, over its standard deviation, scaled and moved.

    `activation((x - mean) / sqrt(variance + eps) * scale + bias + residual)`, with the mean and the
    biased variance of the pixels of one channel of one image.

    Args:
        x: Images `[*batch, H, W, C]`.
        scale: `[C]`, or of each image its own, `[*batch, C]`; None is 1.
        bias: The same, None is 0.
        eps: Is added to the variance.
        activation: None or "relu".
        residual: Is added before the activation, of x's shape; None is 0.

    Returns:
        An array of x's shape in float64.

    Example:
        >>> instance_norm([[[1.0], [3.0]]], [2.0], [10.0], eps=0.0)[0, :, 0]
        array([ 8., 12.])
    """
    x = np.asarray(x, np.float64)
    normed, _ = _normed(x, eps)
    z = normed * _per_image(1.0 if scale is None else scale)
    z = z + _per_image(0.0 if bias is None else bias)
    z = z + (0.0 if residual is None else np.asarray(residual, np.float64))
    return np.maximum(z, 0.0) if activation == "relu" else z


class Gradients(NamedTuple):
    """The gradients of `instance_norm`, each of its argument's shape."""

    x: Array
    scale: Array
    bias: Array
    residual: Array


def instance_norm_vjp(
    x: ArrayLike,
    scale: ArrayLike,
    bias: ArrayLike,
    dy: ArrayLike,
    *,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: ArrayLike | None = None,
) -> Gradients:
    """The gradients of `sum(dy * instance_norm(x, scale, bias))`.

    With g the gradient of what the activation takes and n the normed images, `dx = scale / sqrt(
    variance + eps) * (g - mean(g) - n * mean(n * g))`, means over the pixels.

    Args:
        x: As `instance_norm` takes it, as are the others.
        scale: `[C]` or `[*batch, C]`.
        bias: `[C]` or `[*batch, C]`.
        dy: Gradient of the output.
        eps: Is added to the variance.
        activation: None or "relu", whose slope is 0 at 0.
        residual: Of x's shape, or None.

    Returns:
        The gradients; that of the residual exists where there is none, too.

    Example:
        >>> found = instance_norm_vjp([[[1.0], [3.0]]], [2.0], [0.0], [[[5.0], [7.0]]], eps=0.0)
        >>> found.scale, found.bias, found.x[0, :, 0]
        (array([2.]), array([12.]), array([0., 0.]))
    """
    x, scale, bias, g = (np.asarray(a, np.float64) for a in (x, scale, bias, dy))
    if activation == "relu":
        g = g * (instance_norm(x, scale, bias, eps=eps, residual=residual) > 0)
    normed, deviation = _normed(x, eps)
    about_mean = g - _mean(g) - normed * _mean(normed * g)
    return Gradients(
        x=_per_image(scale) / deviation * about_mean,
        scale=_summed(normed * g, scale.ndim),
        bias=_summed(g, bias.ndim),
        residual=g,
    )


def upsampled(x: ArrayLike, factor: int) -> Array:
    """The images `[*batch, H, W, C]` with each pixel repeated `factor` times down and across.

    Example:
        >>> upsampled([[[1.0], [2.0]]], 2)[..., 0]
        array([[1., 1., 2., 2.],
               [1., 1., 2., 2.]])
    """
    x = np.asarray(x, np.float64)
    return x.repeat(factor, axis=-3).repeat(factor, axis=-2)


def conv2d_instance_norm(
    x: ArrayLike,
    w: ArrayLike,
    scale: ArrayLike,
    bias: ArrayLike,
    *,
    stride: int | tuple[int, int] = 1,
    padding: Padding = 0,
    upsample: int = 1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: ArrayLike | None = None,
) -> Array:
    """Instance norm of a convolution of images, which are enlarged to the nearest first.

    Args:
        x: Images `[*batch, H, W, C]`.
        w: Filters `[HF, WF, C, NF]`.
        scale: `[NF]` or `[*batch, NF]`, as `instance_norm` takes it.
        bias: The same; one of the convolution would cancel.
        stride: As `conv2d` takes it.
        padding: As `conv2d` takes it, of the enlarged images.
        upsample: Factor of enlargement.
        eps: Is added to the variance.
        activation: None or "relu".
        residual: Is added before the activation, of the output's shape.

    Returns:
        `[*batch, H_out, W_out, NF]` in float64.

    Example:
        >>> y = conv2d_instance_norm(np.eye(2)[..., None], np.ones((1, 1, 1, 1)), [1.0], [0.0])
        >>> y[..., 0].round(2)
        array([[ 1., -1.],
               [-1.,  1.]])
    """
    z = conv2d(upsampled(x, upsample), w, stride=stride, padding=padding)
    return instance_norm(z, scale, bias, eps=eps, activation=activation, residual=residual)


def conv2d_instance_norm_vjp(
    x: ArrayLike,
    w: ArrayLike,
    scale: ArrayLike,
    bias: ArrayLike,
    dy: ArrayLike,
    *,
    stride: int | tuple[int, int] = 1,
    padding: Padding = 0,
    upsample: int = 1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: ArrayLike | None = None,
) -> tuple[Array, Array, Array, Array, Array]:
    """The gradients of `sum(dy * conv2d_instance_norm(x, w, scale, bias))`.

    Arguments as `conv2d_instance_norm` takes them, and the output's gradient.

    Returns:
        Those of x, of w, of scale, of bias and of the residual.

    Example:
        >>> ones = np.ones((1, 1, 1, 1))
        >>> conv2d_instance_norm_vjp(ones[0], ones, [1.0], [0.0], 3 * ones[0])[3]
        array([3.])
    """
    enlarged = upsampled(x, upsample)
    z = conv2d(enlarged, w, stride=stride, padding=padding)
    found = instance_norm_vjp(z, scale, bias, dy, eps=eps, activation=activation, residual=residual)
    dx, dw, _ = conv2d_vjp(enlarged, w, found.x, stride=stride, padding=padding)
    *batch, height, width, channels = dx.shape
    size = height // upsample, upsample, width // upsample, upsample
    dx = dx.reshape(*batch, *size, channels).sum((-4, -2))
    return dx, dw, found.scale, found.bias, found.residual


Branch = tuple[ArrayLike, ArrayLike, ArrayLike]
"""The filters `[HF, WF, C, C]` of a convolution, and the scale and bias of the norm behind."""


def residual_block(
    x: ArrayLike, first: Branch, second: Branch, *, padding: Padding = "reflect", eps: float = 1e-5
) -> Array:
    """Convolution, norm, ReLU, convolution, norm, and x added; no ReLU behind.

    Args:
        x: Images `[*batch, H, W, C]`.
        first: Filters, scale and bias of the first convolution and norm.
        second: Those of the second.
        padding: Of both convolutions, as `conv2d` takes it; it keeps the size.
        eps: Is added to both variances.

    Returns:
        An array of x's shape in float64.

    Example:
        >>> one = np.ones((1, 1, 1, 1)), [1.0], [0.0]
        >>> residual_block([[[5.0]]], one, one)
        array([[[5.]]])
    """
    inner = conv2d_instance_norm(x, *first, padding=padding, eps=eps, activation="relu")
    return conv2d_instance_norm(inner, *second, padding=padding, eps=eps, residual=x)


def residual_block_vjp(
    x: ArrayLike,
    first: Branch,
    second: Branch,
    dy: ArrayLike,
    *,
    padding: Padding = "reflect",
    eps: float = 1e-5,
) -> tuple[Array, tuple[Array, Array, Array], tuple[Array, Array, Array]]:
    """The gradients of `sum(dy * residual_block(x, first, second))`: those of x and both branches.

    Arguments as `residual_block` takes them, and the output's gradient.

    Example:
        >>> one = np.ones((1, 1, 1, 1)), [1.0], [0.0]
        >>> residual_block_vjp([[[5.0]]], one, one, [[[2.0]]])[0]
        array([[[2.]]])
    """
    inner = conv2d_instance_norm(x, *first, padding=padding, eps=eps, activation="relu")
    dinner, *of_second, through = conv2d_instance_norm_vjp(
        inner, *second, dy, padding=padding, eps=eps, residual=x
    )
    dx, *of_first, _ = conv2d_instance_norm_vjp(
        x, *first, dinner, padding=padding, eps=eps, activation="relu"
    )
    (dw1, dscale1, dbias1), (dw2, dscale2, dbias2) = of_first, of_second
    return dx + through, (dw1, dscale1, dbias1), (dw2, dscale2, dbias2)


def _mean(x: Array) -> Array:
    """The mean over the pixels of each image, `[*batch, 1, 1, C]`."""
    return x.mean(axis=(-3, -2), keepdims=True)


def _normed(x: Array, eps: float) -> tuple[Array, Array]:
    """The images less their mean over their deviation, and the deviation `[*batch, 1, 1, C]`."""
    centred = x - _mean(x)
    deviation = np.sqrt(_mean(centred**2) + eps)
    return centred / deviation, deviation


def _per_image(value: ArrayLike) -> Array:
    """A parameter `[C]` or `[*batch, C]` as it meets images."""
    value = np.asarray(value, np.float64)
    return value[..., None, None, :] if value.ndim else value


def _summed(g: Array, ndim: int) -> Array:
    """The sum over pixels, `[*batch, C]`, and over the batch where the parameter is `[C]`."""
    of_images = g.sum(axis=(-3, -2))
    return of_images.sum(axis=tuple(range(of_images.ndim - 1))) if ndim == 1 else of_images
