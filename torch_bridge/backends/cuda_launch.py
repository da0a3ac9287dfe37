"""The wavelet convolution on NVIDIA GPUs by `wtconv.cu`, of which this picks and runs variants.

Where a plane fits into a block's shared memory, one kernel does all levels. Larger images are cut
into tiles, which read what their levels reach around them; of more than `_TILED_LEVELS` levels the
deeper ones are computed first, from the low band of the last of these, and added.
"""

import ctypes
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_bridge.backends import nvrtc

SOURCE = Path(__file__).with_name("wtconv.cu")

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MAX_KERNEL = 9
_MAX_LEVELS = 5
_TILED_LEVELS = 3
_TILE_H, _TILE_W = 64, 128
_SUMS = 2048
"""Blocks that share the sums of a weight gradient."""

Launch = Callable[["Variant", int, Sequence[Any]], None]
"""Runs a kernel: its variant, blocks, and arguments."""


def unavailable(platform: str) -> str | None:
    """Needs an NVIDIA GPU and cuda-core, which brings the compiler."""
    if platform != "cuda" or torch.version.hip:
        return f"needs an NVIDIA GPU, this is a {platform}"
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401
    except ImportError as error:
        return f"needs cuda-core (the extra 'cuda-bridge'): {error}"
    return None


def check(direction: str, problem: Any) -> None:
    """Raises `NotImplementedError` for what these kernels do not do.

    Args:
        direction: "fwd" or "bwd".
        problem: `pallas_kernels.wtconv.problem.Problem`, its shape channels-last.
    """
    reasons = problem.beyond(("float32", "bfloat16", "float16"), _MAX_KERNEL)
    if problem.kernel_size % 2 == 0:
        reasons.append(f"kernels of {problem.kernel_size}, odd ones alone")
    if not 1 <= problem.levels <= _MAX_LEVELS:
        reasons.append(f"{problem.levels} levels, 1 to {_MAX_LEVELS}")
    if reasons:
        raise NotImplementedError(f"does not take {'; '.join(reasons)}")


def forward(
    x: Tensor, taps: Sequence[Tensor], bias: Tensor | None, *, wavelet: str, transpose: bool
) -> Tensor:
    """The operator on `x [N, C, H, W]`, or its transpose; see `ops` for the arguments.

    `wavelet` is Haar.
    """
    shared = _shared_memory(x.device.index)
    taps = [tap.contiguous() for tap in taps]
    bias = None if bias is None else bias.contiguous()
    return forward_with(launch, shared, _dense(x), taps, bias, transpose)


def weight_grad(
    x: Tensor, dy: Tensor, *, kernel_size: int, levels: int, wavelet: str
) -> list[Tensor]:
    """Gradients of the taps; every sum runs in a fixed order, so they are bitwise reproducible."""
    shared = _shared_memory(x.device.index)
    x = _dense(x)
    memory_format = torch.channels_last if _channels_last(x) else torch.contiguous_format
    dy = dy.contiguous(memory_format=memory_format)
    return weight_grad_with(launch, shared, x, dy, kernel_size, levels)


class Variant(NamedTuple):
    """What one kernel is compiled for; see the macros of `wtconv.cu`."""

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
    vector: bool = False
    base: bool = True
    below: bool = False
    tiled: bool = False
    segment: int = 1
    base_segment: int = 1

    def macros(self) -> dict[str, object]:
        """The preprocessor's definitions."""
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
            "VECTOR": int(self.vector),
            "BASE": int(self.base),
            "BELOW": int(self.below),
            "SEGMENT": self.segment,
            "BASE_SEGMENT": self.base_segment,
            "PLANE": self.plane(),
            **{name: ",".join(map(str, values)) for name, values in lists.items()},
        }

    def _lists(self) -> dict[str, list[int]]:
        reach = self.kernel_size // 2
        window = _up(4 + 2 * reach, 4)
        lists: dict[str, list[int]] = {
            name: []
            for name in (
                *("TILE_ROWS", "TILE_COLUMNS", "HALO", "LEFT"),
                *("LOW_ROWS", "HIGH_ROWS", "STRIDE"),
            )
        }
        for level in range(1, self.levels + 1):
            rows, columns = _blocks(self.height, 2**level), _blocks(self.width, 2**level)
            # The levels below reach twice as far each; beyond a whole plane all is zero.
            halo = reach * 2 ** (self.levels - level) if self.tiled else reach
            left = reach + _up(halo - reach, 4)
            patches = _up(rows, self.rows) if level == 1 else rows
            across = _blocks(columns, 4)
            stride = _up(max(left - reach + 4 * across - 4 + window, left + columns + halo), 4)
            if level == 1:
                stride = self._spread(stride, across)
            values = (
                *(rows, columns, halo, left),
                *(halo + max(patches + reach, rows + halo), patches + 2 * reach, stride),
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
            most = _up(lists["TILE_ROWS"][0], self.rows)
            for level in range(2, self.levels + 1 + self.below):
                rows, columns = (lists[n][level - 2] for n in ("TILE_ROWS", "TILE_COLUMNS"))
                needed = _blocks(most, 2 ** (level - 2))
                size += max(_up(rows, 2), needed) * _up(columns, 8)
        # Threads beside each other treat different planes, and read from different banks.
        spread = {2: 4, 4: 2}.get(self.planes, self.planes % 8 or 1)
        return _up(size, 32) + 4 * spread if self.planes > 1 else _up(size, 4)

    def line(self) -> int:
        """Threads that load a row of a plane."""
        return self._lists()["STRIDE"][0] // (1 if self.kernel_size // 2 % 2 else 2)

    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        planes = self.planes * self.plane()
        if self.kernel == "low":
            return 0
        if self.kernel == "weights":
            return 4 * max(2 * planes, self.threads * self.kernel_size**2)
        taps = _up((1 + 4 * self.levels) * _up(self.kernel_size**2, 4), 32) + 4
        return 4 * (planes + (self.planes if self.channels_last else 1) * taps)

    def roles(self) -> int:
        """Threads that the sums of a weight gradient take."""
        lists = self._lists()
        count = 0
        for level, (rows, columns) in enumerate(
            zip(lists["TILE_ROWS"], lists["TILE_COLUMNS"], strict=True)
        ):
            across = _blocks(columns, 4) * self.planes
            if level == 0 and self.base:
                count = _up(across * _blocks(rows, self.base_segment), 32)
            count += 4 * across * _blocks(rows, self.segment)
        return _up(count, 32)


@cache
def _tile(
    kernel: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    kernel_size: int,
    levels: int,
    shared: int,
    **flags: bool,
) -> Variant:
    """The variant for one shape, as large as fits twice into `shared` bytes."""
    n, c, height, width = shape
    half = shared // 2 - 1024
    variant = Variant(
        *(kernel, _DTYPES[dtype], kernel_size, levels),
        height=_up(height, 2),
        width=_up(width, 8),
        segment=28,
        base_segment=7,
        **flags,
    )
    if variant.shared() > half:
        # Tiles of about even size, cut where squares of the deepest level begin.
        levels = min(levels, _TILED_LEVELS)
        side = 2**levels
        variant = variant._replace(tiled=True, levels=levels)
        tile_h, tile_w = _TILE_H, _TILE_W
        while True:
            variant = variant._replace(
                height=_up(_blocks(height, _blocks(height, tile_h)), side),
                width=_up(_blocks(width, _blocks(width, tile_w)), max(side, 8)),
            )
            if variant.shared() <= half:
                break
            tile_h, tile_w = (tile_h // 2, tile_w) if tile_h >= tile_w else (tile_h, tile_w // 2)
    rows, columns = variant.height // 2, _blocks(variant.width, 8)
    most = c if variant.channels_last else n
    for planes in (2, 4, 8, 16, 32):
        wider = variant._replace(planes=planes)
        enough = variant.planes * _blocks(rows, variant.rows) * columns >= 128
        if enough or planes >= 2 * most or wider.shared() > half:
            break
        variant = wider
    if kernel == "weights":
        return variant._replace(threads=variant.roles(), blocks=1)
    threads = _up(variant.planes * _blocks(rows, variant.rows) * columns, 32)
    line = (variant.planes if variant.channels_last else 1) * variant.line()
    turns = _blocks(threads, 256)
    return variant._replace(threads=max(_up(_blocks(threads, turns), 32), _up(line, 32)))


def forward_with(
    launch: Launch,
    shared: int,
    x: Tensor,
    taps: Sequence[Tensor | None],
    bias: Tensor | None,
    transpose: bool,
) -> Tensor:
    """`forward` by any `launch`, with `shared` bytes for a block; no base without `taps[0]`."""
    kernel_size, levels = taps[-1].shape[-1], len(taps) - 1
    flags = {
        "channels_last": _channels_last(x),
        "vector": _vector(x, kernel_size),
        "base": taps[0] is not None,
    }
    variant = _tile("forward", x.shape, x.dtype, kernel_size, levels, shared, **flags)
    below = None
    if variant.levels < levels:
        low = low_with(launch, x, variant.levels)
        deep = [None, *taps[variant.levels + 1 :]]
        below = forward_with(launch, shared, low, deep, None, transpose)
        variant = variant._replace(below=True)
    return launch_forward(launch, variant, x, taps[: variant.levels + 1], bias, below, transpose)


def launch_forward(
    launch: Launch,
    variant: Variant,
    x: Tensor,
    taps: Sequence[Tensor | None],
    bias: Tensor | None,
    below: Tensor | None,
    transpose: bool,
) -> Tensor:
    """One kernel of `wtconv_forward`."""
    n, c, h, w = x.shape
    y = torch.empty_like(x)
    levels = [*taps, *[None] * (_MAX_LEVELS + 1 - len(taps))]
    tiles = _blocks(h, variant.height) * _blocks(w, variant.width)
    blocks = tiles * _groups(variant, x)
    launch(variant, blocks, [x, below, *levels, bias, y, n, c, h, w, int(transpose)])
    return y


def low_with(launch: Launch, x: Tensor, levels: int) -> Tensor:
    """The low band of one level, in float32 and x's memory format."""
    n, c, h, w = x.shape
    side = 2**levels
    channels_last = _channels_last(x)
    vector = not channels_last and w % min(side, 4) == 0 and x.data_ptr() % 16 == 0
    variant = Variant(
        "low", _DTYPES[x.dtype], 1, levels, channels_last=channels_last, vector=vector
    )
    y = torch.empty(
        (n, c, _blocks(h, side), _blocks(w, side)),
        dtype=torch.float32,
        device=x.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    launch(variant, _blocks(y.numel(), variant.threads), [x, y, n, c, h, w])
    return y


def weight_grad_with(
    launch: Launch,
    shared: int,
    x: Tensor,
    dy: Tensor,
    kernel_size: int,
    levels: int,
    base: bool = True,
) -> list[Tensor]:
    """`weight_grad` by any `launch`, with `shared` bytes for a block."""
    flags = {
        "channels_last": _channels_last(x),
        "vector": _vector(x, kernel_size) and _vector(dy, kernel_size),
        "base": base,
    }
    variant = _tile("weights", x.shape, x.dtype, kernel_size, levels, shared, **flags)
    sums = launch_weights(launch, variant, x, dy)
    deep = []
    if variant.levels < levels:
        lows = (low_with(launch, image, variant.levels) for image in (x, dy))
        rest = levels - variant.levels
        deep = weight_grad_with(launch, shared, *lows, kernel_size, rest, base=False)
    bands = [1] * base + [4] * variant.levels
    parts = sums[:, not base :].split(bands, 1)
    return [part.reshape(-1, 1, kernel_size, kernel_size) for part in parts] + deep


def launch_weights(
    launch: Launch, variant: Variant, x: Tensor, dy: Tensor, programs: int | None = None
) -> Tensor:
    """One kernel of `wtconv_weights`: `[C, 1 + 4 * levels, k * k]`."""
    n, c, h, w = x.shape
    channels = _blocks(c, variant.planes) if variant.channels_last else c
    if programs is None:
        tiles = _blocks(h, variant.height) * _blocks(w, variant.width)
        programs = min(tiles * _groups(variant, x) // channels, max(1, _SUMS // channels))
    shape = (programs, c, 1 + 4 * variant.levels, variant.kernel_size**2)
    sums = x.new_empty(shape, dtype=torch.float32)
    launch(variant, channels * programs, [x, dy, sums, n, c, h, w, programs])
    return sums.sum(0)


def _groups(variant: Variant, x: Tensor) -> int:
    """Groups of planes that blocks treat."""
    n, c, *_ = x.shape
    if variant.channels_last:
        return n * _blocks(c, variant.planes)
    return c * _blocks(n, variant.planes)


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous()


def _dense(x: Tensor) -> Tensor:
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _vector(x: Tensor, kernel_size: int) -> bool:
    """Whether rows start at whole vectors of the pixels that a thread loads at once."""
    pixels = 2 if kernel_size // 2 % 2 else 4
    whole = x.shape[3] % pixels == 0 and x.data_ptr() % (pixels * x.element_size()) == 0
    return whole and not _channels_last(x)


def launch(variant: Variant, blocks: int, arguments: Sequence[Any]) -> None:
    """One kernel on the current stream of the device of its tensors."""
    from cuda.bindings import driver

    device = arguments[0].device
    kernel = _kernel(variant, device.index)
    values, types = [], []
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
    with torch.cuda.device(device):
        _checked(driver.cuLaunchKernel(kernel, *grid, *block, variant.shared(), stream, packed, 0))


@cache
def _shared_memory(device: int) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@cache
def _kernel(variant: Variant, device: int) -> Any:
    """A compiled kernel on one device."""
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(device)
    code = nvrtc.compiled(SOURCE.read_text(), variant.macros(), f"sm_{major}{minor}")
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
    return driver.CUfunction(int(kernel))


def _checked(answer: tuple[Any, ...]) -> Any:
    """What a call of the driver returned, or its error."""
    status, *values = answer
    if int(status):
        raise RuntimeError(f"the CUDA driver reports {status.name}")
    return values[0] if values else None


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _blocks(size: int, block: int) -> int:
    return -(-size // block)
