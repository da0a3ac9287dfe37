"""spconv-triton, a library for PyTorch, as a contender of `flash-wtconv bench sparse`.

The benchmark finds this module by its entry point, so that nothing in `flash_wtconv_jax` imports
`torch_bridge`; `flash_wtconv_jax.bench.sparse.RegisteredContender` documents what it offers. The
library is no dependency: where its wheel is installed beside PyTorch it is timed. It is timed in a
process of its own, `python -m torch_bridge.spconv_contender`, since PyTorch waits for nothing that
JAX has enqueued.
"""

import importlib.metadata
import json
import subprocess
import sys
from importlib.util import find_spec

NAME = "spconv-triton"

_SECONDS = 240
"""Seconds after which it is stopped; it tunes its kernels first."""


def runs(dtype: str, *, platform: str) -> bool:
    """Whether it is installed and computes on a platform.

    Example:
        >>> runs("float16", platform="cpu")
        False
    """
    return platform == "gpu" and all(find_spec(name) for name in ("torch", "spconv_triton"))


def versions() -> dict[str, str]:
    """The versions of the library and of PyTorch."""
    names = "spconv-triton", "torch"
    return {name: importlib.metadata.version(name) for name in names}


def times(
    voxels: int, channels: int, features: int, kernel_size: int, dtype: str
) -> dict[str, list[float]]:
    """Times of a layer of stride 1 over the room, in milliseconds; its map is there before.

    Args:
        voxels: Of the room.
        channels: Of x.
        features: Of the output.
        kernel_size: Offsets along each axis.
        dtype: Of x and the weights; bfloat16 is timed in float16.

    Returns:
        The fields of a `flash_wtconv_jax.bench.timing.Spread`, by direction.

    Raises:
        RuntimeError: It failed, or took too long.
    """
    dtype = "float16" if dtype == "bfloat16" else dtype
    layer = json.dumps([voxels, channels, features, kernel_size, dtype])
    command = [sys.executable, "-m", "torch_bridge.spconv_contender", layer]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{NAME} took more than {_SECONDS} s for {layer}") from None
    if run.returncode != 0:
        why = (run.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"{NAME} failed for {layer}: {why}")
    found: dict[str, list[float]] = json.loads(run.stdout.splitlines()[-1])
    return found


def _timed(
    voxels: int, channels: int, features: int, kernel_size: int, dtype: str
) -> dict[str, list[float]]:
    """The result of `times`, in this process."""
    import torch
    from spconv_triton import pytorch as spconv

    from pallas_kernels.sparse.shapes import room
    from torch_bridge.bench import take_turns

    device, kind = torch.device("cuda"), getattr(torch, dtype)
    coords = torch.tensor(room(voxels), device=device)
    sizes = (coords[:, 1:].amax(0) + 1).tolist()
    # Layers of one key share a map: the first call makes it.
    layer = spconv.SubMConv3d(channels, features, kernel_size, bias=False, indice_key="room")
    layer = layer.to(device, kind)
    x = torch.randn(voxels, channels, device=device, dtype=kind).requires_grad_()
    given = spconv.SparseConvTensor(x.detach(), coords, sizes, 1)
    dy = torch.randn_like(layer(given).features)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return layer(given.replace_feature(x)).features

    def both() -> tuple[torch.Tensor, ...]:
        y = layer(given.replace_feature(x)).features
        return y, *torch.autograd.grad(y, [x, layer.weight], dy)

    calls = {"forward": forward, "forward+backward": both}
    found = take_turns(device, calls, lambda steps: lambda: None)
    return {direction: list(spread) for direction, spread in found.items()}


if __name__ == "__main__":
    print(json.dumps(_timed(*json.loads(sys.argv[1]))))
