"""The implementations of the two operators, and which of them the regular one takes.

Maps are made by what computes the convolution, so this imports neither.
"""

from enum import StrEnum

from pallas_kernels.dispatch import Operator
from pallas_kernels.sparse.algorithms import aliases


class Implementation(StrEnum):
    """Implementations of the sparse convolutions."""

    TRITON = "triton"
    XLA = "xla"


_EXPLICIT = {"cpu": "xla", "gpu": "xla", "tpu": "xla"}
_IMPLICIT = _EXPLICIT | {"gpu": "triton"}

ALIASES = aliases(_EXPLICIT, _IMPLICIT)
"""Implementations by the names of algorithms; off GPUs what gathers as it multiplies is plain JAX
too, one offset after the other."""

OPERATOR = Operator(
    name="sparse_conv",
    package="pallas_kernels.sparse",
    implementations=Implementation,
    rule={"tpu": ("xla",), "gpu": ("triton", "xla"), "cpu": ("xla",)},
    directions={"fwd": ("forward",), "bwd": ("input_grad", "weight_grad")},
    argument="{direction}_algo",
    aliases=ALIASES,
    measures_names=True,
)
