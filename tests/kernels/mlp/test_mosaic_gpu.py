"""The MLP's Mosaic GPU kernels: lowered and interpreted without a GPU, run on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.mosaic_gpu import SHARED, lowered, recorded_launches, shapes, shared_bytes

from pallas_kernels.common import conformance, device
from pallas_kernels.conv2d import TileConfig
from pallas_kernels.conv2d import mosaic_gpu as kernels
from pallas_kernels.mlp import conformance as room
from pallas_kernels.mlp import mosaic_gpu, xla
from pallas_kernels.mlp.cases import CASES
from pallas_kernels.mlp.shapes import SHAPES, Shape

TAKEN = [case for case in CASES if case.dtype in kernels.DTYPES]
RAGGED = {"ragged": Shape(131, 7), "pixel": Shape(1, 1)}


def launches(shape, transformed, config=None):
    """`transformed`, such as `lowered`, of the three products of an MLP."""
    rows, channels, hidden = shape.rows, shape.channels, shape.hidden
    x, kernel, bias, before = (
        jax.ShapeDtypeStruct(size, "bfloat16")
        for size in ((rows, channels), (channels, hidden), (hidden,), (rows, hidden))
    )
    back = jax.ShapeDtypeStruct((hidden, channels), "bfloat16")
    for kept in (False, True):
        yield transformed(kernels.mlp_product, x, kernel, bias, kept=kept, config=config)
    keys = {"transposed": True, "config": config}
    yield transformed(kernels.mlp_product, x, back, None, before, **keys)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.wide] * (name in SHAPES)) for name in SHAPES | RAGGED],
)
def test_kernels_lower_for_cuda(name):
    for text in launches((SHAPES | RAGGED)[name], lowered):
        assert "mosaic_gpu" in text


@pytest.mark.parametrize("name", [*SHAPES, *RAGGED])
def test_launches_fit_on_a_multiprocessor(name, monkeypatch):
    made = recorded_launches(monkeypatch)
    shape = (SHAPES | RAGGED)[name]
    for config in (None, *kernels.TILES):
        try:
            (one, *_), *_ = launches(shape, shapes, config)
        except NotImplementedError:
            assert config is not None
        else:
            assert one.shape == (shape.rows, shape.hidden)
    assert len(made) >= 3
    for scratch, _ in made:
        assert shared_bytes(scratch) <= SHARED and scratch[1].shape[0] >= 2


@pytest.fixture
def interpreted(gpu_interpreter, monkeypatch):
    """The implementation in Pallas' GPU interpreter, with few blocks."""
    monkeypatch.setattr(kernels, "MULTIPROCESSORS", 2)
    monkeypatch.setattr(mosaic_gpu, "unavailable", lambda platform: None)


def assert_oracle(case, run):
    """The output and all gradients are within twice the error of plain JAX in 16 bits."""
    got = run(room.computed(case, "mosaic_gpu"))(*case.drawn())
    bounds = conformance.bounds(case, lambda case: room.baseline(case)(*case.drawn()))
    for name, want in conformance.expected(case).items():
        assert conformance.worst(got[name], want) <= bounds[name], name


@pytest.mark.wide
@pytest.mark.parametrize("case", TAKEN[:2], ids=lambda case: case.name)
def test_interpreted_kernels_against_the_oracle(case, interpreted):
    assert_oracle(case, lambda function: function)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tiles", [TileConfig(64, 64, 16, 4, 1, 3), TileConfig(128, 64, 16, 8, 1, 3)], ids=str
)
def test_interpreted_tiles_against_plain_jax(tiles, interpreted):
    """Consumers that take alternate tiles, and that share one; several stores a tile."""
    rng = np.random.default_rng(0)
    x, kernel, bias, before, dy = (
        jnp.asarray(rng.normal(size=size), "float16")
        for size in ((150, 24), (24, 72), (72,), (150, 72), (150, 24))
    )
    got = kernels.mlp_product(x, kernel, bias, kept=True, config=tiles)
    got += kernels.mlp_product(dy, kernel.T, None, before, transposed=True, config=tiles)
    back = {"kernel": kernel.T, "before": before, "precision": None}
    want = xla.widened(x, kernel, bias, kept=True, precision=None)
    want += xla.narrowed_grad(dy, **back)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(device.platform() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.name)
def test_kernels_on_a_gpu(case):
    reason = mosaic_gpu.unavailable("gpu")
    if reason:
        pytest.skip(reason)
    assert_oracle(case, jax.jit)
