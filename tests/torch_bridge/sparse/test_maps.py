"""Maps and voxels in PyTorch are JAX's, bit by bit."""

import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pallas_kernels.sparse import conformance as in_jax  # noqa: E402
from pallas_kernels.sparse import kernel_map as jax_kernel_map  # noqa: E402
from pallas_kernels.sparse.cases import CASES  # noqa: E402
from torch_bridge.sparse import conformance, kernel_map  # noqa: E402


def same(got, want):
    """Every bit of a tensor is an array's, whatever the sign of its dtype."""
    got, want = got.numpy(), np.asarray(want)
    np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32))


def assert_same_map(got, want):
    assert got.window == want.window
    assert (got.backward is None) == (want.backward is None)
    for direction in ("forward", "backward"):
        ours, theirs = getattr(got, direction), getattr(want, direction)
        for name in () if ours is None else ours._fields:
            same(getattr(ours, name), getattr(theirs, name))
    same(got.reverse, want.reverse)


def asked(case):
    """The keywords of a case's map."""
    names = "generative", "transposed", "output_rule", "padding"
    return {name: case.arguments[name] for name in names} | {"dilation": case.dilation}


def both(case):
    """A case's map and output, of PyTorch and of JAX."""
    coords, x, *_ = case.drawn()
    results = []
    for room, make in ((conformance, kernel_map), (in_jax, jax_kernel_map)):
        voxels, onto = room.voxels(case, coords, x)
        rest = asked(case) | {"output_voxels": onto}
        results.append(make(voxels, case.kernel_size, case.stride, **rest))
    return results


NARROW = (5, 15)
"""The others take JAX seconds to compile, each."""


def marks(number):
    """Those of a case: every third is for `make test-wide`, and the others by hand."""
    if number in NARROW:
        return []
    return [pytest.mark.slow if number % 3 else pytest.mark.wide]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=marks(i)) for i, case in enumerate(CASES)],
)
def test_maps_are_jaxs_bit_by_bit(case):
    assert_jaxs(case)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[] if i == 15 else [pytest.mark.slow])
        for i, case in enumerate(CASES)
    ],
)
def test_searches_in_tritons_interpreter_are_jaxs_bit_by_bit(case, monkeypatch):
    pytest.importorskip("triton", reason="Triton is for Linux alone")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a process has Triton's interpreter or a GPU")
    monkeypatch.setenv("FLASH_WTCONV_TORCH_SPARSE_CONV_FWD", "triton")
    assert_jaxs(case)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_searches_on_a_gpu_are_the_cpus(case):
    voxels, onto = conformance.voxels(case, *case.drawn()[:2])
    results = []
    for device in ("cuda", "cpu"):
        onto = None if onto is None else onto.to(device)
        rest = asked(case) | {"output_voxels": onto}
        found, out = kernel_map(voxels.to(device), case.kernel_size, case.stride, **rest)
        tables = [list(found.forward), list(found.backward or ()), [out.coords, out.num_valid]]
        results.append([tensor.cpu() for each in tables for tensor in each])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)


def assert_jaxs(case):
    """A case's map and its voxels are JAX's."""
    (got, out), (want, there) = both(case)
    assert_same_map(got, want)
    same(out.coords, there.coords)
    assert int(out.num_valid) == int(there.num_valid)
    assert int(out.overflow) == int(there.overflow)
    assert (out.tensor_stride, out.batch_size) == (there.tensor_stride, there.batch_size)
