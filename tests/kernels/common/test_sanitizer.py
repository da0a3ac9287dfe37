"""NVIDIA's compute-sanitizer watches the kernels on a few small cases."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "helpers" / "sanitized.py"
TOOLS = {
    # Libraries ask the driver for functions that it does not have, and go on without.
    "memcheck": ["--report-api-errors", "no"],
    "racecheck": [],
}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("framework", "implementation"),
    [
        *(("jax", name) for name in ("cuda", "mosaic_gpu", "triton")),
        *(("torch", name) for name in ("cuda", "triton")),
    ],
)
def test_no_access_outside_of_an_array_and_no_race(framework, implementation, tmp_path):
    places = os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"])
    sanitizer = shutil.which("compute-sanitizer", path=places)
    if sanitizer is None:
        pytest.skip("compute-sanitizer, of NVIDIA's CUDA toolkit, is not installed")
    if framework == "torch":
        pytest.importorskip("torch", reason="torch is not installed")
    # Not beside the script, where a module has the name of NVIDIA's package.
    command = [sys.executable, "-P", SCRIPT, framework, implementation]
    keys = {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        # Else XLA times variants of its own kernels, which take minutes each under a tool.
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
    }
    environment = os.environ | keys
    # What the tools watch is compiled once, without them.
    subprocess.run(command, env=environment, check=True)
    runs = {
        tool: subprocess.Popen(
            [sanitizer, "--tool", tool, *options, "--error-exitcode", "99", *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for tool, options in TOOLS.items()
    }
    told = {tool: run.communicate()[0] for tool, run in runs.items()}
    refused = {tool for tool, text in told.items() if "Device" in text and "not supported" in text}
    failed = [tool for tool, run in runs.items() if run.returncode and tool not in refused]
    assert {tool: told[tool][-4000:] for tool in failed} == {}
    if refused:
        pytest.skip(f"compute-sanitizer refuses this device: {told[refused.pop()][-300:]}")
