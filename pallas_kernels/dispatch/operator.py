"""An operator's implementations, and the choice of one for a device and a problem."""

import importlib
import importlib.util
import os
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import ModuleType
from typing import Any

from pallas_kernels.dispatch import table, tuner
from pallas_kernels.dispatch.tuner import Candidate, Measurement

Choice = str | StrEnum | Sequence[str | StrEnum] | None
"""What `implementation=` takes."""

AUTO = "auto"
"""The filter that takes the fastest of all implementations, as measured."""

_REGISTRY: dict[str, "Operator"] = {}


@dataclass(frozen=True)
class Operator:
    """An operator, its implementations, and which of them each platform prefers.

    An implementation `name` is the module `{package}.{name}`, imported when it is first
    considered. It offers `unavailable(platform) -> str | None`, the reason why it cannot run on
    this machine, and `check(direction, problem)`, which raises `NotImplementedError` with the
    reason why it cannot take this problem. It may offer `search_space(direction, problem)`, a list
    of dicts of JSON-able parameters, of which the tuner finds the best.

    Args:
        name: Lower-case name; the environment variables are `FLASH_WTCONV_{NAME}_{DIRECTION}`.
        package: Package whose modules are the implementations.
        implementations: Enum of every implementation's name.
        rule: For each platform (`"cpu"`, `"gpu"`, `"tpu"`) its implementations, best first.
        directions: The directions that are chosen separately, e.g. `("fwd", "bwd")`.
    """

    name: str
    package: str
    implementations: type[StrEnum]
    rule: Mapping[str, Sequence[str]]
    directions: tuple[str, ...] = ("fwd", "bwd")

    def __post_init__(self) -> None:
        """Registers the operator, so that `operators()` lists it."""
        _REGISTRY[self.name] = self

    def module(self, name: str) -> ModuleType:
        """The module of one implementation, imported on first use."""
        return importlib.import_module(f"{self.package}.{name}")

    def pick(
        self,
        direction: str,
        implementation: Choice,
        platform: str,
        problem: Any,
        device_kind: str | None = None,
    ) -> str:
        """Picks the implementation for one direction of one call.

        Preferred is what `table.fastest` names for the kind of device, where it was measured, and
        after it the platform's rule. Nothing is measured.

        Args:
            direction: One of `directions`.
            implementation: Filter on the candidates; `None` asks the environment variable, and
                without one takes the device's order of preference. `"auto"` is all of them.
            platform: The device's platform, e.g. `"cpu"`.
            problem: The operator's description of the call, handed to `check` and told in errors.
            device_kind: The device's kind, e.g. `"NVIDIA H200"`; `None` goes by the rule alone.

        Returns:
            The name of the first candidate that can run, in the device's order of preference.

        Raises:
            ValueError: An unknown or empty filter; names the argument or the variable.
            NotImplementedError: No candidate can run; says why for each.
        """
        _, wanted, filter_ = self._wanted(direction, implementation)
        preference = self._preference(direction, platform, problem, device_kind)
        return next(self._able(direction, filter_, wanted, preference, platform, problem))

    def choose(
        self,
        direction: str,
        implementation: Choice,
        platform: str,
        problem: Any,
        measurement: Callable[[], Measurement],
        device_kind: str | None = None,
        measured_as: Any = None,
    ) -> Candidate:
        """Chooses the implementation and its parameters for one direction of one call.

        As `pick`; but of a sequence of names or `"auto"`, and of any filter inside
        `tuning("cached")` and `tuning("search")`, the one that was measured to be the fastest.

        Args:
            direction: One of `directions`.
            implementation: Filter on the candidates.
            platform: The device's platform.
            problem: The operator's description of the call, a NamedTuple with the field `shape`.
            measurement: Makes what runs and times a candidate, if it comes to that; see
                `tuner.Measurement`.
            device_kind: The device's kind.
            measured_as: The problem whose times count for this one, and which `measurement` is of,
                where an operator lets problems share them; None is `problem` itself.

        Returns:
            The implementation and its parameters, none where nothing was measured.

        Raises:
            ValueError: An unknown or empty filter; names the argument or the variable.
            NotImplementedError: No candidate can run; says why for each.
        """
        several, wanted, filter_ = self._wanted(direction, implementation)
        preference = self._preference(direction, platform, problem, device_kind)
        able = self._able(direction, filter_, wanted, preference, platform, problem)
        first = next(able)
        mode = tuner.mode()
        if mode == "off" or (mode is None and not several):
            return Candidate(first)
        modules = {name: self.module(name) for name in (first, *able)}
        problem = problem if measured_as is None else measured_as
        best = tuner.fastest(self.name, direction, problem, modules, measurement())
        return best or Candidate(first)

    def check_names(self, implementation: Choice, argument: str = "implementation") -> None:
        """Checks `implementation=` before there is a problem to pick for.

        Args:
            implementation: Filter on the candidates.
            argument: What the caller calls it.

        Raises:
            ValueError: An unknown or empty filter; names the argument.
        """
        if implementation is not None:
            self._names(implementation, argument)

    def status(self, platform: str) -> list[tuple[str, str | None]]:
        """Every implementation with the reason why it cannot run here, `None` where it can."""
        return [
            (str(name), self._unavailable(str(name), platform)) for name in self.implementations
        ]

    def _preference(
        self, direction: str, platform: str, problem: Any, device_kind: str | None
    ) -> list[str]:
        """The implementations of a device, best first."""
        rule = list(self.rule.get(platform, self.rule["cpu"]))
        if device_kind is None:
            return rule
        fastest = table.fastest(self.name, direction, problem, device_kind)
        # A table may name an implementation that is no more.
        known = fastest in [str(name) for name in self.implementations]
        return [str(fastest), *(name for name in rule if name != fastest)] if known else rule

    def _wanted(self, direction: str, implementation: Choice) -> tuple[bool, list[str] | None, str]:
        """Whether a filter leaves a choice to the tuner, its names (None: the rule's), and itself.

        The last is for errors, which tell an argument from the environment's variable.
        """
        source = "implementation"
        if implementation is None:
            source = f"FLASH_WTCONV_{self.name}_{direction}".upper()
            value = os.environ.get(source, "").strip()
            if not value:
                return False, None, "implementation=None"
            implementation = _parse(value)
        names = self._names(implementation, source)
        several = not isinstance(implementation, str) or implementation == AUTO
        return several, names, f"{source}={implementation!r}"

    def _able(
        self,
        direction: str,
        filter_: str,
        wanted: list[str] | None,
        preference: list[str],
        platform: str,
        problem: Any,
    ) -> Iterator[str]:
        """The candidates that can run, best first; raises where there are none."""
        if wanted is None:
            names = preference
        else:
            names = sorted(
                wanted, key=lambda n: preference.index(n) if n in preference else len(preference)
            )
        reasons: list[str] = []
        for name in dict.fromkeys(names):
            reason = self._refusal(name, direction, platform, problem)
            if reason is None:
                yield name
            else:
                reasons.append(f"{name}: {reason}")
        if len(reasons) == len(set(names)):
            raise NotImplementedError(
                f"{self.name} ({direction}) cannot run on {platform} with {filter_} for {problem}: "
                + "; ".join(reasons)
            )

    def _names(self, implementation: Choice, source: str) -> list[str]:
        """The filter as a list of known names."""
        known = [str(name) for name in self.implementations]
        if isinstance(implementation, str) and implementation == AUTO:
            return known
        many = [implementation] if isinstance(implementation, str) else implementation
        if not isinstance(many, Iterable) or isinstance(many, bytes):
            raise ValueError(f"{source}={many!r}: expected None, a name or a sequence of names")
        names = list(many)
        if not names:
            raise ValueError(f"{source} is empty: name at least one of {known}, or use None")
        if AUTO in names:
            raise ValueError(f"{source}={names}: {AUTO!r} is all implementations, and stands alone")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(
                f"{source} names {unknown}, but {self.name} has the implementations {known} "
                f"and {AUTO!r}"
            )
        return [str(name) for name in names]

    def _refusal(self, name: str, direction: str, platform: str, problem: Any) -> str | None:
        reason = self._unavailable(name, platform)
        if reason is None:
            try:
                self.module(name).check(direction, problem)
            except NotImplementedError as error:
                reason = str(error)
        return reason

    def _unavailable(self, name: str, platform: str) -> str | None:
        try:
            return self.module(name).unavailable(platform)
        except ImportError as error:
            return f"import failed: {error}"


def operators() -> list[Operator]:
    """Every operator of `pallas_kernels`, and those of other packages that were imported, by name.

    An operator is a folder of `pallas_kernels` with a module `api`, which registers it.
    """
    import pallas_kernels

    for folder in pkgutil.iter_modules(pallas_kernels.__path__, "pallas_kernels."):
        if folder.ispkg and importlib.util.find_spec(f"{folder.name}.api"):
            importlib.import_module(f"{folder.name}.api")
    return [_REGISTRY[name] for name in sorted(_REGISTRY)]


def _parse(value: str) -> str | list[str]:
    """`"xla"` as a name, `"[xla, triton]"` and `"xla, triton"` as lists, in any case."""
    inner = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    names = [name.strip().lower() for name in inner.split(",") if name.strip()]
    return names[0] if len(names) == 1 else names
