"""The kernels take the named shapes of the platform that they are made for."""

import jax.numpy as jnp
import pytest
from helpers.haar import assert_large

from pallas_kernels.haar.api import OPERATOR
from pallas_kernels.haar.problem import Problem
from pallas_kernels.haar.shapes import FOR_PLATFORM, GPU_SHAPES

pytestmark = pytest.mark.core


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("implementation", "platform"),
    [(name, platform) for platform in FOR_PLATFORM for name in OPERATOR.rule[platform]],
)
def test_named_shapes_are_taken(implementation, platform, dtype):
    module = OPERATOR.module(implementation)
    for shape in FOR_PLATFORM[platform].values():
        problem = Problem(shape.x, jnp.dtype(dtype), 2, shape.levels, "haar")
        module.check("fwd", problem)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "mosaic_gpu"])
@pytest.mark.parametrize("name", [name for name in GPU_SHAPES if name.startswith("convnext")])
def test_named_shapes_are_those_of_plain_jax(implementation, name):
    assert_large(implementation, GPU_SHAPES[name].x)
