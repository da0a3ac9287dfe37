"""Instance normalisation for PyTorch: the oracle, PyTorch's own layer, and its transformations."""

import copy
import warnings

import numpy as np
import pytest
from helpers.triton import INTERPRETED

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import torch_bridge  # noqa: E402
from pallas_kernels.common.conformance import bounds, expected, worst  # noqa: E402
from pallas_kernels.stylize.cases import CASES, HARD  # noqa: E402
from torch_bridge.stylize import conformance, layers, ops  # noqa: E402

pytestmark = pytest.mark.usefixtures("many_compilations")

FORMATS = {"first": torch.contiguous_format, "last": torch.channels_last}
IMPLEMENTATIONS = ["eager", pytest.param("triton", marks=INTERPRETED)]


def assert_oracle(case, implementation, device="cpu", memory_format=torch.channels_last):
    """Output and gradients of a case are the oracle's."""
    device = torch.device(device)
    got = conformance.computed(case, implementation, device, memory_format)
    want = expected(case)
    assert {n: a.shape for n, a in got.items()} == {n: a.shape for n, a in want.items()}
    allowed = bounds(case, conformance.baseline)
    found = {name: worst(got[name], value) for name, value in want.items()}
    # NaN is not greater than its bound.
    assert {name: e for name, e in found.items() if not e <= allowed[name]} == {}


def interpretable(case, implementation):
    """The kernels take it, and the interpreter does not round in its own way."""
    low = implementation == "triton" and case.dtype in ("bfloat16", "float64")
    return not low and (implementation == "eager" or 0 not in case.batch)


def marks(case, other):
    """The marks: many channels are many programs of the interpreter, of some ms each.

    In the other memory format a case runs by hand, but those of `make test`.
    """
    always = case in HARD[1:4]
    if case.c >= 128 and case.dtype != "float32" or case.c > 128 or other and not always:
        return [pytest.mark.slow]
    return [pytest.mark.wide] * (not always)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("case", "memory_format"),
    [
        pytest.param(case, name, id=f"{case.name}-{name}", marks=marks(case, (i + j) % 2))
        for i, case in enumerate(CASES)
        for j, name in enumerate(FORMATS)
    ],
)
def test_output_and_gradients_are_the_oracles(case, implementation, memory_format):
    if not interpretable(case, implementation):
        pytest.skip("the kernels do not take it here; tests marked gpu do")
    assert_oracle(case, implementation, memory_format=FORMATS[memory_format])


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("case", [c for c in CASES if c.dtype != "float64"], ids=lambda c: c.name)
def test_on_a_gpu_too(case, memory_format):
    assert_oracle(case, "triton", "cuda", FORMATS[memory_format])


def images(memory_format="last", dtype=torch.float32, size=(2, 6, 5, 4)):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, generator=generator) + 2
    return x.to(dtype).to(memory_format=FORMATS[memory_format])


def layer(implementation, **options):
    made = torch_bridge.FusedInstanceNorm2d(
        6, affine=True, implementation=implementation, **options
    )
    with torch.no_grad():
        made.weight.copy_(torch.linspace(-1, 2, 6))
        made.bias.copy_(torch.linspace(0, 1, 6))
    return made


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_layer_is_pytorchs(implementation, memory_format):
    ours, theirs = layer(implementation), nn.InstanceNorm2d(6, affine=True)
    theirs.load_state_dict(ours.state_dict())
    assert isinstance(ours, nn.InstanceNorm2d) and repr(ours)[5:] == repr(theirs)
    x = images(memory_format)
    y, want = ours(x), theirs(x)
    assert y.stride() == x.stride()
    torch.testing.assert_close(y, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours(x[0]), want[0], rtol=0, atol=1e-5)
    plain = torch_bridge.FusedInstanceNorm2d(6, implementation=implementation)
    assert not list(plain.parameters()) and not plain.state_dict()
    torch.testing.assert_close(plain(x), nn.InstanceNorm2d(6)(x), rtol=0, atol=1e-5)


@INTERPRETED
def test_parameters_of_any_strides():
    x, scale = images("first", size=(1, 6, 5, 4)), torch.randn(12)[::2]
    y = ops.instance_norm(x, scale, scale, implementation="triton")
    want = ops.instance_norm(x, scale, scale, implementation="eager")
    torch.testing.assert_close(y, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_derivatives_of_every_order(implementation):
    def call(x, scale, bias, residual):
        return ops.instance_norm(
            *(x, scale, bias),
            activation="relu",
            residual=residual,
            implementation=implementation,
        )

    if implementation == "triton":
        # In float32, which finite differences of are too coarse: beside plain PyTorch.
        given = [images(), *torch.randn(2, 2, 6), images("first") / 3]

        def second(implementation):
            leaves = [t.detach().clone().requires_grad_() for t in given]
            y = ops.instance_norm(
                *leaves[:3], activation="relu", residual=leaves[3], implementation=implementation
            )
            slopes = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
            return torch.autograd.grad(sum((g**2).sum() for g in slopes), leaves)

        for got, want in zip(second("triton"), second("eager"), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
        return
    x = images(dtype=torch.float64, size=(2, 2, 2, 3))
    rest = [torch.randn(2, 2, dtype=torch.float64) for _ in range(2)]
    arguments = [t.requires_grad_() for t in (x, *rest, images("first", x.dtype, x.shape) / 3)]
    assert torch.autograd.gradcheck(call, arguments)
    assert torch.autograd.gradgradcheck(call, arguments)


@pytest.mark.wide
@INTERPRETED
def test_the_operators_keep_what_pytorch_asks_of_them():
    for x in (images(), images("first")):
        n, c, *_ = x.shape
        parameters = [torch.randn(n, c, requires_grad=True) for _ in range(2)]
        arguments = (x.requires_grad_(), *parameters, x.detach() / 2, 1e-5, True, "triton", "eager")
        torch.library.opcheck(ops.apply, arguments, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiled_and_mapped_it_is_the_same(implementation):
    made, x = layer(implementation), images()
    want = made(x)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    leaf = x.clone().requires_grad_()
    y = compiled(leaf)
    torch.testing.assert_close(y, want, rtol=0, atol=1e-6)
    assert y.stride() == x.stride()
    y.square().sum().backward()
    again = x.clone().requires_grad_()
    made(again).square().sum().backward()
    torch.testing.assert_close(leaf.grad, again.grad, rtol=0, atol=1e-5)
    mapped = torch.vmap(made)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(mapped[0], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_exported_program_is_the_same(implementation):
    x = images()
    made = layer(implementation).requires_grad_(requires_grad=False)
    sizes = {n: torch.export.Dim(f"size{n}", min=2, max=64) for n in (0, 2, 3)}
    program = torch.export.export(made, (x,), dynamic_shapes=(sizes,))
    other = images(size=(3, 6, 7, 8))
    torch.testing.assert_close(program.module()(other), made(other), rtol=0, atol=1e-6)


@INTERPRETED
def test_what_torch_func_cannot_differentiate_says_so():
    x = images()
    slope = torch.func.grad(lambda x: layer("eager")(x).square().sum())(x)
    assert slope.shape == x.shape
    with pytest.raises(NotImplementedError, match="torch.func differentiates what triton would"):
        torch.func.grad(lambda x: layer("triton")(x).square().sum())(x)


def test_averages_of_a_loaded_file_are_dropped_and_it_says_so_once(monkeypatch):
    monkeypatch.setattr(layers, "_DROPPED", set())
    theirs = nn.Sequential(
        *(nn.InstanceNorm2d(6, affine=True, track_running_stats=True) for _ in range(2))
    )
    ours = nn.Sequential(layer(None), layer(None))
    state = theirs.state_dict()
    with pytest.warns(UserWarning, match=r"0.running_mean, 0.running_var, 0.num_batches_tracked"):
        ours.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.load_state_dict(state)
    assert len(state) == 10 and set(ours.state_dict()) == {
        f"{i}.{name}" for i in (0, 1) for name in ("weight", "bias")
    }
    # What else is wrong with it still is.
    with pytest.raises(RuntimeError, match="Unexpected key.*running"):
        ours.load_state_dict(state | {"running": torch.zeros(1)})


def test_averages_in_evaluation_are_refused_by_name():
    made, x = layer(None, track_running_stats=True), images()
    torch.testing.assert_close(made(x), layer(None)(x))
    with pytest.raises(NotImplementedError, match="track_running_stats=True in evaluation"):
        made.eval()(x)
    made.train().reset_parameters()
    model = nn.ModuleDict({"a": nn.InstanceNorm2d(6, track_running_stats=True), "b": nn.ReLU()})
    network = nn.Sequential(model, nn.InstanceNorm2d(6)).eval()
    with pytest.raises(NotImplementedError, match="^0.a: track_running_stats=True in evaluation"):
        torch_bridge.replace_instance_norm(network)
    assert type(network[1]) is nn.InstanceNorm2d


def test_every_norm_of_a_model_is_swapped_weights_kept():
    shared = nn.InstanceNorm2d(8, affine=True)
    model = nn.Sequential(
        nn.Conv2d(6, 8, 3),
        nn.Sequential(shared, nn.ReLU(), nn.InstanceNorm2d(8)),
        shared,
    ).double()
    seen = []
    shared.register_forward_hook(lambda *_: seen.append(1))
    before, x = copy.deepcopy(model), images(dtype=torch.float64, size=(2, 6, 7, 8))
    weight = shared.weight
    assert torch_bridge.replace_instance_norm(model, implementation="eager") is model
    kinds = [type(module).__name__ for module in model.modules()]
    assert kinds.count("FusedInstanceNorm2d") == 2 and "InstanceNorm2d" not in kinds
    assert model[2] is model[1][0] and model[2].weight is weight
    torch.testing.assert_close(model(x), before(x))
    assert len(seen) == 4
    assert list(model.state_dict()) == list(before.state_dict())
    alone = torch_bridge.replace_instance_norm(nn.InstanceNorm2d(3))
    assert type(alone) is torch_bridge.FusedInstanceNorm2d


WRONG = {
    "expected 3D or 4D input": torch.zeros(6, 4),
    "x: expected num_features=6 channels, got 5": torch.zeros(2, 5, 4, 4),
    "x: expected one of .*float32.*got torch.int32": torch.zeros(2, 6, 4, 4, dtype=torch.int32),
    "x: expected at least one pixel": torch.zeros(2, 6, 0, 4),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_says_so(message):
    with pytest.raises(ValueError, match=message):
        layer(None)(WRONG[message])


def test_unknown_names_say_so():
    with pytest.raises(ValueError, match="activation='gelu': expected None or 'relu'"):
        ops.instance_norm(images(), activation="gelu")
    with pytest.raises(ValueError, match=r"implementation names \['cudnn'\]"):
        torch_bridge.FusedInstanceNorm2d(6, implementation="cudnn")
    with pytest.raises(ValueError, match=r"implementation names \['cudnn'\]"):
        torch_bridge.replace_instance_norm(nn.InstanceNorm2d(6), implementation="cudnn")


def test_autocast_and_the_meta_device():
    made, x = layer(None), images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(made(x), made.double()(x.double()).float(), rtol=0, atol=1e-5)
    assert made.to("meta")(x.to("meta")).shape == x.shape


def test_an_image_of_one_pixel_is_the_bias_and_an_empty_batch_is_empty():
    made = layer(None)
    y = made(images(size=(2, 6, 1, 1)))
    torch.testing.assert_close(y[..., 0, 0], made.bias.expand(2, 6))
    assert made(torch.zeros(0, 6, 3, 4)).shape == (0, 6, 3, 4)


def test_pytorch_parity_on_a_mean_of_many_deviations():
    """Where PyTorch's own layer loses its digits, ours does not."""
    x = images(size=(1, 6, 16, 16)) + 1e4
    ours = torch_bridge.FusedInstanceNorm2d(6)(x).double()
    exact = nn.InstanceNorm2d(6)(x.double())
    np.testing.assert_allclose(ours, exact, atol=1e-5)
