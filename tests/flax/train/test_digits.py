"""The digits demo: data, training, its files."""

import dataclasses
import json
from importlib.util import find_spec

import chex
import jax
import numpy as np
import pytest
from flax import nnx

# Not imported here, for scikit-learn takes two seconds of every worker that collects this.
if find_spec("sklearn") is None:
    pytest.skip("needs scikit-learn", allow_module_level=True)
pytest.importorskip("matplotlib")

from flash_wtconv_jax import checkpoints, models
from flash_wtconv_jax.receptive_field import SHARES, effective_receptive_field
from flash_wtconv_jax.train import digits, loop


def tiny_network(*, levels=1, seed=0):
    config = dataclasses.replace(digits._CONFIG, depths=(1,), dims=(4,), levels=(levels,))
    return models.ConvNeXt(config, rngs=nnx.Rngs(seed))


def test_the_split_is_stratified_disjoint_and_always_the_same():
    data, again = digits.load_digits(), digits.load_digits()
    assert data.train_images.shape == (1437, 8, 8, 1)
    assert data.test_images.shape == (360, 8, 8, 1)
    assert data.train_images.dtype == np.float32
    assert (data.train_images.min(), data.train_images.max()) == (-1, 1)
    counts = np.bincount(data.test_labels)
    assert len(counts) == 10
    assert counts.max() - counts.min() <= 2
    np.testing.assert_array_equal(data.test_images, again.test_images)


def test_a_strip_is_a_digit_and_its_marked_twin_reads_as_nine_less():
    data, strips = digits.load_digits(), digits.load_strips()
    images, labels = strips.test_images.reshape(2, 360, 8, 20), strips.test_labels.reshape(2, 360)
    np.testing.assert_array_equal(images[..., :8], np.stack([data.test_images[..., 0]] * 2))
    np.testing.assert_array_equal(labels, [data.test_labels, 9 - data.test_labels])
    assert (images[0, ..., 8:] == loop.BACKGROUND).all() and (images[1, ..., 17:] == 1).all()
    # Two blocks of 3 x 3 on patches of 2 reach two patches to either side, from none to both.
    for shift in (-1, 0, 1):
        assert (7 + shift) // 2 + 2 < (17 + shift) // 2 - 2


def test_shifts_move_images_by_one_pixel_at_most():
    images = np.full((64, 8, 8, 1), loop.BACKGROUND, np.float32)
    images[:, 4, 4] = 1
    shifted = np.asarray(loop._shift(images, jax.random.key(0)))
    _, rows, columns, _ = np.nonzero(shifted == 1)
    assert len(rows) == 64
    assert set(zip(rows, columns, strict=True)) == {(r, c) for r in (3, 4, 5) for c in (3, 4, 5)}
    assert set(np.unique(shifted)) == {loop.BACKGROUND, 1}


@pytest.mark.wide
def test_a_seed_fixes_the_trained_parameters(monkeypatch):
    data = digits.load_digits()
    # Once for both trainings, however many epochs they have.
    monkeypatch.setattr(loop, "_loss", chex.assert_max_traces(loop._loss, n=1))
    results = []
    for _ in range(2):
        model = tiny_network()
        seen = []
        history = digits.train(
            model, data, epochs=2, seed=3, on_epoch=lambda h, seen=seen: seen.append(len(h.loss))
        )
        assert seen == [1, 2]
        assert history.loss[1] < history.loss[0]
        results.append((history, checkpoints.variables_of(model)))
    assert results[0][0] == results[1][0]
    chex.assert_trees_all_equal(results[0][1], results[1][1])


def test_a_seed_of_more_than_64_bits_is_an_error():
    for seed in (2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match=f"seed={seed}: expected an integer [<>]= -?92233720"):
            digits.digits_network(seed=seed)
        with pytest.raises(ValueError, match="seed="):
            digits.train(None, None, epochs=1, seed=seed)
        with pytest.raises(ValueError, match="seed="):
            effective_receptive_field(None, (8, 8, 1), seed=seed)


def test_no_epochs_is_an_error():
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        digits.train(tiny_network(), digits.load_digits(), epochs=0)


def assert_demo(out, epochs, network):
    """A run of the demo: its files, its metrics, and the networks that it leaves behind."""
    calls = []

    def on_epoch(name, histories):
        calls.append((name, [len(history.loss) for history in histories]))

    metrics = digits.run_demo(out, epochs=epochs, on_epoch=on_epoch)
    done = [[epochs] * i + [n] for i in range(digits.SEEDS) for n in range(1, epochs + 1)]
    assert calls == [(name, one) for name in digits.NETWORKS for one in done]

    assert {path.name for path in out.iterdir()} == set(digits.FILES)
    for picture in out.glob("*.png"):
        content = picture.read_bytes()
        assert content.startswith(b"\x89PNG") and b"IEND" in content[-16:], picture

    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert metrics["device"]["platform"] == jax.default_backend()
    assert metrics["versions"]["jax"] == jax.__version__

    strips = digits.load_strips()
    for folder, (name, trained) in zip(
        ("checkpoint", "checkpoint_plain"), metrics["networks"].items(), strict=True
    ):
        assert metrics["seeds"] == list(range(digits.SEEDS)) and metrics["epochs"] == epochs
        assert [len(losses) for losses in trained["loss_by_epoch"]] == [epochs] * digits.SEEDS
        last = [accuracies[-1] for accuracies in trained["accuracy_by_epoch"]]
        found = [trained[f"{key}accuracy"] for key in ("", "least_", "greatest_")]
        assert found == pytest.approx([np.mean(last), min(last), max(last)])
        model = models.load_network(out / folder)
        assert model.config == network(levels=digits.NETWORKS[name]).config
        guesses = digits.predict(model, strips.test_images).argmax(axis=1)
        assert (guesses == strips.test_labels).mean() == pytest.approx(last[0])
    return metrics


@pytest.fixture
def few_strips(monkeypatch):
    """The demo of every thirtieth strip: fewer mistakes to draw."""
    strips = digits.Digits(*(part[::30] for part in digits.load_strips()))
    monkeypatch.setattr(digits, "load_strips", lambda: strips)


@pytest.mark.wide
def test_a_tiny_demo_from_start_to_end(few_strips, monkeypatch, tmp_path):
    # Every training compiles anew.
    monkeypatch.setattr(digits, "SEEDS", 2)
    monkeypatch.setattr(digits, "digits_network", tiny_network)
    assert_demo(tmp_path / "demo", 1, tiny_network)


@pytest.mark.slow
@pytest.mark.usefixtures("optimised")
def test_the_demo_from_start_to_end(tmp_path):
    # As a user runs it. One test, because it is the suite's dearest by far.
    metrics = assert_demo(tmp_path / "demo", digits.EPOCHS, digits.digits_network)
    wtconv, plain = metrics["networks"].values()
    spreads = [one["greatest_accuracy"] - one["least_accuracy"] for one in (wtconv, plain)]
    assert wtconv["accuracy"] - plain["accuracy"] > max(spreads)
    assert wtconv["least_accuracy"] > 0.9 and plain["greatest_accuracy"] < 0.55
    for share in SHARES:
        side = f"{share:.0%}"
        assert wtconv["receptive_field_sides"][side] > plain["receptive_field_sides"][side]


@pytest.fixture
def quick(few_strips, monkeypatch):
    """The demo without its training: what is left is the writing of files."""
    history = digits.History([1.0], [0.5])
    monkeypatch.setattr(digits, "digits_network", tiny_network)
    monkeypatch.setattr(digits, "train", lambda *args, **options: history)
    monkeypatch.setattr(digits, "network_field", lambda *args: np.ones((8, 8)))


@pytest.mark.wide
def test_a_second_run_replaces_its_files_and_no_others(quick, tmp_path):
    models.save_network(tmp_path / "checkpoint", tiny_network(levels=0))
    for name in ("metrics.json", "predictions.png", "notes.txt"):
        (tmp_path / name).write_text("old")
    digits.run_demo(tmp_path, epochs=1)
    assert {path.name for path in tmp_path.iterdir()} == {*digits.FILES, "notes.txt"}
    assert (tmp_path / "notes.txt").read_text() == "old"
    assert json.loads((tmp_path / "metrics.json").read_text())["epochs"] == 1
    assert (tmp_path / "predictions.png").read_bytes().startswith(b"\x89PNG")
    assert models.load_network(tmp_path / "checkpoint").config.levels == (2,)


def test_an_interrupt_leaves_nothing_behind(quick, monkeypatch, tmp_path):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(digits, "train", interrupt)
    with pytest.raises(KeyboardInterrupt):
        digits.run_demo(tmp_path / "runs" / "demo")
    assert not list(tmp_path.iterdir())


@pytest.mark.wide
def test_a_failed_picture_loses_no_training(quick, monkeypatch, tmp_path):
    def fail(*args):
        raise RuntimeError("latex could not be found\nand a long story")

    (tmp_path / "predictions.png").write_text("of another run")
    monkeypatch.setattr(digits.plots, "predictions", fail)
    with pytest.warns(RuntimeWarning, match="could not be drawn: latex could not be found$"):
        digits.run_demo(tmp_path, epochs=1)
    assert {path.name for path in tmp_path.iterdir()} == set(digits.FILES) - {"predictions.png"}


@pytest.mark.wide
def test_a_failed_write_leaves_what_was_there(quick, monkeypatch, tmp_path):
    (tmp_path / "metrics.json").write_text("old")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(digits.Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        digits.run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
    assert (tmp_path / "metrics.json").read_text() == "old"
