"""Helpers for every operator's Mosaic GPU tests: lowering, and launches that are not run."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

SHARED = 227 * 1024
"""Bytes of shared memory that a block of a Hopper GPU can have."""


def lowered(function, *args, **keys):
    """The text that a GPU's compiler gets for a function under `jax.jit`."""
    return function.trace(*args, **keys).lower(lowering_platforms=("cuda",)).as_text()


def shapes(function, *args, **keys):
    """The shapes that a function under `jax.jit` returns, traced anew and kept in no cache."""
    return jax.eval_shape(partial(function.__wrapped__, **keys), *args)


def recorded_launches(monkeypatch):
    """Records scratch types and keywords of the kernels traced from now on, which are not run."""
    launches = []

    def kernel(body, out_type, scratch_types, **keys):
        launches.append((scratch_types, keys))
        return lambda *args: jax.tree.map(lambda out: jnp.zeros(out.shape, out.dtype), out_type)

    monkeypatch.setattr(plgpu, "kernel", kernel)
    return launches


def shared_bytes(scratch):
    """Shared memory of a block, barriers included."""
    return sum(
        # A number in JAX 0.11, a tuple of them in 0.10.
        8 * int(np.prod(part.num_barriers))
        if isinstance(part, plgpu.Barrier)
        else math.prod(part.shape) * jnp.dtype(part.dtype).itemsize
        for part in scratch
    )
