"""Plain-PyTorch WTConv against the oracle, and its state dict."""

import subprocess
import sys

import numpy as np
import pytest
import pywt

torch = pytest.importorskip("torch")

import torch_bridge  # noqa: E402
from pallas_kernels import oracle  # noqa: E402
from torch_bridge.backends import eager  # noqa: E402

LAYERS = {1: torch_bridge.WTConv1d, 2: torch_bridge.WTConv2d, 3: torch_bridge.WTConv3d}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On arrays this small threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_layer(ndim, channels=3, seed=0, dtype=torch.float64, **options):
    """A layer with every parameter away from its initial value."""
    layer = LAYERS[ndim](channels, channels, dtype=dtype, **options)
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, generator=generator)
    return layer


def make_input(size, channels=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, *size, dtype=torch.float64, generator=generator)


def expected(layer, x):
    """What the oracle computes from the parameters as `to_jax` names them."""
    bank = pywt.Wavelet(layer.wt_type)
    y = oracle.wtconv(
        np.moveaxis(x.numpy(), 1, -1),
        torch_bridge.to_jax(layer)["params"],
        layer.ndim,
        stride=layer.stride,
        dec=[bank.dec_lo[::-1], bank.dec_hi[::-1]],
        rec=[bank.rec_lo, bank.rec_hi],
    )
    return np.moveaxis(y, -1, 1)


@pytest.mark.parametrize(
    ("ndim", "size", "options"),
    [
        (2, (6, 9), {"wt_levels": 0}),
        (2, (6, 9), {"wt_levels": 1}),
        (2, (7, 9), {"wt_levels": 2, "bias": False}),
        (2, (14, 14), {"wt_levels": 2}),
        (2, (28, 12), {"wt_levels": 4, "kernel_size": 3}),
        (2, (1, 1), {"wt_levels": 3}),
        (2, (2, 3), {"wt_levels": 2, "kernel_size": 2}),
        (2, (12, 10), {"wt_levels": 1, "kernel_size": 4, "stride": 3}),
        (2, (13, 10), {"wt_levels": 2, "wt_type": "db2"}),
        (2, (11, 14), {"wt_levels": 3, "wt_type": "sym4", "stride": 2}),
        (2, (11, 14), {"wt_levels": 2, "wt_type": "bior2.2"}),
        (1, (23,), {"wt_levels": 3, "stride": 4}),
        (1, (30,), {"wt_levels": 2, "wt_type": "db2", "kernel_size": 3}),
        (3, (5, 6, 7), {"wt_levels": 2, "kernel_size": 3, "stride": 2}),
        (3, (4, 3, 5), {"wt_levels": 1, "kernel_size": 2, "wt_type": "db2"}),
    ],
    ids=str,
)
def test_forward_is_the_oracle(ndim, size, options):
    layer = make_layer(ndim, **options)
    x = make_input(size)
    with torch.no_grad():
        y = layer(x).numpy()
    reference = expected(layer, x)
    assert y.shape == reference.shape
    np.testing.assert_allclose(y, reference, atol=1e-12 * np.sqrt(np.mean(reference**2)) + 1e-13)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 6e-6), (torch.bfloat16, 6e-2)], ids=str
)
def test_lower_precision(dtype, tolerance):
    layer = make_layer(2, wt_levels=2, dtype=dtype)
    x = make_input((9, 14)).to(dtype)
    with torch.no_grad():
        y = layer(x)
    assert y.dtype == dtype
    reference = expected(layer, x.double())
    rms = np.sqrt(np.mean(reference**2))
    assert np.max(np.abs(y.double().numpy() - reference)) <= tolerance * rms


@pytest.mark.parametrize(
    ("ndim", "size", "options"),
    [(2, (3, 6), {"wt_levels": 2, "wt_type": "db2"}), (1, (7,), {"wt_levels": 2, "stride": 2})],
    ids=str,
)
def test_gradients(ndim, size, options):
    layer = make_layer(ndim, channels=2, kernel_size=3, **options)
    x = make_input(size, channels=2).requires_grad_()
    names = [name for name, p in layer.named_parameters() if p.requires_grad]

    def call(x, *values):
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(layer, parameters, (x,))

    values = tuple(dict(layer.named_parameters())[name] for name in names)
    assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


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
        ({"out_channels": 5}, "out_channels is 5, expected in_channels = 4"),
        ({"kernel_size": 0}, "kernel_size is 0"),
        ({"stride": 0}, "stride is 0"),
        ({"wt_levels": -1}, "wt_levels is -1"),
        ({"wt_levels": 1.0}, "wt_levels is 1.0"),
        ({"stride": True}, "stride is True"),
        ({"wt_type": "morl"}, "wt_type: wavelet='morl' is not a discrete wavelet"),
        ({"dtype": torch.int32}, "dtype is torch.int32, expected a floating-point dtype"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        torch_bridge.WTConv2d(**{"in_channels": 4, "out_channels": 4, **arguments})


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (4, 8, 8), (1, 4, 8)])
def test_bad_input(shape):
    layer = torch_bridge.WTConv2d(4, 4)
    with pytest.raises(ValueError, match=r"x has shape .*expected \(N, C, H, W\) with C = 4"):
        layer(torch.zeros(shape))


@pytest.mark.parametrize("ndim", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_there_and_back_is_bitwise(ndim, dtype):
    layer = make_layer(ndim, wt_levels=2, kernel_size=3, wt_type="db2", stride=2, dtype=dtype)
    back = torch_bridge.from_jax(torch_bridge.to_jax(layer), wavelet="db2", stride=2)
    assert type(back) is type(layer)
    assert (back.stride, back.wt_levels, back.kernel_size) == (2, 2, 3)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, back.state_dict()[name]), name
        assert value.dtype == back.state_dict()[name].dtype


def test_import_needs_no_jax():
    script = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['jax', 'jaxlib', 'flax'], None))\n"
        "import torch, torch_bridge\n"
        "assert torch_bridge.WTConv2d(2, 2)(torch.zeros(1, 2, 3, 3)).shape == (1, 2, 3, 3)\n"
        "import pallas_kernels.oracle, flash_wtconv_jax.checkpoints as checkpoints\n"
        "checkpoints.from_torch(torch_bridge.WTConv2d(2, 2).state_dict())\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_import_is_lazy():
    script = "import sys, torch_bridge; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
    assert "WTConv2d" in dir(torch_bridge)
    with pytest.raises(AttributeError, match="nothing"):
        torch_bridge.nothing  # noqa: B018


def test_an_empty_batch():
    layer = torch_bridge.WTConv2d(3, 3, wt_levels=2)
    assert layer(torch.zeros(0, 3, 7, 8)).shape == (0, 3, 7, 8)


def test_numpy_integers_are_integers():
    layer = torch_bridge.WTConv2d(np.int64(2), np.int64(2), stride=np.int32(2))
    assert layer(torch.zeros(1, 2, 5, 4)).shape == (1, 2, 3, 2)


def test_a_state_dict_in_place_of_its_module_is_named():
    with pytest.raises(TypeError, match="value is of type OrderedDict.*from_torch"):
        torch_bridge.to_jax(torch_bridge.WTConv2d(2, 2).state_dict())


def test_inputs_that_are_no_image_are_named():
    with pytest.raises(ValueError, match="x is of type ndarray, expected a tensor"):
        torch_bridge.WTConv2d(3, 3)(np.zeros((1, 3, 8, 8), np.float32))
    with pytest.raises(ValueError, match=r"x has shape \(1, 3, 0, 8\), expected at least one"):
        torch_bridge.WTConv2d(3, 3)(torch.zeros(1, 3, 0, 8))


def test_wrong_dtypes_and_short_signals_are_named():
    with pytest.raises(ValueError, match="x is of torch.int64, expected torch.float32"):
        torch_bridge.WTConv2d(3, 3)(torch.zeros(1, 3, 8, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="stride is 3 and averages groups of 3 samples, but x has"):
        torch_bridge.WTConv1d(3, 3, stride=3)(torch.zeros(1, 3, 2))
