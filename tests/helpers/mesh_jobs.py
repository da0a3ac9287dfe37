"""The jobs of `helpers.meshes`, which run where there are 8 host devices.

A kernel is stood for by plain JAX that says of itself that nobody can look into it: the module
`triton` of every operator, or the one that it has, which on a CPU could not run.
"""

import logging
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from types import ModuleType
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jax.sharding import AxisType, NamedSharding

from flash_wtconv_jax.bench.collectives import collectives
from flash_wtconv_jax.functional.mlp import MlpParams, norm_mlp
from pallas_kernels import haar
from pallas_kernels.conv2d import conv2d
from pallas_kernels.depthwise import depthwise_conv2d
from pallas_kernels.dispatch import forget
from pallas_kernels.sparse import (
    from_coords,
    kernel_map,
    maps,
    spatially_sparse_conv,
    spatially_sparse_depthwise_conv,
)
from pallas_kernels.sparse.voxels import is_missing, unpack
from pallas_kernels.stylize import conv2d_instance_norm, instance_norm
from pallas_kernels.wtconv import scaling, wtconv1d, wtconv2d, wtconv3d
from pallas_kernels.wtconv import vjp as calls
from pallas_kernels.wtconv import xla as plain
from pallas_kernels.wtconv.api import OPERATOR

ROOMS = {
    "wtconv": "triton",
    "haar": "triton",
    "conv2d": "triton",
    "depthwise": "mosaic_tpu",
    "stylize": "triton",
    "stylize.convolution": "triton",
    "sparse": "triton",
    "sparse.depthwise": "triton",
}


def _opaque(room, name):
    """A module like a kernel's, which refuses what `REFUSED` says."""
    package = f"pallas_kernels.{room}"
    plain = import_module(f"{package}.xla")
    module = ModuleType(f"{package}.{name}")
    module.__dict__.update({k: v for k, v in vars(plain).items() if not k.startswith("__")})
    module.DIFFERENTIABLE, module.unavailable = False, lambda platform: None

    def check(direction, problem):
        if REFUSED and problem.shape[0] in REFUSED:
            raise NotImplementedError(f"does not take {problem.shape[0]} images")

    module.check = check
    return module


def _search(keys, sites, columns, window):
    """As a kernel searches, of keys alone, and with no rule for `jax.vmap`."""

    @custom_vmap
    def table(keys, sites):
        coords = unpack(sites.high, sites.low, columns.shape[1])
        count = (~is_missing(sites.high, sites.low)).sum()
        return maps._searched(keys, maps._Sites(coords, count, None), window, tuple(columns[0]))

    @table.def_vmap
    def refused(*_):
        raise AssertionError("jax.vmap has met a kernel")

    return table(keys, sites)


REFUSED = set()
HALOS = "collective-permute"
KERNELS = {f"pallas_kernels.{r}.{name}": _opaque(r, name) for r, name in ROOMS.items()}
KERNELS["pallas_kernels.sparse.triton"].search = _search
mock.patch.dict("sys.modules", KERNELS).start()


def _drawn(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _wtconv(ndim, levels, shape, taps=3):
    function = (wtconv1d, wtconv2d, wtconv3d)[ndim - 1]
    c, k = shape[-1], (taps,) * ndim
    shapes = {"base_kernel": (*k, 1, c), "base_scale": (c,), "base_bias": (c,)}
    for i in range(levels):
        shapes[f"wavelet_kernel_{i}"] = (*k, 2**ndim, c)
        shapes[f"wavelet_scale_{i}"] = (2**ndim, c)
    params = {name: _drawn(s, i) for i, (name, s) in enumerate(shapes.items())}
    axes = {name: " ".join(["_"] * (len(s) - 1) + ["c"]) for name, s in shapes.items()}
    image = f"n {' '.join('dhw'[-ndim:])} c"
    return function, (_drawn(shape, 99), params), (image, axes), image


def _conv2d(size=(8, 6), **options):
    def function(x, w, bias, **rest):
        return conv2d(x, w, bias=bias, activation="relu", **options, **rest)

    arrays = _drawn((8, *size, 4), 0), _drawn((3, 3, 4, 8), 1), _drawn((8,), 2)
    return function, arrays, ("n h w c", "_ _ c f", "f"), "n h w f"


def _conv2d_rows():
    """Rows over the axis "n", and features over "c"."""
    function, arrays, _, _ = _conv2d(padding=1)
    return function, arrays, ("_ n _ _", "_ _ _ c", "c"), "_ n _ c"


def _grouped(**options):
    def function(x, w, bias, **rest):
        return conv2d(x, w, bias=bias, groups=4, padding=1, **options, **rest)

    arrays = _drawn((8, 8, 6, 8), 0), _drawn((3, 3, 2, 16), 1), _drawn((16,), 2)
    return function, arrays, ("n h w c", "_ _ _ c", "c"), "n h w c"


def _depthwise(size=(8, 6), **options):
    def function(x, kernel, bias, implementation=None, **rest):
        name = implementation and ROOMS["depthwise"]
        return depthwise_conv2d(x, kernel, bias, implementation=name, **options, **rest)

    arrays = _drawn((8, *size, 4), 0), _drawn((3, 3, 1, 4), 1), _drawn((4,), 2)
    return function, arrays, ("n h w c", "_ _ _ c", "c"), "n h w c"


def _conv_norm():
    def function(x, w, scale, bias, implementation=None, **rest):
        static = {"padding": ("reflect", 1), "upsample": 2, "activation": "relu"}
        static |= dict.fromkeys(
            ("implementation", "conv_implementation", "norm_implementation"), implementation
        )
        return conv2d_instance_norm(x, w, scale, bias, **static, **rest)

    arrays = _drawn((8, 4, 3, 4), 0), _drawn((3, 3, 4, 8), 1), _drawn((8,), 2), _drawn((8,), 3)
    return function, arrays, ("n _ _ c", "_ _ c f", "f", "f"), "n _ _ f"


def _norm():
    def function(x, scale, bias, **rest):
        return instance_norm(x, scale, bias, activation="relu", residual=x, **rest)

    arrays = _drawn((8, 4, 3, 4), 0), _drawn((4,), 1), _drawn((4,), 2)
    return function, arrays, ("n _ _ c", "c", "c"), "n _ _ c"


def _mlp():
    def function(x, kernels, biases, norm, **rest):
        params = MlpParams(kernels, biases, norm)
        return norm_mlp(x, params, residual=x, **rest)

    arrays = (_drawn((4, 4), 1), _drawn((4, 4), 2)), (_drawn((4,), 3), _drawn((4,), 4))
    norm = _drawn((4,), 5), _drawn((4,), 6)
    axes = ("_ _", "_ _"), ("_", "_"), ("_", "_")
    return function, (_drawn((8, 8, 6, 4), 0), *arrays, norm), ("n h w _", *axes), "n h w _"


def _haar(size=(5, 6)):
    def function(x, **rest):
        bands = haar.wavedec2(x, level=2, **rest)
        back = haar.waverec2([bands[0], None, bands[2]], shape=x.shape[1:3], **rest)
        return (jax.tree.leaves(bands), back)

    return function, (_drawn((8, *size, 4), 0),), ("n h w c",), "n h w c"


def _voxels(hole=2):
    coords = [[0, y, x] for y in range(3) for x in range(3) if y * x != hole]
    return from_coords(coords, _drawn((len(coords), 4), 0), capacity=8)


def _algorithms(implementation):
    return {} if implementation is None else dict.fromkeys(["fwd_algo", "bwd_algo"], "triton")


def _sparse(implementation, depthwise=False):
    voxels, names = _voxels(), _algorithms(implementation)
    if depthwise:
        found, out = kernel_map(voxels, 3)

        def function(x, w):
            return spatially_sparse_depthwise_conv(x, w, found, out.capacity, **names)

        return function, (voxels.features, _drawn((9, 4), 1)), ("_ c", "_ c"), "_ c"

    def function(x, w, bias):
        return spatially_sparse_conv(voxels.with_features(x), w, 3, bias=bias, **names).features

    arrays = voxels.features, _drawn((9, 4, 8), 1), _drawn((8,), 2)
    return function, arrays, ("_ c", "_ c f", "f"), "_ f"


CASES = {
    "wtconv1d": partial(_wtconv, 1, 1, (8, 7, 4)),
    "wtconv2d": partial(_wtconv, 2, 1, (8, 7, 6, 4)),
    "wtconv3d": partial(_wtconv, 3, 1, (8, 4, 3, 2, 4)),
    "conv2d": partial(_conv2d, padding=1),
    "conv2d_strided": partial(_conv2d, padding="SAME", stride=2),
    "conv2d_upsampled": partial(_conv2d, padding=("reflect", 1), upsample=2),
    "instance_norm": _norm,
    "depthwise": _depthwise,
    "conv2d_grouped": _grouped,
    "conv2d_norm": _conv_norm,
    "haar": _haar,
    # Images that are cut: shards of whole cells, of parts of them, smaller than a halo, in strips.
    "wtconv2d_cells": partial(_wtconv, 2, 1, (2, 16, 8, 4)),
    "wtconv2d_uneven": partial(_wtconv, 2, 2, (2, 20, 10, 4)),
    "wtconv2d_far": partial(_wtconv, 2, 2, (2, 16, 8, 4), 5),
    # Deeper levels exchange a low band, along one axis and along two.
    "wtconv2d_deep": partial(_wtconv, 2, 3, (2, 32, 18, 4)),
    "wtconv2d_deeper": partial(_wtconv, 2, 4, (2, 32, 16, 4)),
    "wtconv2d_even_taps": partial(_wtconv, 2, 1, (2, 16, 8, 4), 4),
    "conv2d_cut": partial(_conv2d, (16, 8), padding=1),
    "depthwise_plain": partial(_depthwise, padding=1),
    "depthwise_cut": partial(_depthwise, (16, 8), stride=2, padding=((1, 0), (1, 0))),
    "conv2d_dilated": partial(_conv2d, (16, 8), padding=2, dilation=2),
    "conv2d_downsampled": partial(_conv2d, (16, 16), padding=((1, 0), (1, 0)), stride=2),
    "conv2d_stem": partial(_conv2d, (16, 16), padding=((0, 1), (0, 1)), stride=2),
    "haar_cut": partial(_haar, (16, 8)),
    "conv2d_rows": _conv2d_rows,
    "mlp": _mlp,
}
SPARSE = {"sparse": False, "sparse_depthwise": True}


def _case(name, implementation):
    if name in SPARSE:
        return _sparse(implementation, SPARSE[name])
    function, *rest = CASES[name]()
    return partial(function, implementation=implementation), *rest


def _mesh(sizes, kinds):
    count = int(np.prod(list(sizes.values())))
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=kinds, devices=jax.devices()[:count]
    )


def _spec(axes, sizes):
    return jax.P(*(name if name in sizes else None for name in axes.split()))


def _placed(arrays, axes, sizes, mesh):
    return jax.tree.map(
        lambda array, names: jax.device_put(array, NamedSharding(mesh, _spec(names, sizes))),
        arrays,
        axes,
    )


def _both(function, *arrays):
    y, pullback = jax.vjp(function, *arrays)
    return y, pullback(jax.tree.map(jnp.sin, y))


def _assert_alike(got, want, bitwise, tolerance=1e-5):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if bitwise:
            np.testing.assert_array_equal(g, w)
        else:
            scale = float(np.sqrt(np.mean(np.square(w)))) or 1.0
            np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance * scale)


def splits(name, sizes, implementation, kind):
    """A case over a mesh computes what one device does, and exchanges what it must.

    Args:
        name: Of `CASES` or `SPARSE`.
        sizes: The sizes of the mesh's axes, which are called as those of the arrays.
        implementation: None, for plain JAX, or "triton".
        kind: "Auto", "Explicit", or "stated": Auto axes with `out_sharding=`.
    """
    function, arrays, axes, out = _case(name, implementation)
    want = jax.jit(partial(_both, function))(*arrays)
    type_ = AxisType.Explicit if kind == "Explicit" else AxisType.Auto
    mesh = _mesh(sizes, (type_,) * len(sizes))
    if kind == "stated":
        function = partial(function, out_sharding=NamedSharding(mesh, _spec(out, sizes)))
    placed = tuple(_placed(arrays, axes, sizes, mesh))
    forward = jax.jit(function).lower(*placed).compile()
    both = jax.jit(partial(_both, function)).lower(*placed).compile()
    got, (y, gradients) = forward(*placed), both(*placed)
    summed = "c" in sizes and "f" in out
    # The order in which some CPUs add up products of matrices goes by the sizes of these.
    products = name in ("mlp", "sparse") or name.startswith("conv2d")
    rounded = summed or products or name in ("wtconv2d_deep", "wtconv2d_deeper")
    _assert_alike((got, y), (want[0], want[0]), bitwise=not rounded)
    _assert_alike(gradients, want[1], bitwise=False)
    for leaf in jax.tree.leaves(y):
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, _spec(out, sizes)), leaf.ndim), (
            leaf.sharding
        )
    halos = {"collective-permute"} if {"h", "w"} & sizes.keys() else set()
    found = collectives(forward.as_text()).keys()
    assert found == ({"all-reduce"} if summed else set()) or halos and found <= halos, found
    found = collectives(both.as_text())
    # Sums over the batch are of weights; those over channels and features are of images.
    images = summed or ("f" in sizes and "f" in out)
    assert found.keys() <= {"all-reduce"} | halos, found
    if implementation and not images:
        over = {"n", "h", "w"} & sizes.keys() if not name.startswith("haar") else set()
        # XLA sums a bias over one axis of a mesh after the other.
        most = {0: 0, 1: 1}.get(len(over), 3)
        assert bool(over) <= found.get("all-reduce", (0, 0))[0] <= most, found


def weights_over_the_batch(name, kind):
    """Weights that are split over the axis of the batch (FSDP) are gathered, images are not."""
    function, arrays, axes, _ = _case(name, "triton")
    want = jax.jit(partial(_both, function))(*arrays)
    mesh = _mesh({"n": 4}, (AxisType[kind],))
    features = "f" if name.startswith("conv2d") else "c"
    weights = jax.tree.map(lambda names: names.replace(features, "n"), axes[1:])
    placed = _placed(arrays, (axes[0], *weights), {"n": 4}, mesh)
    both = jax.jit(partial(_both, function)).lower(*placed).compile()
    got = both(*placed)
    _assert_alike(got[0], want[0], bitwise=True)
    _assert_alike(got[1], want[1], bitwise=False)
    elements = sum(a.size for a in jax.tree.leaves(arrays[1:]))
    found = collectives(both.as_text())
    # Once forward and once backward at the most.
    assert found["all-gather"][1] <= 2 * elements, (found, elements)


def products_with_scales(sizes, kind):
    """An implementation's own products and sums are computed of each shard's channels."""
    function, (x, params), axes, _ = _case("wtconv2d", "triton")
    module = OPERATOR.module("triton")
    shards = []

    def told(function):
        def run(*arguments):
            shards.append(jax.tree.leaves(arguments[0])[0].shape[-1])
            return function(*arguments)

        return run

    want = jax.jit(partial(_both, function))(x, params)
    own = {name: told(getattr(scaling, name)) for name in ("products", "scale_sums")}
    own |= {"scale_launches": lambda problem: {"fwd", "bwd"}, "in_turns": lambda problem: True}
    with mock.patch.multiple(module, create=True, **own):
        placed = _placed((x, params), axes, sizes, _mesh(sizes, (AxisType[kind],) * len(sizes)))
        both = jax.jit(partial(_both, function)).lower(*placed).compile()
        _assert_alike(both(*placed), want, bitwise=False)
    assert x.shape[-1] // sizes.get("c", 1) in shards
    assert not {"all-gather", "all-to-all"} & collectives(both.as_text()).keys()


def as_on(platform, name):
    """Plain JAX as another platform has it, images over one Auto axis and filters over another."""
    # A TPU takes it unasked.
    function, arrays, axes, _ = _case(name, "xla" if platform == "gpu" else None)
    want = jax.jit(partial(_both, function))(*arrays)
    mesh = _mesh({"n": 2, "c": 2}, (AxisType.Auto,) * 2)
    image, *weights = axes
    placed = _placed(arrays, (image.replace("c", "_"), *weights), mesh.shape, mesh)
    chip = jax.sharding.AbstractDevice("any", 1, platform=platform)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=chip)):
        traced = jax.jit(partial(_both, function)).trace(*placed)
    got = traced.lower(lowering_platforms=("cpu",)).compile()(*placed)
    _assert_alike(got, want, bitwise=False)


def anyhow(name, implementation, kind, draws):
    """Arrays that lie any way over a mesh of three axes give what one device does, or an error."""
    function, arrays, _, _ = _case(name, implementation)
    want = jax.jit(partial(_both, function))(*arrays)
    mesh = _mesh(dict.fromkeys("abc", 2), (AxisType[kind],) * 3)
    rng, compared = np.random.default_rng(0), 0
    for _ in range(draws):
        specs = jax.tree.map(lambda array: _any_spec(array.shape, mesh, rng), arrays)
        placed = jax.tree.map(
            lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec)), arrays, specs
        )
        try:
            got = jax.jit(partial(_both, function))(*placed)
        except Exception as error:
            # Types of Explicit axes may contradict each other; JAX does not export its error.
            if kind == "Auto" or type(error).__name__ != "ShardingTypeError":
                raise
            continue
        try:
            _assert_alike(got, want, bitwise=False)
        except AssertionError as error:
            raise AssertionError(f"{name} over {specs}: {error}") from error
        compared += 1
    assert compared


def _any_spec(shape, mesh, rng):
    """A spec that splits axes of this shape, each over any axes of a mesh that divide it."""
    entries = [()] * len(shape)
    for name in rng.permutation(mesh.axis_names):
        place = int(rng.integers(-1, len(shape)))
        found = (*entries[place], str(name))
        if place >= 0 and shape[place] % int(np.prod([mesh.shape[one] for one in found])) == 0:
            entries[place] = found
    return jax.P(*(entry or None for entry in entries))


def uneven_batch(kind):
    """A batch that the axis does not divide: XLA splits it over a part of the axis."""
    function, (x, params), _, _ = _case("wtconv2d", "triton")
    x = x[:6]
    want = jax.jit(partial(_both, function))(x, params)
    mesh = _mesh({"n": 4, "m": 2}, (AxisType[kind],) * 2)
    spread = jax.device_put(x, NamedSharding(mesh, jax.P()))

    def run(x, params):
        if kind == "Auto":
            x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, jax.P("n")))
        return _both(function, x, params)

    got = jax.jit(run)(spread, params)
    _assert_alike(got[0], want[0], bitwise=True)
    _assert_alike(got[1], want[1], bitwise=False)


def in_shardings():
    """Shardings that `jax.jit(..., in_shardings=)` alone knows."""
    function, (x, params), _, _ = _case("wtconv2d", "triton")
    mesh = _mesh({"n": 8}, (AxisType.Auto,))
    split = NamedSharding(mesh, jax.P("n"))
    run = jax.jit(function, in_shardings=(split, NamedSharding(mesh, jax.P())))
    compiled = run.lower(x, params).compile()
    assert not collectives(compiled.as_text())
    got = run(x, params)
    assert got.sharding.is_equivalent_to(split, got.ndim)
    _assert_alike(got, function(x, params), bitwise=True)


def mapped(name, implementation, kind):
    """`jax.vmap` of what is split, over examples and over weights."""
    function, arrays, axes, _ = _case(name, implementation)
    sizes = {"n": 4, "c": 2}
    mesh = _mesh(sizes, (AxisType[kind],) * 2)
    more = jax.tree.map(lambda a: np.stack([a, 2 * a]), arrays)
    for over in ((0, *[None] * (len(arrays) - 1)), (0,) * len(arrays)):
        run = partial(_both, jax.vmap(function, over))
        whole = [m if o == 0 else a for a, m, o in zip(arrays, more, over, strict=True)]
        names = [
            jax.tree.map(lambda n: f"_ {n}", n) if o == 0 else n
            for n, o in zip(axes, over, strict=True)
        ]
        placed = _placed(tuple(whole), tuple(names), sizes, mesh)
        got, want = jax.jit(run)(*placed), jax.jit(run)(*whole)
        # Twice the images: their sines turn twice as fast as what is rounded.
        _assert_alike(got, want, bitwise=False, tolerance=5e-5)


@contextmanager
def _as_on_a_gpu():
    """Plain JAX of a wavelet convolution as a GPU has it: one of as many groups as channels."""
    no = lambda: False  # noqa: E731
    with mock.patch.object(plain, "on_cpu", no), mock.patch.object(calls, "on_cpu", no):
        yield


def plain_on_a_gpu(name, sizes):
    """Plain JAX of a GPU, over Auto axes."""
    with _as_on_a_gpu():
        splits(name, sizes, None, "Auto")


def gradients_in_ones_own_map(sizes):
    """Gradients through the caller's own `jax.shard_map` over the batch, of plain JAX of a GPU."""
    function, arrays, axes, _ = _case("wtconv1d", None)
    mesh = _mesh(sizes, (AxisType.Explicit,) * len(sizes))
    placed = _placed(arrays, axes, sizes, mesh)
    specs = jax.P("n"), jax.tree.map(lambda _: jax.P(), arrays[1])
    rest = {"in_specs": specs, "out_specs": jax.P("n"), "axis_names": {"n"}}
    with _as_on_a_gpu():
        run = jax.shard_map(function, mesh=mesh, **rest)
        got = jax.jit(partial(_both, run))(*placed)
        want = jax.jit(partial(_both, function))(*arrays)
    _assert_alike(got, want, bitwise=False)


def stacked_scenes(implementation, kind):
    """`jax.vmap` over scenes that are stacked over the mesh, of each its own map."""
    scenes = jax.tree.map(lambda *each: np.stack(each), *[_voxels(2), _voxels(4)] * 4)
    names = _algorithms(implementation)

    def function(x, w, bias):
        def convolved(features, scene):
            scene = scene.with_features(features)
            return spatially_sparse_conv(scene, w, 3, bias=bias, **names).features

        return jax.vmap(convolved)(x, scenes)

    arrays = scenes.features, _drawn((9, 4, 8), 1), _drawn((8,), 2)
    want = jax.jit(partial(_both, function))(*arrays)
    mesh = _mesh({"n": 4}, (AxisType[kind],))
    placed = _placed(arrays, ("n _ _", "_ _ _", "_"), {"n": 4}, mesh)
    scenes = jax.device_put(scenes, NamedSharding(mesh, jax.P("n")))
    searches = mock.patch.object(maps, "_searches", lambda *_: implementation or "xla")
    with jax.set_mesh(mesh), searches:
        both = jax.jit(partial(_both, function)).lower(*placed).compile()
    # XLA multiplies matrices of fewer scenes in another order than those of all.
    _assert_alike(both(*placed), want, bitwise=False)
    found = collectives(both.as_text())
    assert found.keys() == {"all-reduce"}, found


def remat_in_scan(implementation, kind):
    """Layers in `jax.lax.scan`, computed anew in the backward pass."""
    function, (x, params), axes, _ = _case("wtconv2d", implementation)
    mesh = _mesh({"n": 4, "c": 2}, (AxisType[kind],) * 2)
    layers = jax.tree.map(lambda a: np.stack([a, a]) / 4, params)
    names = axes[0], jax.tree.map(lambda n: f"_ {n}", axes[1])

    def network(x, layers):
        layer = jax.checkpoint(lambda x, params: (function(x, params), None))
        return jax.lax.scan(layer, x, layers)[0]

    placed = _placed((x, layers), names, {"n": 4, "c": 2}, mesh)
    run = jax.jit(partial(_both, network))
    _assert_alike(run(*placed), jax.jit(partial(_both, network))(x, layers), bitwise=False)


def mixed_axes(implementation):
    """A mesh with Explicit and Auto axes."""
    function, arrays, axes, _ = _case("wtconv2d", implementation)
    want = jax.jit(partial(_both, function))(*arrays)
    mesh = _mesh({"n": 4, "c": 2}, (AxisType.Explicit, AxisType.Auto))
    placed = _placed(arrays, axes, {"n": 4, "c": 2}, mesh)
    got = jax.jit(partial(_both, function))(*placed)
    _assert_alike(got[0], want[0], bitwise=True)
    _assert_alike(got[1], want[1], bitwise=False)


def shard_map_over_one(implementation, kind, check):
    """The caller's own `jax.shard_map`, over one of the mesh's two axes."""
    function, arrays, axes, _ = _case("wtconv2d", implementation)
    want = jax.jit(function)(*arrays)
    mesh = _mesh({"n": 4, "c": 2}, (AxisType.Auto, AxisType[kind]))
    placed = _placed(arrays, axes, {"n": 4, "c": 2}, mesh)
    specs = jax.P("n"), jax.tree.map(lambda _: jax.P(), arrays[1])
    run = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=specs,
        out_specs=jax.P("n"),
        axis_names={"n"},
        check_vma=check,
    )
    _assert_alike(jax.jit(run)(*placed), want, bitwise=True)


def refused_shard(kind):
    """A kernel that does not take a shard is left out, and nothing is raised."""
    function, arrays, axes, _ = _case("wtconv2d", None)
    want = jax.jit(function)(*arrays)
    mesh = _mesh({"n": 4}, (AxisType[kind],))
    placed = _placed(arrays, axes, {"n": 4}, mesh)
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    log = logging.getLogger("flash_wtconv")
    log.addHandler(handler)
    REFUSED.add(2)
    try:
        with mock.patch.dict(OPERATOR.rule, cpu=("triton", "xla")):
            forget()
            compiled = jax.jit(lambda *arrays: function(*arrays)).lower(*placed).compile()
    finally:
        REFUSED.clear()
        forget()
        log.removeHandler(handler)
    assert not collectives(compiled.as_text())
    _assert_alike(compiled(*placed), want, bitwise=True)
    # Explicit axes tell the shard's shape before anything is chosen.
    assert any("2 images" in message for message in messages) == (kind == "Auto"), messages


def broken_kernel():
    """A kernel that raises when a shard of it is traced."""
    function, arrays, axes, _ = _case("wtconv2d", "triton")
    module = KERNELS["pallas_kernels.wtconv.triton"]
    mesh = _mesh({"n": 4}, (AxisType.Auto,))
    placed = _placed(arrays, axes, {"n": 4}, mesh)
    forward = module.forward

    def broken(x, *rest, **static):
        if x.shape[0] == 2:
            raise RuntimeError("no such instruction")
        return forward(x, *rest, **static)

    module.forward = broken
    try:
        got = jax.jit(lambda *arrays: function(*arrays))(*placed)
    finally:
        module.forward = forward
    _assert_alike(got, jax.jit(function)(*arrays), bitwise=True)


def exported():
    """A program for 8 devices with Explicit axes, serialised and called."""
    function, arrays, axes, _ = _case("wtconv2d", None)
    mesh = _mesh({"n": 8}, (AxisType.Explicit,))
    placed = _placed(arrays, axes, {"n": 8}, mesh)
    text = jax.export.export(jax.jit(function))(*placed).serialize()
    again = jax.jit(jax.export.deserialize(text).call)
    _assert_alike(again(*placed), jax.jit(function)(*arrays), bitwise=True)


def benchmark(operator, splits):
    """`flash-wtconv bench sharding` on 2 devices: nothing is wrong, whatever is split."""
    from flash_wtconv_jax.bench import sharding

    silent = lambda *_: lambda: None  # noqa: E731
    found = sharding.run(silent, devices=[2], operators=[operator], minutes=30)
    assert not found["left"] and not found["failed"]
    rows = {part: [r for r in found["rows"] if r["part"] == part] for part in sharding.PARTS}
    assert all(row["wrong"] is None for row in found["rows"]), found["rows"]
    assert {row["split"] for row in rows["operators"]} == set(splits)
    assert {row["kind"] for row in rows["operators"]} == {*sharding.KINDS, "shard_map"}
    for part, exchanged in (("training", {"all-reduce"}), ("rows", {"all-reduce", HALOS})):
        explicit, auto = rows[part]
        assert explicit["collectives"].keys() == exchanged, explicit
        assert auto["kind"] == "Auto"


def network(rows, stem, kind):
    """WTConvNeXt of images whose rows are split; 40 rows over 8 devices split unevenly."""
    from flax import nnx

    from flash_wtconv_jax import models

    config = models.ConvNeXtConfig(
        depths=(1, 1), dims=(4, 8), levels=(1, 1), num_classes=2, stem_type=stem, kernel_size=3
    )
    definition, params, rest = nnx.split(models.ConvNeXt(config, rngs=nnx.Rngs(0)), nnx.Param, ...)
    # Away from layer scales of nothing.
    drawn = lambda p: p + 0.1 * _drawn(p.shape, p.size)  # noqa: E731
    params, x = jax.tree.map(drawn, params), _drawn((1, rows, 16, 3), 0)

    def loss(params, x):
        return jnp.sin(nnx.merge(definition, params, rest)(x)).sum()

    both = jax.jit(jax.value_and_grad(loss, (0, 1)))
    mesh = _mesh({"h": 8}, (AxisType[kind],))
    placed = (
        jax.device_put(params, NamedSharding(mesh, jax.P())),
        jax.device_put(x, NamedSharding(mesh, jax.P(None, "h"))),
    )
    _assert_alike(both(*placed), both(params, x), bitwise=False, tolerance=1e-4)
    if kind == "Explicit":
        found = collectives(both.lower(*placed).compile().as_text())
        assert found.keys() == {"all-reduce", HALOS}, found


def layers():
    """`out_sharding=` of the layers, in linen and in nnx."""
    from flax import nnx

    import flash_wtconv_jax as linen
    from flash_wtconv_jax import nnx as ours

    mesh = _mesh({"n": 2}, (AxisType.Auto,))
    x = _drawn((2, 4, 4, 4), 0)
    stated = NamedSharding(mesh, jax.P("n"))
    rngs = nnx.Rngs(0)
    for layer in (
        ours.WTConv2d(4, kernel_size=3, rngs=rngs),
        ours.Conv2d(4, 8, 3, rngs=rngs),
        ours.InstanceNorm(4, rngs=rngs),
    ):
        y = layer(x, out_sharding=stated)
        assert y.sharding.is_equivalent_to(stated, 4)
        _assert_alike(y, layer(x), bitwise=False)
    separable = ours.SeparableWTConv2d(4, 6, 3, rngs=rngs)
    want = separable(x)
    definition, params = nnx.split(separable)

    def run(params, over):
        return nnx.merge(definition, params)(x, over)

    for kind in (AxisType.Auto, AxisType.Explicit):
        over = NamedSharding(_mesh({"n": 2, "f": 2}, (kind,) * 2), jax.P("n", None, None, "f"))
        for each in (run, jax.jit(run, static_argnums=1)):
            y = each(params, over)
            assert y.sharding.is_equivalent_to(over, 4), y.sharding
            _assert_alike(y, want, bitwise=False)
    for layer in (
        linen.WTConv2d(4, kernel_size=3),
        linen.Conv2d(8, 3),
        linen.InstanceNorm(),
        linen.SeparableWTConv2d(4, 6, 3),
    ):
        y, variables = layer.init_with_output(jax.random.key(0), x, out_sharding=stated)
        assert y.sharding.is_equivalent_to(stated, 4)
        _assert_alike(y, layer.apply(variables, x), bitwise=False)
