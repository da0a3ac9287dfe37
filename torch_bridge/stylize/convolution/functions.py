"""Convolutions with their norm as functions: validate, pick, call."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pallas_kernels.common.types import Keywords
from pallas_kernels.dispatch import Choice
from pallas_kernels.oracle import conv2d_pads, reflects
from pallas_kernels.oracle.conv2d import Padding
from torch_bridge.runtime import calls
from torch_bridge.stylize import ops as norm
from torch_bridge.stylize.convolution import eager, ops
from torch_bridge.stylize.convolution.eager import Padded

Branch = tuple[Tensor, Tensor | None, Tensor | None]
"""The filters of a convolution, and the scale and bias of the norm behind."""


def conv2d_instance_norm(
    x: Tensor,
    w: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    upsample: int = 1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Tensor | None = None,
    implementation: Choice = None,
) -> Tensor:
    """A dense convolution of images, and the instance norm of its output.

    Triton's convolution leaves the mean and the squared deviations of each of its tiles; they are
    added in a fixed order, and one pass normalises. A bias of the convolution would cancel, so
    there is none. Saved for the backward pass are x, w, the convolution's output, its statistics,
    scale and bias, and with an activation the residual.

    Args:
        x: `[N, C, H, W]` of any strides; float16, bfloat16, float32 or float64.
        w: Filters `[NF, C, HF, WF]`, of x's dtype.
        scale: `[NF]`, or of each image its own, `[N, NF]`; None is 1.
        bias: The same; None is 0.
        stride: The stride of the output, an int or one for H and one for W.
        padding: Zeros around the image: an int, one for H and one for W, `((top, bottom), (left,
            right))`, "VALID" or "SAME"; "reflect" mirrors as many samples as keep the size, and
            `("reflect", numbers)` so many.
        upsample: 2 repeats each pixel of the images as four before they are padded and convolved.
        eps: Is added to the variance.
        activation: None or "relu".
        residual: Is added before the activation; of the output's shape and x's dtype, or None.
        implementation: Filter on the implementations, "triton" and "eager", PyTorch's own
            operations; None takes the fastest known for the device, or PyTorch's convolution with
            the norm that `FusedInstanceNorm2d` would take.

    Returns:
        `[N, NF, H_out, W_out]` of x's dtype and memory format.

    Raises:
        ValueError: A bad argument: which, what came, and what was expected.
        NotImplementedError: No allowed implementation can run here; says why for each.

    Example:
        >>> x, w = torch.randn(2, 4, 9, 8), torch.randn(16, 4, 3, 3)
        >>> conv2d_instance_norm(x, w, stride=2, padding="reflect", activation="relu").shape
        torch.Size([2, 16, 5, 4])
    """
    _check(x, w, upsample, activation)
    if upsample == 2:
        x = functional.interpolate(x, scale_factor=2.0)
    window = _window(x, w, stride, padding)
    n, nf = x.shape[0], w.shape[0]
    _check_norm(x, w, window, scale, bias, residual)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    relu = activation == "relu"
    shape, strides = calls.known(x)
    filters = tuple(map(calls.number, w.shape))
    chosen = calls.static(implementation)
    fwd = ops.pick(
        chosen,
        x.device,
        shape,
        strides,
        filters,
        x.dtype,
        (window.stride, window.pads, window.reflect),
        relu,
        residual is not None,
    )
    if calls.names([fwd]) == ["eager"]:
        z = eager.convolution(x, w, window)
        named = None if chosen is None else "eager"
        rest: Keywords = {"eps": eps, "activation": activation, "residual": residual}
        return norm.instance_norm(z, scale, bias, implementation=named, **rest)
    defaults = (x.new_full((nf,), value, dtype=dtype) for value in (1.0, 0.0))
    factor, shift = (
        (default if value is None else value.to(dtype)).expand(n, nf)
        for value, default in zip((scale, bias), defaults, strict=True)
    )
    # What computes the norm's backward pass, of an output that nobody has made yet.
    output = ops.output_size(shape, filters, window)
    found = norm.pick(None, x.device, output, x.dtype, strides, relu, residual is not None)
    y, _, _ = ops.apply(
        *(x, w, factor, shift, residual),
        *(window.stride, window.pads, window.reflect, eps, relu, fwd, found[1]),
    )
    return y


def residual_block(
    x: Tensor,
    first: Branch,
    second: Branch,
    *,
    padding: Padding = "reflect",
    eps: float = 1e-5,
    implementation: Choice = None,
) -> Tensor:
    """Convolution, norm, ReLU, convolution, norm, and x added; no ReLU behind.

    Args:
        x: `[N, C, H, W]` of any strides.
        first: Filters `[C, C, HF, WF]`, scale and bias of the first convolution and norm.
        second: Those of the second.
        padding: Of both convolutions, as `conv2d_instance_norm` takes it; it keeps the size.
        eps: Is added to both variances.
        implementation: As `conv2d_instance_norm` takes it.

    Returns:
        A tensor of x's shape, dtype and memory format.

    Raises:
        ValueError: A bad argument: which, what came, and what was expected.
        NotImplementedError: No allowed implementation can run here; says why for each.

    Example:
        >>> branch = torch.randn(4, 4, 3, 3), torch.ones(4), None
        >>> residual_block(torch.randn(2, 4, 9, 8), branch, branch).shape
        torch.Size([2, 4, 9, 8])
    """
    for name, branch in (("first", first), ("second", second)):
        if not isinstance(branch, tuple | list) or len(branch) != 3:
            raise ValueError(
                f"{name}: expected (filters, scale, bias), got {type(branch).__name__}"
            )
    rest: Keywords = {"padding": padding, "eps": eps, "implementation": implementation}
    inner = conv2d_instance_norm(x, *first, activation="relu", **rest)
    if inner.shape != x.shape:
        raise ValueError(
            f"padding={padding!r}: expected one that keeps the size of x, {tuple(x.shape)}; the "
            f"first convolution made {tuple(inner.shape)} of it"
        )
    return conv2d_instance_norm(inner, *second, residual=x, **rest)


def _check(x: Tensor, w: Tensor, upsample: int, activation: str | None) -> None:
    """Raises ValueError where the convolution cannot be one."""
    if activation not in (None, "relu"):
        raise ValueError(f"activation={activation!r}: expected None or 'relu'")
    if upsample not in (1, 2):
        raise ValueError(f"upsample={upsample!r}: expected 1 or 2")
    if x.ndim != 4 or 0 in x.shape[1:] or not x.is_floating_point():
        raise ValueError(
            f"x: expected floating-point images [N, C, H, W] of at least one pixel, got shape "
            f"{tuple(x.shape)} of {x.dtype}"
        )
    if w.ndim != 4 or w.shape[1] != x.shape[1] or 0 in w.shape:
        raise ValueError(
            f"w: expected filters [NF, C, HF, WF] of the {x.shape[1]} channels of x, got shape "
            f"{tuple(w.shape)}"
        )
    if w.dtype != x.dtype:
        raise ValueError(f"w: expected x's dtype, {x.dtype}, got {w.dtype}; cast one of them")


def _window(x: Tensor, w: Tensor, stride: int | Sequence[int], padding: Padding) -> Padded:
    """Which samples are read, of images that are upsampled already."""
    steps = (stride, stride) if isinstance(stride, int) else tuple(stride)
    if len(steps) != 2 or not all(isinstance(step, int) and step > 0 for step in steps):
        raise ValueError(f"stride={stride!r}: expected an integer from 1 on, or two of them")
    (height, width), (down, across) = x.shape[2:], w.shape[2:]
    try:
        rows, columns = conv2d_pads(padding, (height, width), (down, across), steps, (1, 1))
        pads = *columns, *rows
        known = all(isinstance(pad, int) and pad >= 0 for pad in pads)
    except (KeyError, TypeError, ValueError):
        known = False
    if not known:
        raise ValueError(
            f"padding={padding!r}: expected an int, one for H and one for W, ((top, bottom), "
            "(left, right)), ('reflect', any of these), 'SAME', 'VALID' or 'reflect'"
        )
    for n, k, around, axis in zip(
        (height, width), (down, across), (rows, columns), "HW", strict=True
    ):
        if reflects(padding) and max(around) >= n:
            raise ValueError(
                f"padding={padding!r}: mirroring {max(around)} samples along {axis} takes an image "
                f"of more than those, got {n}"
            )
        if n + sum(around) < k:
            raise ValueError(
                f"w: filters of {down}x{across} taps do not fit into images of {height}x{width} "
                f"padded by {rows} and {columns}"
            )
    return Padded((steps[0], steps[1]), pads, reflects(padding))


def _check_norm(
    x: Tensor,
    w: Tensor,
    window: Padded,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    """Raises ValueError where what stands behind the convolution does not fit it."""
    n, nf = x.shape[0], w.shape[0]
    for name, value in (("scale", scale), ("bias", bias)):
        if value is not None and tuple(value.shape) not in ((nf,), (n, nf)):
            raise ValueError(
                f"{name}: expected shape {(nf,)}, one a filter, or {(n, nf)}, one of each image "
                f"its own, got {tuple(value.shape)}"
            )
    size = ops.output_size(tuple(x.shape), tuple(w.shape), window)
    if residual is not None and (tuple(residual.shape), residual.dtype) != (size, x.dtype):
        raise ValueError(
            f"residual: expected the output's shape and dtype, {size} {x.dtype}, got "
            f"{tuple(residual.shape)} {residual.dtype}"
        )
