"""Times in copies of x, the unit of operators that memory bounds."""

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp

from flash_wtconv_jax.bench.timing import Spread, comparison
from flash_wtconv_jax.bench.wtconv import Contender
from pallas_kernels.common.types import Json

PLAIN, COPY = "plain jax", "copy"
"""The names of the contenders that all others are compared with."""


def copy(x: jax.Array) -> Contender:
    """The contender that is an elementwise pass over x, compiled.

    Example:
        >>> copy(jnp.ones(2)).call().tolist()
        [-1.0, -1.0]
    """
    call = partial(jax.jit(jnp.negative).lower(x).compile(), x)
    return Contender(call, call)


def figures(times: Mapping[str, Spread], contender: str, passes: int = 2) -> Json:
    """A contender's times, which are a part of a row of a report.

    Args:
        times: The times of all contenders, `COPY` and `PLAIN` among them.
        contender: Its name.
        passes: The least number of tensors of x's size that are read or written; a copy's are two.

    Returns:
        Milliseconds; `copies`, the median over that of a copy, of more passes over that of as many;
        `speedup`, the median of plain JAX over its own, and `too_noisy`.

    Example:
        >>> times = {COPY: Spread(1.0, 1.0, 1.0), PLAIN: Spread(5.0, 5.0, 5.0)}
        >>> row = figures(times, PLAIN, passes=5)
        >>> row["copies"], row["speedup"]
        (2.0, 1.0)
    """
    spread = times[contender]
    whole = 1 if contender == COPY else passes / 2
    return {
        **spread.row(),
        "copies": spread.median / times[COPY].median / whole,
        **comparison(spread, times[PLAIN]),
    }
