"""Launches of CUDA kernels from JAX: what is lowered, and where they cannot run."""

import os
import re
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier, Event
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cuda import EMULATED, gpu_of

from pallas_kernels.common import _compat, cuda_call, nvrtc
from pallas_kernels.common.cuda import Box, Kernel
from pallas_kernels.common.on_cpu import cuda as on_cpu
from pallas_kernels.common.refusals import KernelError

COMPILER = pytest.mark.skipif(
    sys.platform != "linux", reason="the test extra has NVRTC for Linux alone"
)
SCALE = Kernel(Path(__file__).with_name("scale.cu"), "scale", (("FACTOR", "2.0f"),), 64, 512)


@pytest.fixture(autouse=True)
def anew(monkeypatch, tmp_path):
    """Nothing that another test compiled, nothing left for others, nothing on the user's disk."""
    monkeypatch.setattr(nvrtc, "cache_folder", lambda: tmp_path / "ptx")
    forget()
    yield
    forget()


def forget():
    for function in (cuda_call._serialized, cuda_call._compiling, cuda_call._refusal_of_probe):
        function.cache_clear()
    cuda_call._call.clear_cache()


def scaled(x, offset=None):
    (y,) = cuda_call.launch(SCALE, [x, offset, x.size], [(x.shape, "float32")], -(-x.size // 64))
    return y


class Launcher(SimpleNamespace):
    """In place of jaxlib's, which needs its plugin: what it is told, as text."""

    _cuda_triton = True

    @staticmethod
    def create_array_parameter(zeroed, alignment):
        return f"array {zeroed} {alignment}"

    @staticmethod
    def create_scalar_parameter(value, kind):
        return f"{kind} {value}"

    @staticmethod
    def create_tma_descriptor_parameter(**told):
        return told

    @staticmethod
    def TritonKernel(*told):
        return told

    class TritonKernelCall:
        def __init__(self, kernel, *grid_and_parameters):
            self.told = kernel, grid_and_parameters

        def to_proto(self, name, metadata):
            Launcher.seen.append((self.told, name, metadata))
            return b"a launch"


@pytest.fixture
def launcher(monkeypatch):
    Launcher.seen = []
    monkeypatch.setattr(cuda_call, "triton_launcher", lambda: Launcher)
    return Launcher


@COMPILER
@pytest.mark.parametrize(("capability", "arch"), [("7.5", 75), ("9.0", 90), ("12.1", 121)])
def test_a_launch_in_a_lowered_program(capability, arch, launcher, monkeypatch):
    gpu_of(monkeypatch, capability)
    offset = jnp.ones(100)
    program = jax.jit(lambda x: scaled(scaled(x), offset)).trace(jnp.ones(100))
    text = program.lower(lowering_platforms=("cuda",)).as_text()
    assert re.findall(r"custom_call @(\w+)", text) == [_compat.TRITON_TARGET] * 2
    without, with_offset = launcher.seen
    (name, warps, blocks_together, shared, ptx, ttir, told), launched = without[0]
    assert (name, warps, blocks_together, shared, ttir, told) == ("scale", 2, 1, 512, "", arch)
    assert ".entry scale(" in ptx and f".target sm_{arch}" in ptx
    arrays = "array 0 16"
    assert launched == (2, 1, 1, [arrays, "i64 0", "i32 100", arrays])
    assert with_offset[0][1] == (2, 1, 1, [arrays, arrays, "i32 100", arrays])
    assert without[1:] == ("scale", b"")


def test_tracing_begins_to_compile_every_kernel_and_waits_for_none(launcher, monkeypatch):
    gpu_of(monkeypatch)
    monkeypatch.setattr(nvrtc, "virtual_arch", lambda capability, exact: f"compute_{capability}")
    # Each is compiled while the other one is.
    both, traced = Barrier(2, timeout=60), Event()

    def compile_source(source, macros, arch):
        traced.wait(60)
        both.wait()
        return f"{macros}".encode()

    monkeypatch.setattr(nvrtc, "compile_source", compile_source)
    thrice = SCALE._replace(macros=(("FACTOR", "3.0f"),))
    kernels = SCALE, thrice, thrice._replace(threads=32)

    @jax.jit
    def run(x):
        return [cuda_call.launch(kernel, [x], [((4,), "float32")], 1) for kernel in kernels]

    program = run.trace(jnp.ones(4))
    traced.set()
    program.lower(lowering_platforms=("cuda",))
    assert [told[0][4] for told, *_ in launcher.seen] == [
        "{'FACTOR': '2.0f'}", *["{'FACTOR': '3.0f'}"] * 2
    ]  # fmt: skip


def test_what_fails_to_compile_fails_where_it_is_lowered_and_is_tried_again(launcher, monkeypatch):
    answers = [KernelError("NVRTC could not compile", "no reason"), b"ptx"]

    def compile_source(*_):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    gpu_of(monkeypatch)
    monkeypatch.setattr(nvrtc, "virtual_arch", lambda capability, exact: f"compute_{capability}")
    monkeypatch.setattr(nvrtc, "compile_source", compile_source)
    program = jax.jit(scaled).trace(jnp.ones(4))
    with pytest.raises(KernelError, match="NVRTC could not compile"):
        program.lower(lowering_platforms=("cuda",))
    program.lower(lowering_platforms=("cuda",))
    ((name, *_, ptx, _, _), _), *_ = launcher.seen[0]
    assert (name, ptx) == ("scale", "ptx")


def test_a_thread_that_outlives_the_interpreters_end_compiles_itself(monkeypatch):
    monkeypatch.setattr(cuda_call, "_COMPILERS", ThreadPoolExecutor(1))
    cuda_call._COMPILERS.shutdown()
    monkeypatch.setattr(nvrtc, "virtual_arch", lambda capability, exact: f"compute_{capability}")
    monkeypatch.setattr(nvrtc, "compile_source", lambda *_: b"ptx")
    assert cuda_call._ptx(SCALE, 90).result() == b"ptx"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:os.fork:RuntimeWarning")
def test_a_forked_process_compiles_with_threads_of_its_own(monkeypatch):
    monkeypatch.setattr(nvrtc, "virtual_arch", lambda capability, exact: f"compute_{capability}")
    monkeypatch.setattr(nvrtc, "compile_source", lambda *_: b"ptx")
    cuda_call._ptx(SCALE, 90).result()
    child = os.fork()
    if child == 0:
        os._exit(cuda_call._ptx(SCALE, 80).result(30) != b"ptx")
    assert os.waitpid(child, 0)[1] == 0


@COMPILER
def test_a_tensor_map_is_told_of_the_array_that_it_is_of(launcher, monkeypatch):
    gpu_of(monkeypatch)
    box = (1, 2, 16, 32)
    boxed = SCALE._replace(boxes=(Box(0, box), Box(3, box, step=4)))
    x = jnp.ones((2, 6, 5, 40), jnp.bfloat16)
    run = jax.jit(lambda x: cuda_call.launch(boxed, [x, None, 4], [(x.shape, "bfloat16")], 1))
    run.trace(x).lower(lowering_platforms=("cuda",))
    ((_, (*_, parameters)), *_), *_ = launcher.seen
    found = {
        "elem_type": 9,
        "swizzle": 2,
        "shape": [2, 6, 5, 40],
        "strides": [1200, 200, 40, 1],
        "block_shape": list(box),
        "oob_fill": 0,
    }
    fourth = {"shape": [2, 2, 2, 40], "strides": [1200, 800, 160, 1]}
    assert parameters == [found, "i64 0", "i32 4", found | fourth]


@COMPILER
def test_an_output_takes_the_memory_of_an_argument(launcher, monkeypatch):
    """The second array of the launch is its second operand, though the third argument."""
    gpu_of(monkeypatch)
    kernel = SCALE._replace(in_place=2)
    run = jax.jit(lambda x, y: cuda_call.launch(kernel, [x, 4, y], [(y.shape, "float32")], 1))
    text = run.trace(jnp.ones(9), jnp.ones(9)).lower(lowering_platforms=("cuda",)).as_text()
    alias = "output_operand_alias<output_tuple_indices = [], operand_index = 1, "
    assert alias in text


@COMPILER
def test_ptx_is_kept_on_disk(launcher, monkeypatch):
    gpu_of(monkeypatch)
    lower = lambda: jax.jit(scaled).trace(jnp.ones(9)).lower(lowering_platforms=("cuda",))  # noqa: E731
    lower()
    (file,) = nvrtc.cache_folder().iterdir()
    assert file.suffix == ".ptx" and b".entry scale(" in file.read_bytes()
    monkeypatch.setattr(nvrtc, "compile_source", None)
    cuda_call._serialized.cache_clear()
    cuda_call._compiling.cache_clear()
    lower()


@COMPILER
def test_an_older_nvrtc_writes_for_the_newest_gpu_that_it_knows():
    assert nvrtc.virtual_arch(90) == "compute_90"
    assert nvrtc.virtual_arch(90, exact=True) == "compute_90a"
    assert int(nvrtc.virtual_arch(999).removeprefix("compute_")) >= 121
    with pytest.raises(NotImplementedError, match=r"compute capability 7.5 and newer, .* has 5.2"):
        nvrtc.virtual_arch(52)


MISSING = {
    "a GPU": ("tpu", {}, "needs a GPU, this is a tpu"),
    "NVIDIA": ("gpu", {"capability": "gfx942"}, "needs an NVIDIA GPU of known compute capability"),
    "Turing": ("gpu", {"capability": "7.0"}, "needs compute capability 7.5 or newer, this has 7.0"),
    "a plugin": ("gpu", {}, "needs NVRTC and JAX's plugin for CUDA .*'cuda13'.: jaxlib 0.1 finds"),
}


@pytest.mark.parametrize("lacking", MISSING)
def test_where_it_cannot_run_it_says_what_is_missing(lacking, monkeypatch):
    platform, gpu, reason = MISSING[lacking]
    gpu_of(monkeypatch, **gpu)

    def none():
        raise ImportError("jaxlib 0.1 finds no jax-cuda12-plugin")

    monkeypatch.setattr(cuda_call, "triton_launcher", none)
    assert re.match(reason, cuda_call.unavailable(platform))


def test_without_bindings_it_says_so(launcher, monkeypatch):
    gpu_of(monkeypatch)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert "needs NVRTC and JAX's plugin for CUDA (the extra 'cuda12'" in cuda_call.unavailable(
        "gpu"
    )


@COMPILER
def test_a_launcher_that_does_not_take_the_ptx_is_a_reason(launcher, monkeypatch):
    """As where ptxas is older than NVRTC: jaxlib says so at the first launch alone."""
    gpu_of(monkeypatch)
    assert cuda_call.unavailable("gpu") is None

    def fails(*arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: ptxas fatal: Unsupported .version 99.9\nmore")

    monkeypatch.setattr(cuda_call, "launch", fails)
    reason = cuda_call._refusal_of_probe(jax.devices()[0])
    assert reason == "JaxRuntimeError: INTERNAL: ptxas fatal: Unsupported .version 99.9"


@pytest.mark.parametrize(
    ("gpu", "shared", "multiprocessors"),
    [
        ({"capability": "7.5", "core_count": 40}, 65536, 40),
        ({"capability": "8.6", "core_count": 28}, 101376, 28),
        ({"capability": "10.3"}, 232448, 132),
        ({"capability": "12.0", "core_count": 170}, 101376, 170),
        ({"capability": "9.0", "shared_memory_per_block_optin": 99, "core_count": 1}, 99, 1),
    ],
)
def test_the_device_as_kernels_are_chosen_by(gpu, shared, multiprocessors, monkeypatch):
    gpu_of(monkeypatch, **gpu)
    assert cuda_call.device_properties()[:2] == (shared, multiprocessors)


@COMPILER
def test_a_real_launcher_serialises_and_exports(monkeypatch):
    try:
        _compat.triton_launcher()
    except ImportError as error:
        pytest.skip(str(error))
    gpu_of(monkeypatch)
    opaque = cuda_call._serialized(SCALE, (None, cuda_call.Null(), 9, None), 1, 90)
    assert b".entry scale(" in opaque
    zlib.compress(opaque)
    export = partial(jax.export.export, jax.jit(scaled), platforms=["cuda"])
    with pytest.raises(ValueError, match=_compat.TRITON_TARGET):
        export()(jnp.ones(9))
    assert export(disabled_checks=[cuda_call.SAFE])(jnp.ones(9)).platforms == ("cuda",)


@pytest.mark.gpu
def test_a_launch_on_a_gpu():
    assert cuda_call.unavailable("gpu") is None
    x, offset = jnp.arange(1000.0), jnp.full(1000, 3.0)
    np.testing.assert_array_equal(jax.jit(scaled)(x), 2 * np.arange(1000.0))
    np.testing.assert_array_equal(scaled(x, offset), 2 * np.arange(1000.0) + 3)


@pytest.mark.gpu
def test_ptx_of_a_newer_nvrtc_is_a_reason_on_a_gpu(monkeypatch):
    compile_source = nvrtc.compile_source

    def newer(*arguments):
        return re.sub(rb"\.version \d+\.\d+", b".version 99.9", compile_source(*arguments))

    monkeypatch.setattr(nvrtc, "compile_source", newer)
    assert "needs a launcher that takes what NVRTC" in cuda_call.unavailable("gpu")


@pytest.mark.wide
@EMULATED
def test_threads_build_a_kernel_for_the_cpu_once(monkeypatch, tmp_path):
    run, built = subprocess.run, []

    def counted(*arguments, **options):
        built.append(arguments)
        return run(*arguments, **options)

    monkeypatch.setattr(subprocess, "run", counted)
    parameters = "const float* x, float* y"
    body = "y[threadIdx.x] = FACTOR * x[threadIdx.x];"
    source = f'extern "C" __global__ void scale({parameters}) {{ {body} }}'
    launcher, x = on_cpu.Launcher(tmp_path, source), np.ones(64, "float32")

    def doubled(_):
        return launcher.launch(SCALE, [x], [((64,), "float32")], 1)[0]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(doubled, range(2)))
    # What every kernel includes, what it is linked with, and the kernel.
    assert len(built) == 3 and np.array_equal(found, np.full((2, 64), 2.0))
