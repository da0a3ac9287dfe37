"""The wavelet convolution on NVIDIA GPUs: the kernels that JAX launches too, by the driver."""

import ctypes
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor

from pallas_kernels.common.cuda import Device, Kernel
from pallas_kernels.common.nvrtc import compiled
from pallas_kernels.common.refusals import compiling
from pallas_kernels.common.types import Output
from pallas_kernels.wtconv import cuda_launches
from pallas_kernels.wtconv.cuda_launches import Images
from pallas_kernels.wtconv.problem import Problem
from torch_bridge.runtime.outputs import allocated

DIFFERENTIABLE = False


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


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` for a problem that these kernels do not compute.

    Args:
        direction: "fwd" or "bwd".
        problem: `pallas_kernels.wtconv.problem.Problem`, its shape channels-last.
    """
    cuda_launches.check(problem)


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The numbers of resident blocks of a multiprocessor that are worth timing; see `check`."""
    return cuda_launches.search_space()


def forward(
    x: Tensor,
    taps: Sequence[Tensor],
    bias: Tensor | None,
    *,
    wavelet: str,
    transpose: bool,
    resident: int | None = None,
) -> Tensor:
    """The operator on `x [N, C, H, W]`, or its transpose; see `ops` for the arguments.

    `wavelet` is Haar; for `resident` see `search_space`.
    """
    x, taps = _dense(x), [tap.contiguous() for tap in taps]
    bias = None if bias is None else bias.contiguous()
    where = _images(x), device_of(x.device), launch
    y = cuda_launches.forward(x, taps, bias, *where, transpose, resident=resident)
    return y.permute(0, 3, 1, 2)


def weight_grad(
    x: Tensor,
    dy: Tensor,
    *,
    kernel_size: int,
    levels: int,
    wavelet: str,
    resident: int | None = None,
) -> list[Tensor]:
    """Gradients of the taps; every sum runs in a fixed order, so they are bitwise reproducible."""
    x = _dense(x)
    memory_format = torch.channels_last if _channels_last(x) else torch.contiguous_format
    dy = dy.contiguous(memory_format=memory_format)
    images = _images(x)
    images = images._replace(aligned=min(images.aligned, _images(dy).aligned))
    sizes = images, kernel_size, levels, device_of(x.device), launch
    first, *rest = cuda_launches.weight_grad(x, dy, *sizes, resident=resident)
    parts = [first[:, :1]]
    for sums in (first, *rest):
        parts += sums[:, 1:].split(4, 1)
    shape = -1, 1, kernel_size, kernel_size
    # Of one channel parts are views of one array, which operators may not return.
    copies = [part.clone(memory_format=torch.contiguous_format) for part in parts]
    return [copy.view(shape) for copy in copies]


def _images(x: Tensor) -> Images:
    """The description of a dense `[N, C, H, W]`."""
    n, c, h, w = x.shape
    aligned = 4 if x.is_meta else math.gcd(4, x.data_ptr() // x.element_size())
    dtype = str(x.dtype).removeprefix("torch.")
    return Images((n, h, w, c), dtype, _channels_last(x), aligned)


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous()


def _dense(x: Tensor) -> Tensor:
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def launch(
    kernel: Kernel,
    arguments: Sequence[Tensor | int | None],
    outputs: Sequence[Output],
    blocks: int,
) -> list[Tensor]:
    """Launches a kernel on the current stream of its tensors' device; `common.cuda.Launch`."""
    from cuda.bindings import driver

    device = cast(Tensor, arguments[0]).device
    made = allocated(outputs, device)
    function = _function(kernel, device.index)
    values: list[int] = []
    types: list[type] = []
    for argument in (*arguments, *made):
        if isinstance(argument, int):
            values.append(argument)
            types.append(ctypes.c_int)
        else:
            values.append(0 if argument is None else argument.data_ptr())
            types.append(ctypes.c_void_p)
    stream = driver.CUstream(torch.cuda.current_stream(device).cuda_stream)
    grid, block = (blocks, 1, 1), (kernel.threads, 1, 1)
    packed = (tuple(values), tuple(types))
    # A thread of PyTorch's backward pass has no context before the first call that needs one.
    _checked(driver.cuCtxPushCurrent(_context(device.index)))
    try:
        _checked(driver.cuLaunchKernel(function, *grid, *block, kernel.shared, stream, packed, 0))
    finally:
        _checked(driver.cuCtxPopCurrent())
    return made


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
    return Device(found.shared_memory_per_block_optin, found.multi_processor_count, capability)


@cache
@compiling("a CUDA kernel")
def _function(kernel: Kernel, device: int) -> Any:
    """A compiled kernel on one device."""
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    code = compiled(kernel.text(), dict(kernel.macros), f"sm_{major}{minor}")
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
