"""Whole networks to folders and back, and out of checkpoints that no `network.json` explains."""

import json

import jax
import numpy as np
import orbax.checkpoint
import pytest
from flax import nnx
from typer.testing import CliRunner

from flash_wtconv_jax import checkpoints, cli, models
from flash_wtconv_jax.models import pretrained


def filled(make):
    """A model of random values, which nothing is compiled for."""
    model, rng = nnx.eval_shape(make), np.random.default_rng(0)
    params = nnx.state(model, nnx.Param)
    draw = lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype)  # noqa: E731
    nnx.update(model, jax.tree.map(draw, params))
    return model


def test_a_saved_network_comes_back_with_its_options(tmp_path):
    config = models.ConvNeXtConfig(
        depths=(1, 1),
        dims=(4, 8),
        levels=None,
        use_grn=True,
        drop_path=0.1,
        param_dtype=jax.numpy.bfloat16,
        remat=True,
        conv_implementation="xla",
    )
    model = filled(lambda: models.ConvNeXt(config, rngs=nnx.Rngs(1)))
    models.save_network(tmp_path / "network", model)
    restored = models.load_network(tmp_path / "network")
    # How a network is computed is no part of what it is.
    assert restored.config.remat is False and restored.config.conv_implementation is None
    assert restored.config.param_dtype == "bfloat16"
    before, after = checkpoints.variables_of(model), checkpoints.variables_of(restored)
    jax.tree.map(np.testing.assert_array_equal, before, after)
    with pytest.raises(FileExistsError):
        models.save_network(tmp_path / "network", model)


def test_a_converted_checkpoint_needs_the_name_of_its_model_alone(tmp_path):
    options = {"depths": [1, 1, 1, 1], "dims": [4] * 4, "levels": [1] * 4, "num_classes": 2}
    model = filled(lambda: models.wtconvnext_tiny(**options, rngs=nnx.Rngs(0)))
    checkpoints.save(tmp_path / "network", checkpoints.variables_of(model))
    config = {"model": "wtconvnext_tiny", "options": options}
    (tmp_path / "network" / pretrained.CONFIG_NAME).write_text(json.dumps(config))
    assert models.load_network(tmp_path / "network").config == model.config


def test_the_wavelet_of_a_network_is_the_one_that_its_folder_names(tmp_path):
    options = {"depths": [1], "dims": [4], "levels": [1], "num_classes": 2}
    config = models.ConvNeXtConfig(**options, wavelet="db2")
    model = filled(lambda: models.ConvNeXt(config, rngs=nnx.Rngs(0)))
    folder = tmp_path / "network"
    checkpoints.save(folder, checkpoints.variables_of(model), wavelet="db2")
    network = folder / pretrained.CONFIG_NAME
    network.write_text(json.dumps({"model": "ConvNeXt", "options": options}))
    assert models.load_network(folder).config == config
    network.write_text(json.dumps({"model": "ConvNeXt", "options": {**options, "wavelet": "haar"}}))
    with pytest.raises(ValueError, match=r"wavelet is 'haar', but .*network names 'db2'"):
        models.load_network(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no whole WTConvNeXt or ConvNeXt.*it holds \\['kernel'\\]"),
        ("{", "is no JSON"),
        ("[]", "must hold"),
        ('{"model": "resnet"}', "names the model 'resnet', expected one of"),
        ('{"model": ["ConvNeXt"]}', r"names the model \['ConvNeXt'\]"),
        ('{"model": "ConvNeXt", "options": {"width": 3}}', r"options \['width'\]"),
        (
            '{"model": "ConvNeXt", "options": {"dims": [0, 1, 1, 1]}}',
            "each entry of dims=.* must be an integer >= 1",
        ),
        (
            '{"model": "ConvNeXt", "options": {"dims": 5}}',
            "dims must hold one int for each stage, got 5",
        ),
        ('{"model": "ConvNeXt"}', "variables do not fit ConvNeXt"),
        ("[" * 100_000, "network.json is no JSON: maximum recursion depth exceeded"),
    ],
)
def test_what_is_wrong_with_a_network_json_is_said(tmp_path, content, message):
    folder = tmp_path / "network"
    checkpoints.save(folder, {"params": {"kernel": np.ones(3)}})
    if content is not None:
        (folder / pretrained.CONFIG_NAME).write_text(content)
    with pytest.raises(ValueError, match=message):
        models.load_network(folder)


@pytest.mark.parametrize("tree", [[np.ones(3)], {"params": np.ones(3)}])
def test_a_folder_of_unnamed_arrays_is_one_line(tmp_path, tree):
    with orbax.checkpoint.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "a", tree)
    with pytest.raises(ValueError, match="holds a list|holds no whole WTConvNeXt"):
        models.load_network(tmp_path / "a")
    result = CliRunner().invoke(cli.app, ["convert", str(tmp_path / "a"), str(tmp_path / "b")])
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert "expected a nested dict of arrays" in result.stderr


SMALL = {"depths": (1, 2), "dims": (4, 8), "num_classes": 3}


@pytest.mark.parametrize(
    "options",
    [
        SMALL | {"levels": (2, 0), "kernel_size": 3, "wavelet": "db2"},
        pytest.param(
            SMALL | {"levels": None, "use_grn": True, "layer_scale": None, "in_channels": 1},
            marks=pytest.mark.wide,
        ),
        pytest.param(
            SMALL | {"levels": (1, 1), "patch_size": 2, "num_classes": 0}, marks=pytest.mark.wide
        ),
        SMALL
        | {"levels": None, "kernel_size": (3, 5), "stem_type": "overlap_act", "conv_bias": False}
        | {"head_hidden_size": 7, "first_downsample": True},
        pytest.param(
            SMALL | {"stem_type": "overlap_tiered", "head_norm_first": True, "levels": (1, 1)},
            marks=pytest.mark.wide,
        ),
        pytest.param(
            {"depths": (1, 2), "dims": (4, 8), "levels": (1, 1), "num_classes": 0}
            | {"features_only": True, "feature_norms": True, "stem_type": "overlap"},
            marks=pytest.mark.wide,
        ),
    ],
    ids=str,
)
def test_a_checkpoint_alone_tells_its_network(tmp_path, options):
    config = models.ConvNeXtConfig(**options)
    model = filled(lambda: models.ConvNeXt(config, rngs=nnx.Rngs(0)))
    variables = checkpoints.variables_of(model)
    state_dict = checkpoints.to_torch(variables, wavelet=config.wavelet)
    checkpoints.write_state_dict(tmp_path / "network.safetensors", state_dict)
    checkpoints.save(tmp_path / "network", variables, wavelet=config.wavelet)
    for name in ("network.safetensors", "network"):
        restored = models.load_network(tmp_path / name)
        assert restored.config == config
        jax.tree.map(np.testing.assert_array_equal, variables, checkpoints.variables_of(restored))
