"""Wavelet convolution layers for PyTorch, drop-in for the published ones.

Source: Finder, Amoyal, Treister, Freifeld, "Wavelet Convolutions for Large Receptive Fields",
ECCV 2024.
"""

from __future__ import annotations

import operator
from typing import SupportsIndex, cast

import torch
from torch import Tensor, nn

from pallas_kernels.common.types import Keywords, Tree
from pallas_kernels.dispatch import Choice
from torch_bridge.runtime.device import best_device
from torch_bridge.wtconv import eager, ops

_Device = torch.device | str | None
_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONV: dict[int, type[_Conv]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64


class _Scale(nn.Module):
    """A learned factor a channel; it keeps the key `.weight` of the published state dict."""

    def __init__(
        self, shape: tuple[int, ...], value: float, device: _Device, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full(shape, value, device=device, dtype=dtype))


class _WTConv(nn.Module):
    """The layer of any number of spatial axes; `WTConv2d` documents the arguments."""

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
        implementation: Choice = None,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels = _integer("in_channels", in_channels, 1)
        if in_channels != out_channels:
            raise ValueError(
                f"out_channels is {out_channels}, expected in_channels = {in_channels}: the layer "
                "is depthwise; put a pointwise convolution after it to change the channels"
            )
        self.kernel_size = _integer("kernel_size", kernel_size, 1)
        self.stride = _integer("stride", stride, 1)
        self.wt_levels = wt_levels = _integer("wt_levels", wt_levels, 0)
        self.wt_type = wt_type
        if dtype not in (None, *_DTYPES):
            raise ValueError(f"dtype is {dtype!r}, expected None or one of {list(_DTYPES)}")
        ops.OPERATOR.check_names(implementation)
        self.implementation = _as_strings(implementation)

        factory: Keywords = {
            "device": best_device() if device is None else device,
            "dtype": dtype,
        }
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
        self.register_load_state_dict_pre_hook(_read_layouts)

    def _depthwise(self, channels: int, bias: bool, factory: Keywords) -> _Conv:
        return _CONV[self.ndim](
            channels, channels, self.kernel_size, groups=channels, bias=bias, **factory
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: Signal `[N, C, *spatial]` of the parameters' dtype; inside `torch.autocast` of any
                floating-point one, and the result is of `autocast`'s, as that of a convolution.

        Returns:
            Tensor of x's shape and memory format, its spatial axes divided by the stride.

        Raises:
            ValueError: x is no tensor, is on another device, has another rank, number of channels
                or dtype than the layer or an empty axis beside the batch, or is a 1-D signal
                shorter than the stride.
            NotImplementedError: No allowed implementation can run here; says why for each.
        """
        self._check_input(x)
        device = x.device.type
        if not self._autocast(x):
            return self._apply_to(x)
        with torch.autocast(device, enabled=False):
            return self._apply_to(x.to(torch.get_autocast_dtype(device)))

    def _autocast(self, x: Tensor) -> bool:
        """Whether to compute in the dtype of `autocast`, which leaves float64 alone."""
        if x.is_meta or self.base_conv.weight.dtype == torch.float64:
            return False
        return x.is_floating_point() and torch.is_autocast_enabled(x.device.type)

    def _apply_to(self, x: Tensor) -> Tensor:
        # A traced program may run with other sizes: there the operators check them.
        shape, strides = ops.known(x)
        fwd, bwd = ops.pick(
            self.implementation,
            x.device,
            shape,
            x.dtype,
            self.kernel_size,
            self.wt_levels,
            self.wt_type,
            self.base_conv.bias is not None,
            strides,
            self._differentiated(x),
        )
        weights = (
            self.base_conv.weight,
            self.base_conv.bias,
            self.base_scale.weight,
            [cast(Tensor, conv.weight) for conv in self.wavelet_convs],
            [cast(Tensor, scale.weight) for scale in self.wavelet_scale],
        )
        if fwd == bwd == "eager":
            tensors = (*weights, self.wt_filter, self.iwt_filter)
            if x.dtype != self.base_conv.weight.dtype:
                tensors = _cast(tensors, x.dtype)
            y = eager.wtconv(x, *tensors)
        else:
            y = ops.wtconv(x, *weights, wavelet=self.wt_type, fwd=fwd, bwd=bwd)
        return eager.subsample(y, self.stride)

    def _differentiated(self, x: Tensor) -> bool:
        """Whether there will be a backward pass."""
        return torch.is_grad_enabled() and (
            x.requires_grad or any(value.requires_grad for value in self.parameters())
        )

    def _check_input(self, x: Tensor) -> None:
        axes = ("N", "C", *("D", "H", "W")[3 - self.ndim :]) if self.ndim > 1 else ("N", "C", "L")
        if not isinstance(x, Tensor):
            raise ValueError(f"x is of type {type(x).__name__}, expected a tensor")
        if x.ndim != len(axes) or x.shape[1] != self.in_channels:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, expected ({', '.join(axes)}) with "
                f"C = {self.in_channels} channels"
            )
        if 0 in x.shape[2:]:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, expected at least one sample along each axis"
            )
        if x.device != self.device:
            raise ValueError(
                f"x is on {x.device}, expected {self.device}, where the layer is: move it with "
                "x.to(layer.device), or the layer with layer.to(x.device)"
            )
        dtype = self.base_conv.weight.dtype
        if x.dtype != dtype and not self._autocast(x):
            raise ValueError(
                f"x is of {x.dtype}, expected {dtype}, the dtype of the weights; cast it"
            )
        if self.ndim == 1 and x.shape[2] < self.stride:
            raise ValueError(
                f"stride is {self.stride} and averages groups of {self.stride} samples, but x has "
                f"{x.shape[2]}"
            )

    @property
    def device(self) -> torch.device:
        """The device of the parameters.

        Example:
            >>> WTConv2d(4, 4, device="cpu").device
            device(type='cpu')
        """
        return self.base_conv.weight.device

    def extra_repr(self) -> str:
        """The arguments that the child modules do not show."""
        chosen = "" if self.implementation is None else f", implementation={self.implementation!r}"
        return (
            f"{self.in_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"wt_levels={self.wt_levels}, wt_type={self.wt_type!r}{chosen}"
        )


class WTConv1d(_WTConv):
    """Wavelet convolution of signals `[N, C, L]`.

    Computes in the dtype of its parameters. Arguments are those of `WTConv2d`; a stride averages
    each group of `stride` samples and drops an incomplete last group, as published.

    Source: Finder et al., ECCV 2024.

    Example:
        >>> layer = WTConv1d(4, 4, stride=2)
        >>> layer(torch.zeros(1, 4, 21, device=layer.device)).shape
        torch.Size([1, 4, 10])
    """

    ndim = 1


class WTConv2d(_WTConv):
    """Wavelet convolution of images `[N, C, H, W]`.

    Computes in the dtype of its parameters. The state dict is that of the published layer; the
    names of its fast variant load too. A `stride_filter`, which published layers with a stride > 1
    save beside it, is dropped on loading: it is constant.

    On a GPU the kernels save x and the taps alone for the backward pass, and can be differentiated
    again in reverse mode. `grad`, `vjp` and `jacrev` of `torch.func`, and forward mode, need
    `implementation="eager"`: PyTorch has no way yet to tell them of custom operators.

    Args:
        in_channels: Number of channels C.
        out_channels: Must equal in_channels: the layer is depthwise.
        kernel_size: Size of all its convolutions, in samples of their level.
        stride: Keeps every stride-th row and column of the result.
        bias: Whether the base convolution has a bias.
        wt_levels: Number of wavelet levels; 0 leaves the base convolution alone.
        wt_type: Name of a discrete PyWavelets wavelet; "db1" is Haar.
        device: The device of the parameters; None is the default device where one was set
            (`torch.set_default_device`), else CUDA, MPS or the CPU, the first that is here.
        dtype: Their dtype, PyTorch's default if None.
        implementation: Filter on the implementations "cuda", "triton", "metal" and "eager": a name,
            a sequence of names or "auto" for the fastest of them, which is measured once for each
            kind of input, forward and backward apart, and remembered (`flash-wtconv cache`), or
            None for the environment's (`FLASH_WTCONV_TORCH_WTCONV_FWD`, `..._BWD`) or the device's
            rule. `pallas_kernels.dispatch.tuning` says otherwise for a block of code. A program
            that is compiled or exported keeps the choice of the sizes that it was traced with.

    Raises:
        ValueError: Channels differ, a number is too small, the wavelet or an implementation
            unknown.

    Source: Finder et al., ECCV 2024.

    Example:
        >>> layer = WTConv2d(4, 4, kernel_size=3, wt_levels=2)
        >>> layer(torch.zeros(1, 4, 7, 10, device=layer.device)).shape
        torch.Size([1, 4, 7, 10])
    """

    ndim = 2


class WTConv3d(_WTConv):
    """Wavelet convolution of volumes `[N, C, D, H, W]`.

    Computes in the dtype of its parameters. Arguments are those of `WTConv2d`. There is no
    published 3-D layer: names and order of subbands carry on those of the 2-D one.

    Example:
        >>> layer = WTConv3d(2, 2, kernel_size=3)
        >>> layer(torch.zeros(1, 2, 5, 6, 7, device=layer.device)).shape
        torch.Size([1, 2, 5, 6, 7])
    """

    ndim = 3


LAYERS = {1: WTConv1d, 2: WTConv2d, 3: WTConv3d}
"""The layer for each number of spatial axes."""


def _integer(name: str, value: object, least: int) -> int:
    """An int or a NumPy integer, as the layers in JAX take them; never a bool."""
    try:
        number = operator.index(cast(SupportsIndex, value))
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise ValueError(f"{name} is {value!r}, expected an integer >= {least}")
    return number


def _as_strings(implementation: Choice) -> str | tuple[str, ...] | None:
    """Strings and a tuple alone, which every program and file can hold."""
    if implementation is None or isinstance(implementation, str):
        return implementation and str(implementation)
    return tuple(map(str, implementation))


def _cast(values: Tree, dtype: torch.dtype) -> Tree:
    """Tensors, in lists too, in a dtype."""
    if isinstance(values, Tensor):
        return values.to(dtype)
    return None if values is None else [_cast(value, dtype) for value in values]


def _read_layouts(
    module: nn.Module,
    state_dict: dict[str, Tensor],
    prefix: str,
    metadata: dict[str, object],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Names of the fast variant become the published ones; wrong filters are reported."""
    from flash_wtconv_jax.checkpoints.layouts import FAST_NAMES, PUBLISHED_NAMES, pattern_of

    state_dict.pop(f"{prefix}stride_filter", None)
    fast = [
        (name, published.format(**match.groupdict()))
        for name in state_dict
        for theirs, published in zip(FAST_NAMES, PUBLISHED_NAMES, strict=True)
        if name.startswith(prefix) and (match := pattern_of(theirs).fullmatch(name[len(prefix) :]))
    ]
    for name, published in fast:
        state_dict[prefix + published] = state_dict.pop(name)
    for name in ("wt_filter", "iwt_filter"):
        own, theirs = getattr(module, name), state_dict.get(prefix + name)
        if theirs is None and fast:
            # The fast variant does not keep them.
            state_dict[prefix + name] = own
        # Kernels know no others. Rounded to bfloat16 they differ by less than a hundredth.
        elif (
            # PyTorch itself reports an entry that is no tensor.
            isinstance(theirs, Tensor)
            and theirs.shape == own.shape
            and not (own.is_meta or theirs.is_meta)
        ):
            if not torch.allclose(theirs.to(own), own, rtol=0.0, atol=1e-2):
                errors.append(f"{prefix}{name} is not that of wt_type={module.wt_type!r}")
