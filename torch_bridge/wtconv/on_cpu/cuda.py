"""Runs CUDA kernels on the CPU, as the implementation "cuda" of an operator launches them."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any
from unittest.mock import patch

from torch import Tensor

from pallas_kernels.common.cuda import Box, Device, Kernel
from pallas_kernels.common.on_cpu.cuda import HOPPER, Launcher, tensor_map
from pallas_kernels.common.on_cpu.cuda import unavailable as unavailable
from pallas_kernels.common.types import Output
from torch_bridge.runtime.cuda import outputs_of
from torch_bridge.wtconv import cuda as cuda_launch


@contextmanager
def emulated(
    device: Device = HOPPER, room: ModuleType = cuda_launch, **options: Any
) -> Iterator[Launcher]:
    """Lets the implementation "cuda" take tensors of the CPU, and launch there.

    Args:
        device: The properties of a GPU that variants are chosen by.
        room: The module of the implementation; that of WTConv unless told.
        **options: Arguments of `pallas_kernels.common.on_cpu.cuda.Launcher`.

    Yields:
        The launcher.

    Raises:
        RuntimeError: From a launch whose source does not compile, or in which not all threads of a
            block reach a barrier.

    Example:
        >>> import torch, torch_bridge
        >>> layer = torch_bridge.WTConv2d(1, 1, 3, device="cpu", implementation="cuda")
        >>> if unavailable() is None:
        ...     with emulated():
        ...         assert layer(torch.ones(1, 1, 4, 4)).isfinite().all()
    """
    with TemporaryDirectory() as folder:
        launcher = Launcher(Path(folder), **options)

        def launch(
            kernel: Kernel,
            arguments: Sequence[Tensor | int | None],
            outputs: Sequence[Output],
            blocks: int,
        ) -> list[Tensor]:
            made = outputs_of(kernel, arguments, outputs)
            if kernel.in_place is None:
                for tensor in made:
                    tensor.fill_(float("nan") if tensor.is_floating_point() else -1)
            values = [
                a if isinstance(a, int) else _pointer(a, kernel.box(number))
                for number, a in enumerate((*arguments, *made))
            ]
            launcher.run(kernel, values, blocks)
            return made

        with patch.multiple(
            room,
            unavailable=lambda platform: None,
            device_of=lambda _: device,
            launch=launch,
        ):
            yield launcher


def _pointer(tensor: Tensor | None, box: Box | None) -> ctypes.c_void_p | ctypes.Structure:
    if tensor is not None and box is not None:
        return tensor_map(tensor.data_ptr(), tensor.shape, box, tensor.itemsize)
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
