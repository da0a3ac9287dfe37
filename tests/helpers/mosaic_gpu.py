"""Helpers for every operator's Mosaic GPU tests: lowering, and launches that are not run."""

import math
from functools import partial, wraps

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
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


def interpretable(monkeypatch):
    """Replaces what operators' kernels do and Pallas' GPU interpreter does not know.

    It knows views by a stride, as Mosaic does not, and no instructions in PTX. It gives both views
    of a piece of shared memory memory of their own, and tells that nothing should be read that was
    written through the other: here they share it. It does not look for races of one view with the
    other, nor of products that are still under way. It multiplies what is in memory alone, not what
    is in registers.
    """
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    from pallas_kernels.haar import mosaic_gpu as haar
    from pallas_kernels.stylize import mosaic_gpu as stylize
    from pallas_kernels.wtconv.mosaic_gpu import bands, tiles

    def squares(self, buffer, level, at):
        (j, v, u), each, strips = at, self.tiling.side >> level, self.tiling.strips
        if strips == 1:
            return buffer.at[:, v, j * each + u]
        return buffer.at[0, v, pl.ds(j * strips * each + u, strips, stride=each)]

    def pixels(self, row, j, each):
        if self.tiling.strips == 1:
            return row.at[:, j]
        return row.at[0, pl.ds(j, self.tiling.strips, stride=each * self.tiling.columns)]

    def subbands(self, row, columns, parts, j, part=0):
        return row.at[:, pl.ds(j * parts + part, self.tiling.strips, stride=columns * parts)]

    def share(token, keys, alias_group_idxs):
        memory = gpu_callbacks._get_shared_memory().mem
        boxes, rows = (memory[gpu_callbacks.HostAllocationKey.from_array(key)] for key in keys)
        rows._content = boxes._content.reshape(rows._content.shape)
        return token

    multiply = gpu_callbacks.wgmma

    @wraps(multiply)
    def wgmma(*, a_allocation_key_as_array, **keys):
        left = np.asarray(a_allocation_key_as_array)
        if np.issubdtype(left.dtype, np.integer):
            return multiply(a_allocation_key_as_array=left, **keys)
        memory, thread = gpu_callbacks._get_shared_memory(), keys["thread"]

        def place(name):
            key = gpu_callbacks.HostAllocationKey.from_array(
                keys[f"{name}_allocation_key_as_array"]
            )
            at = gpu_callbacks._remove_noop_transforms(keys[f"{name}_transforms"])
            return key, memory.access(key, jax.tree.map(int, at))

        right, _, _ = memory.get_buffer_content(*place("b"), thread)
        sums, _, _ = memory.get_buffer_content(*place("acc"), thread)
        sums = sums + np.matmul(left, right, dtype=sums.dtype)
        memory.store_buffer_content(*place("acc"), sums, thread)
        return keys["token"]

    # It runs one operation after the other, all of which see what was written before.
    monkeypatch.setattr(stylize, "gpu_fence", lambda: None)
    monkeypatch.setattr(haar._Block, "view", squares)
    monkeypatch.setattr(tiles.Block, "view", pixels)
    monkeypatch.setattr(bands.BandsBlock, "view", subbands)
    monkeypatch.setattr(gpu_callbacks, "_tag_ref_union", share)
    monkeypatch.setattr(gpu_callbacks, "wgmma", wgmma)


def shared_bytes(scratch):
    """Shared memory of a block, barriers included."""
    return sum(
        # A number in JAX 0.11, a tuple of them in 0.10.
        8 * int(np.prod(part.num_barriers))
        if isinstance(part, plgpu.Barrier)
        else math.prod(part.shape) * jnp.dtype(part.dtype).itemsize
        for part in scratch
    )
