"""The files of docs/adding_an_operator.md work, in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TITLED = re.compile(r'^```python title="(?P<path>[^"]+)"\n(?P<text>.*?)^```$', re.M | re.S)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of pallas_kernels and of the tests' helpers, with the files of the page."""
    folder = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("pallas_kernels", "tests/helpers"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in (
        "pyproject.toml",
        "tests/conftest.py",
        "tests/kernels/conftest.py",
        "tests/kernels/test_contract.py",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    files = {
        m["path"]: m["text"]
        for m in TITLED.finditer((ROOT / "docs" / "adding_an_operator.md").read_text())
    }
    assert len(files) == 11
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def run(copy, *arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(copy), str(copy / "tests")])}
    return subprocess.run(
        [sys.executable, *arguments], cwd=copy, env=environment, capture_output=True, text=True
    )


def test_the_new_operator_passes_the_contract(copy):
    arguments = "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "box2d"
    done = run(copy, "-m", "pytest", *arguments, "tests/kernels/test_contract.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 15


def test_its_files_are_as_ours_are(copy):
    pytest.importorskip("ruff", reason="ruff is not installed")
    for command in (("check",), ("format", "--check")):
        done = run(copy, "-m", "ruff", *command, "pallas_kernels/box2d")
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.wide
def test_its_triton_kernel_computes_the_cases(copy):
    pytest.importorskip("triton", reason="Triton is for Linux alone")
    pytest.importorskip("torch", reason="Triton's interpreter takes PyTorch's tensors")
    code = """
from helpers.triton import launch, tensor
from pallas_kernels.box2d import triton_kernels
from pallas_kernels.box2d.cases import CASES
from pallas_kernels.common.conformance import worst
for case in CASES:
    if case.dtype == "float32":
        x, _ = case.drawn()
        n, h, w, c = x.shape
        grid = n * h * w, -(-c // 16)
        (y,) = launch(
            triton_kernels.box, [tensor(x), h, w, c], [(x.shape, "float32")], grid,
            SIZE=case.size, BLOCK=16,
        )
        assert worst(y.numpy(), case.expected()["y"]) <= case.tolerance("y")
        print(case.name)
"""
    done = run(copy, "-c", "import os; os.environ['TRITON_INTERPRET'] = '1'\n" + code)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 3
