"""JAX's side of `dispatch`: requests, and implementations run and timed on arrays of its own."""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property

import jax
import numpy as np

from pallas_kernels.common import device, triton, versions
from pallas_kernels.common._compat import (
    from_process_0,
    interpreted_by,
    interpreter,
    interpreting_tpu,
)
from pallas_kernels.common.types import Json, Tree
from pallas_kernels.dispatch import Choice, Operator, Request
from pallas_kernels.dispatch.backend import Implementation
from pallas_kernels.dispatch.cache import Entry
from pallas_kernels.dispatch.tuner import TuningParams

_AT_ONCE_MS = 10
_MOST_AT_ONCE = 20
"""Milliseconds, and the number, of an accelerator's calls that are timed together."""
_PAUSES = 1, 2, 4, 8
"""Programs that run before them: with the calls fewer than JAX keeps in a device's queue, 32."""
_PAUSE_SIZE, _PAUSE_STEPS = 2**25, 12
"""Numbers, 128 MB of them, and the error functions of each, of a pause of about a millisecond."""
_AGREEMENT_S = 600
"""Seconds that processes wait for the one that measures."""


def request(operator: Operator, direction: str, implementation: Choice) -> Request:
    """A request of an operator on the device that a call is traced for.

    Args:
        operator: The operator.
        direction: One of its directions.
        implementation: Filter on its implementations.

    Returns:
        The request, the same for calls that choose alike.

    Raises:
        ValueError: An unknown or empty filter; names the argument or the variable.
    """
    return operator.request(direction, implementation, *_here())


def moved_here(request: Request) -> Request:
    """A request of a call, on the device that its pullback is traced for.

    JAX computes a pullback where it is called, which may be under another `jax.default_device` than
    its forward pass was, or outside of Pallas' interpreter.
    """
    platform, kind, state = _here()
    # A request without a kind goes by the rule alone, here too.
    kind = request.device_kind and kind
    return request._replace(platform=platform, device_kind=kind, state=state)


def _here() -> tuple[str, str | None, bool]:
    """The platform, the kind of device, and whether TPU kernels are interpreted on it."""
    current = device.current()
    return current.platform, current.device_kind, interpreting_tpu()


class JaxMeasurement:
    """One direction of one call of an operator: a `dispatch.tuner.Measurement`.

    Nothing of it reads the call's own arrays, which have no values where a function is traced.

    Args:
        run: Makes the function of arrays that an implementation with its parameters computes.
        inputs: Their shapes and dtypes, a tuple of pytrees of `jax.ShapeDtypeStruct`, whose
            arrays are drawn; and functions that make a pytree of ready arrays.
        reference: The implementation that is right, with its own defaults.
        static: The static arguments that times depend on, besides the problem.
    """

    def __init__(
        self,
        run: Callable[[Implementation, TuningParams], Callable[..., Tree]],
        inputs: tuple[Tree, ...],
        reference: Implementation,
        static: Json,
    ) -> None:
        self._run = run
        self._inputs = inputs
        self._reference = reference
        self.static = static

    @property
    def device_kind(self) -> str:
        """JAX's name of the kind; for "cpu" the CPU's model and its number of threads."""
        kind = device.kind()
        return f"cpu {versions.cpu()} x{os.cpu_count()}" if kind == "cpu" else kind

    @property
    def versions(self) -> Mapping[str, str]:
        """The versions of JAX, whose compiler it is, and of this package."""
        return {"flash-wtconv": versions.package(), "jax": jax.__version__}

    def from_process_0(self, question: str, answer: Callable[[], str]) -> str:
        """The answer of process 0, or of the only one."""
        if jax.process_count() == 1:
            return answer()
        return from_process_0(f"flash_wtconv/{question}", answer, _AGREEMENT_S)

    def untimeable(self) -> str | None:
        """The reason why nothing can be timed: a program compiled ahead of time has no device."""
        if isinstance(device.current(), jax.Device):
            return None
        return f"this program is compiled ahead of time for {device.kind()}"

    def interpreting(self, names: Iterable[str]) -> bool:
        """Whether this is inside of Pallas' interpreter, or Triton's is to run "triton"."""
        return interpreter() is not None or ("triton" in names and triton.interpreted())

    def untraced(self, search: Callable[[], Entry]) -> Callable[[], Entry]:
        """The search in another thread, on this one's device, interpreter and with its 64 bits."""
        chosen, playing = device.current(), interpreter()
        # JAX 0.10 gives its configuration the attributes when it is imported.
        wide = jax.config.jax_enable_x64  # type: ignore[attr-defined,unused-ignore]

        def run() -> Entry:
            with jax.default_device(chosen), jax.enable_x64(wide), interpreted_by(playing):
                return search()

        return run

    def prepared(self, module: Implementation, config: TuningParams) -> Callable[[], Tree]:
        """A call that enqueues its work, and returns what to wait for."""
        compiled = jax.jit(self._run(module, config))
        return lambda: compiled(*self._arrays)

    def milliseconds(self, call: Callable[[], Tree]) -> float:
        """The host's clock around a call; on an accelerator the device's time of one of several.

        They are enqueued behind other work, so that launching is no part of it: the clock starts
        when that work is done, and stops when the last of them is. If they were not all enqueued
        by then, there is more such work the next time; at last the host's clock around all counts.
        """
        one = _waited(call, 1)
        if device.on_cpu():
            return one
        times = min(_MOST_AT_ONCE, max(1, round(_AT_ONCE_MS / one)))
        for pauses in _PAUSES:
            for _ in range(pauses):
                pause = _pause(self._filler)
            for _ in range(times):
                result = call()
            late = pause.is_ready()
            jax.block_until_ready(pause)
            start = time.perf_counter()
            jax.block_until_ready(result)
            if not late:
                return (time.perf_counter() - start) * 1e3 / times
        return _waited(call, times)

    def arrays(self, result: Tree) -> list[tuple[str, np.ndarray]]:
        """The leaves of a result, on the host, and their dtypes."""
        return [(str(leaf.dtype), np.asarray(leaf)) for leaf in jax.tree.leaves(result)]

    def reference(self) -> list[tuple[str, np.ndarray]]:
        """The results of the reference for the same arrays."""
        return self.arrays(self.prepared(self._reference, ())())

    @cached_property
    def _filler(self) -> jax.Array:
        """The numbers that `_pause` takes, which has run once."""
        return jax.block_until_ready(_pause(jax.numpy.ones(_PAUSE_SIZE, jax.numpy.float32)))

    @cached_property
    def _arrays(self) -> tuple[Tree, ...]:
        leaves, tree = jax.tree.flatten(self._inputs)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        drawn = [
            leaf() if callable(leaf) else jax.random.normal(key, leaf.shape, leaf.dtype)
            for key, leaf in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(tree, drawn)


@jax.jit
def _pause(numbers: jax.Array) -> jax.Array:
    """Work for about a millisecond, not by a product, whose tiles XLA would time for seconds."""
    for _ in range(_PAUSE_STEPS):
        numbers = jax.lax.erf(numbers)
    return numbers


def _waited(call: Callable[[], Tree], times: int) -> float:
    """Milliseconds of each of some calls that the host waits for together."""
    start = time.perf_counter()
    for _ in range(times):
        result = call()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) * 1e3 / times
