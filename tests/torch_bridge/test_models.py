"""WTConvNeXt in PyTorch: its state dict, timm, and that JAX computes the same."""

import sys
from types import ModuleType

import pytest
import typer
from typer.testing import CliRunner

from flash_wtconv_jax import checkpoints

torch = pytest.importorskip("torch")

from torch_bridge import compare, models  # noqa: E402

SMALL = {"num_classes": 7, "depths": (1, 2), "dims": (4, 8), "device": "cpu", "ls_init_value": 1.0}


def network(**options):
    torch.manual_seed(0)
    return models.WTConvNeXt(**{**SMALL, "wt_levels": (2, 1), "kernel_size": 3, **options})


def test_the_state_dict_of_the_tiny_one_is_the_published_one():
    published = {
        name: tuple(one.shape)
        for name, one in models.wtconvnext_tiny(device="meta").state_dict().items()
    }
    found = checkpoints.recognise(
        {name: torch.empty(shape) for name, shape in published.items() if "filter" in name}
        | network().state_dict()
    )
    assert found.layout == "wtconvnext"
    assert published["stages.2.blocks.8.conv_dw.wavelet_convs.2.weight"] == (1536, 1, 5, 5)
    assert published["stages.3.downsample.1.weight"] == (768, 384, 2, 2)
    assert published["head.fc.weight"] == (1000, 768)


@pytest.mark.parametrize("levels", [(2, 1), None])
def test_jax_computes_the_same_from_a_file(levels, tmp_path):
    model = network(wt_levels=levels)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    app = typer.Typer()
    app.command()(compare.compare)
    result = CliRunner().invoke(app, [str(tmp_path / "model.pth"), "--images", "1", "--size", "32"])
    assert result.exit_code == 0, result.output
    assert "parameters, 1 images of 32 x 32: logits differ by" in " ".join(result.output.split())


def test_other_weights_are_seen(tmp_path, monkeypatch):
    torch.save(network().state_dict(), tmp_path / "model.pth")
    monkeypatch.setattr(models.nn.functional, "gelu", torch.relu)
    assert compare.compared(tmp_path / "model.pth", 32, 1)["error"] > 1e-2


def test_stochastic_depth_drops_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    block = network(drop_path_rate=0.5, depths=(1,), dims=(4,), wt_levels=(0,)).stages[0].blocks[0]
    block.drop_path = 0.5
    x = torch.ones(512, 4, 2, 2)
    branch = block.eval()(x) - x
    found = block.train()(x) - x
    kept = found.flatten(1).abs().sum(1) > 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(found[kept], 2 * branch[kept])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1,)}, r"depths=\(1,\), dims=\(4, 8\) and wt_levels=\(2, 1\) must have one"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate is 1.0, expected a number in \[0, 1\)"),
    ],
)
def test_wrong_arguments_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        network(**options)


def test_timm_is_told_the_names(monkeypatch):
    told = {}
    timm = ModuleType("timm.models")
    timm.register_model = lambda make: told.update({make.__name__: make})
    monkeypatch.setitem(sys.modules, "timm", ModuleType("timm"))
    monkeypatch.setitem(sys.modules, "timm.models", timm)
    models._registered()
    assert set(told) == {"wtconvnext_tiny", "wtconvnext_small", "wtconvnext_base"}
    make = told["wtconvnext_tiny"]
    assert make.__module__ == "torch_bridge.models"
    # What timm gives beside a user's options.
    model = make(pretrained=False, pretrained_cfg=None, cache_dir=None, device="meta", in_chans=1)
    assert model.stem[0].in_channels == 1
    with pytest.raises(ValueError, match="wtconvnext_tiny has no weights to download"):
        make(pretrained=True)
