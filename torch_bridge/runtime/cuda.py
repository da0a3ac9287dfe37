"""Launches of CUDA kernels on PyTorch's tensors, by the driver, and where they can run."""

import ctypes
import sys
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, cast

import torch
from torch import Tensor

from pallas_kernels.common.cuda import BOXED, ELEMENTS, SWIZZLES, Box, Device, Kernel
from pallas_kernels.common.nvrtc import compiled
from pallas_kernels.common.refusals import compiling
from pallas_kernels.common.types import Output
from torch_bridge.runtime.calls import dtype_name
from torch_bridge.runtime.outputs import allocated


def unavailable(platform: str) -> str | None:
    """The reason why these kernels cannot run: they need an NVIDIA GPU and cuda-core's NVRTC."""
    if platform != "cuda" or torch.version.hip:
        return f"needs an NVIDIA GPU, this is {torch.version.hip and 'AMD' or platform}"
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    # Bindings without the library that they bind raise a RuntimeError.
    except (ImportError, RuntimeError) as error:
        return f"needs cuda-core (the extra 'cuda-bridge'): {error}"
    return None


def launch(
    kernel: Kernel,
    arguments: Sequence[Tensor | int | None],
    outputs: Sequence[Output],
    blocks: int,
) -> list[Tensor]:
    """Launches a kernel on the current stream of its tensors' device; `common.cuda.Launch`."""
    from cuda.bindings import driver

    made = outputs_of(kernel, arguments, outputs)
    device = made[0].device
    function = _function(kernel, device.index)
    values = [
        _value(argument, kernel.box(number)) for number, argument in enumerate((*arguments, *made))
    ]
    stream = driver.CUstream(torch.cuda.current_stream(device).cuda_stream)
    grid, block = (blocks, 1, 1), (kernel.threads, 1, 1)
    pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
    packed = ctypes.addressof(pointers)
    # A thread of PyTorch's backward pass has no context before the first call that needs one.
    _checked(driver.cuCtxPushCurrent(_context(device.index)))
    try:
        _checked(driver.cuLaunchKernel(function, *grid, *block, kernel.shared, stream, packed, 0))
    finally:
        _checked(driver.cuCtxPopCurrent())
    return made


def outputs_of(
    kernel: Kernel, arguments: Sequence[Tensor | int | None], outputs: Sequence[Output]
) -> list[Tensor]:
    """The tensors that a launch writes: new ones, or the one that it writes in place."""
    if kernel.in_place is None:
        return allocated(outputs, arguments)
    ((shape, dtype),), place = outputs, arguments[kernel.in_place]
    assert isinstance(place, Tensor)
    assert (tuple(place.shape), dtype_name(place.dtype)) == (tuple(shape), dtype)
    return [place]


def _value(argument: Tensor | int | None, box: Box | None) -> Any:
    """An argument as the driver reads it, which must live until the launch."""
    if isinstance(argument, int):
        return ctypes.c_int(argument)
    if argument is None:
        return ctypes.c_void_p(None)
    if box is None:
        return ctypes.c_void_p(argument.data_ptr())
    shape, dtype = tuple(argument.shape), dtype_name(argument.dtype)
    return _tensor_map(argument.data_ptr(), shape, dtype, box)


@lru_cache(256)
def _tensor_map(address: int, shape: tuple[int, ...], dtype: str, box: Box) -> Any:
    """The tensor map of a contiguous array.

    By the driver's own function, since it asks for an address that cuda-bindings do not promise.
    """
    size = getattr(torch, dtype).itemsize
    sizes, strides = (numbers[::-1] for numbers in box.mapped(shape))
    bytes_ = [size * stride for stride in strides[1:]]
    found = _TensorMap()
    place = -(-ctypes.addressof(found) // 64) * 64
    wide, narrow = ctypes.c_uint64 * 4, ctypes.c_uint32 * 4
    status = _driver().cuTensorMapEncodeTiled(
        *(ctypes.c_void_p(place), ELEMENTS[dtype], 4, ctypes.c_void_p(address)),
        *(wide(*sizes), wide(*bytes_), narrow(*box.size[::-1]), narrow(1, 1, 1, 1)),
        *(0, SWIZZLES[dtype], _L2_128, 0),
    )
    if status:
        raise RuntimeError(f"the CUDA driver reports {status} for a tensor map of {shape}, {box}")
    return _TensorMap128.from_buffer_copy(ctypes.string_at(place, 128))


_TensorMap128 = ctypes.c_char * 128
_TensorMap = ctypes.c_char * 192
"""A tensor map, and room for one at a multiple of 64 bytes."""
_L2_128 = 2
"""The driver's number of reads of 128 bytes into the L2 cache (`CUtensorMapL2promotion`)."""


@cache
def _driver() -> ctypes.CDLL:
    """The library of CUDA's driver."""
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


@cache
def _context(device: int) -> Any:
    """The context of a device that PyTorch uses too."""
    from cuda.bindings import driver

    return _checked(driver.cuDevicePrimaryCtxRetain(driver.CUdevice(device)))


@cache
def device_of(device: torch.device) -> Device:
    """The properties of a device that variants are chosen by."""
    # PyTorch's own stubs do not know all that it tells.
    found = cast(Any, torch.cuda.get_device_properties(device))
    capability = 10 * found.major + found.minor
    shared, count = found.shared_memory_per_block_optin, found.multi_processor_count
    return Device(shared, count, capability, boxes=capability in BOXED)


@cache
def _function(kernel: Kernel, device: int) -> Any:
    """A compiled kernel on one device, which kernels that differ by their launch share."""
    return _loaded(kernel._replace(boxes=(), in_place=None), device)


@cache
@compiling("a CUDA kernel")
def _loaded(kernel: Kernel, device: int) -> Any:
    """The same, compiled and loaded."""
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    arch = f"sm_{major}{minor}{'a' if kernel.exact else ''}"
    code = compiled(kernel.text(), dict(kernel.macros), arch)
    library = _checked(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
    found = _checked(driver.cuLibraryGetKernel(library, kernel.name.encode()))
    attributes = driver.CUfunction_attribute
    for attribute, value in (
        (attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, kernel.shared),
        (attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
    ):
        _checked(driver.cuKernelSetAttribute(attribute, value, found, driver.CUdevice(device)))
    # A kernel is launched as a function is.
    return driver.CUfunction(int(found))


def _checked(answer: tuple[Any, ...]) -> Any:
    """The result of a call of the driver, whose error is raised."""
    status, *values = answer
    if int(status):
        raise RuntimeError(f"the CUDA driver reports {status.name}")
    return values[0] if values else None
