"""How what results are held against is compiled."""

import jax


def quick_jit(function):
    """`jax.jit` without LLVM's optimisations on a CPU: the numbers are the same, sooner."""
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function, compiler_options=options if jax.default_backend() == "cpu" else {})
