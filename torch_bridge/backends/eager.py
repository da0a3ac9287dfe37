"""WTConv in plain PyTorch, computed as the published layer computes it.

Channels-first arrays `[N, C, *spatial]`, grouped convolutions with frozen wavelet filters for the
analysis, transposed ones for the synthesis. It runs on every device PyTorch knows, and is the
baseline that the benchmarks compare with, so it is neither faster nor slower than its source.

Source: Finder, Amoyal, Treister, Freifeld, "Wavelet Convolutions for Large Receptive Fields",
ECCV 2024.
"""

from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pallas_kernels.haar.filters import filter_bank

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


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
        device: Where the filters are made.
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


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depthwise convolution `[N, C, *spatial]` with `[C, 1, *k]`, zero-padded to the same size."""
    kernel = weight.shape[2:]
    padding: str | int = "same"
    if any(k % 2 == 0 for k in kernel):
        # What "same" does too, which warns of the copy that even sizes cost.
        x = F.pad(x, [p for k in reversed(kernel) for p in ((k - 1) // 2, k // 2)])
        padding = 0
    return _CONV[len(kernel)](x, weight, bias, padding=padding, groups=x.shape[1])


def wtconv(
    x: Tensor,
    base_weight: Tensor,
    base_bias: Tensor | None,
    base_scale: Tensor,
    wavelet_weights: Sequence[Tensor],
    wavelet_scales: Sequence[Tensor],
    wt_filter: Tensor,
    iwt_filter: Tensor,
    *,
    stride: int = 1,
) -> Tensor:
    """Wavelet convolution of 1-D, 2-D or 3-D signals.

    Args:
        x: Signal `[N, C, *spatial]`; all tensors are of one dtype.
        base_weight: `[C, 1, *k]`.
        base_bias: `[C]` or None.
        base_scale: `[1, C, 1, ...]`.
        wavelet_weights: One `[2**d * C, 1, *k]` a level, finest first.
        wavelet_scales: One `[1, 2**d * C, 1, ...]` a level.
        wt_filter: Analysis filters of `wavelet_filters`.
        iwt_filter: Synthesis filters of `wavelet_filters`.
        stride: 2-D and 3-D keep every stride-th sample of each axis, 1-D averages each group of
            stride samples and drops an incomplete last group.

    Returns:
        `[N, C, *spatial]` for stride 1.

    Raises:
        ValueError: x is no tensor, has another rank, number of channels or dtype than the weights
            or an empty axis beside the batch, or is a 1-D signal shorter than the stride.

    Example:
        >>> weight, scale = torch.ones(3, 1, 1, 1), torch.full((1, 3, 1, 1), 2.0)
        >>> x = torch.ones(1, 3, 4, 4)
        >>> float(wtconv(x, weight, None, scale, [], [], *wavelet_filters("db1", 2, 3)).mean())
        2.0
    """
    _check_input(x, base_weight, stride)
    levels = []
    sizes = []
    low = x
    for weight, scale in zip(wavelet_weights, wavelet_scales, strict=True):
        size = low.shape[2:]
        sizes.append(size)
        if any(n % 2 for n in size):
            low = F.pad(low, [p for n in reversed(size) for p in (0, n % 2)])
        coefficients = wavelet_transform(low, wt_filter)
        low = coefficients[:, :, 0]
        flat = coefficients.flatten(1, 2)
        levels.append((scale * depthwise(flat, weight)).reshape(coefficients.shape))

    deeper: Tensor | int = 0
    for filtered, size in zip(reversed(levels), reversed(sizes), strict=True):
        bands = torch.cat([(filtered[:, :, 0] + deeper).unsqueeze(2), filtered[:, :, 1:]], dim=2)
        deeper = _spatial(inverse_wavelet_transform(bands, iwt_filter), [slice(n) for n in size])

    y = base_scale * depthwise(x, base_weight, base_bias) + deeper
    return _subsample(y, stride)


def _check_input(x: Tensor, base_weight: Tensor, stride: int) -> None:
    ndim = base_weight.ndim - 2
    axes = ("N", "C", *("D", "H", "W")[3 - ndim :]) if ndim > 1 else ("N", "C", "L")
    if not isinstance(x, Tensor):
        raise ValueError(f"x is of type {type(x).__name__}, expected a tensor")
    if x.ndim != len(axes) or x.shape[1] != base_weight.shape[0]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected ({', '.join(axes)}) with "
            f"C = {base_weight.shape[0]} channels"
        )
    if 0 in x.shape[2:]:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, expected at least one sample along each axis"
        )
    if x.dtype != base_weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"x is of {x.dtype}, expected {base_weight.dtype}, the dtype of the weights; cast it"
        )
    if ndim == 1 and x.shape[2] < stride:
        raise ValueError(
            f"stride is {stride} and averages groups of {stride} samples, but x has {x.shape[2]}"
        )


def _subsample(y: Tensor, stride: int) -> Tensor:
    if stride == 1:
        return y
    if y.ndim == 3:
        return F.avg_pool1d(y, stride, stride)
    return _spatial(y, [slice(None, None, stride)] * (y.ndim - 2))


def _spatial(x: Tensor, window: list[slice]) -> Tensor:
    return x[(slice(None), slice(None), *window)]
