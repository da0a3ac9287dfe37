"""Mosaic GPU kernels, which threads begin to compile where a program is lowered."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest
from helpers import mosaic_gpu_compiled
from helpers.cuda import gpu_of

from pallas_kernels.common import device, mosaic_gpu_call

SHAPE = jax.ShapeDtypeStruct((128,), jnp.float32)


def increased(x):
    def body(x, y):
        y[...] = x[...] + 1.0

    return mosaic_gpu_call.kernel(body, out_type=SHAPE)(x)


def lowered(function, *shape):
    x = jnp.zeros(shape)
    return jax.jit(function).trace(x).lower(lowering_platforms=("cuda",))


def kernels(operation):
    """The hash and the module of each kernel of a lowered program."""
    if operation.operation.name == "stablehlo.custom_call":
        told = operation.attributes["mhlo.backend_config"]
        yield told["kernel_hash"].value_bytes, told["module"].value_bytes
    for region in operation.regions:
        for each in (each for block in region.blocks for each in block.operations):
            yield from kernels(each)


@pytest.mark.parametrize(
    ("function", "shape"),
    [(increased, [128]), (jax.jit(increased), [128]), (jax.vmap(increased), [3, 128])],
    ids=["once", "inside jit", "mapped"],
)
def test_what_a_thread_compiles_is_what_the_program_launches(function, shape, monkeypatch):
    begun = []
    monkeypatch.setattr(mosaic_gpu_call, "_begin", lambda *kernel: begun.append(kernel))
    found = list(kernels(lowered(function, *shape).compiler_ir().operation))
    assert len(found) == 1 and begun == found


def test_a_kernel_is_compiled_once_and_only_where_a_gpu_is(monkeypatch):
    begun = []
    monkeypatch.setattr(mosaic_gpu_call, "_begun", set())
    monkeypatch.setattr(mosaic_gpu_call, "_compile", lambda *kernel: begun.append(kernel))
    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(mosaic_gpu_call, "_COMPILERS", pool)
        mosaic_gpu_call._begin(b"hash", b"module")
        # One that tells nothing but its properties.
        gpu_of(monkeypatch)
        mosaic_gpu_call._begin(b"hash", b"module")
        gpu = device.current()
        monkeypatch.setattr(jax, "Device", type(gpu))
        for kernel in ((b"hash", b"module"), (b"hash", b"module"), (b"other", b"module")):
            mosaic_gpu_call._begin(*kernel)
    # The pool takes no more, as at the interpreter's end.
    mosaic_gpu_call._begin(b"last", b"module")
    assert begun == [(b"hash", b"module", gpu), (b"other", b"module", gpu)]


@pytest.mark.slow
def test_what_a_thread_compiled_is_not_compiled_again(tmp_path):
    """jaxlib finds it by its hash, where it compiles for a GPU that is not here."""
    assert mosaic_gpu_compiled.report("ahead", tmp_path) == {"by the thread": 1, "again": 0}
