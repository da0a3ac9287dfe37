"""The PyTorch layers: state dict, arguments, and what they say of bad ones."""

import subprocess
import sys

import numpy as np
import pytest
import pywt

torch = pytest.importorskip("torch")

import torch_bridge  # noqa: E402
from torch_bridge.runtime.device import best_device  # noqa: E402
from torch_bridge.wtconv import eager  # noqa: E402


def test_state_dict_is_that_of_the_published_layer():
    layer = torch_bridge.WTConv2d(8, 8, wt_levels=2, stride=2)
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    assert shapes == {
        "wt_filter": (32, 1, 2, 2),
        "iwt_filter": (32, 1, 2, 2),
        "base_conv.weight": (8, 1, 5, 5),
        "base_conv.bias": (8,),
        "base_scale.weight": (1, 8, 1, 1),
        "wavelet_convs.0.weight": (32, 1, 5, 5),
        "wavelet_convs.1.weight": (32, 1, 5, 5),
        "wavelet_scale.0.weight": (1, 32, 1, 1),
        "wavelet_scale.1.weight": (1, 32, 1, 1),
    }
    frozen = {name for name, p in layer.named_parameters() if not p.requires_grad}
    assert frozen == {"wt_filter", "iwt_filter"}


def test_published_layers_with_a_stride_load():
    layer = torch_bridge.WTConv2d(2, 2, stride=2)
    state_dict = {**layer.state_dict(), "stride_filter": torch.ones(2, 1, 1, 1)}
    layer.load_state_dict(state_dict)
    assert "stride_filter" in state_dict


def test_initial_values():
    torch.manual_seed(0)
    layer = torch_bridge.WTConv2d(16, 16, kernel_size=3)
    for weights in (layer.base_conv.weight, layer.base_conv.bias, layer.wavelet_convs[0].weight):
        assert weights.abs().max() <= 1 / 3
        assert weights.abs().max() > 0.25
    assert torch.all(layer.base_scale.weight == 1)
    assert torch.all(layer.wavelet_scale[0].weight == 0.1)


def test_haar_filters_are_the_published_ones():
    analysis, synthesis = eager.wavelet_filters("db1", 2, 3, dtype=torch.float32)
    half = np.float32(0.49999997)
    signs = [[[1, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]]
    reference = np.tile(half * np.array(signs, np.float32)[:, None], (3, 1, 1, 1))
    np.testing.assert_array_equal(analysis.numpy(), reference)
    np.testing.assert_array_equal(synthesis.numpy(), reference)


def test_filters_of_longer_wavelets():
    # As the published code writes them: row axis first, analysis reversed, synthesis not.
    analysis, synthesis = eager.wavelet_filters("sym4", 2, 1, dtype=torch.float64)
    bank = pywt.Wavelet("sym4")
    lo, hi = np.array(bank.dec_lo)[::-1], np.array(bank.dec_hi)[::-1]
    np.testing.assert_array_equal(analysis[1, 0], np.outer(hi, lo))
    np.testing.assert_array_equal(analysis[2, 0], np.outer(lo, hi))
    np.testing.assert_array_equal(synthesis[1, 0], np.outer(bank.rec_hi, bank.rec_lo))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "in_channels is 0, expected an integer >= 1"),
        ({"out_channels": 5}, "out_channels is 5, expected in_channels = 4"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"kernel_size": 0}, "kernel_size is 0"),
        ({"kernel_size": (3, 5)}, r"kernel_size is \(3, 5\)"),
        ({"kernel_size": (3, 3, 3)}, r"kernel_size is \(3, 3, 3\)"),
        ({"stride": 0}, "stride is 0"),
        ({"wt_levels": -1}, "wt_levels is -1"),
        ({"wt_levels": 1.0}, "wt_levels is 1.0"),
        ({"wt_levels": 10**9}, "wt_levels is 1000000000, expected an integer <= 63"),
        ({"kernel_size": 2**31}, "kernel_size is 2147483648, expected an integer <= 2147483647"),
        ({"stride": True}, "stride is True"),
        ({"wt_type": "morl"}, "wt_type: wavelet='morl' is not a discrete wavelet"),
        ({"dtype": torch.int32}, "dtype is torch.int32, expected None or one of"),
        ({"dtype": torch.float8_e4m3fn}, "dtype is torch.float8_e4m3fn, expected None or one of"),
        ({"dtype": "float32"}, "dtype is 'float32', expected None or one of"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        torch_bridge.WTConv2d(**{"in_channels": 4, "out_channels": 4, **arguments})


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (4, 8, 8), (1, 4, 8)])
def test_bad_input(shape):
    layer = torch_bridge.WTConv2d(4, 4, device="cpu")
    with pytest.raises(ValueError, match=r"x has shape .*expected \(N, C, H, W\) with C = 4"):
        layer(torch.zeros(shape))


def test_import_is_lazy():
    script = "import sys, torch_bridge; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert "WTConv2d" in dir(torch_bridge)
    with pytest.raises(AttributeError, match="nothing"):
        torch_bridge.nothing  # noqa: B018


def test_numpy_integers_are_integers():
    layer = torch_bridge.WTConv2d(np.int64(2), np.int64(2), stride=np.int32(2), device="cpu")
    assert layer(torch.zeros(1, 2, 5, 4)).shape == (1, 2, 3, 2)


@pytest.mark.parametrize("kernel_size", [(3, 3), [3, 3], torch.Size([3, 3])], ids=str)
def test_arguments_as_the_published_layer_takes_them(kernel_size):
    layer = torch_bridge.WTConv2d(2, 2, kernel_size, wt_type="DB2", device="cpu")
    same = torch_bridge.WTConv2d(2, 2, 3, wt_type="db2", device="cpu")
    assert (layer.kernel_size, layer.wt_type) == (3, "db2")
    same.load_state_dict(layer.state_dict())
    x = torch.ones(1, 2, 5, 4)
    assert torch.equal(layer(x), same(x))
    assert torch.equal(layer.base_scale(x), layer.base_scale.weight * x)


# PyTorch warns that all of its eager quantisation will go.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per:UserWarning")
def test_eager_quantisation_leaves_it_in_floating_point():
    quantization = torch.ao.quantization
    model = torch.nn.Sequential(torch_bridge.WTConv2d(2, 2, 3, device="cpu")).eval()
    model.qconfig = quantization.default_qconfig
    model = quantization.convert(quantization.prepare(model))
    x = torch.ones(1, 2, 4, 4)
    assert model(x).dtype == torch.float32
    with pytest.raises(ValueError, match="x is quantised, torch.quint8, .* put a DeQuantStub"):
        model(torch.quantize_per_tensor(x, 0.1, 0, torch.quint8))


def test_inputs_that_are_no_image_are_named():
    with pytest.raises(ValueError, match="x is of type ndarray, expected a tensor"):
        torch_bridge.WTConv2d(3, 3)(np.zeros((1, 3, 8, 8), np.float32))
    with pytest.raises(ValueError, match=r"x has shape \(1, 3, 0, 8\), expected at least one"):
        torch_bridge.WTConv2d(3, 3, device="cpu")(torch.zeros(1, 3, 0, 8))


def test_wrong_dtypes_and_short_signals_are_named():
    for autocast in (False, True):
        with (
            torch.autocast("cpu", enabled=autocast),
            pytest.raises(ValueError, match="x is of torch.int64, expected torch.float32"),
        ):
            torch_bridge.WTConv2d(3, 3, device="cpu")(torch.zeros(1, 3, 8, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="stride is 3 and averages groups of 3 samples, but x has"):
        torch_bridge.WTConv1d(3, 3, stride=3, device="cpu")(torch.zeros(1, 3, 2))


def test_a_device_is_found_and_told(monkeypatch):
    assert torch_bridge.WTConv2d(2, 2, device="meta").device == torch.device("meta")
    with torch.device("meta"):
        assert torch_bridge.WTConv2d(2, 2).device == torch.device("meta")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert best_device() == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert best_device() == torch.device("cuda")
    with torch.device("cpu"):
        assert best_device() == torch.device("cpu")
    torch.set_default_device("cpu")
    try:
        assert best_device() == torch.device("cpu")
    finally:
        torch.set_default_device(None)
    with pytest.raises(ValueError, match="x is on cpu, expected meta, where the layer is: move it"):
        torch_bridge.WTConv2d(2, 2, device="meta")(torch.zeros(1, 2, 4, 4))


def test_a_rank_has_its_own_gpu(monkeypatch, process_group):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for current, rank, want in ((0, "3", 3), (2, "3", 2), (0, "5", 1), (0, None, 0)):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        if rank:
            monkeypatch.setenv("LOCAL_RANK", rank)
        assert best_device() == torch.device("cuda", want)
    monkeypatch.setattr(torch.distributed.group.WORLD, "bound_device_id", torch.device("cuda:1"))
    assert best_device() == torch.device("cuda:1")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_strided_outputs_are_dense(memory_format):
    layer = torch_bridge.WTConv2d(3, 3, stride=2, device="cpu")
    x = torch.zeros(2, 3, 7, 6).contiguous(memory_format=memory_format)
    y = layer(x)
    assert y.shape == (2, 3, 4, 3) and y.is_contiguous(memory_format=memory_format)
    assert y.untyped_storage().nbytes() == 4 * y.numel()
    x.requires_grad_()
    (dx,) = torch.autograd.grad(eager.subsample(x, 2), x, y)
    assert dx.is_contiguous(memory_format=memory_format)


FAST = {
    "base_weight": "base_conv.weight",
    "base_bias": "base_conv.bias",
    "base_scale": "base_scale.weight",
    "wt_weights.0": "wavelet_convs.0.weight",
    "wt_scales.0": "wavelet_scale.0.weight",
}


def test_the_fast_variant_s_names_load_inside_a_model():
    source, target = (
        torch.nn.Sequential(torch_bridge.WTConv2d(2, 2, 3, device="cpu")) for _ in range(2)
    )
    values = source.state_dict()
    fast = {f"0.{name}": values[f"0.{theirs}"] for name, theirs in FAST.items()}
    target.load_state_dict(fast)
    assert all(map(torch.equal, target.state_dict().values(), values.values()))
    assert set(fast) == {f"0.{name}" for name in FAST}
    del fast["0.wt_scales.0"], fast["0.base_bias"]
    with pytest.raises(RuntimeError) as error:
        target.load_state_dict(fast | {"0.wt_weights.1": torch.zeros(8, 1, 3, 3)})
    for name in ("base_conv.bias", "wavelet_scale.0.weight", "wavelet_convs.1.weight"):
        assert f"0.{name}" in str(error.value)


def test_all_that_does_not_fit_is_told_at_once():
    layer, same, other, longer = (
        torch_bridge.WTConv2d(2, 2, wt_type=name, device="cpu")
        for name in ("db3", "sym3", "coif1", "db4")
    )
    layer.load_state_dict(same.state_dict())
    values = other.state_dict() | {"iwt_filter": longer.iwt_filter}
    del values["base_conv.bias"]
    with pytest.raises(RuntimeError) as error:
        layer.load_state_dict(values)
    assert "wt_filter is not that of wt_type='db3'" in str(error.value)
    assert "size mismatch for iwt_filter" in str(error.value)
    assert 'Missing key(s) in state_dict: "base_conv.bias"' in str(error.value)
    with pytest.raises(RuntimeError) as error:
        layer.load_state_dict({name: value.numpy() for name, value in layer.state_dict().items()})
    assert all(f'named "{name}", expected torch.Tensor' in str(error.value) for name in values)
