"""Clocks for benchmarks: a GPU's own events where JAX's profiler shows them, else the host's."""

import os
import warnings
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData, ProfileOptions

from flash_wtconv_jax.bench import timing
from flash_wtconv_jax.bench.timing import Spread
from pallas_kernels.common import device
from pallas_kernels.common.types import Tree

Call = Callable[[], Tree]
"""A function that enqueues the work of one run and returns the arrays to wait for."""

Name = TypeVar("Name", bound=Hashable)

_AT_ONCE = 20
"""Calls of an accelerator that the host waits for together, so that none waits to be launched."""
_ROUNDS = 20
"""Timed calls of a contender by device events."""
_PAUSE_BYTES = 2**32
"""Bytes copied before each call that device events time: a pause of a millisecond or two."""


class Clock(Protocol):
    """A clock that times contenders in turns.

    Attributes:
        name: The name of the clock in reports.
    """

    name: str

    def take_turns(
        self, contenders: Mapping[str, Call], on_turn: Callable[[], None]
    ) -> dict[str, Spread]:
        """Times of each contender in milliseconds."""

    def turns(self, contenders: int) -> int:
        """The number of times that `take_turns` calls `on_turn`."""


def best() -> tuple[Clock, str | None]:
    """The best clock of this machine.

    Returns:
        Device events on a GPU whose events the profiler shows, else the host's clock; and why a
        GPU's events cannot be had, None where they can or there is no GPU.

    Example:
        >>> with jax.default_device(jax.devices("cpu")[0]):
        ...     clock, why_not = best()
        >>> clock.name, why_not
        ('host', None)
    """
    if device.platform() != "gpu":
        return HostClock(), None
    try:
        return DeviceEvents(), None
    except RuntimeError as error:
        return HostClock(), str(error)


def compiled(programs: Mapping[Name, jax.stages.Lowered]) -> dict[Name, jax.stages.Compiled]:
    """The programs, compiled beside each other but for those whose kernels XLA chooses by time.

    XLA times its convolutions and matrix products where it compiles. Beside other threads it has
    chosen kernels four times slower: then what is compared with would be wrong.

    Args:
        programs: Lowered functions by name.

    Example:
        >>> found = compiled({"plus": jax.jit(lambda x: x + 1).lower(1.0)})
        >>> float(found["plus"](1.0))
        2.0
    """
    found = {name: lowered.compile() for name, lowered in programs.items() if _is_timed(lowered)}
    rest = {name: lowered for name, lowered in programs.items() if name not in found}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        more = pool.map(lambda lowered: lowered.compile(), rest.values())
        found |= zip(rest, more, strict=True)
    return {name: found[name] for name in programs}


def _is_timed(lowered: jax.stages.Lowered) -> bool:
    """Whether XLA has kernels to choose from."""
    text = lowered.as_text()
    return "stablehlo.convolution" in text or "stablehlo.dot" in text


def users(clock: Clock) -> "HostClock | None":
    """The clock of calls as users make them, if `clock` is another.

    One compiled function, called back to back on the same arrays: caches are warm, XLA launches
    many small kernels as one CUDA graph, and what the host is too slow for is in the time.

    Args:
        clock: The clock that `best` returns.

    Example:
        >>> users(HostClock()) is None
        True
    """
    return None if clock.name == HostClock.name else HostClock()


class HostClock:
    """The host's clock around calls that it waits for; on an accelerator, twenty calls at once."""

    name = "host"

    def take_turns(
        self, contenders: Mapping[str, Call], on_turn: Callable[[], None]
    ) -> dict[str, Spread]:
        """Times calls that do not block, in turns as `timing.take_turns` does.

        Example:
            >>> sorted(HostClock().take_turns({"nothing": lambda: None}, lambda: None))
            ['nothing']
        """
        at_once = 1 if device.on_cpu() else _AT_ONCE

        def blocking(call: Call) -> Callable[[], None]:
            def run() -> None:
                for _ in range(at_once):
                    result = call()
                jax.block_until_ready(result)

            return run

        calls = {name: blocking(call) for name, call in contenders.items()}
        times = timing.take_turns(calls, on_turn)
        return {name: Spread(*(t / at_once for t in spread)) for name, spread in times.items()}

    def turns(self, contenders: int) -> int:
        """The number of times that `take_turns` calls `on_turn`."""
        return timing.turns(contenders)


class Event(NamedTuple):
    """A kernel or copy of a GPU.

    Attributes:
        name: The kernel's name.
        start: Its start in nanoseconds.
        end: Its end.
        operation: The name of the compiled program's operation that launched it, "" where the
            profiler does not tell.
    """

    name: str
    start: float
    end: float
    operation: str = ""


class DeviceEvents:
    """Start and end of every kernel and copy of a GPU, from a trace of JAX's profiler.

    A call's time is that from the start of its first event to the end of its last, so gaps between
    its kernels count. Before each call runs a pause, a copy of four gigabytes: while it runs the
    host enqueues the call, so that launching is not timed, and it leaves nothing of the call's
    arrays in the caches. It is an operation that no layer has alone, so that the name of its kernel
    tells the calls apart. While the profiler runs, XLA launches kernels one by one that otherwise
    are one CUDA graph.

    Raises:
        RuntimeError: The profiler shows no event of a GPU.
    """

    name = "device events"

    def __init__(self) -> None:
        filler = jnp.zeros(_pause_bytes() // 4, jnp.uint32)
        compiled = jax.jit(jnp.invert).lower(filler).compile()
        self._pause = lambda: compiled(filler)
        jax.block_until_ready(self._pause())
        events = traced(lambda: jax.block_until_ready(self._pause()))
        if not events:
            raise RuntimeError(
                "JAX's profiler shows no event of the GPU; it needs CUPTI, which comes with JAX's "
                "CUDA packages, and no other profiler at the same time"
            )
        self._mark = max(events, key=lambda event: event.end - event.start).name

    def take_turns(
        self, contenders: Mapping[str, Call], on_turn: Callable[[], None]
    ) -> dict[str, Spread]:
        """Times calls one after the other, in turns, so that a drift of the device meets all.

        Args:
            contenders: Call by name.
            on_turn: Told after each call, for a progress bar.

        Returns:
            Times by name, in milliseconds.

        Raises:
            RuntimeError: The trace does not show every call.
        """
        for call in contenders.values():
            jax.block_until_ready(call())
        # The first round is not counted: in it the profiler itself is not warm.
        order = [name for _ in range(1 + _ROUNDS) for name in contenders]

        def run() -> None:
            for name in order:
                self._pause()
                jax.block_until_ready(contenders[name]())
                on_turn()

        spans = _spans(traced(run), self._mark)
        if len(spans) != len(order):
            raise RuntimeError(
                f"the profiler shows {len(spans)} of {len(order)} calls of {list(contenders)}"
            )
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for name, span in list(zip(order, spans, strict=True))[len(contenders) :]:
            times[name].append(span)
        return {name: Spread.of(spans) for name, spans in times.items()}

    def turns(self, contenders: int) -> int:
        """The number of times that `take_turns` calls `on_turn`."""
        return (1 + _ROUNDS) * contenders


def _pause_bytes() -> int:
    """Four gigabytes, or a sixteenth of a small device's memory."""
    (gpu,) = jnp.zeros(()).devices()
    limit = (gpu.memory_stats() or {}).get("bytes_limit", 16 * _PAUSE_BYTES)
    return min(_PAUSE_BYTES, limit // 16)


def traced(run: Callable[[], object]) -> list[Event]:
    """The events of the GPU while a function ran.

    Args:
        run: The function, which must wait for its own work.

    Returns:
        Kernels, copies and fills by their start; none where there is no GPU.
    """
    options = ProfileOptions()
    options.host_tracer_level = 0
    options.python_tracer_level = 0
    with TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        return [
            event
            for path in Path(folder).rglob("*.xplane.pb")
            for event in _events(ProfileData.from_file(str(path)))
        ]


def _events(profile: ProfileData) -> list[Event]:
    """Kernels, copies and fills of all GPUs and streams, by their start."""
    with warnings.catch_warnings():
        # From Python 3.12 on JAX's own type draws a warning, which as an error ends the process.
        warnings.simplefilter("ignore", DeprecationWarning)
        events = [
            Event(
                event.name,
                event.start_ns,
                event.start_ns + event.duration_ns,
                str(next((value for key, value in event.stats if key == "hlo_op"), "")),
            )
            for plane in profile.planes
            if plane.name.startswith("/device:GPU:")
            for line in plane.lines
            # Other lines are overheads, and sums that the profiler derives.
            if line.name.startswith("Stream #")
            for event in line.events
        ]
    return sorted(events, key=lambda event: event.start)


def _spans(events: list[Event], mark: str) -> list[float]:
    """Milliseconds from the first start to the last end of the events after each mark."""
    groups: list[list[Event]] = []
    for event in events:
        if event.name == mark:
            groups.append([])
        elif groups:
            groups[-1].append(event)
    return [(max(event.end for event in group) - group[0].start) / 1e6 for group in groups if group]
