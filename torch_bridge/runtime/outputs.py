"""The outputs of a launch, allocated as PyTorch does."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pallas_kernels.common.types import Output


def allocated(outputs: Sequence[Output], arguments: Sequence[Tensor | int | None]) -> list[Tensor]:
    """Tensors that hold anything, for a kernel to write.

    Args:
        outputs: A shape and a dtype, or its name, of each; and its strides if it is not contiguous.
        arguments: Those of the kernel, of which the tensors are on one device: that of the outputs.

    Example:
        >>> [t.shape for t in allocated([((2, 3), "float32")], [4, torch.zeros(1)])]
        [torch.Size([2, 3])]
    """
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    made = []
    for shape, dtype, *strides in outputs:
        dtype = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
        if strides:
            made.append(torch.empty_strided(shape, *strides, dtype=dtype, device=device))
        else:
            made.append(torch.empty(shape, dtype=dtype, device=device))
    return made
