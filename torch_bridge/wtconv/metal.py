"""The wavelet convolution and Haar cascades on Apple GPUs, by `wtconv.metal`.

`torch.mps.compile_shader` compiles the source when it is first used, for each size of kernel.
Images are read and written with whatever strides they have. Those in bfloat16 need Metal 3.1, which
PyTorch compiles on macOS 14 and newer.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pallas_kernels.common.refusals import compiling, refuse
from pallas_kernels.wtconv.problem import Problem
from torch_bridge.runtime.calls import dtype_name

DIFFERENTIABLE = False

# Swift's package manager bundles what lies inside a package alone.
_SWIFT = Path(__file__).parents[1] / "coreml" / "swift"
SOURCE = _SWIFT / "Sources" / "WTConvCore" / "Resources" / "wtconv.metal"

_DTYPES = ("float32", "bfloat16", "float16")
_MAX_KERNEL = 9
_MAX_LEVELS = 5
_MAX_PLANE = 2**31
"""The limit of offsets within a plane, which are 32-bit numbers."""
_SQUARE = 16
"""Threads along a side of a threadgroup of the cascades."""
_ROWS = 2
_SUMMING = 256
_SUMS = 512
"""Threadgroups that share the sums of a weight gradient."""


def unavailable(platform: str) -> str | None:
    """The reason why these kernels cannot run: they need an Apple GPU, and PyTorch's compiler."""
    if platform != "mps":
        return f"needs an Apple GPU, this is {platform}"
    if not hasattr(torch.mps, "compile_shader"):
        return f"needs torch.mps.compile_shader, PyTorch {torch.__version__} has none"
    return None


def has_bfloat16() -> bool:
    """Whether PyTorch's compiler has the type here: it compiles Metal 3.1 from macOS 14 on."""
    mps = torch.backends.mps
    return mps.is_available() and mps.is_macos_or_newer(14, 0)


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` for a problem that these kernels do not compute.

    Args:
        direction: "fwd" or "bwd".
        problem: `pallas_kernels.wtconv.problem.Problem`, its shape channels-last.
    """
    reasons = problem.unsupported(_DTYPES, _MAX_KERNEL, range(1, _MAX_LEVELS + 1))
    if problem.dtype == "bfloat16" and not has_bfloat16():
        reasons.append("bfloat16, which needs Metal 3.1: macOS 14 or newer")
    if not reasons:
        _, *image = problem.shape
        if image[0] * image[1] * image[2] >= _MAX_PLANE:
            reasons.append(f"images of {image}, which are too large")
    refuse(reasons)


def forward(
    x: Tensor, taps: Sequence[Tensor], bias: Tensor | None, *, wavelet: str, transpose: bool
) -> Tensor:
    """The operator on `x [N, C, H, W]`, or its transpose; see `ops` for the arguments.

    y has the strides of `torch.empty_like(x)`: nothing is copied into another layout.
    """
    kernel_size = taps[0].shape[-1]
    before = kernel_size // 2 if transpose else (kernel_size - 1) // 2
    base, *levels = ((tap.flip((2, 3)) if transpose else tap).contiguous() for tap in taps)
    bias = None if bias is None else bias.contiguous()
    below = None
    for level, low in reversed(list(enumerate(_low_bands(x, len(levels))))):
        n, c, h, w = low.shape
        tile = _tile(h, w)
        y = _near(torch.empty_like(low))
        sizes = [c, h, w, before, int(below is not None), int(bias is not None)]
        _kernel(low, "level" if level else "first_level", kernel_size, tile)(
            # Another tensor stands for one that is not there, and is not read.
            *(low, base if below is None else below, levels[level], base),
            *(base if bias is None else bias, y, [*sizes, *low.stride(), *y.stride()]),
            threads=[
                _round_up(_ceil_div(w, 2), tile),
                _round_up(_ceil_div(h, 2), tile) // _ROWS,
                n * c,
            ],
            group_size=[tile, tile // _ROWS, 1],
        )
        below = y
    return y


def weight_grad(
    x: Tensor, dy: Tensor, *, kernel_size: int, levels: int, wavelet: str
) -> list[Tensor]:
    """Gradients of the taps; see `ops` for the arguments.

    Every sum runs in a fixed order, so they are bitwise reproducible.
    """
    taps = kernel_size, kernel_size
    found: list[Tensor] = []
    for low, dlow in zip(_low_bands(x, levels), _low_bands(dy, levels), strict=True):
        n, c, h, w = low.shape
        tile = _tile(h, w)
        slices = _slices(kernel_size, tile)
        programs = min(n * _ceil_div(h, 2 * tile) * _ceil_div(w, 2 * tile), max(1, _SUMS // c))
        sums = low.new_empty(programs, slices, c, 4, *taps, dtype=torch.float32)
        name, base = "weights", sums
        if not found:
            name, base = "first_weights", sums.new_empty(programs, 4 * slices, c, *taps)
            found.append(base)
        _kernel(low, name, kernel_size, tile)(
            *(low, dlow, sums, base, [n, c, h, w, programs, *low.stride(), *dlow.stride()]),
            threads=[_SUMMING * programs, c, 1],
            group_size=[_SUMMING, 1, 1],
        )
        found.append(sums)
    return [sums.sum((0, 1)).reshape(-1, 1, *taps) for sums in found]


def wavedec2(x: Tensor, level: int = 1) -> list[Tensor]:
    """Haar analysis cascade, as `pywt.wavedec2` with `mode="zero"`.

    It can be differentiated in reverse mode, any number of times.

    Args:
        x: Images `[N, C, H, W]` on an Apple GPU, float32, bfloat16 or float16.
        level: Number of levels, 1 to 5.

    Returns:
        The low band `[N, C, h, w]` of the last level, then from coarse to fine the details
        `[N, C, 3, h, w]` of each: high along H, along W, along both. All in x's dtype.

    Raises:
        ValueError: x has another rank or is empty.
        NotImplementedError: These kernels do not take x or the level; says why.

    Example:
        On an Apple GPU, `low, details_2, details_1 = wavedec2(x, 2)` of x `[1, 2, 7, 9]` gives
        `[1, 2, 2, 3]`, `[1, 2, 3, 2, 3]` and `[1, 2, 3, 4, 5]`.
    """
    _check_images("x", x, x.shape[2:], level)
    low, *details = _Analysis.apply(x, level)
    return [low, *reversed(details)]


def waverec2(coeffs: Sequence[Tensor], *, shape: Sequence[int] | None = None) -> Tensor:
    """Haar synthesis cascade: the inverse of `wavedec2`, and differentiable as it.

    Args:
        coeffs: Coefficients of 1 to 5 levels, as `wavedec2` returns them.
        shape: Shape `(H, W)` of the images, to undo the padding of odd ones; None returns even
            sizes, as PyWavelets does.

    Returns:
        Images `[N, C, H, W]` in the coefficients' dtype.

    Raises:
        ValueError: Coefficients of different levels do not fit together, or to `shape`.
        NotImplementedError: These kernels do not take the coefficients; says why.

    Example:
        On an Apple GPU, `waverec2(wavedec2(x, 2), shape=(7, 9))` of x `[1, 2, 7, 9]` is x.
    """
    low, *details = coeffs
    if not details:
        raise ValueError("coeffs has one array, expected a low band and details of 1 to 5 levels")
    size = tuple(shape or (2 * n for n in details[-1].shape[-2:]))
    _check_images("coeffs[0]", low, size, len(details))
    bands = size
    for i, high in reversed(list(enumerate(details, 1))):
        bands = tuple(_ceil_div(n, 2) for n in bands)
        expected = (*low.shape[:2], 3, *bands)
        if high.shape != expected or high.dtype != low.dtype:
            raise ValueError(
                f"coeffs[{i}] is {tuple(high.shape)} {high.dtype}, expected {expected} "
                f"{low.dtype} for images of {size}"
            )
    if low.shape[2:] != bands:
        raise ValueError(
            f"coeffs[0] has shape {tuple(low.shape)}, expected {(*low.shape[:2], *bands)} for "
            f"{len(details)} levels of images of {size}"
        )
    return _Synthesis.apply(size, low, *reversed(details))


class _Analysis(torch.autograd.Function):
    """The differentiable analysis: the low band and the details, finest first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, level: int) -> tuple[Tensor, ...]:
        ctx.size = tuple(x.shape[2:])
        x = _near(x)
        n, c, h, w = x.shape
        details = []
        for _ in range(level):
            h, w = _ceil_div(h, 2), _ceil_div(w, 2)
            details.append(x.new_empty(n, c, 3, h, w))
        low = x.new_empty(n, c, h, w)
        _cascade("analysis", x, details, low)
        return low, *details

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _Synthesis.apply(ctx.size, *gradients), None


class _Synthesis(torch.autograd.Function):
    """The differentiable synthesis, which is the transpose of the analysis and inverts it."""

    @staticmethod
    def forward(ctx: Any, size: tuple[int, ...], low: Tensor, *details: Tensor) -> Tensor:
        ctx.levels = len(details)
        y = low.new_empty(*low.shape[:2], *size)
        _cascade("synthesis", y, [band.contiguous() for band in details], low.contiguous())
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_Analysis.apply(gradients[0], ctx.levels)


def _check_images(name: str, x: Tensor, size: Sequence[int], levels: int) -> None:
    """Raises for images that the cascades do not take: those that the convolutions do not take."""
    from pallas_kernels.wtconv.problem import Problem

    if x.ndim != 4 or x.numel() == 0:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, expected (N, C, H, W), none of them 0"
        )
    reason = unavailable(x.device.type)
    if reason is not None:
        raise NotImplementedError(reason)
    shape = (x.shape[0], *size, x.shape[1])
    check("fwd", Problem(shape, dtype_name(x.dtype), 1, levels, "haar"))


def _low_bands(x: Tensor, levels: int) -> list[Tensor]:
    """The inputs of the levels: x, and the low bands of all levels but the last, in float32."""
    x = _near(x)
    n, c, h, w = x.shape
    lows = []
    for _ in range(levels - 1):
        h, w = _ceil_div(h, 2), _ceil_div(w, 2)
        lows.append(x.new_empty(n, c, h, w, dtype=torch.float32))
    if lows:
        _cascade("low_bands", x, lows, lows[-1])
    return [x, *lows]


def _cascade(name: str, image: Tensor, levels: Sequence[Tensor], low: Tensor) -> None:
    """Runs a cascade on an image, its bands of each level, and the last low band."""
    n, c, h, w = image.shape
    # Kernels take as many as can be, and do not touch the rest.
    rest = [low] * (_MAX_LEVELS - len(levels))
    _kernel(image, name)(
        *(image, *levels, *rest, low),
        [c, h, w, len(levels), *image.stride()],
        threads=[_round_up(_ceil_div(w, 2), _SQUARE), _round_up(_ceil_div(h, 2), _SQUARE), n * c],
        group_size=[_SQUARE, _SQUARE, 1],
    )


def _kernel(image: Tensor, name: str, kernel_size: int | None = None, tile: int = 0) -> Any:
    """The kernel for images of a dtype, of the cascades or of a level."""
    return getattr(library(kernel_size, tile), f"{name}_{dtype_name(image.dtype)}")


@cache
@compiling("a Metal kernel")
def library(kernel_size: int | None, tile: int) -> Any:
    """The compiled source: the cascades for None, else the convolutions of one size of kernel."""
    source = SOURCE.read_text(encoding="utf-8")
    if kernel_size is not None:
        values = {
            "KERNEL_SIZE": kernel_size,
            "TILE": tile,
            "ROWS": _ROWS,
            "SLICES": _slices(kernel_size, tile),
        }
        defines = [f"#define {name} {value}\n" for name, value in values.items()]
        source = "".join(defines) + source
    return torch.mps.compile_shader(source)


def _tile(height: int, width: int) -> int:
    """Side of a threadgroup's square, in coefficients: small images do not fill a large one."""
    return 8 if max(height, width) <= 16 else 16


def _slices(kernel_size: int, tile: int) -> int:
    """Threads for each row of taps of each of four bands, of `_SUMMING` in all."""
    return min(tile, _SUMMING // (4 * kernel_size))


def _near(x: Tensor) -> Tensor:
    """x, or a copy of it where pixels of a plane are too far apart."""
    _, _, h, w = x.shape
    span = (h - 1) * x.stride(2) + (w - 1) * x.stride(3)
    return x if span < _MAX_PLANE else x.contiguous()


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _round_up(a: int, b: int) -> int:
    return _ceil_div(a, b) * b
