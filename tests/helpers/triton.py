"""Helpers for every operator's Triton tests: the interpreter and the compiler."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Lock

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is for Linux alone")
try:
    import torch
except ModuleNotFoundError:
    torch = None

PARTS = pytest.mark.parametrize("part", ["some", pytest.param("rest", marks=pytest.mark.slow)])
"""The parts of what is compiled: each kernel for some GPU, and all other pairs of them."""
TORCH = pytest.mark.skipif(torch is None, reason="needs PyTorch's tensors")
INTERPRETS = torch is not None and os.environ.get("TRITON_INTERPRET") == "1"
WHY_NOT = "Triton's interpreter takes PyTorch's tensors, and a process has it or a GPU"
INTERPRETED = pytest.mark.skipif(not INTERPRETS, reason=WHY_NOT)


_ONE = Lock()
"""Triton's interpreter runs one kernel at a time, XLA calls back from several threads."""


def _speak_once_a_launch():
    """A module's language is made the interpreter's once a launch, not at each function's call."""
    from triton.runtime import interpreter

    patch, run, modules = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def once(function):
        if id(function.__globals__) not in modules:
            modules.add(id(function.__globals__))
            return patch(function)

    def launched(self, *args, **keys):
        modules.clear()
        return run(self, *args, **keys)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, launched


def _ask_once():
    """Spares the interpreter what it asks again of each dtype, and what it computes and drops.

    It computes integers once more, in 64 bits, to tell of those that overflow, but tells of them
    only where kernels are debugged.
    """
    from triton.runtime import interpreter

    builder, look_up, known = interpreter.interpreter_builder, interpreter._get_np_dtype, {}
    builder.options = replace(builder.options, sanitize_overflow=False)

    def numpy_type(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = look_up(dtype)
        return known[name]

    interpreter._get_np_dtype = numpy_type


if INTERPRETS:
    _speak_once_a_launch()
    _ask_once()


def launch(kernel, arguments, outputs, grid, written_over=None, **constants):
    """Runs a kernel on tensors, over outputs that hold nothing but NaN, or a huge integer.

    Or over arguments, of which those are told that may be written over.
    """
    poisoned = []
    for shape, dtype in outputs:
        kind = getattr(torch, str(dtype).removeprefix("torch."))
        poison = float("nan") if kind.is_floating_point else torch.iinfo(kind).max
        poisoned.append(torch.full(shape, poison, dtype=kind))
    for argument, output in (written_over or {}).items():
        poisoned[output] = arguments[argument]
    with _ONE:
        kernel[grid](*arguments, *poisoned, **constants)
    return poisoned


def tensor(array):
    """An array of any dtype in PyTorch."""
    if np.issubdtype(array.dtype, np.integer):
        return torch.tensor(np.asarray(array))
    return torch.tensor(np.asarray(array, np.float32)).to(getattr(torch, str(array.dtype)))


def interpret(monkeypatch, room):
    """Lets JAX's room "triton" of an operator run in Triton's interpreter, which it calls back."""
    import jax
    import jax.numpy as jnp

    if not INTERPRETS:
        pytest.skip(WHY_NOT)

    def run(kernel, arguments, outputs, grid, **constants):
        types = [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in outputs]

        def call(*given):
            given = [tensor(a) if np.ndim(a) else int(a) for a in given]
            named = [(each.shape, str(each.dtype)) for each in types]
            found = launch(kernel, given, named, grid, **constants)
            found = [f.float() if f.is_floating_point() else f for f in found]
            return [f.numpy().astype(t.dtype) for f, t in zip(found, types, strict=True)]

        return jax.pure_callback(call, types, *arguments)

    monkeypatch.setattr(room, "launch", run)
    monkeypatch.setattr(room, "unavailable", lambda platform: None)


def compiled_resources(operator, part, directory):
    """Registers and spills of an operator's kernels, by kernel, GPU and dtype.

    Part "some" is each kernel for one GPU, "rest" what that leaves of "all".
    """
    environment = {**os.environ, "TRITON_CACHE_DIR": str(directory), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "helpers.triton_compiled", operator, part]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=Path(__file__).parents[1],
    )
    return json.loads(run.stdout)
