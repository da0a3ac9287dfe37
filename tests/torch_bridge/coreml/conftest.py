"""Fixtures that the tests of Core ML packages share."""

import gc
import importlib.util

import pytest


@pytest.fixture(autouse=True, scope="session")
def needs_coremltools():
    if importlib.util.find_spec("coremltools") is None:
        pytest.skip("coremltools is not installed")


@pytest.fixture(autouse=True, scope="package")
def modules_are_no_garbage():
    """Spares half the time of these tests: coremltools looks for garbage at every conversion."""
    import torch_bridge.coreml.networks  # noqa: F401
    from torch_bridge.coreml.tools import coremltools

    coremltools()
    gc.freeze()
    yield
    gc.unfreeze()


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
