"""The TPU kernels of WTConv in Pallas' TPU interpreter, which checks races, bounds and poison."""

import math
import subprocess
import sys
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.processes import with_devices
from helpers.wtconv import arrays, assert_oracle
from jax import export
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.wtconv import api, mosaic_tpu, wtconv1d, wtconv2d, wtconv3d
from pallas_kernels.wtconv.api import OPERATOR
from pallas_kernels.wtconv.cases import CASES, Case
from pallas_kernels.wtconv.problem import Problem

pytestmark = pytest.mark.usefixtures("tpu_interpreter")


def taken(case):
    """Whether the kernels are made for a case; the others are refused, which has its own test."""
    return (
        case.ndim == 2
        and case.wavelet == "haar"
        and case.dtype in ("float32", "bfloat16")
        and 0 not in case.batch
    )


EXTRA = (
    # No level; an even kernel, whose transpose pads the other way round.
    Case((9, 10), 0, 3),
    Case((6, 7), 1, 4, batch=(1,), channels=2),
    # One tap, and no level.
    Case((3, 4), 0, 1, "bfloat16"),
    # Three levels, of which the second is odd; an even kernel, a stride and no bias.
    Case((3, 5), 3, 2, batch=(1,), channels=2, stride=2, bias=False),
    # No batch; a kernel larger than the image; many channels.
    Case((2, 1), 1, 3, batch=(), channels=100),
    # More columns than one group of registers; two blocks of channels, the second in part.
    Case((2, 75), 1, 3, batch=(1,), channels=2),
    Case((6, 5), 1, 3, "bfloat16", batch=(2,), channels=130),
)
# Tiles with a halo along rows alone and along both axes, overhanging the image; and MiB of VMEM.
TILED = (
    (Case((21, 20), 2, 3, batch=(1,), channels=2), 2.5),
    (Case((6, 40), 1, 3, "bfloat16", batch=(1,), channels=2), 1),
)
# Images side by side in registers: eight a step of sixteen; all of a batch, more than a register.
TOGETHER = (
    Case((3, 5), 1, 3, batch=(16,), channels=2),
    Case((3, 6), 1, 2, "bfloat16", batch=(2, 4), channels=130),
    Case((7, 5), 2, 3, batch=(16,), channels=2),
    Case((5, 3), 2, 3, batch=(2, 12), channels=130),
    Case((2, 9), 1, 3, "bfloat16", batch=(16,), channels=130),
)
# One case of each edge; the rest is wide, and slow what is long or has no edge of its own.
SMALLEST = {
    "b2-3x4-c3-l0-k1-bfloat16",
    "b-2x1-c100-l1-k3-float32",
}
LONG = {
    "b1-2x75-c2-l1-k3-float32",
    "b-9x6-c3-l2-k3-float32",
    "b1-6x5-c100-l1-k5-float32",
    "b1-6x7-c2-l1-k4-float32",
    "b2-6x7-c3-l2-k3-float32-strided",
    "b2-10x7-c3-l1-k2-bfloat16-s3",
    "b16-3x5-c2-l1-k3-float32",
    "b2-2x3-c3-l2-k3-float32",
    "b2-7x7-c3-l2-k5-bfloat16",
    # One tap is among the smallest, many channels in bfloat16 are side by side in registers below.
    "b2-7x7-c3-l1-k1-bfloat16",
    "b2-6x5-c130-l1-k3-bfloat16",
    # No level is among the smallest.
    "b2-9x10-c3-l0-k3-float32",
    "b16-7x5-c2-l2-k3-float32",
    "b16-2x9-c130-l1-k3-bfloat16",
    "b2x12-5x3-c130-l2-k3-float32",
}


def some(cases):
    """Each of the cases, all but the smallest of each edge for `make test-wide`."""

    def marks(case):
        if case.name in LONG:
            return [pytest.mark.slow]
        return [pytest.mark.wide] * (case.name not in SMALLEST)

    return [pytest.param(case, id=case.name, marks=marks(case)) for case in cases]


def large(case):
    """Whether the interpreter needs ten seconds and more, which other cases' edges do not need."""
    return math.prod((*case.batch, *case.spatial)) > 200


TAKEN = [*(case for case in CASES if taken(case) and not large(case)), *EXTRA]


@pytest.mark.parametrize("case", some(TAKEN))
def test_output_and_gradients_are_the_oracles(case):
    assert_oracle(case, "mosaic_tpu")


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if taken(c) and large(c)], ids=str)
def test_large_images_are_the_oracles(case):
    assert_oracle(case, "mosaic_tpu")


def test_names_of_the_smallest_cases_are_right():
    assert {case.name for case in (*TAKEN, *TOGETHER)} >= SMALLEST | LONG


@pytest.mark.wide
def test_two_cores_do_not_race(races):
    assert_oracle(Case((2, 2), 1, 1, batch=(1,), channels=130), "mosaic_tpu")


@pytest.mark.parametrize(
    ("case", "vmem"),
    [
        pytest.param(*TILED[0], marks=pytest.mark.slow),
        pytest.param(*TILED[1], marks=pytest.mark.wide),
    ],
    ids=str,
)
def test_tiles_with_halos_are_the_oracles(case, vmem, monkeypatch):
    monkeypatch.setattr(mosaic_tpu, "tpu_vmem_bytes", lambda: int(vmem * 2**20))
    sizes = (1, *case.spatial, case.channels), jnp.dtype(case.dtype), case.kernel_size, case.levels
    for weights in (False, True):
        tiling = mosaic_tpu._tilings(*sizes, weights)[0]
        assert max(tiling.halo) > 0
    assert_oracle(case, "mosaic_tpu")


@pytest.mark.parametrize("case", some(TOGETHER))
def test_images_together_are_the_oracles(case):
    shape = math.prod(case.batch), *case.spatial, case.channels
    for weights in (False, True):
        tiling, *_ = mosaic_tpu._tilings(
            shape, jnp.dtype(case.dtype), case.kernel_size, case.levels, weights
        )
        assert tiling.images_per_register % 8 == 0
    assert_oracle(case, "mosaic_tpu")


@pytest.mark.slow
def test_gradients_are_bitwise_reproducible():
    x, params, dy = arrays(Case((5, 6), 1, 3, batch=(3,), channels=2))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def gradients(x, params, dy):
        y, pullback = jax.vjp(partial(wtconv2d, implementation="mosaic_tpu"), x, params)
        return y, pullback(dy)

    chex.assert_trees_all_equal(*(gradients(x, params, dy) for _ in range(2)))


def curved(x, params, implementation):
    return jnp.sin(wtconv2d(x, params, implementation=implementation)).sum()


def test_vmap_over_nothing():
    x, params, _ = arrays(Case((5, 6), 1, 3, batch=(2,), channels=2))
    call = partial(wtconv2d, params=params, implementation="mosaic_tpu")
    chex.assert_shape(jax.vmap(call)(x[None][:0]), (0, *x.shape))


# What differentiates and maps kernels is one for all operators: the norm's is wide.
@pytest.mark.slow
def test_vmap_and_derivatives_of_gradients():
    x, params, _ = arrays(Case((5, 6), 1, 3, batch=(2,), channels=2))

    def second(implementation):
        slope = jax.grad(partial(curved, implementation=implementation))
        squared = lambda x, params: (slope(x, params) ** 2).sum()  # noqa: E731
        return jax.jit(jax.vmap(jax.grad(squared), (0, None)))(x, params)

    want = second("xla")
    chex.assert_trees_all_close(
        second("mosaic_tpu"), want, rtol=1e-7, atol=1e-5 * np.abs(want).max()
    )


def test_remat_lowers_for_a_tpu(monkeypatch):
    """Not run: the interpreter's callbacks are effects, which remat does not take."""
    monkeypatch.setattr(mosaic_tpu, "unavailable", lambda platform: None)
    x, params, _ = arrays(Case((16, 16), 2, 3, batch=(2,), channels=8))
    loss = jax.remat(partial(curved, implementation="mosaic_tpu"))
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=device)
    with pltpu.force_tpu_interpret_mode(None), jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.vmap(jax.grad(loss, (0, 1)), (0, None))).trace(x, params)
        assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()


REFUSED = {
    "1-D signals": (lambda: wtconv1d(jnp.ones((8, 1)), params(1)), "1-D signals"),
    "3-D signals": (lambda: wtconv3d(jnp.ones((4, 4, 4, 1)), params(3)), "3-D signals"),
    "float16": (lambda: wtconv2d(jnp.ones((4, 4, 1), "float16"), params(2)), "float16"),
    "wavelet": (lambda: wtconv2d(jnp.ones((4, 4, 1)), params(2), wavelet="db2"), "'db2'"),
    "kernel": (lambda: wtconv2d(jnp.ones((4, 4, 1)), params(2, 11)), "kernels of 11"),
    "batch": (lambda: wtconv2d(jnp.ones((0, 4, 4, 1)), params(2)), "an empty array"),
}


def params(ndim, kernel_size=3):
    return {"base_kernel": jnp.ones((kernel_size,) * ndim + (1, 1)), "base_scale": jnp.ones(1)}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_done_says_so_and_falls_back(name, monkeypatch):
    call, reason = REFUSED[name]
    monkeypatch.setenv("FLASH_WTCONV_WTCONV_FWD", "mosaic_tpu")
    with pytest.raises(NotImplementedError, match=f"mosaic_tpu: does not take .*{reason}"):
        call()
    monkeypatch.setenv("FLASH_WTCONV_WTCONV_FWD", "mosaic_tpu,xla")
    monkeypatch.setenv("FLASH_WTCONV_WTCONV_BWD", "xla")
    assert call() is not None


@pytest.mark.parametrize("kernel", ["_forward_kernel", "_weight_kernel"])
def test_a_kernel_that_does_not_compile_names_the_variable_of_plain_jax(kernel, monkeypatch):
    def planted(*_):
        raise SyntaxError("planted")

    monkeypatch.setattr(mosaic_tpu, kernel, planted)
    x, params, _ = arrays(Case((2, 3), 1, 1, batch=(1,), channels=1))
    call = jax.grad(lambda x, params: wtconv2d(x, params, implementation="mosaic_tpu").sum(), 1)
    with pytest.raises(SyntaxError, match="planted") as error:
        jax.jit(call)(x, params)
    assert "FLASH_WTCONV_WTCONV_FWD=xla" in error.value.__notes__[0]


def test_none_picks_the_kernel_on_a_tpu_where_it_fits():
    small = Problem((8, 56, 56, 96), jnp.dtype("float32"), 5, 5, "haar")
    large = small._replace(shape=(1, 4096, 4096, 96), levels=9)
    symbolic = small._replace(shape=(8, *export.symbolic_shape("h, w"), 96))
    for direction in ("fwd", "bwd"):
        assert OPERATOR.pick(direction, None, "tpu", small) == "mosaic_tpu"
        assert OPERATOR.pick(direction, None, "tpu", large) == "xla"
        assert OPERATOR.pick(direction, None, "tpu", symbolic) == "xla"
        with pytest.raises(NotImplementedError, match="no tile with its halo of 1024 pixels fits"):
            OPERATOR.pick(direction, "mosaic_tpu", "tpu", large)


def test_without_a_tpu_it_says_what_is_missing():
    with pltpu.force_tpu_interpret_mode(None), pytest.raises(NotImplementedError, match="a TPU"):
        wtconv2d(jnp.ones((4, 4, 1)), params(2), implementation="mosaic_tpu")
    assert api.OPERATOR.pick("fwd", None, "cpu", None) == "xla"


SHARDED = """
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec as P
from pallas_kernels.wtconv import wtconv2d
from pallas_kernels.wtconv.cases import Case, inputs

x, params, dy = jax.tree.map(
    lambda a: jnp.asarray(a, "float32"), inputs(Case((5, 6), 1, 3, batch=(4,), channels=4))
)

def both(function, x, params, dy):
    y, pullback = jax.vjp(function, x, params)
    return y, pullback(dy)

want = both(wtconv2d, x, params, dy)
spec = P("n", None, None, "c")
specs = {name: P(*[None] * (p.ndim - 1), "c") for name, p in params.items()}
mesh = jax.make_mesh((2, 2), ("n", "c"))
place = lambda tree, specs: jax.tree.map(
    lambda a, s: jax.device_put(a, NamedSharding(mesh, s)), tree, specs
)
arrays = place(x, spec), place(params, specs), place(dy, spec)
local = jax.shard_map(
    partial(wtconv2d, implementation="mosaic_tpu"),
    mesh=mesh, in_specs=(spec, specs), out_specs=spec, check_vma={check_vma},
)
with pltpu.force_tpu_interpret_mode():
    got = jax.jit(partial(both, local))(*arrays)
jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-4), got, want)
"""


@pytest.mark.slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_sharded_over_batch_and_channels(check_vma):
    program = SHARDED.replace("{check_vma}", str(check_vma))
    subprocess.run([sys.executable, "-c", program], check=True, env=with_devices(4))
