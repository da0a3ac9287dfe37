"""The parts of a release: one version, files at the top, workflows, licences, two archives."""

import importlib.util
import re
import shutil
import subprocess
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def script(name):
    """A module of .ci, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


dist = script("dist")
core = script("core")
licences = script("licences")


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


class TestTheVersion:
    def test_is_one(self):
        found = dist.versions(ROOT)
        assert len(set(found.values())) == 1, found

    @pytest.mark.parametrize(
        ("name", "old", "new"),
        [
            ("CITATION.cff", "\nversion: ", "\nversion: 9"),
            ("CHANGELOG.md", "\n## ", "\n## 9"),
            ("pyproject.toml", '\nversion = "', '\nversion = "9'),
        ],
    )
    def test_one_that_differs_is_seen(self, tmp_path, name, old, new):
        for one in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md"):
            shutil.copy(ROOT / one, tmp_path)
        path = tmp_path / name
        path.write_text(read(name).replace(old, new, 1), encoding="utf-8")
        found = dist.versions(tmp_path)
        assert found.pop(name).startswith("9")
        assert len(set(found.values())) == 1


def listed_at_the_top():
    """The names that CONTRIBUTING.md lists as those of the top level."""
    section = read("CONTRIBUTING.md").split("## The top level", 1)[1].split("\n## ", 1)[0]
    return set(re.findall(r"`([^`]+)`", section.split("\n\n")[1]))


def held_at_the_top():
    """The files that git tracks, or those of an sdist; a developer's own files do not count."""
    command = ["git", "-C", str(ROOT), "ls-tree", "HEAD"]
    if (ROOT / ".git").exists() and shutil.which("git"):
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        if lines:
            return {line.partition("\t")[2] + "/" * (" tree " in line) for line in lines}
    return {path.name + "/" * path.is_dir() for path in ROOT.iterdir()} - {"PKG-INFO"}


def test_the_top_level_holds_what_contributing_lists():
    assert held_at_the_top() == listed_at_the_top()


class TestWorkflows:
    PATHS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

    @pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
    def test_actions_are_pinned_and_permissions_stated(self, path):
        text = path.read_text(encoding="utf-8")
        used = re.findall(r"uses: (.+)", text)
        assert used
        for one in used:
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", one), one
        assert re.search(r"^permissions:", text, re.M)
        assert text.count("persist-credentials: false") == text.count("actions/checkout@")
        assert text.count("timeout-minutes:") == text.count("runs-on:")

    def test_every_action_has_one_hash(self):
        used = {one for path in self.PATHS for one in re.findall(r"uses: (\S+)", path.read_text())}
        assert len(used) == len({one.partition("@")[0] for one in used})

    @pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
    def test_what_they_call_exists(self, path):
        text = path.read_text(encoding="utf-8")
        targets = re.findall(r"run: make ([\w-]+)", text)
        assert set(targets) <= set(re.findall(r"^([\w-]+):", read("Makefile"), re.M))
        for one in re.findall(r"run: (?:python )?(\.ci/\S+)", text):
            assert (ROOT / one).is_file()


def test_the_oldest_versions_are_the_lower_bounds():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    found = core.oldest(project["dependencies"])
    assert len(found) == len(project["dependencies"])
    assert core.oldest(["jax>=0.10.2,<0.13", "ml_dtypes>=0.5", "jax[tpu]>=1"]) == [
        "jax==0.10.2",
        "ml_dtypes==0.5",
        "jax==1",
    ]


class TestLicences:
    ROWS = licences.rows_of(read("docs/licences.md"))

    def test_none_is_copyleft(self):
        assert len(self.ROWS) > 50
        assert not list(licences.problems(self.ROWS))

    @pytest.mark.parametrize("stated", ["GPL-3.0-only", "GNU Lesser General Public License v3"])
    def test_a_copyleft_one_is_seen(self, stated):
        (problem,) = licences.problems({"numpy": "BSD-3-Clause", "library": stated})
        assert problem == f"library is under {stated}: a copyleft licence"

    def test_every_requirement_has_a_row(self):
        named = {
            licences.canonicalize_name(re.match(r"[\w-]+", one)[0])
            for part in licences.extras(ROOT).values()
            for one in part
        }
        assert named - set(self.ROWS) == {"flash-wtconv"}, "run .ci/licences.py"

    def test_what_the_core_leads_to_has_a_row(self):
        parts = licences.extras(ROOT)
        assert set(licences.closure(parts["core"], parts)) <= set(self.ROWS), "run .ci/licences.py"


class TestArchives:
    def test_a_file_that_is_left_out_is_seen(self, tmp_path):
        for name in ("pallas_kernels/a.cu", "torch_bridge/b.py", "torch_bridge/__pycache__/b.pyc"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("")
        wheel = tmp_path / "one.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("torch_bridge/b.py", "")
            archive.writestr("flash_wtconv_jax/c.json", "")
            archive.writestr("one.dist-info/RECORD", "")
        missing, surplus = dist.differences(tmp_path, wheel)
        assert missing.startswith("pallas_kernels/a.cu is not in the wheel")
        assert surplus.startswith("flash_wtconv_jax/c.json is in the wheel")

    @pytest.mark.wide
    def test_both_are_whole_and_the_same_bytes_each_time(self, tmp_path):
        for name in ("hatchling", "hatch_fancy_pypi_readme"):
            pytest.importorskip(name, reason=f"{name}, of the extra release, is not installed")
        sdist, wheel, problems = dist.build_both(ROOT, tmp_path)
        assert not problems
        with zipfile.ZipFile(wheel) as archive:
            held = set(archive.namelist())
            (metadata,) = (name for name in held if name.endswith("/METADATA"))
            described = archive.read(metadata).decode()
        # What the code opens beside Python files, one of each kind.
        for name in (
            "pallas_kernels/dispatch/defaults/nvidia_h200.json",
            "pallas_kernels/wtconv/cuda_kernels.cu",
            "pallas_kernels/common/tensor_cores.cuh",
            "torch_bridge/coreml/swift/Sources/WTConvCore/Resources/wtconv.metal",
            "torch_bridge/coreml/swift/Package.swift",
            "pallas_kernels/common/on_cpu/fibers.h",
            "torch_bridge/py.typed",
        ):
            assert name in held
        version = dist.versions(ROOT)["pyproject.toml"]
        assert f"\nVersion: {version}\n" in described
        # The package index shows neither pictures nor pages that are relative to the repository.
        assert not re.findall(r"\]\((?!https?://|#)[^)]+\)", described)
        assert "raw.githubusercontent.com" in described
        assert {sdist.name, wheel.name} == {
            f"flash_wtconv-{version}.tar.gz",
            f"flash_wtconv-{version}-py3-none-any.whl",
        }
