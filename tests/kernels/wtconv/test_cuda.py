"""The CUDA kernels of WTConv as JAX launches them: run on the CPU, traced, and run on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.cuda import EMULATED, emulate, gpu_of, recorded
from helpers.wtconv import (
    assert_oracle,
    assert_reproducible,
    assert_sharded,
    assert_transformed,
    takes,
)

from pallas_kernels.common.cuda import Device
from pallas_kernels.dispatch import tuning
from pallas_kernels.wtconv import cuda as cuda_jax
from pallas_kernels.wtconv import vjp, wtconv2d
from pallas_kernels.wtconv.api import OPERATOR
from pallas_kernels.wtconv.cases import CASES, Case
from pallas_kernels.wtconv.problem import Problem

TAKEN = [case for case in CASES if takes(cuda_jax, case)]
SIZES = cuda_jax.search_space("fwd", Problem((1, 8, 8, 4), np.dtype("float32"), 3, 1, "haar"))[1:]
# The image of the tests of transformations, so that its kernels are built once.
WHOLE = Case((9, 10), 2, 3, batch=(2,))
SMALL = Device(shared=40000, multiprocessors=1)
"""On which images are cut into tiles, and deeper levels are launches of their own."""
TILED = Case((72, 61), 3, 3, batch=(1,))


@EMULATED
@pytest.mark.wide
def test_what_jax_launches_is_the_oracles_on_the_cpu(monkeypatch):
    emulate(monkeypatch, cuda_jax)
    assert_oracle(WHOLE, "cuda")


@EMULATED
@pytest.mark.slow
@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.name)
def test_every_case_on_the_cpu(case, monkeypatch):
    emulate(monkeypatch, cuda_jax)
    assert_oracle(case, "cuda")


@EMULATED
@pytest.mark.slow
def test_tiles_on_the_cpu(monkeypatch):
    emulate(monkeypatch, cuda_jax, SMALL)
    assert_oracle(TILED, "cuda")


@EMULATED
@pytest.mark.slow
def test_transformations_on_the_cpu(monkeypatch):
    emulate(monkeypatch, cuda_jax)
    assert_transformed("cuda")


@EMULATED
@pytest.mark.wide
@pytest.mark.parametrize("check_vma", [True, False])
def test_sharded_over_the_batch_on_the_cpu(check_vma, monkeypatch):
    emulate(monkeypatch, cuda_jax)
    assert_sharded("cuda", check_vma)


@pytest.fixture
def launches(monkeypatch):
    return recorded(monkeypatch, cuda_jax)


def traced(x, levels, kernel_size, config=(), direction="bwd"):
    """Traces one direction of a call."""
    taps = [jnp.zeros((kernel_size, kernel_size, bands, x.shape[-1])) for bands in (1, 4)]
    plan = vjp.Plan(cuda_jax, config, "haar", None, None)
    rest = (x,) if direction == "bwd" else ()
    weights = (taps[0], *[taps[1]] * levels), jnp.zeros(x.shape[-1])
    jax.eval_shape(vjp.timed_function(plan, direction), x, *weights, *rest)


def test_images_and_the_device_reach_the_launches(launches, monkeypatch):
    gpu_of(monkeypatch, "7.5", core_count=40)
    traced(jnp.zeros((2, 16, 18, 6), "bfloat16"), 2, 3)
    names, macros, numbers, blocks = zip(*launches, strict=True)
    assert names == ("wtconv_forward", "wtconv_weights")
    for each, count in zip(macros, (2, 2), strict=True):
        assert each["DTYPE"] == 1 and each["CHANNELS_LAST"] == 1 and each["LEVELS"] == count
        assert each["KERNEL_SIZE"] == 3 and each["TILED"] == 0
    # The number of images, the channels, height and width; whether taps are flipped.
    assert numbers[0] == [2, 6, 16, 18, 1] and numbers[1][:4] == [2, 6, 16, 18]
    assert all(count > 0 for count in blocks)


def test_levels_that_do_not_fit_are_launches_of_their_own(launches, monkeypatch):
    gpu_of(monkeypatch)
    traced(jnp.zeros((1, 224, 224, 4)), 5, 5, direction="fwd")
    assert [name for name, *_ in launches][:2] == ["wtconv_low", "wtconv_forward"]
    assert launches[-1][1]["BELOW"] == 1 and launches[-1][1]["BASE"] == 1
    assert sum(macros["LEVELS"] for name, macros, *_ in launches if name == "wtconv_forward") == 5


def test_sizes_reach_the_launches(launches, monkeypatch):
    gpu_of(monkeypatch, shared_memory_per_block_optin=SMALL.shared, core_count=1)
    for sizes in ({}, *SIZES):
        traced(jnp.zeros((1, 72, 61, 4)), 1, 3, tuple(sizes.items()), "fwd")
    assert len({str(launch) for launch in launches}) == len(launches) == 1 + len(SIZES)


REFUSED = {
    "3-D signals": {"shape": (2, 8, 8, 8, 4)},
    "float64": {"dtype": np.dtype("float64")},
    "'db2'": {"wavelet": "db2"},
    "kernels of 4": {"kernel_size": 4},
    "kernels of 11": {"kernel_size": 11},
    "0 levels": {"levels": 0},
    "6 levels": {"levels": 6},
    "an empty array": {"shape": (0, 8, 8, 4)},
    "symbolic size": {"shape": (*jax.export.symbolic_shape("b"), 8, 8, 4)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_done_says_so(reason):
    problem = Problem((2, 8, 8, 4), np.dtype("float32"), 5, 2, "haar")._replace(**REFUSED[reason])
    with pytest.raises(NotImplementedError, match=f"does not take .*{reason}"):
        cuda_jax.check("fwd", problem)


def test_without_a_gpu_it_says_what_is_missing():
    params = {"base_kernel": np.ones((3, 3, 1, 1)), "base_scale": np.ones(1)}
    with pytest.raises(NotImplementedError, match="cuda: needs a GPU, this is a cpu"):
        wtconv2d(np.ones((4, 4, 1), np.float32), params, implementation="cuda")


def test_where_no_other_kernel_runs_it_is_taken(monkeypatch):
    gpu_of(monkeypatch, "7.5")
    triton = OPERATOR.module("triton")
    monkeypatch.setattr(triton, "unavailable", lambda platform: "needs jax-triton")
    monkeypatch.setattr(cuda_jax, "unavailable", lambda platform: None)
    problem = Problem((2, 8, 8, 4), np.dtype("float16"), 5, 2, "haar")
    assert OPERATOR.pick("fwd", None, "gpu", problem) == "cuda"
    assert OPERATOR.pick("fwd", None, "gpu", problem._replace(kernel_size=4)) == "xla"


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*TAKEN, TILED], ids=lambda case: case.name)
def test_output_and_gradients_are_the_oracles(case):
    assert_oracle(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_size_on_a_gpu(sizes, monkeypatch):
    monkeypatch.setattr(cuda_jax, "search_space", lambda direction, problem: [sizes])
    with tuning("search"):
        for kernel_size in (3, 5):
            assert_oracle(Case((56, 57), 2, kernel_size, batch=(4,), channels=40), "cuda")


@pytest.mark.gpu
def test_large_images_in_tiles():
    assert_oracle(Case((301, 230), 5, 5, batch=(2,), channels=9), "cuda")


@pytest.mark.gpu
def test_gradients_are_bitwise_reproducible():
    assert_reproducible("cuda", Case((57, 60), 3, 5, batch=(64,), channels=40))


@pytest.mark.gpu
@pytest.mark.parametrize("check_vma", [True, False])
def test_sharded_over_the_batch(check_vma):
    assert_sharded("cuda", check_vma)


@pytest.mark.gpu
def test_transformations():
    assert_transformed("cuda")
