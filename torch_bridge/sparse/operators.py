"""The two operators of PyTorch, and their implementations.

Maps are made by what computes the convolution, so this imports neither.
"""

from enum import StrEnum

from pallas_kernels.dispatch import Operator
from pallas_kernels.sparse.algorithms import aliases


class Implementation(StrEnum):
    """Implementations of the sparse convolutions."""

    TRITON = "triton"
    EAGER = "eager"


_EXPLICIT = dict.fromkeys(("cuda", "mps", "cpu", "meta"), "eager")


def _operator(name: str, package: str) -> Operator:
    return Operator(
        name=name,
        package=package,
        implementations=Implementation,
        rule={"cuda": ("triton", "eager"), "cpu": ("eager",)},
        directions={"fwd": ("forward",), "bwd": ("forward", "weight_grad")},
        argument="{direction}_algo",
        aliases=aliases(_EXPLICIT, _EXPLICIT | {"cuda": "triton"}),
        measures_names=True,
    )


OPERATOR = _operator("torch_sparse_conv", "torch_bridge.sparse")
DEPTHWISE = _operator("torch_sparse_depthwise_conv", "torch_bridge.sparse.depthwise")
