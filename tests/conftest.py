"""Settings of the whole suite: fixed seeds, the same hypothesis examples every time."""

import gc
import importlib.util
import random
import re

import pytest

# So that failed assertions of helpers show their values; before the first of them is imported.
pytest.register_assert_rewrite("helpers")

# isort: split
# Before anything imports jax.
from helpers import quick

# isort: split
import hypothesis
import numpy as np
from _pytest.doctest import DoctestModule
from hypothesis.internal.conjecture import providers

hypothesis.settings.register_profile(
    "fixed",
    derandomize=True,
    deadline=None,
    max_examples=20,
    database=None,
    # A compilation within an example is slow, and that is no fault of the example.
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("fixed")

# It draws what modules that happen to be loaded are written with, and reads them all for that.
providers._get_local_constants = lambda: providers._local_constants


@pytest.hookimpl(wrapper=True)
def pytest_collect_file():
    """Leaves examples to the packages: their collector hides test files that cannot be imported."""
    return [found for found in (yield) if not isinstance(found, DoctestModule)]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks examples of docstrings, which only widen what tests cover, as code of pages does.

    Those that use PyTorch are skipped where it is not installed.
    """
    torch = importlib.util.find_spec("torch")
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker(pytest.mark.wide)
            text = "".join(example.source + example.want for example in item.dtest.examples)
            if not torch and re.search(r"\btorch|\btensor\(", text):
                item.add_marker(pytest.mark.skip(reason="torch is not installed"))


def pytest_collection_finish():
    """Lets the collector pass over what thousands of tests and their programs leave in memory."""
    gc.freeze()


def pytest_sessionfinish():
    """Lets pytest, which collects five times, look through nothing that is still in use."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def optimised():
    """Programs are compiled as a user's are."""
    quick.optimise(True)
    yield
    quick.optimise(not quick.CPU)


@pytest.fixture(autouse=True)
def fixed_seeds():
    """The global generators start alike in every test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """The tuner's measurements stay in memory, not in the user's home."""
    from pallas_kernels.dispatch import cache

    store = cache.Cache(None)
    monkeypatch.setattr(cache, "user_cache", lambda: store)
    return store


@pytest.fixture(autouse=True)
def forgotten():
    """Earlier calls' choices are forgotten, since tests change what calls choose by."""
    from pallas_kernels.dispatch import forget

    forget()


@pytest.fixture
def searches(monkeypatch):
    """The labels of the tuner's searches that were made."""
    from pallas_kernels.dispatch import tuner

    made, search = [], tuner._search

    def counted(label, *rest):
        made.append(label)
        return search(label, *rest)

    monkeypatch.setattr(tuner, "_search", counted)
    return made
