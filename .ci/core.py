"""Runs the core on the Python that starts this: `python .ci/core.py --versions newest`.

`.ci/run` is for Linux and its two Pythons. This makes an environment of any Python on Linux, macOS
or Windows, with the newest versions of what the package needs, the oldest ones that it allows, or
pre-releases of JAX, and runs the tests of the unpacked sdist, away from the repository.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "core"
# Where JAX puts each night's build; PyPI has its releases alone.
NIGHTLY = "https://us-python.pkg.dev/ml-oss-artifacts-published/jax/simple/"
MARKS = "core and not gpu and not mps and not tpu and not slow and not wide"


def unpacked(python: Path) -> Path:
    """The folder of the sdist, which is built with an environment's Python, and unpacked.

    Raises:
        subprocess.CalledProcessError: If the build fails; its output was shown.
    """
    build = [python, "-m", "hatchling", "build", "--target", "sdist", "--directory", FOLDER]
    subprocess.run(build, cwd=ROOT, check=True)
    (sdist,) = FOLDER.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(FOLDER, filter="data")
    return FOLDER / sdist.name.removesuffix(".tar.gz")


def main() -> int:
    """Makes the environment, runs the tests and returns pytest's status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    choices = ("newest", "oldest", "pre-releases")
    parser.add_argument("--versions", choices=choices, default="newest")
    versions = parser.parse_args().versions
    venv.create(FOLDER, clear=True, with_pip=True)
    python = FOLDER / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    subprocess.run([*pip, *project["build-system"]["requires"]], check=True)
    source = unpacked(python)
    install = pip
    if versions == "oldest":
        # pip takes the newest versions alone.
        subprocess.run([*pip, "uv"], check=True)
        install = [python, "-m", "uv", "pip", "install", "--resolution", "lowest-direct"]
        install += ["--python", python]
    subprocess.run([*install, "--editable", f"{source}[test-jax]"], check=True)
    if versions == "pre-releases":
        # Beyond what the package allows: to learn what the next version will break.
        newer = ["--upgrade", "--pre", "--extra-index-url", NIGHTLY, "jax", "jaxlib"]
        subprocess.run([*pip, *newer], check=True)
    tests = [python, "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal", "-m", MARKS]
    return subprocess.run(tests, cwd=source).returncode


if __name__ == "__main__":
    sys.exit(main())
