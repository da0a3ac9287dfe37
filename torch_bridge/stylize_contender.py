"""TransformerNet in plain PyTorch, as a contender of `flash-wtconv bench stylize`.

The benchmark finds this module by its entry point, so that nothing in `flash_wtconv_jax` imports
`torch_bridge`; `flash_wtconv_jax.bench.stylize.RegisteredContender` documents what it offers.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from flash_wtconv_jax.bench.timing import Spread
from pallas_kernels.common.types import Tree

if TYPE_CHECKING:
    from torch import Tensor

_RATE = 1e-3
"""Adam's rate."""


def runs(dtype: str, *, on_cpu: bool) -> bool:
    """Whether PyTorch is installed and computes where JAX does: on a CPU in float32, on a GPU.

    Example:
        >>> runs("bfloat16", on_cpu=True)
        False
    """
    if find_spec("torch") is None:
        return False
    import torch

    return dtype == "float32" if on_cpu else torch.cuda.is_available()


def versions() -> dict[str, str]:
    """PyTorch's version, where it is installed."""
    if find_spec("torch") is None:
        return {}
    import torch

    return {"torch": torch.__version__}


def times(
    parameters: Mapping[str, np.ndarray], images: np.ndarray, dtype: str, *, training: bool
) -> dict[str, Spread | str]:
    """Times of the network, as it is and, on a GPU, compiled.

    Args:
        parameters: The network's by name, as PyTorch's example has them; they stay float32.
        images: `[N, H, W, 3]` in float32.
        dtype: Dtype of the computation. TF32 is off.
        training: Whether it takes steps with Adam on the mean square that the output is off the
            input, or infers.

    Returns:
        Times, or why there are none, of "torch eager" and, on a GPU, "torch compiled" and "torch
        compiled channels-last".
    """
    import torch

    from torch_bridge.bench import take_turns

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    own = {name: torch.tensor(value, device=device) for name, value in parameters.items()}
    x = torch.tensor(images, device=device).permute(0, 3, 1, 2).to(getattr(torch, dtype))
    found: dict[str, Spread | str] = {}
    contiguous, last = torch.contiguous_format, torch.channels_last
    forms: dict[str, tuple[Callable[..., torch.Tensor], torch.memory_format]] = {
        "torch eager": (network, contiguous)
    }
    if device.type == "cuda":
        # For this size alone: what PyTorch has compiled for another it would make for any.
        torch.compiler.reset()
        compiled = torch.compile(network, dynamic=False)
        forms["torch compiled"] = compiled, contiguous
        forms["torch compiled channels-last"] = compiled, last
    for name, (form, memory_format) in forms.items():
        call = (_step if training else _inference)(
            form, own, x.contiguous(memory_format=memory_format)
        )
        try:
            with _without_tf32():
                found |= take_turns(device, {name: call}, lambda steps: lambda: None)
        except torch.OutOfMemoryError:
            found[name] = "out of memory beside what JAX holds"
    return found


def network(parameters: "Mapping[str, Tensor]", x: "Tensor") -> "Tensor":
    """TransformerNet of images `[N, 3, H, W]`, by the names of PyTorch's example.

    Args:
        parameters: The network's.
        x: The images, in the dtype of the computation.
    """
    from torch.nn import functional

    def conv(name: str, x: "Tensor", stride: int = 1, upsample: int = 1) -> "Tensor":
        weight, bias = (parameters[f"{name}.conv2d.{n}"].to(x.dtype) for n in ("weight", "bias"))
        if upsample > 1:
            x = functional.interpolate(x, scale_factor=upsample)
        around = weight.shape[-1] // 2
        x = functional.pad(x, [around] * 4, mode="reflect")
        return functional.conv2d(x, weight, bias, stride)

    def norm(name: str, x: "Tensor") -> "Tensor":
        weight, bias = (parameters[f"{name}.{n}"].to(x.dtype) for n in ("weight", "bias"))
        return functional.instance_norm(x, weight=weight, bias=bias)

    for i, stride in enumerate((1, 2, 2), 1):
        x = functional.relu(norm(f"in{i}", conv(f"conv{i}", x, stride)))
    for i in range(1, 6):
        inner = functional.relu(norm(f"res{i}.in1", conv(f"res{i}.conv1", x)))
        x = x + norm(f"res{i}.in2", conv(f"res{i}.conv2", inner))
    for i in (1, 2):
        x = functional.relu(norm(f"in{i + 3}", conv(f"deconv{i}", x, upsample=2)))
    return conv("deconv3", x)


def _inference(
    form: "Callable[..., Tensor]", parameters: "Mapping[str, Tensor]", x: "Tensor"
) -> Callable[[], Tree]:
    import torch

    @torch.no_grad()
    def call() -> Tree:
        return form(parameters, x)

    return call


def _step(
    form: "Callable[..., Tensor]", parameters: "Mapping[str, Tensor]", x: "Tensor"
) -> Callable[[], Tree]:
    """A call that takes one step of training after the other."""
    import torch

    leaves = {name: value.clone().requires_grad_() for name, value in parameters.items()}
    optimizer = torch.optim.Adam(leaves.values(), lr=_RATE)

    def call() -> Tree:
        optimizer.zero_grad()
        loss = (form(leaves, x).float() - x.float()).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return call


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Products of float32 are full ones, as JAX is asked for; PyTorch's convolutions' are not."""
    import torch

    backends: tuple[Any, ...] = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, was in zip(backends, before, strict=True):
            backend.allow_tf32 = was
