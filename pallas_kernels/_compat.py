"""Every place where a version of JAX or XLA forces our hand, each with the version and why."""

from collections.abc import Callable
from functools import partial, wraps
from typing import ParamSpec, TypeVar

import jax
from jax.experimental.xla_metadata import set_xla_metadata

P = ParamSpec("P")
R = TypeVar("R")


def on_cpu() -> bool:
    """Whether JAX's default device is a CPU, which decides how plain JAX is written best."""
    return jax.default_backend() == "cpu"


def unfused(
    function: Callable[P, R] | None = None, *, static_argnames: tuple[str, ...] = ()
) -> Callable[P, R]:
    """Makes a function one unit of a CPU program that XLA fuses with nothing around it.

    XLA's CPU compiler (jaxlib 0.10 to 0.11) removes `lax.optimization_barrier` before it fuses,
    then fuses a depthwise convolution into the synthesis that reads it and computes it once for
    every reader: 50 times slower on a whole layer. A call that must not be inlined is a border
    that fusion respects. GPUs fuse well by themselves, and lose a factor of 3 at such borders.
    """
    if function is None:
        return partial(unfused, static_argnames=static_argnames)
    jitted = jax.jit(function, static_argnames=static_argnames)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not on_cpu():
            return function(*args, **kwargs)
        # On the results, not as a context: that would mark every call inside as well.
        return set_xla_metadata(jitted(*args, **kwargs), inlineable="false")

    return call
