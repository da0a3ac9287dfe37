"""The Triton kernels of WTConv: interpreted and compiled without a GPU, and run where one is."""

import math
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.triton import INTERPRETED, PARTS, TORCH, compiled_resources, launch, tensor, torch
from helpers.wtconv import (
    arrays,
    assert_oracle,
    assert_reproducible,
    assert_sharded,
    assert_transformed,
    plain_results,
    takes,
)

from pallas_kernels.common.conformance import bounds, expected, worst
from pallas_kernels.dispatch import tuning
from pallas_kernels.wtconv import triton as triton_jax
from pallas_kernels.wtconv import triton_launches, vjp, wtconv2d
from pallas_kernels.wtconv.api import OPERATOR
from pallas_kernels.wtconv.cases import CASES, Case
from pallas_kernels.wtconv.problem import Problem

EXTRA = (
    # A block of channels in part; rows and columns beside which all others are inside.
    Case((9, 34), 1, 3, batch=(1,), channels=33),
    # More bands of weights than registers have room for at once.
    Case((5, 6), 1, 7, batch=(1,), channels=2),
    Case((4, 5), 1, 9, "bfloat16", batch=(1,), channels=2),
    # Two launches for the low bands.
    Case((18, 5), 5, 3, batch=(1,), channels=1),
)
# The edges of the first, which are interpreted in its place, and others on small shapes.
SMALLEST = (
    Case((3, 2), 1, 3, batch=(1,), channels=33),
    Case((3, 34), 1, 3, batch=(1,), channels=1),
    # No bias, and the third dtype.
    Case((3, 2), 1, 3, "float16", batch=(1,), channels=1, bias=False),
)
TAKEN = [case for case in CASES + EXTRA if takes(triton_jax, case)]
SIZED = Case((5, 14), 2, 3, batch=(1,), channels=2)
PROBLEM = Problem((1, 5, 14, 2), np.dtype("float32"), 3, 2, "haar")
SIZES = triton_jax.search_space("fwd", PROBLEM)[1:]


def marks(case):
    """By the time that a case takes in the interpreter, which is milliseconds a program."""
    pixels = math.prod((*case.batch, *case.spatial, case.levels))
    # Below there are five levels in float16, which do not overflow.
    long = pixels > 180 or case.levels == 5 or case.kernel_size >= 7 or case.channels == 100
    if long:
        return [pytest.mark.slow]
    small = pixels <= 100
    small = small and case.channels <= 33 and not case.strided
    return [pytest.mark.wide] * (not small or case in SMALLEST)


QUICK = [
    pytest.param(case, {}, id=case.name, marks=marks(case))
    for case in (*TAKEN, *SMALLEST)
    if case.stride == 1 and case != EXTRA[0]
]
QUICK += [
    pytest.param(
        SIZED,
        sizes,
        id=f"{SIZED.name} {sizes}",
        marks=pytest.mark.slow,
    )
    for sizes in SIZES
]


def folded(case, params):
    """Taps and bias as the launches take them, in float32."""
    k, channels = case.kernel_size, case.channels
    fill = triton_launches.padded(channels) - channels

    def product(*names):
        kernel, scale = (np.asarray(params[name], np.float32) for name in names)
        return torch.tensor(kernel * scale)

    taps = [product("base_kernel", "base_scale")] + [
        product(f"wavelet_kernel_{i}", f"wavelet_scale_{i}") / 4 for i in range(case.levels)
    ]
    pad = torch.nn.functional.pad
    taps = [pad(tap.reshape(k * k, -1, channels), (0, fill, 0, 0, 0, k)) for tap in taps]
    bias = pad(product("base_bias", "base_scale"), (0, fill)) if case.bias else None
    return taps, bias


@INTERPRETED
@pytest.mark.parametrize(("case", "sizes"), QUICK)
def test_interpreted_kernels_are_the_oracles(case, sizes):
    x, params, dy = arrays(case)
    x, dy = (a.reshape(-1, *a.shape[-3:]) for a in (x, dy))
    taps, bias = folded(case, params)
    k = case.kernel_size
    got = {"y": triton_launches.forward(tensor(x), taps, bias, k, launch, **sizes)}
    flipped = [torch.cat([tap[: k * k].flip(0), tap[k * k :]]) for tap in taps]
    got["dx"] = triton_launches.forward(tensor(dy), flipped, None, k, launch, **sizes)
    sums = triton_launches.weight_grad(tensor(x), tensor(dy), k, case.levels, launch, **sizes)
    for i, parts in enumerate(sums):
        whole = torch.cat(parts, 1)
        # The gradient of the folded taps is that of the kernel over its scale.
        name, scale = (f"{'wavelet' if i else 'base'}_{kind}" for kind in ("kernel", "scale"))
        name, scale = (f"{n}_{i - 1}" if i else n for n in (name, scale))
        factor = np.asarray(params[scale], np.float32) / (4 if i else 1)
        got[name] = whole.numpy().reshape(params[name].shape) * factor
    want, allowed = expected(case), bounds(case, plain_results)
    for name, value in got.items():
        value = value.float().numpy() if isinstance(value, torch.Tensor) else value
        assert worst(value.reshape(want[name].shape), want[name]) <= allowed[name], name


@INTERPRETED
@pytest.mark.wide
def test_low_bands_do_not_overflow_float16():
    # Of the third level all low bands are too large for float16, of the fourth too.
    x = torch.full((1, 8, 8, 1), 30000.0, dtype=torch.float16)
    taps = [torch.full((12, bands, 32), 1e-4) for bands in (1, 4, 4, 4, 4)]
    assert triton_launches.forward(x, taps, None, 3, launch).isfinite().all()
    assert all(
        part.isfinite().all()
        for parts in triton_launches.weight_grad(x, x, 3, 4, launch)
        for part in parts
    )


@pytest.mark.wide
@INTERPRETED
def test_tensors_of_any_strides():
    case = Case((3, 6), 2, 3, batch=(2,), channels=3)
    x, params, dy = (jax.tree.map(np.asarray, a) for a in arrays(case))
    taps, bias = folded(case, params)
    whole, other = (tensor(a).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for a in (x, dy))
    y = triton_launches.forward(whole, taps, bias, 3, launch)
    assert torch.equal(y, triton_launches.forward(tensor(x), taps, bias, 3, launch))
    sums = triton_launches.weight_grad(whole, other, 3, 2, launch)
    for parts, wants in zip(
        sums, triton_launches.weight_grad(tensor(x), tensor(dy), 3, 2, launch), strict=True
    ):
        assert all(map(torch.equal, parts, wants))


@TORCH
def test_what_is_not_needed_any_more_is_not_kept():
    """Temporaries are few for the smallest named images too, whose sums are large."""
    live, most = 0, 0

    def freed(size):
        nonlocal live
        live -= size

    def allocate(kernel, arguments, outputs, grid, **constants):
        nonlocal live, most
        made = []
        for shape, dtype in outputs:
            dtype = getattr(torch, str(dtype).removeprefix("torch."))
            made.append(torch.empty(shape, dtype=dtype, device="meta"))
            weakref.finalize(made[-1], freed, made[-1].nbytes)
            live += made[-1].nbytes
        most = max(most, live)
        return made

    x = torch.empty(128, 7, 7, 768, device="meta")
    triton_launches.weight_grad(x, x, 5, 2, allocate)
    assert most <= 1.0 * x.nbytes
    live, most = 0, 0
    triton_launches.forward(x, [x, x, x], None, 5, allocate)
    assert most <= 1.35 * x.nbytes


@pytest.mark.wide
@PARTS
def test_kernels_compile_and_keep_their_sums_in_registers(part, tmp_path):
    resources = compiled_resources("wtconv", part, tmp_path)
    assert len(resources) == {"some": 4, "rest": 12}[part]
    for name, (registers, spilled) in resources.items():
        # A thread of AMD has 512 registers, for level_forward a few short.
        most, spills = (512, 80) if "gfx942" in name else (255, 8)
        assert registers <= most and spilled <= spills, (name, registers, spilled)
    if part == "some":
        # Four blocks of 128 threads on a multiprocessor.
        assert resources["level_forward sm_90 fp16"][0] <= 128


def test_sizes_reach_the_launches(monkeypatch):
    constants = []

    def launch(kernel, arguments, outputs, grid, **told):
        constants.append((kernel.fn.__name__, told["P"], told["num_warps"], told.get("TW")))
        return [jnp.zeros(shape, dtype) for shape, dtype in outputs]

    monkeypatch.setattr(triton_jax, "launch", launch)
    narrow, many = (
        vjp.Plan(triton_jax, (sizes,), "haar", None, None)
        for sizes in (("columns", 2), ("strips", 8))
    )
    x, taps = jnp.ones((2, 16, 16, 3)), (jnp.ones((3, 3, 1, 3)), jnp.ones((3, 3, 4, 3)))
    jax.eval_shape(vjp.timed_function(narrow, "fwd"), x, taps, None)
    assert constants == [("level_forward", 4, 4, 2)]
    constants.clear()
    jax.eval_shape(vjp.timed_function(many, "bwd"), x, taps, None, x)
    assert constants == [
        ("level_forward", 8, 8, 4),
        ("base_weights", 8, 8, 8),
        ("level_weights", 8, 8, 2),
    ]


@pytest.mark.slow
def test_every_size_keeps_its_sums_in_registers(tmp_path):
    resources = compiled_resources("wtconv sizes", "all", tmp_path)
    assert len(resources) == 32
    # Eight of AMD's warps, which are twice as wide, leave a thread too few: for the tuner to see.
    del resources["level_forward strips=8 gfx942 fp32"]
    for name, (registers, spilled) in resources.items():
        assert registers <= 512 and spilled <= 8, (name, registers, spilled)


REFUSED = {
    "1-D signals": {"shape": (2, 8, 4)},
    "float64": {"dtype": np.dtype("float64")},
    "'db2'": {"wavelet": "db2"},
    "kernels of 4": {"kernel_size": 4},
    "kernels of 11": {"kernel_size": 11},
    "0 levels": {"levels": 0},
    "6 levels": {"levels": 6},
    "an empty array": {"shape": (0, 8, 8, 4)},
    "rows of 8 pixels": {"shape": (1, 8, 8, 2**25)},
    "symbolic size": {"shape": (*jax.export.symbolic_shape("b"), 8, 8, 4)},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_done_says_so(reason):
    problem = Problem((2, 8, 8, 4), np.dtype("float32"), 5, 2, "haar")._replace(**REFUSED[reason])
    with pytest.raises(NotImplementedError, match=f"does not take .*{reason}"):
        triton_jax.check("fwd", problem)


def test_without_a_gpu_it_says_what_is_missing():
    with pytest.raises(NotImplementedError, match="triton: needs a GPU, this is a cpu"):
        wtconv2d(
            np.ones((4, 4, 1), np.float32),
            {"base_kernel": np.ones((3, 3, 1, 1)), "base_scale": np.ones(1)},
            implementation="triton",
        )
    assert OPERATOR.pick("fwd", None, "cpu", None) == "xla"


@pytest.mark.gpu
@pytest.mark.parametrize("case", TAKEN, ids=lambda case: case.name)
def test_output_and_gradients_are_the_oracles(case):
    assert_oracle(case, "triton")


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_size_on_a_gpu(sizes, monkeypatch):
    monkeypatch.setattr(triton_jax, "search_space", lambda direction, problem: [sizes])
    with tuning("search"):
        for kernel_size in (3, 5):
            assert_oracle(Case((56, 57), 2, kernel_size, batch=(4,), channels=40), "triton")


@pytest.mark.gpu
def test_gradients_are_bitwise_reproducible():
    assert_reproducible("triton", Case((57, 60), 3, 5, batch=(64,), channels=40))


@pytest.mark.gpu
@pytest.mark.parametrize("check_vma", [True, False])
def test_sharded_over_the_batch(check_vma):
    assert_sharded("triton", check_vma)


@pytest.mark.gpu
def test_transformations():
    assert_transformed("triton")
