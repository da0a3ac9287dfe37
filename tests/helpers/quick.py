"""Lets JAX trace, lower and compile quickly, in the suite and in processes that it starts.

It is imported before JAX.
"""

import gc
import importlib.metadata
import os
import threading
from pathlib import Path

# Tests marked gpu or tpu run with JAX_PLATFORMS=cuda or tpu.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    # What one test, worker or run has compiled, the others load; `make clean` removes it.
    compiled = Path(__file__).parents[2] / ".jax_cache"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled))
    # To write down and to find again what is compiled in less takes as long.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    # No program tells of each operation by which lines of which files it came.
    os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
    # Before anything imports Triton, whose own functions are then interpreted too.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # Before jax starts: its GPU interpreter needs a thread of XLA's for each warpgroup, and more
    # than a machine of two cores would have.
    os.environ.setdefault("NPROC", "8")
    # XLA's older emitters write a program in a third of the time, in processes that tests start
    # too. JAX 0.12 has the newer ones alone.
    if tuple(map(int, importlib.metadata.version("jax").split(".")[:2])) < (0, 11):
        quick = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
        os.environ.setdefault("XLA_FLAGS", quick)

import jax
from jax._src import compiler
from jax._src.interpreters import mlir, partial_eval
from jax._src.numpy.ufunc_api import ufunc
from jax._src.numpy.util import check_arraylike

# Little of what is imported, collected and traced is garbage, and it takes long to look through.
gc.set_threshold(100_000, 20, 100)

# On a CPU most of what the suite compiles runs once, on a few numbers, and LLVM would work on it
# for longer than it runs. The hard cases of each operator are `optimised`.
CPU = os.environ["JAX_PLATFORMS"] == "cpu"

# What the variable XLA_FLAGS changes above.
USERS = {"xla_cpu_use_fusion_emitters": True, "xla_cpu_parallel_codegen_split_count": 32}
compile_options = compiler.get_compile_options


def users_compile_options(*args, env_options_overrides=None, **keys):
    """The options that JAX has where nothing is set; those that a caller names come first."""
    options = USERS | (env_options_overrides or {})
    return compile_options(*args, env_options_overrides=options, **keys)


def optimise(optimised):
    """Lets programs be compiled as a user's are, or as fast as can be."""
    jax.config.update("jax_disable_most_optimizations", not optimised)
    if jax.__version_info__ < (0, 11):
        compiler.get_compile_options = users_compile_options if optimised else compile_options


optimise(not CPU)

# Flax asks tracers for what they lack, and each time JAX prints the operations that they came of
# into an error that nobody sees: half of what it takes to make a network without numbers.
partial_eval.DynamicJaxprTracer._origin_msg = lambda tracer: ""

make_ir_context = mlir.make_ir_context
lowering = threading.local()


def shared_ir_context():
    """The context that a thread's programs are lowered in, a few of them in each."""
    context, count = getattr(lowering, "context", (None, 10))
    if count == 10:
        context, count = make_ir_context(), 0
    lowering.context = context, count + 1
    return context


# As JAX 0.12 does it: to make one takes longer than to lower a small program, and what is lowered
# keeps it. What lies on several devices is partitioned while XLA compiles it, and JAX lowers the
# parts then: not in the same context.
ALONE = "device_count" not in os.environ.get("XLA_FLAGS", "")
if jax.__version_info__ < (0, 12) and ALONE:
    mlir.make_ir_context = shared_ir_context

# JAX lowers an operation as a function, copies that to where it is called, and keeps it for the
# next one of the same shapes. What is one operation of MLIR is made anew in less time.
for primitive, rule in mlir._lowerings.items():
    if rule.inline and not primitive.multiple_results:
        mlir._uncacheable_primitives.add(primitive)

ufunc_call = ufunc.__call__


def traced_ufunc_call(self, *args, **keys):
    """An operation of jax.numpy, whose primitives are traced where it is called.

    The program is the same. JAX traces each operation as a program of its own, which it then puts
    there: a quarter of what it takes to trace a convolution.
    """
    call = self._ufunc__static_props["call"]
    traced = any(type(argument) is partial_eval.DynamicJaxprTracer for argument in args)
    if keys or call is None or not traced:
        return ufunc_call(self, *args, **keys)
    check_arraylike(self.__name__, *args)
    return call.__wrapped__(*args)


ufunc.__call__ = traced_ufunc_call
