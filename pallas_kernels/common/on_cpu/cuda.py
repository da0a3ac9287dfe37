"""Runs CUDA kernels on the CPU, launched as `common.cuda.Launch` says."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pallas_kernels.common.cuda import Box, Device, Kernel
from pallas_kernels.common.types import Output

HOPPER = Device(shared=232448, multiprocessors=2, boxes=True)
"""The shared memory of an H100 or H200, and few multiprocessors."""

FOLDER = Path(__file__).parent
"""The folder of the headers by which a C++ compiler takes kernels of other devices."""
_ONE = threading.Lock()
"""Held by a build and a launch, as JAX calls back from several threads: a library has one set of
fibers, and one temporary file."""
_FILES = ("cuda.h", "fibers.h", "half.h", "runtime.cpp")
_COMMAND = ("g++", "-std=c++17", "-fPIC", "-w", "-O1", "-ffp-contract=off")


def unavailable() -> str | None:
    """The reason why kernels cannot run here: they need g++ and the contexts of Linux."""
    if sys.platform != "linux":
        return f"needs Linux, this is {sys.platform}"
    return None if shutil.which("g++") else "needs the compiler g++"


class Launcher:
    """Builds and launches kernels on the CPU.

    Args:
        folder: The folder that libraries are built in.
        source: CUDA C++; None is that of each kernel.
        order: Order of the threads of a block between two barriers: 0 as they are numbered, 1 in
            reverse, as the blocks are then, any other number at random, always the same.
        flags: More of the compiler's options.
    """

    def __init__(
        self,
        folder: Path,
        source: str | None = None,
        order: int = 0,
        flags: Sequence[str] = (),
    ) -> None:
        self._folder = folder
        self._source = source
        self._flags = flags
        self.order = order

    def launch(
        self,
        kernel: Kernel,
        arguments: Sequence[np.ndarray | int | None],
        outputs: Sequence[Output],
        blocks: int,
    ) -> list[np.ndarray]:
        """Launches a kernel on contiguous arrays of NumPy; see `run` for errors.

        Outputs hold NaN before, integers -1, so that elements which are not written show; one that
        is in place begins as a copy of its argument.
        """
        made = [
            np.full(shape, -1 if np.dtype(dtype).kind == "i" else np.nan, dtype)
            for shape, dtype in outputs
        ]
        if kernel.in_place is not None:
            arguments, (fresh,) = [*arguments], made
            made = [np.array(arguments[kernel.in_place])]
            assert (made[0].shape, made[0].dtype) == (fresh.shape, fresh.dtype)
            arguments[kernel.in_place] = made[0]
        given: list[int | ctypes.c_void_p | ctypes.Structure] = [
            a if isinstance(a, int) else _pointer(a) for a in (*arguments, *made)
        ]
        for box in kernel.boxes:
            array = [*arguments, *made][box.parameter]
            assert isinstance(array, np.ndarray)
            found = tensor_map(array.ctypes.data, array.shape, box, array.itemsize)
            given[box.parameter] = found
        self.run(kernel, given, blocks)
        return made

    def run(
        self,
        kernel: Kernel,
        arguments: Sequence[int | ctypes.c_void_p | ctypes.Structure],
        blocks: int,
    ) -> None:
        """Launches a kernel on addresses of this process, integers of 32 bits, and tensor maps.

        Raises:
            RuntimeError: The source does not compile, or not all threads of a block reach a
                barrier, or what is copied in boxes is not waited for.
            TypeError: The kernel takes another number of arguments.
        """
        values = [ctypes.c_int(a) if isinstance(a, int) else a for a in arguments]
        with _ONE:
            library = self._built(kernel)
        if library.parameters() != len(values):
            count = library.parameters()
            raise TypeError(f"{kernel.name} takes {count} arguments, got {len(values)}")
        packed = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        with _ONE:
            apart = library.launch(packed, blocks, kernel.threads, kernel.shared, self.order)
        if apart:
            raise RuntimeError(f"{kernel.name}: not all threads of a block reached a barrier")

    def _built(self, kernel: Kernel) -> ctypes.CDLL:
        """The library of one kernel, built if it is not there."""
        macros = "".join(f"#define {name} {value}\n" for name, value in kernel.macros)
        source = kernel.text() if self._source is None else self._source
        text = (
            f'#include "{self._header()}"\n{macros}{source}\n'
            f"static void run(void** values) {{ cuda_on_cpu::call({kernel.name}, values); }}\n"
            'extern "C" int launch(void** values, unsigned blocks, unsigned threads,\n'
            "                      unsigned bytes, unsigned order) {\n"
            "  return cuda_on_cpu::launch(run, values, blocks, threads, bytes, order);\n}\n"
            f'extern "C" int parameters() {{ return cuda_on_cpu::parameters({kernel.name}); }}\n'
        )
        library = self._folder / f"{self._hashed(text)}.so"
        if not library.exists():
            self._compile(text, library, "-shared", after=[self._runtime()])
        return ctypes.CDLL(str(library))

    def _header(self) -> Path:
        """A header with all that kernels include, which takes long to read and is read once."""
        text = f'#include "{FOLDER / "cuda.h"}"\n'
        header = self._folder / f"{self._hashed(text)}.h"
        read = header.with_suffix(".h.gch")
        if not read.exists():
            header.write_text(text)
            self._compile(text, read, "-x", "c++-header")
        return header

    def _runtime(self) -> Path:
        """The object file of the part of a launch that all kernels share."""
        text = f'#include "{self._header()}"\n#include "{FOLDER / "runtime.cpp"}"\n'
        compiled = self._folder / f"{self._hashed(text)}.o"
        if not compiled.exists():
            self._compile(text, compiled, "-c")
        return compiled

    def _hashed(self, text: str) -> str:
        files = [(FOLDER / file).read_text() for file in _FILES]
        whole = repr((text, files, tuple(self._flags)))
        return hashlib.sha256(whole.encode()).hexdigest()[:16]

    def _compile(self, text: str, to: Path, *flags: str, after: Sequence[Path] = ()) -> None:
        # Another process may do it too: what is there is whole.
        code, made = (to.with_name(f"{to.stem}-{os.getpid()}.{end}") for end in ("cpp", "made"))
        code.write_text(text)
        command = [*_COMMAND, *self._flags, *flags, *map(str, (code, *after)), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
        os.replace(made, to)


class _TensorMap(ctypes.Structure):
    _fields_ = (
        ("array", ctypes.c_void_p),
        ("strides", ctypes.c_longlong * 4),
        ("sizes", ctypes.c_int * 4),
        ("box", ctypes.c_int * 4),
        ("bytes", ctypes.c_int),
    )


def tensor_map(address: int, shape: Sequence[int], box: Box, size: int) -> ctypes.Structure:
    """The tensor map that `Launcher.run` takes of a contiguous array.

    Args:
        address: The array's address in this process.
        shape: Its shape, of four axes.
        box: What is copied at once.
        size: Bytes of an element.
    """
    four, long = ctypes.c_int * 4, ctypes.c_longlong * 4
    sizes, strides = (numbers[::-1] for numbers in box.mapped(shape))
    return _TensorMap(address, long(*strides), four(*sizes), four(*box.size[::-1]), size)


def _pointer(array: np.ndarray | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)
