"""The published layer in PyTorch, as a contender of `flash-wtconv bench wtconv`.

The benchmark finds this module by its entry point, so that nothing in `flash_wtconv_jax` imports
`torch_bridge`; `flash_wtconv_jax.bench.wtconv.RegisteredContender` documents what it offers.
"""

import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from pallas_kernels.wtconv.shapes import GPU_SHAPES

if TYPE_CHECKING:
    import jax

NAME = "torch eager"


def runs(dtype: str, *, on_cpu: bool) -> bool:
    """Whether PyTorch is installed and computes as JAX does: in float32 on a CPU.

    Example:
        >>> runs("bfloat16", on_cpu=True)
        False
    """
    return on_cpu and dtype == "float32" and find_spec("torch") is not None


def versions() -> dict[str, str]:
    """PyTorch's version."""
    import torch

    return {"torch": torch.__version__}


def calls(
    x: "jax.Array", params: "Mapping[str, jax.Array]", dy: "jax.Array"
) -> dict[str, Callable[[], object]]:
    """The layer's forward pass, and its forward and backward pass, on copies of the arrays.

    Args:
        x: `[N, *spatial, C]`.
        params: Parameters by name, as `pallas_kernels.wtconv.wtconv2d` takes them.
        dy: Gradient of the output, of x's shape.

    Returns:
        Calls that block until done, by direction: "forward" and "forward+backward".
    """
    import torch

    from torch_bridge.exchange import from_jax

    layer = from_jax({"params": params})
    signal, gradient = (
        torch.tensor(np.asarray(array)).movedim(-1, 1).contiguous() for array in (x, dy)
    )
    leaf = signal.clone().requires_grad_()

    def forward() -> None:
        with torch.no_grad():
            layer(signal)

    def both() -> None:
        layer.zero_grad()
        leaf.grad = None
        layer(leaf).backward(gradient)

    return {"forward": forward, "forward+backward": both}


def host_calls() -> dict[str, Callable[[], object]]:
    """A warm call of the layer for `flash-wtconv bench host`; none where PyTorch is not installed.

    Example:
        >>> sorted(host_calls())
        ['torch WTConv2d', 'torch WTConv2d, choice alone']
    """
    if find_spec("torch") is None:
        return {}
    import torch

    import torch_bridge
    from torch_bridge.wtconv import ops

    x = torch.ones(1, 8, 4, 4)
    layer = torch_bridge.WTConv2d(8, 8, 3, wt_levels=2, device="cpu")

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    shape, dtype = tuple(x.shape), x.dtype

    def choice() -> None:
        ops.pick(None, x.device, shape, dtype, 3, 2, "db1", True, x.stride())

    return {"torch WTConv2d": forward, "torch WTConv2d, choice alone": choice}


def bench_parts() -> list[tuple[str, tuple[str, ...], str, str]]:
    """The parts that `flash-wtconv bench all` makes of this package, a shape and dtype each.

    Returns:
        As `flash_wtconv_jax.bench.everything.Part` has them; none without PyTorch.

    Example:
        >>> [(name, group) for name, _, _, group in bench_parts()][:1]
        [('torch_float32_convnext_t_stage1', 'torch_float32')]
    """
    if find_spec("torch") is None:
        return []
    command = sys.executable, "-m", "torch_bridge", "bench", "--device", "cuda", "--dtype"
    return [
        (
            f"torch_{dtype}_{name}",
            (*command, dtype, "--shape", name),
            "torch_wtconv.json",
            f"torch_{dtype}",
        )
        for dtype in ("float32", "bfloat16")
        for name in GPU_SHAPES
    ]
