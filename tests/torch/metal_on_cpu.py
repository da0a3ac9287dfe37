"""Runs `wtconv.metal` on the CPU, launched by `metal_launch.py` as on an Apple GPU."""

import ctypes
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from unittest import mock

import torch

from torch_bridge.backends import metal_launch

_HEADER = Path(__file__).with_name("metal_on_cpu.h")
_KERNEL = re.compile(
    r"\[\[kernel, max_total_threads_per_threadgroup\(([^)]*)\)\]\] void (\w+)\((.*?)\) \{", re.S
)
_PARAMETER = re.compile(r"(?:device|constant) ([\w ]+)([*&]) \w+ \[\[buffer\((\d+)\)\]\]")
_DTYPES = {"float": torch.float32, "half": torch.float16}
_INCLUDE = "#include <metal_stdlib>"
_BUILT_IN = {
    "threadgroup_position_in_grid": "metal_on_cpu::group",
    "thread_position_in_threadgroup": "metal_on_cpu::current->thread_in_group",
    "thread_index_in_threadgroup": "metal_on_cpu::current->thread_index",
}


def unavailable():
    """Why nothing can be run here, None if it can."""
    if not sys.platform.startswith("linux"):
        return f"needs Linux, this is {sys.platform}"
    return None if shutil.which("g++") else "needs g++"


@contextmanager
def on_cpu(order=0, without=0, change=None, flags=()):
    """The back end takes tensors of the CPU.

    Args:
        order: Of a threadgroup's threads: 0 forward, 1 backward, others shuffled.
        without: Number of a barrier of the source, from 1 on, that is not there.
        change: Makes another source of it.
        flags: More of them for the compiler.
    """
    change = change or (lambda source: source)
    with (
        mock.patch.object(
            torch.mps,
            "compile_shader",
            lambda source: _Library(change(source), tuple(flags), order, without),
        ),
        mock.patch.object(metal_launch, "unavailable", lambda platform: unavailable()),
        mock.patch.object(metal_launch, "_library", cache(metal_launch._library.__wrapped__)),
    ):
        yield


class _Library:
    """What `torch.mps.compile_shader` returns."""

    def __init__(self, source, flags, order, without):
        library, self._buffers = _built(source, flags)
        for name in self._buffers:
            setattr(self, name, partial(self._launch, library, name, order, without))

    def _launch(self, library, name, order, without, *arguments, threads, group_size):
        """As PyTorch: tensors go by their first element, lists of integers as 64-bit numbers."""
        dtypes = [getattr(value, "dtype", None) for value in arguments]
        if dtypes != self._buffers[name]:
            raise TypeError(f"{name} takes {self._buffers[name]}, got {dtypes}")
        keep = [
            (ctypes.c_long * len(value))(*value) if isinstance(value, list) else value
            for value in arguments
        ]
        if ctypes.sizeof(keep[-1]) != getattr(library, f"{name}_bytes")():
            raise TypeError(f"{name} got {len(keep[-1])} sizes, which is not what it takes")
        limit = getattr(library, f"{name}_threads")()
        groups = [n // m for n, m in zip(threads, group_size, strict=True)]
        whole = [n * m for n, m in zip(groups, group_size, strict=True)]
        if whole != list(threads) or group_size[0] * group_size[1] * group_size[2] > limit:
            raise ValueError(f"{name}: {threads} threads in groups of {group_size}, up to {limit}")
        pointers = [v.data_ptr() if torch.is_tensor(v) else ctypes.addressof(v) for v in keep]
        if getattr(library, f"{name}_launch")(
            (ctypes.c_void_p * len(pointers))(*pointers),
            (ctypes.c_uint * 3)(*groups),
            (ctypes.c_uint * 3)(*group_size),
            order,
            without,
        ):
            raise RuntimeError(f"{name}: not all threads of a threadgroup reached a barrier")


@cache
def _built(source, flags):
    """The library for the CPU, and of what dtype the arrays are that each of its kernels takes."""
    expanded = _run(["g++", "-E", "-P", "-x", "c++", "-"], source.replace(_INCLUDE, ""))
    code, buffers = "", {}
    for limit, name, parameters in _KERNEL.findall(expanded):
        found = _PARAMETER.findall(parameters)
        buffers[name] = [_DTYPES.get(kind.removeprefix("const ")) for kind, _, _ in found]
        values = [f"{'*' * (form == '&')}({kind}*)a[{i}]" for kind, form, i in found]
        values += [_BUILT_IN[name] for name in re.findall(r"\[\[(\w+)\]\]", parameters)]
        code += f"""
static void run_{name}(void** a) {{ {name}({", ".join(values)}); }}
extern "C" int {name}_launch(void** a, uint* g, uint* t, unsigned order, int without) {{
  return metal_on_cpu::launch(run_{name}, a, g, t, order, without);
}}
extern "C" int {name}_threads() {{ return {limit}; }}
extern "C" int {name}_bytes() {{ return sizeof({found[-1][0]}); }}
"""
    # Memory of a threadgroup is the fibers' to share.
    shared = r"\bthreadgroup (float (\w+)\[[^;]*\]);"
    source = re.sub(shared, r"static \1; metal_on_cpu::begin(\2);", source)
    first, *parts = source.split("threadgroup_barrier(")
    barriers = [f"metal_on_cpu::barrier({i}, {part}" for i, part in enumerate(parts, start=1)]
    source = first + "".join(barriers) + code
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "metal_stdlib").write_text(f'#include "{_HEADER}"\n')
        library = Path(folder) / "library.so"
        command = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-w", "-fPIC", "-shared"]
        _run([*command, *flags, f"-I{folder}", "-x", "c++", "-", "-o", str(library)], source)
        return ctypes.CDLL(str(library)), buffers


def _run(command, text):
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise SyntaxError(done.stderr[:4000])
    return done.stdout
