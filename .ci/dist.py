"""Builds sdist and wheel into dist/ and checks both: `python .ci/dist.py [--tag vX.Y.Z]`.

The wheel is built from the unpacked sdist, as pip builds it, and once more from the repository:
both must be the same bytes. It needs the extra `release`, and no network.
"""

import argparse
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("pallas_kernels", "flash_wtconv_jax", "torch_bridge")
# The first second that a zip file can hold, so that files differ by their contents alone.
EPOCH = "315532800"


def versions(root: Path) -> dict[str, str]:
    """The package's version by the files that state it; `pyproject.toml` is the one that counts."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = {"pyproject.toml": project["version"]}
    for name, line in (
        ("CITATION.cff", r"^version: (\S+)$"),
        ("CHANGELOG.md", r"^## ([\w.]+), (?:unreleased|\d{4}-\d{2}-\d{2})$"),
    ):
        match = re.search(line, (root / name).read_text(encoding="utf-8"), re.M)
        found[name] = match[1] if match else "none"
    return found


def files_of(root: Path) -> set[str]:
    """The files that a wheel of `root` must hold: all those of the three packages."""
    return {
        path.relative_to(root).as_posix()
        for package in PACKAGES
        for path in (root / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and ".build" not in path.parts
    }


def build(source: Path, folder: Path, target: str) -> Path:
    """Builds `target`, "sdist" or "wheel", of the tree `source` into `folder`, with hatchling.

    Raises:
        subprocess.CalledProcessError: If the build fails; its output was shown.
    """
    environment = {"SOURCE_DATE_EPOCH": EPOCH, **os.environ}
    command = [
        sys.executable,
        "-m",
        "hatchling",
        "build",
        "--target",
        target,
        "--directory",
        folder,
    ]
    subprocess.run(command, cwd=source, env=environment, check=True, stdout=subprocess.DEVNULL)
    (built,) = folder.glob("*.tar.gz" if target == "sdist" else "*.whl")
    return built


def build_both(root: Path, folder: Path) -> tuple[Path, Path, list[str]]:
    """Builds the sdist of `root`, and the wheel from it, into `folder`.

    Returns:
        The two files, and what is wrong with them, a sentence a problem.
    """
    sdist = build(root, folder, "sdist")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        with tarfile.open(sdist) as archive:
            archive.extractall(work, filter="data")
        unpacked = work / sdist.name.removesuffix(".tar.gz")
        wheel = build(unpacked, folder, "wheel")
        problems = list(differences(root, wheel))
        again = {
            "the sdist": (sdist, build(unpacked, work / "sdist", "sdist")),
            "the wheel": (wheel, build(root, work / "wheel", "wheel")),
        }
        for name, (first, second) in again.items():
            if first.read_bytes() != second.read_bytes():
                problems.append(
                    f"{name} built from the sdist and from {root} are not the same bytes"
                )
    return sdist, wheel, problems


def differences(root: Path, wheel: Path) -> Iterator[str]:
    """Yields the files that `wheel` lacks, and those that it should not hold."""
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = files_of(root)
    for name in sorted(wanted - held):
        yield f"{name} is not in the wheel: look at .gitignore and [tool.hatch.build]"
    for name in sorted(held - wanted):
        yield f"{name} is in the wheel, but not in {root}"


def main() -> int:
    """Builds into dist/, prints what is wrong, and returns the process' status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tag", default="", help="must name the version, as in v0.1.0")
    tag = parser.parse_args().tag
    found = versions(ROOT)
    version = found["pyproject.toml"]
    problems = [
        f"{name} says {other}, pyproject.toml says {version}"
        for name, other in found.items()
        if other != version
    ]
    if tag and tag != f"v{version}":
        problems.append(f"the tag {tag} does not name the version {version} of pyproject.toml")
    folder = ROOT / "dist"
    folder.mkdir(exist_ok=True)
    if any(folder.iterdir()):
        problems.append(f"{folder} is not empty; remove what is in it")
    if not problems:
        sdist, wheel, problems = build_both(ROOT, folder)
        for command in (
            ["twine", "check", "--strict", sdist, wheel],
            ["check_wheel_contents", wheel],
        ):
            if subprocess.run([sys.executable, "-m", *command]).returncode:
                problems.append(f"{command[0]} found what it printed above")
        print(f"{sdist.name}, {wheel.name}")
    for problem in problems:
        print(f"flash-wtconv: {problem}", file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
