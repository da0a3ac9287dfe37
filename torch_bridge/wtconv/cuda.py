"""The wavelet convolution on NVIDIA GPUs: picks and launches variants of `cuda_kernels.cu`.

Where a plane fits into a block's shared memory, one kernel does all levels. Larger images are cut
into tiles, which also read the halo that their levels need; of more than two or three levels the
deeper ones are computed first, from the low band of the last of these, and added.
"""

import ctypes
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pallas_kernels import wtconv
from pallas_kernels.common.nvrtc import compiled
from pallas_kernels.common.refusals import compiling, refuse
from pallas_kernels.wtconv.problem import Problem

DIFFERENTIABLE = False

SOURCE = Path(wtconv.__file__).with_name("cuda_kernels.cu")

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MAX_KERNEL = 9
_MAX_LEVELS = 5
_TILES = ((64, 128), (32, 128), (32, 64), (32, 32), (16, 32), (16, 16))
"""Largest heights and widths of tiles; those of a weight gradient start with the second."""
_SECTOR = 32
"""Bytes of the smallest access to memory."""
_ROLES = 192
"""Threads of a block of a weight gradient, two of which fill a multiprocessor's registers."""
_REGISTERS = {1: 80, 3: 80, 5: 80, 7: 128, 9: 168}
"""Registers of a thread with which nothing is spilled, by kernel size."""
_SUMMING = {1: 128, 3: 128, 5: 168, 7: 255, 9: 255}
"""The same for a weight gradient, whose threads hold a sum a tap."""


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
    dtypes = ("float32", "bfloat16", "float16")
    refuse(problem.unsupported(dtypes, _MAX_KERNEL, _MAX_LEVELS, odd=True))


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The numbers of resident blocks of a multiprocessor that are worth timing; see `check`."""
    return [{}, {"resident": 1}, {"resident": 4}]


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
    taps = [tap.contiguous() for tap in taps]
    bias = None if bias is None else bias.contiguous()
    return _forward(_dense(x), taps, bias, transpose, resident)


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
    return _weight_grad(x, dy, kernel_size, levels, resident)


class Device(NamedTuple):
    """The properties of a GPU that variants are chosen by; shared memory is a block's, in bytes."""

    shared: int
    multiprocessors: int

    def share(self, blocks: int) -> int:
        """Bytes of shared memory for each of some blocks of a multiprocessor, less 1 KiB each."""
        return (self.shared + 1024) // blocks - 1024


class Variant(NamedTuple):
    """The constants that one kernel is compiled with; see the macros of `cuda_kernels.cu`."""

    kernel: str
    dtype: int
    kernel_size: int
    levels: int
    height: int = 2
    width: int = 8
    planes: int = 1
    rows: int = 2
    threads: int = 256
    blocks: int = 1
    channels_last: bool = False
    vector: int = 1
    base: bool = True
    below: bool = False
    tiled: bool = False
    segment: int = 1
    base_segment: int = 1

    def macros(self) -> dict[str, object]:
        """The definitions for the preprocessor, by name."""
        lists = self._lists()
        return {
            self.kernel.upper(): 1,
            "DTYPE": self.dtype,
            "KERNEL_SIZE": self.kernel_size,
            "LEVELS": self.levels,
            "TILE_H": self.height,
            "TILE_W": self.width,
            "PLANES": self.planes,
            "ROWS": self.rows,
            "THREADS": self.threads,
            "BLOCKS": self.blocks,
            "CHANNELS_LAST": int(self.channels_last),
            "VECTOR": self.vector,
            "TILED": int(self.tiled),
            "BASE": int(self.base),
            "BELOW": int(self.below),
            "SEGMENT": self.segment,
            "BASE_SEGMENT": self.base_segment,
            "PLANE": self.plane(),
            **{name: ",".join(map(str, values)) for name, values in lists.items()},
        }

    def _lists(self) -> dict[str, list[int]]:
        radius = self.kernel_size // 2
        window = _round_up(4 + 2 * radius, 4)
        lists: dict[str, list[int]] = {
            name: []
            for name in (
                *("TILE_ROWS", "TILE_COLUMNS", "HALO", "LEFT"),
                *("LOW_ROWS", "HIGH_ROWS", "STRIDE"),
            )
        }
        for level in range(1, self.levels + 1):
            rows, columns = _ceil_div(self.height, 2**level), _ceil_div(self.width, 2**level)
            # Each level below needs twice the halo; beyond a whole plane all is zero.
            halo = radius * 2 ** (self.levels - level) if self.tiled else radius
            left = radius + _round_up(halo - radius, 4)
            patches = _round_up(rows, self.rows) if level == 1 else rows
            across = _ceil_div(columns, 4)
            stride = _round_up(
                max(left - radius + 4 * across - 4 + window, left + columns + halo), 4
            )
            if level == 1:
                stride = self._spread(stride, across)
            values = (
                *(rows, columns, halo, left),
                *(halo + max(patches + radius, rows + halo), patches + 2 * radius, stride),
            )
            for found, value in zip(lists.values(), values, strict=True):
                found.append(value)
        return lists

    def _spread(self, stride: int, across: int) -> int:
        """A stride by which eight threads read from different banks, if one is near."""
        for wider in range(stride, stride + 16, 4):
            if (self.rows * wider // 4 - across) % 8 == 0:
                return wider
        return stride

    def plane(self) -> int:
        """Elements of shared memory between planes."""
        lists = self._lists()
        size = sum(
            (low + 3 * high) * stride
            for low, high, stride in zip(
                lists["LOW_ROWS"], lists["HIGH_ROWS"], lists["STRIDE"], strict=True
            )
        )
        if self.kernel == "forward":
            most = _round_up(lists["TILE_ROWS"][0], self.rows)
            for level in range(2, self.levels + 1 + self.below):
                rows, columns = (lists[n][level - 2] for n in ("TILE_ROWS", "TILE_COLUMNS"))
                needed = _ceil_div(most, 2 ** (level - 2))
                size += max(_round_up(rows, 2), needed) * _round_up(columns, 8)
        # Threads beside each other treat different planes, and read from different banks.
        spread = {2: 4, 4: 2}.get(self.planes, self.planes % 8 or 1)
        return _round_up(size, 32) + 4 * spread if self.planes > 1 else _round_up(size, 4)

    def filled(self) -> "Variant":
        """The same variant with the threads that its planes take."""
        rows, across = self.height // 2, _ceil_div(self.width, 8)
        if self.kernel == "weights":
            segment = _ceil_div(rows, _ceil_div(rows, 28))
            # A row of the base's pixels is four times the work of one of coefficients.
            variant = self._replace(segment=segment, base_segment=_ceil_div(segment, 4))
            items = variant.roles()
        else:
            # Two rows at once load less, where a plane has the threads for it all the same.
            large = self.tiled or _ceil_div(rows, 2) * across >= 64
            variant = self._replace(rows=2 if large else 1)
            items = variant.items()
        if self.channels_last:
            variant = variant._replace(vector=math.gcd(self.vector, self.planes))
        iterations = _ceil_div(items, 32 * self.warps()) if self.kernel == "forward" else 1
        return variant._replace(
            threads=_round_up(max(_ceil_div(items, iterations), variant.line()), 32)
        )

    def cut(self, height: int, width: int, most_h: int, most_w: int) -> "Variant":
        """The same variant for tiles of about even size of an image.

        They are cut where squares of the deepest level begin.
        """
        side = 2**self.levels
        return self._replace(
            height=_round_up(_ceil_div(height, _ceil_div(height, most_h)), side),
            width=_round_up(_ceil_div(width, _ceil_div(width, most_w)), max(side, 8)),
        ).filled()

    def suffices(self, device: Device) -> bool:
        """Whether a block has planes enough.

        Small blocks are in different phases, so that one computes while another waits for memory;
        but a block's own work is to be spread, and its warps are to be full.
        """
        if self.channels_last and self.planes * (2 if self.dtype else 4) < _SECTOR:
            return False
        if self.kernel == "weights":
            return self._replace(planes=2 * self.planes).filled().threads > _ROLES
        return self.items() >= 0.85 * self.threads and self.shared() >= device.share(8)

    def items(self) -> int:
        """Patches of the first level of a block."""
        return self.planes * _ceil_div(self.height // 2, self.rows) * _ceil_div(self.width, 8)

    def warps(self) -> int:
        """Warps of a multiprocessor that have registers enough."""
        if self.kernel == "weights":
            return 4 * (512 // _SUMMING[self.kernel_size])
        return 4 * (512 // (_REGISTERS[self.kernel_size] - 8 * (self.rows == 1)))

    def line(self) -> int:
        """Threads that load a row of a plane, or in channels-last of all planes of a block."""
        lists = self._lists()
        columns = lists["STRIDE" if self.tiled else "TILE_COLUMNS"][0]
        across = _ceil_div(columns, 1 if self.kernel_size // 2 % 2 else 2)
        return across * (self.planes // self.vector if self.channels_last else 1)

    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        planes = self.planes * self.plane()
        if self.kernel == "low":
            return 0
        if self.kernel == "weights":
            return 4 * max(2 * planes, self.threads * self.kernel_size**2)
        taps = _round_up((1 + 4 * self.levels) * _round_up(self.kernel_size**2, 4), 32) + 4
        return 4 * (planes + (self.planes if self.channels_last else 1) * taps)

    def roles(self) -> int:
        """Threads that the sums of a weight gradient take."""
        lists = self._lists()
        count = 0
        for level, (rows, columns) in enumerate(
            zip(lists["TILE_ROWS"], lists["TILE_COLUMNS"], strict=True)
        ):
            across = _ceil_div(columns, 4) * self.planes
            if level == 0 and self.base:
                count = _round_up(across * _ceil_div(rows, self.base_segment), 32)
            count += 4 * across * _ceil_div(rows, self.segment)
        return _round_up(count, 32)


def planned(
    kernel: str,
    x: Tensor,
    kernel_size: int,
    levels: int,
    device: Device,
    base: bool,
    resident: int | None = None,
) -> Variant:
    """The variant of a kernel for a dense x, of as many levels as tiles may have."""
    layout = _channels_last(x), _vector(x, kernel_size), base
    return _planned(kernel, x.shape, x.dtype, kernel_size, levels, device, *layout, resident)


@cache
def _planned(
    kernel: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    kernel_size: int,
    levels: int,
    device: Device,
    channels_last: bool,
    vector: int,
    base: bool,
    resident: int | None,
) -> Variant:
    """The result of `planned`, remembered by the properties of x that it depends on.

    A multiprocessor holds three blocks or two, so that one computes while another waits for memory;
    or as many as `resident` says.
    """
    n, c, height, width = shape
    forward = kernel == "forward"
    share = device.share(resident or (3 if forward and not channels_last else 2))
    variant = Variant(
        *(kernel, _DTYPES[dtype], kernel_size, levels),
        height=_round_up(height, 2),
        width=_round_up(width, 4),
        channels_last=channels_last,
        vector=vector,
        base=base,
    )
    if variant.filled().shared() > share:
        # Channels-last, neighbours in memory are channels: a few of them are worth smaller tiles,
        # around which two levels read as much as three do elsewhere.
        planes = min(c, 4 if forward else 2) if channels_last else 1
        variant = variant._replace(tiled=True, planes=planes)
        cuts = [
            variant._replace(levels=count).cut(height, width, *tile)
            for count in range(min(levels, 2 if channels_last else 3), 0, -1)
            for tile in _TILES[not forward :]
        ]
        variant = next((cut for cut in cuts if cut.shared() <= share), cuts[-1])
    else:
        many = c if channels_last else n
        most = device.shared if channels_last else share
        fitting = [variant.filled()]
        for planes in (2, 4, *(6,) * channels_last, 8, 16, 32):
            wider = variant._replace(planes=planes).filled()
            few = planes < 2 * many and wider.threads <= 32 * wider.warps()
            if few and wider.shared() <= most:
                fitting.append(wider)
        variant = next((one for one in fitting if one.suffices(device)), fitting[-1])
    fit = (device.shared + 1024) // (variant.shared() + 1024)
    return variant._replace(blocks=max(1, min(fit, variant.warps() // (variant.threads // 32))))


def _forward(
    x: Tensor,
    taps: Sequence[Tensor | None],
    bias: Tensor | None,
    transpose: bool,
    resident: int | None,
) -> Tensor:
    """The operator on a dense x; without `taps[0]` there is no base convolution."""
    kernel_size, levels = cast(Tensor, taps[-1]).shape[-1], len(taps) - 1
    device, base = device_of(x.device), taps[0] is not None
    variant = planned("forward", x, kernel_size, levels, device, base, resident)
    below = None
    if variant.levels < levels:
        deeper = [None, *taps[variant.levels + 1 :]]
        below = _forward(low_band(x, variant.levels), deeper, None, transpose, resident)
        variant = variant._replace(below=True)
    return launch_forward(variant, x, taps[: variant.levels + 1], bias, below, transpose)


def launch_forward(
    variant: Variant,
    x: Tensor,
    taps: Sequence[Tensor | None],
    bias: Tensor | None,
    below: Tensor | None,
    transpose: bool,
) -> Tensor:
    """Launches the kernel `wtconv_forward`; returns y."""
    n, c, h, w = x.shape
    y = torch.empty_like(x)
    levels = [*taps, *[None] * (_MAX_LEVELS + 1 - len(taps))]
    tiles = _ceil_div(h, variant.height) * _ceil_div(w, variant.width)
    blocks = tiles * _groups(variant, x)
    launch(variant, blocks, [x, below, *levels, bias, y, n, c, h, w, int(transpose)])
    return y


def low_band(x: Tensor, levels: int) -> Tensor:
    """The low band of the last of some levels, in float32 and x's memory format."""
    n, c, h, w = x.shape
    side = 2**levels
    channels_last = _channels_last(x)
    vector = 1 if channels_last else min(side, _vector(x, 1))
    variant = Variant(
        "low", _DTYPES[x.dtype], 1, levels, channels_last=channels_last, vector=vector
    )
    y = torch.empty(
        (n, c, _ceil_div(h, side), _ceil_div(w, side)),
        dtype=torch.float32,
        device=x.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    launch(variant, _ceil_div(y.numel(), variant.threads), [x, y, n, c, h, w])
    return y


def _weight_grad(
    x: Tensor,
    dy: Tensor,
    kernel_size: int,
    levels: int,
    resident: int | None,
    base: bool = True,
) -> list[Tensor]:
    """The gradients of the taps, of x and dy that are dense in the same memory format."""
    device = device_of(x.device)
    variant = planned("weights", x, kernel_size, levels, device, base, resident)
    variant = variant._replace(vector=min(variant.vector, _vector(dy, kernel_size)))
    sums = launch_weights(variant, x, dy, programs(variant, x.shape, device))
    deeper = []
    if variant.levels < levels:
        low, dlow = (low_band(image, variant.levels) for image in (x, dy))
        rest = levels - variant.levels
        deeper = _weight_grad(low, dlow, kernel_size, rest, resident, base=False)
    bands = [1] * base + [4] * variant.levels
    parts = sums[:, not base :].split(bands, 1)
    shape = -1, 1, kernel_size, kernel_size
    # Of one channel parts are views of one array, which operators may not return.
    copies = [part.clone(memory_format=torch.contiguous_format) for part in parts]
    return [copy.view(shape) for copy in copies] + deeper


def launch_weights(variant: Variant, x: Tensor, dy: Tensor, programs: int) -> Tensor:
    """Launches the kernel `wtconv_weights`; returns its sums `[C, 1 + 4 * levels, k * k]`."""
    n, c, h, w = x.shape
    channels = _ceil_div(c, variant.planes) if variant.channels_last else c
    shape = (programs, c, 1 + 4 * variant.levels, variant.kernel_size**2)
    sums = x.new_empty(shape, dtype=torch.float32)
    launch(variant, channels * programs, [x, dy, sums, n, c, h, w, programs])
    return sums.sum(0)


@cache
def programs(variant: Variant, shape: tuple[int, ...], device: Device) -> int:
    """The number of blocks that share the sums of a channel, so that the last ends earliest."""
    n, c, h, w = shape
    channels = _ceil_div(c, variant.planes) if variant.channels_last else c
    iterations = _ceil_div(h, variant.height) * _ceil_div(w, variant.width)
    iterations *= n if variant.channels_last else _ceil_div(n, variant.planes)
    at_once = variant.blocks * device.multiprocessors
    # Channels-last a block stores the sums of several channels.
    waves = 2 if variant.channels_last else 4
    most = max(1, min(iterations, waves * at_once // channels))

    def time(programs: int) -> tuple[int, int]:
        return _ceil_div(channels * programs, at_once) * _ceil_div(iterations, programs), -programs

    return min(range(1, most + 1), key=time)


def _groups(variant: Variant, x: Tensor) -> int:
    """Groups of planes that blocks treat."""
    n, c, *_ = x.shape
    if variant.channels_last:
        return n * _ceil_div(c, variant.planes)
    return c * _ceil_div(n, variant.planes)


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous()


def _dense(x: Tensor) -> Tensor:
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _vector(x: Tensor, kernel_size: int) -> int:
    """The number of adjacent values that a thread can load at once, by alignment and width."""
    address = 0 if x.is_meta else x.data_ptr() // x.element_size()
    if _channels_last(x):
        return math.gcd(4, x.shape[1], address)
    return math.gcd(2 if kernel_size // 2 % 2 else 4, x.shape[3], address)


def launch(variant: Variant, blocks: int, arguments: Sequence[Tensor | int | None]) -> None:
    """Launches a kernel on the current stream of the device of its tensors."""
    from cuda.bindings import driver

    device = cast(Tensor, arguments[0]).device
    kernel, shared = _kernel(variant, device.index)
    values: list[int] = []
    types: list[type] = []
    for argument in arguments:
        if isinstance(argument, int):
            values.append(argument)
            types.append(ctypes.c_int)
        else:
            values.append(0 if argument is None else argument.data_ptr())
            types.append(ctypes.c_void_p)
    stream = driver.CUstream(torch.cuda.current_stream(device).cuda_stream)
    grid, block = (blocks, 1, 1), (variant.threads, 1, 1)
    packed = (tuple(values), tuple(types))
    # A thread of PyTorch's backward pass has no context before the first call that needs one.
    _checked(driver.cuCtxPushCurrent(_context(device.index)))
    try:
        _checked(driver.cuLaunchKernel(kernel, *grid, *block, shared, stream, packed, 0))
    finally:
        _checked(driver.cuCtxPopCurrent())


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
    return Device(found.shared_memory_per_block_optin, found.multi_processor_count)


@cache
@compiling("a CUDA kernel")
def _kernel(variant: Variant, device: int) -> tuple[Any, int]:
    """A compiled kernel on one device, and the bytes of shared memory of its blocks."""
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    code = compiled(SOURCE.read_text(), variant.macros(), f"sm_{major}{minor}")
    library = _checked(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
    name = f"wtconv_{variant.kernel}".encode()
    kernel = _checked(driver.cuLibraryGetKernel(library, name))
    attributes = driver.CUfunction_attribute
    for attribute, value in (
        (attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, variant.shared()),
        (attributes.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),
    ):
        _checked(driver.cuKernelSetAttribute(attribute, value, kernel, driver.CUdevice(device)))
    # A kernel is launched as a function is.
    return driver.CUfunction(int(kernel)), variant.shared()


def _checked(answer: tuple[Any, ...]) -> Any:
    """The result of a call of the driver, whose error is raised."""
    status, *values = answer
    if int(status):
        raise RuntimeError(f"the CUDA driver reports {status.name}")
    return values[0] if values else None


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _ceil_div(size: int, block: int) -> int:
    return -(-size // block)
