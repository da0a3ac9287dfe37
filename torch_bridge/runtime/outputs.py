"""The outputs of a launch, allocated as PyTorch does."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pallas_kernels.common.types import Output


def allocated(outputs: Sequence[Output], device: torch.device) -> list[Tensor]:
    """Tensors that hold anything, for a kernel to write.

    Args:
        outputs: A shape and a dtype, or its name, of each; and its strides if it is not contiguous.
        device: Where they are.

    Example:
        >>> [t.shape for t in allocated([((2, 3), "float32")], torch.device("cpu"))]
        [torch.Size([2, 3])]
    """
    made = []
    for shape, dtype, *strides in outputs:
        dtype = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
        if strides:
            made.append(torch.empty_strided(shape, *strides, dtype=dtype, device=device))
        else:
            made.append(torch.empty(shape, dtype=dtype, device=device))
    return made
