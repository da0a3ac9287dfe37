"""WTConv in place of the depthwise convolutions of a PyTorch model that there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pallas_kernels.dispatch import Choice
from torch_bridge.wtconv import ops
from torch_bridge.wtconv.layers import LAYERS

_CONVS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


def replace_depthwise(
    model: nn.Module,
    *,
    wt_levels: int,
    kernel_size: int | None = None,
    where: Callable[[str, nn.Module], bool] | None = None,
    wt_type: str = "db1",
    scale: float = 0.1,
    implementation: Choice = None,
) -> list[str]:
    """Replace every depthwise convolution of a model by a WTConv of the same channels and stride.

    The model is changed in place. A convolution used in several places becomes one WTConv used in
    all of them. Kernel and bias of the convolution become those of the base convolution, the same
    parameters where the size stays, so that with `scale=0` the model computes what it computed
    before. An optimizer made before must be made anew: there are more parameters.

    Nothing is changed unless all can be: a convolution that WTConv cannot stand in for is an error
    that names it, and `where` leaves it out. For different levels in different places call this
    once for each.

    Args:
        model: The model. Its submodules change, so it cannot be the convolution itself.
        wt_levels: Number of wavelet levels.
        kernel_size: Taps along each axis; None keeps those of the convolution. A larger kernel
            starts as the convolution's with zeros around it.
        where: Called with the name, such as "stages.0.blocks.1.conv_dw", and the convolution; False
            leaves it alone. One used in several places is asked for at its first.
        wt_type: Any discrete PyWavelets name.
        scale: Initial value of the wavelet scales.
        implementation: See `torch_bridge.WTConv2d`.

    Returns:
        The names of the convolutions that were replaced.

    Raises:
        ValueError: If there is nothing to replace, a convolution cannot be replaced, or an
            argument is out of range.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(4, 4, 7, padding=3, groups=4), nn.ReLU())
        >>> x = torch.ones(1, 4, 16, 16)
        >>> before = model(x)
        >>> replace_depthwise(model, wt_levels=2, scale=0)
        ['0']
        >>> bool((model(x) - before).abs().max() < 1e-5)
        True
    """
    ops.OPERATOR.check_names(implementation)
    found = dict(_depthwise(model))
    if isinstance(model, _Conv):
        raise ValueError(
            f"model is a {type(model).__name__}, expected a model that contains convolutions; "
            "make a layer of torch_bridge instead"
        )
    asked: dict[int, bool] = {}
    for name, conv in found.items():
        if id(conv) not in asked:
            asked[id(conv)] = where is None or bool(where(name, conv))
    chosen = {name: conv for name, conv in found.items() if asked[id(conv)]}
    if not chosen:
        raise ValueError(
            f"model has no depthwise convolution to replace: where refused all {len(found)}"
            if found
            else "model has no depthwise convolution to replace: no convolution in it has as many "
            "groups as channels"
        )
    reasons = ((name, _obstacle(conv, kernel_size)) for name, conv in chosen.items())
    problems = [f"  {name}: {reason}" for name, reason in reasons if reason is not None]
    if problems:
        raise ValueError(
            "these depthwise convolutions cannot be replaced by WTConv (nothing was changed; to "
            "leave them as they are, give a `where` that is False for them):\n"
            + "\n".join(problems)
        )
    made: dict[int, nn.Module] = {}
    for conv in chosen.values():
        if id(conv) not in made:
            made[id(conv)] = _wtconv(conv, wt_levels, kernel_size, wt_type, scale, implementation)
    for name, conv in chosen.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, made[id(conv)])
    return list(chosen)


def _depthwise(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, _Conv]]:
    """The depthwise convolutions below a module by name, but for those inside of WTConv layers."""
    # Not named_children, which names a shared module once.
    for own, child in module._modules.items():
        name = f"{prefix}{own}"
        if child is None:
            continue
        if isinstance(child, _Conv):
            if _is_depthwise(child):
                yield name, child
        elif not isinstance(child, tuple(LAYERS.values())):
            yield from _depthwise(child, f"{name}.")


def _is_depthwise(conv: _Conv) -> bool:
    # An ordinary convolution of a grey image has one group and one input channel too.
    return conv.groups == conv.in_channels and (conv.groups > 1 or conv.out_channels == 1)


def _obstacle(conv: _Conv, kernel_size: int | None) -> str | None:
    """The reason why WTConv cannot stand in for a depthwise convolution; None if it can."""
    if type(conv) not in _CONVS:
        return f"it is a {type(conv).__name__}, which may compute something else"
    size, stride = conv.kernel_size[0], conv.stride[0]
    if conv.out_channels != conv.in_channels:
        return f"it makes {conv.out_channels} features of {conv.in_channels} channels"
    if set(conv.kernel_size) != {size}:
        return f"its kernel {tuple(conv.kernel_size)} is not square"
    if set(conv.dilation) != {1}:
        return "it is dilated"
    if set(conv.stride) != {stride}:
        return f"its strides {tuple(conv.stride)} differ"
    if _CONVS[type(conv)] == 1 and stride > 1:
        return f"it has stride {stride}, and a strided WTConv1d averages where this one skips"
    if conv.padding_mode != "zeros":
        return f"its padding_mode is {conv.padding_mode!r}, expected 'zeros'"
    if kernel_size is not None and kernel_size < size:
        return f"its kernel of {size} taps does not fit into kernel_size={kernel_size}"
    if conv.padding != "same" and not _keeps_size(conv.padding, size):
        return f"its padding is {conv.padding!r}, not that of 'same'"
    return None


def _keeps_size(padding: str | Sequence[int], size: int) -> bool:
    # PyTorch pads alike at both ends, and an even kernel needs one more behind.
    return size % 2 == 1 and not isinstance(padding, str) and set(padding) == {size // 2}


def _wtconv(
    conv: _Conv,
    wt_levels: int,
    kernel_size: int | None,
    wt_type: str,
    scale: float,
    implementation: Choice,
) -> nn.Module:
    """The layer of ours with the parameters of a convolution in its base."""
    layer = LAYERS[_CONVS[type(conv)]](
        conv.in_channels,
        conv.in_channels,
        kernel_size or conv.kernel_size[0],
        conv.stride[0],
        conv.bias is not None,
        wt_levels,
        wt_type,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
        implementation=implementation,
    )
    base = layer.base_conv
    if layer.kernel_size == conv.kernel_size[0]:
        base.weight = conv.weight
    else:
        missing = layer.kernel_size - conv.kernel_size[0]
        before = (layer.kernel_size - 1) // 2 - (conv.kernel_size[0] - 1) // 2
        pads = (before, missing - before) * _CONVS[type(conv)]
        with torch.no_grad():
            base.weight.copy_(nn.functional.pad(conv.weight, pads))
        base.weight.requires_grad_(conv.weight.requires_grad)
    base.bias = conv.bias
    for one in layer.wavelet_scale:
        nn.init.constant_(cast(Tensor, one.weight), scale)
    layer.train(conv.training)
    return layer
