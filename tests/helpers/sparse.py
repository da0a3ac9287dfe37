"""One implementation of a sparse convolution on one case against the oracle."""

import jax
import numpy as np

from pallas_kernels.common.conformance import bounds, expected, worst
from pallas_kernels.dispatch import tuning
from pallas_kernels.sparse import from_coords


def results(function, case):
    """The result of a function of a case's arrays, as one program."""
    with jax.enable_x64(case.dtype == "float64"), tuning("off"):
        arrays = jax.tree.map(jax.device_put, case.drawn())
        return jax.tree.map(np.asarray, jax.jit(function)(*arrays))


def assert_oracle(room, case, implementation):
    """Output, coordinates and gradients of a case are the oracle's."""
    got, want = results(room.computed(case, implementation), case), expected(case)
    assert {name: array.shape for name, array in got.items()} == {
        name: array.shape for name, array in want.items()
    }
    allowed = bounds(case, lambda case: results(room.baseline(case), case))
    found = {name: worst(got[name], want[name]) for name in want}
    # NaN is not greater than its bound.
    assert {name: e for name, e in found.items() if not e <= allowed[name]} == {}


def drawn_voxels(counts, extent, channels, ndim=2, seed=0, **rest):
    """Voxels at random places, some samples of which may be empty."""
    rng = np.random.default_rng(seed)
    coords = []
    for sample, count in enumerate(counts):
        cells = rng.choice(extent**ndim, count, replace=False)
        axes = np.unravel_index(cells, (extent,) * ndim)
        coords.append(np.stack([np.full(count, sample), *axes], 1))
    coords = rng.permutation(np.concatenate(coords))
    features = rng.normal(size=(len(coords), channels)).astype(np.float32)
    return from_coords(coords, features, batch_size=len(counts), **rest)
