"""WTConv in place of the depthwise convolutions of a PyTorch model."""

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from torch_bridge import WTConv1d, WTConv2d, replace_depthwise  # noqa: E402

RANDOM = torch.Generator().manual_seed(0)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize(
    ("make", "shape", "options"),
    [
        (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 9, 8), {}),
        (lambda: nn.Conv2d(4, 4, 3, 2, padding=1, groups=4), (2, 4, 9, 8), {"kernel_size": 7}),
        (lambda: nn.Conv2d(4, 4, 4, padding="same", groups=4), (1, 4, 9, 8), {"kernel_size": 7}),
        (lambda: nn.Conv1d(4, 4, 5, padding=2, groups=4, bias=False), (2, 4, 21), {}),
        (lambda: nn.Conv3d(2, 2, 3, padding=1, groups=2), (1, 2, 5, 4, 6), {"wt_type": "db2"}),
    ],
)
def test_with_scales_of_zero_nothing_changes(make, shape, options):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Identity(), make()), torch.randn(shape, generator=RANDOM)
    conv, before = model[1], model(x)
    assert replace_depthwise(model, wt_levels=2, scale=0, **options) == ["1"]
    torch.testing.assert_close(model(x), before)
    assert model[1].base_conv.bias is conv.bias
    if not options.get("kernel_size"):
        assert model[1].base_conv.weight is conv.weight
    model[1].wavelet_scale[0].weight.data.fill_(0.5)
    assert (model(x) - before).abs().max() > 1e-3


def test_a_shared_convolution_stays_shared_and_others_stay():
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=4).double().requires_grad_(False).eval()
    model = nn.ModuleDict({"a": conv, "b": nn.Sequential(conv), "c": nn.Conv2d(4, 8, 1)})
    assert replace_depthwise(model, wt_levels=1) == ["a", "b.0"]
    layer = model["a"]
    assert type(layer) is WTConv2d and layer is model["b"][0] and type(model["c"]) is nn.Conv2d
    assert layer.wavelet_scale[0].weight.dtype == torch.float64 and not layer.training
    assert not layer.base_conv.weight.requires_grad
    assert float(layer.wavelet_scale[0].weight.detach().mean()) == pytest.approx(0.1)


def test_where_chooses():
    model = nn.Sequential(*(nn.Conv1d(2, 2, 3, padding=1, groups=2) for _ in range(3)))
    assert replace_depthwise(model, wt_levels=1, where=lambda name, conv: name != "1") == ["0", "2"]
    assert [type(one) for one in model] == [WTConv1d, nn.Conv1d, WTConv1d]
    with pytest.raises(ValueError, match="where refused all 1"):
        replace_depthwise(model, wt_levels=1, where=lambda name, conv: False)


@pytest.mark.parametrize(
    ("conv", "reason"),
    [
        (nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4), "it is dilated"),
        (nn.Conv2d(4, 4, 3, groups=4), r"its padding is \(0, 0\), not that of 'same'"),
        (nn.Conv2d(4, 4, (3, 5), padding="same", groups=4), r"its kernel \(3, 5\) is not square"),
        (nn.Conv2d(4, 8, 3, padding=1, groups=4), "it makes 8 features of 4 channels"),
        (nn.Conv1d(4, 4, 3, 2, padding=1, groups=4), "it has stride 2, and a strided WTConv1d"),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"), "its padding_mode is"),
        (nn.Conv2d(4, 4, 4, padding=2, groups=4), r"its padding is \(2, 2\)"),
    ],
)
def test_what_cannot_be_replaced_is_named_and_nothing_changes(conv, reason):
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), conv)
    with pytest.raises(ValueError, match=f"1: {reason}"):
        replace_depthwise(model, wt_levels=1)
    assert type(model[0]) is nn.Conv2d and model[1] is conv


def test_nothing_to_replace_is_an_error():
    with pytest.raises(ValueError, match="no depthwise convolution to replace: no convolution"):
        replace_depthwise(nn.Sequential(nn.Conv2d(3, 3, 1)), wt_levels=1)
    with pytest.raises(ValueError, match="model is a Conv2d, expected a model that contains"):
        replace_depthwise(nn.Conv2d(4, 4, 3, padding=1, groups=4), wt_levels=1)
