"""Fixtures of the TPU kernels' tests."""

import pytest


@pytest.fixture
def tpu_interpreter():
    """Pallas' TPU interpreter, which finds races, and NaN in what nothing has written."""
    from jax.experimental.pallas import tpu as pltpu

    params = pltpu.InterpretParams(
        detect_races=True, out_of_bounds_reads="uninitialized", uninitialized_memory="nan"
    )
    with pltpu.force_tpu_interpret_mode(params):
        yield
    pltpu.reset_tpu_interpret_mode_state()


@pytest.fixture
def races():
    """What the interpreter's race detector found, asserted to be nothing."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    yield
    found = interpret_pallas_call.races
    assert found is not None and not found.races_found
