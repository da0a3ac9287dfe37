"""Fair times on a shared machine: contenders take turns, and only their ratios are claimed."""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import NamedTuple

_ROUNDS = 5
_CALLS = 2
_TURN_S = 0.1
_REST_S = 0.25
_NOISY = 2


class Spread(NamedTuple):
    """Median, least and greatest of several times, in milliseconds."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, times: Sequence[float]) -> "Spread":
        """The spread of some times.

        Example:
            >>> Spread.of([1.0, 5.0, 2.0])
            Spread(median=2.0, least=1.0, greatest=5.0)
        """
        return cls(median(times), min(times), max(times))

    def row(self) -> dict[str, float]:
        """The times as a row of a report holds them.

        Example:
            >>> Spread(2.0, 1.0, 5.0).row()
            {'median_ms': 2.0, 'least_ms': 1.0, 'greatest_ms': 5.0}
        """
        return {f"{key}_ms": value for key, value in self._asdict().items()}


def comparison(times: Spread, baseline: Spread) -> dict[str, float | bool]:
    """The speed over a baseline, and whether the times allow to speak of one.

    Args:
        times: Times of what is compared.
        baseline: Times of what it is compared with.

    Returns:
        `speedup`, the baseline's median over its own, and `too_noisy`: whether the greatest of
        either's times is more than twice the least.

    Example:
        >>> comparison(Spread(2.0, 2.0, 2.0), Spread(3.0, 1.0, 5.0))
        {'speedup': 1.5, 'too_noisy': True}
    """
    noisy = any(one.greatest > _NOISY * one.least for one in (times, baseline))
    return {"speedup": baseline.median / times.median, "too_noisy": noisy}


def take_turns(
    contenders: Mapping[str, Callable[[], object]], on_call: Callable[[], None] = lambda: None
) -> dict[str, Spread]:
    """Times calls that block until done, in turns, so that a drift of the machine meets all.

    Before its timed calls a contender rests and runs once unmeasured: the threads of the one
    before it (OpenMP's spin for a while) have gone to sleep, and caches hold its own data. A turn
    lasts a tenth of a second at least, so that a short call meets an awake machine too.

    Args:
        contenders: Call by name.
        on_call: Told after each contender's turn, for a progress bar.

    Returns:
        Times by name, in milliseconds.

    Example:
        >>> sorted(take_turns({"a nap": lambda: time.sleep(0.01)})["a nap"]._asdict())
        ['greatest', 'least', 'median']
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(_ROUNDS):
        for name, call in contenders.items():
            time.sleep(_REST_S)
            call()
            times[name] += _turn(call)
            on_call()
    return {name: Spread.of(t) for name, t in times.items()}


def _turn(call: Callable[[], object]) -> list[float]:
    """Milliseconds of each call of one turn."""
    times: list[float] = []
    end = time.perf_counter() + _TURN_S
    while len(times) < _CALLS or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def turns(contenders: int) -> int:
    """The number of times that `take_turns` calls `on_call`.

    Example:
        >>> turns(2)
        10
    """
    return _ROUNDS * contenders
