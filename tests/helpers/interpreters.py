"""A part that Pallas' interpreters have in common: by what arrays they are called back."""

import contextlib

import jax
import numpy as np
import pytest


@contextlib.contextmanager
def called_back_in_numpy():
    """An interpreter is called back with NumPy's arrays, not put on a device of JAX first."""
    from jax._src import callback

    def call_back(*args, callback, **_):
        return jax.tree.map(np.asarray, callback(*map(np.array, args)))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(callback, "io_callback_impl", call_back)
        yield
