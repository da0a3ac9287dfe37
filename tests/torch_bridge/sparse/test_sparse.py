"""Sparse convolutions in PyTorch: the oracle's and JAX's results, derivatives, forms of call."""

import dataclasses
import os
import re
import warnings

import pytest

torch = pytest.importorskip("torch")

import torch_bridge  # noqa: E402
from pallas_kernels import sparse as in_jax  # noqa: E402
from pallas_kernels.common.conformance import bounds, expected, worst  # noqa: E402
from pallas_kernels.common.refusals import KernelError  # noqa: E402
from pallas_kernels.dispatch import forget, tuning  # noqa: E402
from pallas_kernels.sparse import conformance as of_regular  # noqa: E402
from pallas_kernels.sparse.cases import CASES, Case  # noqa: E402
from pallas_kernels.sparse.depthwise import conformance as of_depthwise  # noqa: E402
from pallas_kernels.sparse.depthwise.cases import CASES as DEPTHWISE  # noqa: E402
from pallas_kernels.sparse.depthwise.cases import Case as DepthwiseCase  # noqa: E402
from pallas_kernels.sparse.shapes import room  # noqa: E402
from torch_bridge.runtime import calls  # noqa: E402
from torch_bridge.sparse import conformance, from_coords, ops  # noqa: E402
from torch_bridge.sparse import triton as triton_launch  # noqa: E402

pytestmark = pytest.mark.usefixtures("many_compilations")

CPU = torch.device("cpu")
VARIABLE = "FLASH_WTCONV_TORCH_SPARSE_CONV_"
SMALL = {"block_m": 16, "block_n": 16, "block_k": 32, "ratio_m": 1, "ratio_n": 1, "stages": 1}
"""Tiles so small that there are several of small tables."""


def name(case):
    return case.name


@pytest.fixture
def interpreter():
    """Triton's interpreter, in which the kernels take tensors of the CPU."""
    pytest.importorskip("triton", reason="Triton is for Linux alone")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("a process has Triton's interpreter or a GPU")


def assert_oracle(case, implementation, device=CPU):
    """Output, coordinates and gradients of a case are the oracle's."""
    with tuning("off"):
        got, want = conformance.computed(case, implementation, device), expected(case)
    assert {name: array.shape for name, array in got.items()} == {
        name: array.shape for name, array in want.items()
    }
    allowed = bounds(case, lambda case: conformance.baseline(case, device))
    found = {name: worst(got[name], want[name]) for name in want}
    # NaN is not greater than its bound.
    assert {name: e for name, e in found.items() if not e <= allowed[name]} == {}


def drawn(count=9, channels=4, features=2, *, taps=9, extent=5, device=CPU, dtype=torch.float32):
    """Voxels of two axes and weights at random."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.randperm(extent**2, generator=generator)[:count]
    coords = torch.stack([torch.zeros_like(cells), cells // extent, cells % extent], 1)
    x = torch.randn(count, channels, generator=generator).to(device, dtype)
    w = torch.randn(taps, channels, features, generator=generator).to(device, dtype) / 3
    return from_coords(coords, x, device=device), w


@pytest.mark.parametrize("case", [*CASES, *DEPTHWISE], ids=name)
def test_output_and_gradients_are_the_oracles(case):
    assert_oracle(case, None)


def wide(case, narrow):
    return pytest.param(case, id=case.name, marks=[] if narrow else [pytest.mark.wide])


LOW = Case((9, 4), 5, 4, 8, 3, 2, groups=2, ndim=2, dtype="float16")


@pytest.mark.parametrize(
    "case",
    [
        wide(Case((5, 0, 2), 9, 3, 5, 3, 2, ndim=1), True),
        wide(DEPTHWISE[2], True),
        wide(LOW, False),
        wide(DEPTHWISE[8], False),
        *(wide(case, False) for case in (CASES[1], CASES[15])),
        wide(Case((5, 3), 9, 4, 6, 3, 3, 2, groups=2, ndim=1, bias=True), False),
        wide(Case((5,), 9, 4, 4, ndim=1, generative=True), False),
        wide(Case((5, 3), 9, 4, 4, 3, 2, ndim=1, stride_mode="reduce_and_stride"), False),
    ],
)
def test_interpreted_kernels_are_the_oracles(interpreter, case):
    """The interpreter multiplies the bits of bfloat16, and takes a second for a tile."""
    assert_oracle(case, "triton")


@pytest.mark.wide
def test_kernels_compile_for_the_masks_of_pytorch(tmp_path):
    """Their masks are int32; all else that is launched is what JAX launches."""
    pytest.importorskip("triton", reason="Triton is for Linux alone")
    from helpers.triton import compiled_resources

    resources = compiled_resources("sparse torch", "some", tmp_path)
    assert {name.split()[0] for name in resources} == {
        "conv",
        "depthwise",
        "search",
        "tile_lists",
    }
    assert "conv sm_90 fp16" in resources
    for kernel, (registers, spilled) in resources.items():
        assert registers <= 255 and spilled <= 16, (kernel, registers, spilled)


@pytest.mark.parametrize(
    "case", [wide(case, False) for case in (CASES[1], CASES[5], CASES[15], DEPTHWISE[3])]
)
def test_results_are_jaxs(case):
    from helpers.sparse import results

    room = of_depthwise if isinstance(case, DepthwiseCase) else of_regular
    got, want = conformance.computed(case, "eager"), results(room.computed(case, "xla"), case)
    for what, value in want.items():
        assert worst(got[what], value) <= 1e-5, what


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("depthwise", [False, True], ids=["regular", "depthwise"])
def test_derivatives_of_both_orders(stride, depthwise):
    """At stride 1 a map is its own reverse, at others it is not."""
    voxels, w = drawn(5, 2, 2, extent=3, dtype=torch.float64)
    found, out = torch_bridge.kernel_map(voxels, 3, stride)
    if depthwise:
        w = w[:, :, 0].contiguous()

        def call(x, w):
            return torch_bridge.spatially_sparse_depthwise_conv(x, w, found, out.capacity)
    else:
        bias = torch.ones(2, dtype=torch.float64)

        def call(x, w):
            rest = {"kernel_map": found, "output_voxels": out, "bias": bias}
            given = voxels.with_features(x)
            return torch_bridge.spatially_sparse_conv(given, w, 3, stride, **rest).features

    inputs = voxels.features.requires_grad_(), w.requires_grad_()
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("reduce", ["max", pytest.param("mean", marks=pytest.mark.wide)])
def test_derivatives_of_a_pooling(reduce):
    voxels, w = drawn(7, 2, 2, dtype=torch.float64)
    mode = {"stride_mode": "reduce_and_stride", "stride_reduce": reduce}

    def call(x, w):
        given = voxels.with_features(x)
        return torch_bridge.spatially_sparse_conv(given, w, 3, 2, **mode).features

    inputs = voxels.features.requires_grad_(), w.requires_grad_()
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize(
    "depthwise",
    [pytest.param(False, id="regular", marks=pytest.mark.wide), pytest.param(True, id="depthwise")],
)
def test_the_operators_are_declared_as_they_are(depthwise):
    voxels, w = drawn(3, 2, 2, extent=3)
    found, out = torch_bridge.kernel_map(voxels, 3, 2)
    w = w[:, :, 0].contiguous() if depthwise else w[:, None]
    x, w = voxels.features.requires_grad_(), w.requires_grad_()
    tables, by = (list(found.forward), list(found.backward)), ("ieee", "eager", "eager")
    torch.library.opcheck(ops.apply, (x, w, *tables, "fwd", *by))
    features = 2
    dy = torch.ones(out.capacity, features, requires_grad=True)
    torch.library.opcheck(ops.weight_grad, (x, dy, *tables, list(w.shape), "ieee", "eager"))


def network(voxels, w, first, bias):
    """A strided layer, one that goes back, and a depthwise one."""
    down = torch_bridge.spatially_sparse_conv(voxels, w, 3, 2, bias=bias)
    up = torch_bridge.spatially_sparse_conv(
        down, w.transpose(1, 2), 3, 2, transposed=True, output_voxels=voxels
    )
    found, out = torch_bridge.kernel_map(up, 3)
    y = torch_bridge.spatially_sparse_depthwise_conv(up.features, first, found, out.capacity)
    return out.with_features(y)


def with_gradients(call, voxels, w):
    first, bias = w[:, :, 0].detach() + 1, w[0, 0].detach()
    leaves = [t.detach().clone().requires_grad_() for t in (voxels.features, w, first, bias)]
    out = call(voxels.with_features(leaves[0]), *leaves[1:])
    return out, torch.autograd.grad(out.features.sin().sum(), leaves)


@pytest.mark.slow
def test_compiles_without_a_graph_break():
    """Three maps of unknown sizes, which PyTorch's compiler reckons with for a minute."""
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (9, 20):
        given = drawn(count)
        got, want = with_gradients(compiled, *given), with_gradients(network, *given)
        assert isinstance(got[0], torch_bridge.Voxels) and got[0].tensor_stride == (1, 1)
        torch.testing.assert_close(got[0].features, want[0].features)
        torch.testing.assert_close(got[1], want[1])


@pytest.mark.wide
def test_a_program_makes_a_map_once():
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    sorts = []

    def counted(graph, inputs):
        sorts.append(sum("sort" in str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    def layers(voxels, w, count):
        for _ in range(count):
            voxels = torch_bridge.spatially_sparse_conv(voxels, w, 3)
        return voxels.features

    # As inductor has it: both passes from one graph, in which nothing is there twice.
    split = min_cut_rematerialization_partition
    backend = aot_autograd(fw_compiler=counted, bw_compiler=counted, partition_fn=split)
    voxels, w = drawn(9, 2, 2)
    for count in (1, 2):
        compiled = torch.compile(layers, backend=backend, fullgraph=True)
        compiled(voxels, w.requires_grad_(), count).sum().backward()
    assert sorts[0] > 0 and sorts == [sorts[0], 0, sorts[0], 0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_by_inductor():
    given = drawn(20)
    got = with_gradients(torch.compile(network, fullgraph=True), *given)
    torch.testing.assert_close(got[1], with_gradients(network, *given)[1])


@pytest.mark.wide
def test_a_program_holds_the_kernels_choice_and_tells_of_overflow(interpreter):
    def call(voxels, w):
        return torch_bridge.spatially_sparse_conv(
            voxels, w, 3, 2, out_capacity=2, fwd_algo="triton", bwd_algo="eager"
        )

    voxels, w = drawn(9)
    # Inductor would compile C++ for a minute; "aot_eager" traces the same graphs, both ways.
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with tuning("off"):
        out = compiled(voxels, w.requires_grad_())
        with pytest.raises(ValueError, match="more voxels than a capacity, here 2"):
            out.check()
        with pytest.raises(ValueError, match="more voxels than a capacity, here 2"):
            call(voxels, w)
        want = torch_bridge.spatially_sparse_conv(voxels, w, 3, 2, fwd_algo="eager")
    torch.testing.assert_close(out.features, want.features[:2])
    got, other = (torch.autograd.grad(each.features[:2].sum(), w) for each in (out, want))
    torch.testing.assert_close(got, other)


@pytest.mark.wide
def test_exports():
    voxels, w = drawn(9)

    class Layer(torch.nn.Module):
        def forward(self, coords, x, count):
            given = dataclasses.replace(voxels, coords=coords, features=x, num_valid=count)
            return torch_bridge.spatially_sparse_conv(given, w, 3).features

    inputs = voxels.coords, voxels.features, voxels.num_valid
    program = torch.export.export(Layer(), inputs)
    torch.testing.assert_close(program.module()(*inputs), Layer()(*inputs))
    targets = {str(node.target) for node in program.graph.nodes}
    assert "flash_wtconv.sparse_conv.default" in targets


def test_vmap_over_features_and_weights():
    voxels, w = drawn(9)
    found, out = torch_bridge.kernel_map(voxels, 3)

    def call(x, w):
        given = voxels.with_features(x)
        return torch_bridge.spatially_sparse_conv(given, w, 3, kernel_map=found).features

    many = torch.stack([voxels.features, 2 * voxels.features])
    got = torch.vmap(call, (0, None))(many, w)
    torch.testing.assert_close(got, torch.stack([call(x, w) for x in many]))
    got = torch.vmap(call, (None, 0))(many[0], torch.stack([w, -w]))
    torch.testing.assert_close(got[1], -got[0])


def test_torch_func_is_told_that_it_cannot():
    voxels, w = drawn(9)
    with pytest.raises(NotImplementedError, match=r"use torch\.autograd\.grad"):
        torch.func.grad(lambda w: torch_bridge.spatially_sparse_conv(voxels, w, 3).features.sum())(
            w
        )


def test_autocast_computes_in_its_dtype():
    voxels, w = drawn(9)
    w.requires_grad_()
    want = torch_bridge.spatially_sparse_conv(voxels, w, 3).features
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch_bridge.spatially_sparse_conv(voxels, w, 3).features
        y.sum().backward()
    assert (y.dtype, w.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.float(), want, rtol=0.05, atol=0.05)
    low = torch_bridge.spatially_sparse_conv(voxels, w, 3, compute_dtype=torch.bfloat16).features
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, y.float())


@pytest.mark.parametrize("stride", [1, 2])
def test_what_does_not_count_never_leaks(stride):
    """NaN in rows that hold no voxel, of features and of gradients, and their coordinates."""
    voxels, w = drawn(9)
    poisoned = dataclasses.replace(
        voxels, coords=voxels.coords.clone(), features=voxels.features.clone()
    )
    poisoned.coords[9:] = torch.tensor([0, 1, 1], dtype=torch.int32)
    poisoned.features[9:] = torch.nan

    def run(of):
        x, taps = of.features.detach().requires_grad_(), w.detach().requires_grad_()
        bias = torch.ones(2)
        out = torch_bridge.spatially_sparse_conv(of.with_features(x), taps, 3, stride, bias=bias)
        dy = torch.where(out.valid[:, None], torch.ones_like(out.features), torch.nan)
        return (out.features, *torch.autograd.grad(out.features, (x, taps), dy)), out.valid

    results, valid = run(poisoned)
    for got, want in zip(results, run(voxels)[0], strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert not results[0][~valid].any() and not results[1][9:].any()


@pytest.mark.parametrize("implementation", ["eager", "triton"])
def test_permuted_rows_are_permuted_results_bit_by_bit(implementation, request):
    if implementation == "triton":
        request.getfixturevalue("interpreter")
    voxels, w = drawn(16, 3)
    moved = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    other = from_coords(voxels.coords[moved], voxels.features[moved])
    with tuning("off"):
        one, two = (
            torch_bridge.spatially_sparse_conv(of, w, 3, fwd_algo=implementation).features
            for of in (voxels, other)
        )
    assert torch.equal(one[moved], two)


def test_maps_are_kept_and_passed():
    voxels, w = drawn(9)
    with torch_bridge.sparse_maps():
        found, out = torch_bridge.kernel_map(voxels, 3, 2)
        assert torch_bridge.kernel_map(voxels.with_features(voxels.features * 2), 3, 2)[0] is found
        assert torch_bridge.kernel_map(voxels, 3, 2, output_voxels=out)[0] is found
        # Equal coordinates are others.
        same = dataclasses.replace(voxels, coords=voxels.coords.clone())
        assert torch_bridge.kernel_map(same, 3, 2)[0] is not found
    assert torch_bridge.kernel_map(voxels, 3, 2)[0] is not found
    want = torch_bridge.spatially_sparse_conv(voxels, w, 3, 2)
    passed = {"kernel_map": found, "output_voxels": out}
    again = torch_bridge.spatially_sparse_conv(voxels, w, 3, 2, **passed)
    assert torch.equal(want.features, again.features)
    assert want.tensor_stride == again.tensor_stride == (2, 2)


class TestChoice:
    CALL = CPU, (1, 16, 4), torch.float32, 2, ((3, 3), (1, 1), (1, 1), 1, False)

    def test_the_environment_chooses_each_direction(self, monkeypatch, interpreter):
        assert ops.pick(None, None, *self.CALL) == ("eager else", "eager else")
        with tuning("off"):
            monkeypatch.setenv(f"{VARIABLE}FWD", "triton")
            assert ops.pick(None, None, *self.CALL) == ("triton", "eager else")
            assert ops.pick("eager", None, *self.CALL) == ("eager", "eager else")
            monkeypatch.setenv(f"{VARIABLE}BWD", "[implicit_gemm,triton]")
            assert ops.pick(None, None, *self.CALL) == ("triton", "eager")
            monkeypatch.setenv(f"{VARIABLE}BWD", "nothing")
            with pytest.raises(ValueError, match=rf"{VARIABLE}BWD names \['nothing'\]"):
                ops.pick(None, None, *self.CALL)

    def test_names_of_algorithms(self):
        members = [
            *(in_jax.SPARSE_CONV_FWD_ALGO_MODE.EXPLICIT_GEMM, "implicit_gemm"),
            *(in_jax.SPARSE_CONV_BWD_ALGO_MODE.CUTLASS_IMPLICIT_GEMM, "explicit"),
            *(in_jax.SPARSE_DEPTHWISE_CONV_FWD_ALGO_MODE.IMPLICIT, "auto"),
        ]
        with tuning("off"):
            for member in members:
                several = member if member == "auto" else [member, "eager"]
                assert ops.pick(member, several, *self.CALL) == ("eager", "eager")

    def test_a_name_measures_its_parameters_and_none_measures_nothing(self, searches, monkeypatch):
        # Its interpreter would take a minute.
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        ops.pick(None, None, *self.CALL)
        assert searches == []
        fwd, bwd = ops.pick("eager", "auto", *self.CALL)
        assert searches == ["torch_sparse_conv fwd", "torch_sparse_conv bwd"]
        assert fwd.split()[0] == bwd.split()[0] == "eager"
        ops.pick("eager", ["eager"], *self.CALL)
        assert len(searches) == 2

    def test_parameters_are_measured_in_the_interpreter(self, interpreter, monkeypatch):
        monkeypatch.setattr(triton_launch, "search_space", lambda *_: [SMALL])
        fwd, _ = ops.pick("triton", "eager", *self.CALL)
        assert {*fwd.split()} == {"triton", *(f"{key}={value}" for key, value in SMALL.items())}

    @pytest.mark.wide
    @pytest.mark.parametrize("parameters", [SMALL, {"splits": 2, "ordered": 0, "pairs": 2}])
    def test_parameters_change_no_result(self, interpreter, parameters):
        voxels, w = drawn(20, 3, 5)
        found, _ = torch_bridge.kernel_map(voxels, 3)
        text = " ".join(["triton", *(f"{key}={value}" for key, value in parameters.items())])
        x, w = voxels.features.requires_grad_(), w[:, None].requires_grad_()
        y, want = (ops.convolution(x, w, found, "ieee", (by, by)) for by in (text, "eager"))
        torch.testing.assert_close(y, want)
        got, other = (torch.autograd.grad(z.sin().sum(), (x, w)) for z in (y, want))
        torch.testing.assert_close(got, other)

    def test_what_cannot_run_says_so(self, monkeypatch):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        voxels, w = drawn(9)
        message = r"torch_sparse_conv \(fwd\) cannot run on cpu with fwd_algo='triton'.*needs a GPU"
        with pytest.raises(NotImplementedError, match=message):
            torch_bridge.spatially_sparse_conv(voxels, w, 3, fwd_algo="triton")

    def test_a_kernel_that_does_not_compile(self, interpreter, monkeypatch):
        """The next computes after a warning; where it was named, the error tells the log."""

        def forward(*arguments, **parameters):
            raise KernelError("a Triton kernel does not compile or load", "ValueError: planted")

        monkeypatch.setattr(triton_launch, "forward", forward)
        monkeypatch.setitem(ops.OPERATOR.rule, "cpu", ("triton", "eager"))
        forget()
        voxels, w = drawn(9)
        with tuning("off"):
            want = torch_bridge.spatially_sparse_conv(voxels, w, 3, fwd_algo="eager").features
        try:
            with pytest.warns(RuntimeWarning, match="triton of torch_sparse_conv does not compile"):
                got = torch_bridge.spatially_sparse_conv(voxels, w, 3).features
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                again = torch_bridge.spatially_sparse_conv(voxels, w, 3).features
            assert torch.equal(got, want) and torch.equal(again, want)
            message = "(?s)fwd_algo='triton' of torch_sparse_conv does not compile.*planted"
            with tuning("off"), pytest.raises(KernelError, match=message):
                torch_bridge.spatially_sparse_conv(voxels, w, 3, fwd_algo="triton")
        finally:
            calls.FAILED.clear()
            forget()


WRONG = {
    "voxels: expected torch_bridge.Voxels, got Tensor": {"voxels": torch.ones(2, 2)},
    "weight: expected [K, C_in, C_out] = [9, 4, C_out], got shape (3, 4, 2)": {
        "weight": torch.ones(3, 4, 2)
    },
    "weight: expected the features' dtype, torch.float32, got torch.float64": {
        "weight": torch.ones(9, 4, 2, dtype=torch.float64)
    },
    "weight: is on meta, expected cpu": {"weight": torch.ones(9, 4, 2, device="meta")},
    "bias: expected shape (2,), got (3,)": {"bias": torch.ones(3)},
    "groups=3: expected a divisor of the 4 channels": {"groups": 3},
    "stride_mode='pool': expected one of stride_only": {"stride_mode": "pool"},
    "stride_reduce='min': expected one of max, mean, sum": {"stride_reduce": "min"},
    "precision='lowest': expected one of": {"precision": "lowest"},
    "compute_dtype=torch.int8: expected one of": {"compute_dtype": torch.int8},
    "kernel_size=(3, 3, 3): expected an integer >= 1, or 2 of them": {"kernel_size": (3, 3, 3)},
    "output_voxels=None: a transposed convolution": {"transposed": True},
    "output_rule='same': expected one of floor, full": {"output_rule": "same"},
    "fwd_algo names ['cudnn'], but torch_sparse_conv has": {"fwd_algo": "cudnn"},
    "bwd_algo is empty": {"bwd_algo": ()},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    voxels, w = drawn(9)
    arguments = {"voxels": voxels, "weight": w.requires_grad_(), "kernel_size": 3} | WRONG[message]
    with pytest.raises(ValueError, match=re.escape(message)):
        torch_bridge.spatially_sparse_conv(**arguments)


def test_wrong_arguments_of_the_depthwise_function_and_maps():
    voxels, w = drawn(9)
    found, out = torch_bridge.kernel_map(voxels, 3)
    call = torch_bridge.spatially_sparse_depthwise_conv
    with pytest.raises(ValueError, match=r"in_features: expected \[in_capacity, C\] of 16 rows"):
        call(voxels.features[:3], w[:, :, 0], found, 16)
    with pytest.raises(ValueError, match=r"weight: expected \[K, C\] = \(9, 4\), got shape \(9, 2"):
        call(voxels.features, w[:, 0], found, 16)
    with pytest.raises(ValueError, match="num_out_coords=17: expected at most 16"):
        call(voxels.features, w[:, :, 0], found, 17)
    with pytest.raises(ValueError, match="kernel_map: expected a torch_bridge.KernelMap"):
        call(voxels.features, w[:, :, 0], (found, out), 16)
    with pytest.raises(ValueError, match=r"kernel_map: is that of Window.*expected Window"):
        torch_bridge.spatially_sparse_conv(voxels, w, 3, kernel_dilation=2, kernel_map=found)


def layer_of_a_room(dtype, groups, stride, rows=20_000):
    """The function of x and w of a layer over a room, by implementation, and its tensors."""
    empty = torch.zeros((rows, 0), device="cuda")
    voxels = from_coords(room(rows), empty, capacity=rows)
    found, out = torch_bridge.kernel_map(voxels, 3, stride)
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(rows, 64, generator=generator, device="cuda").to(dtype)
    w = torch.randn(27, groups, 64 // groups, 128 // groups, generator=generator, device="cuda")
    w = (w / 24).to(dtype)

    def run(implementation, x, w):
        algorithms = implementation, implementation
        with tuning("off"):
            if groups == 64:
                own = w[:, :, 0, 0]
                return torch_bridge.spatially_sparse_depthwise_conv(
                    x, own, found, rows, *algorithms
                )
            return torch_bridge.spatially_sparse_conv(
                dataclasses.replace(voxels, features=x),
                w if groups > 1 else w[:, 0],
                *(3, stride),
                groups=groups,
                kernel_map=found,
                output_voxels=out,
                fwd_algo=implementation,
                bwd_algo=implementation,
            ).features

    return run, x.requires_grad_(), w.requires_grad_()


def passes(run, implementation, x, w):
    y = run(implementation, x, w)
    return y, *torch.autograd.grad(y, (x, w), y.detach().cos())


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, *DEPTHWISE], ids=name)
@pytest.mark.parametrize("implementation", [None, "eager"])
def test_every_case_on_a_gpu(case, implementation):
    assert_oracle(case, implementation, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 2, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_layers_of_a_room_are_eagers(dtype, groups, stride):
    run, x, w = layer_of_a_room(dtype, groups, stride)
    # The last bit of a bfloat16 is 1/128 of a value, and some are five times the rest.
    allowed = {torch.bfloat16: 0.08, torch.float16: 0.01, torch.float32: 5e-4}[dtype]
    results = (passes(run, by, x, w) for by in ("triton", "eager"))
    for got, want in zip(*results, strict=True):
        off = (got.float() - want.float()).abs().max()
        assert off <= allowed * want.float().square().mean().sqrt()


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["triton", "eager"])
@pytest.mark.parametrize("groups", [1, 64])
def test_a_hundred_backward_passes_are_the_same_bits(groups, implementation):
    run, x, w = layer_of_a_room(torch.float16, groups, 2)
    first = passes(run, implementation, x, w)
    for _ in range(100):
        assert all(map(torch.equal, passes(run, implementation, x, w), first))


@pytest.mark.gpu
# PyTorch's compiler warns of itself, and of products that are rounded less than they could be.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:TensorFloat32:UserWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_on_a_gpu(backend):
    given = drawn(200, 32, 32, extent=40, device=torch.device("cuda"))
    got = with_gradients(torch.compile(network, fullgraph=True, backend=backend), *given)
    want = with_gradients(network, *given)
    for one, other in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_a_cuda_graph_captures_it():
    voxels, w = drawn(200, 32, 32, extent=40, device=torch.device("cuda"))
    with torch.no_grad():
        want = torch_bridge.spatially_sparse_conv(voxels, w, 3, 2).features
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = torch_bridge.spatially_sparse_conv(voxels, w, 3, 2).features
        y.zero_()
        graph.replay()
    torch.testing.assert_close(y, want)


@pytest.mark.gpu
def test_maps_of_a_gpu_are_the_cpus():
    for kernel, stride in ((3, 1), (2, 2), (5, 3)):
        one, other = (
            torch_bridge.kernel_map(
                from_coords(room(20_000), torch.zeros((20_000, 0), device=device)), kernel, stride
            )
            for device in ("cpu", "cuda")
        )
        assert torch.equal(one[1].coords, other[1].coords.cpu())
        for a, b in zip(one[0].forward, other[0].forward, strict=True):
            assert torch.equal(a, b.cpu())
