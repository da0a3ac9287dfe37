"""Pooling, pruning, unions, arithmetic and norms over the voxels that count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sparse import drawn_voxels

from pallas_kernels import oracle
from pallas_kernels.sparse import (
    add,
    batch_norm,
    concatenate,
    from_coords,
    global_pool,
    instance_norm,
    layer_norm,
    multiply,
    pool,
    prune,
    subtract,
    union,
    unpool,
)


def poisoned(voxels):
    return voxels.with_features(jnp.where(voxels.valid[:, None], voxels.features, jnp.nan))


VOXELS = poisoned(drawn_voxels((12, 0, 7), 7, 3, capacity=32))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "reduce"),
    [
        (2, None, 0, "max"),
        pytest.param(3, 2, 1, "max", marks=pytest.mark.wide),
        pytest.param(3, 2, 1, "mean", marks=pytest.mark.wide),
        pytest.param((3, 1), None, 0, "sum", marks=pytest.mark.wide),
    ],
)
def test_pooling_and_its_gradient(kernel, stride, padding, reduce):
    pooled = pool(VOXELS, kernel, stride, padding=padding, reduce=reduce)
    steps = kernel if stride is None else stride
    coords, x = (np.asarray(a)[:19] for a in (VOXELS.coords, VOXELS.features))
    outputs = oracle.sparse_outputs(coords, kernel, steps, rule="full", padding=padding)
    count = len(outputs)
    assert pooled.coords[: pooled.num_valid].tolist() == outputs.tolist()
    want = lambda x: oracle.sparse_pool(  # noqa: E731
        coords, x, outputs, kernel, steps, padding=padding, reduce=reduce
    )
    np.testing.assert_allclose(pooled.features[:count], want(x), atol=1e-6)
    assert not pooled.features[count:].any()
    dy = np.random.default_rng(0).normal(size=(pooled.capacity, 3)).astype(np.float32)
    _, pullback = jax.vjp(
        lambda x: (
            pool(VOXELS.with_features(x), kernel, stride, padding=padding, reduce=reduce).features
        ),
        VOXELS.features,
    )
    (dx,) = pullback(jnp.asarray(dy).at[count:].set(jnp.nan))
    assert not dx[19:].any()
    step = np.cos(np.arange(x.size).reshape(x.shape))
    slope = (want(x + 1e-6 * step) - want(x - 1e-6 * step)) / 2e-6
    np.testing.assert_allclose(np.vdot(dx[:19], step), np.vdot(dy[:count], slope), rtol=1e-4)


@pytest.mark.wide
def test_equal_voxels_share_a_gradient():
    voxels = from_coords([[0, 0], [0, 1]], [[2.0], [2.0]])
    dx = jax.grad(lambda x: pool(voxels.with_features(x), 2).features.sum())(voxels.features)
    assert dx.ravel().tolist() == [0.5, 0.5]


@pytest.mark.wide
def test_unpooling_spreads_what_was_pooled():
    pooled = pool(VOXELS, 2)
    back = unpool(pooled, VOXELS, 2)
    assert back.coords is VOXELS.coords and back.tensor_stride == (1, 1)
    row_of = {tuple(c): i for i, c in enumerate(pooled.coords[: pooled.num_valid].tolist())}
    for row, (sample, *place) in enumerate(VOXELS.coords[:19].tolist()):
        own = row_of[sample, place[0] // 2, place[1] // 2]
        np.testing.assert_array_equal(back.features[row], pooled.features[own])
    assert not back.features[19:].any()


@pytest.mark.wide
@pytest.mark.parametrize("reduce", ["max", "mean", "sum"])
def test_global_pooling(reduce):
    x, samples = np.asarray(VOXELS.features)[:19], np.asarray(VOXELS.coords)[:19, 0]
    got = global_pool(VOXELS, reduce=reduce)
    for sample in (0, 2):
        own = x[samples == sample]
        np.testing.assert_allclose(got[sample], getattr(own, reduce)(0), rtol=1e-5)
    assert not got[1].any()
    # What is no number in one sample is one in the others.
    spoiled = VOXELS.with_features(jnp.where(VOXELS.coords[:, :1] == 0, jnp.nan, VOXELS.features))
    dx = jax.grad(lambda x: global_pool(VOXELS.with_features(x), reduce=reduce)[2].sum())
    assert np.isfinite(global_pool(spoiled, reduce=reduce)[1:]).all()
    assert np.isfinite(dx(spoiled.features)[VOXELS.coords[:, 0] != 0]).all()


@pytest.mark.wide
def test_pruning():
    keep = np.zeros(32, bool)
    keep[[3, 5, 18, 25]] = True
    pruned = jax.jit(prune)(VOXELS, keep)
    assert pruned.num_valid == 3
    for name in ("coords", "features"):
        np.testing.assert_array_equal(
            getattr(pruned, name)[:3], getattr(VOXELS, name)[jnp.array([3, 5, 18])]
        )
    dx = jax.grad(lambda x: prune(VOXELS.with_features(x), keep).features[:3].sum())(
        VOXELS.features
    )
    np.testing.assert_array_equal(dx[:, 0], keep & (np.arange(32) < 19))
    with pytest.raises(ValueError, match="more voxels than a capacity"):
        prune(VOXELS, keep, out_capacity=2)
    with pytest.raises(ValueError, match=r"keep: expected bool \[32\], got int"):
        prune(VOXELS, np.ones(32, int))


@pytest.mark.wide
def test_union():
    other = poisoned(drawn_voxels((9, 3, 0), 7, 3, seed=1))
    both = union(VOXELS, other)
    want = {}
    for voxels in (VOXELS, other):
        for row in range(int(voxels.num_valid)):
            place = tuple(voxels.coords[row].tolist())
            want[place] = want.get(place, 0) + np.asarray(voxels.features[row])
    assert both.coords[: both.num_valid].tolist() == [list(place) for place in sorted(want)]
    got = both.features[: both.num_valid]
    np.testing.assert_allclose(got, [want[place] for place in sorted(want)], rtol=1e-6)
    dx = jax.grad(lambda x: union(VOXELS, other.with_features(x)).features.sum())(other.features)
    np.testing.assert_array_equal(dx[:, 0], other.valid)


def test_arithmetic():
    for function, want in ((add, 3), (subtract, -1), (multiply, 2)):
        one = from_coords([[0, 1], [0, 5]], [[1.0], [1.0]])
        other = from_coords([[0, 1], [0, 5]], [[2.0], [2.0]])
        assert function(one, other).features.tolist() == [[want], [want]]
        with pytest.raises(ValueError, match="second: expected first's coordinates in the same"):
            function(one, from_coords([[0, 5], [0, 1]], [[2.0], [2.0]]))
        with pytest.raises(ValueError, match="second: expected first's batch_size, 1, got 2"):
            function(one, dataclasses.replace(other, batch_size=2))
    assert concatenate(one, other).features.tolist() == [[1, 2], [1, 2]]
    spoiled = dataclasses.replace(other, overflow=jnp.int32(1))
    with pytest.raises(ValueError, match="more voxels"):
        add(one, spoiled).check()


@pytest.mark.wide
def test_norms_are_those_of_the_valid_rows():
    x, samples = np.asarray(VOXELS.features)[:19], np.asarray(VOXELS.coords)[:19, 0]
    scale, bias = jnp.array([1.0, 2, 3]), jnp.array([0.5, 0, -1])

    def normed(x, axis):
        return (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + 1e-5)

    got, mean, var = batch_norm(VOXELS, scale, bias)
    np.testing.assert_allclose(mean, x.mean(0), atol=1e-6)
    np.testing.assert_allclose(var, x.var(0), rtol=1e-5)
    cases = [(got, normed(x, 0)), (layer_norm(VOXELS, scale, bias, epsilon=1e-5), normed(x, 1))]
    own = np.concatenate([normed(x[samples == s], 0) for s in (0, 2)])
    rows = np.concatenate([np.flatnonzero(samples == s) for s in (0, 2)])
    cases.append((instance_norm(VOXELS, scale, bias), own[np.argsort(rows)]))
    for voxels, want in cases:
        np.testing.assert_allclose(voxels.features[:19], want * scale + bias, atol=1e-5)
        assert not voxels.features[19:].any()
    running, _, _ = batch_norm(VOXELS, mean=jnp.ones(3), var=jnp.ones(3), epsilon=0)
    np.testing.assert_allclose(running.features[:19], x - 1, atol=1e-6)
    with pytest.raises(ValueError, match="mean, var: expected both or none"):
        batch_norm(VOXELS, mean=jnp.ones(3))
    for norm in (lambda v: batch_norm(v)[0], layer_norm, instance_norm):

        def loss(x, norm=norm):
            return jnp.sin(norm(VOXELS.with_features(x)).features).sum()

        dx = jax.jit(jax.grad(loss))
        assert np.isfinite(dx(VOXELS.features)).all() and not dx(VOXELS.features)[19:].any()


@pytest.mark.wide
def test_batch_norm_weighs_devices_by_their_voxels():
    parts = [
        dataclasses.replace(
            VOXELS,
            features=VOXELS.features[rows],
            coords=VOXELS.coords[rows],
            num_valid=jnp.int32(count),
        )
        for rows, count in ((jnp.arange(12), 12), (jnp.arange(12, 24), 7))
    ]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
    got, mean, _ = jax.vmap(lambda v: batch_norm(v, axis_name="devices"), axis_name="devices")(
        together
    )
    want, whole, _ = batch_norm(VOXELS)
    np.testing.assert_allclose(mean[1], whole, atol=1e-6)
    np.testing.assert_allclose(got.features[1, :7], want.features[12:19], atol=1e-5)
