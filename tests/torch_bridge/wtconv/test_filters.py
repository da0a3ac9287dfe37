"""The wavelet's filters: constants that state dicts hold, and nothing trains."""

import pytest

torch = pytest.importorskip("torch")

import torch_bridge  # noqa: E402
from torch_bridge.wtconv import eager  # noqa: E402


def made(**options):
    torch.manual_seed(0)
    return torch_bridge.WTConv2d(2, 2, 3, **{"device": "cpu", **options})


def filters_of(layer):
    return layer.wt_filter, layer.iwt_filter


def assert_haar(layer):
    for held, right in zip(filters_of(layer), eager.wavelet_filters("db1", 2, 2), strict=True):
        assert torch.equal(held.detach(), right) and not held.requires_grad


def drifted(by):
    state_dict = made().state_dict()
    return state_dict | {"wt_filter": state_dict["wt_filter"] + by}


@pytest.mark.parametrize("assign", [False, True])
def test_a_layer_without_values_loads(assign):
    layer, source = made(device="meta"), made()
    if not assign:
        layer = layer.to_empty(device="cpu")
        for filters in filters_of(layer):
            filters.fill_(float("nan"))
    layer.load_state_dict(source.state_dict(), assign=assign)
    assert_haar(layer)
    x = torch.ones(1, 2, 4, 4)
    assert torch.equal(layer(x), source(x))


def test_a_layer_without_values_starts_anew():
    layer = made(device="meta").to_empty(device="cpu")
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert_haar(layer)
    assert torch.all(layer.base_scale.weight == 1.0)
    assert torch.all(layer.wavelet_scale[0].weight == 0.1)


def test_a_drifted_file_is_refused_each_time_and_leaves_the_filters():
    layer, file = made(), drifted(-0.25)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="wt_filter is not that of wt_type='db1': taps are"):
            layer.load_state_dict(file)
        assert_haar(layer)
    with pytest.raises(RuntimeError, match=r"up to 0\.25 apart.*implementation='eager'"):
        layer.load_state_dict(file, assign=True)
    assert_haar(layer)
    with pytest.raises(RuntimeError, match="up to nan apart"):
        layer.load_state_dict(drifted(float("nan")))


def test_plain_pytorch_runs_a_drifted_file_as_it_is():
    layer, file = made(implementation="eager"), drifted(0.5)
    layer.load_state_dict(file)
    assert torch.equal(layer.wt_filter, file["wt_filter"])
    # The bands of ones are 4, 2, 2 and 2 then, and ten times a tenth of them is synthesised.
    for weight in (layer.base_conv.weight, layer.base_conv.bias, layer.wavelet_convs[0].weight):
        torch.nn.init.zeros_(weight)
    layer.wavelet_convs[0].weight.data[:, :, 1, 1] = 10.0
    y = layer(torch.ones(1, 2, 2, 2))
    want = torch.tensor([[4 + 3 * 2, 4 - 2], [4 - 2, 4 - 2]]) / 2.0
    torch.testing.assert_close(y, want.expand(1, 2, 2, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rounded_filters_become_exact(dtype):
    layer = made()
    layer.load_state_dict(made(dtype=dtype, wt_type="db1").state_dict())
    assert_haar(layer)


def test_nothing_trains_them():
    layer = made().requires_grad_(False).requires_grad_(True)
    assert layer.base_conv.weight.requires_grad
    assert_haar(layer)
    for parameter in layer.parameters():
        parameter.requires_grad = True
    layer(torch.ones(1, 2, 4, 4)).sum().backward()
    assert [filters.grad for filters in filters_of(layer)] == [None, None]


def test_sharded_layers_load_and_resume(process_group, tmp_path):
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint import state_dict as states
    from torch.distributed.fsdp import fully_shard

    source, layer = made(), made(device="meta")
    fully_shard(layer)
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.equal(layer.wt_filter.full_tensor(), source.wt_filter)
    whole = states.StateDictOptions(full_state_dict=True)
    states.set_model_state_dict(layer, source.state_dict(), options=whole)
    layer.load_state_dict(layer.state_dict())
    checkpoint.save({"layer": layer.state_dict()}, checkpoint_id=tmp_path / "saved")
    resumed = fully_shard(made())
    state = {"layer": resumed.state_dict()}
    checkpoint.load(state, checkpoint_id=tmp_path / "saved")
    resumed.load_state_dict(state["layer"])
    x = torch.ones(1, 2, 4, 4)
    assert torch.equal(resumed(x), source(x))
    with pytest.raises(RuntimeError, match=r"up to 0\.25 apart"):
        states.set_model_state_dict(layer, drifted(0.25), options=whole)
    assert torch.equal(layer.wt_filter.full_tensor(), source.wt_filter)
