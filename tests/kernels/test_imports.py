"""What may be imported without what: each import in a fresh interpreter."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.core

WITHOUT_JAX = [
    "pallas_kernels",
    "pallas_kernels.oracle",
    "pallas_kernels.dispatch",
    "pallas_kernels.conv2d",
    "pallas_kernels.conv2d.cases",
    "pallas_kernels.conv2d.problem",
    "pallas_kernels.conv2d.shapes",
    "pallas_kernels.haar",
    "pallas_kernels.haar.cases",
    "pallas_kernels.haar.filters",
    "pallas_kernels.common.files",
    "pallas_kernels.common.triton",
    "pallas_kernels.common.versions",
    "pallas_kernels.wtconv",
    "pallas_kernels.wtconv.cases",
    "pallas_kernels.common.conformance",
    "pallas_kernels.wtconv.problem",
    "pallas_kernels.wtconv.shapes",
    "torch_bridge",
    "flash_wtconv_jax",
    "flash_wtconv_jax.cli",
]

BLOCKED = """
import importlib, sys
for name in {blocked}:
    sys.modules[name] = None
for name in {names}:
    importlib.import_module(name)
"""


def run(code):
    """Runs code with warnings as errors; returns what it printed."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def test_imports_without_jax_and_without_torch():
    assert run(BLOCKED.format(blocked=["jax", "jaxlib", "flax", "torch"], names=WITHOUT_JAX)) == ""


def test_the_torch_bridge_needs_no_jax():
    pytest.importorskip("torch", reason="torch is not installed")
    rooms = "runtime.measuring", "wtconv.ops", "wtconv.triton", "wtconv.cuda", "check", "bench"
    names = [f"torch_bridge.{room}" for room in rooms]
    code = BLOCKED.format(blocked=["jax", "jaxlib", "flax"], names=names)
    code += "import torch, torch_bridge\n"
    # Measuring needs none either: a stand-in for `cuda` makes it a choice.
    code += "from pallas_kernels.dispatch import cache\n"
    code += "from torch_bridge.wtconv import eager\n"
    code += "store = cache.Cache(None)\ncache.user_cache = lambda: store\n"
    code += "eager.unavailable = lambda platform: None\n"
    code += "sys.modules['torch_bridge.wtconv.cuda'] = eager\n"
    code += "layer = torch_bridge.WTConv2d(2, 2, device='cpu', implementation='auto')\n"
    code += "print(layer(torch.ones(1, 2, 5, 5)).shape, len(store.entries(*store.kinds())))"
    assert run(code) == "torch.Size([1, 2, 5, 5]) 2\n"


def test_the_jax_side_needs_no_torch():
    names = ["flash_wtconv_jax.nnx", "flash_wtconv_jax.linen", "flash_wtconv_jax.models"]
    names += [
        "flash_wtconv_jax.checkpoints",
        "flash_wtconv_jax.surgery",
        "pallas_kernels.wtconv.api",
    ]
    code = BLOCKED.format(blocked=["torch", "matplotlib", "sklearn"], names=names)
    assert run(code + "print('matplotlib.pyplot' in sys.modules)") == "False\n"


def test_importing_a_layer_does_not_start_a_backend():
    """A backend claims a GPU's memory, and forbids `jax.distributed.initialize` afterwards."""
    code = """
from flash_wtconv_jax import WTConv2d, nnx, models, surgery, checkpoints
from pallas_kernels import haar, wtconv
haar.dwt2, wtconv.wtconv2d
from jax._src import xla_bridge
print(xla_bridge.backends_are_initialized())
"""
    assert run(code) == "False\n"
