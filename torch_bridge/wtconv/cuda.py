"""The wavelet convolution on NVIDIA GPUs: the kernels that JAX launches too, by the driver.

Channels-last images of 16 bits run on tensor cores where kernels are of 3, 5 or 7, a level as one
convolution of folded taps; in float32 kernels of 3 and 5 go level by level. Signals, of one axis,
have a kernel of their own, in all dtypes.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from pallas_kernels.common.cuda import Device
from pallas_kernels.wtconv import (
    bands_launches,
    cuda_launches,
    folded_launches,
    folding,
    line_launches,
    scaled_launches,
)
from pallas_kernels.wtconv.cuda_launches import Images
from pallas_kernels.wtconv.gradients_launches import Parameters
from pallas_kernels.wtconv.line_launches import Signals
from pallas_kernels.wtconv.problem import Problem
from torch_bridge.runtime.calls import dtype_name
from torch_bridge.runtime.cuda import device_of, launch, unavailable

__all__ = [
    "DIFFERENTIABLE",
    "check",
    "forward",
    "gradients",
    "multiplies",
    "search_space",
    "unavailable",
    "weight_grad",
]

DIFFERENTIABLE = False
_LINE = 3
"""Axes of signals `[N, C, L]`."""
_FIRST, _LAST = (3, 2, 1, 0), (1, 3, 2, 0)
"""Axes of images `[N, C, H, W]` of both memory formats, the nearest in memory first."""
_WORTH_LAUNCHES = 1 << 22
"""Elements of images from which on a launch a level took less than one of all levels."""


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` for a problem that these kernels do not compute.

    Args:
        direction: "fwd" or "bwd".
        problem: `pallas_kernels.wtconv.problem.Problem`, its shape channels-last.
    """
    launches = line_launches if len(problem.shape) == _LINE else cuda_launches
    launches.check(problem)


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The numbers of resident blocks of a multiprocessor that are worth timing; see `check`."""
    if len(problem.shape) == _LINE:
        return line_launches.search_space(problem.kernel_size)
    return cuda_launches.search_space()


def multiplies(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    kernel_size: int,
    device: torch.device,
) -> bool:
    """Whether these kernels multiply by the scales themselves: those of images, level by level.

    Args:
        shape: Of x, `[N, C, H, W]` or `[N, C, L]`.
        strides: Of x.
        dtype: Of x.
        kernel_size: k.
        device: Of x.
    """
    if len(shape) == _LINE:
        return False
    n, c, h, w = shape
    # `_images` of what has no data, as in a traced program.
    last = _are_dense(shape, strides, _LAST) and not _are_dense(shape, strides, _FIRST)
    asked = Images((n, h, w, c), dtype_name(dtype), last), kernel_size, device_of(device)
    return _by_levels(*asked) is not None


def forward(
    x: Tensor,
    taps: Sequence[Tensor],
    bias: Tensor | None,
    *,
    wavelet: str,
    transpose: bool,
    scales: Sequence[Tensor] = (),
    resident: int | None = None,
) -> Tensor:
    """The operator on `x [N, C, H, W]` or `[N, C, L]`, or its transpose; see `ops`.

    `wavelet` is Haar; for `resident` see `search_space`. Scales are where x `multiplies`.
    """
    if x.ndim == _LINE:
        return _line_forward(x, taps, bias, transpose, resident)
    x, kernel_size = _dense(x), taps[0].shape[-1]
    images, device = _images(x), device_of(x.device)
    by_levels = _by_levels(images, kernel_size, device)
    if by_levels is not None:
        parameters = _parameters(taps, bias, scales, x.dtype)
        y = by_levels.forward(x, parameters, images, kernel_size, device, transpose)
    else:
        taps = [tap.contiguous() for tap in taps]
        bias = None if bias is None else bias.contiguous()
        where = images, device, launch
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
    """Gradients of the taps, and of the bias but for images in one launch: see `ops`.

    Every sum runs in a fixed order, so they are bitwise reproducible.
    """
    if x.ndim == _LINE:
        return _line_weight_grad(x, dy, kernel_size, levels, resident)
    x = _dense(x)
    memory_format = torch.channels_last if _channels_last(x) else torch.contiguous_format
    dy = dy.contiguous(memory_format=memory_format)
    images, device = _images(x), device_of(x.device)
    by_levels = _by_levels(images, kernel_size, device)
    if by_levels is not None:
        found = by_levels.weight_grad(x, dy, images, kernel_size, levels, device)
        return _with_bias(found, kernel_size)
    images = images._replace(aligned=min(images.aligned, _images(dy).aligned))
    sizes = images, kernel_size, levels, device, launch
    first, *rest = cuda_launches.weight_grad(x, dy, *sizes, resident=resident)
    parts = [first[:, :1]]
    for sums in (first, *rest):
        parts += sums[:, 1:].split(4, 1)
    shape = -1, 1, kernel_size, kernel_size
    # Of one channel parts are views of one array, which operators may not return.
    copies = [part.clone(memory_format=torch.contiguous_format) for part in parts]
    return [copy.view(shape) for copy in copies]


def gradients(
    x: Tensor,
    dy: Tensor,
    taps: Sequence[Tensor],
    bias: Tensor | None,
    scales: Sequence[Tensor],
    *,
    wavelet: str,
    resident: int | None = None,
) -> list[Tensor]:
    """The gradients of kernels, scales and bias, in their dtypes, where x `multiplies`; see `ops`.

    Every sum runs in a fixed order, so they are bitwise reproducible.
    """
    images, parameters = _images(x), _parameters(taps, bias, scales, x.dtype)
    dy = dy.contiguous(memory_format=torch.channels_last)
    sizes = taps[0].shape[-1], len(taps) - 1, device_of(x.device)
    by_levels = _by_levels(images, taps[0].shape[-1], device_of(x.device))
    assert by_levels is not None
    found = by_levels.weight_grad(x, dy, images, *sizes, parameters)
    like = [*taps, *scales, *([] if bias is None else [bias])]
    # Without a bias the last is nobody's.
    pairs = zip(found, like, strict=False)
    return [gradient.view(own.shape).to(own.dtype) for gradient, own in pairs]


def _parameters(
    taps: Sequence[Tensor], bias: Tensor | None, scales: Sequence[Tensor], dtype: torch.dtype
) -> Parameters[Tensor]:
    """Parameters as launches take them: of images' dtype where all are, else in float32."""
    own = {each.dtype for each in (*taps, *scales, *([] if bias is None else [bias]))}
    read = dtype if own == {dtype} else torch.float32

    def one(each: Tensor) -> Tensor:
        return each.to(read).contiguous()

    offset = None if bias is None else one(bias)
    return Parameters([*map(one, taps)], [*map(one, scales)], offset, dtype_name(read))


def _line_forward(
    x: Tensor, taps: Sequence[Tensor], bias: Tensor | None, transpose: bool, resident: int | None
) -> Tensor:
    """The operator on signals, or its transpose: the same of flipped taps."""
    channels, kernel_size = x.shape[1], taps[0].shape[-1]
    whole = torch.cat([tap.reshape(channels, -1, kernel_size) for tap in taps], 1)
    whole = (whole.flip(-1) if transpose else whole).permute(2, 1, 0).contiguous()
    signals = _signals(x)
    bias = None if bias is None else bias.contiguous()
    where = signals, device_of(x.device), launch
    y = line_launches.forward(_row(x, signals), whole, bias, *where, resident=resident)
    return y.transpose(1, 2) if signals.channels_last else y


def _line_weight_grad(
    x: Tensor, dy: Tensor, kernel_size: int, levels: int, resident: int | None
) -> list[Tensor]:
    """The gradients of the taps and the bias of signals."""
    signals = _signals(x)
    where = signals, kernel_size, levels, device_of(x.device), launch
    sums = line_launches.weight_grad(_row(x, signals), _row(dy, signals), *where, resident=resident)
    whole = sums[:-1].reshape(kernel_size, 1 + 2 * levels, -1).permute(2, 1, 0)
    parts = whole.split([1] + [2] * levels, 1)
    # See `weight_grad`.
    copies = [part.clone(memory_format=torch.contiguous_format) for part in parts]
    return [*(copy.view(-1, 1, kernel_size) for copy in copies), sums[-1].clone()]


def _signals(x: Tensor) -> Signals:
    """The description of `[N, C, L]`, in the memory format that is nearer to its own."""
    n, channels, length = x.shape
    return Signals((n, length, channels), dtype_name(x.dtype), x.stride(1) < x.stride(2))


def _row(x: Tensor, signals: Signals) -> Tensor:
    """Signals contiguous in a memory format, at an address that copies of 16 bytes can have."""
    x = (x.transpose(1, 2) if signals.channels_last else x).contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def _folds(images: Images, kernel_size: int, device: Device) -> bool:
    """Whether a call runs on tensor cores."""
    shape, dtype, channels_last, _ = images
    return channels_last and folded_launches.takes(shape, dtype, kernel_size, device)


def _streams(images: Images, kernel_size: int, device: Device) -> bool:
    """Whether a call goes level by level in float32."""
    shape, dtype, channels_last, _ = images
    large = channels_last and math.prod(shape) >= _WORTH_LAUNCHES
    return large and bands_launches.takes(shape, dtype, kernel_size, device)


class _ByLevels(NamedTuple):
    """The functions of kernels that go level by level, which multiply by the scales themselves."""

    forward: Callable[..., Tensor]
    weight_grad: Callable[..., list[Tensor]]


def _by_levels(images: Images, kernel_size: int, device: Device) -> _ByLevels | None:
    """The functions that a call runs level by level with; None of what goes in one launch."""
    if _folds(images, kernel_size, device):
        return _ByLevels(_folded_forward, _folded_weight_grad)
    if _streams(images, kernel_size, device):
        return _ByLevels(_streamed_forward, _streamed_weight_grad)
    return None


def _streamed_forward(
    x: Tensor,
    parameters: Parameters[Tensor],
    images: Images,
    kernel_size: int,
    device: Device,
    transpose: bool,
) -> Tensor:
    """The operator in float32, or its transpose, level by level: `[N, H, W, C]`."""
    about = x.shape[1], kernel_size, launch
    taps, offset = scaled_launches.scaled(parameters, *about, channels_last=False)
    return bands_launches.forward(_pixels(x), taps, offset, images.shape, device, launch, transpose)


def _streamed_weight_grad(
    x: Tensor,
    dy: Tensor,
    images: Images,
    kernel_size: int,
    levels: int,
    device: Device,
    parameters: Parameters[Tensor] | None = None,
) -> list[Tensor]:
    """The gradients of the taps and the bias in float32, or those of the parameters."""
    about = images.shape, kernel_size, levels, device, launch
    return bands_launches.weight_grad(
        _pixels(x), _pixels(dy), *about, channels_last=False, parameters=parameters
    )


def _with_bias(found: list[Tensor], kernel_size: int) -> list[Tensor]:
    """Gradients of taps `[C, bands, k, k]` as weights of PyTorch's, and of the bias."""
    *parts, bias = found
    return [*(part.view(-1, 1, kernel_size, kernel_size) for part in parts), bias]


def _folded_forward(
    x: Tensor,
    parameters: Parameters[Tensor],
    images: Images,
    kernel_size: int,
    device: Device,
    transpose: bool,
) -> Tensor:
    """The operator in 16 bits, or its transpose: `[N, H, W, C]`."""
    about = x.shape[1], images.dtype, kernel_size, launch, transpose
    return folded_launches.forward(
        *(_pixels(x), folded_launches.folded(parameters, *about), images.shape, images.dtype),
        *(kernel_size, len(parameters.weights) - 1, device, launch),
    )


def _folded_weight_grad(
    x: Tensor,
    dy: Tensor,
    images: Images,
    kernel_size: int,
    levels: int,
    device: Device,
    parameters: Parameters[Tensor] | None = None,
) -> list[Tensor]:
    """The gradients of the taps and the bias in 16 bits, or those of the parameters."""
    return folded_launches.weight_grad(
        *(
            _pixels(x),
            _pixels(dy),
            _products(kernel_size, x.device),
            images.shape,
            images.dtype,
            kernel_size,
            levels,
        ),
        *(device, launch),
        channels_last=False,
        parameters=parameters,
    )


@cache
def _products(kernel_size: int, device: torch.device) -> Tensor:
    return torch.tensor(folding.products(kernel_size), device=device)


def _pixels(x: Tensor) -> Tensor:
    """Channels-last images as `[N, H, W, C]`, at an address that copies of 16 bytes can have."""
    if x.data_ptr() % 16:
        x = x.clone()
    return x.permute(0, 2, 3, 1)


def _images(x: Tensor) -> Images:
    """The description of a dense `[N, C, H, W]`."""
    n, c, h, w = x.shape
    aligned = 4 if x.is_meta else math.gcd(4, x.data_ptr() // x.element_size())
    return Images((n, h, w, c), dtype_name(x.dtype), _channels_last(x), aligned)


def _are_dense(shape: Sequence[int], strides: Sequence[int], order: Sequence[int]) -> bool:
    """Whether axes, the nearest in memory first, follow each other without gaps."""
    step = 1
    for axis in order:
        if shape[axis] > 1 and strides[axis] != step:
            return False
        step *= shape[axis]
    return True


def _channels_last(x: Tensor) -> bool:
    return not x.is_contiguous()


def _dense(x: Tensor) -> Tensor:
    if x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()
