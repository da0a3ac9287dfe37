"""WTConv in plain PyTorch, computed as the published layer computes it.

Channels-first arrays `[N, C, *spatial]`, grouped convolutions with frozen wavelet filters for the
analysis, transposed ones for the synthesis. It runs on every device PyTorch knows and for every
wavelet. `wtconv` is the baseline that the benchmarks compare with, so it is neither faster nor
slower than its source, and what layers call where nothing else computes either direction: plain
operations, which every transformation of PyTorch takes. `forward` and `weight_grad` are the same
for the custom operators, beside another implementation of the other direction.

Source: Finder, Amoyal, Treister, Freifeld, "Wavelet Convolutions for Large Receptive Fields",
ECCV 2024.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from types import EllipsisType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad

from pallas_kernels.haar.filters import filter_bank
from pallas_kernels.wtconv.problem import Problem

DIFFERENTIABLE = False

Branch = Callable[[Tensor], Tensor]
"""The scaled convolution of the signal, or of a level's coefficients `[N, C * 2**d, *half]`."""

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_LOW = (torch.bfloat16, torch.float16)
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_CONV_WEIGHT = {1: grad.conv1d_weight, 2: grad.conv2d_weight, 3: grad.conv3d_weight}


def unavailable(platform: str) -> str | None:
    """None, since plain PyTorch runs everywhere."""
    return None


def check(direction: str, problem: Problem) -> None:
    """Plain PyTorch takes every problem."""


def wavelet_filters(
    wavelet: str,
    ndim: int,
    channels: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The frozen analysis and synthesis filters of the published layer.

    Args:
        wavelet: Name of a discrete PyWavelets wavelet, such as "db1" (Haar) or "sym4".
        ndim: Number of spatial axes, 1 to 3.
        channels: Number of channels C.
        device: The device of the filters.
        dtype: Their dtype, the default dtype of PyTorch if None. The taps are rounded to float32
            before they are multiplied, as published (0.49999997 for Haar), or stay float64.

    Returns:
        Two tensors `[2**ndim * C, 1, F, ...]`: channel `2**ndim * c + s` is the filter of subband
        s of channel c, where bit a of s is 1 for the high band along spatial axis a.

    Raises:
        ValueError: PyWavelets knows no discrete wavelet of that name.

    Example:
        >>> analysis, synthesis = wavelet_filters("db2", 2, 8)
        >>> analysis.shape
        torch.Size([32, 1, 4, 4])
    """
    dtype = dtype or torch.get_default_dtype()
    work = np.float64 if dtype == torch.float64 else np.float32
    analysis, synthesis = (
        torch.from_numpy(_products(pair.astype(work), ndim))
        .to(device, dtype)[:, None]
        .repeat(channels, *(1,) * (ndim + 1))
        for pair in filter_bank(wavelet)
    )
    return analysis, synthesis


def _products(pair: np.ndarray, ndim: int) -> np.ndarray:
    """All `2**ndim` outer products of the low and the high filter `[2, F]`."""
    return np.stack(
        [reduce(np.multiply.outer, [pair[s >> a & 1] for a in range(ndim)]) for s in range(2**ndim)]
    )


def wavelet_transform(x: Tensor, filters: Tensor) -> Tensor:
    """One level of analysis: `[N, C, *spatial]` of even sizes to `[N, C, 2**d, *spatial / 2]`."""
    ndim = x.ndim - 2
    coefficients = _CONV[ndim](
        x, filters, stride=2, padding=_filter_padding(filters), groups=x.shape[1]
    )
    # Unflattened, not reshaped: of an empty batch no size can be inferred.
    return coefficients.unflatten(1, (x.shape[1], 2**ndim))


def inverse_wavelet_transform(coefficients: Tensor, filters: Tensor) -> Tensor:
    """One level of synthesis: `[N, C, 2**d, *half]` to `[N, C, *(2 * half)]`."""
    channels = coefficients.shape[1]
    return _CONV_TRANSPOSE[coefficients.ndim - 3](
        coefficients.flatten(1, 2),
        filters,
        stride=2,
        padding=_filter_padding(filters),
        groups=channels,
    )


def _filter_padding(filters: Tensor) -> tuple[int, ...]:
    return tuple(size // 2 - 1 for size in filters.shape[2:])


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, transpose: bool = False
) -> Tensor:
    """Depthwise convolution `[N, C, *spatial]` with `[C, 1, *k]`, zero-padded to the same size.

    Or its transpose, which flips the taps and, for even sizes, what is padded before and after.
    """
    kernel = weight.shape[2:]
    padding: str | int = "same"
    if any(k % 2 == 0 for k in kernel):
        # "same" does the same, but warns of the copy that even sizes cost.
        x, padding = F.pad(x, _padding(kernel, transpose)), 0
    if transpose:
        weight = weight.flip(tuple(range(2, weight.ndim)))
    convolve = partial(_CONV[len(kernel)], padding=padding, groups=x.shape[1])
    if x.ndim == 5 and x.device.type == "cpu" and x.dtype in _LOW:
        # In 16 bits oneDNN's gradients of volumes with channels last read memory that nobody wrote
        # (PyTorch 2.13), and sizes of 1 count as channels last.
        y = convolve(x.clone(memory_format=torch.contiguous_format), weight, bias)
        last = x.is_contiguous(memory_format=torch.channels_last_3d)
        return y.contiguous(memory_format=torch.channels_last_3d) if last else y
    return convolve(x, weight, bias)


def _padding(kernel: Sequence[int], transpose: bool = False) -> list[int]:
    """The padding of a depthwise convolution as `F.pad` takes it."""
    pads = [((k - 1) // 2, k // 2) for k in reversed(kernel)]
    return [p for pair in pads for p in (pair[::-1] if transpose else pair)]


def wtconv(
    x: Tensor, base: Branch, levels: Sequence[Branch], wt_filter: Tensor, iwt_filter: Tensor
) -> Tensor:
    """Wavelet convolution of 1-D, 2-D or 3-D signals.

    Args:
        x: Signal `[N, C, *spatial]`.
        base: Computes the part of the signal itself.
        levels: Compute those of the coefficients, finest first.
        wt_filter: Analysis filters of `wavelet_filters`, in x's dtype.
        iwt_filter: Synthesis filters of `wavelet_filters`.

    Returns:
        `[N, C, *spatial]`.

    Example:
        >>> x = torch.ones(1, 3, 4, 4)
        >>> y = wtconv(x, torch.neg, [lambda bands: 3 * bands], *wavelet_filters("db1", 2, 3))
        >>> round(float(y.mean()), 5)
        2.0
    """
    coefficients, sizes = _cascade(x, len(levels), wt_filter)
    filtered = [level(bands) for level, bands in zip(levels, coefficients, strict=True)]
    return base(x) + _synthesis(filtered, sizes, iwt_filter)


def forward(
    x: Tensor, taps: Sequence[Tensor], bias: Tensor | None, *, wavelet: str, transpose: bool
) -> Tensor:
    """The operator on `x [N, C, *spatial]`, or its transpose; see `ops` for the arguments."""
    wide = x.to(taps[0].dtype)
    filters = wavelet_filters(wavelet, x.ndim - 2, x.shape[1], device=x.device, dtype=wide.dtype)
    analysis, synthesis = filters[::-1] if transpose else filters
    coefficients, sizes = _cascade(wide, len(taps) - 1, analysis)
    levels = [
        depthwise(bands, tap, transpose=transpose)
        for bands, tap in zip(coefficients, taps[1:], strict=True)
    ]
    y = depthwise(wide, taps[0], bias, transpose=transpose) + _synthesis(levels, sizes, synthesis)
    return y.to(x.dtype)


def weight_grad(
    x: Tensor, dy: Tensor, *, kernel_size: int, levels: int, wavelet: str
) -> list[Tensor]:
    """Gradients of the taps; see `ops` for the arguments."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    x, dy = x.to(dtype), dy.to(dtype)
    kernel = (kernel_size,) * (x.ndim - 2)
    filters = wavelet_filters(wavelet, x.ndim - 2, x.shape[1], device=x.device, dtype=dtype)
    # Synthesis is the transpose of an analysis with its filters.
    of_x, of_dy = (
        [signal, *_cascade(signal, levels, bank)[0]]
        for signal, bank in zip((x, dy), filters, strict=True)
    )
    return [
        _CONV_WEIGHT[len(kernel)](
            F.pad(bands, _padding(kernel)),
            (bands.shape[1], 1, *kernel),
            others,
            groups=bands.shape[1],
        )
        for bands, others in zip(of_x, of_dy, strict=True)
    ]


def _cascade(x: Tensor, levels: int, filters: Tensor) -> tuple[list[Tensor], list[torch.Size]]:
    """Bands `[N, C * 2**d, *half]` of each level, and the size of what each level analysed."""
    found, sizes = [], []
    low = x
    for _ in range(levels):
        size = low.shape[2:]
        sizes.append(size)
        if any(n % 2 for n in size):
            low = F.pad(low, [p for n in reversed(size) for p in (0, n % 2)])
        coefficients = wavelet_transform(low, filters)
        low = coefficients[:, :, 0]
        found.append(coefficients.flatten(1, 2))
    return found, sizes


def _synthesis(
    levels: Sequence[Tensor], sizes: Sequence[torch.Size], filters: Tensor
) -> Tensor | int:
    """The inverse cascade of filtered bands `[N, C * 2**d, *half]`; 0 if there are none."""
    deeper: Tensor | int = 0
    for filtered, size in zip(reversed(levels), reversed(sizes), strict=True):
        ndim = len(size)
        bands = filtered.unflatten(1, (-1, 2**ndim))
        bands = torch.cat([(bands[:, :, 0] + deeper).unsqueeze(2), bands[:, :, 1:]], dim=2)
        kept: tuple[EllipsisType | slice, ...] = (..., *map(slice, size))
        deeper = inverse_wavelet_transform(bands, filters)[kept]
    return deeper


def subsample(y: Tensor, stride: int) -> Tensor:
    """The published layers' strides of `[N, C, *spatial]`: means in 1-D, subsampling otherwise."""
    if stride == 1:
        return y
    if y.ndim == 3:
        return F.avg_pool1d(y, stride, stride)
    kept: tuple[EllipsisType | slice, ...] = (..., *[slice(None, None, stride)] * (y.ndim - 2))
    # Dense, as what a convolution returns: a view would keep all of y, and no `view` takes it.
    if y.stride(1) >= y.stride(-1):
        return y[kept].clone()
    # Channels-last: of a slice PyTorch makes a gradient whose last axis is the nearest in memory.
    return y.movedim(1, -1)[(*kept, slice(None))].clone().movedim(-1, 1)
