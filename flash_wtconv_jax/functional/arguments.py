"""The arguments that the linen and nnx layers of every operator take, and their checks."""

import enum
from collections.abc import Sequence
from typing import Protocol, TypeVar

import jax
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from pallas_kernels.common.arguments import (
    MOST_LEVELS,
    checked_dtype,
    checked_integer,
    checked_precision,
)
from pallas_kernels.common.integers import LARGEST
from pallas_kernels.dispatch import Operator

R = TypeVar("R")

ImplementationLike = str | enum.StrEnum | Sequence[str | enum.StrEnum] | None
"""The values of `implementation=`: None (the rule), one name, or a sequence of names."""

PrecisionLike = str | jax.lax.Precision | None
"""The values of `precision=`, one for the input and the kernels."""


def check_constructor(**arguments: object) -> None:
    """Check the integer arguments of a layer or a model.

    Args:
        **arguments: `depth` must be an int from 0 to 63, `num_classes` one >= 0, others one >= 1.

    Raises:
        ValueError: naming the first argument that is not.

    Example:
        >>> check_constructor(channels=8, kernel_size=5, depth=0)
    """
    for name, value in arguments.items():
        least = 0 if name in ("depth", "num_classes") else 1
        most = MOST_LEVELS if name == "depth" else LARGEST
        try:
            checked_integer(value, name, least=least, most=most)
        except ValueError as error:
            note = " (kernels have the same size along every axis)"
            raise ValueError(f"{error}{note if name == 'kernel_size' else ''}") from None


def check_initializers(**initializers: Initializer | None) -> None:
    """Check the initialisers of a layer's parameters.

    Args:
        **initializers: Functions of a key, a shape and a dtype, or None for a default.

    Raises:
        ValueError: naming the first that is none, a number for instance.

    Example:
        >>> check_initializers(scale_init=jax.nn.initializers.zeros, bias_init=None)
    """
    for name, init in initializers.items():
        if init is not None and not callable(init):
            raise ValueError(
                f"{name}={init!r}: expected an initialiser, such as "
                "jax.nn.initializers.constant(0.1), which makes every element 0.1"
            )


class Computation(Protocol):
    """The arguments that say how a layer computes, whichever its operator."""

    dtype: DTypeLike | None
    param_dtype: DTypeLike
    precision: PrecisionLike
    implementation: ImplementationLike


def check_computation(operator: Operator, layer: Computation) -> None:
    """Check how a layer computes an operator.

    Args:
        operator: The operator.
        layer: `dtype` must be None or a floating-point dtype of 16, 32 or 64 bits, `param_dtype`
            such a dtype, `precision` None or one of `jax.lax.Precision`, `implementation` None or
            names of the operator's implementations.

    Raises:
        ValueError: naming the first argument that is none of these.
    """
    if layer.dtype is not None:
        checked_dtype(layer.dtype, "dtype")
    checked_dtype(layer.param_dtype, "param_dtype")
    checked_precision(layer.precision)
    operator.check_names(layer.implementation)


def checked_rngs(rngs: R) -> R:
    """Check the source of the keys of an nnx layer or model.

    Raises:
        ValueError: If it is no `nnx.Rngs` with the stream `params`, nor anything like it.

    Example:
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> checked_rngs(rngs) is rngs
        True
    """
    if not callable(getattr(rngs, "params", None)):
        raise ValueError(
            f"rngs: expected an nnx.Rngs with the stream 'params', such as nnx.Rngs(0), got "
            f"{type(rngs).__name__}"
        )
    return rngs
