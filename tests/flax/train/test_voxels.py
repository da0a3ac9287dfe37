"""The demos of sparse convolution: their data, their training, their files."""

import json

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from flash_wtconv_jax.train import cortex, rooms, voxels
from flash_wtconv_jax.train.segmentation import Labelled, predict, train, voxelised


def octahedron(radius=1.0):
    """A closed surface around the origin, deep where z is negative."""
    vertices = radius * np.vstack([np.eye(3), -np.eye(3)])
    upper = [[0, 1, 2], [1, 3, 2], [3, 4, 2], [4, 0, 2]]
    triangles = np.array(upper + [[b, a, 5] for a, b, _ in upper])
    return cortex.Surface(vertices, triangles, -vertices[:, 2])


class TestCortex:
    @pytest.mark.parametrize("mirrored", [False, True])
    def test_points_lie_on_the_surface_and_normals_point_out_of_it(self, mirrored):
        surface = octahedron().mirrored() if mirrored else octahedron()
        points, labels = cortex.sampled(surface, 0.1)
        np.testing.assert_allclose(np.abs(points[:, :3]).sum(1), 1, atol=1e-12)
        assert ((points[:, :3] * points[:, 3:]).sum(1) > 0).all()
        np.testing.assert_array_equal(labels, points[:, 2] < 0)
        # No point of the surface is far from one of these.
        at = np.random.default_rng(0).dirichlet(np.ones(3), 50) * [1, -1, 1]
        distances = np.linalg.norm(at[:, None] - points[None, :, :3], axis=-1)
        assert distances.min(1).max() < 0.1

    def test_a_half_is_mirrored(self):
        one, other = octahedron(), octahedron().mirrored()
        np.testing.assert_array_equal(one.vertices * [-1, 1, 1], other.vertices)
        np.testing.assert_array_equal(one.mirrored().mirrored().triangles, one.triangles)

    @pytest.mark.wide
    def test_the_surfaces_of_nilearn(self):
        pytest.importorskip("nilearn")
        left, right = cortex.load_cortex(4.0)
        for half in (left, right):
            assert 5000 < len(half.labels) < 6500
            assert 0.4 < half.labels.mean() < 0.6
            coords, normals = np.asarray(half.voxels.coords)[:, 1:], half.voxels.features
            # The left half has negative x, and so has the mirrored right one.
            assert (coords[:, 0] < 0).mean() > 0.95
            assert ((coords - coords.mean(0)) * normals).sum(1).mean() > 0


class TestRooms:
    def test_a_seed_is_a_room_and_its_walls_face_inside(self):
        points, labels = rooms.room(3, 0.2)
        again, _ = rooms.room(3, 0.2)
        np.testing.assert_array_equal(points, again)
        middle = points[:, :3].mean(0)
        for name in ("floor", "wall"):
            own = points[labels == rooms.CLASSES.index(name)]
            assert ((middle - own[:, :3]) * own[:, 3:]).sum(1).min() > 0
        np.testing.assert_allclose(np.linalg.norm(points[:, 3:], axis=1), 1)

    def test_rooms_are_samples_and_those_held_out_are_others(self):
        training, held_out = rooms.load_rooms(0.4)
        assert (training.voxels.batch_size, held_out.voxels.batch_size) == (4, 2)
        for part in (training, held_out):
            assert int(part.voxels.num_valid) == len(part.labels) == part.voxels.capacity
            assert set(np.unique(part.labels)) == set(range(5))
        own = [np.asarray(part.voxels.coords[:300, 1:]).tolist() for part in (training, held_out)]
        assert own[0] != own[1]


def test_a_size_of_voxels_that_is_none():
    for size in (0, -1, np.nan, np.inf):
        with pytest.raises(ValueError, match="voxel_size=.*expected a number > 0"):
            voxelised([(np.zeros((1, 6)), np.zeros(1, int))], size)


def small(voxel_size):
    """Two octahedra of a few hundred voxels, in place of the cortex."""
    parts = []
    for radius in (5.0, 4.5):
        parts.append(voxelised([cortex.sampled(octahedron(radius), 0.3)], voxel_size))
    return parts[0], parts[1]


@pytest.mark.wide
def test_training_learns_and_a_seed_fixes_what():
    data, _ = small(1.0)
    predictions = []
    for _ in range(2):
        model = voxels.network("linear", 2, seed=1)
        losses = train(model, data, epochs=20, learning_rate=0.1)
        assert losses[-1] < 0.8 * losses[0]
        predictions.append(predict(model, data.voxels))
    np.testing.assert_array_equal(*predictions)
    # Here, unlike on the cortex, the normal of a voxel tells all.
    assert (predictions[0] == data.labels).mean() > 0.9
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        train(model, data, epochs=0, learning_rate=0.1)


@pytest.fixture
def few(monkeypatch):
    """The demo of few voxels."""
    task = voxels.TASKS["voxels"]._replace(load=small)
    monkeypatch.setitem(voxels.TASKS, "voxels", task)


@pytest.fixture
def quick(few, monkeypatch):
    """The demo of few voxels, with two linear models, which compile in no time."""
    made = voxels.network
    monkeypatch.setattr(
        voxels, "network", lambda name, *rest, **seed: made("linear", *rest, **seed)
    )


def assert_files(out, metrics):
    assert {path.name for path in out.iterdir()} == set(voxels.FILES)
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert (out / "predictions.png").read_bytes().startswith(b"\x89PNG")


def assert_demo(tmp_path):
    calls = []
    metrics = voxels.run_demo(
        tmp_path / "demo", "voxels", epochs=2, on_epoch=lambda *call: calls.append(call)
    )
    assert [name for name, _ in calls] == ["SparseUNet"] * 2 + ["linear"] * 2
    assert_files(tmp_path / "demo", metrics)
    assert metrics["voxel_size"] == "2 mm"
    for network in metrics["networks"].values():
        assert len(network["loss_by_epoch"]) == 2
        assert list(network["iou"]) == ["gyrus", "sulcus"]
        assert network["miou"] == pytest.approx(np.mean(list(network["iou"].values())))


def test_a_tiny_demo_from_start_to_end(quick, tmp_path):
    assert_demo(tmp_path)


@pytest.mark.slow
def test_a_tiny_demo_with_its_network(few, tmp_path):
    assert_demo(tmp_path)


def test_an_interrupt_leaves_nothing_and_another_run_replaces(quick, monkeypatch, tmp_path):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(voxels, "train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        voxels.run_demo(tmp_path / "runs" / "demo", "voxels")
    assert not list(tmp_path.iterdir())
    for name in ("metrics.json", "predictions.png"):
        (tmp_path / name).write_text("old")
    monkeypatch.setattr(voxels, "train", lambda *args, **options: [1.0])
    monkeypatch.setattr(voxels, "predict", lambda model, found: np.zeros(found.capacity, np.int32))
    assert_files(tmp_path, voxels.run_demo(tmp_path, "voxels", voxel_size=3.0))
    assert isinstance(small(3.0)[0], Labelled)


def test_voxels_that_are_too_small(tmp_path):
    for task, size in (("voxels", 0.5), ("rooms", 0.001), ("rooms", float("nan"))):
        with pytest.raises(ValueError, match=f"voxel_size={size:g}: expected at least"):
            voxels.run_demo(tmp_path / "demo", task, voxel_size=size)
    assert not list(tmp_path.iterdir())
