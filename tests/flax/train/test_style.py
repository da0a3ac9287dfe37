"""Training of a style: the losses' features, and a run that is stopped and goes on bitwise."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from flash_wtconv_jax import checkpoints, pictures
from flash_wtconv_jax.cli import app
from flash_wtconv_jax.pictures import Picture
from flash_wtconv_jax.train import style, vgg

RNG = np.random.default_rng(0)
PHOTOGRAPHS = [RNG.integers(0, 256, size, np.uint8) for size in ((40, 60, 3), (48, 33, 3))]
STYLE = RNG.integers(0, 256, (32, 36, 3), np.uint8)
SMALL = style.Settings(steps=3, batch=1, crop=32)


@pytest.fixture(scope="module")
def arrays():
    """Thirteen kernels and biases, in Keras' layout."""
    rng = np.random.default_rng(1)
    return [
        (rng.normal(size=(3, 3, *sizes)).astype(np.float32) / 50, rng.normal(size=sizes[1]))
        for sizes in vgg._sizes()
    ]


def reference(arrays, images):
    """The features by a plain convolution, for images as the weights want them."""
    found, layers = [], iter(arrays)
    for block, count in enumerate((2, 2, 3, 3)):
        if block:
            n, h, w, c = images.shape
            images = images[:, : h // 2 * 2, : w // 2 * 2].reshape(n, h // 2, 2, w // 2, 2, c)
            images = images.max((2, 4))
        for _ in range(count):
            kernel, bias = next(layers)
            images = jax.lax.conv_general_dilated(
                images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            images = np.maximum(np.asarray(images) + bias.astype(np.float32), 0)
        found.append(images)
    return found


@pytest.mark.wide
def test_both_kinds_of_weights_take_the_same_pixels(tmp_path, arrays):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "keras.h5", "w") as file:
        names = iter(f"block{b}/conv{i}" for b, n in enumerate((2, 2, 3, 3, 3)) for i in range(n))
        for kernel, bias in arrays:
            name = next(names)
            file[f"{name}/vars/0"], file[f"{name}/vars/1"] = kernel, bias
        file["top/vars/0"] = np.zeros((1, 1, 512, 1))
    places = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
    tensors = {"classifier.0.weight": np.zeros((2, 2), np.float32)}
    for place, (kernel, bias) in zip(places, arrays, strict=True):
        tensors[f"features.{place}.weight"] = kernel.transpose(3, 2, 0, 1)
        tensors[f"features.{place}.bias"] = bias.astype(np.float32)
    checkpoints.write_state_dict(tmp_path / "torch.safetensors", tensors)
    images = PHOTOGRAPHS[0][None].astype(np.float32)
    mean = np.array((123.68, 116.779, 103.939), np.float32)
    wanted = {
        "keras.h5": (images - mean)[..., ::-1],
        "torch.safetensors": (images - mean) / np.array((58.395, 57.12, 57.375), np.float32),
    }
    for name, x in wanted.items():
        found = vgg.features(vgg.read_layers(tmp_path / name), jnp.asarray(images))
        for one, other in zip(found, reference(arrays, x), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4 * np.abs(other).max())


def test_files_of_something_else_are_refused(tmp_path):
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["a/0"], file["a/1"] = np.zeros((3, 3, 3, 8)), np.zeros(8)
    with pytest.raises(ValueError, match=r"other\.h5 does not hold the convolutions of a VGG-16"):
        vgg.read_layers(tmp_path / "other.h5")
    (tmp_path / "text.h5").write_text("text")
    with pytest.raises(OSError, match=r"text\.h5 cannot be read"):
        vgg.read_layers(tmp_path / "text.h5")
    with pytest.raises(ValueError, match=r"text\.txt: expected torchvision's \.pth"):
        vgg.read_layers(tmp_path / "text.txt")
    with pytest.raises(FileNotFoundError, match=r"none\.h5 does not exist"):
        vgg.read_layers(tmp_path / "none.h5")
    tensors = {"features.0.weight": np.zeros((64, 3, 3, 3), np.float32)}
    checkpoints.write_state_dict(tmp_path / "bn.safetensors", tensors)
    with pytest.raises(ValueError, match=r"lacks features\.0\.bias, expected a VGG-16 without"):
        vgg.read_layers(tmp_path / "bn.safetensors")


def test_losses_are_relative_to_their_targets():
    layers = vgg.random_layers()
    images = jnp.asarray(PHOTOGRAPHS[0][None], jnp.float32)
    target = [style._gram(one) for one in vgg.features(layers, images)]
    same = style.losses_of(layers, target, images, images, SMALL)
    assert same.content == 0 and same.style < 1e-10
    grey = jnp.full_like(images, 128)
    other = style.losses_of(layers, target, images, grey, SMALL)
    assert 0.1 < other.content < 10 and 0.1 < other.style < 10 and other.smooth == 0
    scaled = style.losses_of(layers, target, images, grey, SMALL._replace(style_weight=6.0))
    np.testing.assert_allclose(scaled.total - other.total, 3 * other.style, rtol=1e-5)
    beyond = style.losses_of(layers, target, images, images + 300, SMALL)
    assert beyond.total > beyond.content + 3 * beyond.style


def test_crops_depend_on_seed_and_step_alone():
    first = style._crops(PHOTOGRAPHS, SMALL._replace(batch=3), 5)
    assert first.shape == (3, 32, 32, 3) and first.dtype == np.uint8
    np.testing.assert_array_equal(first, style._crops(PHOTOGRAPHS, SMALL._replace(batch=3), 5))
    assert (first != style._crops(PHOTOGRAPHS, SMALL._replace(batch=3), 6)).any()


@pytest.mark.wide
def test_a_run_that_was_stopped_goes_on_bitwise(tmp_path):
    layers = vgg.random_layers()
    run = dict(photographs=PHOTOGRAPHS, style=STYLE, layers=layers, settings=SMALL, save_every=2)
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = style.train(tmp_path / "whole", **run)

    def stop(step, losses):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        style.train(tmp_path / "stopped", **run, on_step=stop)
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == {"checkpoint"}
    steps = []
    resumed = style.train(
        tmp_path / "stopped", **run, resume=True, on_step=lambda step, _: steps.append(step)
    )
    assert steps == [3]
    trees = (jax.tree.leaves(checkpoints.variables_of(one)) for one in (whole, resumed))
    for one, other in zip(*trees, strict=True):
        np.testing.assert_array_equal(one, other)
    for name in ("style.safetensors", "losses.csv"):
        written = [(tmp_path / run / name).read_bytes() for run in ("whole", "stopped")]
        assert written[0] == written[1]
    with (tmp_path / "whole" / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert float(rows[2]["total"]) < float(rows[0]["total"])
    assert pictures.read(tmp_path / "whole" / "sample.png").pixels.shape[0] > 0
    with pytest.raises(ValueError, match="made with other settings: rate is 0.1, was 0.001"):
        style.train(
            tmp_path / "whole", **(run | {"settings": SMALL._replace(rate=0.1)}), resume=True
        )


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    like = ({"kernel": jnp.zeros((2, 3))}, ())
    inputs = style._digest(PHOTOGRAPHS, STYLE)
    style._save(tmp_path / "own", like, SMALL, inputs, [[1.0, 2.0, 3.0, 4.0]])
    state, done, rows = style._restored(tmp_path / "own", like, SMALL, inputs)
    assert done == 1 and rows == [[1.0, 2.0, 3.0, 4.0]] and state[0]["kernel"].shape == (2, 3)
    checkpoints.save(tmp_path / "other", {"params": {"kernel": np.zeros(2)}})
    for name, wanted in (("other", like), ("own", ({"kernel": jnp.zeros((3, 2))}, ()))):
        with pytest.raises(ValueError, match=f"{name} is no checkpoint of train-style"):
            style._restored(tmp_path / name, wanted, SMALL, inputs)
    with pytest.raises(ValueError, match="made with another style, photographs or features"):
        style._restored(tmp_path / "own", like, SMALL, style._digest(PHOTOGRAPHS, STYLE + 1))


@pytest.mark.slow
def test_a_transformer_is_trained_too(tmp_path):
    settings = SMALL._replace(model="style_vit", steps=2)
    trained = style.train(tmp_path, PHOTOGRAPHS, STYLE, vgg.random_layers(), settings)
    assert {path.name for path in tmp_path.iterdir()} == {*style.FILES} - {"style.safetensors"}
    found = checkpoints.restore(tmp_path / "network")
    trees = (jax.tree.leaves(one) for one in (found, checkpoints.variables_of(trained)))
    for one, other in zip(*trees, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_transformer_halves_its_loss_on_one_photograph(tmp_path):
    from sklearn.datasets import load_sample_images

    photograph, picture = load_sample_images().images
    settings = style.Settings(steps=500, batch=1, crop=64, model="style_vit")
    wanted = pictures.resized(Picture(picture), 64).pixels
    totals = []
    style.train(
        tmp_path,
        [photograph],
        wanted,
        vgg.random_layers(),
        settings,
        on_step=lambda step, losses: totals.append(float(losses.total)),
    )
    # Crops differ, and so do their losses.
    assert np.mean(totals[-50:]) <= 0.5 * np.mean(totals[:5])


def test_wrong_settings_and_photographs():
    for changes, photographs, message in (
        ({"crop": 8}, PHOTOGRAPHS, "crop is 8, expected at least 32"),
        ({"steps": 0}, PHOTOGRAPHS, "steps is 0, expected at least 1"),
        ({"crop": 40}, PHOTOGRAPHS, r"photographs\[1\] has 33 pixels along its shorter side"),
        (
            {"model": "vit"},
            PHOTOGRAPHS,
            "model is 'vit', expected one of transformer_net",
        ),
        ({}, [], "photographs is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            style._check(photographs, STYLE, SMALL._replace(**changes))


def test_the_command_says_what_is_wrong(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(style, "train", lambda *args, **keys: called.append((args, keys)))
    folder = tmp_path / "photographs"
    folder.mkdir()
    picture = tmp_path / "style.png"
    pictures.write(picture, Picture(STYLE))

    def run(*arguments):
        base = ("--content", folder, "--style", picture, "--out", tmp_path / "out")
        return CliRunner().invoke(app, ["train-style", *map(str, (*base, *arguments))])

    assert "has no photograph of 32 pixels or more a side" in str(run("--crop", 32).exception)
    pictures.write(folder / "a.png", Picture(PHOTOGRAPHS[0]))
    pictures.write(folder / "small.png", Picture(STYLE[:20]))
    (folder / "notes.txt").write_text("a note")
    result = run("--crop", 32, "--steps", 7)
    assert result.exit_code == 0, result.output
    assert "small.png" in result.output and "notes.txt" in result.output
    assert "no --features: the losses compare by random filters" in result.output
    ((args, keys),) = called
    assert len(args[1]) == 1 and args[4].steps == 7 and not keys["resume"]
    assert "holds no checkpoint to go on from" in str(run("--crop", 32, "--resume").exception)
    assert "--dtype is int8, expected float32 or bfloat16" in str(run("--dtype", "int8").exception)
    (tmp_path / "out" / "checkpoint").mkdir(parents=True)
    assert "holds a run; give --resume to go on" in str(run("--crop", 32).exception)
