"""The Mosaic GPU kernels of the Haar cascade: lowered and interpreted without a GPU, run on one."""

import math
from functools import partial

import chex
import jax
import numpy as np
import pytest
from helpers.haar import (
    LARGE,
    assert_large,
    assert_oracle,
    assert_sharded,
    assert_transformed,
    takes,
)
from helpers.mosaic_gpu import SHARED, lowered, recorded_launches, shapes, shared_bytes

from pallas_kernels import haar
from pallas_kernels.haar import mosaic_gpu
from pallas_kernels.haar.api import OPERATOR
from pallas_kernels.haar.cases import CASES, Case
from pallas_kernels.haar.problem import Problem

# Shape, dtype and levels.
IMAGES = (
    ((128, 56, 56, 96), "float32", 5),
    ((8, 512, 512, 64), "bfloat16", 3),
    ((128, 7, 7, 768), "float16", 2),
    ((2, 37, 50, 3), "float16", 5),
    ((3, 9, 7, 32), "float32", 1),
    ((1, 1, 1, 1), "bfloat16", 2),
    ((9, 4, 16, 16), "float32", 4),
)


def some(cases, kept, name):
    """Each of the cases; those that are not at the places `kept` are for `make test-wide`."""
    return [
        pytest.param(case, id=name(case), marks=[pytest.mark.wide] * (i not in kept))
        for i, case in enumerate(cases)
    ]


def run(shape, dtype, levels, transformed):
    """`transformed`, such as `lowered`, of analysis and of synthesis."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    yield transformed(mosaic_gpu.wavedec, x, ndim=2, levels=levels, wavelet="haar")
    low, *details = jax.eval_shape(partial(haar.wavedec2, level=levels, implementation="xla"), x)
    yield transformed(mosaic_gpu.waverec, low, tuple(details), shape=shape[1:3], wavelet="haar")


@pytest.mark.core
@pytest.mark.parametrize("image", some(IMAGES, (2, 3, 4, 5), str))
def test_kernels_lower_for_cuda(image):
    for text in run(*image, lowered):
        assert "mosaic_gpu" in text


@pytest.mark.core
def test_kernels_lower_where_jax_counts_in_64_bits():
    with jax.enable_x64(True):
        for text in run((2, 9, 7, 3), "float16", 4, lowered):
            assert "mosaic_gpu" in text


@pytest.mark.parametrize("fused", [1, 2, 3])
@pytest.mark.parametrize("image", IMAGES, ids=str)
def test_launches_fit_on_a_multiprocessor(image, fused, monkeypatch):
    launches = recorded_launches(monkeypatch)
    monkeypatch.setattr(mosaic_gpu, "_FUSED", fused)
    shape, dtype, levels = image
    (low, details), back = run(*image, shapes)
    chex.assert_shape(back, shape)
    assert back.dtype == dtype
    assert len(launches) == 2 * math.ceil(levels / fused)
    for scratch, _ in launches:
        assert shared_bytes(scratch) <= SHARED
        # Each is a TMA copy or several; TMA takes no more along an axis.
        assert all(max(part.shape[-4:]) <= 256 for part in scratch[:-1])


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("image", IMAGES, ids=str)
def test_tasks_hold_every_square_once(image, levels):
    (n, h, w, c), _, _ = image
    tiling = mosaic_gpu._tiling((n, h, w, c), levels)
    threads = max(tiling.images, tiling.strips) * tiling.channels
    assert threads == 128 and 1 in (tiling.images, tiling.strips)
    # Mosaic would copy all of a window that is contiguous in memory, inside the image or not.
    assert tiling.channels not in (c, c * math.ceil(h / tiling.side) * math.ceil(w / tiling.side))
    # So many parts, of so many elements each, and none of them beyond what there is.
    for parts, each, whole in zip(
        (tiling.groups, tiling.rows, tiling.column_blocks, tiling.channel_blocks),
        tiling.shape(0),
        (n, h, w, c),
        strict=True,
    ):
        assert (parts - 1) * each < whole <= parts * each


# For the interpreter; together they have tilings of every kind.
INTERPRETED = (
    Case((9, 18), 3, batch=(2,), channels=3),
    Case((13, 5), 5, dtype="float16", batch=(5,), channels=20),
    Case((3, 70), 1, dtype="bfloat16", batch=(1,), channels=40),
    # Contiguous windows, were they not of another number of channels.
    Case((8, 7), 2, batch=(3,), channels=32),
    Case((16, 4), 2, batch=(3,), channels=4),
)


@pytest.mark.core
@pytest.mark.usefixtures("gpu_interpreter")
@pytest.mark.parametrize("case", some(INTERPRETED, (2, 4), lambda case: case.name))
def test_interpreted_kernels_are_the_oracles(case, monkeypatch):
    # A warpgroup has several tasks, more than there are stages.
    monkeypatch.setattr(mosaic_gpu, "MULTIPROCESSORS", 1)
    monkeypatch.setattr(mosaic_gpu, "_MAX_STAGES", 1 if case.level == 3 else 2)
    monkeypatch.setattr(mosaic_gpu, "unavailable", lambda platform: None)
    assert_oracle(case, "mosaic_gpu")


REFUSED = {
    "1-D signals": {"shape": (2, 8, 4), "ndim": 1},
    "3-D signals": {"shape": (2, 8, 8, 8, 4), "ndim": 3},
    "float64": {"dtype": np.dtype("float64")},
    "wavelet 'db2'": {"wavelet": "db2"},
    "6 levels": {"levels": 6},
    "an empty array": {"shape": (0, 8, 8, 4)},
    "too large": {"shape": (2**31, 2, 1, 1)},
    "symbolic size": {"shape": (*jax.export.symbolic_shape("b"), 8, 8, 4)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_done_says_so(reason):
    image = Problem((2, 8, 8, 4), np.dtype("float32"), 2, 3, "haar")
    with pytest.raises(NotImplementedError, match=f"does not take .*{reason}"):
        mosaic_gpu.check("fwd", image._replace(**REFUSED[reason]))


def test_without_a_gpu_it_says_what_is_missing():
    with pytest.raises(NotImplementedError, match="mosaic_gpu: needs a GPU, this is a cpu"):
        haar.dwt2(np.ones((4, 4, 1), np.float32), implementation="mosaic_gpu")
    assert mosaic_gpu.unavailable("gpu").startswith("needs compute capability 9.0 or newer")
    assert OPERATOR.rule["gpu"] == ("triton", "mosaic_gpu", "xla")


EXTRA = (
    *INTERPRETED,
    Case((56, 56), 5, batch=(3,), channels=96),
    Case((37, 150), 4, dtype="float16", channels=100),
    Case((7, 7), 2, dtype="bfloat16", batch=(131,), channels=64),
    Case((33, 1), 5, batch=(1, 2), channels=1),
    Case((1, 300), 3, batch=(1,), channels=16),
)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [case for case in CASES + EXTRA if takes(mosaic_gpu, case)],
    ids=lambda case: case.name,
)
def test_transforms_are_the_oracles(case):
    assert_oracle(case, "mosaic_gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_images_are_those_of_plain_jax(shape):
    assert_large("mosaic_gpu", shape)


@pytest.mark.gpu
@pytest.mark.parametrize("check_vma", [True, False])
def test_sharded_over_the_batch(check_vma):
    assert_sharded("mosaic_gpu", check_vma)


@pytest.mark.gpu
def test_vmap_and_derivatives_of_gradients():
    assert_transformed("mosaic_gpu")
