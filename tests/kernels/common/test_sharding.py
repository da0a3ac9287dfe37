"""Operators over a mesh, on 8 host devices of one process that all of these tests share."""

import json
import logging
import os
import socket
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from helpers.meshes import Worker
from helpers.processes import with_devices
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels.common import sharding
from pallas_kernels.conv2d import conv2d
from pallas_kernels.wtconv import wtconv2d

PARAMS = {"base_kernel": jnp.ones((3, 3, 1, 4)), "base_scale": jnp.ones(4)}
X = jnp.ones((8, 4, 4, 4))


@pytest.fixture(scope="module")
def devices():
    with Worker() as worker:
        yield worker


def rows(table):
    return [pytest.param(*row, id="-".join(map(str, row))) for row in table]


N, C, NC = {"n": 8}, {"c": 4}, {"n": 4, "c": 2}
NF = {"n": 4, "f": 2}
FIRST = [
    ("wtconv2d", NC, "triton", "Auto"),
    ("wtconv2d", NC, "triton", "Explicit"),
    ("conv2d", NF, "triton", "Explicit"),
]
H, HW = {"h": 4}, {"h": 4, "w": 2}
# Every operator, every way in, plain JAX and a kernel; `slow` has each with each.
PAIRS = [
    ("wtconv1d", NC, None, "Explicit"),
    ("conv2d", C, "triton", "Auto"),
    ("conv2d_upsampled", NF, "triton", "stated"),
    ("conv2d_grouped", NC, "triton", "Auto"),
    ("conv2d_norm", NF, "triton", "Explicit"),
    ("depthwise", NC, "triton", "Auto"),
    ("instance_norm", NC, "triton", "Explicit"),
    ("haar", NC, "triton", "Auto"),
    ("sparse", {"f": 2}, "triton", "Auto"),
    ("sparse_depthwise", C, "triton", "Explicit"),
]
DENSE = ("conv2d", "conv2d_upsampled")
EVERY = [
    (name, sizes, implementation, kind)
    for name, splits in {
        "wtconv1d": (N, C, NC),
        "wtconv2d": (N, C, NC),
        "wtconv3d": (N, C, NC),
        "conv2d": (N, C, NF, {"f": 8}),
        "conv2d_strided": (N, NF),
        "conv2d_upsampled": (N, {"c": 2}, NF),
        "conv2d_grouped": (N, C, NC),
        "conv2d_norm": (N, {"f": 4}, NF),
        "depthwise": (N, C, NC),
        "instance_norm": (N, C, NC),
        "haar": (N, C, NC),
        "sparse": (C, {"f": 8}),
        "sparse_depthwise": (C,),
    }.items()
    for sizes, implementation, kind in product(
        splits, (None, "triton"), ("Auto", "Explicit", "stated")
    )
    # Nothing states that channels are split that no output has, and sparse has nothing to state.
    if kind != "stated" or not (name.startswith("sparse") or (name in DENSE and "c" in sizes))
]


@pytest.mark.parametrize(("name", "sizes", "implementation", "kind"), rows(FIRST))
def test_a_mesh_changes_nothing(devices, name, sizes, implementation, kind):
    devices("splits", name, sizes, implementation, kind)


@pytest.mark.wide
@pytest.mark.parametrize(("name", "sizes", "implementation", "kind"), rows(PAIRS))
def test_no_operator_on_no_axes_changes(devices, name, sizes, implementation, kind):
    devices("splits", name, sizes, implementation, kind)


CUT = [
    (name, sizes, "triton", kind)
    for name, kinds in {
        "wtconv2d_cells": ("Auto", "Explicit", "stated"),
        "wtconv2d_uneven": ("Auto", "Explicit"),
        "wtconv2d_far": ("Auto", "Explicit"),
        "wtconv2d_deep": ("Auto", "Explicit"),
        "wtconv2d_deeper": ("Explicit",),
        "wtconv2d_even_taps": ("Auto", "Explicit"),
        "conv2d_cut": ("Auto", "Explicit", "stated"),
        "conv2d_dilated": ("Explicit",),
        "conv2d_downsampled": ("Auto", "Explicit", "stated"),
        "conv2d_stem": ("Explicit",),
        "depthwise_cut": ("Auto", "Explicit", "stated"),
        "haar_cut": ("Auto", "Explicit", "stated"),
    }.items()
    for sizes, kind in product((H, HW, {"n": 2, "h": 2}), kinds)
]


@pytest.mark.wide
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("wtconv2d_uneven", "Explicit"),
        ("conv2d_downsampled", "Auto"),
        ("depthwise_cut", "Auto"),
    ],
)
def test_images_that_are_cut(devices, name, kind):
    devices("splits", name, HW, "triton", kind)


@pytest.mark.wide
def test_rows_of_images_that_are_cut(devices):
    devices("splits", "mlp", {"n": 2, "h": 2, "w": 2}, None, "Explicit")


@pytest.mark.wide
def test_plain_jax_of_a_gpu_on_auto_axes(devices):
    # XLA itself would gather the bands of all channels.
    devices("plain_on_a_gpu", "wtconv3d", NC)


@pytest.mark.parametrize("sizes", [{"n": 2}, {"n": 2, "c": 2}])
def test_gradients_of_a_map_of_ones_own(devices, sizes):
    # The transpose of taps that all devices share would be summed over them, and then once more.
    devices("gradients_in_ones_own_map", sizes)


@pytest.mark.wide
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_scenes_that_are_stacked(devices, kind):
    devices("stacked_scenes", "triton", kind)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sizes", "implementation", "kind"), rows(CUT))
def test_images_that_are_cut_every_way(devices, name, sizes, implementation, kind):
    devices("splits", name, sizes, implementation, kind)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sizes", "implementation", "kind"), rows(EVERY))
def test_every_operator_every_way(devices, name, sizes, implementation, kind):
    devices("splits", name, sizes, implementation, kind)


def test_a_kernel_that_refuses_a_shard_is_left_out(devices):
    devices("refused_shard", "Auto")


@pytest.mark.slow
def test_a_kernel_that_refuses_the_shards_of_explicit_axes_is_left_out(devices):
    devices("refused_shard", "Explicit")


@pytest.mark.wide
def test_a_kernel_that_raises_on_a_shard_is_left_out(devices):
    devices("broken_kernel")


@pytest.mark.parametrize(
    ("sizes", "kind"),
    [
        ({"n": 2, "c": 2}, "Auto"),
        pytest.param({"n": 2, "c": 2}, "Explicit", marks=pytest.mark.wide),
        pytest.param({"n": 4}, "Auto", marks=pytest.mark.slow),
        pytest.param({"n": 4}, "Explicit", marks=pytest.mark.slow),
    ],
)
def test_products_with_scales(devices, sizes, kind):
    devices("products_with_scales", sizes, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("name", ["wtconv2d", "conv2d"])
def test_weights_over_the_batch(devices, name, kind):
    devices("weights_over_the_batch", name, kind)


@pytest.mark.parametrize(
    ("platform", "name"),
    [
        pytest.param("gpu", "wtconv2d", marks=pytest.mark.wide),
        pytest.param("gpu", "conv2d_rows", marks=pytest.mark.wide),
        pytest.param("tpu", "wtconv2d", marks=pytest.mark.slow),
        pytest.param("tpu", "depthwise_plain", marks=pytest.mark.slow),
    ],
)
def test_filters_that_lie_over_another_axis_than_the_batch(devices, platform, name):
    # XLA's own gradient of a grouped convolution's filters is wrong here, by all of it, and so is
    # any convolution whose rows are split over another axis than its filters.
    devices("as_on", platform, name)


ANYHOW = "wtconv2d_uneven", "wtconv2d_deeper", "conv2d_cut", "conv2d_downsampled", "depthwise_cut"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("implementation", [None, "triton"])
@pytest.mark.parametrize("name", [*ANYHOW, "conv2d_grouped", "haar_cut", "instance_norm"])
def test_arrays_that_lie_anyhow(devices, name, implementation, kind):
    devices("anyhow", name, implementation, kind, 6)


@pytest.mark.wide
def test_a_batch_that_does_not_divide(devices):
    devices("uneven_batch", "Auto")


@pytest.mark.slow
def test_a_batch_that_explicit_axes_do_not_divide(devices):
    devices("uneven_batch", "Explicit")


@pytest.mark.wide
def test_shardings_that_jit_alone_is_told(devices):
    devices("in_shardings")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("implementation", [None, "triton"])
@pytest.mark.parametrize("name", ["wtconv2d", "conv2d", "haar"])
def test_vmap(devices, name, implementation, kind):
    devices("mapped", name, implementation, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("implementation", [None, "triton"])
def test_remat_in_scan(devices, implementation, kind):
    devices("remat_in_scan", implementation, kind)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", [None, "triton"])
def test_explicit_and_auto_axes(devices, implementation):
    devices("mixed_axes", implementation)


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("implementation", [None, "triton"])
def test_shard_map_over_one_of_two_axes(devices, implementation, kind, check_vma):
    devices("shard_map_over_one", implementation, kind, check_vma)


@pytest.mark.slow
def test_networks_of_images_whose_rows_are_split(devices):
    # XLA's own gradient of a stem's filters is wrong here, by 19 times their RMS.
    devices("network", 40, "patch", "Auto")
    devices("network", 64, "overlap", "Explicit")


@pytest.mark.slow
def test_the_benchmark_finds_nothing_wrong(devices):
    devices("benchmark", "conv2d groups", "nch")


@pytest.mark.slow
def test_export_and_layers(devices):
    devices("exported")
    devices("layers")


def test_without_a_mesh_there_is_none():
    function = partial(wtconv2d, params=PARAMS)
    text = str(jax.make_jaxpr(jax.grad(lambda x: function(x).sum()))(X))
    assert not any(name in text for name in ("shard_map", "custom_partitioning", "reshard"))


def on_tpus(kind):
    chip = AbstractDevice("TPU v5 lite", 1, platform="tpu")
    mesh = AbstractMesh((4,), ("data",), axis_types=(kind,), abstract_device=chip)
    return jax.sharding.use_abstract_mesh(mesh)


def test_on_auto_axes_of_tpus_plain_jax_computes_what_is_not_stated(caplog):
    sharding._SAID.clear()
    with on_tpus(AxisType.Auto), caplog.at_level(logging.WARNING, "flash_wtconv"):
        jax.eval_shape(partial(wtconv2d, params=PARAMS), X)
        jax.eval_shape(partial(wtconv2d, params=PARAMS), X)
        jax.eval_shape(conv2d, X, jnp.ones((1, 1, 4, 4)))
        with pytest.raises(NotImplementedError, match=r"mosaic_tpu.*out_sharding=jax\.P"):
            jax.eval_shape(partial(wtconv2d, params=PARAMS, implementation="mosaic_tpu"), X)
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.startswith("wtconv: plain JAX computes it, since on Auto axes")


def test_wrong_shardings_are_named():
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))
    run = partial(wtconv2d, X, PARAMS)
    with pytest.raises(ValueError, match=r"out_sharding=P.*: there is no mesh"):
        run(out_sharding=jax.P("data"))
    for wrong, message in [
        ("data", "expected a jax.P"),
        (jax.P("model"), r"names \['model'\], but the mesh has the axes \['data'\]"),
        (
            jax.P(None, "data"),
            r"splits h of the output's axes \[n, h, w, c\], of which n, c can",
        ),
        (jax.P(*[None] * 4, "data"), "has 5 entries, but the output has the axes"),
    ]:
        with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match=message):
            run(out_sharding=wrong, wavelet="db2")
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(ValueError, match="an axis of 3 over 2"),
    ):
        wtconv2d(X[:3], PARAMS, out_sharding=jax.P("data"))


PROCESS = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
from pallas_kernels.wtconv import wtconv2d
assert jax.device_count() == 4 and jax.local_device_count() == 2
mesh = jax.make_mesh((2, 2), ("n", "c"))
x = np.random.default_rng(0).standard_normal((4, 6, 5, 4)).astype("float32")
params = {"base_kernel": np.ones((3, 3, 1, 4), "float32"), "base_scale": np.ones(4, "float32"),
          "wavelet_kernel_0": np.ones((3, 3, 4, 4), "float32"),
          "wavelet_scale_0": np.ones((4, 4), "float32")}
place = lambda a, *spec: jax.make_array_from_callback(
    a.shape, NamedSharding(mesh, jax.P(*spec)), lambda i: a[i])
args = place(x, "n", None, None, "c"), {k: place(v) for k, v in params.items()}
def both(x, p):
    y, pullback = jax.vjp(wtconv2d, x, p)
    return y, pullback(jnp.sin(y))
got, want = jax.jit(both)(*args), jax.jit(both)(x, params)
for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    for shard in g.addressable_shards:
        np.testing.assert_allclose(shard.data, np.asarray(w)[shard.index], rtol=1e-5, atol=1e-3)
"""


@pytest.mark.slow
def test_two_processes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-c", PROCESS, address]
    both = [subprocess.Popen([*command, str(i)], env=with_devices(2)) for i in range(2)]
    assert [process.wait(timeout=600) for process in both] == [0, 0]


GPUS = """
import sys
import helpers.quick
from functools import partial
from pathlib import Path
import jax, jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from flash_wtconv_jax.bench.collectives import collectives
from pallas_kernels.wtconv import mosaic_gpu, wtconv2d

# There is no GPU to ask for its compute capability.
mosaic_gpu.unavailable = lambda platform: None
h200 = AbstractDevice("NVIDIA H200", 132, platform="gpu")

def both(x, p):
    y, pullback = jax.vjp(partial(wtconv2d, implementation="mosaic_gpu"), x, p)
    return y, pullback(jnp.sin(y))

for kind, second in (("Explicit", "c"), ("Auto", "h")):
    mesh = jax.make_mesh((4, 2), ("n", second), axis_types=(AxisType[kind],) * 2)
    def array(shape, *axes):
        spec = jax.P(*(axis if axis in mesh.shape else None for axis in axes))
        return jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, spec))
    x = array((8, 32, 32, 128), *"nhwc")
    shapes = {"base_kernel": (3, 3, 1, 128), "base_scale": (128,),
              "wavelet_kernel_0": (3, 3, 4, 128), "wavelet_scale_0": (4, 128)}
    params = {name: array(shape) for name, shape in shapes.items()}
    folder = Path(sys.argv[1], kind + second)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h200)):
        lowered = jax.jit(both).trace(x, params).lower(lowering_platforms=("cuda",))
        # A CPU partitions the program, and then has no such kernels.
        try:
            lowered.compile(compiler_options={"xla_dump_to": str(folder)})
        except jax.errors.JaxRuntimeError as error:
            assert "No FFI handler registered for mosaic_gpu" in str(error), error
    (text,) = (path.read_text() for path in folder.glob("*cpu_after_optimizations.txt"))
    assert text.count('custom_call_target="mosaic_gpu') >= 3, text
    found = collectives(text)
    halos = {"collective-permute"} if second == "h" else set()
    # The taps' gradients go to where the taps lie, on every device.
    gathered = found.pop("all-gather", (0, 0))[1]
    assert gathered <= sum(p.size for p in params.values()), (kind, second, gathered)
    assert set(found) == {"all-reduce"} | halos, (kind, second, found)
"""


@pytest.mark.wide
def test_gpu_programs_gather_no_image(tmp_path):
    paths = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-c", GPUS, str(tmp_path)]
    subprocess.run(command, check=True, env=with_devices(8) | {"PYTHONPATH": paths})


@pytest.mark.slow
def test_programs_for_two_h200s_take_the_kernels_of_one():
    pytest.importorskip("jax_cuda13_plugin", reason="jax-cuda13-plugin and jax-cuda13-pjrt")
    paths = os.pathsep.join(map(str, (Path(__file__).parents[2], *filter(None, sys.path))))
    # There is no cuDNN, of which nothing is needed.
    rest = {"PYTHONPATH": paths, "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"}
    rest["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"
    command = [sys.executable, "-m", "helpers.sharding_compiled", "wtconv1d", "wtconv3d"]
    ran = subprocess.run(
        command, check=True, env=with_devices(2) | rest, stdout=subprocess.PIPE, text=True
    )
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(rows) == 14
    for label, found, kernels, one, image in rows:
        assert found.get("all-gather", (0, 0))[1] < image, (label, found)
        assert one.keys() <= kernels.keys(), (label, one, kernels)


TPUS = """
import sys
import jax, jax.numpy as jnp
from functools import partial
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from flash_wtconv_jax.bench.collectives import collectives
from pallas_kernels.wtconv import wtconv2d

chip, kind = sys.argv[1:]
devices = topologies.get_topology_desc(platform="tpu", topology_name=chip).devices
mesh = Mesh([*devices][:4], ("n",), axis_types=(AxisType[kind],))
split, whole = (NamedSharding(mesh, jax.P(*spec)) for spec in (["n"], []))
x = jax.ShapeDtypeStruct((8, 28, 28, 128), "float32", sharding=split)
shapes = {"base_kernel": (3, 3, 1, 128), "base_scale": (128,),
          "wavelet_kernel_0": (3, 3, 4, 128), "wavelet_scale_0": (4, 128)}
params = {k: jax.ShapeDtypeStruct(s, "float32", sharding=whole) for k, s in shapes.items()}
stated = split if kind == "Auto" else None
run = partial(wtconv2d, implementation="mosaic_tpu", out_sharding=stated)
def both(x, p):
    y, pullback = jax.vjp(run, x, p)
    return y, pullback(jnp.sin(y))
device = jax.sharding.AbstractDevice(devices[0].device_kind, 1, platform="tpu")
with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
    compiled = jax.jit(both).lower(x, params).compile()
text = compiled.as_text()
assert "tpu_custom_call" in text
found = collectives(text)
assert set(found) == {"all-reduce"} and found["all-reduce"][0] == 1, found
"""


LARGE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding
from pallas_kernels.wtconv import wtconv2d

devices = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x4").devices
mesh = Mesh([*devices], ("rows",), axis_types=(AxisType.Explicit,))
split, whole = (NamedSharding(mesh, jax.P(*spec)) for spec in ([None, "rows"], []))
x = jax.ShapeDtypeStruct((1, 16384, 16384, 64), "bfloat16", sharding=split)
shapes = {"base_kernel": (5, 5, 1, 64), "base_scale": (64,), "base_bias": (64,)}
for i in range(3):
    shapes |= {f"wavelet_kernel_{i}": (5, 5, 4, 64), f"wavelet_scale_{i}": (4, 64)}
params = {k: jax.ShapeDtypeStruct(s, "float32", sharding=whole) for k, s in shapes.items()}
def both(x, p):
    y, pullback = jax.vjp(wtconv2d, x, p)
    return y, pullback(y)
chip = AbstractDevice(devices[0].device_kind, 1, platform="tpu")
with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=chip)):
    compiled = jax.jit(both).lower(x, params).compile()
text = compiled.as_text()
assert "tpu_custom_call" in text and "all-gather" not in text
temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**30
print(f"{temporaries:.1f} GiB of temporaries a chip")
assert temporaries <= 17, temporaries
"""


def compile_for_tpus(code, *arguments):
    pytest.importorskip("libtpu", reason="libtpu, the TPU's compiler, is for Linux alone")
    flags = {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    flags["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env=os.environ | flags)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("chip", ["v5e:2x2", "v6e:2x2"])
def test_tpu_programs_exchange_one_sum(chip, kind):
    compile_for_tpus(TPUS, chip, kind)


@pytest.mark.slow
def test_an_image_of_16384_pixels_a_side_fits_on_eight_tpus():
    compile_for_tpus(LARGE)
