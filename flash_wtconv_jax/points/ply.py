"""Vertices of `.ply` files: ASCII, and binary of both byte orders.

Source: Greg Turk, "The PLY Polygon File Format", 1994.
"""

from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from flash_wtconv_jax.points.columns import Columns

_TYPES = {
    "char": "i1",
    "uchar": "u1",
    "short": "i2",
    "ushort": "u2",
    "int": "i4",
    "uint": "u4",
    "float": "f4",
    "double": "f8",
    "int8": "i1",
    "uint8": "u1",
    "int16": "i2",
    "uint16": "u2",
    "int32": "i4",
    "uint32": "u4",
    "float32": "f4",
    "float64": "f8",
}
"""NumPy's types by PLY's old and new names."""

_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
_LONGEST_LINE = 1 << 16


class _Property(NamedTuple):
    """A column of an element; a list has the type of its length too."""

    name: str
    type: str
    length: str | None


class _Element(NamedTuple):
    """A table of a file."""

    name: str
    rows: int
    properties: list[_Property]

    @property
    def lists(self) -> bool:
        """Whether its rows differ in length."""
        return any(one.length for one in self.properties)


def read_ply(path: Path) -> Columns:
    """The properties of the vertices of a `.ply` file; those that are lists are left out.

    Args:
        path: The file.

    Raises:
        ValueError: It is no such file, is cut off, or has no vertices.
    """
    with path.open("rb") as file:
        order, elements = _header(path, file)
        names = [one.name for one in elements]
        if "vertex" not in names:
            raise ValueError(
                f"{path}: expected an element vertex, its header has {', '.join(names) or 'none'}"
            )
        rows, at = _Rows(path, file, order), names.index("vertex")
        for element in elements[:at]:
            rows.skip(element)
        columns = rows.columns(elements[at])
        if elements[at + 1 :] == [] and file.read().strip():
            raise ValueError(
                f"{path}: goes on behind the {elements[at].rows} vertices of its header"
            )
    return columns


def _header(path: Path, file: BinaryIO) -> tuple[str, list[_Element]]:
    """The byte order, empty for text, and the elements; the file stands behind its header."""
    lines = _lines(path, file)
    if next(lines) != ["ply"]:
        raise ValueError(f"{path}: is no PLY file, for it does not begin with a line 'ply'")
    order, elements = None, list[_Element]()
    for words in lines:
        match words:
            case [] | ["comment" | "obj_info", *_]:
                pass
            case ["format", kind, "1.0"] if kind in _ORDERS:
                order = _ORDERS[kind]
            case ["element", name, count] if count.isdecimal():
                elements.append(_Element(name, int(count), []))
            case ["property", "list", length, kind, name] if (
                elements and {length, kind} <= _TYPES.keys()
            ):
                elements[-1].properties.append(_Property(name, _TYPES[kind], _TYPES[length]))
            case ["property", kind, name] if elements and kind in _TYPES:
                elements[-1].properties.append(_Property(name, _TYPES[kind], None))
            case _:
                raise ValueError(f"{path}: its header has the line {' '.join(words)!r}")
    if order is None:
        raise ValueError(f"{path}: its header has no line 'format', one of {', '.join(_ORDERS)}")
    return order, elements


def _lines(path: Path, file: BinaryIO) -> Iterator[list[str]]:
    """The words of each line of a header, up to its end."""
    while True:
        line = file.readline(_LONGEST_LINE)
        if not line.endswith(b"\n"):
            raise ValueError(f"{path}: is no PLY file, or cut off, for its header has no end")
        # Comments may be in any encoding.
        words = line.decode("latin-1").split()
        if words == ["end_header"]:
            return
        yield words


class _Rows:
    """The rows of a file's elements, one element after the other."""

    def __init__(self, path: Path, file: BinaryIO, order: str) -> None:
        self._path, self._file, self._order = path, file, order
        self._end = path.stat().st_size

    def skip(self, element: _Element) -> None:
        """Passes over an element."""
        if not self._order:
            deque(islice(self._file, element.rows), maxlen=0)
        elif element.lists:
            self._one_by_one(element)
        else:
            self._bytes(element, element.rows * sum(map(_size, element.properties)))

    def columns(self, element: _Element) -> Columns:
        """The columns of an element, but for lists."""
        names = [one.name for one in element.properties]
        if len(set(names)) < len(names):
            raise ValueError(f"{self._path}: its vertices have a property twice: {names}")
        if not names:
            return {}
        if not self._order:
            return self._text(element)
        if element.lists:
            return self._one_by_one(element)
        row = np.dtype([(one.name, self._order + one.type) for one in element.properties])
        table = np.frombuffer(self._bytes(element, element.rows * row.itemsize), row)
        return {name: table[name] for name in names}

    def _text(self, element: _Element) -> Columns:
        lines = list(islice(self._file, element.rows))
        if len(lines) < element.rows:
            raise self._cut_off(element)
        kept = [one.name for one in element.properties if not one.length]
        if not lines:
            return {name: np.empty(0) for name in kept}
        rows = [_without_lists(line.split(), element) for line in lines] if element.lists else lines
        try:
            table = np.loadtxt(rows, ndmin=2, comments=None)
        except ValueError as error:
            raise ValueError(f"{self._path}: {error}") from None
        if table.shape != (element.rows, len(kept)):
            raise ValueError(
                f"{self._path}: {element.rows} vertices of {len(kept)} numbers are in its header, "
                f"{table.shape[0]} of {table.shape[1]} behind it"
            )
        return dict(zip(kept, table.T, strict=True))

    def _one_by_one(self, element: _Element) -> Columns:
        """The columns of a binary element whose rows differ in length."""
        kept: dict[str, list[bytes]] = {one.name: [] for one in element.properties}
        for _ in range(element.rows):
            for one in element.properties:
                length = 1
                if one.length:
                    dtype = np.dtype(self._order + one.length)
                    length = int(np.frombuffer(self._bytes(element, dtype.itemsize), dtype)[0])
                found = self._bytes(element, length * _size(one))
                if not one.length:
                    kept[one.name].append(found)
        return {
            one.name: np.frombuffer(b"".join(kept[one.name]), self._order + one.type)
            for one in element.properties
            if not one.length
        }

    def _bytes(self, element: _Element, count: int) -> bytes:
        """So many bytes of the file, which may be fewer than a header says that there are."""
        if not 0 <= count <= self._end - self._file.tell():
            raise self._cut_off(element)
        return self._file.read(count)

    def _cut_off(self, element: _Element) -> ValueError:
        return ValueError(
            f"{self._path}: ends within the {element.rows} rows of its element {element.name}; it "
            "is cut off, or does not fit its header"
        )


def _size(one: _Property) -> int:
    return np.dtype(one.type).itemsize


def _without_lists(words: list[bytes], element: _Element) -> str:
    """A line of text without the lists in it, and their lengths."""
    kept, at = [], 0
    for one in element.properties:
        word = words[at] if at < len(words) else b"missing"
        at += 1
        if one.length:
            at += int(word) if word.isdigit() else 0
        else:
            kept.append(word)
    return b" ".join(kept).decode("latin-1")
