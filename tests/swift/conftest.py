"""Builds of the Swift package, made once: `make test-swift` runs these tests."""

import pytest
from helpers import swift as tools


@pytest.fixture(scope="session")
def swift():
    found = tools.find()
    if found is None:
        pytest.skip("needs Swift 6: make test-swift")
    return found


@pytest.fixture(scope="session")
def plain(swift, tmp_path_factory):
    """The package as this machine builds it."""
    return tools.Build.make(swift, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def modules(swift, tmp_path_factory):
    """The folder of the fakes of Metal and Core ML."""
    if swift.run("uname").stdout.strip() != "Linux":
        pytest.skip("fakes are for machines that do not have what they stand for")
    return tools.build_fakes(swift, tmp_path_factory.mktemp("fakes"))


@pytest.fixture(scope="session")
def fake(swift, modules, tmp_path_factory):
    """The package built with fakes of Metal and Core ML."""
    return tools.Build.make(swift, tmp_path_factory.mktemp("fake"), modules)


@pytest.fixture(scope="session")
def metal(tmp_path_factory):
    """The library of the fake Metal."""
    return tools.build_metal(tmp_path_factory.mktemp("metal"))


@pytest.fixture(scope="session")
def evaluator(tmp_path_factory):
    """The folder in which the fake Core ML is answered."""
    with tools.evaluator(tmp_path_factory.mktemp("evaluator")) as folder:
        yield folder
