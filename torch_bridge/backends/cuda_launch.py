"""The wavelet convolution on NVIDIA GPUs by `wtconv.cu`: which variants, and their launches."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("wtconv.cu")

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MAX_KERNEL = 9
_MAX_LEVELS = 5


class Variant(NamedTuple):
    """What one kernel is compiled for; see the macros of `wtconv.cu`."""

    kernel: str
    dtype: int
    kernel_size: int
    levels: int
    height: int = 0
    width: int = 0
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


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


class Plan(NamedTuple):
    """What is launched for one shape: all at once, or split at a level."""

    fine: Variant
    low: Variant | None = None
    deep: "Plan | None" = None


Launch = Any


def forward_with(
    launch: Launch,
    x: Tensor,
    taps: Sequence[Tensor],
    bias: Tensor | None,
    below: Tensor | None,
    variant: Variant,
    transpose: bool,
) -> Tensor:
    n, c, h, w = x.shape
    y = torch.empty_like(x)
    levels = [*taps, *[None] * (6 - len(taps))]
    launch(
        variant,
        grid(variant, x),
        [x, below, *levels, bias, y, n, c, h, w, int(transpose)],
    )
    return y


def grid(variant: Variant, x: Tensor) -> int:
    n, c, h, w = x.shape
    tiles = _blocks(h, variant.height) * _blocks(w, variant.width)
    if variant.channels_last:
        return tiles * n * _blocks(c, variant.planes)
    return tiles * c * _blocks(n, variant.planes)


def low_with(launch: Launch, x: Tensor, variant: Variant) -> Tensor:
    n, c, h, w = x.shape
    side = 2**variant.levels
    y = torch.empty(
        (n, c, _blocks(h, side), _blocks(w, side)),
        dtype=torch.float32,
        device=x.device,
        memory_format=torch.channels_last if variant.channels_last else torch.contiguous_format,
    )
    launch(variant, _blocks(y.numel(), variant.threads), [x, y, n, c, h, w])
    return y


def weights_with(launch: Launch, x: Tensor, dy: Tensor, variant: Variant, programs: int) -> Tensor:
    n, c, h, w = x.shape
    k = variant.kernel_size
    sums = x.new_empty((programs, c, 1 + 4 * variant.levels, k * k), dtype=torch.float32)
    groups = _blocks(c, variant.planes) if variant.channels_last else c
    launch(variant, groups * programs, [x, dy, sums, n, c, h, w, programs])
    return sums.sum(0)


@cache
def _kernel(variant: Variant, device: int) -> Any:
    """A compiled kernel on one device."""
    from cuda.bindings import driver

    from torch_bridge.backends import nvrtc

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
    return driver.CUfunction(int(kernel))


def _checked(answer: tuple[Any, ...]) -> Any:
    if int(answer[0]):
        raise RuntimeError(f"CUDA: {answer[0].name}")
    return answer[1] if len(answer) > 1 else None


def launch_on_gpu(variant: Variant, blocks: int, arguments: Sequence[Any]) -> None:
    """One kernel on the current stream of the device of its tensors."""
    import ctypes

    from cuda.bindings import driver

    device = next(a.device for a in arguments if isinstance(a, Tensor))
    kernel = _kernel(variant, device.index)
    values, types = [], []
    for argument in arguments:
        if argument is None or isinstance(argument, Tensor):
            values.append(0 if argument is None else argument.data_ptr())
            types.append(ctypes.c_void_p)
        else:
            values.append(argument)
            types.append(ctypes.c_int)
    stream = driver.CUstream(torch.cuda.current_stream(device).cuda_stream)
    _checked(
        driver.cuLaunchKernel(
            kernel,
            *(blocks, 1, 1, variant.threads, 1, 1),
            variant.shared() if variant.kernel != "low" else 0,
            stream,
            (tuple(values), tuple(types)),
            0,
        )
    )
