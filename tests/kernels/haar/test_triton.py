"""The Triton kernels of the Haar cascade: interpreted and compiled without a GPU, run where one is.

Each direction is the other's transpose, so the launches of both are the derivatives too.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.haar import (
    LARGE,
    arrays,
    assert_close,
    assert_large,
    assert_oracle,
    assert_sharded,
    assert_transformed,
    expected,
    takes,
)
from helpers.triton import INTERPRETED, PARTS, compiled_resources, launch, tensor

from pallas_kernels import haar
from pallas_kernels.dispatch import tuning
from pallas_kernels.haar import triton as triton_jax
from pallas_kernels.haar import triton_launches
from pallas_kernels.haar.api import OPERATOR
from pallas_kernels.haar.cases import CASES, Case
from pallas_kernels.haar.problem import Problem

EXTRA = (
    # Blocks of channels in part, which go on in the next squares of a row.
    Case((9, 18), 2, channels=48),
    Case((5, 10), 1, dtype="float16", batch=(1,), channels=100),
    # Two launches, the coarser of two levels.
    Case((37, 50), 5, dtype="float16", batch=(1,)),
    Case((33, 1), 5, batch=(1, 2), channels=1),
)
TAKEN = [case for case in CASES + EXTRA if takes(triton_jax, case)]


SIZED = Case((9, 7), 4, batch=(2,), channels=3)
CHOSEN = [
    *((case, {}) for case in TAKEN),
    *((SIZED, sizes) for sizes in triton_launches.search_space(SIZED.level)[1:]),
]


def launched(case, x, coeffs, **sizes):
    """The transforms of a case by the launches alone."""
    x, coeffs = jax.tree.map(lambda a: tensor(a.reshape(-1, *a.shape[-3:])), (x, coeffs))
    low, details = triton_launches.wavedec(x, case.level, launch, **sizes)
    back = triton_launches.waverec(coeffs[0], coeffs[1:], case.spatial, launch, **sizes)
    got = {"wavedec": [low, *details], "vjp": back, "waverec": back}
    return jax.tree.map(
        lambda a: jnp.asarray(a.float().numpy(), case.dtype).reshape(*case.batch, *a.shape[1:]),
        got,
    )


# What others have too, on smaller images or with other sizes.
WIDE = {
    ("b2-28x28-c3-l4-haar-float32", "{}"),
    ("b1x2-33x1-c1-l5-haar-float32", "{}"),
    ("b2-5x18-c1-l3-haar-float32", "{}"),
    ("b2-9x7-c3-l4-haar-float32", "{'warps': 2}"),
    ("b2-9x7-c3-l4-haar-float32", "{'warps': 8}"),
    ("b2-9x18-c48-l2-haar-float32", "{}"),
}


@INTERPRETED
@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        pytest.param(
            *(case, sizes),
            id=f"{case.name}-{sizes}",
            marks=[pytest.mark.wide] * ((case.name, str(sizes)) in WIDE),
        )
        for case, sizes in CHOSEN
    ],
)
def test_interpreted_kernels_are_the_oracles(case, sizes):
    assert_close(case, launched(case, *arrays(case), **sizes), expected(case))


def test_sizes_reach_the_launches(monkeypatch):
    constants = []

    def launch(kernel, arguments, outputs, grid, **told):
        constants.append((kernel.fn.__name__, told["LEVELS"], told["num_warps"]))
        return [jnp.zeros(shape, dtype) for shape, dtype in outputs]

    for module, name, stand_in in (
        (triton_jax, "launch", launch),
        (triton_jax, "unavailable", lambda platform: None),
        (triton_jax, "search_space", lambda direction, problem: [{"fused": 2, "warps": 8}]),
    ):
        monkeypatch.setattr(module, name, stand_in)

    def both(x):
        low, *details = haar.wavedec2(x, level=3, implementation="triton")
        return haar.waverec2([low, *details], implementation="triton")

    # A compiled function is traced once for equal shapes, from JAX 0.11 on also where the backward
    # pass calls what the forward pass called; without compilation every launch is seen.
    with tuning("search"), jax.disable_jit():
        jax.grad(lambda x: both(x).sum())(jnp.ones((1, 8, 8, 2)))
    there = [("analysis", 2, 8), ("analysis", 1, 8)]
    back = [("synthesis", 1, 8), ("synthesis", 2, 8)]
    assert constants == [*there, *back, *there, *back]


@INTERPRETED
def test_low_bands_do_not_overflow_float16_between_launches():
    x = tensor(np.full((1, 8, 8, 1), 9000, np.float16))
    low, details = triton_launches.wavedec(x, 4, launch)
    # Of one value and zeros around it.
    assert all(band.item() == 36000 for band in (low, *details[0]))
    np.testing.assert_array_equal(triton_launches.waverec(low, details, (8, 8), launch), x)


@INTERPRETED
def test_tensors_of_any_strides():
    case = Case((9, 6), 4, batch=(2,), channels=3)
    x, coeffs = arrays(case)
    x, low, *details = jax.tree.map(tensor, (x, *coeffs))
    channels_first = lambda a: a.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)  # noqa: E731
    run = partial(triton_launches.wavedec, levels=4, launch=launch)
    jax.tree.map(np.testing.assert_array_equal, run(channels_first(x)), run(x))
    run = partial(triton_launches.waverec, shape=case.spatial, launch=launch)
    turned = jax.tree.map(channels_first, (low, details))
    np.testing.assert_array_equal(run(*turned), run(low, details))


@pytest.mark.slow
@PARTS
def test_kernels_compile_for_many_threads(part, tmp_path):
    resources = compiled_resources("haar", part, tmp_path)
    assert len(resources) == {"some": 2, "rest": 6}[part]
    for name, (registers, spilled) in resources.items():
        # Four blocks of 128 threads on a multiprocessor.
        assert registers <= 128 and spilled == 0, (name, registers, spilled)


IMAGE = Problem((2, 8, 8, 4), np.dtype("float32"), 2, 3, "haar")
REFUSED = {
    "1-D signals": {"shape": (2, 8, 4), "ndim": 1},
    "3-D signals": {"shape": (2, 8, 8, 8, 4), "ndim": 3},
    "float64": {"dtype": np.dtype("float64")},
    "wavelet 'db2'": {"wavelet": "db2"},
    "6 levels": {"levels": 6},
    "an empty array": {"shape": (0, 8, 8, 4)},
    "rows of 8 pixels": {"shape": (1, 8, 8, 2**25)},
    "1073741824 images": {"shape": (2**30, 2, 1, 1)},
    "symbolic size": {"shape": (*jax.export.symbolic_shape("b"), 8, 8, 4)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_done_says_so(reason):
    with pytest.raises(NotImplementedError, match=f"does not take .*{reason}"):
        triton_jax.check("fwd", IMAGE._replace(**REFUSED[reason]))


def test_without_a_gpu_it_says_what_is_missing():
    with pytest.raises(NotImplementedError, match="triton: needs a GPU, this is a cpu"):
        haar.dwt2(np.ones((4, 4, 1), np.float32), implementation="triton")
    assert OPERATOR.rule["gpu"] == ("triton", "mosaic_gpu", "xla")


@pytest.mark.gpu
@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.name)
def test_transforms_are_the_oracles(case):
    assert_oracle(case, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", triton_launches.search_space(4)[1:], ids=str)
def test_every_size_on_a_gpu(sizes, monkeypatch):
    monkeypatch.setattr(triton_jax, "search_space", lambda direction, problem: [sizes])
    with tuning("search"):
        assert_oracle(Case((56, 57), 4, batch=(4,), channels=40), "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_large_images_are_those_of_plain_jax(shape):
    assert_large("triton", shape)


@pytest.mark.gpu
@pytest.mark.parametrize("check_vma", [True, False])
def test_sharded_over_the_batch(check_vma):
    assert_sharded("triton", check_vma)


@pytest.mark.gpu
def test_vmap_and_derivatives_of_gradients():
    assert_transformed("triton")
