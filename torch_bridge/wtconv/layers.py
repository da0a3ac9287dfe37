"""Wavelet convolution layers for PyTorch, drop-in for the published ones.

Source: Finder, Amoyal, Treister, Freifeld, "Wavelet Convolutions for Large Receptive Fields",
ECCV 2024.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterable, Sequence
from typing import Self, SupportsIndex, TypeGuard, cast

import torch
from torch import Tensor, nn

from pallas_kernels.common.types import Keywords
from pallas_kernels.dispatch import Choice
from torch_bridge.runtime import calls
from torch_bridge.runtime.device import best_device
from torch_bridge.wtconv import eager, ops

_Device = torch.device | str | None
_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
_CONV: dict[int, type[_Conv]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64
_LARGEST = 2**31 - 1
"""The largest size that PyTorch's convolutions take."""
_MOST_LEVELS = 63
"""The most levels, as in JAX: no axis of an array can be halved more often."""
_WARNED: set[tuple[str, tuple[bool, ...], tuple[str, str]]] = set()
"""The layers that were warned of, once each."""
_ROUNDING = 2.0**-8
"""The greatest error of a tap below 2 in bfloat16."""


class _Scale(nn.Module):
    """A learned factor a channel; it keeps the key `.weight` of the published state dict."""

    def __init__(
        self, shape: tuple[int, ...], value: float, device: _Device, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        self._value = value
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Writes the factors that training starts from."""
        nn.init.constant_(self.weight, self._value)

    def forward(self, x: Tensor) -> Tensor:
        """The product of x and the factors."""
        return self.weight * x


class _WTConv(nn.Module):
    """The layer of any number of spatial axes; `WTConv2d` documents the arguments."""

    ndim: int
    # The name that PyTorch's eager quantisation reads: the layer stays in floating point.
    qconfig: None = None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Sequence[int] = 5,
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
        self.kernel_size = _kernel_size(kernel_size, self.ndim)
        self.stride = _integer("stride", stride, 1)
        self.wt_levels = wt_levels = _integer("wt_levels", wt_levels, 0, _MOST_LEVELS)
        # PyWavelets takes names in any case.
        self.wt_type = wt_type.lower() if isinstance(wt_type, str) else wt_type
        if dtype not in (None, *_DTYPES):
            raise ValueError(f"dtype is {dtype!r}, expected None or one of {list(_DTYPES)}")
        ops.OPERATOR.check_names(implementation)
        self.implementation = calls.static(implementation)

        factory: Keywords = {
            "device": best_device() if device is None else device,
            "dtype": dtype,
        }
        try:
            filters = self._filters(**factory)
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
            *(channels, channels, self.kernel_size),
            padding="same",
            groups=channels,
            bias=bias,
            **factory,
        )

    def _filters(self, device: _Device, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """The filters of `wt_type`, whatever `wt_filter` and `iwt_filter` hold."""
        names = self.wt_type, self.ndim, self.in_channels
        return eager.wavelet_filters(*names, device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Writes the filters of `wt_type`, after `to_empty` for instance.

        Convolutions and scales have a `reset_parameters` of their own.
        """
        own = self.wt_filter, self.iwt_filter
        for parameter, filters in zip(own, self._filters(self.device, own[0].dtype), strict=True):
            parameter.copy_(_sharded_as(parameter, filters))

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freezes or unfreezes the layer, but for the filters, which stay frozen."""
        super().requires_grad_(requires_grad)
        self.wt_filter.requires_grad_(False)
        self.iwt_filter.requires_grad_(False)
        return self

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
            RuntimeError: The kernels that were named do not compile; tells the end of the log.
        """
        branches = self._branches()
        size = (self.kernel_size,) * self.ndim
        plain = tuple(
            # Kernels add a bias to the base alone.
            [
                _is_plain(conv, scale, size) and (level == 0 or conv.bias is None)
                for level, (conv, scale) in enumerate(branches)
            ]
        )
        # Not the weight of a module that may compute it whenever one looks at it.
        like = self.base_conv.weight if plain[0] else self.wt_filter
        self._check_input(x, like)
        if not _in_autocast(x, like):
            return self._apply_to(x, branches, plain)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device)
        # Modules that are called cast their own weights.
        with torch.autocast(device, enabled=not all(plain)):
            return self._apply_to(x.to(dtype), branches, plain).to(dtype)

    def _branches(self) -> list[tuple[_Conv, _Scale]]:
        """The convolution and the scale of the base and of each level, or what stands for them."""
        levels = zip(self.wavelet_convs, self.wavelet_scale, strict=True)
        return [(self.base_conv, self.base_scale), *cast("Iterable[tuple[_Conv, _Scale]]", levels)]

    def _apply_to(
        self, x: Tensor, branches: list[tuple[_Conv, _Scale]], plain: tuple[bool, ...]
    ) -> Tensor:
        # A traced program may run with other sizes: there the operators check them.
        shape, strides = calls.known(x)
        fwd, bwd = ops.pick(
            self.implementation,
            x.device,
            shape,
            x.dtype,
            self.kernel_size,
            self.wt_levels,
            self.wt_type,
            plain[0] and self.base_conv.bias is not None,
            strides,
            self._differentiated(x),
        )
        by_kernels = calls.names((fwd, bwd)) != ["eager"]
        if all(plain) and (by_kernels or ops.stays_whole(x)):
            (weight, *weights), (scale, *scales) = (
                [module.weight for module in modules] for modules in zip(*branches, strict=True)
            )
            y = ops.wtconv(
                *(x, weight, self.base_conv.bias, scale, weights, scales),
                wavelet=self.wt_type,
                fwd=fwd,
                bwd=bwd,
            )
        else:
            if by_kernels:
                _warn_of_eager(type(self).__name__, plain, (fwd, bwd))
            base, *levels = (
                _weighted(*branch) if bare else _called(*branch)
                for branch, bare in zip(branches, plain, strict=True)
            )
            # Kernels do not train them either.
            filters = (
                _cast(value.detach() if value.requires_grad else value, x.dtype)
                for value in (self.wt_filter, self.iwt_filter)
            )
            y = eager.wtconv(x, base, levels, *filters)
        return eager.subsample(y, self.stride)

    def _differentiated(self, x: Tensor) -> bool:
        """Whether there will be a backward pass."""
        return torch.is_grad_enabled() and (
            x.requires_grad or any(value.requires_grad for value in self.parameters())
        )

    def _check_input(self, x: Tensor, like: Tensor) -> None:
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
        if x.device != like.device:
            raise ValueError(
                f"x is on {x.device}, expected {like.device}, where the layer is: move it with "
                "x.to(layer.device), or the layer with layer.to(x.device)"
            )
        if x.dtype != like.dtype and not _in_autocast(x, like):
            if x.is_quantized:
                raise ValueError(
                    f"x is quantised, {x.dtype}, expected {like.dtype}: there is no quantised "
                    "wavelet convolution, and PyTorch's eager quantisation leaves the layer as it "
                    "is; put a DeQuantStub before it and a QuantStub after it"
                )
            raise ValueError(
                f"x is of {x.dtype}, expected {like.dtype}, the dtype of the weights; cast it"
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
        return self.wt_filter.device

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

    On a GPU the kernels save x and taps or weights for the backward pass, and can be differentiated
    again in reverse mode. `grad`, `vjp` and `jacrev` of `torch.func`, and forward mode, need
    `implementation="eager"`: PyTorch has no way yet to tell them of custom operators.

    What sits on a submodule acts, as in the published layer: hooks, pruning, parametrizations,
    adapters, sharding, another padding. Kernels would ignore it, so plain PyTorch computes such a
    layer, and a warning says so once.

    Args:
        in_channels: Number of channels C.
        out_channels: Must equal in_channels: the layer is depthwise.
        kernel_size: Size of all its convolutions, in samples of their level; a tuple of equal ones
            too.
        stride: Keeps every stride-th row and column of the result.
        bias: Whether the base convolution has a bias.
        wt_levels: Number of wavelet levels; 0 leaves the base convolution alone.
        wt_type: Name of a discrete PyWavelets wavelet, in any case; "db1" is Haar. Its filters,
            which the state dict holds, never train. Others in a state dict are refused, but that
            `implementation="eager"` runs them as they are.
        device: The device of the parameters; None is the default device where one was set
            (`torch.set_default_device`), else CUDA, MPS or the CPU, the first that is here; in a
            process group the GPU of this rank.
        dtype: Their dtype, PyTorch's default if None.
        implementation: Filter on the implementations "cuda", "triton", "metal" and "eager": a name,
            a sequence of names or "auto" for the fastest of them, which is measured once for each
            kind of input, forward and backward apart, and remembered (`flash-wtconv cache`), or
            None for the environment's (`FLASH_WTCONV_TORCH_WTCONV_FWD`, `..._BWD`) or the device's
            rule. `pallas_kernels.dispatch.tuning` says otherwise for a block of code. A program
            that is compiled or exported keeps the choice of the sizes that it was traced with.
            Where kernels that nobody named do not compile, the next computes, after a warning.

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


def _integer(name: str, value: object, least: int, most: int = _LARGEST) -> int:
    """An int or a NumPy integer, as the layers in JAX take them; never a bool."""
    try:
        number = operator.index(cast(SupportsIndex, value))
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise ValueError(f"{name} is {value!r}, expected an integer >= {least}")
    if number > most:
        raise ValueError(f"{name} is {value!r}, expected an integer <= {most}")
    return number


def _kernel_size(value: object, ndim: int) -> int:
    """The one size of the convolutions, told once or for each axis."""
    if isinstance(value, Sequence) and len(value) == ndim and all(n == value[0] for n in value):
        value = value[0]
    return _integer("kernel_size", value, 1)


def _in_autocast(x: Tensor, like: Tensor) -> bool:
    """Whether to compute in the dtype of `autocast`, which leaves float64 alone."""
    if x.is_meta or like.dtype == torch.float64:
        return False
    return x.is_floating_point() and torch.is_autocast_enabled(x.device.type)


def _is_bare(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of a module is no more than its class's `forward`.

    Wrappers, parametrizations and sharding make it one of another class.
    """
    return type(module) is kind and not (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
    )


def _is_plain(conv: _Conv, scale: _Scale, kernel_size: tuple[int, ...]) -> bool:
    """Whether the weights of a branch, and a bias, are all that its modules would compute with."""
    return (
        _is_bare(conv, _CONV[len(kernel_size)])
        and _is_bare(scale, _Scale)
        and conv.kernel_size == kernel_size
        and conv.padding == "same"
        and conv.padding_mode == "zeros"
        and conv.stride == conv.dilation == (1,) * len(kernel_size)
        and conv.groups == conv.in_channels == conv.out_channels
    )


def _weighted(conv: _Conv, scale: _Scale) -> eager.Branch:
    """A branch that is computed with the weights of its modules, in the dtype of its input."""

    def branch(x: Tensor) -> Tensor:
        bias = None if conv.bias is None else _cast(conv.bias, x.dtype)
        y = eager.depthwise(x, _cast(conv.weight, x.dtype), bias)
        return _cast(scale.weight, x.dtype) * y

    return branch


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in a dtype; no operation of an exported program where it has it."""
    return value if value.dtype == dtype else value.to(dtype)


def _called(conv: nn.Module, scale: nn.Module) -> eager.Branch:
    """A branch that calls its modules, so that what sits on them acts."""
    return lambda x: scale(conv(x))


# PyTorch's compiler, which traces no warnings, calls it as it is.
@calls.constant
def _warn_of_eager(layer: str, plain: tuple[bool, ...], picked: tuple[str, str]) -> None:
    """Warns once that plain PyTorch computes a layer that kernels would compute."""
    if (layer, plain, picked) in _WARNED:
        return
    _WARNED.add((layer, plain, picked))
    parts = ["base_conv or base_scale"]
    parts += [f"wavelet_convs.{i} or wavelet_scale.{i}" for i in range(len(plain) - 1)]
    found = "; ".join(part for part, bare in zip(parts, plain, strict=True) if not bare)
    kernels = [name for name in calls.names(picked) if name != "eager"]
    warnings.warn(
        f"{layer} has hooks, wrappers, parametrizations or other arguments on {found}, which "
        f"{' and '.join(kernels)} would ignore: plain PyTorch computes the layer and calls them. "
        "Take them off for the kernels' speed, or say implementation='eager'",
        RuntimeWarning,
        stacklevel=2,
    )


def _read_layouts(
    module: _WTConv,
    state_dict: dict[str, Tensor],
    prefix: str,
    metadata: dict[str, object],
    strict: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Names of the fast variant become the published ones; the filters are those of `wt_type`."""
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
    # Plain PyTorch alone can compute with others.
    as_they_are = module.implementation in ("eager", ("eager",))
    assigned = bool(metadata.get("assign_to_params_buffers"))
    for i, name in enumerate(("wt_filter", "iwt_filter")):
        key, own = prefix + name, getattr(module, name)
        theirs = state_dict.get(key)
        if theirs is None and fast:
            # The fast variant does not keep them.
            state_dict[key] = _sharded_as(own, module._filters(own.device, own.dtype)[i])
        elif _comparable(theirs, own) and not as_they_are:
            right = module._filters(theirs.device, theirs.dtype if assigned else own.dtype)[i]
            distance = float((_whole(theirs).float() - right.float()).abs().max())
            if distance <= _ROUNDING:
                state_dict[key] = _sharded_as(theirs, right)
                continue
            # The layer keeps its own.
            state_dict[key] = own.detach()
            errors.append(
                f"{key} is not that of wt_type={module.wt_type!r}: taps are up to {distance:.2g} "
                f"apart, expected at most {_ROUNDING:.2g}; name the wavelet of the file, or say "
                "implementation='eager', which takes the filters of a file as they are"
            )


def _comparable(theirs: Tensor | None, own: Tensor) -> TypeGuard[Tensor]:
    """Whether an entry has values for a parameter; PyTorch itself reports what does not fit."""
    return isinstance(theirs, Tensor) and theirs.shape == own.shape and not theirs.is_meta


def _whole(value: Tensor) -> Tensor:
    """A tensor that may be sharded, as every rank sees it."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _sharded_as(like: Tensor, value: Tensor) -> Tensor:
    """A tensor sharded as another is, if it is."""
    if not (hasattr(like, "device_mesh") and hasattr(like, "placements")):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements)
