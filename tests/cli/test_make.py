"""The Makefile says in one line what is wrong, and recovers; no test here needs a network."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


@pytest.fixture
def clone(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def fail(clone, *arguments, **environment):
    """Runs make, which must fail, and returns the lines on stderr that are not make's own."""
    result = subprocess.run(
        ["make", *arguments],
        cwd=clone,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode != 0
    return [line for line in result.stderr.splitlines() if not line.startswith("make")]


def fake_python(folder, version):
    """An interpreter that says it is old."""
    path = folder / "python-old"
    path.write_text(f"#!/bin/sh\necho {version}\nexit 1\n")
    path.chmod(0o755)
    return path


def test_no_python_is_one_line(clone):
    (line,) = fail(clone, "demo", "PYTHON=/nowhere/python3")
    assert line.startswith("flash-wtconv: needs Python 3.11 or newer, found none; install one")
    assert not (clone / ".venv").exists()


def test_an_old_python_is_named(clone):
    (line,) = fail(clone, "test", f"PYTHON={fake_python(clone, '3.9.18')}")
    assert "found none" in line and "python-old is 3.9.18" in line


def test_an_installation_that_was_interrupted_is_not_used(clone):
    # `make demo` was done, and then `make test` interrupted.
    (clone / ".venv").mkdir()
    for name, time in ((".installed-demo", 1), (".unfinished", 2)):
        (clone / ".venv" / name).touch()
        os.utime(clone / ".venv" / name, (2**31 + time, 2**31 + time))
    (line,) = fail(clone, "demo", "PYTHON=/nowhere/python3")
    assert line.startswith("flash-wtconv: needs Python 3.11 or newer, found none; install one")


@pytest.mark.wide
def test_no_network_is_one_line_and_no_stamp(clone):
    offline = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_FIND_LINKS": "",
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_NO_CACHE_DIR": "1",
        "PIP_RETRIES": "0",
    }
    (line,) = fail(clone, "demo", f"PYTHON={sys.executable}", **offline)
    assert line.startswith("flash-wtconv: no network: pip could not reach the package index")
    left = {path.name for path in (clone / ".venv").iterdir()}
    assert "install.log" in left
    assert not left & {".installed-demo", ".unfinished"}
