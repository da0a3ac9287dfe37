"""The two roofs of a device, measured: how fast it copies, and how fast it multiplies and adds."""

import jax
import jax.numpy as jnp

from pallas_kernels.platform import on_cpu

from .clocks import Clock

_COPIED_BYTES = 2**30
_COPIED_BYTES_CPU = 2**28
_VALUES = 2**25
_VALUES_CPU = 2**21
_CHAINS, _LENGTH = 8, 64


def measure(clock: Clock) -> dict[str, float]:
    """Measures both roofs on the device that JAX computes on.

    Args:
        clock: What to time with.

    Returns:
        `copy_bytes_per_s`, bytes read and written in a second by an elementwise copy of an array
        far larger than any cache, and `fma_per_s`, float32 multiply-adds in a second by a kernel
        that does 512 of them for each value that it reads.
    """
    copied = jnp.ones((_COPIED_BYTES_CPU if on_cpu() else _COPIED_BYTES) // 4, jnp.float32)
    values = jnp.ones(_VALUES_CPU if on_cpu() else _VALUES, jnp.float32)
    factor, term = jnp.float32(0.5), jnp.float32(1.0)
    copy = jax.jit(jnp.negative).lower(copied).compile()
    chains = jax.jit(_chains).lower(values, factor, term).compile()
    times = clock.take_turns(
        {"copy": lambda: copy(copied), "chains": lambda: chains(values, factor, term)},
        lambda: None,
    )
    return {
        "copy_bytes_per_s": 2 * copied.nbytes / times["copy"].median * 1e3,
        "fma_per_s": values.size * _CHAINS * _LENGTH / times["chains"].median * 1e3,
    }


def _chains(values: jax.Array, factor: jax.Array, term: jax.Array) -> jax.Array:
    """Several chains a value, because each waits for its own last result."""
    chains = [values + i for i in range(_CHAINS)]
    for _ in range(_LENGTH):
        chains = [chain * factor + term for chain in chains]
    return sum(chains[1:], chains[0])
