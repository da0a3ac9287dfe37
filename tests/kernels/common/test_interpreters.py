"""The fixtures that interpret kernels find what they are there to find."""

from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common._compat import interpreter, interpreting_tpu
from pallas_kernels.common.measurement import JaxMeasurement

pytestmark = pytest.mark.core


def halves(index):
    """A copy of two blocks, one on each core, to the blocks that `index` names."""

    def kernel(x, y):
        y[...] = x[...]

    return pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((16, 128), jnp.float32),
        grid=(2,),
        in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((8, 128), index),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    )


def test_two_cores_race_for_one_block(races):
    x = jnp.ones((16, 128))
    assert (halves(lambda i: (i, 0))(x) == x).all()
    assert not interpret_pallas_call.races.races_found
    pltpu.reset_tpu_interpret_mode_state()
    try:
        jax.block_until_ready(halves(lambda i: (0, 0))(x))
        found = interpret_pallas_call.races.races_found
    except jax.errors.JaxRuntimeError as error:
        # As JAX 0.12 says it.
        found = "RACE DETECTED" in str(error)
    assert found
    pltpu.reset_tpu_interpret_mode_state()
    halves(lambda i: (i, 0))(x)


def test_a_search_runs_inside_the_interpreter_of_its_caller():
    measurement = JaxMeasurement(None, (), None, {})
    with pltpu.force_tpu_interpret_mode():
        inside = measurement.untraced(interpreting_tpu)
    with ThreadPoolExecutor(1) as other:
        assert other.submit(inside).result()
        assert not other.submit(measurement.untraced(interpreting_tpu)).result()


@pytest.mark.usefixtures("gpu_launches")
def test_the_interpreter_of_a_gpu_is_not_a_tpus():
    assert interpreter() is not None and not interpreting_tpu()


def test_copies_of_a_kernels_own_ask_for_the_race_detector(tpu_interpreter):
    def kernel(x, y, semaphore):
        copy = pltpu.make_async_copy(x, y, semaphore)
        copy.start()
        copy.wait()

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    call = pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((8, 128), jnp.float32),
        in_specs=[anywhere],
        out_specs=anywhere,
        scratch_shapes=[pltpu.SemaphoreType.DMA],
    )
    with pytest.raises(jax.errors.JaxRuntimeError, match="needs the fixture `races`"):
        call(jnp.ones((8, 128)))
