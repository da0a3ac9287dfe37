"""An operator's implementations, and the choice of one for a device and a problem."""

import importlib
import importlib.util
import logging
import os
import pkgutil
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple, ParamSpec, TypeVar, cast

from pallas_kernels.dispatch import cache, table, tuner
from pallas_kernels.dispatch.backend import Implementation, Problem, missing
from pallas_kernels.dispatch.tuner import Candidate, Measurement, Mode

P = ParamSpec("P")
R = TypeVar("R")

Choice = str | StrEnum | Sequence[str | StrEnum] | None
"""The type of the argument `implementation=`."""

AUTO = "auto"
"""The filter that takes the fastest of all implementations, as measured."""

_REGISTRY: dict[str, "Operator"] = {}
_LOGGED: set[tuple[str, ...]] = set()
"""Messages about implementations that were left out, which are logged once."""

_MOST_REMEMBERED = 4096
_REMEMBERED: list[Callable[[], None]] = []
"""The functions that clear the caches of choices."""

_log = logging.getLogger("flash_wtconv")


# By identity: each operator is made once, and a request of one is a key of caches.
@dataclass(frozen=True, eq=False)
class Operator:
    """An operator, its implementations, and which of them each platform prefers.

    An implementation `name` is the module `{package}.{name}`, imported when it is first
    considered; `backend.Implementation` says what it offers.

    Args:
        name: Lower-case name; the environment variables are `FLASH_WTCONV_{NAME}_{DIRECTION}`.
        package: Package whose modules are the implementations.
        implementations: Enum of every implementation's name.
        rule: For each platform (`"cpu"`, `"gpu"`, `"tpu"`) its implementations, best first.
        directions: The directions that are chosen separately, e.g. `"fwd"` and `"bwd"`, each with
            the functions that a module needs to compute it.
        argument: The name that the operator's functions give the filter on the implementations;
            `{direction}` in it is the direction's.
        aliases: Other names that the filter may have, with the implementation that each means on
            every platform.
        measures_names: Whether one name measures the parameters of its implementation on first use,
            as lists and `"auto"` do.
    """

    name: str
    package: str
    implementations: type[StrEnum]
    rule: Mapping[str, Sequence[str]]
    directions: Mapping[str, tuple[str, ...]]
    argument: str = "implementation"
    aliases: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    measures_names: bool = False

    def __post_init__(self) -> None:
        """Registers the operator, so that `operators()` lists it."""
        _REGISTRY[self.name] = self

    def module(self, name: str) -> Implementation:
        """The module of one implementation, imported on first use."""
        return cast(Implementation, importlib.import_module(f"{self.package}.{name}"))

    def request(
        self,
        direction: str,
        implementation: Choice,
        platform: str,
        device_kind: str | None = None,
        state: Hashable = None,
    ) -> "Request":
        """The request of one direction of a call, before or after there is a problem.

        Args:
            direction: One of `directions`.
            implementation: Filter on the candidates; `None` asks the environment variable, and
                without one takes the device's order of preference. `"auto"` is all of them.
            platform: The device's platform, e.g. `"cpu"`.
            device_kind: The device's kind, e.g. `"NVIDIA H200"`; `None` goes by the rule alone.
            state: Other state that `unavailable` of an implementation depends on, hashable.

        Returns:
            The request, hashable.

        Raises:
            ValueError: An unknown or empty filter; names the argument or the variable.
        """
        several, names, filter_ = self._wanted(direction, implementation, platform)
        mode, epoch = tuner.mode(), None
        # Times decide, as far as they are known or may be measured.
        if mode in ("cached", "search") or (mode is None and several):
            epoch = tuner.trace(), cache.user_cache().generation(self.name, direction)
        return Request(
            self, direction, names, several, filter_, platform, device_kind, mode, epoch, state
        )

    def pick(
        self,
        direction: str,
        implementation: Choice,
        platform: str,
        problem: Problem,
        device_kind: str | None = None,
    ) -> str:
        """The implementation that a call would take, were nothing measured: see `Request.pick`."""
        return self.request(direction, implementation, platform, device_kind).pick(problem)

    def check_names(self, implementation: Choice, argument: str | None = None) -> None:
        """Checks `implementation=` before there is a problem to choose for.

        Args:
            implementation: Filter on the candidates.
            argument: The caller's name for it; None is the operator's own name for it.

        Raises:
            ValueError: An unknown or empty filter; names the argument.
        """
        if implementation is not None:
            self._names(implementation, argument or self.argument, None)

    def status(self, platform: str) -> list[tuple[str, str | None]]:
        """Every implementation with the reason why it cannot run here, `None` where it can."""
        return [
            (str(name), self._unavailable(str(name), platform)) for name in self.implementations
        ]

    def _preference(
        self, direction: str, platform: str, problem: Problem, device_kind: str | None
    ) -> list[str]:
        """The implementations of a device, best first."""
        rule = list(self.rule.get(platform, self.rule["cpu"]))
        if device_kind is None:
            return rule
        fastest = table.fastest(self.name, direction, problem, device_kind)
        # A table may name an implementation that is no more.
        if fastest is None or fastest not in [str(name) for name in self.implementations]:
            return rule
        try:
            as_measured = getattr(self.module(fastest), "as_measured", None)
        except ImportError:
            # Whether it can run at all is asked later.
            as_measured = None
        if as_measured is not None and not as_measured(direction, problem):
            return rule
        return [fastest, *(name for name in rule if name != fastest)]

    def _wanted(
        self, direction: str, implementation: Choice, platform: str
    ) -> tuple[bool, tuple[str, ...] | None, str]:
        """Whether a filter leaves a choice to the tuner, its names (None: the rule's), and itself.

        The last is for errors, which tell an argument from the environment's variable.
        """
        argument = source = self.argument.format(direction=direction)
        if implementation is None:
            source = _variable(self.name, direction)
            value = os.environ.get(source, "").strip()
            if not value:
                return False, None, f"{argument}=None"
            implementation = _parse(value)
        names = self._names(implementation, source, platform)
        one = isinstance(implementation, str) and implementation != AUTO
        shown = str(implementation) if isinstance(implementation, str) else list(names)
        return self.measures_names or not one, names, f"{source}={shown!r}"

    def _names(self, implementation: Choice, source: str, platform: str | None) -> tuple[str, ...]:
        """The filter as known names; other names stand for what they mean on the platform."""
        known = tuple(str(name) for name in self.implementations)
        if isinstance(implementation, str) and implementation == AUTO:
            return known
        many = [implementation] if isinstance(implementation, str) else implementation
        if not isinstance(many, Iterable) or isinstance(many, bytes):
            raise ValueError(f"{source}={many!r}: expected None, a name or a sequence of names")
        names = list(many)
        if not names:
            raise ValueError(f"{source} is empty: name at least one of {list(known)}, or use None")
        if AUTO in names:
            raise ValueError(f"{source}={names}: {AUTO!r} is all implementations, and stands alone")
        unknown = [name for name in names if name not in (*known, *self.aliases)]
        if unknown:
            others = f", also called {list(self.aliases)}," if self.aliases else ""
            raise ValueError(
                f"{source} names {unknown}, but {self.name} has the implementations {list(known)}"
                f"{others} and {AUTO!r}"
            )
        return tuple(str(self.aliases.get(name, {}).get(platform or "", name)) for name in names)

    def _refusal(self, name: str, direction: str, platform: str, problem: Problem) -> str | None:
        """The reason why an implementation cannot compute a problem, None if it can."""
        reason = self._unavailable(name, platform)
        if reason is not None:
            return reason
        module = self.module(name)
        lacking = missing(module, self.directions[direction])
        if lacking:
            return f"does not compute {direction}: it has no {', '.join(lacking)}"
        try:
            module.check(direction, problem)
        except NotImplementedError as error:
            return str(error)
        return None

    def _unavailable(self, name: str, platform: str) -> str | None:
        try:
            return self.module(name).unavailable(platform)
        except ImportError as error:
            return f"import failed: {error}"


class Request(NamedTuple):
    """A request of one direction of a call: a filter, the device, and how it is tuned.

    Attributes:
        operator: The operator.
        direction: One of its directions.
        names: The implementations that the filter names, None where the rule names them.
        several: Whether the filter leaves a choice to the tuner.
        filter: The filter as errors tell it.
        platform: The device's platform.
        device_kind: The device's kind; None goes by the rule alone.
        mode: The mode that `tuning` sets.
        epoch: Tells calls that choose by times from those that JAX has traced before: the number
            of a `tuner.recorded` block, and the generation of what was measured. None where
            times do not decide.
        state: Other state that `unavailable` depends on.
    """

    operator: Operator
    direction: str
    names: tuple[str, ...] | None
    several: bool
    filter: str
    platform: str
    device_kind: str | None
    mode: Mode | None
    epoch: tuple[int | None, int] | None
    state: Hashable

    def pick(self, problem: Problem) -> str:
        """The first implementation that can run, in the device's order of preference.

        Preferred is what `table.fastest` names for the kind of device, where it was measured, and
        after it the platform's rule. Nothing is measured.

        Args:
            problem: The operator's description of the call, handed to `check` and named in errors.

        Returns:
            Its name.

        Raises:
            NotImplementedError: No candidate can run; says why for each.
        """
        return next(self.able(problem))

    def choose(
        self, problem: Problem, measurement: Callable[..., Measurement], *arguments: Hashable
    ) -> Candidate:
        """Chooses the implementation and its parameters.

        As `pick`; but of a sequence of names or `"auto"`, and of any filter inside
        `tuning("cached")` and `tuning("search")`, the one that was measured to be the fastest.

        Args:
            problem: The operator's description of the call.
            measurement: Makes, of the arguments, what runs and times a candidate of
                `problem.measured_as()`, if it comes to that.
            *arguments: What times depend on beside the problem.

        Returns:
            The implementation and its parameters, none where nothing was measured.

        Raises:
            NotImplementedError: No candidate can run; says why for each.
        """
        return _chosen(self, problem, measurement, *arguments)

    def able(self, problem: Problem) -> Iterator[str]:
        """The candidates that can run, best first; raises where there are none."""
        preference = self.operator._preference(
            self.direction, self.platform, problem, self.device_kind
        )
        names: Sequence[str] = preference
        if self.names is not None:
            names = sorted(
                self.names,
                key=lambda n: preference.index(n) if n in preference else len(preference),
            )
        reasons: list[str] = []
        for name in dict.fromkeys(names):
            reason = self.operator._refusal(name, self.direction, self.platform, problem)
            if reason is None:
                yield name
            else:
                reasons.append(f"{name}: {reason}")
                if self.several and len(names) > 1:
                    self._log_left_out(name, reason)
        if len(reasons) == len(set(names)):
            raise NotImplementedError(
                f"{self.operator.name} ({self.direction}) cannot run on {self.platform} with "
                f"{self.filter} for {problem}: " + "; ".join(reasons)
            )

    def _log_left_out(self, name: str, reason: str) -> None:
        """Logs once why an implementation of a list, or of "auto", is left out."""
        message = self.operator.name, self.direction, name, reason
        if message in _LOGGED:
            return
        _LOGGED.add(message)
        named = not self.filter.endswith(f"={AUTO!r}")
        _log.log(
            logging.WARNING if named else logging.INFO,
            "%s %s: %s is left out of %s, %s",
            *(self.operator.name, self.direction, name, self.filter, reason),
        )


def until_forgotten(choose: Callable[P, R]) -> Callable[P, R]:
    """A function that chooses, of hashable arguments, whose results `forget` forgets.

    Args:
        choose: A function of requests, which hold what the environment and `tuning` say, and of
            problems.

    Returns:
        The same function, called once for equal arguments.

    Example:
        >>> until_forgotten(len)("triton")
        6
    """
    known = lru_cache(_MOST_REMEMBERED)(choose)
    _REMEMBERED.append(known.cache_clear)
    return cast(Callable[P, R], known)


@until_forgotten
def _chosen(
    request: Request,
    problem: Problem,
    measurement: Callable[..., Measurement],
    *arguments: Hashable,
) -> Candidate:
    """The result of `Request.choose`, which a block of `tuner.recorded` records once."""
    if request.epoch is None:
        return Candidate(request.pick(problem))
    able = list(request.able(problem))
    modules = {name: request.operator.module(name) for name in able}
    best = tuner.fastest(
        *(request.operator.name, request.direction, problem.measured_as(), modules, request.mode),
        measurement(*arguments),
        # One name that measures by itself takes its own parameters where it cannot.
        quiet=request.operator.measures_names and len(able) == 1 and request.mode is None,
    )
    return best or Candidate(able[0])


def forget() -> None:
    """Makes calls choose anew, after a table of defaults was written for instance."""
    for clear in _REMEMBERED:
        clear()
    _LOGGED.clear()
    table.fastest.cache_clear()


def operators() -> list[Operator]:
    """Every operator of `pallas_kernels`, and those of other packages that were imported, by name.

    An operator is a folder in `pallas_kernels`, or in a folder of it, with a module `api`, which
    registers it.
    """
    import pallas_kernels

    for folder in pkgutil.walk_packages(pallas_kernels.__path__, "pallas_kernels."):
        if folder.ispkg and importlib.util.find_spec(f"{folder.name}.api"):
            importlib.import_module(f"{folder.name}.api")
    return [_REGISTRY[name] for name in sorted(_REGISTRY)]


@lru_cache
def _variable(operator: str, direction: str) -> str:
    """The environment's variable of an operator's direction."""
    return f"FLASH_WTCONV_{operator}_{direction}".upper()


def _parse(value: str) -> str | list[str]:
    """`"xla"` as a name, `"[xla, triton]"` and `"xla, triton"` as lists, in any case."""
    inner = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    names = [name.strip().lower() for name in inner.split(",") if name.strip()]
    return names[0] if len(names) == 1 else names
