"""The tuner's measurement in PyTorch: implementations run and timed on random tensors."""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pallas_kernels.common import versions
from pallas_kernels.common.types import Json, Tree
from pallas_kernels.dispatch.backend import Implementation
from pallas_kernels.dispatch.cache import Entry
from pallas_kernels.dispatch.tuner import TuningParams
from torch_bridge.runtime.calls import dtype_name, without_autocast
from torch_bridge.runtime.device import kind, synchronize

if TYPE_CHECKING:
    import numpy as np

Draw = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""A function that draws a tensor of normally distributed values."""

_AT_ONCE_MS = 10
_MOST_AT_ONCE = 50
"""Milliseconds of calls of an accelerator that are timed together, and their greatest number."""
_PAUSES = 1, 2, 4, 8, 16
_PAUSE_SIZE = 4096


class TorchMeasurement:
    """One direction of one call of an operator: a `dispatch.tuner.Measurement`.

    It never reads the call's own tensors, which have no values where a program is traced. Each
    process measures for itself: processes of PyTorch run their own programs, which need not agree.

    Args:
        run: Calls an implementation with its parameters on what `inputs` returns; gives tensors.
        inputs: Draws the tensors of a call.
        device: The device of the tensors.
        reference: The implementation that is right, with its own defaults.
        static: The arguments that times depend on besides the problem.
        measurable: Whether the call's sizes are known.
    """

    def __init__(
        self,
        run: Callable[..., Iterable[Tensor]],
        inputs: Callable[[Draw], tuple[Tree, ...]],
        device: torch.device,
        reference: Implementation,
        static: Json,
        measurable: bool,
    ) -> None:
        self._run = run
        self._inputs = inputs
        self._device = device
        self._reference = reference
        self.device_kind = kind(device)
        self.static = static
        # PyTorch names CUDA's version in its own.
        self.versions: Mapping[str, str] = {
            "flash-wtconv": versions.package(),
            "torch": torch.__version__,
        }
        self._measurable = measurable

    def from_process_0(self, question: str, answer: Callable[[], str]) -> str:
        """This process's own answer."""
        return answer()

    def untimeable(self) -> str | None:
        """The reason why nothing can be timed: no values, or a CUDA graph that would record it."""
        if self._device.type == "meta":
            return "tensors on the device 'meta' have no values"
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is being captured; call the layer once before"
        if not self._measurable:
            return "this PyTorch does not tell the sizes of a traced program"
        return None

    def interpreting(self, names: Iterable[str]) -> bool:
        """Whether Triton's interpreter is to run "triton"."""
        return "triton" in names and os.environ.get("TRITON_INTERPRET") == "1"

    def untraced(self, search: Callable[[], Entry]) -> Callable[[], Entry]:
        """The search without gradients and `autocast`, whatever thread runs it."""

        @torch.no_grad()
        def run() -> Entry:
            with without_autocast(self._device):
                return search()

        return run

    def prepared(self, module: Implementation, config: TuningParams) -> Callable[[], Tree]:
        """A call that enqueues its work, and returns its tensors."""
        return lambda: self._run(module, config, *self._tensors)

    def milliseconds(self, call: Callable[[], Tree]) -> float:
        """The time of a call, by CUDA's events where there are any, else by the host's clock.

        On an NVIDIA GPU several calls are enqueued behind other work, so that their launches are
        not timed; if the other work ended before all were enqueued, there is more of it the next
        time, up to a limit. On an Apple GPU, calls are waited for together.
        """
        one = self._waited(call, 1)
        if self._device.type == "cpu":
            return one
        times = min(_MOST_AT_ONCE, max(1, round(_AT_ONCE_MS / one)))
        if self._device.type != "cuda":
            return self._waited(call, times)
        with torch.cuda.device(self._device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for pauses in _PAUSES:
                for _ in range(pauses):
                    torch.mm(self._matrix, self._matrix)
                start.record()
                for _ in range(times):
                    call()
                end.record()
                late = start.query()
                end.synchronize()
                if not late:
                    break
            return start.elapsed_time(end) / times

    def arrays(self, result: Tree) -> "list[tuple[str, np.ndarray]]":
        """The tensors of a result on the host with their dtypes, since NumPy has no bfloat16."""
        return [
            (
                dtype_name(tensor.dtype),
                (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy(),
            )
            for tensor in result
        ]

    def reference(self) -> "list[tuple[str, np.ndarray]]":
        """The results of the reference on the same tensors."""
        return self.arrays(self.prepared(self._reference, ())())

    def _waited(self, call: Callable[[], Tree], times: int) -> float:
        """Milliseconds of each of some calls that the host waits for together."""
        synchronize(self._device)
        start = time.perf_counter()
        for _ in range(times):
            call()
        synchronize(self._device)
        return (time.perf_counter() - start) * 1e3 / times

    @cached_property
    def _tensors(self) -> tuple[Tree, ...]:
        generator = torch.Generator(self._device).manual_seed(0)

        def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.randn(shape, dtype=dtype, device=self._device, generator=generator)

        return self._inputs(draw)

    @cached_property
    def _matrix(self) -> Tensor:
        """A matrix whose square takes a GPU some milliseconds."""
        return torch.zeros(_PAUSE_SIZE, _PAUSE_SIZE, device=self._device)
