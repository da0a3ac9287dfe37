"""Every notebook runs from its first cell to its last, and is stored without outputs."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
for name in ("ipykernel", "sklearn"):
    # Not imported here, where every worker would wait for it.
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}", allow_module_level=True)

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def notebook_id(path):
    return path.stem


def test_there_are_notebooks():
    assert NOTEBOOKS


# Of a notebook that takes minutes, what to write in its place here.
SHORTER = {"quickstart": ("epochs=15", "epochs=2"), "tpu_quickstart": ("[2:5]", "[2:3]")}


@pytest.mark.wide
@pytest.mark.parametrize("path", NOTEBOOKS, ids=notebook_id)
def test_runs(path, monkeypatch):
    notebook = nbformat.read(path, as_version=4)
    if path.stem in SHORTER:
        long, short = SHORTER[path.stem]
        (cell,) = (cell for cell in notebook.cells if long in cell.source)
        cell.source = cell.source.replace(long, short)
    if path.stem == "tpu_quickstart":
        # Interpreted kernels are compiled for longer than they run.
        monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    # The kernel starts where the packages are, so that a source tree needs no installation.
    resources = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if "image/png" in output.get("data", {})
    ]
    assert pictures, "no cell shows a picture"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=notebook_id)
@pytest.mark.parametrize(("folder", "source"), [("notebooks", "..["), (".", "git+https://")])
def test_a_notebook_installs_from_the_clone_that_it_lies_in(monkeypatch, path, folder, source):
    transform = pytest.importorskip("IPython.core.inputtransformer2").TransformerManager()
    cell = nbformat.read(path, as_version=4).cells[1]
    shell = SimpleNamespace(run_line_magic=lambda name, line: lines.append((name, line)))
    names, lines = {"get_ipython": lambda: shell}, []
    monkeypatch.chdir(ROOT / folder)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    exec(transform.transform_cell(cell.source), names)
    assert lines == [("pip", 'install -q "{source}"')]
    assert source in names["source"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=notebook_id)
def test_is_stored_without_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs"), cell["source"]
        assert cell.get("execution_count") is None
