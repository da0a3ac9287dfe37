"""The scales of kernels in plain PyTorch, for what does not multiply them itself.

A layer's branches are depthwise convolutions times scales, a kernel `[rows, 1, *k]` and a scale a
row, in any shape. Their products are the *taps*; the bias is the base's, and scaled as it is. All
here is linear in each of its arguments, so that derivatives are the same functions again.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def folded(
    weights: Sequence[Tensor], bias: Tensor | None, scales: Sequence[Tensor], dtype: torch.dtype
) -> tuple[list[Tensor], Tensor | None]:
    """The taps, and the scaled bias.

    Args:
        weights: The kernels, the base's first.
        bias: Of the base, or None.
        scales: As many.
        dtype: Of what is returned, and of the products.

    Example:
        >>> taps, bias = folded([torch.ones(2, 1, 1)], None, [torch.tensor([2, 3])], torch.float32)
        >>> taps[0].flatten().tolist(), bias
        ([2.0, 3.0], None)
    """
    # All at once, here and in the backward pass: a small operation takes the host longer than a
    # large kernel the GPU.
    whole = torch.cat([weight.flatten(1) for weight in weights]).to(dtype)
    whole = whole * torch.cat([scale.flatten() for scale in scales]).to(dtype)[:, None]
    rows = [weight.shape[0] for weight in weights]
    taps = [tap.unflatten(1, weights[0].shape[1:]) for tap in whole.split(rows)]
    return taps, None if bias is None else bias.to(dtype) * scales[0].to(dtype).flatten()


def gradients(
    taps: Sequence[Tensor],
    offset: Tensor | None,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    scales: Sequence[Tensor],
) -> list[Tensor]:
    """The gradients of kernels, of scales, and of the bias if there is one, in their dtypes.

    Args:
        taps: The gradients of the taps.
        offset: That of the scaled bias.
        weights: The kernels.
        bias: The bias.
        scales: The scales.

    Example:
        >>> kernel, scale = torch.full((1, 1, 2), 3.0), torch.full((1, 1, 1), 2.0)
        >>> found = gradients([torch.ones(1, 1, 2)], None, [kernel], None, [scale])
        >>> [each.flatten().tolist() for each in found]
        [[2.0, 2.0], [6.0]]
    """
    of_weights, of_scales = [], []
    for tap, weight, scale in zip(taps, weights, scales, strict=True):
        factor = scale.to(tap.dtype).reshape(-1, *(1,) * (tap.ndim - 1))
        of_weights.append((tap * factor).to(weight.dtype))
        of_scales.append((tap * weight.to(tap.dtype)).flatten(1).sum(1))
    if bias is None or offset is None:
        found = []
    else:
        of_scales[0] = of_scales[0] + offset * bias.to(offset.dtype)
        found = [(offset * scales[0].to(offset.dtype).flatten()).to(bias.dtype)]
    shaped = (
        each.reshape(scale.shape).to(scale.dtype)
        for each, scale in zip(of_scales, scales, strict=True)
    )
    return [*of_weights, *shaped, *found]
