"""The names that algorithms of sparse convolutions have elsewhere. It imports no framework."""

from collections.abc import Mapping
from enum import StrEnum


class SPARSE_CONV_FWD_ALGO_MODE(StrEnum):
    """Algorithms of the forward pass of the sparse convolution."""

    EXPLICIT_GEMM = "explicit_gemm"
    IMPLICIT_GEMM = "implicit_gemm"
    CUTLASS_IMPLICIT_GEMM = "cutlass_implicit_gemm"
    AUTO = "auto"


class SPARSE_CONV_BWD_ALGO_MODE(StrEnum):
    """Algorithms of the backward pass of the sparse convolution."""

    EXPLICIT_GEMM = "explicit_gemm"
    IMPLICIT_GEMM = "implicit_gemm"
    CUTLASS_IMPLICIT_GEMM = "cutlass_implicit_gemm"
    AUTO = "auto"


class SPARSE_DEPTHWISE_CONV_FWD_ALGO_MODE(StrEnum):
    """Algorithms of the forward pass of the depthwise sparse convolution."""

    EXPLICIT = "explicit"
    IMPLICIT = "implicit"
    AUTO = "auto"


class SPARSE_DEPTHWISE_CONV_BWD_ALGO_MODE(StrEnum):
    """Algorithms of the backward pass of the depthwise sparse convolution."""

    EXPLICIT = "explicit"
    IMPLICIT = "implicit"
    AUTO = "auto"


def aliases(
    explicit: Mapping[str, str], implicit: Mapping[str, str]
) -> dict[str, Mapping[str, str]]:
    """The implementations that these names mean, as `dispatch.Operator` takes them.

    Args:
        explicit: By platform, what gathers rows into memory before it multiplies.
        implicit: By platform, what gathers as it multiplies.

    Example:
        >>> sorted(aliases({"cpu": "xla"}, {"cpu": "xla"}))
        ['cutlass_implicit_gemm', 'explicit', 'explicit_gemm', 'implicit', 'implicit_gemm']
    """
    found = dict.fromkeys(("explicit_gemm", "explicit"), explicit)
    return found | dict.fromkeys(("implicit_gemm", "implicit", "cutlass_implicit_gemm"), implicit)
