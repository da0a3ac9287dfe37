"""The depthwise convolution layer for PyTorch, drop-in for `torch.nn.Conv2d`."""

from typing import cast

import torch
from torch import Tensor, nn

from pallas_kernels.common.types import Pair
from pallas_kernels.dispatch import Choice
from torch_bridge.depthwise import ops


class DepthwiseConv2d(nn.Conv2d):
    """`torch.nn.Conv2d` with as many groups as channels, on tensor cores in 16 bits.

    The parameters and the state dict are those of PyTorch's layer.

    Args:
        channels: Number of channels.
        kernel_size: Size of the kernel.
        stride: As PyTorch's layer takes it.
        padding: Likewise; "same" keeps the size.
        dilation: Likewise.
        bias: Whether there is one.
        device: Of the parameters.
        dtype: Of the parameters.
        implementation: Filter on the implementations, see `ops.depthwise_conv2d`.

    Raises:
        ValueError: An unknown implementation, or an argument that PyTorch's layer refuses.

    Example:
        >>> layer = DepthwiseConv2d(4, 7)
        >>> layer(torch.zeros(1, 4, 9, 8)).shape, layer.weight.shape
        (torch.Size([1, 4, 9, 8]), torch.Size([4, 1, 7, 7]))
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: str | int | Pair = "same",
        dilation: int | Pair = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        implementation: Choice = None,
    ) -> None:
        super().__init__(
            *(channels, channels, kernel_size, stride, padding, dilation, channels, bias),
            device=device,
            dtype=dtype,
        )
        ops.OPERATOR.check_names(implementation)
        self.implementation = implementation

    def forward(self, x: Tensor) -> Tensor:
        """Convolves each channel by a kernel of its own.

        Args:
            x: `[N, channels, H, W]` or `[channels, H, W]`, of any strides, in the weight's dtype.

        Returns:
            `[N, channels, H_out, W_out]`.
        """
        return ops.depthwise_conv2d(
            x,
            self.weight,
            self.bias,
            cast(Pair, self.stride),
            cast("str | Pair", self.padding),
            cast(Pair, self.dilation),
            implementation=self.implementation,
        )
