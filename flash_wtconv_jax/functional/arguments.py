"""The arguments that the linen and nnx layers of every operator take, and their checks."""

import enum
from collections.abc import Sequence
from typing import Protocol, TypeVar

import jax
from jax.typing import DTypeLike

from pallas_kernels.common.arguments import checked_dtype, checked_integer, checked_precision
from pallas_kernels.dispatch import Operator

R = TypeVar("R")

ImplementationLike = str | enum.StrEnum | Sequence[str | enum.StrEnum] | None
"""The values of `implementation=`: None (the rule), one name, or a sequence of names."""

PrecisionLike = str | jax.lax.Precision | None
"""The values of `precision=`, one for the input and the kernels."""


def check_constructor(**arguments: object) -> None:
    """Check the integer arguments of a layer or a model.

    Args:
        **arguments: `depth` and `num_classes` must be an int >= 0, others an int >= 1.

    Raises:
        ValueError: naming the first argument that is not.

    Example:
        >>> check_constructor(channels=8, kernel_size=5, depth=0)
    """
    for name, value in arguments.items():
        least = 0 if name in ("depth", "num_classes") else 1
        try:
            checked_integer(value, name, least=least)
        except ValueError as error:
            note = " (kernels have the same size along every axis)"
            raise ValueError(f"{error}{note if name == 'kernel_size' else ''}") from None


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
