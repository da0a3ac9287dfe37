"""Images with masks: sources, crops that both share, scores of pixels, and a whole training."""

import csv
import json
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("grain")

from flash_wtconv_jax.cli import app
from flash_wtconv_jax.train.images import (
    augment,
    loading,
    packing,
    scaling,
    sources,
    steps,
    trainer,
)
from flash_wtconv_jax.train.images import settings as settings_of
from flash_wtconv_jax.train.images.settings import Augment, Data

CLASSES = ["ground", "square", "stripe"]
SMALL = Data(size=16, scale=(0.4, 1.0))
SAID = {
    "model": {
        "name": "ConvNeXt",
        "options": {
            "depths": [1],
            "dims": [12],
            "levels": [1],
            "kernel_size": 3,
            "patch_size": 2,
            "layer_scale": 1.0,
        },
        "decoder": 16,
    },
    "data": {"size": 16, "scale": [0.7, 1.0], "eval_crop": 1.0},
    "optimizer": {"rate": 2e-2, "ema": 0.9, "clip": 1.0, "warmup": 0.5},
    "run": {"batch": 8, "epochs": 8, "log_every": 4},
}


def scene(seed):
    """A noisy image with a bright square and a dark stripe, and the mask of both."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((18, 20), np.uint8)
    top, left = rng.integers(0, 18 - 7), rng.integers(0, 20 - 7)
    mask[:, rng.integers(20) :][:, :3] = 2
    mask[top : top + 7, left : left + 7] = 1
    image = np.array([110, 200, 30])[mask][..., None] + rng.integers(-20, 20, (18, 20, 3))
    return image.astype(np.uint8), mask


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    for part, count in (("train", 32), ("val", 9)):
        for name in ("images", "masks"):
            (folder / part / name).mkdir(parents=True)
        for index in range(count):
            image, mask = scene(index + 100 * (part == "val"))
            # The last row is of no class.
            mask[-1] = 255
            Image.fromarray(image).save(folder / part / "images" / f"{index}.png")
            Image.fromarray(mask).save(folder / part / "masks" / f"{index}.png")
    (folder / "classes.json").write_text(json.dumps(CLASSES))
    return folder


def first_batch(source, data):
    dataset = loading.training(source, data, batch=8, seed=0, steps=range(1))
    with loading.iterating(dataset) as batches:
        return next(batches)


def test_masks_are_cropped_and_mirrored_with_their_images(folder):
    source = sources.opened(folder, "train")
    assert (len(source), source.classes) == (32, CLASSES)
    arrays = first_batch(source, SMALL)
    assert arrays["image"].shape == (8, 18, 18, 3) and arrays["label"].shape == (8, 16, 16)
    assert len(np.unique(arrays["extent"], axis=0)) > 4
    assert arrays["read"].all() and (arrays["label"] == loading.NO_CLASS).any()
    targets = jax.nn.one_hot(arrays["label"], 3)
    seen = jax.jit(scaling.scaled, static_argnums=2)(arrays["image"], arrays["extent"], 16)
    images, targets = augment.augmented(jax.random.key(0), seen, targets, Augment(flip=0.5))
    assert not np.array_equal(images, seen)
    levels = np.digitize(np.asarray(images).mean(-1), [70, 155])
    known = np.asarray(targets).any(-1)
    # Brightness tells the class, but for the edges that cropping smoothes.
    right = np.array([1, 2, 0])[np.asarray(targets).argmax(-1)] == levels
    assert right[known].mean() > 0.9


def test_bad_masks_are_told_of(folder, tmp_path):
    source = sources.opened(folder, "train")
    source.classes = CLASSES[:2]
    assert not first_batch(source, SMALL)["read"].all()
    assert "its mask has the class 2, expected 0 to 1, or 255" in " ".join(
        loading.reason(source, SMALL, index) for index in range(8)
    )
    for part in ("images", "masks"):
        (tmp_path / "train" / part).mkdir(parents=True)
    Image.fromarray(scene(0)[0]).save(tmp_path / "train" / "images" / "0.png")
    with pytest.raises(ValueError, match="nothing names the classes of .* as a list into"):
        sources.opened(tmp_path, "train")
    (tmp_path / "classes.json").write_text(json.dumps(CLASSES))
    with pytest.raises(ValueError, match=r"0\.png has no mask, expected .*masks.0\.png"):
        sources.opened(tmp_path, "train")
    Image.fromarray(scene(0)[1][:4]).save(tmp_path / "train" / "masks" / "0.png")
    source = sources.opened(tmp_path, "train")
    assert "its mask has (20, 4) pixels, the image (20, 18)" in loading.reason(source, SMALL, 0)
    with pytest.raises(ValueError, match="has masks, which are not packed"):
        packing.pack(source, tmp_path / "packed")
    wrong = settings_of.resolved({"data": {"folder": str(folder), "randaugment": 9.0}})
    with pytest.raises(ValueError, match=r"randaugment is 9\.0, which masks do not follow"):
        trainer.prepared(wrong)


def test_scores_of_pixels_are_those_of_each_class():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 4, 5, 4)).astype(np.float32)
    label = rng.integers(-1, 3, (2, 4, 5)).astype(np.int16)
    batch = {"image": np.zeros((2, 4, 4, 3), np.uint8), "extent": np.full((2, 2), 4)}
    batch |= {"label": label, "read": np.ones(2, bool)}
    evaluate = partial(steps._evaluate, lambda *_: jnp.asarray(logits), Data(size=4), None)
    sums, said = jax.jit(evaluate)(batch)
    np.testing.assert_array_equal(said, logits.argmax(-1))
    known = label >= 0
    wanted = []
    for one in range(4):
        true, found = known & (label == one), known & (logits.argmax(-1) == one)
        wanted.append((true & found).sum() / (true | found).sum())
    np.testing.assert_allclose(steps.overlaps(sums), wanted)
    scores = steps.means({name: np.asarray(value) for name, value in sums.items()})
    assert scores["miou"] == pytest.approx(np.mean(wanted))
    assert scores["pixels"] == pytest.approx((logits.argmax(-1) == label)[known].mean())


@pytest.mark.wide
def test_a_network_learns_masks_and_draws_them(folder, tmp_path):
    said = settings_of.resolved(SAID, {"data": {"folder": str(folder)}})
    run = tmp_path / "run"
    summary = trainer.train(said, run)
    assert summary["scores"]["ema_miou"] > 0.8, summary["scores"]
    for name in trainer.FILES:
        assert (run / name).exists(), name
    invoke = CliRunner().invoke
    result = invoke(app, ["eval", str(run), "--data", str(folder)])
    assert result.exit_code == 0, result.output
    # The network that is kept is the best one, not the last.
    with (run / "epochs.csv").open() as file:
        (best,) = (row for row in csv.DictReader(file) if int(row["step"]) == summary["best_step"])
    assert f"9 images: mIoU {float(best['ema_miou']):.2%}" in result.output
    assert "\n  stripe: " in result.output
    image = folder / "val" / "images" / "0.png"
    arguments = ["predict", str(image), "--network", str(run), "--out", str(tmp_path / "out")]
    result = invoke(app, arguments)
    assert result.exit_code == 0 and result.output.startswith(f"{image}: "), result.output
    mask = Image.open(tmp_path / "out" / "0.png")
    assert (mask.mode, mask.size) == ("P", (20, 18))
    assert (np.asarray(mask) == scene(100)[1]).mean() > 0.85
    # It is fine-tuned for other classes: all but the decoder's last layer begins as it ended.
    fine = replace(
        said, model=replace(said.model, name="", options={}, checkpoint=str(run / "network"))
    )
    begun = trainer.network(fine, classes=5, of_pixels=True)
    assert begun(jnp.zeros((1, 16, 16, 3)), deterministic=True).shape == (1, 16, 16, 5)
