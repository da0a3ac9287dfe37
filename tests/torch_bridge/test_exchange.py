"""Weights and arrays between JAX and PyTorch: layers, WTConvNeXt, DLPack."""

from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx

from flash_wtconv_jax import checkpoints, models

torch = pytest.importorskip("torch")

import torch_bridge  # noqa: E402


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_there_and_back_is_bitwise(ndim, dtype):
    kind = getattr(torch_bridge, f"WTConv{ndim}d")
    layer = kind(3, 3, 3, 2, wt_levels=2, wt_type="db2", device="cpu", dtype=dtype)
    back = torch_bridge.from_jax(torch_bridge.to_jax(layer), wavelet="db2", stride=2)
    assert type(back) is kind and back.device == torch.device("cpu")
    assert (back.stride, back.wt_levels, back.kernel_size) == (2, 2, 3)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, back.state_dict()[name]), name
        assert value.dtype == back.state_dict()[name].dtype


def test_into_a_module_strictly():
    source, target = (torch_bridge.WTConv2d(2, 2, 3, device="cpu") for _ in range(2))
    assert torch_bridge.from_jax(torch_bridge.to_jax(source), target) is target
    assert torch.equal(source.base_conv.weight, target.base_conv.weight)
    with pytest.raises(RuntimeError, match="Missing key.*wavelet_convs.1.weight"):
        torch_bridge.from_jax(
            torch_bridge.to_jax(source), torch_bridge.WTConv2d(2, 2, 3, wt_levels=2)
        )


def test_a_state_dict_in_place_of_its_module_is_named():
    with pytest.raises(TypeError, match="value is of type OrderedDict.*from_torch"):
        torch_bridge.to_jax(torch_bridge.WTConv2d(2, 2).state_dict())


def test_neither_variables_nor_an_array():
    with pytest.raises(TypeError, match="value is of type list, expected the variables of a layer"):
        torch_bridge.from_jax([1.0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arrays_share_their_memory(dtype):
    x = jax.random.normal(jax.random.key(0), (2, 4, 5, 3), dtype)
    tensor = torch_bridge.from_jax(x)
    assert tensor.data_ptr() == x.unsafe_buffer_pointer()
    back = torch_bridge.to_jax(tensor)
    assert back.unsafe_buffer_pointer() == x.unsafe_buffer_pointer()
    assert np.array_equal(np.asarray(back), np.asarray(x)) and back.dtype == x.dtype
    assert tensor.movedim(-1, 1).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("part", [np.s_[:, ::2], np.s_[:, :1]], ids=str)
def test_tensors_that_are_not_dense_are_told(part):
    x = torch.arange(6.0).view(2, 3)
    assert np.array_equal(torch_bridge.to_jax(x.T), x.T)
    for gaps in (x[part], x[:, :1].expand(2, 3)):
        with pytest.raises(ValueError, match=r"strides \(3, .*expected a dense tensor"):
            torch_bridge.to_jax(gaps)
    assert torch_bridge.to_jax(x[part].contiguous()).shape == x[part].shape


@pytest.mark.gpu
def test_arrays_share_the_memory_of_a_gpu():
    x = jax.numpy.ones((2, 3))
    tensor = torch_bridge.from_jax(x)
    assert tensor.device.type == "cuda" and tensor.data_ptr() == x.unsafe_buffer_pointer()
    layer = torch_bridge.from_jax(
        jax.tree.map(jax.numpy.asarray, torch_bridge.to_jax(torch_bridge.WTConv2d(2, 2, 3)))
    )
    assert layer.device == tensor.device


def test_wrapped_modules_go_in_and_out():
    compiled = partial(torch.compile, backend="eager")
    layer = torch_bridge.WTConv2d(2, 2, 3, wt_levels=1, device="cpu")
    variables = torch_bridge.to_jax(layer)
    averaged = torch.optim.swa_utils.AveragedModel(compiled(layer))
    for module in (compiled(layer), averaged, compiled(averaged)):
        jax.tree.map(np.testing.assert_array_equal, torch_bridge.to_jax(module), variables)
    averaged.n_averaged += 3
    zeros = jax.tree.map(np.zeros_like, variables)
    assert torch_bridge.from_jax(zeros, averaged) is averaged
    assert averaged.n_averaged == 3
    jax.tree.map(np.testing.assert_array_equal, torch_bridge.to_jax(averaged), zeros)
    # As strict as ever: nothing of the module stays as it was.
    fewer = {name: array for name, array in zeros["params"].items() if "wavelet" not in name}
    with pytest.raises(RuntimeError, match=r"wavelet_convs.0.weight"):
        torch_bridge.from_jax({"params": fewer}, averaged)


class Norm(torch.nn.LayerNorm):
    """Normalises the channels of `[N, C, H, W]`."""

    def __init__(self, channels):
        super().__init__(channels, eps=1e-6)

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Block(torch.nn.Module):
    def __init__(self, channels, levels):
        super().__init__()
        self.conv_dw = torch_bridge.WTConv2d(channels, channels, 3, wt_levels=levels, device="cpu")
        self.norm = Norm(channels)
        self.mlp = torch.nn.ModuleDict(
            {
                "fc1": torch.nn.Linear(channels, 4 * channels),
                "fc2": torch.nn.Linear(4 * channels, channels),
            }
        )
        self.gamma = torch.nn.Parameter(torch.ones(channels))

    def forward(self, x):
        y = self.norm(self.conv_dw(x)).movedim(1, -1)
        y = self.mlp["fc2"](torch.nn.functional.gelu(self.mlp["fc1"](y)))
        return x + (y * self.gamma).movedim(-1, 1)


class WTConvNeXt(torch.nn.Module):
    """Two stages of one block in timm's names."""

    def __init__(self, dims, levels, classes):
        super().__init__()
        conv = torch.nn.Conv2d
        self.stem = torch.nn.Sequential(conv(3, dims[0], 2, 2), Norm(dims[0]))
        self.stages = torch.nn.ModuleList()
        for stage, (channels, depth) in enumerate(zip(dims, levels, strict=True)):
            parts = {"blocks": torch.nn.Sequential(Block(channels, depth))}
            if stage:
                before = dims[stage - 1]
                parts = {
                    "downsample": torch.nn.Sequential(Norm(before), conv(before, channels, 2, 2)),
                    **parts,
                }
            self.stages.append(torch.nn.Sequential())
            for name, part in parts.items():
                self.stages[stage].add_module(name, part)
        self.head = torch.nn.ModuleDict(
            {
                "norm": torch.nn.LayerNorm(dims[-1], eps=1e-6),
                "fc": torch.nn.Linear(dims[-1], classes),
            }
        )

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head["fc"](self.head["norm"](x.mean((2, 3))))


@pytest.mark.wide
def test_a_whole_network_computes_the_same():
    config = models.ConvNeXtConfig(
        depths=(1, 1),
        dims=(4, 6),
        levels=(2, 1),
        kernel_size=3,
        patch_size=2,
        num_classes=5,
        layer_scale=0.5,
    )
    network = nnx.jit(lambda: models.ConvNeXt(config, rngs=nnx.Rngs(0)))()
    variables = checkpoints.variables_of(network)
    twin = torch_bridge.from_jax(variables, WTConvNeXt((4, 6), (2, 1), 5))
    x = np.random.default_rng(0).normal(size=(2, 14, 12, 3)).astype(np.float32)
    want = nnx.jit(lambda network, x: network(x))(network, x)
    with torch.no_grad():
        got = twin(torch.from_numpy(x).movedim(-1, 1))
    np.testing.assert_allclose(got.numpy(), want, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, torch_bridge.to_jax(twin), variables)
