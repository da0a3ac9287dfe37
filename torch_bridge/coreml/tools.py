"""coremltools, without what it tells of Apple's libraries and of versions that it need not know."""

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch


@cache
def coremltools() -> Any:
    """Returns the module coremltools.

    Its warnings are of a scikit-learn and a PyTorch that its converters do not know, and of
    libraries of macOS that are no part of it elsewhere: nothing here uses them.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    with _muted():
        import coremltools

    return coremltools


@contextmanager
def quiet() -> Iterator[Any]:
    """Yields coremltools; in the block it draws no progress bars and logs errors alone."""
    module = coremltools()
    from coremltools.converters.mil.mil.passes import pass_pipeline

    def silent(passes: Iterable[str], **_: object) -> Iterable[str]:
        return passes

    with _muted(), patch.object(pass_pipeline, "tqdm", silent), warnings.catch_warnings():
        # A converted model leaves its folder to the collector.
        warnings.filterwarnings("ignore", "Implicitly cleaning up", ResourceWarning)
        yield module


@contextmanager
def _muted() -> Iterator[None]:
    """Lets coremltools log errors alone."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
