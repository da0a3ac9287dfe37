"""Launches of CUDA kernels from JAX: NVRTC makes PTX, which jaxlib's launcher of Triton takes.

A launch is a primitive. NVRTC begins to compile its kernel where the launch is traced, all kernels
beside each other, and is waited for where the program is lowered for CUDA; that needs neither a GPU
nor its driver. XLA's program holds the PTX; the launcher assembles it in each process before its
first launch, a fraction of a second a kernel.

`jax.export` must be told that the launch is known to be safe:

    jax.export.export(f, platforms=["cuda"], disabled_checks=[cuda_call.SAFE])(x)
"""

import os
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jax.extend.core import Primitive
from jax.interpreters import mlir

from pallas_kernels.common import device, nvrtc
from pallas_kernels.common._compat import (
    TENSOR_MAPS,
    TRITON_TARGET,
    lowered_triton_call,
    triton_launcher,
)
from pallas_kernels.common.cuda import (
    BOXED,
    ELEMENTS,
    SWIZZLES,
    Box,
    Device,
    Kernel,
    source_text,
)
from pallas_kernels.common.types import Output

SAFE = export.DisabledSafetyCheck.custom_call(TRITON_TARGET)
"""The promise that `jax.export` asks for: a launch depends on nothing but its arguments."""

_SHARED = {75: 65536, 80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 120: 101376}
"""Bytes of shared memory that a block may have, of compute capabilities from each on."""
_OLDEST = min(_SHARED)
"""The capability times ten that a launch is made for where no GPU is: newer ones take it too."""
_MULTIPROCESSORS = 132
"""Multiprocessors of a GPU that does not tell: an H100's, other numbers work as well."""
_ALIGNMENT = 16
"""Bytes that the address of every array is a multiple of, which the launcher checks."""
_AT_ONCE = 16
"""The most kernels that NVRTC compiles at a time."""
_COMPILERS = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="nvrtc")


class Null(NamedTuple):
    """A null pointer among the constants of a launch."""


Constant = int | Null | None
"""An argument that is known when a call is traced; None where an array stands."""


class Map(NamedTuple):
    """A tensor map of an array `[images, rows, columns, channels]`."""

    shape: tuple[int, ...]
    dtype: str
    box: Box


def unavailable(platform: str) -> str | None:
    """The reason why CUDA kernels cannot run on a platform, or None where they can.

    They need an NVIDIA GPU, JAX's plugin for CUDA, NVRTC, and a launcher that understands the PTX
    which this NVRTC writes; that is tried once on each device.

    Example:
        >>> unavailable("tpu")
        'needs a GPU, this is a tpu'
    """
    if platform != "gpu":
        return f"needs a GPU, this is a {platform}"
    gpu = device.current()
    capability = _capability(gpu)
    if capability is None:
        return f"needs an NVIDIA GPU of known compute capability, this is {gpu.device_kind}"
    if capability < _OLDEST:
        return f"needs compute capability {_OLDEST / 10} or newer, this has {capability / 10}"
    try:
        triton_launcher()
        written = nvrtc.version()
    # Bindings without the library that they bind raise a RuntimeError.
    except (ImportError, RuntimeError) as error:
        return f"needs NVRTC and JAX's plugin for CUDA (the extra 'cuda12' or 'cuda13'): {error}"
    # A program that is compiled ahead of time has no device to try it on.
    reason = _refusal_of_probe(gpu) if isinstance(gpu, jax.Device) else None
    return reason and f"needs a launcher that takes what NVRTC {written} writes: {reason}"


def device_properties() -> Device:
    """The properties of the GPU that a call is traced for.

    JAX 0.10 does not tell the shared memory; there and ahead of time the capability does. Its
    launcher has no tensor maps either.
    """
    gpu = device.current()
    capability = _capability(gpu) or _OLDEST
    shared = getattr(gpu, "shared_memory_per_block_optin", None)
    if shared is None:
        shared = _SHARED[max(known for known in _SHARED if known <= capability)]
    boxes = TENSOR_MAPS and capability in BOXED
    multiprocessors = getattr(gpu, "core_count", None) or _MULTIPROCESSORS
    return Device(shared, multiprocessors, capability, boxes)


def launch(
    kernel: Kernel,
    arguments: "Sequence[jax.Array | int | None]",
    outputs: Sequence[Output],
    blocks: int,
) -> list[jax.Array]:
    """Launches a kernel on contiguous arrays, as `common.cuda.Launch` says."""
    arrays = [a for a in arguments if not isinstance(a, int) and a is not None]
    constants = tuple(a if isinstance(a, int) else Null() if a is None else None for a in arguments)
    types = tuple((tuple(shape), str(dtype)) for shape, dtype in outputs)
    capability = _capability(device.current()) or _OLDEST
    _ptx(kernel, capability)
    return _call(
        *arrays,
        kernel=kernel,
        constants=constants,
        outputs=types,
        blocks=blocks,
        capability=capability,
    )


@partial(jax.jit, static_argnames=("kernel", "constants", "outputs", "blocks", "capability"))
def _call(*arrays: jax.Array, **static: Any) -> list[jax.Array]:
    """The primitive inside a program, since it has no meaning outside of one."""
    return _launch.bind(*arrays, **static)


_launch = Primitive("cuda_launch")
_launch.multiple_results = True


@_launch.def_abstract_eval
def _types(*arrays: Any, outputs: tuple[Output, ...], **static: Any) -> list[Any]:
    return [jax.core.ShapedArray(shape, jnp.dtype(dtype)) for shape, dtype in outputs]


def _lower(
    context: mlir.LoweringRuleContext,
    *operands: Any,
    kernel: Kernel,
    constants: tuple[Constant, ...],
    outputs: tuple[Output, ...],
    blocks: int,
    capability: int,
) -> Sequence[Any]:
    """The custom call that launches a kernel."""
    types = iter((*context.avals_in, *context.avals_out))
    parameters = tuple(
        _parameter(next(types), kernel.box(number)) if value is None else value
        for number, value in enumerate((*constants, *(None,) * len(outputs)))
    )
    opaque = zlib.compress(_serialized(kernel, parameters, blocks, capability))
    aliases = {}
    if kernel.in_place is not None:
        assert constants[kernel.in_place] is None and len(outputs) == 1
        aliases[constants[: kernel.in_place].count(None)] = 0
    return lowered_triton_call(context, operands, opaque, aliases)


mlir.register_lowering(_launch, _lower, platform="cuda")


@cache
def _serialized(
    kernel: Kernel, parameters: tuple[Constant | Map, ...], blocks: int, capability: int
) -> bytes:
    """A launch as jaxlib's launcher reads it."""
    launcher = triton_launcher()
    try:
        ptx = _ptx(kernel, capability).result().decode()
    except BaseException:
        # Another call tries again.
        _compiling.cache_clear()
        raise

    def made_of(value: Constant | Map) -> Any:
        if value is None:
            return launcher.create_array_parameter(0, _ALIGNMENT)
        if isinstance(value, Map):
            sizes, strides = value.box.mapped(value.shape)
            return launcher.create_tma_descriptor_parameter(
                elem_type=ELEMENTS[value.dtype],
                swizzle=SWIZZLES[value.dtype],
                shape=sizes,
                strides=strides,
                block_shape=list(value.box.size),
                oob_fill=0,
            )
        if isinstance(value, Null):
            return launcher.create_scalar_parameter(0, "i64")
        return launcher.create_scalar_parameter(value, "i32")

    made = list(map(made_of, parameters))
    warps = kernel.threads // 32
    compiled = launcher.TritonKernel(kernel.name, warps, 1, kernel.shared, ptx, "", capability)
    return launcher.TritonKernelCall(compiled, blocks, 1, 1, made).to_proto(kernel.name, b"")


def _parameter(array: Any, box: Box | None) -> Map | None:
    """An array's parameter: None for a pointer."""
    return None if box is None else Map(array.shape, str(array.dtype), box)


def _ptx(kernel: Kernel, capability: int) -> Future[bytes]:
    """A kernel's PTX, which a thread makes; kernels that differ by their launch share it."""
    return _compiling(kernel.source, kernel.macros, capability, kernel.exact)


@cache
def _compiling(
    source: Path, macros: tuple[tuple[str, object], ...], capability: int, exact: bool
) -> Future[bytes]:
    def run() -> bytes:
        arch = nvrtc.virtual_arch(capability, exact)
        return nvrtc.compiled(source_text(source), dict(macros), arch)

    try:
        return _COMPILERS.submit(run)
    except RuntimeError:
        # The interpreter ends, and takes no more work from a thread that has not.
        done: Future[bytes] = Future()
        done.set_result(run())
        return done


def _without_threads() -> None:
    """Makes a forked process compile with threads of its own, since it has none of its parent's."""
    global _COMPILERS
    _COMPILERS = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="nvrtc")
    _compiling.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_without_threads)


def _capability(gpu: object) -> int | None:
    """A GPU's compute capability times ten; AMD's are words."""
    major, _, minor = str(getattr(gpu, "compute_capability", "")).partition(".")
    return int(major) * 10 + int(minor or 0) if major.isdigit() else None


@cache
def _refusal_of_probe(gpu: jax.Device) -> str | None:
    """The reason why a device does not run a kernel of one line, None if it does."""
    kernel = Kernel(Path(__file__).with_name("probe.cu"), "probe", (), 32, 0)

    def run() -> float:
        with jax.default_device(gpu):
            (y,) = launch(kernel, [jnp.ones(1, "float32")], [((1,), "float32")], 1)
            return float(y[0])

    try:
        # In another thread, since this one may be tracing.
        with ThreadPoolExecutor(1) as pool:
            found = pool.submit(run).result()
    # NVRTC, XLA and the launcher fail in their own ways.
    except Exception as error:
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None if found == 2 else f"1 + 1 is {found} there"
