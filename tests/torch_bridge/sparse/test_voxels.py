"""Voxels in PyTorch: made of points, lists and dense grids, and back; what they refuse."""

import re

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch_bridge  # noqa: E402
from pallas_kernels.sparse import voxels as in_jax  # noqa: E402
from torch_bridge.sparse import (  # noqa: E402
    from_coords,
    from_dense,
    from_list,
    from_points,
    kernel_map,
    to_dense,
    to_list,
    to_points,
)
from torch_bridge.sparse.voxels import LIMIT, pack, unpack  # noqa: E402


def points(count=40, ndim=2, channels=3):
    rng = np.random.default_rng(0)
    places = rng.uniform(-2, 2, (count, ndim)).astype(np.float32)
    return places, rng.normal(size=(count, channels)).astype(np.float32), rng.integers(0, 3, count)


@pytest.mark.parametrize("reduce", ["mean", "max", "sum", "first"])
def test_points_fall_into_voxels_and_back(reduce):
    places, x, samples = points()
    voxels, rows = from_points(places, x, 0.9, samples=samples, batch_size=3, reduce=reduce)
    keys = np.concatenate([samples[:, None], np.floor(places / np.float32(0.9)).astype(int)], 1)
    unique, inverse = np.unique(keys, axis=0, return_inverse=True)
    count = int(voxels.num_valid)
    np.testing.assert_array_equal(voxels.coords[:count], unique)
    np.testing.assert_array_equal(rows, inverse.ravel())
    assert (voxels.coords[count:] == -1).all() and not voxels.features[count:].any()
    own = [x[inverse.ravel() == i] for i in range(count)]
    makes = {"mean": np.mean, "max": np.max, "sum": np.sum, "first": lambda rows, axis: rows[0]}
    want = np.stack([makes[reduce](each, axis=0) for each in own])
    np.testing.assert_allclose(voxels.features[:count], want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(to_points(voxels, rows), voxels.features[rows.long()])


@pytest.mark.wide
@pytest.mark.parametrize("reduce", ["mean", "max", "sum", "first"])
def test_points_are_jaxs(reduce):
    places, x, samples = points()
    arguments = {"samples": samples, "batch_size": 3, "reduce": reduce}
    got, rows = from_points(places, x, (0.9, 0.4), **arguments)
    want, theirs = in_jax.from_points(places, x, (0.9, 0.4), **arguments)
    np.testing.assert_array_equal(got.coords, want.coords)
    np.testing.assert_array_equal(rows, theirs)
    np.testing.assert_allclose(got.features, want.features, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduce", ["mean", "max", "first"])
def test_gradients_of_points(reduce):
    places, x, _ = points(9)
    leaf = torch.tensor(x, dtype=torch.float64, requires_grad=True)

    def there_and_back(x):
        return to_points(*from_points(places, x, 1.5, reduce=reduce))

    assert torch.autograd.gradcheck(there_and_back, leaf, fast_mode=True)


def test_dense_grids_and_back():
    dense = torch.zeros(2, 3, 4, 2)
    dense[0, 1, 2] = torch.tensor([1.0, 2.0])
    dense[1, 2, 3, 0] = 5
    dense.requires_grad_()
    voxels = from_dense(dense)
    assert voxels.coords.tolist() == [[0, 1, 2], [1, 2, 3]]
    back = to_dense(voxels, (3, 4))
    assert torch.equal(back, dense)
    back.sum().backward()
    assert torch.equal(dense.grad, (dense != 0).any(-1, keepdim=True).float().expand_as(dense))
    assert to_dense(voxels, (2, 4)).sum() == 3
    occupied = torch.ones(2, 3, 4, dtype=torch.bool)
    assert from_dense(dense, occupied=occupied).num_valid == 24
    assert from_dense(dense * 0).num_valid == 0
    with pytest.raises(ValueError, match="more voxels than a capacity, here 1"):
        from_dense(dense, capacity=1)


def test_lists_and_back():
    samples = [
        (torch.tensor([[3, 1], [0, 0]]), torch.ones(2, 4)),
        (torch.zeros((0, 2), dtype=torch.int64), torch.zeros(0, 4)),
    ]
    voxels = from_list(samples)
    assert (voxels.batch_size, voxels.capacity, int(voxels.num_valid)) == (2, 2, 2)
    for (coords, x), (places, features) in zip(to_list(voxels), samples, strict=True):
        assert torch.equal(coords, places.int()) and torch.equal(x, features)
    with pytest.raises(ValueError, match="samples: expected at least one"):
        from_list([])
    with pytest.raises(ValueError, match=r"samples\[1\]: expected coordinates \[n, 2\]"):
        from_list([samples[0], (torch.zeros((0, 3), dtype=torch.int64), torch.zeros(0, 4))])


def test_no_voxels_at_all():
    voxels = from_coords(np.zeros((0, 3), int), np.zeros((0, 4), np.float32), batch_size=2)
    assert (voxels.capacity, int(voxels.num_valid)) == (1, 0)
    w = torch.ones(9, 4, 2, requires_grad=True)
    for stride in (1, 2):
        out = torch_bridge.spatially_sparse_conv(voxels, w, 3, stride, bias=torch.ones(2))
        out.features.sum().backward()
        assert not out.features.any() and not w.grad.any()
    empty, rows = from_points(np.zeros((0, 2)), np.zeros((0, 4)), 1.0)
    assert (int(empty.num_valid), len(rows)) == (0, 0)


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_keys_order_coordinates_at_their_limits(ndim):
    ends = np.array([-LIMIT, -1, 0, LIMIT - 1])
    rng = np.random.default_rng(0)
    axes = rng.choice(ends, (50, ndim))
    places = np.unique(np.concatenate([rng.choice([0, 255, 256, 511], (50, 1)), axes], 1), axis=0)
    keys = pack(torch.tensor(places))
    assert (keys[1:] > keys[:-1]).all()
    np.testing.assert_array_equal(unpack(keys, ndim), places)
    beyond = torch.tensor([[512] + [0] * ndim, [-1] + [0] * ndim, [0] * ndim + [LIMIT]])
    assert (unpack(pack(beyond), ndim) == -1).all()


X = torch.ones(2, 1)
FAR = from_coords([[0, LIMIT - 1]], X[:1])
WRONG = [
    (lambda: from_coords([[0, 1], [0, 1]], X), "coords: row 1 is [0, 1], as row 0 is"),
    (lambda: from_coords([[0, 1], [0, LIMIT]], X), "coords: row 1 has axis 0 131072, expected"),
    (lambda: from_coords([[0, 1], [512, 1]], X), "coords: row 1 has sample 512, expected 0 to 511"),
    (lambda: from_coords([[0, 1], [2, 1]], X, batch_size=2), "coords: row 1 has sample 2"),
    (lambda: from_coords([[0, 1], [-1, 1]], X), "coords: row 1 has sample -1"),
    (lambda: from_coords([[0, 1], [0, 2**40]], X), "coords: row 1 has axis 0 1099511627776"),
    (lambda: from_coords([[0, 0.5], [0, 1]], X), "coords: expected integers, got torch.float32"),
    (lambda: from_coords([[0], [1]], X), "coords: expected [n, 1 + D] with 1 to 3 axes"),
    (lambda: from_coords([[0, 1]], X), "features: expected [n, C] of 1 rows, got shape (2, 1)"),
    (lambda: from_coords([[0, 1]], [[1]]), "features: expected a floating-point tensor"),
    (lambda: from_coords("voxels", X), "coords: expected a tensor, got str"),
    (lambda: from_coords([[0, 1], [0, 2]], X, capacity=1), "capacity=1: expected at least 2"),
    (lambda: from_points([[0.0], [np.inf]], X, 1.0), "points: row 1 is [inf] of sample 0"),
    (lambda: kernel_map(FAR, 3, generative=True), "a coordinate beyond"),
    (lambda: from_points(X, X, 1.0, samples=[0, 0.7]), "samples: expected integers, got torch"),
    (lambda: from_points([[0.0], [1.0]], X, 0.0), "voxel_size=0.0: expected a number > 0"),
    (lambda: from_points([[0.0], [1.0]], X, 1.0, reduce="min"), "reduce='min': expected one of"),
    (lambda: from_points([[0.0], [1.0]], X, 1.0, capacity=1), "more voxels than a capacity"),
    (lambda: from_dense(X), "dense: expected [batch, *sizes, C]"),
    (lambda: to_dense(from_coords([[0, 1], [0, 2]], X), (4, 4)), "sizes=(4, 4): expected"),
]


@pytest.mark.parametrize(
    ("call", "message"), WRONG, ids=lambda value: value if isinstance(value, str) else ""
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_moving_and_replacing():
    voxels = from_coords([[0, 1], [0, 4]], X, device="cpu", tensor_stride=2)
    moved = voxels.to("meta")
    assert moved.coords.is_meta and moved.overflow.is_meta and moved.tensor_stride == (2,)
    w = torch.ones(3, 1, 5, device="meta", requires_grad=True)
    out = torch_bridge.spatially_sparse_conv(moved, w, 3, 2, out_capacity=4)
    assert out.features.is_meta and out.features.shape == (4, 5) and out.tensor_stride == (4,)
    out.features.sum().backward()
    assert w.grad.shape == w.shape
    with pytest.raises(ValueError, match=r"features: expected \[capacity, C\] of 2 rows"):
        voxels.with_features(torch.ones(3, 1))
    with pytest.raises(AttributeError):
        voxels.coords = None
