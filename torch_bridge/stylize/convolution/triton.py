"""The convolution and the pass behind it on GPUs: the kernels that JAX launches too."""

import torch
from torch import Tensor

from pallas_kernels.conv2d.problem import Window
from pallas_kernels.stylize.convolution.problem import Problem
from torch_bridge.runtime.calls import channels_last
from torch_bridge.runtime.triton import launch, unavailable
from torch_bridge.stylize.convolution.eager import Padded
from torch_bridge.stylize.triton import of_groups, read_images

__all__ = ["DIFFERENTIABLE", "check", "forward", "search_space", "unavailable"]

DIFFERENTIABLE = False


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` for a problem that one of the kernels does not compute.

    Args:
        direction: "fwd".
        problem: The call.
    """
    from pallas_kernels.conv2d import triton_launches as convolution
    from pallas_kernels.stylize import triton_launches as norm

    convolution.check(problem.convolution)
    convolution.check_moments(problem.shape[0])
    norm.check(problem.norm)


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The convolution's tiles that are worth timing, the default ones first; see `check`."""
    from pallas_kernels.conv2d import triton_launches

    return [{}, *triton_launches.search_space(problem.convolution)]


def forward(
    x: Tensor,
    w: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    *,
    window: Padded,
    eps: float,
    relu: bool,
    **sizes: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm, the convolution's output and its statistics; see `ops` for the arguments.

    The sizes are those of `pallas_kernels.common.tiles.TileConfig`.
    """
    from pallas_kernels.common.tiles import TileConfig
    from pallas_kernels.conv2d import triton_launches as convolution
    from pallas_kernels.stylize import triton_launches as norm

    last = channels_last(x.stride())
    of_window = _window(window, last)
    images = x.permute(0, 2, 3, 1).contiguous() if last else x.contiguous()
    filters = w.permute(2, 3, 1, 0).contiguous() if last else w.contiguous()
    config = TileConfig(**sizes) if sizes else None
    with torch.cuda.device_of(x):
        z, counts, mean, squares = convolution.forward_with_moments(
            *(images, filters, None, of_window, None, x.dtype, "ieee", config, launch)
        )
        n, nf = x.shape[0], w.shape[0]
        pixels = torch.tensor(counts, dtype=torch.float32, device=x.device)
        if not last:
            # Each channel of each image is an image of one channel.
            each = (one.transpose(1, 2).contiguous() for one in (mean, squares))
            mean, squares = (one.view(n * nf, -1, 1) for one in each)
        y, statistics = norm.normalise(
            z if last else z.view(n * nf, *z.shape[2:], 1),
            (pixels.expand(mean.shape[:2]).contiguous(), mean, squares),
            of_groups(scale, last),
            of_groups(bias, last),
            None if residual is None else read_images(residual, last),
            eps,
            "relu" if relu else None,
            launch,
        )
    if last:
        return y.permute(0, 3, 1, 2), z.permute(0, 3, 1, 2), statistics
    return y.view(z.shape), z, statistics.view(n, nf, 3).transpose(1, 2).contiguous()


def _window(window: Padded, last: bool) -> Window:
    """The window as the kernels' launches name it."""
    left, right, top, bottom = window.pads
    return Window(
        stride=window.stride,
        pads=((top, bottom), (left, right)),
        reflect=window.reflect,
        layout="nhwc_hwcf" if last else "nchw_fchw",
    )
