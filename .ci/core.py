"""Runs the core on the Python that starts this: `python .ci/core.py --versions newest`.

`.ci/run` is for Linux and its two Pythons. This makes an environment of any Python on Linux, macOS
or Windows, with the newest versions of what the package needs, the oldest ones that it allows, or
pre-releases of JAX.
"""

import argparse
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "core"
MARKS = "core and not gpu and not mps and not tpu and not slow and not wide"


def oldest(requirements: list[str]) -> list[str]:
    """Constraints that take each requirement of the list at its lower bound."""
    pairs = (re.match(r"([\w-]+)(?:\[[^]]*\])?>=([\w.]+)", one) for one in requirements)
    return [f"{match[1]}=={match[2]}" for match in pairs if match]


def main() -> int:
    """Makes the environment, runs the tests and returns pytest's status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    choices = ("newest", "oldest", "pre-releases")
    parser.add_argument("--versions", choices=choices, default="newest")
    versions = parser.parse_args().versions
    venv.create(FOLDER, clear=True, with_pip=True)
    python = FOLDER / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    if versions == "oldest":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        constraints = FOLDER / "constraints.txt"
        constraints.write_text("\n".join(oldest(project["dependencies"])) + "\n", encoding="utf-8")
        pip += ["--constraint", constraints]
    subprocess.run([*pip, "--editable", f"{ROOT}[test-jax]"], check=True)
    if versions == "pre-releases":
        # Beyond what the package allows: to learn what the next version will break.
        subprocess.run([*pip, "--upgrade", "--pre", "jax", "jaxlib"], check=True)
    tests = [python, "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal", "-m", MARKS]
    return subprocess.run(tests, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
