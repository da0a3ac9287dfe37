"""Fixtures of the Pallas kernels' tests: the interpreters of their backends."""

import contextlib

import numpy as np
import pytest
from helpers.interpreters import called_back_in_numpy
from helpers.mosaic_gpu import interpretable


@contextlib.contextmanager
def _interpreted_tpu(**rest):
    from jax.experimental.pallas import tpu as pltpu

    params = pltpu.InterpretParams(
        out_of_bounds_reads="uninitialized", uninitialized_memory="nan", **rest
    )
    with pltpu.force_tpu_interpret_mode(params), called_back_in_numpy():
        yield
    pltpu.reset_tpu_interpret_mode_state()


@pytest.fixture
def tpu_interpreter(monkeypatch):
    """Pallas' TPU interpreter of one core, with NaN in what nothing has written.

    A core alone can race only with copies that the kernel itself starts, and to look for races
    takes most of the time: such copies are refused here, a test of them needs `races`.
    """
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    def dma_start(*args, **kwargs):
        raise AssertionError("the kernel starts copies: the test needs the fixture `races`")

    with monkeypatch.context() as patched, _interpreted_tpu():
        patched.setattr(interpret_pallas_call, "dma_start", dma_start)
        yield


@pytest.fixture
def races():
    """Races that Pallas' TPU interpreter of two cores finds, asserted to be none.

    The cores share the steps along a grid's "parallel" axis, so there must be two such steps.
    """
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    with _interpreted_tpu(detect_races=True, num_cores_or_threads=2):
        yield
        found = interpret_pallas_call.races
    assert found is not None and not found.races_found


@pytest.fixture
def gpu_interpreter(gpu_launches):
    """Pallas' GPU interpreter, in which a test launches something; see `gpu_launches`."""
    yield
    assert gpu_launches


@pytest.fixture
def gpu_launches(monkeypatch):
    """Pallas' GPU interpreter, in which nothing may race, nor read what nothing has written.

    Returns a list with a race detector for each launch.

    JAX (0.11) fills with zeros what a copy reads beyond an array's end, as a GPU does, but not
    what it reads before its start: here it does that too. Its race detector knows no strides:
    here it does. And it wants a fence between loads from shared memory and a copy over what they
    read, where the barrier that orders both is enough (as in CUTLASS' pipelines): here it is.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("JAX 0.10 cannot interpret copies from beyond an array's end")
    from jax._src.pallas.mosaic.interpret import race_detection_state
    from jax._src.pallas.mosaic.interpret.utils import Access
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, shared_memory
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
    from jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks import AsyncCopyGmemToSmemTask
    from jax._src.pallas.mosaic_gpu.interpret.shared_memory import GPUSharedMemory

    read_inside = GPUSharedMemory.get_buffer_content

    def read(self, key, access, *args, **kwargs):
        before = [
            min(max(0, -at.start), at.stop - at.start) if isinstance(at, slice) else 0
            for at in access.range
        ]
        if not any(before):
            return read_inside(self, key, access, *args, **kwargs)
        assert access.permutation is None
        inside = Access(
            tuple(
                slice(max(0, at.start), max(0, at.stop), at.step) if skipped else at
                for at, skipped in zip(access.range, before, strict=True)
            )
        )
        value, kind, clock = read_inside(self, key, inside, *args, **kwargs)
        if value is not None:
            kept = zip(access.range, before, strict=True)
            fill = [(skipped, 0) for at, skipped in kept if isinstance(at, slice)]
            value = np.pad(value, fill)
        return value, kind, clock

    overlap = race_detection_state._slices_overlap

    def strided_overlap(*parts):
        if all(isinstance(part, slice) and part.stop is not None for part in parts):
            one, other = (range(part.start, part.stop, part.step or 1) for part in parts)
            return any(at in other for at in one)
        return overlap(*parts)

    check_write = AsyncCopyGmemToSmemTask.post_read

    def fenced(self, *args):
        self.clock.commit_smem()
        check_write(self, *args)

    number_of = shared_memory._to_int

    def number(x):
        return x.item() if isinstance(x, np.ndarray) else number_of(x)

    # JAX keeps the state of the last launch alone.
    detectors = []
    make = gpu_callbacks.GPURaceDetectionState

    def kept(*args, **kwargs):
        detectors.append(make(*args, **kwargs))
        return detectors[-1]

    monkeypatch.setattr(shared_memory, "_to_int", number)
    monkeypatch.setattr(gpu_callbacks, "GPURaceDetectionState", kept)
    monkeypatch.setattr(AsyncCopyGmemToSmemTask, "post_read", fenced)
    monkeypatch.setattr(GPUSharedMemory, "get_buffer_content", read)
    monkeypatch.setattr(race_detection_state, "_slices_overlap", strided_overlap)
    interpretable(monkeypatch)
    params = plgpu.InterpretGPUParams(detect_races=True)
    with plgpu.force_gpu_interpret_mode(params), called_back_in_numpy():
        yield detectors
    interpreter.reset_gpu_interpret_mode_state()
    assert not any(detector.races_found for detector in detectors)
