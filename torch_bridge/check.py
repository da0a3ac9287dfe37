"""`python -m torch_bridge check`: every implementation in PyTorch, against the oracle."""

import math
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from flash_wtconv_jax.checkpoints import from_torch
from flash_wtconv_jax.checkpoints.tensors import to_array, to_tensors
from flash_wtconv_jax.cli.check import AsJson, Implementations, Operators, narrowed, show
from pallas_kernels.common.conformance import Backend, run
from pallas_kernels.common.types import Json
from pallas_kernels.depthwise.cases import CASES as CONV_CASES
from pallas_kernels.dispatch import Operator, tuning
from pallas_kernels.sparse.cases import CASES as SPARSE_CASES
from pallas_kernels.sparse.depthwise.cases import CASES as DEPTHWISE_CASES
from pallas_kernels.stylize.cases import CASES as NORM_CASES
from pallas_kernels.wtconv.cases import CASES, Case
from torch_bridge.depthwise import conformance as depthwise_conformance
from torch_bridge.depthwise import ops as depthwise
from torch_bridge.exchange import from_jax
from torch_bridge.runtime.conformance import refusal as refused
from torch_bridge.runtime.device import best_device
from torch_bridge.sparse import conformance
from torch_bridge.sparse import operators as sparse
from torch_bridge.stylize import conformance as norm_conformance
from torch_bridge.stylize import ops as stylize
from torch_bridge.wtconv import ops
from torch_bridge.wtconv.layers import LAYERS
from torch_bridge.wtconv.metal import has_bfloat16
from torch_bridge.wtconv.on_cpu import cuda, metal

IMPLEMENTATIONS = tuple(map(str, ops.Implementation))
"""The names that `--implementation` takes; those that run on the CPU too are checked there too."""
Room = tuple[Operator, Sequence[Any], Any]
"""An operator, its cases, and the module `conformance` that computes them."""
OTHERS: dict[str, Room] = {
    "depthwise": (depthwise.OPERATOR, CONV_CASES, depthwise_conformance),
    "instance_norm": (stylize.OPERATOR, NORM_CASES, norm_conformance),
    "sparse_conv": (sparse.OPERATOR, SPARSE_CASES, conformance),
    "sparse_depthwise_conv": (sparse.DEPTHWISE, DEPTHWISE_CASES, conformance),
}
"""The operators that are functions, which have no layer with a published state dict."""
OPERATORS = ("wtconv", *OTHERS)
"""The names that `--operator` takes."""


def check(
    operator: Operators = None, implementation: Implementations = None, as_json: AsJson = None
) -> None:
    """Compute the shared cases with every implementation that this machine has; 1 if one fails."""
    names = narrowed("--operator", operator, OPERATORS)
    implementations = narrowed("--implementation", implementation, IMPLEMENTATIONS)
    device = best_device()
    machine = about(device)
    # A named implementation has parameters, which nobody waits for here to be measured.
    with tuning("off"):
        rows = _rows(names, device, implementations)
        show(rows, machine, f"PyTorch, {machine['device']['kind']}", as_json)


def _rows(
    names: Sequence[str], device: torch.device, implementations: Sequence[str]
) -> Iterator[Json]:
    """The rows of operators."""
    for name in names:
        if name == "wtconv":
            # As the published layer computes, every array in x's dtype.
            plain = partial(layer_results, "eager", device, torch.contiguous_format)
            found = run(backends(device, implementations), plain)
        else:
            _, _, module = OTHERS[name]
            rows = other_backends(OTHERS[name], device, implementations)
            found = run(rows, partial(module.baseline, device=device))
        yield from ({"operator": name, **row} for row in found)


def about(device: torch.device) -> Json:
    """The device and the versions of Python and PyTorch, on which results depend."""
    return {
        "device": {"platform": device.type, "kind": _kind(device)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def _kind(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {platform.system()}"


def backends(
    device: torch.device, implementations: Sequence[str] = IMPLEMENTATIONS
) -> Iterator[Backend]:
    """Yields implementations on a device, and some on the CPU too; images in both memory formats.

    Args:
        device: Where they compute.
        implementations: Names of those that are asked for.
    """
    for name, reason in ops.OPERATOR.status(device.type):
        if name in implementations:
            yield from _both_formats(name, name, reason, device, nullcontext)
    for name, room in (("cuda", cuda), ("metal", metal)):
        if name in implementations:
            cpu = torch.device("cpu"), room.emulated
            yield from _both_formats(f"{name} on CPU", name, room.unavailable(), *cpu)


def other_backends(
    room: Room,
    device: torch.device,
    implementations: Sequence[str] = IMPLEMENTATIONS,
) -> Iterator[Backend]:
    """Yields implementations of an operator on a device.

    Args:
        room: The operator, its cases, and what computes them.
        device: Where they compute.
        implementations: Names of those that are asked for.
    """
    operator, cases, module = room

    def refusal(name: str, reason: str | None, case: Any) -> str | None:
        return reason or module.refusal(case, name, device)

    def compute(name: str, case: Any) -> dict[str, np.ndarray]:
        return module.computed(case, name, device)

    for name, reason in operator.status(device.type):
        if name in implementations:
            yield Backend(name, cases, partial(refusal, name, reason), partial(compute, name))


def _both_formats(
    title: str,
    name: str,
    reason: str | None,
    device: torch.device,
    context: Callable[[], AbstractContextManager],
) -> Iterator[Backend]:
    """An implementation, which is unavailable for a reason, where it computes in a context."""

    def refusal(case: Case) -> str | None:
        with context():
            return _refusal(name, reason, device, case)

    def compute(memory_format: torch.memory_format, case: Case) -> dict[str, np.ndarray]:
        with context():
            return layer_results(name, device, memory_format, case)

    images = [case for case in CASES if case.ndim == 2 and not case.strided]
    for suffix, cases, memory_format in (
        ("", CASES, torch.contiguous_format),
        (" channels-last", images, torch.channels_last),
    ):
        yield Backend(f"{title}{suffix}", cases, refusal, partial(compute, memory_format))


def _refusal(name: str, unavailable: str | None, device: torch.device, case: Case) -> str | None:
    """The reason that `check` gives why an implementation does not take a case."""
    if unavailable is not None:
        return unavailable
    if device.type == "mps" and case.dtype == "bfloat16" and not has_bfloat16():
        return "MPS has bfloat16 from macOS 14 on"
    shape = (math.prod(case.batch), case.channels, *case.spatial)
    dtype = getattr(torch, case.dtype)
    call = shape, dtype, case.kernel_size, case.levels, case.wavelet
    return refused(case, name, device, ops.pick, *call)


def layer_results(
    name: str, device: torch.device, memory_format: torch.memory_format, case: Case
) -> dict[str, np.ndarray]:
    """Output and gradients of the layer of a case by one implementation.

    Args:
        name: The implementation.
        device: Where it computes.
        memory_format: Of x and dy, where the case does not ask for other strides.
        case: What is computed.

    Returns:
        Arrays by the names of `pallas_kernels.common.conformance`.

    Raises:
        ValueError: The output is not in the memory format of x.
    """
    values, params, dvalues = case.drawn()
    x, dy = (
        _signal(value, case, device).contiguous(memory_format=memory_format)
        for value in (values, dvalues)
    )
    if case.strided:
        x, dy = (torch.stack([t, t], -1).flatten(-2)[..., ::2] for t in (x, dy))
    layer = LAYERS[case.ndim](
        case.channels,
        case.channels,
        case.kernel_size,
        case.stride,
        case.bias,
        case.levels,
        case.wavelet,
        device,
        x.dtype,
        name,
    )
    from_jax({"params": params}, layer, wavelet=case.wavelet)
    x.requires_grad_()
    # Or plain PyTorch rounds the factors of a convolution to 10 bits on a GPU.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        y = layer(x)
        y.backward(dy)
    # On a GPU plain PyTorch has no channels-last convolution of float64.
    native = name == "eager" and device.type == "cuda" and case.dtype == "float64"
    if not native and y.numel() and not y.is_contiguous(memory_format=memory_format):
        raise ValueError(f"y has strides {y.stride()}, those of x are {x.stride()}")
    found = layer.state_dict(keep_vars=True)
    grads = {n: value if value.grad is None else value.grad for n, value in found.items()}
    dparams = from_torch(grads, "published", wavelet=case.wavelet)["params"]
    return {"y": _array(y, case), "dx": _array(cast(Tensor, x.grad), case), **dparams}


def _signal(value: np.ndarray, case: Case, device: torch.device) -> Tensor:
    """`[*batch, *spatial, C]` as `[N, C, *spatial]`."""
    x = to_tensors({"x": value})["x"].to(device)
    return x.reshape(-1, *x.shape[-1 - case.ndim :]).movedim(-1, 1)


def _array(value: Tensor, case: Case) -> np.ndarray:
    """`[N, C, *spatial]` as `[*batch, *spatial, C]`."""
    last = value.movedim(1, -1)
    return to_array(last.reshape(*case.batch, *last.shape[1:]))
