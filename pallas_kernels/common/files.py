"""Files and folders that are written whole or not at all."""

import ctypes
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

try:
    import fcntl
except ImportError:  # Windows, where no folder can be locked and so none is swept.
    fcntl = None  # type: ignore[assignment]

_PREFIX = ".flash-wtconv-"
_OLD = ".old"
"""The end of the name of a folder that was moved away to make place."""


def check_folder(path: Path) -> None:
    """Raises FileNotFoundError if there is no folder that a file at path could be written into."""
    folder = _target(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} to write {path.name} into")


@contextmanager
def replacing(path: Path, force: bool) -> Iterator[Path]:
    """Yields a temporary path and moves it to `path` when the block ends without an error.

    A symbolic link at `path` stays, and what it points to is written. What is neither a file nor a
    folder, such as a device or a pipe, stays too, and the bytes of the file go into it. A new file
    has the permissions of the umask, one that replaces another keeps the other's.

    Args:
        path: The file or folder to write.
        force: Whether anything may stand there already. A file and a folder never replace each
            other even so.

    Raises:
        FileExistsError: Something is at `path`, a dangling link perhaps, and `force` is False.
        FileNotFoundError: There is no folder to write it into.
        IsADirectoryError: `path` is a folder and a file was written.
        NotADirectoryError: `path` is a file and a folder was written.
    """
    if os.path.lexists(path) and not force:
        raise FileExistsError(f"{path} exists already; use force to replace it")
    check_folder(path)
    target = _target(path)
    mode = target.stat().st_mode if target.exists() else None
    if mode is not None and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        with TemporaryDirectory() as elsewhere:
            temporary = Path(elsewhere) / path.name
            yield temporary
            with temporary.open("rb") as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        return
    with _unfinished(target.parent) as folder:
        temporary = folder / path.name
        yield temporary
        if mode is not None:
            _check_kind(path, mode, temporary)
            temporary.chmod(stat.S_IMODE(mode))
        elif temporary.is_file():
            # Some writers make files that nobody else may read.
            temporary.chmod(_mode_of_new_files(folder))
        if not target.is_dir():
            os.replace(temporary, target)
        elif not _exchanged(temporary, target):
            _swap(temporary, target, folder / f"{target.name}{_OLD}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes whatever a library raises in the block an OSError of one line that names the path."""
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        # What names its file, or is a sentence already, as it is; a full disk names none.
        if isinstance(error, OSError) and (error.errno is None or error.filename is not None):
            raise
        # The first that went wrong, where a library stumbled over a full disk and then over itself.
        first = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = str(first).splitlines()[0] if str(first) else type(first).__name__
        raise OSError(f"{path} cannot be written: {reason}") from error


@contextmanager
def making_folder(path: Path) -> Iterator[None]:
    """Makes a folder and those above it; those still empty when the block ends are removed.

    Raises:
        NotADirectoryError: There is a file in its place.
    """
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file, expected a folder")
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def sweep(folder: Path) -> None:
    """Deletes what killed runs left unfinished in a folder, and puts back what they moved away."""
    for unfinished in folder.glob(f"{_PREFIX}????????"):
        with suppress(OSError), _locked(unfinished, wait=False) as locked:
            if not locked or unfinished.stat().st_uid != os.getuid():
                continue
            for old in unfinished.glob(f"*{_OLD}"):
                place = folder / old.name.removesuffix(_OLD)
                if not os.path.lexists(place):
                    old.rename(place)
            shutil.rmtree(unfinished)


def _target(path: Path) -> Path:
    """The path of what is written: a link's target. Of `/dev/stdout` that may be no path at all."""
    target = path.resolve()
    return target if target.exists() or not path.exists() else path.absolute()


def _check_kind(path: Path, mode: int, temporary: Path) -> None:
    if stat.S_ISDIR(mode) and not temporary.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected the name of a file")
    if temporary.is_dir() and not stat.S_ISDIR(mode):
        raise NotADirectoryError(f"{path} is a file, expected the name of a folder")


def _mode_of_new_files(folder: Path) -> int:
    """The permissions by the umask, which cannot be read without being set for all threads."""
    probe = folder / ".mode"
    probe.touch()
    return stat.S_IMODE(probe.stat().st_mode)


@contextmanager
def _unfinished(parent: Path) -> Iterator[Path]:
    """A folder in `parent`, from which a move is a rename; locked while its process lives."""
    sweep(parent)
    with ExitStack() as held:
        while True:
            folder = Path(held.enter_context(TemporaryDirectory(prefix=_PREFIX, dir=parent)))
            # Another process may have swept it before it was locked.
            with suppress(FileNotFoundError):
                held.enter_context(_locked(folder))
                if folder.exists():
                    break
        yield folder


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Locks a folder, and says whether it could; the lock goes with its process."""
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError:  # Another has it, or this file system has no locks.
            locked = False
        yield locked
    finally:
        os.close(descriptor)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchanges two folders in one step, and returns whether this system can."""
    if sys.platform == "win32":
        return False
    library = ctypes.CDLL(None)
    paths = os.fsencode(one), os.fsencode(other)
    if hasattr(library, "renameat2"):  # Linux
        here, exchange = -100, 2
        return library.renameat2(here, paths[0], here, paths[1], exchange) == 0
    if hasattr(library, "renamex_np"):  # macOS
        return library.renamex_np(*paths, 2) == 0
    return False


def _swap(new: Path, place: Path, old: Path) -> None:
    """Moves one folder away and another into its place; `sweep` puts it back after a kill."""
    place.rename(old)
    try:
        new.rename(place)
    except BaseException:
        old.rename(place)
        raise
