"""Runs `wtconv.metal` on the CPU, as the implementation "metal" launches it."""

import ctypes
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from pallas_kernels.common.on_cpu.cuda import FOLDER
from pallas_kernels.common.on_cpu.cuda import unavailable as unavailable
from torch_bridge.wtconv import metal as metal_launch

_HEADER = Path(__file__).with_name("metal.h")
_COMMAND = ("g++", "-std=c++17", "-shared", "-fPIC", "-w", "-O1", "-ffp-contract=off")
_INCLUDE = "#include <metal_stdlib>"
_KERNEL = re.compile(
    r"\[\[kernel, max_total_threads_per_threadgroup\(([^)]*)\)\]\] void (\w+)\((.*?)\) \{", re.S
)
_BUFFER = re.compile(r"(?:device|constant) (const )?(\w+)([*&]) \w+ \[\[buffer\((\d+)\)\]\]")
_DTYPES = {"float": torch.float32, "half": torch.float16, "bfloat": torch.bfloat16}
_BUILT_IN = {
    "threadgroup_position_in_grid": "metal_on_cpu::group",
    "thread_position_in_threadgroup": "metal_on_cpu::thread_in_group()",
    "thread_index_in_threadgroup": "on_cpu::current->thread",
}


@contextmanager
def emulated(
    source: str | None = None,
    order: int = 0,
    without: int = 0,
    flags: Sequence[str] = (),
    version: int = 310,
) -> Iterator[None]:
    """Lets the implementation "metal" take tensors of the CPU, and launch there.

    Args:
        source: Metal; None is that of the package.
        order: Order of the threads of a threadgroup between two barriers: 0 as they are numbered,
            1 in reverse, any other number at random, always the same.
        without: Number of a barrier of the source, from 1 on, that is not there.
        flags: More of the compiler's options.
        version: Version of the Metal language: 300 is that of macOS 13, without bfloat16.

    Raises:
        RuntimeError: From a launch whose source does not compile, or in which not all threads of a
            threadgroup reach a barrier.

    Example:
        >>> import torch_bridge
        >>> layer = torch_bridge.WTConv2d(1, 1, 3, device="cpu", implementation="metal")
        >>> if unavailable() is None:
        ...     with emulated():
        ...         assert layer(torch.ones(1, 1, 4, 4)).isfinite().all()
    """
    own = metal_launch.SOURCE.read_text(encoding="utf-8")

    def compile_shader(text: str) -> Library:
        text = text if source is None else text.replace(own, source)
        return Library(text, (f"-D__METAL_VERSION__={version}", *flags), order, without)

    with (
        patch.object(torch.mps, "compile_shader", compile_shader),
        patch.multiple(
            metal_launch,
            unavailable=lambda platform: None,
            has_bfloat16=lambda: version >= 310,
            # A library of the device stays there.
            library=cache(metal_launch.library.__wrapped__),
        ),
    ):
        yield


class Buffer(NamedTuple):
    """A kernel's argument: the dtype of an array, None for numbers, and whether it is written."""

    dtype: torch.dtype | None
    written: bool


class Library:
    """The kernels by their names, in place of the library of `torch.mps.compile_shader`.

    Args:
        source: Metal.
        flags: More of the compiler's options.
        order: See `emulated`.
        without: See `emulated`.
    """

    def __init__(self, source: str, flags: tuple[str, ...], order: int, without: int) -> None:
        library, kernels = _built(source, flags)
        for name, buffers in kernels.items():
            setattr(self, name, partial(_launch, library, name, buffers, (order, without)))


def _launch(
    library: ctypes.CDLL,
    name: str,
    buffers: Sequence[Buffer],
    options: tuple[int, int],
    *arguments: Any,
    threads: Sequence[int],
    group_size: Sequence[int],
) -> None:
    """Launches a kernel as PyTorch does: a tensor is its address, a list is 64-bit integers.

    Outputs are filled with NaN before, so that elements which are not written show.
    """
    dtypes = [getattr(value, "dtype", None) for value in arguments]
    if dtypes != [buffer.dtype for buffer in buffers]:
        raise TypeError(f"{name} takes {[buffer.dtype for buffer in buffers]}, got {dtypes}")
    numbers = (ctypes.c_int64 * len(arguments[-1]))(*arguments[-1])
    if ctypes.sizeof(numbers) != getattr(library, f"{name}_bytes")():
        raise TypeError(f"{name} got {len(numbers)} numbers, which is not what it takes")
    groups = [n // size for n, size in zip(threads, group_size, strict=True)]
    limit = getattr(library, f"{name}_threads")()
    whole = [n * size for n, size in zip(groups, group_size, strict=True)] == list(threads)
    if not whole or group_size[0] * group_size[1] * group_size[2] > limit:
        raise ValueError(f"{name}: {threads} threads in groups of {group_size}, up to {limit}")
    *arrays, _ = arguments
    for array, buffer in zip(arrays, buffers, strict=False):
        if buffer.written:
            array.fill_(float("nan"))
    addresses = [*(array.data_ptr() for array in arrays), ctypes.addressof(numbers)]
    if getattr(library, f"{name}_launch")(
        (ctypes.c_void_p * len(addresses))(*addresses),
        (ctypes.c_uint * 3)(*groups),
        (ctypes.c_uint * 3)(*group_size),
        *options,
    ):
        raise RuntimeError(f"{name}: not all threads of a threadgroup reached a barrier")


@cache
def _built(source: str, flags: tuple[str, ...]) -> tuple[ctypes.CDLL, dict[str, list[Buffer]]]:
    """The library for the CPU, and the buffers that each of its kernels takes."""
    with TemporaryDirectory() as folder:
        library = Path(folder) / "library.so"
        kernels = build(source, library, flags)
        return ctypes.CDLL(str(library)), kernels


def build(source: str, library: Path, flags: Sequence[str] = ()) -> dict[str, list[Buffer]]:
    """Builds a library for the CPU.

    Of each kernel it has the functions NAME_launch, NAME_threads (those that a threadgroup may
    have) and NAME_bytes (of its numbers).

    Args:
        source: Metal.
        library: The file to write.
        flags: More of the compiler's options.

    Returns:
        The buffers that each kernel takes.

    Raises:
        RuntimeError: The source does not compile.
    """
    # Macros make the kernels; the compiler's header would hide what it cannot read.
    expanded = _run(["g++", *flags, "-E", "-P", "-x", "c++", "-"], source.replace(_INCLUDE, ""))
    code, kernels = "", {}
    for limit, name, parameters in _KERNEL.findall(expanded):
        found = _BUFFER.findall(parameters)
        kernels[name] = [
            Buffer(_DTYPES.get(kind), form == "*" and not const) for const, kind, form, _ in found
        ]
        values = [f"{'*' * (form == '&')}({const}{kind}*)a[{i}]" for const, kind, form, i in found]
        values += [_BUILT_IN[name] for name in re.findall(r"\[\[(\w+)\]\]", parameters)]
        code += f"""
static void run_{name}(void** a) {{ {name}({", ".join(values)}); }}
extern "C" int {name}_launch(void** a, uint* groups, uint* threads, uint order, int without) {{
  return metal_on_cpu::launch(run_{name}, a, groups, threads, order, without);
}}
extern "C" int {name}_threads() {{ return {limit}; }}
extern "C" int {name}_bytes() {{ return sizeof({found[-1][1]}); }}
"""
    # Memory of a threadgroup is its fibers' to share.
    shared = r"\bthreadgroup (float (\w+)\[[^;]*\]);"
    source = re.sub(shared, r"static \1; metal_on_cpu::begin(\2);", source)
    first, *rest = source.split("threadgroup_barrier(")
    barriers = [f"metal_on_cpu::barrier({i}, {part}" for i, part in enumerate(rest, start=1)]
    source = first + "".join(barriers) + code
    with TemporaryDirectory() as folder:
        (Path(folder) / "metal_stdlib").write_text(f'#include "{_HEADER}"\n')
        _run(
            [*_COMMAND, *flags, f"-I{folder}", f"-I{FOLDER}", "-x", "c++", "-", "-o", str(library)],
            source,
        )
    return kernels


def _run(command: list[str], text: str) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout
