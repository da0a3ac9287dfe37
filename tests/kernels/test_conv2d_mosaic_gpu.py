"""The dense convolution's Mosaic GPU kernel: lowered and interpreted without a GPU, run on one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conv2d_checks import (
    NAMES,
    arrays,
    assert_close,
    assert_oracle,
    assert_sharded,
    expected,
    plain,
    value_and_grads,
)
from mosaic_gpu_checks import SHARED, lowered, recorded_launches, shapes, shared_bytes

from pallas_kernels import oracle
from pallas_kernels.conv2d import Config, conv2d, get_igemm_conv2d, mosaic_gpu
from pallas_kernels.conv2d.api import OPERATOR, Problem, Window
from pallas_kernels.conv2d.cases import HARD, TABLE, Case
from pallas_kernels.conv2d.shapes import SHAPES


@pytest.fixture
def interpreted(gpu_interpreter, monkeypatch):
    """The implementation in Pallas' GPU interpreter, with few blocks.

    The interpreter gives both views of a piece of shared memory memory of their own, and tells
    that nothing should be read that was written through the other: here they share it.
    """
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    def share(token, keys, alias_group_idxs):
        memory = gpu_callbacks._get_shared_memory().mem
        boxes, rows = (memory[gpu_callbacks.HostAllocationKey.from_array(key)] for key in keys)
        rows._content = boxes._content.reshape(rows._content.shape)
        return token

    monkeypatch.setattr(gpu_callbacks, "_tag_ref_union", share)
    monkeypatch.setattr(mosaic_gpu, "MULTIPROCESSORS", 2)
    monkeypatch.setattr(mosaic_gpu, "unavailable", lambda platform: None)


TAKEN = [
    case._replace(dtype="float16" if case.dtype in ("float32", "float64") else case.dtype)
    for case in HARD
    if case.n and case.groups == 1
]
EXTRA = (
    # Products of pixels alone; images of one row, one column; a window outside of the image.
    Case(3, 7, 5, 6, 1, 1, 4, dtype="bfloat16", bias=True, activation="relu"),
    Case(2, 1, 9, 2, 3, 3, 3, padding=1, dtype="float16"),
    Case(2, 9, 1, 2, 3, 3, 3, padding=1, dtype="float16", layout="nchw_fchw"),
    Case(1, 3, 4, 3, 2, 2, 2, padding=5, dtype="float16"),
    # Strides and planes that do not fill up.
    Case(1, 7, 8, 3, 3, 4, 2, (2, 3), ((0, 1), (2, 0)), (1, 2), dtype="float16", bias=True),
)
LARGE = (
    # Several tiles along each axis, and several blocks of channels.
    Case(2, 20, 19, 72, 3, 3, 40, padding="SAME", dtype="bfloat16", bias=True, activation="gelu"),
    Case(1, 18, 34, 24, 5, 2, 300, padding="SAME", dtype="float16", out_dtype="float32"),
    Case(3, 17, 15, 40, 1, 1, 88, dtype="bfloat16", bias=True, activation="relu"),
    # Taps too far from each other to share what they read.
    Case(1, 40, 12, 16, 3, 3, 16, 1, (14, 3), (14, 3), dtype="bfloat16"),
    Case(1, 35, 36, 16, 3, 3, 16, 2, "reflect", dtype="float16", bias=True),
)
INTERPRETED = [*TAKEN, *EXTRA, *TABLE[:12:3], *TABLE[-3:]]


@pytest.mark.parametrize("case", INTERPRETED, ids=lambda case: case.name)
def test_interpreted_kernels_are_the_oracles(interpreted, case):
    assert_oracle(case, "mosaic_gpu")


def assert_like_wider(case, config=None):
    """Output and gradients are those of the same numbers in float32, to the last bit or two."""
    *given, dy = arrays(case)

    def all_of(call, x, w, bias, dy):
        y, pullback = jax.vjp(call, x, w, bias)
        return y, *pullback(dy)

    wide = [None if a is None else a.astype(jnp.float32) for a in (*given, dy)]
    want = jax.jit(partial(all_of, plain(case._replace(out_dtype="float32"))))(*wide)
    got = jax.jit(partial(all_of, with_tiles(case, config)))(*given, dy)
    eps = float(jnp.finfo(case.dtype).eps)
    for name, g, w in zip(NAMES, got, want, strict=True):
        if g is not None:
            g, w = (np.asarray(a, np.float64) for a in (g, w))
            assert np.abs(g - w).max() <= 4 * eps * np.abs(w).max(), name


def with_tiles(case, config):
    def call(x, w, bias):
        return conv2d(
            x,
            w,
            bias=bias,
            out_dtype=case.out_dtype,
            implementation="mosaic_gpu",
            config=config,
            **case.arguments,
        )

    return call


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_interpreted_kernels_take_several_tiles(interpreted, case):
    assert_like_wider(case)
