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
_BUILT_IN = {
    "threadgroup_position_in_grid": "metal_on_cpu::group",
    "thread_position_in_threadgroup": "metal_on_cpu::current->thread_in_group",
    "thread_index_in_threadgroup": "metal_on_cpu::current->thread_index",
}


def unavailable():
    """Why nothing can be run here, None if it can."""
    if not sys.platform.startswith("linux"):
        return "threads are fibers of Linux"
    return None if shutil.which("g++") else "needs g++"


@contextmanager
def on_cpu(order=0, without=0, change=None, flags=()):
    """The back end takes tensors of the CPU.

    Args:
        order: Of a threadgroup's threads: 0 forward, 1 backward, others shuffled.
        without: Line of a barrier that is not there.
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
        if len(arguments) != self._buffers[name]:
            raise TypeError(f"{name} takes {self._buffers[name]} buffers, not {len(arguments)}")
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
    """The library for the CPU, and how many buffers each of its kernels takes."""
    bare = re.sub(r"#include <metal_stdlib>", "", source)
    expanded = _run(["g++", "-E", "-P", "-x", "c++", "-"], bare)
    code, buffers = "", {}
    for limit, name, parameters in _KERNEL.findall(expanded):
        values = [
            f"{'*' if kind == '&' else ''}({kind_of}*)a[{i}]"
            for kind_of, kind, i in _PARAMETER.findall(parameters)
        ]
        sizes = _PARAMETER.findall(parameters)[-1][0]
        buffers[name] = len(values)
        values += [_BUILT_IN[a] for a in re.findall(r"\[\[(\w+)\]\]", parameters)]
        code += f"""
static void run_{name}(void** a) {{ {name}({", ".join(values)}); }}
extern "C" int {name}_launch(void** a, uint* g, uint* t, unsigned order, int without) {{
  return metal_on_cpu::launch(run_{name}, a, g, t, order, without);
}}
extern "C" int {name}_threads() {{ return {limit}; }}
extern "C" int {name}_bytes() {{ return sizeof({sizes}); }}
"""
    shared = r"\bthreadgroup (float (\w+)\[[^;]*\]);"
    bare = re.sub(shared, r"static \1; metal_on_cpu::begin(\2);", source)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "metal_stdlib").write_text(f'#include "{_HEADER}"\n#define threadgroup\n')
        library = Path(folder) / "library.so"
        command = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-w", "-fPIC", "-shared"]
        _run([*command, *flags, f"-I{folder}", "-x", "c++", "-", "-o", str(library)], bare + code)
        return ctypes.CDLL(str(library)), buffers


def _run(command, text):
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise SyntaxError(done.stderr[:4000])
    return done.stdout
