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
@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    ("framework", "implementation"),
    [
        *(("jax", name) for name in ("cuda", "mosaic_gpu", "triton")),
        *(("torch", name) for name in ("cuda", "triton")),
    ],
)
def test_no_access_outside_of_an_array_and_no_race(framework, implementation, tool):
    places = os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"])
    sanitizer = shutil.which("compute-sanitizer", path=places)
    if sanitizer is None:
        pytest.skip("compute-sanitizer, of NVIDIA's CUDA toolkit, is not installed")
    if framework == "torch":
        pytest.importorskip("torch", reason="torch is not installed")
    command = [sanitizer, "--tool", tool, *TOOLS[tool], "--error-exitcode", "99"]
    run = subprocess.run(
        # Not beside the script, where a module has the name of NVIDIA's package.
        [*command, sys.executable, "-P", SCRIPT, framework, implementation],
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    )
    told = run.stdout[-4000:] + run.stderr[-4000:]
    if "not supported" in told and "Device" in told:
        pytest.skip(f"compute-sanitizer refuses this device: {told[-300:]}")
    assert run.returncode == 0, told
