"""Builds sdist and wheel into dist/ and checks both: `python .ci/dist.py [--tag vX.Y.Z]`.

The wheel is built from the unpacked sdist, as pip builds it, and once more from the repository:
both must be the same bytes. Both are then installed into an empty environment, where commands and
the quickstart's code must run. It needs the extra `release`, and for the last part the network.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import tomllib
import venv
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


def disagreements(found: dict[str, str], tag: str) -> Iterator[str]:
    """Yields the files of `versions`, and the tag if there is one, that name another version."""
    version = found["pyproject.toml"]
    for name, other in found.items():
        if other != version:
            yield f"{name} says {other}, pyproject.toml says {version}"
    if tag and tag != f"v{version}":
        yield f"the tag {tag} does not name the version {version} of pyproject.toml"


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
        problems = [*differences(root, wheel), *left_out(root, unpacked)]
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


def left_out(root: Path, unpacked: Path) -> Iterator[str]:
    """Yields the files that git tracks in `root` and that the unpacked sdist lacks."""
    command = ["git", "ls-files", "-z"]
    tracked = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    for name in filter(None, tracked.stdout.split("\0")):
        if (root / name).is_file() and not (unpacked / name).is_file():
            yield f"{name} is not in the sdist: add it to [tool.hatch.build.targets.sdist]"


def faults(sdist: Path, wheel: Path) -> Iterator[str]:
    """Yields what twine, check-wheel-contents and pyroma say where they find a fault."""
    for name, *arguments in (
        ("twine", "check", "--strict", sdist, wheel),
        ("check_wheel_contents", wheel),
        # There is no address of an author, and none is invented.
        ("pyroma", "--min", "10", "--skip-tests", "AuthorEmail", sdist),
    ):
        command = [sys.executable, "-m", name, *map(str, arguments)]
        # Where check-wheel-contents finds its settings.
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            yield f"{name} says:\n{(done.stdout + done.stderr).strip()}"


def blocks(page: str) -> list[str]:
    """The Python blocks of a page that do not take PyTorch, which the core does not need."""
    found = re.findall(r"^( *)```python\n(.*?)^\1```$", page, re.M | re.S)
    return [textwrap.dedent(code) for _, code in found if "torch" not in code]


def called(prefix: Path, program: str, *arguments: str) -> str:
    """Returns what a program of the environment `prefix` prints, in an empty folder.

    Raises:
        RuntimeError: If it fails; with the last lines of what it said.
    """
    # Where the packages would be found without being installed.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(prefix / "bin" / program), *arguments]
    with tempfile.TemporaryDirectory() as empty:
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()[-15:]
        raise RuntimeError("\n".join([f"{program} {' '.join(arguments)} failed:", *lines]))
    return done.stdout


def try_both(sdist: Path, wheel: Path, quickstart: str) -> tuple[str, str]:
    """Installs the wheel, then the sdist, into an empty environment, and tries what is there.

    Args:
        sdist: The one archive.
        wheel: The other.
        quickstart: The page whose code is run.

    Returns:
        The versions that the installed wheel and the installed sdist state.

    Raises:
        RuntimeError: If something fails.
    """
    with tempfile.TemporaryDirectory() as name:
        prefix = Path(name)
        venv.create(prefix, with_pip=True)
        pip = ("python", "-m", "pip", "--disable-pip-version-check")
        called(prefix, *pip, "install", str(wheel))
        called(prefix, *pip, "check")
        of_wheel = json.loads(called(prefix, "flash-wtconv", "info", "--json"))["versions"]
        called(prefix, "flash-wtconv", "check")
        called(prefix, "python", "-c", "\n".join(blocks(quickstart)))
        called(prefix, *pip, "install", "--no-deps", "--force-reinstall", str(sdist))
        of_sdist = called(prefix, "flash-wtconv", "--version").split()[-1]
    return of_wheel["flash-wtconv"], of_sdist


def main() -> int:
    """Builds into dist/, prints what is wrong, and returns the process' status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tag", default="", help="must name the version, as in v0.1.0")
    tag = parser.parse_args().tag
    found = versions(ROOT)
    problems = list(disagreements(found, tag))
    folder = ROOT / "dist"
    folder.mkdir(exist_ok=True)
    if any(folder.iterdir()):
        problems.append(f"{folder} is not empty; remove what is in it")
    if not problems:
        sdist, wheel, problems = build_both(ROOT, folder)
        print(f"{sdist.name}, {wheel.name}")
        problems += faults(sdist, wheel)
    if not problems:
        quickstart = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
        try:
            found["the wheel"], found["the sdist"] = try_both(sdist, wheel, quickstart)
            problems = list(disagreements(found, tag))
        except RuntimeError as error:
            problems = [str(error)]
    for problem in problems:
        print(f"flash-wtconv: {problem}", file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
