"""The two roofs of a device, measured: how fast it copies, and how fast it multiplies and adds."""

import jax
import jax.numpy as jnp

from flash_wtconv_jax.bench.clocks import Clock
from pallas_kernels.common.device import on_cpu

_COPIED_BYTES = 2**30
_COPIED_BYTES_CPU = 2**28
_VALUES = 2**25
_VALUES_CPU = 2**21
_PAIRS, _LENGTH = 4, 64


def measure(clock: Clock) -> dict[str, float]:
    """Measures both roofs on the device that JAX computes on.

    Args:
        clock: The clock to time with.

    Returns:
        `copy_bytes_per_s`, bytes read and written in a second by an elementwise copy of an array
        far larger than any cache, and `fma_per_s`, float32 multiply-adds in a second. It is that of
        additions, of which devices make as many, by a kernel with 512 for each value that it
        reads: XLA makes a multiply-add of its multiplications and additions on some devices only.
    """
    copied = jnp.ones((_COPIED_BYTES_CPU if on_cpu() else _COPIED_BYTES) // 4, jnp.float32)
    values = jnp.ones(_VALUES_CPU if on_cpu() else _VALUES, jnp.float32)
    copy = jax.jit(jnp.negative).lower(copied).compile()
    sums = jax.jit(_sums).lower(values).compile()
    times = clock.take_turns(
        {"copy": lambda: copy(copied), "sums": lambda: sums(values)}, lambda: None
    )
    return {
        "copy_bytes_per_s": 2 * copied.nbytes / times["copy"].median * 1e3,
        "fma_per_s": values.size * 2 * _PAIRS * _LENGTH / times["sums"].median * 1e3,
    }


def _sums(values: jax.Array) -> jax.Array:
    """Adds up several sums a value, since each waits for its last result; none can be merged."""
    pairs = [(values, values + i) for i in range(_PAIRS)]
    for _ in range(_LENGTH):
        pairs = [(b, a + b) for a, b in pairs]
        pairs = [(b, a + b) for a, b in pairs]
    return jnp.stack([a - b for a, b in pairs]).sum(0)
