"""What the tests of Core ML packages share."""

import importlib.util

import pytest


@pytest.fixture(autouse=True, scope="session")
def needs_coremltools():
    if importlib.util.find_spec("coremltools") is None:
        pytest.skip("coremltools is not installed")


@pytest.fixture
def written(tmp_path):
    """Returns what writes a model of coremltools and reads it back to be evaluated."""
    from torch_bridge.coreml.evaluator import Package
    from torch_bridge.coreml.package import save

    def write(model, name="model"):
        path = tmp_path / f"{name}.mlpackage"
        save(path, model, force=False)
        return Package(path)

    return write
