"""Launches of Mosaic GPU kernels, which are compiled beside each other while JAX lowers a program.

XLA takes a second or two for each such kernel, and comes to them one after the other, after its
passes over the program. jaxlib keeps what it compiled as long as the process runs, by a hash of the
kernel, and compiles kernels that threads ask for at a time. So a thread asks for each of them as
soon as it is lowered, by a program that nobody runs, and XLA finds it, or makes it itself where it
comes to it first.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from pallas_kernels.common import device
from pallas_kernels.common.types import Tree

__all__ = ["kernel"]

_TARGET = "mosaic_gpu_v2"
"""The custom call that Pallas lowers a kernel to."""
_COMPILERS = ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="mosaic_gpu")
_begun: set[bytes] = set()
"""The hashes of the kernels that a thread was asked for."""


def kernel(body: Callable[..., None], **options: Any) -> Callable[..., Tree]:
    """A kernel by `plgpu.kernel`, which a thread begins to compile once its call is lowered.

    Args:
        body: See `plgpu.kernel`.
        **options: Its other arguments.

    Returns:
        The function that launches it.
    """
    launch = plgpu.kernel(body, **options)

    def run(*arrays: jax.Array) -> Tree:
        outputs, tree = jax.tree.flatten(launch(*arrays))
        return jax.tree.unflatten(tree, _launched.bind(*outputs))

    return run


_launched = Primitive("mosaic_gpu_launched")
"""The identity of a kernel's outputs: where it is lowered for CUDA, the kernel has been."""
_launched.multiple_results = True
_launched.def_impl(lambda *outputs: list(outputs))
_launched.def_abstract_eval(lambda *outputs: list(outputs))
batching.primitive_batchers[_launched] = lambda arrays, axes: (_launched.bind(*arrays), axes)
mlir.register_lowering(_launched, lambda context, *outputs: outputs, cacheable=False)


def _lower(context: mlir.LoweringRuleContext, *outputs: Any) -> Sequence[Any]:
    call = outputs[0].owner
    attributes = getattr(call, "attributes", {})
    if "call_target_name" in attributes and attributes["call_target_name"].value == _TARGET:
        told = attributes.get("mhlo.backend_config", {})
        # A later JAX may call them otherwise; XLA compiles the kernel all the same.
        if "kernel_hash" in told and "module" in told:
            _begin(told["kernel_hash"].value_bytes, told["module"].value_bytes)
    return outputs


# Where JAX caches it, it is lowered in a function of its own, whose arguments come from nowhere.
mlir.register_lowering(_launched, _lower, platform="cuda", cacheable=False)


def _begin(kernel_hash: bytes, module: bytes) -> None:
    """Has a thread compile a kernel, unless one was asked to before, or no GPU is here."""
    gpu = device.current()
    if not isinstance(gpu, jax.Device) or gpu.platform != "gpu" or kernel_hash in _begun:
        return
    _begun.add(kernel_hash)
    try:
        # What fails there fails again, and is told, where XLA comes to the kernel.
        _COMPILERS.submit(_compile, kernel_hash, module, gpu)
    except RuntimeError:
        # The interpreter ends, and takes no more work.
        pass


def _compile(kernel_hash: bytes, module: bytes, gpu: jax.Device) -> None:
    """Compiles a kernel in a program of nothing else, which lacks even its arguments."""
    call = jax.ffi.ffi_call(_TARGET, jax.ShapeDtypeStruct((), jnp.float32))

    def mosaic_gpu_kernel() -> jax.Array:
        return call(kernel_hash=kernel_hash, module=module, use_custom_barrier=False)

    where = jax.sharding.SingleDeviceSharding(gpu)
    jax.jit(mosaic_gpu_kernel, out_shardings=where).lower().compile()
