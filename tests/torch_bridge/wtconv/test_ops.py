"""PyTorch's transformations of the layers: derivatives, tracing, `vmap`, `autocast`, copies."""

import copy
import os
import pickle

import pytest

torch = pytest.importorskip("torch")

import torch_bridge  # noqa: E402
from torch_bridge.runtime import calls  # noqa: E402
from torch_bridge.wtconv import ops, scaling  # noqa: E402

pytestmark = pytest.mark.usefixtures("many_compilations")

INTERPRETS = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="a process has Triton's interpreter or a GPU"
)


def each(*marks):
    """Plain operations, and kernels with these marks."""
    values = ["eager", pytest.param("triton", marks=[INTERPRETS, *marks])]
    return pytest.mark.parametrize("implementation", values)


EACH = each()
WITH_GPU = pytest.mark.parametrize(
    ("implementation", "device"),
    [("eager", "cpu"), pytest.param("triton", "cuda", marks=pytest.mark.gpu)],
)


@pytest.fixture(autouse=True)
def triton_is_here(request):
    if "triton" in request.node.name:
        pytest.importorskip("triton", reason="Triton is for Linux alone")


def make_layer(implementation, device="cpu", **options):
    """A small layer with every parameter away from its initial value."""
    torch.manual_seed(0)
    layer = torch_bridge.WTConv2d(1, 1, 3, device=device, implementation=implementation, **options)
    for parameter in trained(layer):
        torch.nn.init.normal_(parameter)
    return layer


def trained(layer):
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def make_input(*shape, device="cpu"):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)


def taps_and_bias(kernel_size):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 1, kernel_size, kernel_size), (8, 1, kernel_size, kernel_size), (2,)
    return [
        torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
        for shape in shapes
    ]


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(("wavelet", "kernel_size"), [("haar", 2), ("bior2.2", 3)])
def test_the_operators_derivatives_of_both_orders(wavelet, kernel_size, transpose):
    x = torch.randn(2, 2, 5, 3, dtype=torch.float64, requires_grad=True)

    def call(x, base, level, bias):
        names = wavelet, transpose, "eager", "eager"
        return ops.apply(x, [base, level], bias, [], *names)

    inputs = (x, *taps_and_bias(kernel_size))
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def scaled_parameters(kernel_size=2):
    """Kernels, a bias and scales of one level of two channels."""
    base, level, bias = taps_and_bias(kernel_size)
    scales = (
        torch.randn(1, n, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        for n in (2, 8)
    )
    return base, level, bias, *(scale.requires_grad_() for scale in scales)


@pytest.mark.parametrize("transpose", [False, True])
def test_scaled_derivatives_of_both_orders(transpose):
    x = torch.randn(2, 2, 5, 3, dtype=torch.float64, requires_grad=True)
    base, level, bias, *scales = scaled_parameters()

    def call(x, base, level, bias, *scales):
        # A transpose has no bias where there are scales.
        offset = None if transpose else bias
        return ops.apply(x, [base, level], offset, scales, "haar", transpose, "eager", "eager")

    inputs = (x, base, level, None if transpose else bias, *scales)
    want = ops.apply(
        *(x, *scaling.folded([base, level], inputs[3], scales, x.dtype), []),
        *("haar", transpose, "eager", "eager"),
    )
    torch.testing.assert_close(call(*inputs), want)
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("trained", ["x", "bias", "x bias", "x base", "level bias"])
def test_frozen_arguments_have_no_gradient(trained, transpose):
    names = dict(zip(("base", "level", "bias"), taps_and_bias(3), strict=True))
    names["x"] = torch.randn(2, 2, 5, 3, dtype=torch.float64, requires_grad=True)

    def gradients(leaves):
        x, base, level, bias = (leaves[name] for name in ("x", "base", "level", "bias"))
        y = ops.apply(x, [base, level], bias, [], "haar", transpose, "eager", "eager")
        (y * y).sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    want = gradients(names)
    leaves = {
        name: leaf.detach().requires_grad_(name in trained.split()) for name, leaf in names.items()
    }
    for name, got in gradients(leaves).items():
        if name in trained.split():
            torch.testing.assert_close(got, want[name])
        else:
            assert got is None


def test_the_operators_are_declared_as_they_are():
    base, level, bias = taps_and_bias(3)
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(ops.apply, (x, [base, level], bias, [], "haar", False, "eager", "eager"))
    for biased in (True, False):
        torch.library.opcheck(ops.weight_grad, (x, x.detach(), 3, 1, "haar", biased, "eager"))


@pytest.mark.parametrize("name", ["x", "bias", "base", "base scale", "level scale"])
def test_frozen_arguments_beside_scales_have_no_gradient(name):
    names = "base", "level", "bias", "base scale", "level scale"
    leaves = dict(zip(names, scaled_parameters(), strict=True))
    leaves["x"] = torch.randn(2, 2, 5, 3, dtype=torch.float64, requires_grad=True)

    def gradients(leaves):
        base, level, bias, *scales, x = leaves.values()
        y = ops.apply(x, [base, level], bias, scales, "haar", False, "eager", "eager")
        (y * y).sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    want = gradients(leaves)
    frozen = {key: leaf.detach().requires_grad_(key == name) for key, leaf in leaves.items()}
    got = gradients(frozen)
    torch.testing.assert_close(got.pop(name), want[name])
    assert set(got.values()) == {None}


def test_operators_with_scales_are_declared_as_they_are():
    base, level, bias, *scales = scaled_parameters(3)
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    names = "haar", False, "eager", "eager"
    torch.library.opcheck(ops.apply, (x, [base, level], bias, scales, *names))
    dy = torch.randn_like(x)
    torch.library.opcheck(ops.scaled_grad, (x, dy, [base, level], bias, scales, "haar", "eager"))
    # Gradients are contiguous where parameters are not.
    base = base.detach().transpose(2, 3).requires_grad_()
    nothing = x.detach()[:0], dy.detach()[:0], [base, level], None, scales, "haar", "eager"
    torch.library.opcheck(ops.scaled_grad, nothing)
    empty = ops.scaled_grad(*nothing)
    for got, own in zip(empty, (base, level, *scales), strict=True):
        assert torch.equal(got, torch.zeros_like(own))


@each(pytest.mark.wide)
def test_second_derivatives(implementation):
    layer, plain = make_layer(implementation), make_layer("eager")

    def second(layer):
        x = make_input(1, 1, 3, 2).requires_grad_()
        inputs = [x, *trained(layer)]
        first = torch.autograd.grad(layer(x).sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in first), inputs)

    for got, want in zip(second(layer), second(plain), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@each(pytest.mark.slow)
def test_compiles_without_a_graph_break(implementation):
    layer = make_layer(implementation)
    # Inductor would compile C++ for a minute; "aot_eager" traces the same graphs, both ways.
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((1, 1, 3, 2), (2, 1, 4, 5)):
        x = make_input(*size).requires_grad_()
        (compiled(x) * x).sum().backward()
        got, x.grad = x.grad, None
        (layer(x) * x).sum().backward()
        torch.testing.assert_close(got, x.grad)


def test_compiles_for_any_size_where_sizes_are_not_told(monkeypatch):
    """As PyTorch 2.11 has it; channels are those of the parameters."""
    monkeypatch.setattr(calls, "tells_sizes", lambda: False)
    layer = torch_bridge.WTConv2d(3, 3, 3, device="cpu", implementation="eager")
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for size in ((2, 3, 4, 5), (4, 3, 7, 2)):
        x = make_input(*size)
        torch.testing.assert_close(compiled(x), layer(x))


tells_sizes = pytest.mark.skipif(
    not calls.tells_sizes(),
    reason="PyTorch older than 2.12 does not tell the sizes of a traced program",
)


# Inductor compiles C++ for a minute, and warns of itself.
@pytest.mark.slow
@tells_sizes
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_layer_trains_at_sizes_that_it_does_not_know():
    layer, optimiser = make_layer("eager"), torch.optim.SGD
    compiled, plain = torch.compile(layer, fullgraph=True), copy.deepcopy(layer)
    steps = [optimiser(trained(one), 0.1) for one in (layer, plain)]
    for size in ((2, 1, 4, 4), (2, 1, 7, 6), (3, 1, 9, 5)):
        x = make_input(*size)
        for step, call in zip(steps, (compiled, plain), strict=True):
            step.zero_grad()
            call(x).sin().sum().backward()
            step.step()
    for got, want in zip(trained(layer), trained(plain), strict=True):
        torch.testing.assert_close(got, want)


@tells_sizes
def test_a_program_of_unknown_sizes_holds_the_operator_whole():
    targets = set()

    def backend(graph, inputs):
        targets.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    layer = make_layer("eager")
    x = make_input(2, 1, 3, 2)
    torch.compile(layer, backend=backend, dynamic=True)(x)
    assert "flash_wtconv.wtconv.default" in targets
    targets.clear()
    gradient = torch.func.grad(lambda x: layer(x).sin().sum())
    got = torch.compile(gradient, backend=backend, dynamic=True)(x)
    torch.testing.assert_close(got, gradient(x))
    assert not any("flash_wtconv" in target for target in targets)


@EACH
def test_exports(implementation):
    layer, batch = make_layer(implementation), torch.export.Dim("batch", min=2)
    program = torch.export.export(layer, (make_input(2, 1, 3, 2),), dynamic_shapes=({0: batch},))
    x = make_input(3, 1, 3, 2)
    torch.testing.assert_close(program.module()(x), layer(x))
    targets = [str(node.target) for node in program.graph.nodes]
    # Plain operations, for those who convert the program; a kernel stays whole.
    assert ("flash_wtconv.wtconv.default" in targets) == (implementation == "triton")
    assert implementation == "triton" or not {"aten.to.dtype", "aten.detach.default"} & {*targets}


@each(pytest.mark.slow)
def test_vmap(implementation):
    layer, x = make_layer(implementation), make_input(2, 3, 1, 2, 2)
    want = torch.stack([layer(one) for one in x.unbind(1)])
    torch.testing.assert_close(torch.vmap(layer, in_dims=1)(x), want)
    names = [name for name, value in layer.named_parameters() if value.requires_grad]

    def call(values, x):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    many = [torch.stack([p, 2 * p]) for p in trained(layer)]
    want = torch.stack([call([p[i] for p in many], x[:, i]) for i in range(2)])
    got = torch.vmap(call, in_dims=(0, 1))(many, x[:, :2])
    torch.testing.assert_close(got, want)


def test_vmap_of_the_weight_gradient():
    x, dy = (torch.randn(3, 1, 2, 4, 3, dtype=torch.float64) for _ in range(2))
    names = 3, 1, "haar", True, "eager"
    got = torch.vmap(lambda x: ops.weight_grad(x, dy[0], *names))(x)
    for i in range(3):
        for many, one in zip(got, ops.weight_grad(x[i], dy[0], *names), strict=True):
            torch.testing.assert_close(many[i], one)


def test_vmap_of_what_has_scales():
    base, level, bias, *scales = (each.detach() for each in scaled_parameters(3))
    x, dy = (torch.randn(3, 1, 2, 4, 3, dtype=torch.float64) for _ in range(2))
    many = torch.stack([scales[0], 2 * scales[0], 3 * scales[0]])

    def forward(x, scale):
        own = [scale, scales[1]]
        return ops.apply(x, [base, level], bias, own, "haar", False, "eager", "eager")

    def gradients(x, scale):
        return ops.scaled_grad(x, dy[0], [base, level], bias, [scale, scales[1]], "haar", "eager")

    for call in (forward, gradients):
        got = torch.vmap(call)(x, many)
        want = [call(*pair) for pair in zip(x, many, strict=True)]
        if call is forward:
            torch.testing.assert_close(got, torch.stack(want))
        else:
            torch.testing.assert_close(got, [torch.stack(each) for each in zip(*want, strict=True)])
    shared = torch.vmap(lambda x: forward(x, scales[0]))(x)
    torch.testing.assert_close(shared[1], forward(x[1], scales[0]))


def test_gradients_of_each_sample():
    layer, x = make_layer("eager"), make_input(3, 1, 4, 3)
    got = torch.vmap(torch.func.grad(lambda x: layer(x[None]).sin().sum()))(x)
    leaf = x.clone().requires_grad_()
    layer(leaf).sin().sum().backward()
    torch.testing.assert_close(got, leaf.grad)


@EACH
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.jacfwd])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_kernels_tell_torch_func_that_they_cannot(implementation, transform):
    layer, x = make_layer(implementation), make_input(1, 1, 2, 2)
    call = transform(lambda x: layer(x).sin().sum())
    if implementation == "eager":
        want = torch.autograd.grad(layer(x.requires_grad_()).sin().sum(), x)[0]
        torch.testing.assert_close(call(x.detach()), want)
    else:
        with pytest.raises(NotImplementedError, match="triton would compute.*'eager'"):
            torch.vmap(call)(x[None])


@each(pytest.mark.wide)
def test_autocast_computes_in_its_dtype(implementation):
    layer, x = make_layer(implementation), make_input(1, 1, 3, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert {p.grad.dtype for p in trained(layer)} == {torch.float32}
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    exact = make_layer("eager", dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert exact(x.double()).dtype == torch.float64


@EACH
@pytest.mark.parametrize("what", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same(implementation, what):
    layer, x = make_layer(implementation), make_input(1, 1, 2, 2)
    assert torch.equal(what(layer)(x), layer(x))


@WITH_GPU
def test_distributed_data_parallel(implementation, device, process_group):
    layer, x = make_layer(implementation, device), make_input(2, 1, 3, 2, device=device)
    parallel = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(layer))
    parallel(x).sum().backward()
    want = torch.autograd.grad(layer(x).sum(), trained(layer))
    for parameter, gradient in zip(trained(parallel), want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@each(pytest.mark.wide)
def test_y_is_laid_out_as_x_is(implementation):
    layer, x = make_layer(implementation), make_input(3, 1, 4, 2)
    assert layer(x).is_contiguous()
    wide = torch_bridge.WTConv2d(2, 2, 3, device="cpu", implementation=implementation)
    images = make_input(1, 2, 3, 3).contiguous(memory_format=torch.channels_last)
    assert wide(images).is_contiguous(memory_format=torch.channels_last)
    same = x[:1].expand(3, -1, -1, -1)
    torch.testing.assert_close(layer(same), layer(same.contiguous()))
    assert layer(x[:0]).shape == (0, 1, 4, 2)


@pytest.mark.gpu
# PyTorch's compiler warns of itself, and of products that are rounded less than they could be.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32:UserWarning")
@pytest.mark.parametrize("implementation", ["cuda", "triton"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_on_a_gpu(backend, implementation):
    layer, plain = make_layer(implementation, "cuda"), make_layer("eager", "cuda")
    x = make_input(2, 1, 13, 10, device="cuda").requires_grad_()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    (got,) = torch.autograd.grad(compiled(x).sin().sum(), x)
    (want,) = torch.autograd.grad(plain(x).sin().sum(), x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["cuda", "triton"])
def test_a_cuda_graph_captures_it(implementation):
    layer, x = make_layer(implementation, "cuda"), make_input(2, 1, 13, 10, device="cuda")
    with torch.no_grad():
        want = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        y.zero_()
        graph.replay()
    torch.testing.assert_close(y, want)
