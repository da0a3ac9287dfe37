"""Checks of implementations of either framework on the shared cases, against the oracle.

Imports NumPy and ml_dtypes alone, and knows no operator: a case offers what the oracle expects of
it. The tests and the `check` commands are the same: a framework hands on what computes a case, and
what does in plain operations of the case's dtype.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pallas_kernels.common.types import Json, Tree

if TYPE_CHECKING:
    from pallas_kernels.dispatch.backend import Problem

Array = NDArray[np.float64]

LOW = ("bfloat16", "float16")
"""The dtypes whose rounding is measured, not reckoned."""

Results = Mapping[str, Tree]
"""The output and its gradients by name: an array each, or a list of arrays that belong together."""


class Case(Protocol):
    """A case of an operator's `cases.py`: what to compute, and what the oracle makes of it."""

    @property
    def name(self) -> str:
        """A short name for tables and test ids."""

    @property
    def dtype(self) -> str:
        """The dtype of what is computed, e.g. "bfloat16"."""

    def __hash__(self) -> int: ...

    def drawn(self) -> tuple[Tree, ...]:
        """NumPy's arrays of the case, rounded to its dtypes; the same ones every time."""

    def expected(self) -> dict[str, Tree]:
        """The oracle's results in float64, for the numbers of `drawn`."""

    def tolerance(self, name: str) -> float:
        """The error of a result that rounding of float32 or float64 may cause; see `worst`."""


C = TypeVar("C", bound=Case)


class Room(Protocol[C]):
    """The module `conformance` of an operator's folder: how JAX computes the operator's cases.

    The functions that it returns take what `drawn` returns, and are traced by JAX.

    Attributes:
        CASES: The cases that `flash-wtconv check` computes.
    """

    CASES: Sequence[C]

    def problem(self, case: C) -> "Problem":
        """The operator's `Problem` of a case, which an implementation's `check` takes."""

    def computed(self, case: C, implementation: str) -> Callable[..., Results]:
        """Returns the function that computes a case by one implementation."""

    def baseline(self, case: C) -> Callable[..., Results]:
        """Returns the function that computes a case in plain JAX, every array in its dtype."""


class Backend(NamedTuple, Generic[C]):
    """Something that computes cases.

    Attributes:
        name: The name that it has in rows.
        cases: The cases that it is asked to compute.
        refusal: Returns why it does not take a case, None if it does.
        compute: Returns the results of a case for the numbers that the case's `drawn` gives.
    """

    name: str
    cases: Sequence[C]
    refusal: Callable[[C], str | None]
    compute: Callable[[C], Results]


def rounded(values: Array, dtype: str) -> np.ndarray:
    """Returns numbers rounded to a dtype of NumPy or of ml_dtypes.

    Example:
        >>> rounded(np.array([1.001]), "bfloat16")
        array([1], dtype=bfloat16)
    """
    return values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


@lru_cache(maxsize=256, typed=True)
def expected(case: Case) -> dict[str, Tree]:
    """Returns what the oracle expects of a case, computed once.

    Example:
        >>> from pallas_kernels.wtconv.cases import Case
        >>> sorted(expected(Case((4,), 0, 3)))
        ['base_bias', 'base_kernel', 'base_scale', 'dx', 'y']
    """
    return case.expected()


def worst(got: Tree, want: Tree) -> float:
    """Returns the greatest error as a fraction of the root mean square of what is wanted.

    Args:
        got: An array, or a list of arrays that belong together.
        want: The same of the oracle.

    Example:
        >>> worst(np.array([1.0, 2.5]), np.array([1.0, 2.0]))
        0.31622776601683794
    """
    got, want = _flat(got), _flat(want)
    if want.size == 0:
        return 0.0
    return float(np.abs(got - want).max() / max(np.sqrt(np.mean(want**2)), 1e-30))


def bounds(case: C, plain: Callable[[C], Results]) -> dict[str, float]:
    """Returns the greatest error that each result of a case may have.

    Args:
        case: The case that is computed.
        plain: Computes it in plain operations in its dtype: in low precision twice their error is
            allowed, and twice what the greatest number may lose where it is rounded.

    Returns:
        Fractions of the root mean square, by name.
    """
    want = expected(case)
    if case.dtype not in LOW:
        return {name: case.tolerance(name) for name in want}
    dtype = ml_dtypes.bfloat16 if case.dtype == "bfloat16" else np.float16
    got, eps = plain(case), float(ml_dtypes.finfo(dtype).eps)
    rounding = {name: eps * max(1.0, worst(0.0, value)) for name, value in want.items()}
    return {name: max(2 * worst(got[name], want[name]), rounding[name]) for name in want}


def run(backends: Iterable[Backend[C]], plain: Callable[[C], Results]) -> Iterator[Json]:
    """Computes every case with every backend.

    Args:
        backends: The backends to check.
        plain: As `bounds` takes it; called once a case.

    Yields:
        A JSON-able row a backend and case: `status` "pass", "fail" or "skip", `reason` of the last
        two, and of those that ran the `error`, `bound` and name (`array`) of the result that comes
        nearest to its bound or is the furthest beyond it, and `seconds`, compilation included.
    """
    plain = cache(plain)
    for backend in backends:
        for case in backend.cases:
            row: Json = {"backend": backend.name, "case": case.name}
            row |= dict.fromkeys(("array", "error", "bound", "seconds", "reason"))
            reason = backend.refusal(case)
            if reason is not None:
                yield row | {"status": "skip", "reason": reason}
                continue
            start = time.perf_counter()
            try:
                got = backend.compute(case)
            # Whatever went wrong is what the reader wants to know, of the other cases too.
            except Exception as error:
                reason = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
                yield row | {"status": "fail", "reason": reason}
                continue
            row["seconds"] = time.perf_counter() - start
            yield row | _judged(case, got, plain)


def _judged(case: C, got: Results, plain: Callable[[C], Results]) -> Json:
    """The part of a row that tells how results compare with the oracle's."""
    want = expected(case)
    for name, value in want.items():
        if _shapes(got[name]) != _shapes(value):
            reason = f"{name} has shape {_shapes(got[name])}, expected {_shapes(value)}"
            return {"status": "fail", "array": name, "reason": reason}
    allowed = bounds(case, plain)
    errors = {name: worst(got[name], value) for name, value in want.items()}
    # NaN is further off than any number.
    name = max(errors, key=lambda n: np.nan_to_num(errors[n] / allowed[n], nan=np.inf))
    passed = errors[name] <= allowed[name]
    return {
        "status": "pass" if passed else "fail",
        "array": name,
        # JSON has no NaN.
        "error": errors[name] if np.isfinite(errors[name]) else None,
        "bound": allowed[name],
        "reason": None if passed else f"{name} is off by {errors[name]:.1e}",
    }


def _flat(value: Tree) -> Array:
    """An array, or the arrays of a list one after another, as one axis."""
    arrays = value if isinstance(value, list) else [value]
    return np.concatenate([np.asarray(array, np.float64).ravel() for array in arrays])


def _shapes(value: Tree) -> Tree:
    """The shape of an array, or those of a list."""
    return [_shapes(array) for array in value] if isinstance(value, list) else value.shape
