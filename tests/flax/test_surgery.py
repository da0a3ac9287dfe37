"""Replacing depthwise convolutions of nnx models by WTConv."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flash_wtconv_jax import surgery
from flash_wtconv_jax.nnx import DepthwiseConv2d, WTConv1d, WTConv2d, WTConv3d

pytestmark = pytest.mark.core

ZEROS = nnx.initializers.zeros
Pair = collections.namedtuple("Pair", ["first", "second"])


def depthwise(channels=3, kernel=(3, 3), seed=0, **kwargs):
    kwargs = {"feature_group_count": channels, "bias_init": nnx.initializers.normal(1.0), **kwargs}
    return nnx.Conv(channels, channels, kernel, **kwargs, rngs=nnx.Rngs(seed))


def image(*shape):
    return jax.random.normal(jax.random.key(9), shape)


class Zoo(nnx.Module):
    """Depthwise convolutions in every container that nnx knows, and others beside them."""

    def __init__(self):
        shared = depthwise(seed=1)
        self.plain = depthwise(seed=2)
        self.first = shared
        self.second = shared
        self.items = nnx.List([depthwise(seed=3), jax.nn.relu])
        self.named = nnx.Dict(a=depthwise(seed=4))
        self.chain = nnx.Sequential(nnx.Conv(3, 3, (1, 1), rngs=nnx.Rngs(0)), depthwise(seed=5))
        self.builtin = nnx.data([{"b": depthwise(seed=6)}, (Pair(depthwise(seed=7), 1), shared)])
        self.untouched = nnx.data((nnx.Linear(3, 3, rngs=nnx.Rngs(0)),))

    def __call__(self, x):
        x = self.first(self.plain(x)) + self.second(x)
        x = self.chain(self.named["a"](self.items[1](self.items[0](x))))
        return self.builtin[1][1](self.builtin[1][0].first(self.builtin[0]["b"](x)))


PATHS = [
    "plain",
    "first",
    "second",
    "items.0",
    "named.a",
    "chain.layers.1",
    "builtin.0.b",
    "builtin.1.0.0",
    "builtin.1.1",
]


def test_everything_is_replaced_and_nothing_changes_at_zero_scales():
    model, x = Zoo(), image(2, 6, 7, 3)
    before, untouched = model(x), model.untouched
    paths = surgery.replace_depthwise(model, depth=1, rngs=nnx.Rngs(0), scale_init=ZEROS)
    assert paths == PATHS
    assert not [
        path
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Conv) and module.feature_group_count > 1
    ]
    assert model.first is model.second is model.builtin[1][1]
    assert isinstance(model.builtin[1][0], Pair)
    assert model.untouched is untouched
    np.testing.assert_allclose(model(x), before, atol=1e-5)


def test_three_lines():
    model = nnx.Sequential(depthwise(4, (5, 5)), nnx.Conv(4, 2, (1, 1), rngs=nnx.Rngs(0)))
    surgery.replace_depthwise(model, depth=2, rngs=nnx.Rngs(0))
    assert model(image(1, 8, 8, 4)).shape == (1, 8, 8, 2)
    layer = model.layers[0]
    assert isinstance(layer, WTConv2d)
    assert (layer.kernel_size, layer.depth, layer.wavelet_kernel_1.shape) == (5, 2, (5, 5, 4, 4))


@pytest.mark.parametrize(
    ("shape", "kwargs", "expected"),
    [
        pytest.param((2, 9, 3), {"kernel": (4,)}, WTConv1d, marks=pytest.mark.wide),
        pytest.param(
            *((1, 4, 5, 3, 3), {"kernel": (3, 3, 3), "use_bias": False}, WTConv3d),
            marks=pytest.mark.wide,
        ),
        # Explicit padding as PyTorch has it agrees at every size, with a stride too.
        pytest.param((1, 6, 7, 3), {"strides": 2, "padding": 1}, WTConv2d, marks=pytest.mark.wide),
        ((1, 7, 6, 3), {"kernel": (4, 4), "strides": (3, 3), "padding": ((1, 2),) * 2}, WTConv2d),
        # Two windows of two: JAX's SAME never pads before.
        ((1, 6, 7, 3), {"kernel": (2, 2), "strides": 2}, WTConv2d),
        pytest.param(
            *((1, 6, 6, 3), {"padding": [1, 1], "kernel_dilation": None}, WTConv2d),
            marks=pytest.mark.wide,
        ),
    ],
)
def test_equal_at_zero_scales(shape, kwargs, expected):
    model = nnx.List([depthwise(**kwargs)])
    x = image(*shape)
    before = model[0](x)
    # Levels of zero scale are tried in the test above; what differs here is the convolution.
    depth = 1 if expected is WTConv1d else 0
    surgery.replace_depthwise(model, depth=depth, rngs=nnx.Rngs(0), scale_init=ZEROS)
    assert isinstance(model[0], expected)
    np.testing.assert_allclose(model[0](x), before, atol=1e-5)


@pytest.mark.parametrize(("before", "after"), [(3, 5), (3, 4), (4, 5), (2, 5)])
def test_a_larger_kernel_starts_as_the_old_one(before, after):
    model, x = nnx.List([depthwise(kernel=(before, before))]), image(1, 6, 7, 3)
    expected = model[0](x)
    surgery.replace_depthwise(model, depth=0, kernel_size=after, rngs=nnx.Rngs(0), scale_init=ZEROS)
    assert model[0].kernel_size == after
    np.testing.assert_allclose(model[0](x), expected, atol=1e-5)


def test_weights_and_dtypes_move_over():
    conv = depthwise(dtype=jnp.bfloat16, precision="highest")
    kernel, bias = conv.kernel, conv.bias
    model = nnx.List([conv])
    surgery.replace_depthwise(model, depth=1, rngs=nnx.Rngs(0))
    assert model[0].base_kernel is kernel
    assert model[0].base_bias is bias
    assert model[0].dtype == jnp.bfloat16
    assert model[0].precision == "highest"

    model = nnx.List([depthwise(param_dtype=jnp.bfloat16)])
    kernel = model[0].kernel[...]
    surgery.replace_depthwise(
        model, depth=1, kernel_size=2, rngs=nnx.Rngs(0), keep_weights=False, implementation="xla"
    )
    assert model[0].base_kernel.shape == (2, 2, 1, 3)
    assert model[0].base_kernel.dtype == jnp.bfloat16
    assert model[0].implementation == "xla"


class Frozen(nnx.Variable):
    """A weight that an optimizer of `nnx.Param` leaves alone."""


@pytest.mark.parametrize(
    "options",
    [{}, {"kernel_size": 5}, {"keep_weights": False}, {"kernel_size": 2, "keep_weights": False}],
    ids=str,
)
def test_ties_types_metadata_and_placement_stay(options):
    mesh = jax.make_mesh((1,), ("m",), axis_types=(jax.sharding.AxisType.Auto,))
    placement = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, None, "m"))
    first, second, alone = (depthwise(seed=seed) for seed in range(3))
    first.kernel = Frozen(jax.device_put(first.kernel[...], placement), tag="mine")
    second.kernel, second.bias = first.kernel, first.bias
    alone.bias = Frozen(alone.bias[...])
    model = nnx.List([first, second, alone])
    surgery.replace_depthwise(model, depth=1, rngs=nnx.Rngs(0), **options)
    assert model[0].base_kernel is model[1].base_kernel
    assert model[0].base_bias is model[1].base_bias
    assert type(model[0].base_kernel) is type(model[2].base_bias) is Frozen
    assert type(model[0].wavelet_kernel_0) is nnx.Param
    assert model[0].base_kernel.get_metadata("tag") == "mine"
    assert model[0].base_kernel.sharding == placement
    assert model[0].base_kernel.shape == (*(options.get("kernel_size", 3),) * 2, 1, 3)


def test_where_sees_paths_and_chooses():
    model, seen = Zoo(), []

    def where(path, conv):
        seen.append(path)
        return path in ("first", "items.0")

    assert surgery.replace_depthwise(model, depth=1, rngs=nnx.Rngs(0), where=where) == [
        "first",
        "second",
        "items.0",
        "builtin.1.1",
    ]
    # A shared convolution is asked for once.
    assert seen == [path for path in PATHS if path not in ("second", "builtin.1.1")]
    assert isinstance(model.plain, nnx.Conv)


class Standardised(nnx.Conv):
    """A convolution that computes something of its own."""


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: depthwise(kernel=(3, 5)), r"kernel \(3, 5\) is not square"),
        (lambda: depthwise(padding="VALID"), "padding is 'VALID'"),
        (lambda: depthwise(padding="CIRCULAR"), "padding is 'CIRCULAR'"),
        (lambda: depthwise(padding=0), "padding is 0"),
        (lambda: depthwise(kernel_dilation=2), "dilated"),
        (lambda: depthwise(input_dilation=(2, 2)), "dilated"),
        (lambda: depthwise(strides=(1, 2)), r"strides \(1, 2\) differ"),
        (lambda: depthwise(strides=2), "stride 2 with SAME padding"),
        (lambda: depthwise(kernel=(3,), strides=2, padding=1), "strided WTConv1d averages"),
        (lambda: depthwise(mask=jnp.ones((3, 3, 1, 3))), "masked"),
        (lambda: depthwise(conv_general_dilated=lambda *a, **k: None), "function of its own"),
        (lambda: depthwise(precision=("high", "highest")), "takes one for both"),
        (lambda: depthwise(preferred_element_type=jnp.float32), "rule for dtypes"),
        (
            lambda: nnx.vmap(lambda rngs: nnx.Conv(3, 3, (3, 3), feature_group_count=3, rngs=rngs))(
                nnx.Rngs(0).split(2)
            ),
            "stacked by",
        ),
        (lambda: depthwise(kernel=(1, 1, 1, 1)), "4 spatial axes"),
        (
            lambda: nnx.Conv(3, 6, (3, 3), feature_group_count=3, rngs=nnx.Rngs(0)),
            "makes 6 features of 3 channels",
        ),
        (
            lambda: Standardised(3, 3, (3, 3), feature_group_count=3, rngs=nnx.Rngs(0)),
            "it is a Standardised",
        ),
    ],
)
def test_obstacles_are_reported_and_nothing_is_changed(make, reason):
    conv = make()
    model = nnx.Dict(good=depthwise(), bad=nnx.List([conv]))
    with pytest.raises(ValueError, match=rf"bad\.0: .*{reason}"):
        surgery.replace_depthwise(model, depth=1, rngs=nnx.Rngs(0))
    assert isinstance(model.good, nnx.Conv)
    paths = surgery.replace_depthwise(
        model, depth=1, rngs=nnx.Rngs(0), where=lambda path, conv: surgery.obstacle(conv) is None
    )
    assert paths == ["good"]
    assert model.bad[0] is conv


def test_strided_same_padding_is_accepted_without_weights():
    model = nnx.List([depthwise(strides=2)])
    shape = model[0](image(1, 6, 7, 3)).shape
    surgery.replace_depthwise(model, depth=1, rngs=nnx.Rngs(0), keep_weights=False)
    assert model[0](image(1, 6, 7, 3)).shape == shape


def test_the_reason_against_strided_same_padding_is_real():
    # At an odd size the two sample the same pixels, at an even one they do not.
    conv = depthwise(strides=2)
    layer = WTConv2d(3, 3, 0, 2, rngs=nnx.Rngs(0))
    layer.base_kernel, layer.base_bias = conv.kernel, conv.bias
    odd, even = image(1, 7, 7, 3), image(1, 6, 6, 3)
    np.testing.assert_allclose(layer(odd), conv(odd), atol=1e-5)
    assert np.abs(np.asarray(layer(even) - conv(even))).max() > 0.1


def test_errors():
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match="no depthwise convolution to replace: no nnx.Conv"):
        # One input channel and one group is an ordinary convolution of a grey image.
        surgery.replace_depthwise(nnx.List([nnx.Conv(1, 8, (3, 3), rngs=rngs)]), depth=1, rngs=rngs)
    with pytest.raises(ValueError, match="where refused all 1"):
        surgery.replace_depthwise(
            nnx.List([depthwise()]), depth=1, rngs=rngs, where=lambda path, conv: False
        )
    with pytest.raises(ValueError, match="model must be an nnx.Module that contains"):
        surgery.replace_depthwise(depthwise(), depth=1, rngs=rngs)
    with pytest.raises(ValueError, match="depth=-1: expected an integer >= 0"):
        surgery.replace_depthwise(nnx.List([depthwise()]), depth=-1, rngs=rngs)
    with pytest.raises(ValueError, match="kernel_size=.*: expected an integer"):
        surgery.replace_depthwise(nnx.List([depthwise()]), depth=1, kernel_size=0, rngs=rngs)
    with pytest.raises(ValueError, match="does not fit into kernel_size=2"):
        surgery.replace_depthwise(nnx.List([depthwise()]), depth=1, kernel_size=2, rngs=rngs)


def test_depthwise_convolutions_compute_on_our_kernels():
    model, x = Zoo(), image(2, 6, 7, 3)
    before, state = model(x), nnx.state(model, nnx.Param)
    kernel, bias = model.plain.kernel, model.chain.layers[1].bias
    assert surgery.use_depthwise(model, implementation="xla") == PATHS
    assert isinstance(model.plain, DepthwiseConv2d) and model.plain.implementation == "xla"
    assert model.first is model.second is model.builtin[1][1]
    assert type(model.chain.layers[0]) is nnx.Conv
    assert model.plain.kernel is kernel and model.chain.layers[1].bias is bias
    assert jax.tree.structure(nnx.state(model, nnx.Param)) == jax.tree.structure(state)
    np.testing.assert_allclose(model(x), before, atol=1e-5)
    # Those that are there stay, and are depthwise convolutions for WTConv too.
    plain = model.plain
    assert surgery.use_depthwise(model) == [] and model.plain is plain
    zeros = {"rngs": nnx.Rngs(0), "scale_init": ZEROS}
    assert surgery.replace_depthwise(model, depth=0, **zeros) == PATHS
    np.testing.assert_allclose(model(x), before, atol=1e-5)


@pytest.mark.wide
def test_every_argument_of_a_convolution_is_kept():
    options = {"kernel_dilation": 2, "padding": "CIRCULAR", "strides": (1, 2), "use_bias": False}
    mask = jnp.tri(3)[:, :, None, None] * jnp.ones((3, 3, 1, 3))
    model, x = nnx.List([depthwise(**options), depthwise(mask=mask)]), image(1, 9, 8, 3)
    before = [conv(x) for conv in model]
    assert surgery.use_depthwise(model) == ["0", "1"]
    for conv, want in zip(model, before, strict=True):
        np.testing.assert_allclose(conv(x), want, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: depthwise(kernel=(3,)), "1 spatial axes"),
        (lambda: depthwise(precision=("high", "highest")), "takes one for both"),
        (lambda: Standardised(3, 3, (3, 3), feature_group_count=3, rngs=nnx.Rngs(0)), "a Standard"),
    ],
)
def test_what_is_no_depthwise_convolution_of_images_is_left(make, reason):
    conv = make()
    model = nnx.Dict(good=depthwise(), bad=nnx.List([conv]))
    with pytest.raises(ValueError, match=rf"bad\.0: .*{reason}"):
        surgery.use_depthwise(model)
    assert type(model.good) is nnx.Conv
    assert surgery.use_depthwise(model, where=lambda path, conv: path == "good") == ["good"]
    assert model.bad[0] is conv
    with pytest.raises(ValueError, match="implementation names"):
        surgery.use_depthwise(model, implementation="cudnn")
