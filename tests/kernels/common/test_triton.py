"""Launches by jax-triton, which since version 0.4 calls the types of the outputs otherwise."""

import os
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from pallas_kernels.common.triton import launch, unavailable


@pytest.mark.parametrize(
    ("version", "name"), [((0, 3, 1), "out_shape"), ((0, 4, 0), "out_type"), ((0, 5), "out_type")]
)
def test_outputs_are_declared_as_the_version_expects(version, name, monkeypatch):
    def triton_call(*arguments, kernel, grid, num_warps, **outputs):
        assert (arguments, kernel, grid, num_warps) == (("x", 3), "kernel", (2, 1), 4)
        over = outputs.pop("input_output_aliases", None)
        # 0.4 would take the output from the kernel.
        assert over == ({0: 1} if version < (0, 4) else None)
        ((called, types),) = outputs.items()
        assert called == name
        return [(each.shape, each.dtype) for each in types]

    module = SimpleNamespace(__version_info__=version, triton_call=triton_call)
    monkeypatch.setitem(sys.modules, "jax_triton", module)
    outputs = [((2, 3), "bfloat16"), ((4,), "float32")]
    assert launch("kernel", ["x", 3], outputs, (2, 1), num_warps=4, written_over={0: 1}) == [
        ((2, 3), jnp.bfloat16),
        ((4,), jnp.float32),
    ]


@pytest.mark.parametrize("kept", [None, "a folder"])
def test_importing_jax_triton_leaves_tritons_cache_alone(kept, monkeypatch, tmp_path):
    (tmp_path / "jax_triton.py").write_text("import os\nos.environ['TRITON_CACHE_DIR'] = ''\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "jax_triton", raising=False)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    if kept is not None:
        monkeypatch.setenv("TRITON_CACHE_DIR", kept)
    assert unavailable("gpu") is None
    assert sys.modules.pop("jax_triton").__file__ == str(tmp_path / "jax_triton.py")
    assert os.environ.get("TRITON_CACHE_DIR") == kept
