"""The times measured on this machine: in memory, and in one JSON file a kind of device.

The files lie in the user's cache folder, `flash_wtconv/measured/`, an entry a line:

    {"operator": "wtconv", "direction": "fwd", "problem": {"shape": [8, 56, 56, 96], ...},
     "static": {"bias": true, ...}, "versions": {"jax": "0.11.2", "flash-wtconv": "0.1.0"},
     "date": "2026-11-21T12:00:00+00:00",
     "measured": [{"implementation": "triton", "config": {}, "ms": 0.45},
                  {"implementation": "xla", "config": {}, "failed": "why"}]}

Operator, direction, problem, static arguments and versions are an entry's key. `measured` lists the
fastest first and what failed last, so that a filter on the implementations finds its best too. It
is also the search space that was measured: the tuner takes an entry only where all that is
offered now is in it, and of it nothing else.

Files are written whole, under a lock, with what other processes wrote meanwhile, by a thread that
the interpreter waits for at its end. Where they cannot be, memory alone remembers, and a warning
says so once.
"""

import itertools
import json
import os
import shutil
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from pallas_kernels.common.types import Json
from pallas_kernels.dispatch.table import check_fields, file_name, is_time

Entry = Json
"""An entry, as the docstring of this module shows it."""

_FORMAT = "flash-wtconv measurements"
_VERSION = 1
_ENTRY = {
    "operator": str,
    "direction": str,
    "problem": dict,
    "static": dict,
    "versions": dict,
    "measured": list,
}
_CANDIDATE = {"implementation": str, "config": dict}
_LOCK_S = 30
"""Seconds that a lock is waited for; a write takes milliseconds."""

_GENERATIONS = itertools.count()


class Cache:
    """Entries by kind of device, remembered in memory and in the files of a folder.

    Args:
        folder: Where the files are, made when first written; None remembers in memory alone.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._lock = threading.RLock()
        self._entries: dict[str, dict[str, Entry]] = {}
        self._unwritten: dict[str, dict[str, Entry]] = {}
        self._writer: threading.Thread | None = None
        self._memory_alone = folder is None
        self._generations: dict[tuple[str, str], int] = {}

    def get(self, device_kind: str, key: str) -> Entry | None:
        """The entry of a key on a kind of device, None where nothing was measured."""
        with self._lock:
            return self._known(device_kind).get(key)

    def put(self, device_kind: str, entries: Iterable[Entry], *, write: bool = True) -> None:
        """Remembers entries, and with `write` has them written in the background.

        An entry whose key is known is merged with the old one; where both measured an
        implementation, the new times count.
        """
        with self._lock:
            known = self._known(device_kind)
            write = write and not self._memory_alone
            for entry in entries:
                _add(known, entry)
                self._generations[entry["operator"], entry["direction"]] = next(_GENERATIONS)
                if write:
                    _add(self._unwritten.setdefault(device_kind, {}), entry)
            if self._unwritten and (self._writer is None or not self._writer.is_alive()):
                # Not a daemon: the interpreter waits for it at its end.
                self._writer = threading.Thread(target=self._write, name="flash-wtconv cache")
                try:
                    self._writer.start()
                except RuntimeError:
                    # The interpreter is ending, and starts no more threads.
                    self._write()

    def keep(self, device_kind: str, entries: Iterable[Entry]) -> None:
        """Writes entries into their file before it returns; merges them as `put` does.

        Raises:
            OSError: They cannot be written, and are not remembered.
        """
        path = self._path(device_kind)
        if path is None:
            raise OSError("there is no home to keep measured times in")
        new: dict[str, Entry] = {}
        for entry in entries:
            _add(new, entry)
        written = _merge_into(path, device_kind, new)
        with self._lock:
            self._known(device_kind).update(written)
            for entry in new.values():
                self._generations[entry["operator"], entry["direction"]] = next(_GENERATIONS)

    def generation(self, operator: str, direction: str) -> int:
        """A number that changes with what this process knows of an operator's direction."""
        with self._lock:
            if (operator, direction) not in self._generations:
                self._generations[operator, direction] = next(_GENERATIONS)
            return self._generations[operator, direction]

    def flush(self) -> None:
        """Returns when all entries are in their files, or could not be written."""
        with self._lock:
            writer = self._writer
        if writer is not None and writer is not threading.current_thread():
            writer.join()

    def kinds(self) -> list[str]:
        """The kinds of devices that have entries."""
        self.flush()
        with self._lock:
            for path in self.folder.glob("*.json") if self.folder else []:
                try:
                    kinds = loaded(path.read_text(encoding="utf-8"))
                except (OSError, ValueError) as error:
                    _warn_unreadable(path, error, "it is not used")
                    continue
                for kind in kinds:
                    self._known(kind)
            return sorted(kind for kind, known in self._entries.items() if known)

    def entries(self, device_kind: str) -> list[Entry]:
        """All entries of a kind of device, by operator, direction and problem."""
        with self._lock:
            known = self._known(device_kind)
            return [known[key] for key in sorted(known)]

    def clear(self, device_kind: str | None = None) -> int:
        """Forgets everything of a kind of device, or of all of them.

        Returns:
            How many entries there were.

        Raises:
            OSError: A file cannot be removed.
        """
        kinds = self.kinds() if device_kind is None else [device_kind]
        self.flush()
        with self._lock:
            count = sum(len(self._known(kind)) for kind in kinds)
            for kind in kinds:
                path = self._path(kind)
                if path is not None and path.exists():
                    with _locked(path):
                        path.unlink(missing_ok=True)
                self._entries[kind] = {}
            self._generations.clear()
            return count

    def _path(self, device_kind: str) -> Path | None:
        return self.folder / file_name(device_kind) if self.folder else None

    def _known(self, device_kind: str) -> dict[str, Entry]:
        if device_kind not in self._entries:
            path = self._path(device_kind)
            self._entries[device_kind] = {} if path is None else _load(path)
        return self._entries[device_kind]

    def _write(self) -> None:
        """Writes until nothing is left to write."""
        while True:
            with self._lock:
                unwritten, self._unwritten = self._unwritten, {}
                if not unwritten:
                    self._writer = None
                    return
            for kind, entries in unwritten.items():
                path = self._path(kind)
                assert path is not None
                try:
                    merged = _merge_into(path, kind, entries)
                except (OSError, NotImplementedError) as error:
                    self._keep_in_memory(error)
                    continue
                with self._lock:
                    for entry in self._unwritten.get(kind, {}).values():
                        _add(merged, entry)
                    self._entries[kind].update(merged)

    def _keep_in_memory(self, error: Exception) -> None:
        with self._lock:
            warned, self._memory_alone = self._memory_alone, True
            self._unwritten.clear()
        if not warned:
            warnings.warn(
                f"measured times are kept in memory alone, {self.folder} cannot be written: "
                f"{error or type(error).__name__}",
                RuntimeWarning,
                stacklevel=2,
            )


def key(entry: Entry) -> str:
    """The text that tells an entry from others: all that its times depend on, besides the device.

    Example:
        >>> key({"operator": "f", "direction": "fwd", "problem": {"n": 1}, "static": {},
        ...      "versions": {}, "date": "today"})
        '["f", "fwd", {"n": 1}, {}, {}]'
    """
    parts = [entry[name] for name in ("operator", "direction", "problem", "static", "versions")]
    return json.dumps(parts, sort_keys=True)


def merged(old: Entry | None, new: Entry) -> Entry:
    """Two entries of one key as one; the new times of an implementation replace the old.

    Example:
        >>> old = {"measured": [{"implementation": "a", "ms": 1}, {"implementation": "b", "ms": 2}]}
        >>> new = {"measured": [{"implementation": "a", "ms": 3}]}
        >>> [(one["implementation"], one["ms"]) for one in merged(old, new)["measured"]]
        [('b', 2), ('a', 3)]
    """
    names = {one["implementation"] for one in new["measured"]}
    kept = [] if old is None else [o for o in old["measured"] if o["implementation"] not in names]
    both = sorted([*new["measured"], *kept], key=lambda one: one.get("ms", float("inf")))
    return {**new, "measured": both}


def dumped(entries: Mapping[str, Iterable[Entry]]) -> str:
    """Entries by kind of device as the JSON text of a file, an entry a line.

    Example:
        >>> loaded(dumped({"an abacus": []}))
        {'an abacus': []}
    """
    devices = [
        f"  {json.dumps(kind)}: [\n" + ",\n".join(f"    {json.dumps(e)}" for e in found) + "\n  ]"
        for kind, found in entries.items()
    ]
    head = f'{{\n"format": {json.dumps(_FORMAT)},\n"version": {_VERSION},\n"devices": {{\n'
    return head + ",\n".join(devices) + "\n}\n}\n"


def loaded(text: str) -> dict[str, list[Entry]]:
    """Entries by kind of device from what `dumped` returned.

    Raises:
        ValueError: Truncated, foreign, or of another version of the format.
    """
    try:
        return _checked(json.loads(text))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _checked(content: object) -> dict[str, list[Entry]]:
    """The entries of a file's content, each of which is one that the tuner can use."""
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"it has no 'format' of {_FORMAT!r}")
    if content.get("version") != _VERSION:
        raise ValueError(f"it has version {content.get('version')}, expected {_VERSION}")
    devices = content.get("devices")
    if not isinstance(devices, dict) or not all(isinstance(e, list) for e in devices.values()):
        raise ValueError("it has no 'devices', lists of entries by kind of device")
    for entry in (entry for found in devices.values() for entry in found):
        check_fields("an entry", entry, _ENTRY)
        key(entry)
        for one in entry["measured"]:
            check_fields("a candidate", one, _CANDIDATE)
            if "ms" not in one and "failed" not in one:
                raise ValueError("a candidate has neither 'ms' nor 'failed'")
            if "ms" not in one:
                check_fields("a candidate", one, {"failed": str})
            elif not is_time(one["ms"]):
                raise ValueError(
                    f"a candidate has 'ms' of {one['ms']!r:.40}, expected a positive number"
                )
    return devices


@cache
def user_cache() -> Cache:
    """The cache of this user, on this machine's disk; without a home, in memory, and it warns."""
    from platformdirs import user_cache_path

    folder = user_cache_path("flash_wtconv", appauthor=False) / "measured"
    if folder.is_absolute():
        return Cache(folder)
    # Without a home it is `~/.cache`, which would be made in the working directory.
    warnings.warn(
        "measured times are kept in memory alone: there is no home to keep files in",
        RuntimeWarning,
        stacklevel=2,
    )
    return Cache(None)


def _add(known: dict[str, Entry], entry: Entry) -> None:
    name = key(entry)
    known[name] = merged(known.get(name), entry)


def _merge_into(path: Path, device_kind: str, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Adds entries to a file, and returns all that it holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        known = _read_or_set_aside(path)
        for entry in entries.values():
            _add(known, entry)
        # The lock is ours, so one name does, and what stands there a killed process has left.
        temporary = path.with_suffix(".new")
        text = dumped({device_kind: [known[name] for name in sorted(known)]})
        temporary.unlink(missing_ok=True)
        # Made anew, which follows no link that somebody has put there.
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    return known


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    from filelock import FileLock

    with FileLock(path.with_suffix(".lock"), timeout=_LOCK_S):
        yield


def _load(path: Path) -> dict[str, Entry]:
    """The entries of a file by key: none where there is none, or none that can be read."""
    try:
        return _read(path)
    except (OSError, ValueError):
        pass
    try:
        # Under the lock: another process may have put a good file there meanwhile.
        with _locked(path):
            return _read_or_set_aside(path)
    except OSError as error:
        _warn_unreadable(path, error, "it is not used")
        return {}


def _read_or_set_aside(path: Path) -> dict[str, Entry]:
    """The entries of a file as `_load` returns them, read under the lock."""
    try:
        return _read(path)
    except (OSError, ValueError) as error:
        aside = path.with_suffix(".unreadable")
        os.replace(path, aside)
        _warn_unreadable(path, error, f"it is now {aside.name}")
        return {}


def _read(path: Path) -> dict[str, Entry]:
    if not path.exists():
        return {}
    devices = loaded(path.read_text(encoding="utf-8"))
    return {key(entry): entry for entries in devices.values() for entry in entries}


def _warn_unreadable(path: Path, error: Exception, consequence: str) -> None:
    warnings.warn(
        f"measured times in {path} cannot be read ({error}): {consequence}, and measuring begins "
        "anew",
        RuntimeWarning,
        stacklevel=2,
    )
