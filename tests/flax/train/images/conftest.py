"""Fixtures of the tests of training on images."""

import gc

import pytest


@pytest.fixture(autouse=True)
def frozen():
    """Or each loader, which collects when it ends, goes through all that the suite holds."""
    gc.freeze()
