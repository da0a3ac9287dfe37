"""A convolution with its norm for PyTorch: the oracle, PyTorch's transformations, refusals."""

import math

import numpy as np
import pytest
from helpers.triton import INTERPRETED

torch = pytest.importorskip("torch")

import torch_bridge  # noqa: E402
from pallas_kernels import oracle  # noqa: E402
from pallas_kernels.common.conformance import expected, worst  # noqa: E402
from pallas_kernels.stylize.cases import CONV_CASES  # noqa: E402
from torch_bridge.stylize.convolution import eager, ops  # noqa: E402

pytestmark = pytest.mark.usefixtures("many_compilations")

FORMATS = {"first": torch.contiguous_format, "last": torch.channels_last}
WIDE, SLOW = pytest.mark.wide, pytest.mark.slow
IMPLEMENTATIONS = ["eager", pytest.param("triton", marks=INTERPRETED)]
CASES = [case for case in CONV_CASES if case.dtype == "float32"]
conv = torch_bridge.conv2d_instance_norm


def tensors(case, memory_format="last", device="cpu"):
    """The tensors of a case, channels first: x, w, scale, bias, the residual and dy."""
    n = math.prod(case.batch)

    def image(value):
        value = torch.tensor(value.reshape(n, *value.shape[-3:]), device=device).movedim(-1, 1)
        return value.contiguous(memory_format=FORMATS[memory_format])

    x, w, scale, bias, residual, dy = case.drawn()
    own = [torch.tensor(value, device=device) for value in (scale, bias)]
    own = [value.reshape(n, case.nf) if case.styles else value for value in own]
    filters = torch.tensor(w, device=device).permute(3, 2, 0, 1).contiguous()
    return image(x), filters, *own, None if residual is None else image(residual), image(dy)


def assert_oracle(case, implementation, memory_format, device="cpu"):
    """Output and gradients of a case are the oracle's, and the memory format is kept."""
    *given, dy = tensors(case, memory_format, device)
    leaves = [None if value is None else value.requires_grad_() for value in given]
    *required, residual = leaves
    y = conv(*required, residual=residual, implementation=implementation, **case.arguments)
    assert y.is_contiguous(memory_format=FORMATS[memory_format])
    y.backward(dy)
    assert given[0].grad.is_contiguous(memory_format=FORMATS[memory_format])
    named = dict(zip(("dx", "dw", "dscale", "dbias", "dresidual"), leaves, strict=True))
    found = {"y": y.detach()} | {n: leaf.grad for n, leaf in named.items() if leaf is not None}
    places = {"dw": (2, 3, 1, 0), "dscale": None, "dbias": None}
    errors = {}
    for name, want in expected(case).items():
        axes = places.get(name, (0, 2, 3, 1))
        got = found[name].cpu()
        got = got if axes is None else got.permute(axes)
        errors[name] = worst(got.numpy().reshape(want.shape), want)
    # NaN is not greater than its bound.
    assert {name: e for name, e in errors.items() if not e <= case.tolerance(name)} == {}


@pytest.mark.parametrize("memory_format", [pytest.param("first", marks=WIDE), "last"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=marks)
        for case, marks in zip(CASES, [[], SLOW, SLOW, WIDE, SLOW], strict=True)
    ],
)
def test_output_and_gradients_are_the_oracles(case, implementation, memory_format):
    assert_oracle(case, implementation, memory_format)


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("implementation", ["eager", "triton"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_on_a_gpu_too(case, implementation, memory_format):
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        assert_oracle(case, implementation, memory_format, "cuda")
    finally:
        torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize(
    "implementation", ["eager", pytest.param("triton", marks=[WIDE, INTERPRETED])]
)
def test_a_residual_block_is_the_oracles(implementation):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 5, 4, 3)).astype(np.float32)
    branches = [
        (rng.normal(size=(3, 3, 3, 3)).astype(np.float32), *rng.normal(size=(2, 3)))
        for _ in range(2)
    ]
    own = [
        (torch.tensor(w).permute(3, 2, 0, 1), torch.tensor(scale), torch.tensor(bias))
        for w, scale, bias in branches
    ]
    image = torch.tensor(x).movedim(-1, 1)
    y = torch_bridge.residual_block(image, *own, implementation=implementation)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert worst(y.movedim(1, -1).numpy(), oracle.residual_block(x, *branches)) < 1e-5


def test_derivatives_of_every_order():
    """PyTorch's derivatives by finite differences, and the operator's beside them."""
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64)
    w, scale = torch.randn(3, 2, 2, 2, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    leaves = [value.requires_grad_() for value in (x, w, scale)]

    def second(function):
        slopes = torch.autograd.grad(function(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum((g**2).sum() for g in slopes), leaves)

    def custom(x, w, scale):
        window = (1, 1), (1, 0, 0, 1), True
        ones = torch.zeros(2, 3, dtype=torch.float64)
        parameters = scale.expand(2, 3), ones
        return ops.apply(x, w, *parameters, None, *window, 1e-5, True, "eager", "eager")[0]

    padding = ("reflect", ((0, 1), (1, 0)))

    def plain(x, w, scale):
        return conv(x, w, scale, padding=padding, activation="relu", implementation="eager")

    torch.testing.assert_close(second(custom), second(plain), rtol=0, atol=1e-9)
    window = eager.Padded((2, 1), (1, 0, 0, 1), True)
    for one in (window, window._replace(reflect=False)):

        def pulled(x, w, dz, one=one):
            return eager.backward(x, w, dz, one, (True, True))

        dz = torch.randn_like(eager.convolution(x, w, one)).requires_grad_()
        found = pulled(x, w, dz)
        want = torch.autograd.grad(eager.convolution(x, w, one), (x, w), dz)
        torch.testing.assert_close(found, want)
        assert torch.autograd.gradcheck(pulled, (x, w, dz))


@pytest.mark.parametrize(
    "implementation",
    [
        pytest.param("eager", marks=pytest.mark.slow),
        pytest.param("triton", marks=[WIDE, INTERPRETED]),
    ],
)
def test_compiled_exported_and_mapped_it_is_the_same(implementation):
    x, w, scale, bias, _, _ = tensors(CASES[1])

    class Layer(torch.nn.Module):
        def forward(self, x):
            rest = {"padding": "reflect", "activation": "relu", "implementation": implementation}
            return conv(x, w, scale, bias, **rest)

    layer = Layer()
    want = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, want)
    assert compiled.stride() == want.stride()
    exported = torch.export.export(layer, (x,))
    torch.testing.assert_close(exported.module()(x), want)
    custom = "conv2d_instance_norm" in str(exported.graph)
    assert custom == (implementation == "triton")
    mapped = torch.vmap(layer)(torch.stack([x, x / 2]))
    torch.testing.assert_close(mapped[0], want)
    filters = torch.stack([w, 2 * w])
    rest = {"padding": "reflect", "implementation": implementation}
    torch.testing.assert_close(
        torch.vmap(lambda w: conv(x, w, **rest))(filters)[1], conv(x, 2 * w, **rest)
    )


@SLOW
@INTERPRETED
@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_operator_keeps_what_pytorch_asks_of_it(memory_format):
    x, w, *_ = tensors(CASES[0], memory_format)
    n, nf = x.shape[0], w.shape[0]
    parameters = [torch.randn(n, nf, requires_grad=True) for _ in range(2)]
    arguments = x.requires_grad_(), w.requires_grad_(), *parameters, None
    window = (1, 1), (1, 1, 1, 1), True
    rest = *window, 1e-5, True, "triton", "eager"
    torch.library.opcheck(ops.apply, (*arguments, *rest), rtol=1e-4, atol=1e-4)


def test_it_needs_what_it_says():
    x, w = torch.ones(1, 2, 4, 5), torch.ones(3, 2, 3, 3)
    for wrong, message in (
        ({"activation": "gelu"}, "activation='gelu': expected None or 'relu'"),
        ({"upsample": 3}, "upsample=3: expected 1 or 2"),
        ({"x": x[0]}, "x: expected floating-point images"),
        ({"w": w[:, :1]}, "w: expected filters .* of the 2 channels of x"),
        ({"w": w.double()}, "w: expected x's dtype, torch.float32, got torch.float64"),
        ({"stride": 0}, "stride=0: expected an integer from 1 on"),
        ({"padding": -1}, "padding=-1: expected an int"),
        ({"padding": "mirror"}, "padding='mirror': expected an int"),
        ({"padding": ("reflect", 4)}, "mirroring 4 samples along H"),
        ({"w": torch.ones(3, 2, 5, 3)}, "filters of 5x3 taps do not fit into images of 4x5"),
        ({"scale": torch.ones(2)}, r"scale: expected shape \(3,\)"),
        ({"residual": x}, r"residual: expected the output's shape and dtype, \(1, 3, 2, 3\)"),
        ({"implementation": "cuda"}, r"implementation names \['cuda'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            conv(**{"x": x, "w": w} | wrong)
    block = torch_bridge.residual_block
    square = torch.ones(2, 2, 3, 3), None, None
    with pytest.raises(ValueError, match=r"first: expected \(filters, scale, bias\), got Tensor"):
        block(x, square[0], square)
    with pytest.raises(ValueError, match="padding=0: expected one that keeps the size of x"):
        block(x, square, square, padding=0)
    empty = conv(x[:0], w)
    assert empty.shape == (0, 3, 2, 3)
