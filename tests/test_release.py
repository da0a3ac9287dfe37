"""The parts of a release: one version, files at the top, workflows, licences, two archives."""

import importlib.util
import re
import shutil
import subprocess
import tarfile
import zipfile
from contextlib import nullcontext, suppress
from importlib.metadata import PackageNotFoundError
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
        assert found[name].startswith("9")
        assert len(list(dist.disagreements(found, tag=""))) == (
            2 if name == "pyproject.toml" else 1
        )

    def test_a_tag_of_another_version_is_seen(self):
        found = {"pyproject.toml": "0.1.0", "CITATION.cff": "0.1.0"}
        assert not list(dist.disagreements(found, tag="v0.1.0"))
        assert list(dist.disagreements(found | {"the wheel": "0.1"}, tag="0.1.0")) == [
            "the wheel says 0.1, pyproject.toml says 0.1.0",
            "the tag 0.1.0 does not name the version 0.1.0 of pyproject.toml",
        ]


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


def faults_of_workflow(text):
    """Yields what a workflow does that none may do."""
    for one in re.findall(r"uses: *(.+)", text):
        if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", one):
            yield f"{one} is not pinned by a hash with its version behind"
    targets = re.findall(r"^([\w-]+):", read("Makefile"), re.M)
    for one in re.findall(r"run: *(.+)", text):
        command = re.fullmatch(r"(?:make ([\w-]+)|(?:python )?(\.ci/\w+(?:\.py)?))(?: .+)?", one)
        known = command and (command[1] in targets or (ROOT / (command[2] or "none")).is_file())
        if not known or re.search(r"[;&|]", one):
            yield f"{one!r} is logic of its own: put it into the Makefile or .ci/"
    if not re.search(r"^permissions: \{\}$", text, re.M):
        yield "permissions are not taken away at the top"
    for marks, what in (
        (("persist-credentials: false", "actions/checkout@"), "a checkout keeps its credentials"),
        (("timeout-minutes:", "runs-on:"), "a job has no limit"),
        (("    permissions:\n", "runs-on:"), "a job does not say its permissions"),
    ):
        if text.count(marks[0]) != text.count(marks[1]):
            yield what


class TestWorkflows:
    PATHS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))

    @pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
    def test_are_pinned_bounded_and_without_logic(self, path):
        assert not list(faults_of_workflow(path.read_text(encoding="utf-8")))

    @pytest.mark.parametrize(
        ("old", "new", "fault"),
        [
            (r"(actions/checkout)@\w+ # v[\d.]+", r"\1@v7", "checkout@v7 is not pinned"),
            (r"run: \.ci/run", "run: .ci/run && echo done", "logic of its own"),
            (r"run: \.ci/run", "run: pip install -e .", "logic of its own"),
            (r"run: \.ci/run", "run: make gone", "logic of its own"),
            (r"permissions: \{\}", "permissions: write-all", "at the top"),
            (r"\n *persist-credentials: false", "", "keeps its credentials"),
            (r"\n *timeout-minutes: \d+", "", "no limit"),
            (r"\n    permissions:\n.*", "", "does not say its permissions"),
        ],
    )
    def test_a_fault_is_seen(self, old, new, fault):
        text, changed = re.subn(old, new, read(".github/workflows/ci.yml"), count=1)
        (found,) = faults_of_workflow(text)
        assert changed and fault in found

    def test_every_action_has_one_hash(self):
        used = {one for path in self.PATHS for one in re.findall(r"uses: (\S+)", path.read_text())}
        assert len(used) == len({one.partition("@")[0] for one in used})


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

    def test_what_is_installed_here_is_listed_and_not_copyleft(self):
        parts = licences.extras(ROOT)
        stated = {}
        for part, requirements in parts.items():
            # Not every extra is installed, and of those that are not nothing can be read.
            with nullcontext() if part == "core" else suppress(PackageNotFoundError):
                for name in licences.closure(requirements, parts):
                    assert part != "core" or name in self.ROWS, "run .ci/licences.py"
                    stated[name] = licences.licence(name)
        assert "jax" in stated and not list(licences.problems(stated))


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

    def test_a_file_that_the_sdist_lacks_is_seen(self, tmp_path, monkeypatch):
        for name in ("kept.py", "forgotten.py"):
            (tmp_path / name).write_text("")
        listed = subprocess.CompletedProcess([], 0, stdout="kept.py\0forgotten.py\0removed.py\0")
        monkeypatch.setattr(dist.subprocess, "run", lambda *_, **__: listed)
        (tmp_path / "sdist").mkdir()
        (tmp_path / "sdist" / "kept.py").write_text("")
        (found,) = dist.left_out(tmp_path, tmp_path / "sdist")
        assert found.startswith("forgotten.py is not in the sdist")

    def test_the_quickstart_is_run_but_for_pytorch_s_part(self):
        code = "\n".join(dist.blocks(read("docs/quickstart.md")))
        for name in ("WTConv2d(", "nnx.Optimizer(", "replace_depthwise("):
            assert name in code
        compile(code, "quickstart", "exec")
        assert "torch" not in code


@pytest.fixture(scope="class")
def archives(tmp_path_factory):
    """The sdist, the wheel, and what is wrong with them."""
    for name in ("hatchling", "hatch_fancy_pypi_readme"):
        pytest.importorskip(name, reason=f"{name}, of the extra release, is not installed")
    return dist.build_both(ROOT, tmp_path_factory.mktemp("dist"))


@pytest.mark.wide
class TestBuiltArchives:
    def test_are_whole_and_the_same_bytes_each_time(self, archives):
        sdist, wheel, problems = archives
        assert not problems
        with zipfile.ZipFile(wheel) as archive:
            held = set(archive.namelist())
            (metadata,) = (name for name in held if name.endswith("/METADATA"))
            described = archive.read(metadata).decode()
        # What the code opens beside Python files, one of each kind.
        for name in (
            "flash_wtconv_jax/stylize/stained_glass.safetensors",
            "pallas_kernels/common/on_cpu/fibers.h",
            "pallas_kernels/common/on_cpu/runtime.cpp",
            "pallas_kernels/common/tensor_cores.cuh",
            "pallas_kernels/dispatch/defaults/nvidia_h200.json",
            "pallas_kernels/wtconv/cuda_kernels.cu",
            "torch_bridge/coreml/swift/Package.swift",
            "torch_bridge/coreml/swift/Sources/WTConvCore/Resources/wtconv.metal",
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

    def test_nothing_is_said_against_them_and_a_fault_is_seen(self, archives, tmp_path):
        pytest.importorskip("pyroma", reason="pyroma, of the extra release, is not installed")
        sdist, wheel, _ = archives
        assert not list(dist.faults(sdist, wheel))
        spoiled = tmp_path / wheel.name
        with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(spoiled, "w") as archive:
            for name in whole.namelist():
                if name.endswith(".dist-info/METADATA"):
                    archive.writestr(name, b"Metadata-Version: 2.4\nName: flash-wtconv\n")
                elif name.endswith(".dist-info/RECORD"):
                    archive.writestr(name, whole.read(name) + b"surplus.py,,\n")
            archive.writestr("surplus.py", "")
        inside = sdist.name.removesuffix(".tar.gz")
        about = read("pyproject.toml")
        about = re.sub(r"^(description|keywords|requires-python) = .*\n", "", about, flags=re.M)
        with tarfile.open(tmp_path / sdist.name, "w:gz") as archive:
            for name, text in (("pyproject.toml", about), ("README.md", ""), ("LICENSE", "")):
                (tmp_path / name).write_text(text, encoding="utf-8")
                archive.add(tmp_path / name, f"{inside}/{name}")
        found = [one.partition(" says")[0] for one in dist.faults(tmp_path / sdist.name, spoiled)]
        assert found == ["twine", "check_wheel_contents", "pyroma"]
