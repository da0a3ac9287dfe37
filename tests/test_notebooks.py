"""Every notebook runs from its first cell to its last, and is stored with what its cells show."""

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
jupyter_client = pytest.importorskip("jupyter_client")
for name in ("ipykernel", "sklearn"):
    # Not imported here, where every worker would wait for it.
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}", allow_module_level=True)

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# What they show is a GPU's or a TPU's: whoever has one runs and stores it.
FOR_ACCELERATORS = {"roofline", "tpu_quickstart"}


def stored(name):
    """The module `.ci/notebooks.py`, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


notebooks = stored("notebooks")


def notebook_id(path):
    return path.stem


def test_there_are_notebooks():
    assert NOTEBOOKS


# Of notebooks that take long, what to write in its place here: fewer steps, taps and levels, and
# smaller images.
SHORTER = {
    "equivalence": {"LEVELS = 8, 5, 3": "LEVELS = 8, 3, 1"},
    "quickstart": {
        "model = WTConv2d(channels=64, kernel_size=5": "model = WTConv2d(64, kernel_size=3",
        "wt.WTConv2d(channels=64, kernel_size=5": "wt.WTConv2d(64, kernel_size=3",
        "epochs=EPOCHS": "epochs=1",
        "in NETWORKS.items()": "in [*NETWORKS.items()][:1]",
        "(2, 128, 128, 64)": "(2, 32, 32, 64)",
        "strips = load_strips()": "strips = type(load_strips())(*(a[::6] for a in load_strips()))",
        "(64, 64, 1)": "(24, 24, 1)",
    },
    "receptive_fields": {
        "SIDE = 64": "SIDE = 32",
        "samples=16": "samples=2",
        "levels=(3,)": "levels=(1,)",
    },
    # To compile the U-Net's training takes longest, which `flax/models/test_sparse.py` does.
    "sparse_voxels": {"EPOCHS = 15": "EPOCHS = 1", 'network("SparseUNet"': 'network("linear"'},
    "style_transfer": {'"china.jpg")), 160)': '"china.jpg")), 64)'},
    "tpu_quickstart": {"[2:5]": "[2:3]"},
    # Beside the suite's own flags.
    "sharding": {
        "device_count=8": f"device_count=8 {os.environ.get('XLA_FLAGS', '')}",
        "depth=2": "depth=1",
    },
}
# It says how many devices there are before JAX starts.
ALONE = {"sharding"}


@pytest.fixture(scope="module")
def kernel():
    """A kernel that notebooks share, as each would import JAX, Flax and matplotlib anew."""
    manager = jupyter_client.AsyncKernelManager()
    yield manager
    if manager.has_kernel:
        jupyter_client.utils.run_sync(manager.shutdown_kernel)(now=True)


def marked(path):
    """A notebook; those for accelerators run by hand."""
    return pytest.param(path, marks=pytest.mark.slow if path.stem in FOR_ACCELERATORS else ())


@pytest.mark.wide
@pytest.mark.parametrize("path", list(map(marked, NOTEBOOKS)), ids=map(notebook_id, NOTEBOOKS))
def test_runs(path, monkeypatch, kernel):
    notebook = nbformat.read(path, as_version=4)
    for long, short in SHORTER.get(path.stem, {}).items():
        (cell,) = (cell for cell in notebook.cells if long in cell.source)
        cell.source = cell.source.replace(long, short)
    # Most programs are compiled for longer than they run.
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    # The kernel starts where the packages are, so that a source tree needs no installation.
    resources = {"metadata": {"path": str(ROOT)}}
    shared = None if path.stem in ALONE else kernel
    client = nbclient.NotebookClient(notebook, timeout=300, resources=resources, km=shared)
    client.execute()
    if shared:
        client.kc.stop_channels()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert pictures, "no cell shows a picture"


class TestTheFirstCell:
    CELLS = {
        path: "".join(json.loads(path.read_text())["cells"][1]["source"]) for path in NOTEBOOKS
    }

    @pytest.fixture
    def installs(self, monkeypatch, tmp_path):
        """Runs the cell in a place with some distributions and devices; returns pip's arguments."""

        def run(folder, distributions=(), driver=None, returncode=0):
            calls = []

            def answer(command, **options):
                if command[0] == "nvidia-smi":
                    return SimpleNamespace(stdout=f"{driver}.65.06\n")
                calls.append(command[4:] + [Path(command[-1]).read_text()])
                return SimpleNamespace(returncode=returncode)

            have = [SimpleNamespace(name=n, version=v) for n, v in distributions]
            monkeypatch.chdir(folder)
            monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
            monkeypatch.setattr("importlib.metadata.distributions", lambda: have)
            monkeypatch.setattr(shutil, "which", lambda name: driver and name)
            monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
            monkeypatch.setattr(subprocess, "run", answer)
            exec(self.CELLS[ROOT / "notebooks" / "quickstart.ipynb"], {})
            (call,) = calls
            return call

        return run

    def test_is_the_same_everywhere_but_for_the_extras(self):
        def rest(cell):
            return [line for line in cell.splitlines() if not line.startswith("extras = ")]

        assert len({tuple(rest(cell)) for cell in self.CELLS.values()}) == 1

    def test_takes_the_clone_that_it_lies_in_or_the_index(self, installs, tmp_path):
        assert installs(ROOT / "notebooks")[:2] == ["-q", "..[demo]"]
        assert installs(tmp_path)[:2] == ["-q", "flash-wtconv[demo]"]

    @pytest.mark.parametrize(("driver", "extra"), [("580", "cuda13"), ("550", "cuda12")])
    def test_fits_the_device(self, installs, tmp_path, driver, extra):
        assert installs(tmp_path, driver=driver)[1] == f"flash-wtconv[demo,{extra}]"

    def test_leaves_what_colab_has(self, installs, tmp_path):
        have = ("jax", "0.10.2"), ("jax-cuda12-plugin", "0.10.2"), ("torch", "2.9.0+cu126")
        _, source, _, _, constraints = installs(tmp_path, (*have, ("numpy", "2.0")), driver="580")
        assert source == "flash-wtconv[demo]"
        assert constraints.split() == [f"{name}=={version}" for name, version in have]

    def test_says_what_to_do_where_pip_fails(self, installs, tmp_path):
        with pytest.raises(SystemExit, match="not on PyPI yet\\? Then clone its repository"):
            installs(tmp_path, returncode=1)

    def test_does_nothing_where_the_package_is(self, monkeypatch):
        monkeypatch.setattr(subprocess, "run", None)
        exec(self.CELLS[NOTEBOOKS[0]], {})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=notebook_id)
def test_is_stored_with_what_its_cells_show(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert list(notebooks.stale(cells)) == []
    if path.stem == "tpu_quickstart":
        return  # No TPU has run it yet.
    shown = [one for cell in cells for one in cell.get("outputs", ())]
    assert any("image/png" in one.get("data", {}) for one in shown)
    assert str(Path.home()) not in json.dumps(shown) and sys.prefix not in json.dumps(shown)


def test_outputs_of_another_source_are_seen():
    cell = {"cell_type": "code", "source": ["1 + 1"], "metadata": {}, "execution_count": None}
    cell["outputs"] = [{"output_type": "execute_result", "data": {"text/plain": "2"}}]
    cell["metadata"]["source_hash"] = notebooks.hash_of(cell)
    assert list(notebooks.stale([cell])) == []
    changed, large, counted = (copy.deepcopy(cell) for _ in range(3))
    changed["source"] = ["1 + 2"]
    large["outputs"][0]["data"]["image/png"] = "A" * 2_000_000
    counted["execution_count"] = 3
    for one, fault in ((changed, "another source"), (large, "1,500,000"), (counted, "count")):
        (found,) = notebooks.stale([one])
        assert fault in found
