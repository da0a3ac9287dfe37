"""Runs an implementation's kernels forward and backward on a few small cases, and compares nothing.

A process of its own, for a tool to watch: `compute-sanitizer python sanitized.py mosaic_gpu`.
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import haar
from pallas_kernels.conv2d import conv2d
from pallas_kernels.wtconv import wtconv2d
from pallas_kernels.wtconv.cases import Case

# The deeper levels in one launch, with a reach of one and of two; level 2 alone, without deeper
# ones, with a launch for each, and with one for all of them.
CASES = (
    Case((9, 7), 2, 3),
    Case((28, 28), 3, 5, batch=(5,), channels=40),
    Case((33, 150), 2, 5, batch=(1,), channels=32),
    Case((233, 131), 4, 3, batch=(1,), channels=4),
    Case((112, 110), 4, 5, batch=(1,), channels=33),
)


def cases(implementation):
    """The cases of an implementation: `triton` has one launch a level, slow to compile."""
    return CASES[:2] if implementation == "triton" else CASES


def in_jax(implementation):
    """WTConv, both ways; and, of what else has it, the Haar cascade and a dense convolution."""
    wtconv = partial(wtconv2d, implementation=implementation)
    for case in cases(implementation):
        x, params, _ = jax.tree.map(partial(jnp.asarray, dtype="float32"), case.drawn())
        gradients = jax.grad(lambda x, params: (wtconv(x, params) ** 2).sum(), (0, 1))
        jax.block_until_ready(jax.jit(gradients)(x, params))
        if implementation == "cuda":
            # Levels share memory on tensor cores.
            x, params = jax.tree.map(lambda a: a.astype("bfloat16"), (x, params))
            jax.block_until_ready(jax.jit(gradients)(x, params))
    if implementation == "cuda":
        return
    bands = haar.wavedec2(x, level=3, implementation=implementation)
    jax.block_until_ready(haar.waverec2(bands, shape=x.shape[1:3], implementation=implementation))
    key = jax.random.key(0)
    x, w = (jax.random.normal(key, s, "bfloat16") for s in ((2, 17, 31, 24), (3, 3, 24, 40)))
    dense = partial(conv2d, padding="SAME", activation="gelu", implementation=implementation)
    gradients = jax.grad(lambda x, w: dense(x, w).astype("float32").sum(), (0, 1))
    jax.block_until_ready(jax.jit(gradients)(x, w))


def in_torch(implementation):
    """The layer, both ways, in both memory formats."""
    import torch

    from torch_bridge import WTConv2d

    for case in cases(implementation):
        c = case.channels
        keys = {"wt_levels": case.levels, "device": "cuda", "implementation": implementation}
        layer = WTConv2d(c, c, case.kernel_size, **keys)
        # Channels last, 16 bits are on tensor cores.
        for dtype in (torch.float32, torch.bfloat16):
            layer = layer.to(dtype)
            for memory_format in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(*case.batch, c, *case.spatial, device="cuda", dtype=dtype)
                x = x.contiguous(memory_format=memory_format).requires_grad_()
                layer(x).square().sum().backward()
    torch.cuda.synchronize()


if __name__ == "__main__":
    framework, implementation = sys.argv[1:]
    {"jax": in_jax, "torch": in_torch}[framework](implementation)
