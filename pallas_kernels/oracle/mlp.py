"""The pointwise MLP: a linear layer, exact GELU, a linear layer; and its gradients."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from pallas_kernels.oracle.arrays import Array
from pallas_kernels.oracle.conv2d import conv2d, conv2d_vjp


def mlp(x: ArrayLike, kernels: Sequence[ArrayLike], biases: Sequence[ArrayLike]) -> Array:
    """A pointwise MLP: two linear layers, an exact GELU between them.

    Args:
        x: `[rows, C]`.
        kernels: `[C, hidden]` and `[hidden, features]`.
        biases: `[hidden]` and `[features]`.

    Returns:
        `[rows, features]` in float64.

    Example:
        >>> mlp([[1.0]], ([[2.0]], [[3.0]]), ([-2.0], [5.0]))
        array([[5.]])
    """
    (first, second), (inner, outer) = _as_convolutions(kernels), biases
    hidden = conv2d(_image(x), first, bias=inner, activation="gelu")
    return conv2d(hidden, second, bias=outer)[0, 0]


def mlp_vjp(
    x: ArrayLike, kernels: Sequence[ArrayLike], biases: Sequence[ArrayLike], dy: ArrayLike
) -> dict[str, Array]:
    """Gradients of `sum(dy * mlp(x, kernels, biases))`.

    Args:
        x: As `mlp` takes it.
        kernels: As `mlp` takes them.
        biases: As `mlp` takes them.
        dy: `[rows, features]`.

    Returns:
        `dx`, `dkernel1`, `dbias1`, `dkernel2` and `dbias2`: float64, of the arguments' shapes.

    Example:
        >>> {name: float(g.item()) for name, g in mlp_vjp(
        ...     [[1.0]], ([[2.0]], [[3.0]]), ([-2.0], [5.0]), [[1.0]]
        ... ).items()}
        {'dx': 3.0, 'dkernel1': 1.5, 'dbias1': 1.5, 'dkernel2': 0.0, 'dbias2': 1.0}
    """
    first, second = _as_convolutions(kernels)
    hidden = conv2d(_image(x), first, bias=biases[0], activation="gelu")
    dhidden, dsecond, dbias2 = conv2d_vjp(hidden, second, _image(dy), bias=biases[1])
    dx, dfirst, dbias1 = conv2d_vjp(_image(x), first, dhidden, bias=biases[0], activation="gelu")
    found = {"dx": dx[0, 0], "dkernel1": dfirst[0, 0], "dbias1": dbias1}
    return found | {"dkernel2": dsecond[0, 0], "dbias2": dbias2}


def _image(x: ArrayLike) -> Array:
    """Rows as the pixels of an image of one row."""
    return np.asarray(x, np.float64)[None, None]


def _as_convolutions(kernels: Sequence[ArrayLike]) -> tuple[Array, Array]:
    """The kernels of linear layers as those of 1 x 1 convolutions."""
    first, second = (np.asarray(kernel, np.float64)[None, None] for kernel in kernels)
    return first, second
