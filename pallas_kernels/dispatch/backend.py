"""The contract between `dispatch`, which knows no operator, and the rooms of every operator.

An operator's implementation is a module, `Implementation` says what it offers. It sees a call as a
`Problem`. The functions that compute are the operator's own: `Operator.directions` names
those that an implementation needs for each direction, and the operator's `vjp` says what they take.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, Self, cast, runtime_checkable

from pallas_kernels.common.types import Dtype, Json

Parameters = Mapping[str, Any]
"""An element of a search space: JSON-able values by the names of keywords."""


class Problem(Protocol):
    """A JSON-able NamedTuple of all that times and refusals of a call depend on.

    Attributes:
        shape: The shape of the input, `[batch, *sizes, channels]`; a size may be symbolic.
        dtype: The dtype of the input.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """The input's shape."""

    @property
    def dtype(self) -> Dtype:
        """The input's dtype."""

    def __hash__(self) -> int: ...

    def _asdict(self) -> Json:
        """The fields by name, as every NamedTuple has them."""

    def measured_as(self) -> Self:
        """The problem whose measured times count for this one, itself where none is shared."""

    def distance(self, measured: Json) -> float:
        """The distance to a problem of a table of defaults, infinite if incomparable.

        Args:
            measured: Fields of a problem as JSON has them; those that a table leaves out count as
                equal.
        """


@runtime_checkable
class Implementation(Protocol):
    """The module of an implementation, beside the functions that compute.

    It may have `as_measured(direction, problem) -> bool`. Where that is False, tables of defaults
    say nothing of it: it computes the problem by other kernels than those that were measured.

    Attributes:
        DIFFERENTIABLE: Whether JAX can look into its functions, to map and to differentiate them;
            those of other frameworks say False.
    """

    DIFFERENTIABLE: bool

    def unavailable(self, platform: str, /) -> str | None:
        """The reason why it cannot run on this machine, None if it can."""

    # The problem is that of the module's own operator, which no common type can say.
    def check(self, direction: str, problem: Any, /) -> None:
        """Returns where it can compute a problem, which is its operator's.

        Raises:
            NotImplementedError: It cannot; says why. Another candidate is taken then.
        """


@runtime_checkable
class Tunable(Implementation, Protocol):
    """An implementation with parameters of which the tuner finds the best."""

    def search_space(self, direction: str, problem: Any, /) -> Sequence[Parameters]:
        """The parameters that are worth timing, `{}` for those that it takes unasked."""


def search_space(module: Implementation, direction: str, problem: Problem) -> list[Parameters]:
    """The parameters that an implementation offers, at least its own defaults.

    Args:
        module: The implementation.
        direction: One of the operator's.
        problem: The operator's description of a call.

    Returns:
        A list that is never empty.
    """
    # Not isinstance: that would look at each name of the protocol, at every call.
    offered = getattr(module, "search_space", None)
    return list(cast(Tunable, module).search_space(direction, problem) if offered else ()) or [{}]


def missing(module: Implementation, functions: Iterable[str]) -> list[str]:
    """The functions that an implementation does not define."""
    return [name for name in functions if not hasattr(module, name)]


def size_distance(shape: Sequence[int], measured: Sequence[int]) -> float:
    """The distance of two inputs: differences in log2 of the samples and of the channels.

    Args:
        shape: `[batch, *sizes, channels]`; the batch does not count.
        measured: The shape of the measured input, likewise.

    Returns:
        A sum, infinite for another number of axes, and where a size is symbolic or zero.

    Example:
        >>> size_distance((8, 32, 32, 64), (1, 32, 64, 32))
        2.0
    """
    known = all(isinstance(n, int) for n in shape) and 0 not in shape[1:]
    if len(shape) != len(measured) or not known:
        return math.inf
    return sum(
        abs(math.log2(one) - math.log2(other))
        for one, other in (
            (math.prod(shape[1:-1]), math.prod(measured[1:-1])),
            (shape[-1], measured[-1]),
        )
    )


def dtype_distance(dtype: Dtype, measured: str) -> float:
    """The distance of two dtypes for kernels that take float16 and bfloat16 alike.

    Both are as many bytes and as many products a second, so that what was measured of one says who
    is the fastest for the other, unless that was measured too at the same size.

    Args:
        dtype: The dtype of a call.
        measured: The name of the measured dtype.

    Example:
        >>> [dtype_distance("float16", name) for name in ("float16", "bfloat16", "float32")]
        [0.0, 0.5, inf]
    """
    if str(dtype) == measured:
        return 0.0
    return 0.5 if {str(dtype), measured} == {"float16", "bfloat16"} else math.inf
