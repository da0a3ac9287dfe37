"""The instance normalisation on GPUs: the kernels that JAX launches too.

They read channels last. Channels first, each channel of each image is an image of one channel.
"""

import torch
from torch import Tensor

from pallas_kernels.stylize.problem import Problem
from torch_bridge.runtime.calls import channels_last
from torch_bridge.runtime.triton import launch, unavailable
from torch_bridge.stylize.eager import Known

__all__ = ["DIFFERENTIABLE", "backward", "check", "forward", "search_space", "unavailable"]

DIFFERENTIABLE = False


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` for a problem that these kernels do not compute.

    Args:
        direction: "fwd" or "bwd".
        problem: The call.
    """
    from pallas_kernels.stylize import triton_launches

    triton_launches.check(problem)


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The tiles that are worth timing, the default ones first; see `check`."""
    from pallas_kernels.stylize import triton_launches

    return triton_launches.search_space(direction, problem)


def forward(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    *,
    eps: float,
    relu: bool,
    **sizes: int,
) -> tuple[Tensor, Tensor]:
    """The norm and the statistics; see `ops` for the arguments.

    The sizes are those of `triton_launches.Tiles`.
    """
    from pallas_kernels.stylize import triton_launches

    tiles = triton_launches.Tiles(**sizes) if sizes else None
    last = channels_last(x.stride())
    with torch.cuda.device_of(x):
        y, statistics = triton_launches.forward(
            read_images(x, last),
            of_groups(scale, last),
            of_groups(bias, last),
            None if residual is None else read_images(residual, last),
            eps,
            "relu" if relu else None,
            tiles,
            launch,
        )
    n, c, *_ = x.shape
    rows = statistics if last else statistics.view(n, c, 3).transpose(1, 2).contiguous()
    return _as_images(y, x, last), rows


def backward(known: Known, dy: Tensor, *, relu: bool, **sizes: int) -> list[Tensor]:
    """The gradients; see `ops` for the arguments, and `forward` for the sizes."""
    from pallas_kernels.stylize import triton_launches

    x, statistics, scale, bias, residual = known
    tiles = triton_launches.Tiles(**sizes) if sizes else None
    last = channels_last(x.stride())
    n, c, *_ = x.shape
    rows = statistics if last else statistics.transpose(1, 2).reshape(n * c, 3, 1)
    with torch.cuda.device_of(x):
        dx, dscale, dbias, dresidual = triton_launches.backward(
            read_images(x, last),
            rows.contiguous(),
            of_groups(scale, last),
            of_groups(bias, last),
            None if residual is None else read_images(residual, last),
            read_images(dy, last),
            "relu" if relu else None,
            tiles,
            launch,
        )
    found = [_as_images(dx, x, last), dscale.view(n, c), dbias.view(n, c)]
    return found if dresidual is None else [*found, _as_images(dresidual, x, last)]


def read_images(x: Tensor, last: bool) -> Tensor:
    """`[N, C, H, W]` as the kernels read it: `[N, H, W, C]`, or `[N * C, H, W, 1]`, contiguous.

    Args:
        x: The images.
        last: Whether they are read channels last.
    """
    if last:
        return x.permute(0, 2, 3, 1).contiguous()
    return x.contiguous().flatten(0, 1).unsqueeze(-1)


def _as_images(y: Tensor, x: Tensor, last: bool) -> Tensor:
    """The output of a kernel for images like x as `[N, C, H, W]`."""
    return y.permute(0, 3, 1, 2) if last else y.view(x.shape)


def of_groups(value: Tensor, last: bool) -> Tensor:
    """Parameters `[N, C]` as the kernels read them, contiguous.

    Args:
        value: The parameters.
        last: Whether the images are read channels last.
    """
    # Of one image `reshape` makes a view, whatever the strides.
    return (value if last else value.reshape(-1, 1)).contiguous()
