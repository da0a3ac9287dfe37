"""Launches of CUDA kernels for every operator: what a kernel is, and the protocol of a launch."""

import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from pallas_kernels.common.triton import AnyArray, cdiv

Launch = Callable[..., list[AnyArray]]
"""The function by which a framework allocates outputs and launches one kernel:

    launch(kernel, arguments, outputs, blocks) -> list of arrays

`kernel` is a `Kernel`. `arguments` are arrays, integers of 32 bits, and None for a null pointer;
each output is `(shape, dtype)`, which is contiguous, or `(shape, dtype, strides)`; `blocks` is the
number of blocks. The kernel takes its arguments first, then its outputs; of one that is in place
see `Kernel.in_place`.
"""

ELEMENTS = {"float16": 6, "float32": 7, "bfloat16": 9}
SWIZZLES = {"float16": 2, "float32": 0, "bfloat16": 2}
"""The driver's numbers in a tensor map (`CUtensorMapDataType`, `CUtensorMapSwizzle`), by dtype."""
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
"""The numbers of dtypes in `scalars.cuh`."""
BOXED = range(90, 120)
"""Compute capabilities whose kernels copy boxes; later ones have less shared memory for them."""


class Box(NamedTuple):
    """A parameter that is a tensor map of TMA in place of a pointer, and what is copied at once.

    Attributes:
        parameter: The number of the parameter, whose array has four axes.
        size: Images, rows, columns and channels of the box. Pixels of 64 bytes of 16 bits are
            swizzled.
        step: The map is of each so many-th row and column.
    """

    parameter: int
    size: tuple[int, ...]
    step: int = 1

    def mapped(self, shape: Sequence[int]) -> tuple[list[int], list[int]]:
        """The sizes of the map of a contiguous array, and elements from one to the next.

        Example:
            >>> Box(0, (1, 2, 4, 8), step=2).mapped((3, 5, 6, 8))
            ([3, 3, 3, 8], [240, 96, 16, 1])
        """
        n, h, w, c = shape
        sizes = [n, cdiv(h, self.step), cdiv(w, self.step), c]
        return sizes, [h * w * c, self.step * w * c, self.step * c, 1]


class Kernel(NamedTuple):
    """A kernel of a CUDA source, and the blocks that it is launched in.

    Attributes:
        source: The file, CUDA C++ that includes nothing but files beside it: `#include "name"`.
        name: The kernel's name in it, declared `extern "C"`.
        macros: The definitions for the preprocessor.
        threads: Threads of a block, a multiple of 32.
        shared: Bytes of dynamic shared memory of a block.
        boxes: The parameters that are tensor maps.
        exact: Whether it has instructions that GPUs of another compute capability have not.
        in_place: The number of the argument whose memory its only output takes, of the same shape
            and dtype, None if it has its own. The kernel takes it twice, as both. What it does not
            write stays.
    """

    source: Path
    name: str
    macros: tuple[tuple[str, object], ...]
    threads: int
    shared: int
    boxes: tuple[Box, ...] = ()
    exact: bool = False
    in_place: int | None = None

    def box(self, parameter: int) -> Box | None:
        """The box of a parameter that is a tensor map, None of another.

        Example:
            >>> kernel = Kernel(Path("a.cu"), "a", (), 32, 0, (Box(1, (1, 2, 4, 8)),))
            >>> kernel.box(0), kernel.box(1).size
            (None, (1, 2, 4, 8))
        """
        return next((box for box in self.boxes if box.parameter == parameter), None)

    def text(self) -> str:
        """The source, with the files that it includes."""
        return source_text(self.source)


@cache
def source_text(source: Path) -> str:
    """A source in which the files that it includes stand in place of their `#include`."""

    def included(found: re.Match[str]) -> str:
        return source_text(source.parent / found[1])

    text = source.read_text(encoding="utf-8")
    return re.sub(r'^#include "(.+)"\n', included, text, flags=re.MULTILINE)


class Device(NamedTuple):
    """The properties of a GPU that kernels are chosen by; shared memory is a block's, in bytes.

    Attributes:
        shared: Bytes of shared memory that a block may have.
        multiprocessors: How many there are.
        capability: The compute capability times ten.
        boxes: Whether kernels may have tensor maps, see `Kernel.boxes`.
    """

    shared: int
    multiprocessors: int
    capability: int = 90
    boxes: bool = False

    def share(self, blocks: int) -> int:
        """Bytes of shared memory for each of some blocks of a multiprocessor, less 1 KiB each.

        Example:
            >>> Device(shared=232448, multiprocessors=132).share(2)
            115712
        """
        return (self.shared + 1024) // blocks - 1024
