"""Things that sit on the layer's submodules: hooks, parametrizations, wrappers, other arguments."""

import functools

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.nn.utils import parametrizations, prune  # noqa: E402

import torch_bridge  # noqa: E402
from torch_bridge.wtconv import layers, ops  # noqa: E402

pytestmark = pytest.mark.usefixtures("many_compilations")


class Adapted(nn.Module):
    """A convolution with a low-rank update beside it, as adapters wrap one."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        self.gain = nn.Parameter(torch.tensor([[[2.0]], [[3.0]]], dtype=torch.float64))

    def forward(self, x):
        return self.conv(x) + self.gain * x


def with_adapter(layer):
    layer.base_conv = Adapted(layer.base_conv)


def with_pruning(layer):
    prune.l1_unstructured(layer.base_conv, "weight", 0.5)


def with_spectral_norm(layer):
    parametrizations.spectral_norm(layer.wavelet_convs[0])


def with_parametrized_scale(layer):
    nn.utils.parametrize.register_parametrization(layer.wavelet_scale[0], "weight", nn.Softplus())


def with_hook(layer):
    layer.base_conv.register_forward_hook(lambda module, inputs, y: y.exp())


def with_pre_hook(layer):
    layer.wavelet_convs[0].register_forward_pre_hook(lambda module, inputs: inputs[0].sin())


def with_replaced_forward(layer):
    conv = layer.base_conv
    conv.forward = functools.partial(lambda forward, x: 2 * forward(x), conv.forward)


def with_other_padding(layer):
    layer.base_conv.padding_mode = "circular"


def with_other_kernels(layer):
    layer.base_conv = nn.Conv2d(2, 2, 5, padding=2, dtype=torch.float64)


def with_bias(layer):
    layer.wavelet_convs[0].bias = nn.Parameter(torch.ones(8, dtype=torch.float64))


WAYS = [value for name, value in list(globals().items()) if name.startswith("with_")]


HAAR = [[[1, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]]


def published(layer, x):
    """The published layer's output for an even image, by calls of a layer's submodules."""
    filters = torch.tensor(HAAR, dtype=x.dtype).repeat(2, 1, 1)[:, None] / 2
    bands = functional.conv2d(x, filters, stride=2, groups=2)
    bands = layer.wavelet_scale[0](layer.wavelet_convs[0](bands))
    deep = functional.conv_transpose2d(bands, filters, stride=2, groups=2)
    return layer.base_scale(layer.base_conv(x)) + deep


def made(way):
    torch.manual_seed(0)
    layer = torch_bridge.WTConv2d(2, 2, 3, dtype=torch.float64, device="cpu").eval()
    nn.init.normal_(layer.wavelet_scale[0].weight)
    way(layer)
    return layer


def two_steps(call, layer):
    """Outputs and gradients of two steps, the second of which needs a second backward pass."""
    x = torch.linspace(-1, 1, 48, dtype=torch.float64).sin().reshape(1, 2, 4, 6).requires_grad_()
    learned = [p for p in layer.parameters() if p.requires_grad]
    found = []
    for _ in range(2):
        y = call(x)
        gradients = torch.autograd.grad(y.sin().sum(), [x, *learned])
        found += [y, *gradients]
        with torch.no_grad():
            for parameter, gradient in zip(learned, gradients[1:], strict=True):
                parameter -= 0.1 * gradient
    return found


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.removeprefix("with_"))
def test_what_sits_on_a_submodule_acts_and_learns(way, monkeypatch):
    ours, theirs = made(way), made(way)
    monkeypatch.setattr(ops, "pick", lambda *_: ("triton columns=2", "eager"))
    layers._WARNED.clear()
    with pytest.warns(RuntimeWarning, match="WTConv2d has .* which triton would ignore") as said:
        got = two_steps(ours, ours)
    want = two_steps(functools.partial(published, theirs), theirs)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
    assert len(said) == 1


def test_sharded_submodules_gather_their_own_weights(process_group):
    from torch.distributed.fsdp import fully_shard

    def shard(layer):
        fully_shard(layer.base_conv)
        fully_shard(layer.wavelet_convs[0])

    layer, whole = made(shard), made(lambda layer: None)
    x = torch.ones(1, 2, 4, 6, dtype=torch.float64)
    y, want = layer(x), whole(x)
    torch.testing.assert_close(y, want)
    y.sin().sum().backward()
    want.sin().sum().backward()
    got = layer.base_conv.weight.grad.full_tensor()
    torch.testing.assert_close(got, whole.base_conv.weight.grad)


def test_hooks_of_a_backward_pass_fire():
    seen = []
    layer = made(lambda layer: None)
    layer.base_conv.register_full_backward_hook(lambda *_: seen.append("backward"))
    layer.base_scale.register_full_backward_pre_hook(lambda *_: seen.append("before"))
    layer(torch.ones(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert seen == ["before", "backward"]


@pytest.mark.wide
@pytest.mark.parametrize(
    "way",
    [pytest.param(with_parametrized_scale, marks=pytest.mark.slow), with_pre_hook],
    ids=lambda way: way.__name__,
)
def test_it_acts_in_a_compiled_program_and_in_autocast(way):
    layer, x = made(way).float(), torch.ones(1, 2, 4, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.02, atol=0.05)
