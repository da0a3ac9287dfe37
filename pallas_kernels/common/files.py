"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory


def check_folder(path: Path) -> None:
    """Raises FileNotFoundError if there is no folder that a file at path could be written into."""
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"no folder {path.absolute().parent} to write {path.name} into")


@contextmanager
def replacing(path: Path, force: bool) -> Iterator[Path]:
    """Yields a temporary path and renames it to `path` when the block ends without an error.

    Args:
        path: The file or folder to write.
        force: Whether it may exist already. A file never replaces a folder even so.

    Raises:
        FileExistsError: `path` exists and `force` is False.
        FileNotFoundError: There is no folder to write it into.
        IsADirectoryError: `path` is a folder and a file was written.
    """
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists already; use force to replace it")
    check_folder(path)
    # In the same folder, so that the move is a rename, which happens or does not.
    with TemporaryDirectory(prefix=".flash-wtconv-", dir=path.absolute().parent) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        if path.is_dir():
            if not temporary.is_dir():
                raise IsADirectoryError(f"{path} is a folder, expected the name of a file")
            # A folder cannot be renamed over another, so the old one moves into the temporary
            # folder, which is deleted.
            path.rename(Path(folder) / f"{path.name}.old")
        os.replace(temporary, path)
