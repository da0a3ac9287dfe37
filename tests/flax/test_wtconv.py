"""The WTConv layers of linen and nnx: parameters, initial values, results, arguments."""

import subprocess
import sys
import textwrap

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import flash_wtconv_jax
import flash_wtconv_jax.linen as linen_layers
import flash_wtconv_jax.nnx as nnx_layers
from flash_wtconv_jax import deepest_level
from flash_wtconv_jax.functional.wtconv import parameter_table
from pallas_kernels import oracle

pytestmark = pytest.mark.core

NAMES = {1: "WTConv1d", 2: "WTConv2d", 3: "WTConv3d"}
SHAPES = {1: (2, 13, 3), 2: (2, 9, 7, 3), 3: (1, 5, 6, 3, 2)}

# Depths and strides differ by rank, so that few compilations cover much.
OPTIONS = {
    1: {"kernel_size": 3, "depth": 3, "stride": 2},
    2: {"kernel_size": 5, "depth": 2, "stride": 2, "use_bias": False},
    3: {"kernel_size": 2, "depth": 1},
}


def random_like(shapes, seed=0):
    """Values far from the initial ones, so that no scale or bias hides."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()
    }


def make_nnx(cls, params, *args, **kwargs):
    layer = cls(*args, **kwargs, rngs=nnx.Rngs(0))
    for name, value in params.items():
        getattr(layer, name)[...] = value
    return layer


def assert_close(actual, expected, tolerance=1e-5):
    expected = np.asarray(expected, np.float64)
    rms = np.sqrt(np.mean(expected**2))
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), expected, rtol=0, atol=tolerance * rms
    )


def test_published_snippet():
    snippet = textwrap.dedent("""
        from flash_wtconv_jax import WTConv2d
        model = WTConv2d(channels=64, kernel_size=5, depth=2)
        variables = model.init(key, x)
        y = model.apply(variables, x)
    """)
    names = {"key": jax.random.key(0), "x": jnp.ones((2, 128, 128, 64))}
    exec(snippet, names)
    assert names["y"].shape == (2, 128, 128, 64)
    assert names["y"].dtype == jnp.float32
    assert set(names["variables"]) == {"params"}


@pytest.mark.parametrize(
    "ndim", [pytest.param(1, marks=pytest.mark.wide), 2, pytest.param(3, marks=pytest.mark.wide)]
)
def test_linen_nnx_and_oracle_agree(ndim):
    shape, options = SHAPES[ndim], OPTIONS[ndim]
    channels = shape[-1]
    x = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    linen_layer = getattr(linen_layers, NAMES[ndim])(channels=channels, **options)
    nnx_class = getattr(nnx_layers, NAMES[ndim])

    linen_shapes = jax.tree.map(
        jnp.shape, jax.eval_shape(linen_layer.init, jax.random.key(0), x)["params"]
    )
    abstract = nnx.eval_shape(lambda: nnx_class(channels, **options, rngs=nnx.Rngs(0)))
    nnx_shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(abstract, nnx.Param)))
    table = parameter_table(
        ndim=ndim,
        channels=channels,
        **{"use_bias": True, **{k: v for k, v in options.items() if k != "stride"}},
    )
    assert linen_shapes == nnx_shapes == {name: p.shape for name, p in table.items()}

    params = random_like(linen_shapes)
    from_linen = linen_layer.apply({"params": params}, x)
    from_nnx = make_nnx(nnx_class, params, channels, **options)(x)
    np.testing.assert_array_equal(from_linen, from_nnx)
    assert_close(from_linen, oracle.wtconv(x, params, ndim, stride=options.get("stride", 1)), 1e-5)


def test_parameter_shapes():
    shapes = {
        ndim: {
            name: parameter.shape
            for name, parameter in parameter_table(
                ndim=ndim, channels=6, kernel_size=5, depth=2, use_bias=True
            ).items()
        }
        for ndim in (1, 2, 3)
    }
    assert shapes[1]["base_kernel"] == (5, 1, 6)
    assert shapes[1]["wavelet_kernel_1"] == (5, 2, 6)
    assert shapes[3]["wavelet_kernel_0"] == (5, 5, 5, 8, 6)
    assert shapes[2] == {
        "base_kernel": (5, 5, 1, 6),
        "base_bias": (6,),
        "base_scale": (6,),
        "wavelet_kernel_0": (5, 5, 4, 6),
        "wavelet_scale_0": (4, 6),
        "wavelet_kernel_1": (5, 5, 4, 6),
        "wavelet_scale_1": (4, 6),
    }


def test_depth_zero_is_the_base_convolution():
    x = jax.random.normal(jax.random.key(0), (2, 6, 7, 3))
    layer = nnx_layers.WTConv2d(3, kernel_size=3, depth=0, rngs=nnx.Rngs(0))
    assert "wavelet_kernel_0" not in layer.parameter_names
    expected = jax.lax.conv_general_dilated(
        x,
        layer.base_kernel[...],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=3,
    )
    assert_close(layer(x), expected + layer.base_bias[...])


@pytest.mark.parametrize("ndim", [1, 2, 3])
def test_initial_values(ndim):
    cls = getattr(nnx_layers, NAMES[ndim])
    layer = cls(256, kernel_size=3, depth=1, rngs=nnx.Rngs(0))
    bound = 3 ** (-ndim / 2)
    for name in ("base_kernel", "base_bias", "wavelet_kernel_0"):
        value = np.asarray(getattr(layer, name)[...])
        assert np.abs(value).max() <= bound
        assert value.max() > 0.95 * bound
        assert value.min() < -0.95 * bound
    np.testing.assert_array_equal(layer.base_scale[...], 1.0)
    np.testing.assert_array_equal(layer.wavelet_scale_0[...], np.float32(0.1))


def test_initialisers_given_by_the_user():
    kwargs = {
        "kernel_init": nn.initializers.he_normal(),
        "bias_init": nn.initializers.zeros,
        "scale_init": nn.initializers.constant(0.5),
        "param_dtype": jnp.bfloat16,
    }
    layer = nnx_layers.WTConv2d(512, 3, 1, **kwargs, rngs=nnx.Rngs(0))
    # Fan-in is 9 for the subbands too: they are outputs, not inputs.
    for name in ("base_kernel", "wavelet_kernel_0"):
        assert np.std(np.float32(getattr(layer, name)[...])) == pytest.approx(
            np.sqrt(2 / 9), rel=0.05
        )
    assert not np.any(layer.base_bias[...])
    assert np.all(np.float32(layer.wavelet_scale_0[...]) == 0.5)
    assert np.all(np.float32(layer.base_scale[...]) == 1.0)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(layer))} == {jnp.dtype(jnp.bfloat16)}


def test_partitioned_initialisers_keep_their_names():
    axes = (None, None, None, "model")
    x = jnp.ones((1, 4, 4, 2))
    layer = linen_layers.WTConv2d(
        2, 3, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), axes)
    )
    kernel = layer.init(jax.random.key(0), x)["params"]["wavelet_kernel_0"]
    assert kernel.names == axes
    assert kernel.value.shape == (3, 3, 4, 2)

    twin = nnx_layers.WTConv2d(
        2,
        3,
        kernel_init=nnx.with_metadata(nnx.initializers.lecun_normal(), note="kept"),
        rngs=nnx.Rngs(0),
    )
    assert twin.wavelet_kernel_0.shape == (3, 3, 4, 2)
    assert twin.wavelet_kernel_0.get_metadata()["note"] == "kept"


@pytest.mark.parametrize(
    ("x_dtype", "dtype", "param_dtype", "expected"),
    [
        (jnp.float32, None, jnp.float32, jnp.float32),
        (jnp.bfloat16, None, jnp.float32, jnp.float32),
        (jnp.bfloat16, None, jnp.bfloat16, jnp.bfloat16),
        (jnp.float32, jnp.bfloat16, jnp.float32, jnp.bfloat16),
        (jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.bfloat16),
        (jnp.float32, jnp.float16, jnp.float32, jnp.float16),
    ],
)
def test_dtypes_follow_flax(x_dtype, dtype, param_dtype, expected):
    x = jnp.ones((1, 4, 4, 2), x_dtype)
    options = {"dtype": dtype, "param_dtype": param_dtype}

    def conv(x):
        return nnx.Conv(2, 2, (3, 3), **options, rngs=nnx.Rngs(0))(x)

    def layer(x):
        return nnx_layers.WTConv2d(2, 3, **options, rngs=nnx.Rngs(0))(x)

    # The rule of Flax's own convolution is the expectation.
    assert nnx.eval_shape(conv, x).dtype == nnx.eval_shape(layer, x).dtype == expected
    linen_layer = linen_layers.WTConv2d(2, 3, **options)
    out, variables = jax.eval_shape(linen_layer.init_with_output, jax.random.key(0), x)
    assert out.dtype == expected
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(param_dtype)}


def test_bfloat16_rounds_the_input_not_the_parameters():
    options = {"kernel_size": 3, "depth": 1}
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 4)).astype(jnp.bfloat16)
    shapes = parameter_table(ndim=2, channels=4, use_bias=True, **options)
    params = random_like({name: p.shape for name, p in shapes.items()})
    y = linen_layers.WTConv2d(4, dtype=jnp.bfloat16, **options).apply({"params": params}, x)
    expected = oracle.wtconv(np.asarray(x, np.float64), params, 2)
    # What stays is the rounding of taps and result, not that of scale and tap one by one.
    assert_close(y, expected, 0.03)


@pytest.mark.parametrize("library", [linen_layers, nnx_layers])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("channels", 0),
        ("kernel_size", 0),
        ("kernel_size", (3, 3)),
        ("depth", -1),
        ("depth", 1.5),
        ("depth", 10**9),
        ("stride", 0),
        ("stride", True),
    ],
)
def test_bad_constructor_arguments(library, name, value):
    arguments = {"channels": 2, name: value}
    if library is nnx_layers:
        arguments["rngs"] = nnx.Rngs(0)
    with pytest.raises(ValueError, match=f"{name}=.*: expected an integer"):
        library.WTConv2d(**arguments)
    with pytest.raises(ValueError, match=f"{name}=.*: expected an integer"):
        library.SeparableWTConv2d(features=3, **arguments)


def test_bad_features_and_dtype():
    with pytest.raises(ValueError, match="features=0: expected an integer >= 1"):
        linen_layers.SeparableWTConv2d(2, 0)
    with pytest.raises(ValueError, match="features=0: expected an integer >= 1"):
        nnx_layers.SeparableWTConv2d(2, 0, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", ["kernel_init", "bias_init", "scale_init", "pointwise_init"])
def test_a_number_is_no_initialiser(name):
    message = f"{name}=0.0: expected an initialiser, such as jax.nn.initializers.constant"
    with pytest.raises(ValueError, match=message):
        nnx_layers.SeparableWTConv2d(2, 3, **{name: 0.0}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        layer = linen_layers.SeparableWTConv2d(2, 3, **{name: 0.0})
        layer.init(jax.random.key(0), np.ones((4, 4, 2), np.float32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": jnp.int32}, "dtype=.*int32.*: expected one of float16, bfloat16"),
        ({"dtype": "foo"}, "dtype='foo': expected one of"),
        ({"param_dtype": "float8_e5m2"}, "param_dtype='float8_e5m2': expected one of"),
        ({"wavelet": "nosuch"}, "wavelet='nosuch' is not a discrete wavelet"),
        ({"param_dtype": None}, "param_dtype=None: expected one of"),
        ({"precision": "nosuch"}, "precision='nosuch'"),
        ({"precision": ["high"]}, r"precision=\['high'\]"),
        ({"implementation": "nope"}, "implementation names \\['nope'\\]"),
        ({"implementation": ["auto", "xla"]}, "'auto' is all .* and stands alone"),
    ],
)
def test_bad_arguments_are_told_by_the_constructor(arguments, message):
    with pytest.raises(ValueError, match=message):
        linen_layers.WTConv2d(2, 3, **arguments)
    with pytest.raises(ValueError, match=message):
        nnx_layers.WTConv2d(2, 3, **arguments, rngs=nnx.Rngs(0))


def test_numpy_integers_are_integers_and_no_bias_is_none():
    layer = nnx_layers.WTConv2d(np.int64(2), stride=np.int32(2), use_bias=False, rngs=nnx.Rngs(0))
    assert layer(jnp.ones((5, 4, 2))).shape == (3, 2, 2)
    assert layer.base_bias is None


@pytest.mark.parametrize("shape", [(2, 4, 4, 3), (4, 2), ()])
def test_inputs_that_do_not_fit(shape):
    x = jnp.ones(shape)
    # Channels are the layer's business, the rank is the operator's.
    message = r"x: expected an array (of channels=2|\[\*batch, H, W, C\]), got shape"
    with pytest.raises(ValueError, match=message):
        linen_layers.WTConv2d(2, 3).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=message):
        nnx_layers.WTConv2d(2, 3, rngs=nnx.Rngs(0))(x)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, bool, jnp.float8_e5m2, jnp.complex64])
def test_inputs_that_are_no_numbers_of_ours_are_refused(dtype):
    x = jnp.ones((1, 4, 4, 2), dtype)
    for options in ({}, {"dtype": jnp.bfloat16}):
        with pytest.raises(ValueError, match="x: expected a floating-point array .*cast it first"):
            linen_layers.WTConv2d(2, 3, **options).init(jax.random.key(0), x)
        with pytest.raises(ValueError, match="x: expected a floating-point array .*cast it first"):
            nnx_layers.WTConv2d(2, 3, **options, rngs=nnx.Rngs(0))(x)


@pytest.mark.parametrize("make", [lambda: 0, lambda: None, lambda: nnx.Rngs(dropout=0)])
def test_rngs_that_are_none_are_named(make):
    message = r"rngs: expected an nnx.Rngs with the stream 'params', such as nnx.Rngs\(0\), got"
    with pytest.raises(ValueError, match=message):
        nnx_layers.WTConv2d(2, 3, rngs=make())
    with pytest.raises(ValueError, match=message):
        nnx_layers.SeparableWTConv2d(2, 3, rngs=make())


def test_implementation_reaches_the_operator():
    x = jnp.ones((1, 4, 4, 2))
    named = nnx_layers.WTConv2d(2, 3, implementation=["xla"], rngs=nnx.Rngs(0))
    assert named.implementation == ("xla",)
    free = nnx_layers.WTConv2d(2, 3, rngs=nnx.Rngs(0))
    # Of several the fastest form is taken, whose sums may run in another order.
    np.testing.assert_allclose(named(x), free(x), rtol=1e-5, atol=1e-6)


def test_a_layer_is_traced_once_a_shape():
    layer = nnx_layers.WTConv2d(2, 3, rngs=nnx.Rngs(0))
    call = nnx.jit(chex.assert_max_traces(lambda layer, x: layer(x), n=2))
    for height in (4, 4, 5, 4, 5):
        chex.assert_shape(call(layer, jnp.ones((1, height, 4, 2))), (1, height, 4, 2))


def test_wavelet_reaches_the_operator():
    x = jax.random.normal(jax.random.key(0), (1, 8, 8, 2))
    haar = nnx_layers.WTConv2d(2, 3, rngs=nnx.Rngs(0))
    db2 = nnx_layers.WTConv2d(2, 3, wavelet="db2", rngs=nnx.Rngs(0))
    assert np.abs(np.asarray(haar(x) - db2(x))).max() > 1e-3


def test_jit_grad_vmap_split_and_merge():
    layer = nnx_layers.WTConv2d(3, kernel_size=3, depth=1, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 5, 6, 3))
    graph, state = nnx.split(layer)
    params = nnx.to_pure_dict(state)

    def loss(layer, x):
        return jnp.sum(jnp.sin(layer(x)))

    value, grads = nnx.jit(nnx.value_and_grad(loss))(layer, x)
    linen_layer = linen_layers.WTConv2d(3, kernel_size=3, depth=1)

    @jax.jit
    @jax.value_and_grad
    def linen_loss(params):
        # One image at a time under vmap, against the batch above.
        apply = jax.vmap(lambda image: linen_layer.apply({"params": params}, image))
        return jnp.sum(jnp.sin(apply(x)))

    linen_value, linen_grads = linen_loss(params)
    np.testing.assert_allclose(value, linen_value, rtol=1e-5)
    jax.tree.map(assert_close, nnx.to_pure_dict(grads), linen_grads)
    assert all(np.any(np.asarray(grad)) for grad in jax.tree.leaves(linen_grads))

    merged = nnx.merge(graph, state)
    np.testing.assert_array_equal(merged(x), layer(x))
    np.testing.assert_allclose(merged(x[0]), layer(x)[0], atol=1e-6)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_forward_mode(library):
    x = jax.random.normal(jax.random.key(0), (1, 4, 3, 2))
    options = {"kernel_size": 3, "use_bias": False, "implementation": "xla"}
    if library == "linen":
        layer = linen_layers.SeparableWTConv2d(2, 3, **options)
        shapes = jax.eval_shape(layer.init, jax.random.key(0), x)
        call = layer.bind(jax.tree.map(lambda p: jnp.ones(p.shape), shapes))
    else:
        call = nnx_layers.SeparableWTConv2d(2, 3, **options, rngs=nnx.Rngs(0))
    # Without bias the layer is linear, so along its input its tangent is its output.
    y, tangent = jax.jvp(call, (x,), (x,))
    assert_close(tangent, y)


def test_separable_parity_and_projection():
    x = jax.random.normal(jax.random.key(0), (2, 6, 5, 3))
    options = {"kernel_size": 3, "depth": 1, "stride": 2}
    linen_layer = linen_layers.SeparableWTConv2d(3, 4, **options)
    from_linen, variables = linen_layer.init_with_output(jax.random.key(0), x)
    layer = nnx_layers.SeparableWTConv2d(3, 4, **options, rngs=nnx.Rngs(0))
    params = variables["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(
        jnp.shape, nnx.to_pure_dict(nnx.state(layer))
    )
    nnx.update(layer, params)
    np.testing.assert_array_equal(layer(x), from_linen)
    depthwise = oracle.wtconv(x, params["depthwise"], 2, stride=2)
    expected = depthwise @ np.asarray(params["pointwise"]["kernel"], np.float64)[0, 0]
    assert_close(from_linen, expected + params["pointwise"]["bias"])
    assert from_linen.shape == (2, 3, 3, 4)


def test_separable_without_bias():
    layer = nnx_layers.SeparableWTConv2d(2, 3, 3, use_bias=False, rngs=nnx.Rngs(0))
    names = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(layer))}
    assert not any("bias" in name for name in names)


@pytest.mark.parametrize(
    ("size", "kernel_size", "expected"),
    [
        (224, 5, 5),
        (56, 5, 3),
        (28, 5, 2),
        (14, 5, 1),
        (10, 5, 1),
        (9, 5, 0),
        (7, 5, 0),
        (3, 5, 0),
        (8, 1, 3),
        ((56, 14), 5, 1),
        ([64], 1, 6),
        (np.int64(64), np.int64(5), 3),
    ],
)
def test_deepest_level(size, kernel_size, expected):
    assert deepest_level(size, kernel_size) == expected


def test_published_levels_are_those_that_see_everything():
    # The rule that deepest_level's docstring names for WTConvNeXt's levels.
    for size, levels in ((56, 5), (28, 4), (14, 3), (7, 2)):
        assert levels == next(n for n in range(9) if 2**n * 5 >= 2 * size - 1)
        assert levels == deepest_level(size, 5) + 2


@pytest.mark.parametrize(("size", "kernel_size"), [(0, 5), ((), 5), ((8, -1), 5), (8, 0), (8.0, 5)])
def test_deepest_level_rejects(size, kernel_size):
    with pytest.raises(ValueError, match="size"):
        deepest_level(size, kernel_size)


def test_import_is_cheap_and_lazy():
    program = """
        import sys
        import flash_wtconv_jax
        assert "flax" not in sys.modules and "jax" not in sys.modules
        assert flash_wtconv_jax.__version__
        assert "jax" not in sys.modules
        assert set(flash_wtconv_jax.__all__) <= set(dir(flash_wtconv_jax))
        from flash_wtconv_jax import deepest_level
        assert "flax" not in sys.modules
        assert flash_wtconv_jax.WTConv2d is flash_wtconv_jax.linen.WTConv2d
        assert set(flash_wtconv_jax.linen.__all__) <= set(flash_wtconv_jax.__all__)
        assert flash_wtconv_jax.SparseConv3d is flash_wtconv_jax.linen.SparseConv3d
        assert flash_wtconv_jax.nnx.WTConv2d is not flash_wtconv_jax.WTConv2d
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=120)


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="no attribute 'WTConv4d'"):
        _ = flash_wtconv_jax.WTConv4d
