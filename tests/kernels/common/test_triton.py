"""Launches by jax-triton, which since version 0.4 calls the types of the outputs otherwise."""

import sys
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from pallas_kernels.common.triton import launch


@pytest.mark.parametrize(
    ("version", "name"), [((0, 3, 1), "out_shape"), ((0, 4, 0), "out_type"), ((0, 5), "out_type")]
)
def test_outputs_are_declared_as_the_version_expects(version, name, monkeypatch):
    def triton_call(*arguments, kernel, grid, num_warps, **outputs):
        assert (arguments, kernel, grid, num_warps) == (("x", 3), "kernel", (2, 1), 4)
        ((called, types),) = outputs.items()
        assert called == name
        return [(each.shape, each.dtype) for each in types]

    module = SimpleNamespace(__version_info__=version, triton_call=triton_call)
    monkeypatch.setitem(sys.modules, "jax_triton", module)
    outputs = [((2, 3), "bfloat16"), ((4,), "float32")]
    assert launch("kernel", ["x", 3], outputs, (2, 1), num_warps=4) == [
        ((2, 3), jnp.bfloat16),
        ((4,), jnp.float32),
    ]
