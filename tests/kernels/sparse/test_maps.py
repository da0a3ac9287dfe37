"""Kernel maps against a search in a dictionary, their order, and where they are kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.sparse import drawn_voxels

from pallas_kernels.sparse import from_coords, from_pairs, kernel_map, maps, sparse_maps
from pallas_kernels.sparse.maps import row_table
from pallas_kernels.sparse.problem import TILE_ROWS
from pallas_kernels.sparse.voxels import LIMIT

pytestmark = pytest.mark.core


def searched(read, reading, window):
    """The table by a dictionary."""
    row_of = {tuple(place): row for row, place in enumerate(np.asarray(read).tolist())}
    steps = [1, *window.stride]
    return np.array(
        [
            [row_of.get(tuple(at), -1) for at in (np.asarray(reading) * steps + [0, *o]).tolist()]
            for o in window.offsets()
        ]
    )


@pytest.mark.wide
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"),
    [
        (3, 1, 1),
        ((2, 5), (3, 1), (1, 6)),
        ((1, 4), 2, 3),
    ],
)
def test_both_directions_are_a_dictionarys(kernel, stride, dilation):
    voxels = drawn_voxels((30, 0, 14), 8, 1)
    found, out = kernel_map(voxels, kernel, stride, dilation)
    count, coords = int(out.num_valid), np.asarray(voxels.coords)[:44]
    want = searched(coords, np.asarray(out.coords)[:count], found.window)
    np.testing.assert_array_equal(found.table[:, :count], want)
    assert (np.asarray(found.table)[:, count:] == -1).all()
    assert (found.in_capacity, found.out_capacity) == (64, out.capacity)
    back = np.full((len(want), 64), -1)
    for tap, row in zip(*np.nonzero(want >= 0), strict=True):
        back[tap, want[tap, row]] = row
    np.testing.assert_array_equal(found.reverse, back)
    # Stride 1 and odd sizes: the table itself, the other way round.
    assert (found.backward is None) == (kernel == 3)
    swapped = found.swapped()
    np.testing.assert_array_equal(swapped.table, found.reverse)
    np.testing.assert_array_equal(swapped.reverse, found.table)
    assert swapped.window.transposed


@pytest.mark.wide
def test_a_window_that_is_not_centred_is_not_its_own_mirror():
    voxels = drawn_voxels((9,), 4, 1)
    found, _ = kernel_map(voxels, 3, transposed=True, output_voxels=voxels, padding=0)
    centred, _ = kernel_map(voxels, 3, transposed=True, output_voxels=voxels)
    coords = np.asarray(voxels.coords)[:9]
    np.testing.assert_array_equal(
        centred.table[:, :9], searched(coords, coords, found.window)[::-1]
    )
    moved = searched(coords, coords + [0, 1, 1], found.window)
    np.testing.assert_array_equal(found.reverse[:, :9], moved)


@pytest.mark.parametrize("dilation", [1, pytest.param(2, marks=pytest.mark.wide)])
def test_neighbours_at_the_limits(dilation):
    """A key beyond the last axis is not that of the next column, and hides nothing before it."""
    places = [[0, 0, LIMIT - 1], [0, 1, -LIMIT], [0, 1, -LIMIT + 1], [0, LIMIT - 1, 5]]
    voxels = from_coords([*places, [0, -LIMIT, 5]], np.ones((5, 1), np.float32), capacity=5)
    found, _ = kernel_map(voxels, 3, 1, dilation)
    want = searched(voxels.coords, voxels.coords, found.window)
    np.testing.assert_array_equal(found.table, want)


@pytest.mark.wide
def test_many_queries_take_turns(monkeypatch):
    voxels = drawn_voxels((30,), 6, 1)
    run = lambda: kernel_map(voxels, 3, 2, output_rule="full")  # noqa: E731
    (want, sites), _ = run(), jax.clear_caches()
    monkeypatch.setattr(maps, "_QUERIES_AT_ONCE", 64)
    got, again = run()
    jax.clear_caches()
    np.testing.assert_array_equal(got.table, want.table)
    np.testing.assert_array_equal(again.coords, sites.coords)


@pytest.mark.wide
def test_pairs_and_back():
    voxels = drawn_voxels((9, 5), 5, 1)
    found, out = kernel_map(voxels, 3, 2)
    in_maps, out_maps, offsets = found.pairs()
    assert offsets[-1] == len(in_maps) == (found.table >= 0).sum()
    for tap in range(9):
        for at in range(offsets[tap], offsets[tap + 1]):
            assert found.table[tap, out_maps[at]] == in_maps[at]
    padded = jax.jit(lambda found: found.pairs(256))(found)
    sizes = {"in_capacity": voxels.capacity, "out_capacity": out.capacity, "kernel_size": 3}
    for lists in (found.pairs(), padded):
        back = from_pairs(*lists, **sizes, stride=2, ndim=2)
        jax.tree.map(np.testing.assert_array_equal, back, found)
    with pytest.raises(ValueError, match=r"offsets: expected shape \(10,\).*got \(9,\)"):
        from_pairs(in_maps, out_maps, offsets[:-1], **sizes, ndim=2)
    with pytest.raises(ValueError, match="out_maps: expected in_maps' shape"):
        from_pairs(in_maps, out_maps[1:], offsets, **sizes, ndim=2)


@pytest.mark.parametrize("taps", [pytest.param(9, marks=pytest.mark.wide), 75])
def test_rows_that_lack_the_same_offsets_are_neighbours(taps):
    rng = np.random.default_rng(0)
    kinds = rng.random((taps, 5)) < 0.3
    table = np.where(kinds[:, rng.integers(0, 5, 100)], rng.integers(0, 50, (taps, 100)), -1)
    rows = jax.jit(row_table)(jnp.asarray(table, jnp.int32))
    order = np.asarray(rows.order)
    assert sorted(order) == list(range(100))
    there = (table >= 0)[:, order]
    # Five kinds of rows, each in one piece, in the order that they had.
    changes = (there[:, 1:] != there[:, :-1]).any(0)
    assert changes.sum() == 4
    assert all((np.diff(piece) > 0).all() for piece in np.split(order, np.flatnonzero(changes) + 1))
    padded = np.pad(there, ((0, 0), (0, -100 % TILE_ROWS))).reshape(taps, -1, TILE_ROWS)
    bits = np.asarray(rows.tile_masks)[:, None] >> np.arange(32, dtype=np.uint32)[:, None] & 1
    np.testing.assert_array_equal(bits.reshape(-1, bits.shape[2])[:taps], padded.any(2))


def test_maps_are_kept_by_the_coordinates_not_by_sizes():
    one, other = drawn_voxels((9,), 5, 1), drawn_voxels((9,), 5, 1, seed=1)
    with sparse_maps():
        found, out = kernel_map(one, 3, 2)
        mine, _ = kernel_map(other, 3, 2)
        assert found is not mine and (found.table != mine.table).any()
        again, same = kernel_map(one.with_features(one.features * 2), 3, 2)
        assert again is found and same.coords is out.coords
        assert kernel_map(one, 3, 2, output_voxels=out)[0] is found
        assert kernel_map(one, 3, 1)[0] is not found
        # Fewer of the same coordinates are others.
        fewer = dataclasses.replace(one, num_valid=one.num_valid - 1)
        assert kernel_map(fewer, 3, 2)[0] is not found
    assert kernel_map(one, 3, 2)[0] is not found


def test_a_map_of_a_trace_stays_there():
    """An outer function must not use what an inner one made of outer coordinates."""
    voxels = drawn_voxels((9,), 5, 1)

    def run(coords):
        own = dataclasses.replace(voxels, coords=coords)
        total = lambda: kernel_map(own, 3, 2)[0].table.sum()  # noqa: E731
        with sparse_maps():
            inner = jax.jit(total)()
            kept = kernel_map(own, 3, 2)[0]
            assert kernel_map(own, 3, 2)[0] is kept
            return inner + total() + jax.remat(total)()

    want = 3 * kernel_map(voxels, 3, 2)[0].table.sum()
    assert jax.jit(run)(voxels.coords) == want


@pytest.mark.wide
def test_overflow_is_carried():
    voxels = drawn_voxels((9,), 8, 1)
    with pytest.raises(ValueError, match="more voxels than a capacity"):
        kernel_map(voxels, 3, 2, out_capacity=2)
    found, out = jax.jit(lambda voxels: kernel_map(voxels, 3, 2, out_capacity=2))(voxels)
    assert out.num_valid == 2 and found.table.shape == (9, 2)
    _, later = jax.jit(lambda voxels: kernel_map(voxels, 3, 2))(out)
    with pytest.raises(ValueError, match="more voxels than a capacity"):
        later.check()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"generative": True}, marks=pytest.mark.wide),
        {"output_rule": "full", "padding": 2},
    ],
)
def test_outputs_beyond_the_limit_are_told(options):
    """None is left out in silence."""
    voxels = from_coords([[0, LIMIT - 1]], [[1.0]])
    with pytest.raises(ValueError, match="a coordinate beyond"):
        kernel_map(voxels, 3, **options)
    _, out = jax.jit(lambda voxels: kernel_map(voxels, 3, **options))(voxels)
    with pytest.raises(ValueError, match="a coordinate beyond"):
        out.check()
