"""The tuner: times implementations with each of their parameters, and remembers the fastest.

It knows no framework. What runs a candidate, and what times it, is a `Measurement` that the caller
hands in; `tuning` says when it may measure.
"""

import itertools
import json
import logging
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, cast, get_args

from pallas_kernels.common.types import Json, Tree
from pallas_kernels.dispatch import cache
from pallas_kernels.dispatch.backend import Implementation, Problem, search_space
from pallas_kernels.dispatch.cache import Entry

if TYPE_CHECKING:
    import numpy as np

    Outputs = list[tuple[str, np.ndarray]]
    """Arrays as NumPy has them, each after the name of the dtype that it was computed in."""

Mode = Literal["off", "cached", "search"]

TuningParams = tuple[tuple[str, Any], ...]
"""Parameters of an implementation by name, hashable."""

_MODE: ContextVar[Mode | None] = ContextVar("tuning", default=None)
_USED: ContextVar[list[Entry] | None] = ContextVar("used", default=None)
_TRACES = itertools.count()
_TRACE: ContextVar[int | None] = ContextVar("trace", default=None)
_VARIABLE = "FLASH_WTCONV_TUNING"
"""The environment's variable that is `tuning` for the whole process."""
_SEARCHING = threading.Lock()
"""One search at a time: two would time each other."""

_log = logging.getLogger("flash_wtconv")

_RUNS = 5
_HOPELESS = 3
"""A candidate whose first run takes so many times the best one's is not run again."""
_TIE = 1.05
_TIE_RUNS = 10
_PATIENCE_S = 2.0
"""Seconds that a search may take before it shows a progress bar."""
_TOLERANCE = {"float64": 1e-6, "float32": 5e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""The greatest error of an output, over the reference's largest: it finds faults, not roundings."""


class Candidate(NamedTuple):
    """An implementation and its parameters, none of which is its own default."""

    implementation: str
    config: TuningParams = ()

    def __str__(self) -> str:
        """The candidate as logs name it."""
        return " ".join([self.implementation, *(f"{name}={value}" for name, value in self.config)])


class Measurement(Protocol):
    """One direction of one call, as a framework runs and times it."""

    @property
    def device_kind(self) -> str:
        """The kind of device that times hold for; an entry of the cache is of one."""

    @property
    def static(self) -> Json:
        """The static arguments that times depend on, besides the problem; JSON-able."""

    @property
    def versions(self) -> Mapping[str, str]:
        """The versions of what computes, by name."""

    def from_process_0(self, question: str, answer: Callable[[], str]) -> str:
        """One process's answer to a question that all processes of a program ask."""

    def untimeable(self) -> str | None:
        """The reason why nothing can be timed here, None where something can."""

    def interpreting(self, names: Iterable[str]) -> bool:
        """Whether one of these implementations runs in an interpreter, which no device is like."""

    def untraced(self, search: Callable[[], Entry]) -> Callable[[], Entry]:
        """The search for another thread to run: on this one's device, where nothing is traced."""

    def prepared(self, module: Implementation, config: TuningParams) -> Callable[[], Tree]:
        """A call of an implementation on random arrays, always the same ones."""

    def milliseconds(self, call: Callable[[], Tree]) -> float:
        """The time of one run of a call, compiled already."""

    def arrays(self, result: Tree) -> "Outputs":
        """The arrays that a call returned, once it is done."""

    def reference(self) -> "Outputs":
        """The arrays that a right call returns."""


@contextmanager
def tuning(mode: Mode) -> Iterator[None]:
    """Says what implementations are chosen by, inside a `with` block of this thread.

    Without it, `None` and a single name never measure, and `"auto"` and sequences of names take
    what was measured before, or measure. A function that is compiled already keeps its choice. For
    a whole process the variable FLASH_WTCONV_TUNING says the same.

    Args:
        mode: `"off"` neither measures nor looks at what was measured; `"cached"` takes what was
            measured before, for every choice, and measures nothing; `"search"` measures, for every
            choice, what was not measured before.

    Raises:
        ValueError: Another mode.

    Example:
        >>> with tuning("off"):
        ...     pass
    """
    if mode not in get_args(Mode):
        raise ValueError(f"tuning({mode!r}): expected one of {list(get_args(Mode))}")
    token = _MODE.set(mode)
    try:
        yield
    finally:
        _MODE.reset(token)


@contextmanager
def recorded() -> Iterator[list[Entry]]:
    """Gives a list of the entries that choices inside the block are made by."""
    used: list[Entry] = []
    tokens = _USED.set(used), _TRACE.set(next(_TRACES))
    try:
        yield used
    finally:
        _USED.reset(tokens[0])
        _TRACE.reset(tokens[1])


def trace() -> int | None:
    """A number of this `recorded` block, None outside: traces made before it do not count inside.

    Example:
        >>> trace() is None
        True
    """
    return _TRACE.get()


def mode() -> Mode | None:
    """The mode that `tuning` sets, else FLASH_WTCONV_TUNING's; None where neither is set.

    Raises:
        ValueError: The variable holds something else.

    Example:
        >>> with tuning("cached"):
        ...     mode()
        'cached'
    """
    inside = _MODE.get()
    if inside is not None:
        return inside
    value = os.environ.get(_VARIABLE, "").strip().lower()
    if not value:
        return None
    if value not in get_args(Mode):
        raise ValueError(f"{_VARIABLE}={value!r}: expected one of {list(get_args(Mode))}, or unset")
    return cast(Mode, value)


def fastest(
    operator: str,
    direction: str,
    problem: Problem,
    modules: Mapping[str, Implementation],
    mode: Mode | None,
    measurement: Measurement,
    quiet: bool = False,
) -> Candidate | None:
    """The fastest candidate of some implementations: as the cache knows, or else measured.

    Args:
        operator: Name of the operator.
        direction: Its direction.
        problem: The operator's description of the call, a NamedTuple of what JSON can say.
        modules: The implementations that can run, by name.
        mode: The mode that `tuning` sets; `"cached"` measures nothing.
        measurement: How they are run and timed.
        quiet: Whether nobody asked for times, so that nothing is said where there are none.

    Returns:
        The fastest; None, after a warning, where none can be timed; None where the mode is
        "cached" and not all were measured.
    """
    entry = {
        "operator": operator,
        "direction": direction,
        "problem": {name: _plain(value) for name, value in problem._asdict().items()},
        "static": dict(measurement.static),
        "versions": dict(measurement.versions),
    }

    key = cache.key(entry)

    def answer() -> str:
        return json.dumps(_fastest(entry, key, problem, modules, mode, measurement, quiet))

    question = f"{mode} {list(modules)} {key}"
    found = json.loads(measurement.from_process_0(question, answer))
    return found and Candidate(found[0], _config(found[1]))


def _fastest(
    entry: Entry,
    key: str,
    problem: Problem,
    modules: Mapping[str, Implementation],
    mode: Mode | None,
    measurement: Measurement,
    quiet: bool,
) -> Candidate | None:
    """Does what `fastest` does, for one process; `entry` says what is asked, under its key."""
    store, kind = cache.user_cache(), measurement.device_kind
    direction, label = entry["direction"], f"{entry['operator']} {entry['direction']}"
    candidates = [
        Candidate(name, config)
        for name, module in modules.items()
        for config in _configs(module, direction, problem)
    ]
    known = store.get(kind, key)
    counting = _counting(known, candidates)
    if known and not counting:
        _warn_of_other_parameters(label, known, candidates)
    if counting or mode == "cached":
        return _best(counting, candidates)
    if len(candidates) == 1:
        return candidates[0]
    if 0 in problem.shape or (quiet and measurement.interpreting(modules)):
        # Nothing is computed: any will do. An interpreter's times nobody asked for.
        return None
    reason = measurement.untimeable()
    if not all(isinstance(size, int) for size in problem.shape):
        reason = f"arrays {problem.shape} of symbolic size have no values"
    if reason is not None:
        if not quiet:
            _warn(f"{label} cannot be timed here: {reason}")
        return None
    with _SEARCHING:
        # Another thread may have measured it meanwhile.
        counting = _counting(store.get(kind, key), candidates)
        if not counting:
            counting = found = {**entry, **_in_thread(label, candidates, modules, measurement)}
            best = _best(found, candidates)
            if best is None:
                why = "; ".join(f"{_candidate(one)}: {one['failed']}" for one in found["measured"])
                _warn(f"{label} of {problem}: no implementation could be timed: {why}")
            # The next process tries again where all failed, for want of memory perhaps.
            store.put(kind, [found], write=best is not None)
    return _best(counting, candidates)


def _configs(module: Implementation, direction: str, problem: Problem) -> list[TuningParams]:
    """The parameters that an implementation offers, hashable."""
    return [tuple(offered.items()) for offered in search_space(module, direction, problem)]


def _plain(value: object) -> object:
    """A field of a problem as JSON says it."""
    if isinstance(value, (tuple, list)):
        return [_plain(one) for one in value]
    return value if isinstance(value, (int, float, str, bool, type(None))) else str(value)


def _counting(entry: Entry | None, candidates: Sequence[Candidate]) -> Entry | None:
    """The entry with its times of these candidates alone; None where it lacks a candidate."""
    counting = [one for one in entry["measured"] if _candidate(one) in candidates] if entry else []
    measured = [_candidate(one) for one in counting]
    if not entry or any(candidate not in measured for candidate in candidates):
        return None
    return {**entry, "measured": counting}


def _warn_of_other_parameters(label: str, entry: Entry, candidates: Sequence[Candidate]) -> None:
    """Warns if an entry does not count because an implementation's parameters are others now."""
    measured = [_candidate(one) for one in entry["measured"]]
    lacking = {one.implementation for one in candidates if one not in measured}
    changed = sorted(lacking & {one.implementation for one in measured})
    if changed:
        warnings.warn(
            f"what was measured of {label} does not count, {', '.join(changed)} offers other "
            "parameters now",
            RuntimeWarning,
            stacklevel=2,
        )


def _best(counting: Entry | None, candidates: Sequence[Candidate]) -> Candidate | None:
    """The fastest of these candidates; None of no entry, or where all failed."""
    timed = [one for one in counting["measured"] if "ms" in one] if counting else []
    if counting is None or not timed:
        return None
    used = _USED.get()
    if used is not None and counting not in used:
        used.append(counting)
    best = min(timed, key=lambda one: one["ms"])
    # The one that is offered: a file may have 1 or 1.0 for True.
    return candidates[candidates.index(_candidate(best))]


def _candidate(measured: Json) -> Candidate:
    return Candidate(measured["implementation"], _config(measured["config"].items()))


def _config(items: Iterable[tuple[str, Any]]) -> TuningParams:
    """Parameters as they come from JSON, which knows lists alone."""
    return tuple((name, tuple(v) if isinstance(v, list) else v) for name, v in items)


def _warn(message: str) -> None:
    warnings.warn(f"{message}; the rule of the device chooses", RuntimeWarning, stacklevel=2)


def _in_thread(
    label: str,
    candidates: Sequence[Candidate],
    modules: Mapping[str, Implementation],
    measurement: Measurement,
) -> Entry:
    """Searches in a thread of its own; an interrupt ends it after the run that is under way."""
    stopped = threading.Event()
    search = partial(_search, label, candidates, modules, measurement, stopped)
    with ThreadPoolExecutor(1, thread_name_prefix="flash-wtconv tuner") as pool:
        try:
            return pool.submit(measurement.untraced(search)).result()
        except BaseException:
            stopped.set()
            raise


def _search(
    label: str,
    candidates: Sequence[Candidate],
    modules: Mapping[str, Implementation],
    measurement: Measurement,
    stopped: threading.Event,
) -> Entry:
    """Times every candidate that runs and is right, the fastest first; `failed` says why not."""
    times: dict[Candidate, list[float]] = {}
    failed: dict[Candidate, str] = {}
    calls: dict[Candidate, Callable[[], Tree]] = {}
    reference = _Reference(measurement)

    def best() -> float:
        return min(map(median, times.values()), default=math.inf)

    def check() -> None:
        if stopped.is_set():
            raise KeyboardInterrupt

    def again(runs: int, within: float) -> None:
        """Times the best candidates in turns, so that a drift of the machine meets all."""
        near = [one for one, spent in times.items() if median(spent) <= within * best()]
        for _ in range(runs if len(near) > 1 else 0):
            for candidate in near:
                check()
                times[candidate].append(measurement.milliseconds(calls[candidate]))

    with _progress(f"timing {label}", len(candidates)) as advance:
        for candidate in candidates:
            check()
            try:
                call = measurement.prepared(modules[candidate.implementation], candidate.config)
                wrong = reference.fault(call())
                if wrong is None:
                    times[candidate] = [measurement.milliseconds(call)]
                    calls[candidate] = call
                else:
                    failed[candidate] = wrong
                    _log.warning("%s: %s is disqualified, %s", label, candidate, wrong)
            # Compilers and drivers fail in their own ways, and one that fails is no candidate.
            except Exception as error:
                failed[candidate] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
                _log.info("%s: %s cannot run: %s", label, candidate, failed[candidate])
            advance()
        again(_RUNS - 1, _HOPELESS)
        again(_TIE_RUNS, _TIE)
    ranking = sorted(times, key=lambda candidate: median(times[candidate]))
    _tell(label, [(candidate, median(times[candidate])) for candidate in ranking])
    measured: list[Json] = [
        {**_said(candidate), "ms": round(median(times[candidate]), 6)} for candidate in ranking
    ]
    measured += [{**_said(candidate), "failed": why} for candidate, why in failed.items()]
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "measured": measured}


def _said(candidate: Candidate) -> Json:
    return {"implementation": candidate.implementation, "config": dict(candidate.config)}


def _tell(label: str, ranking: Sequence[tuple[Candidate, float]]) -> None:
    """One line on who won, and by how much."""
    if not ranking:
        return
    (winner, best), *others = ranking
    line = f"{label}: {winner} takes {best:.3g} ms"
    if others:
        second, time = others[0]
        line += f", {time / best:.2f} times faster than {second}, best of {len(ranking)}"
    _log.info("%s", line)


class _Reference:
    """The right output, computed when first needed."""

    def __init__(self, measurement: Measurement) -> None:
        self._measurement = measurement
        self._right: Outputs | None = None

    def fault(self, result: Tree) -> str | None:
        """The fault of a result: NaN, zeros, or far from the reference; None if it has none."""
        import numpy as np

        if self._right is None:
            self._right = self._measurement.reference()
        found = self._measurement.arrays(result)
        for (_, out), (dtype, right) in zip(found, self._right, strict=True):
            limit = _TOLERANCE[dtype]
            mine, wanted = (
                one.astype(np.promote_types(np.float32, one.dtype)) for one in (out, right)
            )
            if mine.shape != wanted.shape:
                return f"an output has shape {mine.shape}, expected {wanted.shape}"
            if not np.isfinite(mine).all() and np.isfinite(wanted).all():
                return "an output is not finite"
            largest = float(np.abs(wanted).max(initial=0.0))
            if largest and not mine.any():
                return "an output is zero"
            off = float(np.abs(mine - wanted).max(initial=0.0))
            if off > limit * largest:
                return f"an output is off by {off:.3g}, its largest is {largest:.3g}"
        return None


@contextmanager
def _progress(label: str, total: int) -> Iterator[Callable[[], None]]:
    """Shows a bar on a terminal, once the block has taken a while; gives what advances it."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_interactive:
        _log.warning("%s: %d candidates; only the first run is slow", label, total)
        yield lambda: None
        return
    bar = Progress(console=console, transient=True)
    task = bar.add_task(escape(label), total=total)
    timer = threading.Timer(_PATIENCE_S, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda: bar.advance(task)
    finally:
        timer.cancel()
        timer.join()
        bar.stop()
