"""Voxels: from points, grids and lists and back, and what they refuse."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sparse import (
    from_coords,
    from_dense,
    from_list,
    from_points,
    to_dense,
    to_list,
    to_points,
    voxels,
)
from pallas_kernels.sparse.voxels import LIMIT, pack, sort_keys, stable_order, unpack

pytestmark = pytest.mark.core

POINTS = np.array([[0.1, 3.9], [-0.1, 0], [0.4, 3.2], [0.9, 3.5], [5, 5]], np.float32)
SAMPLES = np.array([0, 0, 0, 1, 1])
FEATURES = np.array([[1.0, 8], [2, 3], [4, 6], [5, 7], [9, 9]], np.float32)


@pytest.mark.parametrize(
    ("reduce", "merged"),
    [
        ("mean", [2.5, 7]),
        pytest.param("max", [4, 8], marks=pytest.mark.wide),
        pytest.param("sum", [5, 14], marks=pytest.mark.wide),
        pytest.param("first", [1, 8], marks=pytest.mark.wide),
    ],
)
def test_points_fall_into_voxels(reduce, merged):
    voxels, rows = from_points(POINTS, FEATURES, 1, samples=SAMPLES, batch_size=3, reduce=reduce)
    want = [[0, -1, 0], [0, 0, 3], [1, 0, 3], [1, 5, 5]]
    assert voxels.coords.tolist()[:4] == want and voxels.num_valid == 4
    assert (voxels.batch_size, voxels.capacity) == (3, 8)
    np.testing.assert_array_equal(
        voxels.features[:4], [FEATURES[1], merged, FEATURES[3], FEATURES[4]]
    )
    assert not voxels.features[4:].any()
    assert rows.tolist() == [1, 0, 1, 2, 3]
    back = to_points(voxels, rows)
    np.testing.assert_array_equal(back[0], merged)
    np.testing.assert_array_equal(back[3:], FEATURES[3:])


@pytest.mark.wide
@pytest.mark.parametrize(
    ("reduce", "shares"),
    [("mean", [0.5, 0.5]), ("sum", [1, 1]), ("max", [0, 1]), ("first", [1, 0])],
)
def test_gradients_of_points(reduce, shares):
    def made(x):
        return from_points(POINTS, x, 1, samples=SAMPLES, batch_size=2, reduce=reduce)

    dx = jax.grad(lambda x: made(x)[0].features[:, 0].sum())(FEATURES)
    assert dx[:, 0].tolist() == [shares[0], 1, shares[1], 1, 1]
    voxels, rows = made(FEATURES)
    dy = jax.grad(lambda x: (to_points(voxels.with_features(x), rows) * FEATURES).sum())(
        voxels.features
    )
    np.testing.assert_array_equal(dy[1], FEATURES[0] + FEATURES[2])


def test_points_that_cannot_be_taken():
    wrong = POINTS.copy()
    wrong[3, 1] = np.nan
    with pytest.raises(ValueError, match="points: row 3 is .*nan.* of sample 0; expected finite"):
        from_points(wrong, FEATURES, 1)
    with pytest.raises(ValueError, match="points: row 4 is .* of sample 1; .* samples 0 to 0"):
        from_points(POINTS, FEATURES, 1, samples=[0, 0, 0, 0, 1])
    with pytest.raises(ValueError, match="samples: expected integers, got float64"):
        from_points(POINTS, FEATURES, 1, samples=[0, 0, 0.7, 0, 0])
    with pytest.raises(ValueError, match="points: row 2 is .* of sample"):
        from_points(POINTS, FEATURES, 1, samples=[0, 0, 2**32, 0, 0])
    with pytest.raises(ValueError, match="more voxels than a capacity"):
        from_points(POINTS, FEATURES, 1, capacity=2)
    for message, rest in (
        ("voxel_size=0: expected a number > 0", (FEATURES, 0)),
        (r"features: expected \[n, C\] of 5 rows", (FEATURES[1:], 1)),
    ):
        with pytest.raises(ValueError, match=message):
            from_points(POINTS, *rest)
    with pytest.raises(ValueError, match="reduce='least': expected one of mean, max, first, sum"):
        from_points(POINTS, FEATURES, 1, reduce="least")


@pytest.mark.wide
def test_points_that_cannot_be_taken_under_jit():
    wrong = POINTS.copy()
    wrong[3, 1] = np.nan
    run = jax.jit(
        lambda points, capacity: from_points(points, FEATURES, 1, capacity=capacity)[0],
        static_argnums=1,
    )
    with pytest.raises(ValueError, match="a coordinate beyond"):
        run(wrong, 8).check()
    kept = run(POINTS, 2)
    assert kept.num_valid == 2 and np.isfinite(kept.features).all()
    with pytest.raises(ValueError, match="more voxels than a capacity"):
        kept.check()


@pytest.mark.parametrize(
    ("coords", "message"),
    [
        ([[0, 1], [0, 3], [0, 1]], r"coords: row 2 is \[0, 1\], as row 0 is; expected each once"),
        ([[0, 1], [512, 3]], r"coords: row 1 has sample 512, expected 0 to 511"),
        ([[0, 1], [-1, 3]], r"coords: row 1 has sample -1, expected 0 to 0"),
        ([[0, 1], [0, LIMIT]], r"coords: row 1 has axis 0 131072, expected -131072 to 131071"),
        ([[0, 2**40]], r"coords: row 0 has axis 0 1099511627776"),
        ([[0.0, 1.0]], "coords: expected integers, got float64; from_points takes floats"),
        ([0, 1], r"coords: expected \[n, 1 \+ D\], got shape \(2,\)"),
        ([[0, 1, 2, 3, 4]], r"coords: expected \[n, 1 \+ D\] with 1 to 3 axes"),
    ],
)
def test_wrong_coordinates_are_named_by_their_row(coords, message):
    with pytest.raises(ValueError, match=message):
        from_coords(coords, np.ones((len(coords), 1), np.float32))


def test_other_wrong_arguments():
    for message, coords, features, rest in (
        (r"features: expected \[n, C\] of 1 rows", [[0, 1]], np.ones((2, 1)), {}),
        ("features: expected a floating-point array", [[0, 1]], [[1]], {}),
        ("capacity=1: expected at least 2", [[0, 1], [0, 2]], np.ones((2, 1)), {"capacity": 1}),
        (
            "row 1 has sample 1, expected 0 to 0",
            [[0, 1], [1, 2]],
            np.ones((2, 1)),
            {"batch_size": 1},
        ),
    ):
        with pytest.raises(ValueError, match=message):
            from_coords(coords, features, **rest)
    with pytest.raises(ValueError, match=r"features: expected \[capacity, C\] of 1 rows"):
        from_coords([[0, 1]], [[1.0]]).with_features(jnp.ones((2, 1)))


def test_under_jit_a_flag_tells():
    run = jax.jit(lambda coords: from_coords(coords, jnp.ones((2, 1)), batch_size=2))
    run(jnp.array([[0, 1], [1, 1]])).check()
    with pytest.raises(ValueError, match="a coordinate that is there twice"):
        run(jnp.array([[0, 1], [0, 1]])).check()
    for wrong in ([[0, 1], [0, LIMIT]], [[0, 1], [2, 1]]):
        with pytest.raises(ValueError, match="a coordinate beyond"):
            run(jnp.array(wrong)).check()
    with pytest.raises(ValueError, match="batch_size=None: expected a number where"):
        jax.jit(lambda coords: from_coords(coords, jnp.ones((2, 1))))(jnp.zeros((2, 2), int))


@pytest.mark.parametrize("traced_for", ["cpu", "tpu"])
def test_keys_are_ordered_as_coordinates_are(traced_for, monkeypatch):
    """By the form that XLA compiles for a TPU in less time too, equal ones in the order of rows."""
    monkeypatch.setattr(voxels, "platform", lambda: traced_for)
    words = np.random.default_rng(1).integers(0, 4, (3, 300)).astype(np.uint32)
    np.testing.assert_array_equal(stable_order(jnp.asarray(words)), np.lexsort(words))
    rng = np.random.default_rng(0)
    edges = [-LIMIT, -1, 0, 1, LIMIT - 1]
    coords = np.array([[b, x, y, z] for b in (0, 511) for x in edges for y in edges for z in edges])
    coords = rng.permutation(coords).astype(np.int32)

    @jax.jit
    def ordered(coords):
        keys = sort_keys(*pack(coords))
        return coords[keys.rows], unpack(keys.high, keys.low, 3)

    want = coords[np.lexsort(coords.T[::-1])]
    for got in ordered(coords):
        np.testing.assert_array_equal(got, want)
    outside = np.array([[-1, 0, 0, 0], [512, 0, 0, 0], [0, LIMIT, 0, 0], [0, 0, 0, -LIMIT - 1]])
    assert (np.stack(pack(jnp.asarray(outside))) == 0xFFFFFFFF).all()


def test_lists_keep_empty_samples():
    rng = np.random.default_rng(0)
    samples = [
        (np.array([[3, 4], [-1, 0]]), rng.normal(size=(2, 3))),
        (np.zeros((0, 2), int), np.zeros((0, 3))),
        (np.array([[3, 4]]), rng.normal(size=(1, 3))),
        (np.zeros((0, 2), int), np.zeros((0, 3))),
    ]
    with jax.enable_x64(True):
        voxels = from_list(samples, capacity=8)
        assert (voxels.batch_size, voxels.capacity, voxels.num_valid) == (4, 8, 3)
        for (coords, features), (places, values) in zip(to_list(voxels), samples, strict=True):
            np.testing.assert_array_equal(coords, places)
            np.testing.assert_array_equal(features, values)
    nothing = from_list(samples[1:2])
    assert (nothing.num_valid, nothing.capacity) == (0, 1)
    with pytest.raises(
        ValueError, match=r"samples\[1\]: expected coordinates \[n, 2\] and features"
    ):
        from_list([samples[0], (np.zeros((1, 3), int), np.zeros((1, 3)))])
    with pytest.raises(ValueError, match="samples: expected at least one"):
        from_list([])


@pytest.mark.wide
def test_dense_grids_and_back():
    rng = np.random.default_rng(0)
    grid = np.where(rng.random((2, 3, 4, 1)) < 0.4, rng.normal(size=(2, 3, 4, 2)), 0)
    grid = jnp.asarray(grid, jnp.float32)
    voxels = from_dense(grid)
    assert voxels.num_valid == (np.asarray(grid) != 0).any(-1).sum()
    np.testing.assert_array_equal(to_dense(voxels, (3, 4)), grid)


@pytest.mark.wide
def test_parts_of_dense_grids():
    grid = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 2)), jnp.float32)
    grid = grid.at[:, 1:, ::2].set(0)
    voxels = from_dense(grid)
    # What lies beyond is left out; what does not count is not written.
    poisoned = dataclasses.replace(
        voxels, features=jnp.where(voxels.valid[:, None], voxels.features, jnp.nan)
    )
    np.testing.assert_array_equal(to_dense(poisoned, (2, 4)), grid[:, :2])
    np.testing.assert_array_equal(
        jax.jit(lambda grid: from_dense(grid, capacity=32))(grid).features[:5], voxels.features[:5]
    )
    everywhere = from_dense(grid, occupied=np.ones((2, 3, 4), bool))
    assert everywhere.num_valid == 24
    dx = jax.grad(lambda x: (to_dense(voxels.with_features(x), (3, 4)) * 2).sum())(voxels.features)
    np.testing.assert_array_equal(dx, np.where(voxels.valid[:, None], 2, 0) * np.ones((1, 2)))
    with pytest.raises(ValueError, match="more voxels than a capacity"):
        from_dense(grid, capacity=2)
