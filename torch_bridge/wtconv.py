"""Wavelet convolution layers for PyTorch, drop-in for the published ones.

Source: Finder, Amoyal, Treister, Freifeld, "Wavelet Convolutions for Large Receptive Fields",
ECCV 2024.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from torch_bridge.backends import eager

_Device = torch.device | str | None
_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONV: dict[int, type[_Conv]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class _Scale(nn.Module):
    """A learned factor a channel; it keeps the key `.weight` of the published state dict."""

    def __init__(
        self, shape: tuple[int, ...], value: float, device: _Device, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full(shape, value, device=device, dtype=dtype))


class _WTConv(nn.Module):
    """What the layers of every number of spatial axes share."""

    ndim: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 5,
        stride: int = 1,
        bias: bool = True,
        wt_levels: int = 1,
        wt_type: str = "db1",
        device: _Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if in_channels != out_channels:
            raise ValueError(
                f"out_channels is {out_channels}, expected in_channels = {in_channels}: the layer "
                "is depthwise; put a pointwise convolution after it to change the channels"
            )
        self.in_channels = in_channels = _integer("in_channels", in_channels, 1)
        self.kernel_size = _integer("kernel_size", kernel_size, 1)
        self.stride = _integer("stride", stride, 1)
        self.wt_levels = wt_levels = _integer("wt_levels", wt_levels, 0)
        self.wt_type = wt_type
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype}, expected a floating-point dtype")

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        try:
            filters = eager.wavelet_filters(wt_type, self.ndim, in_channels, **factory)
        except ValueError as error:
            raise ValueError(f"wt_type: {error}") from None
        # Frozen parameters, not buffers: published checkpoints and parameter counts hold them.
        self.wt_filter, self.iwt_filter = (nn.Parameter(f, requires_grad=False) for f in filters)

        bands = 2**self.ndim * in_channels
        ones = (1,) * self.ndim
        self.base_conv = self._depthwise(in_channels, bias, factory)
        self.base_scale = _Scale((1, in_channels, *ones), 1.0, **factory)
        self.wavelet_convs = nn.ModuleList(
            self._depthwise(bands, False, factory) for _ in range(wt_levels)
        )
        self.wavelet_scale = nn.ModuleList(
            _Scale((1, bands, *ones), 0.1, **factory) for _ in range(wt_levels)
        )
        self.register_load_state_dict_pre_hook(_drop_stride_filter)

    def _depthwise(self, channels: int, bias: bool, factory: dict[str, Any]) -> _Conv:
        return _CONV[self.ndim](
            channels, channels, self.kernel_size, groups=channels, bias=bias, **factory
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: Signal `[N, C, *spatial]` of the parameters' dtype.

        Returns:
            Tensor of x's shape, its spatial axes divided by the stride.

        Raises:
            ValueError: x is no tensor, has another rank, number of channels or dtype than the layer
                or an empty axis beside the batch, or is a 1-D signal shorter than the stride.
        """
        return eager.wtconv(
            x,
            self.base_conv.weight,
            self.base_conv.bias,
            self.base_scale.weight,
            [cast(Tensor, conv.weight) for conv in self.wavelet_convs],
            [cast(Tensor, scale.weight) for scale in self.wavelet_scale],
            self.wt_filter,
            self.iwt_filter,
            stride=self.stride,
        )

    def extra_repr(self) -> str:
        """The arguments that the child modules do not show."""
        return (
            f"{self.in_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"wt_levels={self.wt_levels}, wt_type={self.wt_type!r}"
        )


class WTConv1d(_WTConv):
    """Wavelet convolution of signals `[N, C, L]`.

    Computes in the dtype of its parameters. Arguments are those of `WTConv2d`; a stride averages
    each group of `stride` samples and drops an incomplete last group, as published.

    Source: Finder et al., ECCV 2024.

    Example:
        >>> WTConv1d(4, 4, stride=2)(torch.zeros(1, 4, 21)).shape
        torch.Size([1, 4, 10])
    """

    ndim = 1


class WTConv2d(_WTConv):
    """Wavelet convolution of images `[N, C, H, W]`.

    Computes in the dtype of its parameters. The state dict is that of the published layer. A
    `stride_filter`, which published layers with a stride > 1 save beside it, is dropped on loading:
    it is constant.

    Args:
        in_channels: Number of channels C.
        out_channels: Must equal in_channels: the layer is depthwise.
        kernel_size: Size of all its convolutions, in samples of their level.
        stride: Keeps every stride-th row and column of the result.
        bias: Whether the base convolution has a bias.
        wt_levels: Number of wavelet levels; 0 leaves the base convolution alone.
        wt_type: Name of a discrete PyWavelets wavelet; "db1" is Haar.
        device: Where the parameters live.
        dtype: Their dtype, PyTorch's default if None.

    Raises:
        ValueError: Channels differ, a number is too small or the wavelet unknown.

    Source: Finder et al., ECCV 2024.

    Example:
        >>> WTConv2d(4, 4, kernel_size=3, wt_levels=2)(torch.zeros(1, 4, 7, 10)).shape
        torch.Size([1, 4, 7, 10])
    """

    ndim = 2


class WTConv3d(_WTConv):
    """Wavelet convolution of volumes `[N, C, D, H, W]`.

    Computes in the dtype of its parameters. Arguments are those of `WTConv2d`. There is no
    published 3-D layer: names and order of subbands carry on those of the 2-D one.

    Example:
        >>> WTConv3d(2, 2, kernel_size=3)(torch.zeros(1, 2, 5, 6, 7)).shape
        torch.Size([1, 2, 5, 6, 7])
    """

    ndim = 3


_LAYERS = {1: WTConv1d, 2: WTConv2d, 3: WTConv3d}


def from_jax(variables: Mapping[str, Any], *, wavelet: str = "haar", stride: int = 1) -> _WTConv:
    """A PyTorch layer that computes what a Flax layer with these variables computes.

    Args:
        variables: `{"params": ...}` of a Flax `WTConv1d`, `WTConv2d` or `WTConv3d`.
        wavelet: The wavelet of the Flax layer: variables do not hold it.
        stride: Its stride, which they do not hold either.

    Returns:
        A `WTConv1d`, `WTConv2d` or `WTConv3d` with copies of the parameters, in the dtype of
        `base_kernel`.

    Raises:
        ValueError: The variables are not those of one layer; every missing, surplus or misshapen
            name is in the message.

    Example:
        >>> layer = WTConv2d(4, 4, wt_levels=2)
        >>> x = torch.ones(1, 4, 9, 9)
        >>> bool(torch.equal(from_jax(to_jax(layer))(x), layer(x)))
        True
    """
    from flash_wtconv_jax import checkpoints

    arrays = checkpoints.to_torch(variables, layout="published", wavelet=wavelet)
    tensors = checkpoints.to_tensors(arrays)
    weight = tensors["base_conv.weight"]
    layer = _LAYERS[weight.ndim - 2](
        len(weight),
        len(weight),
        weight.shape[2],
        stride,
        "base_conv.bias" in tensors,
        sum(name.startswith("wavelet_convs.") for name in tensors),
        wavelet,
        dtype=weight.dtype,
    )
    layer.load_state_dict(tensors)
    return layer


def to_jax(module: nn.Module) -> dict[str, Any]:
    """The variables of the Flax layer that computes what a PyTorch layer computes.

    Args:
        module: A `WTConv1d`, `WTConv2d` or `WTConv3d` of this package or a published layer.

    Returns:
        `{"params": ...}` with NumPy arrays, ready for `apply` of the Flax layer with the same
        wavelet and stride.

    Raises:
        TypeError: No module, but its state dict: `checkpoints.from_torch` takes one.
        ValueError: The state dict of the module is none of a known layout.

    Example:
        >>> sorted(to_jax(WTConv2d(4, 4, kernel_size=3, wt_levels=0))["params"])
        ['base_bias', 'base_kernel', 'base_scale']
    """
    from flash_wtconv_jax import checkpoints

    if not isinstance(module, nn.Module):
        raise TypeError(
            f"module is of type {type(module).__name__}, expected a torch.nn.Module; of a state "
            "dict flash_wtconv_jax.checkpoints.from_torch makes variables"
        )
    state_dict = module.state_dict()
    wavelet = checkpoints.recognise(state_dict).wavelet
    return checkpoints.from_torch(state_dict, wavelet=wavelet)


def _integer(name: str, value: Any, least: int) -> int:
    """An int or a NumPy integer, as the layers in JAX take them; never a bool."""
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise ValueError(f"{name} is {value!r}, expected an integer >= {least}")
    return number


def _drop_stride_filter(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    state_dict.pop(f"{prefix}stride_filter", None)
