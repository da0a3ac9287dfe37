"""What implementations of either framework compute on the shared cases, held against the oracle.

Imports NumPy and ml_dtypes alone. The tests and the `check` commands are the same: a framework
hands on what computes a case, and what does in plain operations of the case's dtype.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from pallas_kernels import oracle
from pallas_kernels.haar.filters import filter_bank
from pallas_kernels.wtconv.cases import Array, Case, inputs

LOW = ("bfloat16", "float16")
"""The dtypes whose rounding is measured, not reckoned."""

Results = Mapping[str, Any]
"""Arrays: the output "y", its gradients "dx" and those of the parameters by their names."""


class Backend(NamedTuple):
    """Something that computes cases.

    Attributes:
        name: As rows call it.
        cases: What it is asked to compute.
        refusal: Why it does not take a case, None if it does.
        compute: The results of a case for the numbers that `drawn` gives.
    """

    name: str
    cases: Sequence[Case]
    refusal: Callable[[Case], str | None]
    compute: Callable[[Case], Results]


def drawn(case: Case) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """x, the parameters and dy of a case, rounded to its dtype.

    Example:
        >>> drawn(Case((7, 9), 1, 5, "float16"))[0].dtype
        dtype('float16')
    """
    dtype = np.dtype(ml_dtypes.bfloat16 if case.dtype == "bfloat16" else case.dtype)
    x, params, dy = inputs(case)
    return (
        x.astype(dtype),
        {name: value.astype(dtype) for name, value in params.items()},
        dy.astype(dtype),
    )


@lru_cache(maxsize=256)
def expected(case: Case) -> dict[str, Array]:
    """The oracle's output and gradients for the numbers that the case's dtype can hold.

    Example:
        >>> sorted(expected(Case((4,), 0, 3)))
        ['base_bias', 'base_kernel', 'base_scale', 'dx', 'y']
    """
    x, params, dy = drawn(case)
    x, dy = x.astype(np.float64), dy.astype(np.float64)
    params = {name: value.astype(np.float64) for name, value in params.items()}
    dec, rec = filter_bank(case.wavelet)
    keys: dict[str, Any] = {"stride": case.stride, "dec": dec, "rec": rec}
    y = oracle.wtconv(x, params, case.ndim, **keys)
    dx, dparams = oracle.wtconv_vjp(x, params, dy, case.ndim, **keys)
    return {"y": y, "dx": dx, **dparams}


def worst(got: Any, want: Array) -> float:
    """Greatest error as a fraction of the root mean square of what is wanted.

    Example:
        >>> worst([1.0, 2.5], np.array([1.0, 2.0]))
        0.31622776601683794
    """
    got = np.asarray(got, np.float64)
    if want.size == 0:
        return 0.0
    return float(np.abs(got - want).max() / max(np.sqrt(np.mean(want**2)), 1e-30))


def tolerance(case: Case, name: str) -> float:
    """What rounding of float32 or float64 may do; a weight gradient is a sum over n terms.

    Example:
        >>> tolerance(Case((7, 9), 1, 5), "y")
        1e-05
    """
    if case.dtype == "float64":
        return 1e-12
    terms = np.prod((*case.batch, *case.spatial)) if name.startswith(("base", "wavelet")) else 1
    return 1e-5 * max(1.0, float(terms) ** 0.5 / 300)


def bounds(case: Case, plain: Callable[[Case], Results]) -> dict[str, float]:
    """The greatest error that each result of a case may have.

    Args:
        case: What is computed.
        plain: Computes it in plain operations that are only told to use its dtype: in low precision
            twice their error is allowed.

    Returns:
        Fractions of the root mean square, by name.
    """
    want = expected(case)
    if case.dtype not in LOW:
        return {name: tolerance(case, name) for name in want}
    dtype = ml_dtypes.bfloat16 if case.dtype == "bfloat16" else np.float16
    got, rounding = plain(case), float(ml_dtypes.finfo(dtype).eps)
    return {name: max(2 * worst(got[name], want[name]), rounding) for name in want}


def run(backends: Iterable[Backend], plain: Callable[[Case], Results]) -> Iterator[dict[str, Any]]:
    """Computes every case with every backend.

    Args:
        backends: What to check.
        plain: As `bounds` takes it.

    Yields:
        A JSON-able row a backend and case: `status` "pass", "fail" or "skip", `reason` of the last
        two, and of those that ran the `error`, `bound` and name (`array`) of the result that comes
        nearest to its bound or is the furthest beyond it, and `seconds`, compilation included.
    """
    for backend in backends:
        for case in backend.cases:
            row: dict[str, Any] = {"backend": backend.name, "case": case.name}
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


def _judged(case: Case, got: Results, plain: Callable[[Case], Results]) -> dict[str, Any]:
    want = expected(case)
    for name, array in want.items():
        if got[name].shape != array.shape:
            reason = f"{name} has shape {got[name].shape}, expected {array.shape}"
            return {"status": "fail", "array": name, "reason": reason}
    allowed = bounds(case, plain)
    errors = {name: worst(got[name], array) for name, array in want.items()}
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
