"""Fixtures of the tests of training on images."""

import gc

import pytest


@pytest.fixture(autouse=True)
def frozen():
    """Keeps the collector, which each loader runs when it ends, from all that the suite holds."""
    gc.freeze()
