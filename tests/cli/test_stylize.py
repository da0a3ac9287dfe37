"""`flash-wtconv stylize`: what it writes, prints and refuses."""

from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image
from typer.testing import CliRunner

from flash_wtconv_jax import checkpoints
from flash_wtconv_jax.cli import app
from flash_wtconv_jax.models import TransformerNet
from flash_wtconv_jax.stylize import stylizer


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    path = tmp_path_factory.mktemp("style") / "style.safetensors"
    variables = checkpoints.variables_of(TransformerNet(rngs=nnx.Rngs(0)))
    checkpoints.write_state_dict(path, checkpoints.to_torch(variables))
    return path


@pytest.fixture
def negative(monkeypatch):
    """A network that inverts; the real one has tests of its own."""
    made = []

    class Negative:
        def __init__(self, styles, weights, **keys):
            made.append((styles, weights, keys))

        def start(self, pixels):
            return lambda: 255 - pixels

        def film(self, frames):
            return (255 - frame for frame in frames)

    monkeypatch.setattr(stylizer, "Stylizer", Negative)
    return made


@pytest.fixture
def folder(tmp_path):
    for index in range(3):
        Image.new("RGB", (8, 6), (index, 0, 0)).save(tmp_path / f"{index}.png")
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, ["stylize", *map(str, arguments)])


def test_one_picture_by_a_network(style, folder):
    result = run(folder / "1.png", "-o", folder / "new.png", "--style", style)
    assert result.exit_code == 0, result.output
    assert "1 of 1 files written" in result.output
    with Image.open(folder / "new.png") as image:
        assert image.size == (8, 6)
    # The network mirrors four pixels: those of a smaller picture are not enough.
    Image.new("RGB", (8, 4)).save(folder / "low.png")
    result = run(folder / "low.png", "-o", folder / "low2.png", "--style", style)
    assert result.exit_code == 1 and "x must be at least 5 pixels high" in result.output


@pytest.mark.wide
def test_without_a_style_it_is_the_one_that_comes_with_the_package(folder):
    ramp = np.linspace(0, 255, 48 * 64).reshape(48, 64).astype(np.uint8)
    Image.fromarray(ramp).save(folder / "grey.png")
    result = run(folder / "grey.png", "-o", folder / "glass.png")
    assert result.exit_code == 0, result.output
    pixels = np.asarray(Image.open(folder / "glass.png").convert("RGB"), float)
    assert pixels.shape == (48, 64, 3)
    # Colours come into the grey, and light stays light.
    assert np.ptp(pixels, axis=2).mean() > 15
    assert pixels[-16:].mean() - pixels[:16].mean() > 60


def test_a_folder_with_a_text_and_a_broken_file(negative, folder):
    (folder / "notes.txt").write_text("a note")
    (folder / "3.jpg").write_text("no picture")
    out = folder / "deep" / "out"
    result = run(folder, "-o", out, "--style", "a.pth", "--batch", 2, "--strength", 0.5)
    assert result.exit_code == 1
    assert "3 of 4 files written" in result.output and "was the limit" in result.output
    assert f"left out, not a picture by its name: {folder / 'notes.txt'}" in result.output
    assert f"error: {folder / '3.jpg'} is no picture of a kind that can be read" in result.output
    assert sorted(path.name for path in out.iterdir()) == ["0.png", "1.png", "2.png"]
    ((styles, weights, keys),) = negative
    assert [path.name for path in styles] == ["a.pth"] and weights == [1.0]
    assert keys["strength"] == 0.5 and keys["dtype"] == "float32"
    # Nothing is overwritten, unless that is asked for.
    result = run(folder, "-o", out, "--style", "a.pth")
    assert result.exit_code == 1 and "exists already; give --force" in str(result.exception)
    (folder / "3.jpg").unlink()
    assert run(folder, "-o", out, "--style", "a.pth", "--force").exit_code == 0


def test_a_blend_of_styles(negative, folder):
    blend = "a.pth=0.25,dir/b=c.pth=0.75"
    result = run(folder / "0.png", "-o", folder / "x.png", "--blend", blend, "--smooth")
    assert result.exit_code == 0, result.output
    styles, weights, _ = negative[0]
    assert list(map(str, styles)) == ["a.pth", "dir/b=c.pth"] and weights == [0.25, 0.75]
    # Shares of their sum, which one network's weights need; a file may come twice.
    run(folder / "0.png", "-o", folder / "y.png", "--blend", "a=1,b=2,a=1")
    assert negative[1][:2] == ([Path("a"), Path("b")], [0.5, 0.5])
    assert np.asarray(Image.open(folder / "x.png")).min() == 255


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--style", "a", "--blend", "b=1"), "for several, and not both"),
        (("--blend", "b=x"), "--blend has 'b=x', expected FILE=WEIGHT"),
        (("--blend", "=1"), "--blend has '=1', expected FILE=WEIGHT"),
        (("--blend", "a=nan"), "--blend has 'a=nan', expected FILE=WEIGHT"),
        (("--blend", "a=1,b=-1"), "--blend has weights that add up to 0.0, expected more than 0"),
        (("--style", "a", "--strength", "inf"), "--strength is inf, expected a number"),
        (("--style", "a", "--smooth", "--tile", 64), "--tile does not go with --smooth"),
        (("--style", "a", "--tile", 66), "--tile is 66, expected a multiple of 4"),
        (("--style", "a", "--dtype", "int8"), "--dtype is int8, expected one of: float32"),
    ],
)
def test_wrong_options(negative, folder, arguments, message):
    result = run(folder / "0.png", "-o", folder / "x.png", *arguments)
    assert result.exit_code == 1 and message in str(result.exception)
    assert not (folder / "x.png").exists()


def test_wrong_files(negative, folder):
    style = ("--style", "a.pth")
    other = folder / "other"
    other.mkdir()
    result = run(other, "-o", folder / "out", *style)
    assert f"no pictures in {other}" in str(result.exception)
    result = run(folder / "none.png", "-o", folder / "x.png", *style)
    assert isinstance(result.exception, FileNotFoundError)
    result = run(folder, "-o", folder / "0.png", *style)
    assert "0.png is a file, expected a folder for 3 files" in str(result.exception)
    Image.new("RGB", (8, 6)).save(other / "0.png")
    result = run(folder, other, "-o", folder / "out", *style)
    assert "would both become" in str(result.exception)
    result = run(folder / "0.png", "-o", folder / "x.psd", *style)
    assert "the ending is '.psd', expected one of" in str(result.exception)
    assert not (folder / "out").exists()
    result = run(folder / "0.png", "-o", folder / "none" / "x.png", *style)
    assert isinstance(result.exception, FileNotFoundError) and "no folder" in str(result.exception)


def test_links_and_folders_in_a_folder(negative, folder):
    (folder / "sub.png").mkdir()
    (folder / "link.png").symlink_to(folder / "0.png")
    (folder / "lost.png").symlink_to(folder / "none.png")
    result = run(folder, "-o", folder / "out", "--style", "a")
    assert result.exit_code == 1 and "4 of 5 files written" in result.output
    assert f"left out, a folder inside: {folder / 'sub.png'}" in result.output
    assert "lost.png" in result.output


def test_files_are_replaced_in_their_place(negative, folder):
    assert run(folder, "-o", folder, "--style", "a", "--force").exit_code == 0
    assert [np.asarray(Image.open(folder / f"{i}.png"))[0, 0, 0] for i in range(3)] == [
        255,
        254,
        253,
    ]
    assert len(list(folder.iterdir())) == 3


def test_an_interruption_says_what_is_done(negative, folder, monkeypatch):
    from flash_wtconv_jax.stylize import pipeline

    def interrupted(jobs, network, settings, on_done):
        on_done()
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", interrupted)
    result = run(folder, "-o", folder / "out", "--style", "a.pth")
    assert result.exit_code == 130
    assert "error: interrupted; 1 of 3 files are done" in result.output
