"""Triton kernels in PyTorch: where they run, and their launch."""

import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pallas_kernels.common.refusals import compiling
from pallas_kernels.common.types import Output
from torch_bridge.runtime.outputs import allocated


def unavailable(platform: str) -> str | None:
    """The reason why these kernels cannot run: they need a GPU, unless interpreted, and Triton."""
    if platform != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs a GPU, this is {platform}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"needs Triton (the extra 'triton'): {error}"
    return None


def launch(
    kernel: Any,
    arguments: list[Tensor | int],
    outputs: Sequence[Output],
    grid: tuple[int, ...],
    **constants: object,
) -> list[Tensor]:
    """Launches a kernel, whose arguments are followed by its outputs; returns these."""
    made = allocated(outputs, arguments)
    with compiling("a Triton kernel"):
        kernel[grid](*arguments, *made, **constants)
    return made
