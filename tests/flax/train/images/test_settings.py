"""Settings: what a TOML file may say, what is resolved, and what is refused."""

import math
import tomllib
from pathlib import Path

import jax
import pytest
from flax import nnx

from flash_wtconv_jax import models
from flash_wtconv_jax.train.images import settings

BAD = {
    "unknown": ({"run": {"epoch": 3}}, r"run\.epoch is unknown; did you mean run\.epochs\?"),
    "of another section": ({"rate": 1e-3}, r"rate is unknown; did you mean optimizer\.rate\?"),
    "nothing near": ({"run": {"zzz": 3}}, "run.zzz is unknown; expected one of epochs, batch"),
    "type": ({"run": {"epochs": "3"}}, r"run\.epochs is '3', expected an integer"),
    "no bool": ({"run": {"epochs": True}}, r"run\.epochs is True, expected an integer"),
    "section": ({"run": 3}, r"run is 3, expected a table, \[run\]"),
    "list": ({"data": {"scale": [0.1]}}, r"data\.scale is \[0.1\], expected a list of 2 values"),
    "entry": ({"data": {"mean": ["a"]}}, r"data\.mean\[0\] is 'a', expected a number"),
    "nan": ({"optimizer": {"rate": float("nan")}}, "rate is nan, expected a finite number"),
    "recipe": ({"recipe": "best"}, "recipe is 'best', expected one of plain, convnext_tiny"),
    "least": ({"run": {"batch": 0}}, r"run\.batch is 0, expected 1 or more"),
    "share": ({"augment": {"flip": 2}}, r"augment\.flip is 2\.0, expected a number from 0 to 1"),
    "parts": ({"run": {"batch": 6, "accumulate": 4}}, r"does not divide run\.batch, 6"),
    "axis": ({"run": {"mesh": {"rows": 2}}}, "run.mesh has the axis 'rows', expected data, fsdp"),
    "channels": ({"data": {"channels": 1}}, r"data\.mean has 3 values, expected one for each"),
    "seed": ({"run": {"seed": 2**70}}, "seed=.*: expected an integer"),
    "scale": ({"data": {"scale": [0.5, 0.1]}}, r"data\.scale is \(0.5, 0.1\), expected a least"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_no_training_can_be_run_with_is_refused(case):
    said, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        settings.resolved(said)


@pytest.mark.parametrize("recipe", settings.RECIPES)
def test_resolved_settings_are_written_and_read_back(recipe):
    said = {
        "recipe": recipe,
        "model": {"options": {"dims": [8, 16], "wavelet": 'a"b\\', "use_grn": True}},
        "run": {"mesh": {"data": 2, "fsdp": 1}},
    }
    resolved = settings.resolved(said)
    assert settings.resolved(tomllib.loads(settings.as_toml(resolved))) == resolved


def test_later_layers_come_first_and_a_recipe_last():
    resolved = settings.resolved(
        {"recipe": "convnext_tiny", "run": {"batch": 64, "seed": 1}}, {"run": {"batch": 32}}
    )
    assert (resolved.run.batch, resolved.run.seed, resolved.run.epochs) == (32, 1, 300)
    assert resolved.model.options == {"drop_path": 0.1, "dtype": "bfloat16"}


def test_the_settings_of_the_docs_are_of_the_network_they_tell_of():
    path = Path(__file__).parents[4] / "docs" / "mnist.toml"
    said = settings.resolved(settings.read(path), {"data": {"folder": "mnist"}})
    config = models.ConvNeXtConfig(**said.model.options, num_classes=10, in_channels=1)
    model = nnx.eval_shape(lambda: models.ConvNeXt(config, rngs=nnx.Rngs(0)))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert f"The network has {count:,} parameters." in path.read_text()


def test_a_file_that_is_no_toml_is_named(tmp_path):
    (tmp_path / "a.toml").write_text("run = [")
    with pytest.raises(ValueError, match=r"a\.toml is no TOML: Invalid value"):
        settings.read(tmp_path / "a.toml")
    with pytest.raises(FileNotFoundError, match=r"no file .*b\.toml, expected settings in TOML"):
        settings.read(tmp_path / "b.toml")
