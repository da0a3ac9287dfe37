"""Every place where a version of JAX or XLA forces our hand, each with the version and why."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from types import ModuleType
from typing import Any, ParamSpec, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.xla_metadata import set_xla_metadata

from pallas_kernels.common.device import on_cpu
from pallas_kernels.common.types import Ref, Tree

P = ParamSpec("P")
R = TypeVar("R")


def interpreting_tpu() -> bool:
    """Whether TPU kernels run in Pallas' interpreter, inside `pltpu.force_tpu_interpret_mode()`."""
    playing = interpreter()
    if playing is None:
        return False
    from jax.experimental.pallas import tpu as pltpu

    # Pallas' GPU interpreter is kept in the same place.
    return isinstance(playing, pltpu.InterpretParams)


def interpreter() -> object:
    """The interpreter of Pallas kernels that this thread is inside of, None of none.

    JAX (0.10 to 0.12) tells it, of a TPU or a GPU, in its private configuration alone.
    """
    from jax._src import config

    return config.pallas_tpu_interpret_mode_context_manager.value


@contextmanager
def interpreted_by(interpreter: object) -> Iterator[None]:
    """Interprets Pallas kernels as another thread does, inside a `with` block of this one."""
    from jax._src import config

    state = config.pallas_tpu_interpret_mode_context_manager
    before = state.swap_local(interpreter)
    try:
        yield
    finally:
        state.set_local(before)


def tpu_vmem_bytes() -> int:
    """Capacity of a TPU core's vector memory.

    On a CPU, where only the interpreter runs TPU kernels, that of a v5e. Compilation ahead of time
    names its chip with `jax.sharding.use_abstract_mesh` (JAX 0.10 to 0.12).
    """
    from jax.experimental.pallas import tpu as pltpu

    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        return 128 << 20


def varying_axes(tree: Tree) -> frozenset[str]:
    """The axes of a mesh that any array of a tree is sharded over, inside `jax.shard_map`."""
    leaves = jax.tree.leaves(tree)
    return frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in leaves))


def vary_over(axes: frozenset[str], tree: R) -> R:
    """The same arrays, each an own copy along `axes`: what `jax.shard_map` by default insists on.

    The transpose is the sum over the copies, as the gradient of a shared parameter must be. JAX
    does this by itself where its own operations meet; at a custom derivative (0.10 to 0.12) not.
    """

    def vary(leaf: jax.Array) -> jax.Array:
        missing = tuple(axes - varying_axes(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(vary, tree)


def vary_like(inputs: Tree, outputs: R) -> R:
    """`outputs` varying over every axis of a mesh that any array of `inputs` varies over.

    Launchers that know nothing of meshes, and constants, lose the axes; this restores them.
    """
    return vary_over(varying_axes(inputs), outputs)


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, with derivatives inside `jax.shard_map` too.

    JAX 0.12 differentiates its own, and `erf` and `erfc`, by `lax.polynomial`, which refuses an `x`
    that varies along a mesh's axis, because its coefficients do not.
    """
    return 0.5 * x * _erfc(-x * math.sqrt(0.5))


@jax.custom_jvp
def _erfc(x: jax.Array) -> jax.Array:
    return jax.lax.erfc(x)


_erfc.defjvps(lambda tangent, _, x: -2 / math.sqrt(math.pi) * (tangent * jnp.exp(-(x * x))))


def from_process_0(question: str, answer: Callable[[], str], timeout_s: int) -> str:
    """The answer that process 0 gave when it was first asked; the others wait for it.

    Texts that processes share are in the private client of JAX's distributed service alone (0.10
    to 0.12). A broadcast of arrays, which is public, needs all processes to ask in one order.
    """
    from jax._src import distributed

    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("several processes of JAX, and no service that they share")
    if jax.process_index() == 0:
        # Each text is set once: what was said to others is said again.
        try:
            return client.key_value_try_get(question)
        except jax.errors.JaxRuntimeError:
            client.key_value_set(question, answer())
    return client.blocking_key_value_get(question, timeout_s * 1000)


def in_32_bits(function: Callable[P, R]) -> Callable[P, R]:
    """Traces a function with `jax_enable_x64` off.

    The loops and grids of a Pallas kernel count in 32 bits, but JAX (0.10 to 0.12) traces them with
    64, and neither the TPU's compiler nor Mosaic GPU takes the mixture.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.enable_x64(False):
            return function(*args, **kwargs)

    return call


def pallas_output(
    shape: Sequence[int], dtype: jax.typing.DTypeLike, *inputs: jax.Array
) -> jax.ShapeDtypeStruct:
    """An output of a kernel that reads `inputs`.

    Pallas (JAX 0.10 to 0.12) asks over which axes of a mesh it varies.
    """
    return jax.ShapeDtypeStruct(
        shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=varying_axes(inputs))
    )


def gpu_load(ref: Ref, layout: Any) -> jax.Array:
    """The value of a Mosaic GPU ref, in a layout of registers, by loads of any width.

    JAX 0.10 wants an index beside the reference, which 0.11 warns of and 0.12 does not take.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    index = ((),) if jax.__version_info__ < (0, 11) else ()
    return plgpu.load(ref, *index, layout=layout, optimized=False)


def gpu_store(ref: Ref, value: jax.Array) -> None:
    """Stores a value into a Mosaic GPU ref, by stores of any width.

    JAX 0.12 raises an error where those of a layout would meet in one bank of shared memory, unless
    it is told not to; older versions do not.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if jax.__version_info__ < (0, 12):
        ref[...] = value
    else:
        plgpu.store(ref, value, optimized=False)  # type: ignore[attr-defined]


def gpu_fence() -> None:
    """Makes what this thread wrote to global memory known to the whole GPU, and learns the others'.

    A cluster's mbarrier orders nothing beyond a block: Mosaic GPU (JAX 0.10 to 0.12) writes its
    arrival without a scope. Pallas offers the instruction in Mosaic's own terms alone.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    @plgpu.inline_mgpu()
    def fence(ctx: Any) -> None:
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import llvm

        nothing = ir.Type.parse("!llvm.void")
        llvm.inline_asm(nothing, [], "fence.acq_rel.gpu;", "", has_side_effects=True)

    fence()


def import_jax_triton() -> ModuleType:
    """The module jax_triton, imported without what it does to the environment.

    Versions 0.3 and 0.4 empty TRITON_CACHE_DIR when they are imported, after which PyTorch cannot
    compile a Triton kernel in the same process.

    Raises:
        ImportError: It is not installed, or (0.3) finds no GPU.
    """
    kept = os.environ.get("TRITON_CACHE_DIR")
    try:
        import jax_triton
    finally:
        if os.environ.get("TRITON_CACHE_DIR") != kept:
            os.environ.pop("TRITON_CACHE_DIR")
            if kept is not None:
                os.environ["TRITON_CACHE_DIR"] = kept
    return jax_triton


def triton_call(
    *arguments: jax.Array | int,
    out_type: list[jax.ShapeDtypeStruct],
    written_over: dict[int, int] | None = None,
    **rest: object,
) -> list[jax.Array]:
    """Launches a Triton kernel: `jax_triton.triton_call` of version 0.4.

    0.3, the last that takes JAX 0.10 and Python 3.11, calls the types of the outputs `out_shape`.
    0.4 takes an output out of the kernel's parameters where it is written over an argument, so
    there it gets memory of its own.
    """
    jax_triton = import_jax_triton()
    if jax_triton.__version_info__ >= (0, 4):
        return jax_triton.triton_call(*arguments, out_type=out_type, **rest)
    return jax_triton.triton_call(
        *arguments, out_shape=out_type, input_output_aliases=written_over, **rest
    )


def unfused(
    function: Callable[P, R],
    *,
    static_argnames: tuple[str, ...] = (),
    unless: Callable[..., bool] | None = None,
) -> Callable[P, R]:
    """Makes a function one unit of a CPU program that XLA fuses with nothing around it.

    XLA's CPU compiler (jaxlib 0.10 to 0.12) removes `lax.optimization_barrier` before it fuses,
    then fuses a depthwise convolution into the synthesis that reads it and computes it once for
    every reader: 50 times slower on a whole layer. A call that must not be inlined is a border
    that fusion respects. GPUs fuse well by themselves, and lose a factor of 3 at such borders.

    Args:
        function: The function.
        static_argnames: Those of its arguments that are not arrays.
        unless: Whether a call of these arguments may be fused: every border costs compile time.
    """
    jitted = jax.jit(function, static_argnames=static_argnames)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not on_cpu() or (unless is not None and unless(*args, **kwargs)):
            return function(*args, **kwargs)
        # On the results, not as a context: that would mark every call inside as well.
        return set_xla_metadata(jitted(*args, **kwargs), inlineable="false")

    return call


def trace_state() -> object:
    """A key of the trace that JAX is in, equal outside of any.

    JAX 0.12 has it in `jax.extend` alone, which is not imported with `jax`.
    """
    from jax.extend.core import get_opaque_trace_state

    return get_opaque_trace_state()


def triton_launcher() -> ModuleType:
    """The module of jaxlib by which programs launch kernels from PTX, jax-triton's for instance.

    JAX (0.10 to 0.12) has it in its private library alone.

    Raises:
        ImportError: jaxlib finds no plugin for CUDA.
    """
    from jax._src.lib import gpu_triton

    if not gpu_triton._cuda_triton:
        version = jax.lib.__version__
        raise ImportError(f"jaxlib {version} finds no jax-cuda12-plugin and no jax-cuda13-plugin")
    return gpu_triton


TRITON_TARGET = "triton_kernel_call" + "_ffi" * (jax.__version_info__ >= (0, 11))
"""The custom call that the launcher answers.

From JAX 0.11 on the one with "_ffi" is recorded into CUDA graphs, which take the host less time for
a launch. In 0.10 jax-triton takes the other.
"""


TENSOR_MAPS = jax.__version_info__ >= (0, 11)
"""Whether the launcher encodes tensor maps, once it knows the arrays' addresses; 0.10 does not."""


def lowered_triton_call(
    context: Any, operands: Sequence[Any], launch: bytes, aliases: dict[int, int]
) -> Sequence[Any]:
    """The results of a launch in a program that is lowered.

    Args:
        context: The context of a lowering rule.
        operands: The arrays.
        launch: The launch as `triton_launcher` serialises it, compressed.
        aliases: By an operand's number that of the output that takes its memory.
    """
    shared: Any = {"operand_output_aliases": aliases}
    if TRITON_TARGET.endswith("_ffi"):
        rule = jax.ffi.ffi_lowering(TRITON_TARGET, api_version=4, **shared)
        return rule(context, *operands, opaque=launch)
    config = cast(Any, launch)
    rule = jax.ffi.ffi_lowering(TRITON_TARGET, api_version=2, backend_config=config, **shared)
    return rule(context, *operands)


def tiles_over_devices(sharding: Any, ndim: int) -> list[np.ndarray] | None:
    """For each axis of an array the index of the tile that each device of a program has.

    XLA's own shardings, which `custom_partitioning` is told without `decode_shardings`, are read
    by private methods alone (JAX 0.10 to 0.12).

    Args:
        sharding: The sharding, or None.
        ndim: The number of the array's axes.

    Returns:
        For each axis an array with an element a device; None where each has the whole array.
    """
    if sharding is None:
        return None
    tiled = sharding._to_xla_hlo_sharding(ndim)
    if not tiled.is_tiled():
        return None
    sizes, ids = tiled.tile_assignment_dimensions(), np.asarray(tiled.tile_assignment_devices())
    # A last dimension beyond the array's is that of copies.
    places = np.unravel_index(np.argsort(ids), sizes)
    return [np.asarray(place) for place in places[:ndim]]


def mapped_axes() -> frozenset[str]:
    """The Explicit axes of a mesh that `jax.vmap` has taken from the arrays that are traced here.

    `jax.shard_map` refuses them, and JAX tells of them by a private name alone (0.10 to 0.12).
    """
    from jax._src import core

    return frozenset(core.get_axis_env().explicit_mesh_axis_names)


def outside_of_vmap(axes: Iterable[str]) -> AbstractContextManager[None]:
    """A context for the rule of a `jax.vmap` along Explicit axes, which JAX runs as if inside.

    Args:
        axes: The axes of the mesh that the mapped axis is split over.
    """
    from jax._src import core

    return core.remove_explicit_mesh_axis_names(frozenset(axes) or None)
