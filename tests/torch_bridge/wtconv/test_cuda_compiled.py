"""The CUDA kernels compiled by NVRTC for several GPUs, which needs none, and run where one is."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

import torch_bridge  # noqa: E402
from pallas_kernels.common import nvrtc  # noqa: E402
from pallas_kernels.common.cuda import Device, source_text  # noqa: E402
from pallas_kernels.wtconv import cuda_launches  # noqa: E402
from pallas_kernels.wtconv.cuda_launches import Images  # noqa: E402
from pallas_kernels.wtconv.shapes import GPU_SHAPES  # noqa: E402

COMPILER = pytest.mark.skipif(
    sys.platform != "linux", reason="the test extra has NVRTC for Linux alone"
)
TARGETS = {
    "sm_80": ("float16", Device(shared=166912, multiprocessors=108)),
    "sm_90": ("float32", Device(shared=232448, multiprocessors=132)),
    "sm_100": ("bfloat16", Device(shared=232448, multiprocessors=148)),
}


def variants(target, kernel_size, channels_last, offered=({},)):
    """The variants that are compiled for the named shapes, forward and backward."""
    dtype, device = TARGETS[target]
    found = []
    # A plane a block and tiles are what differs most; the suite need not compile all for each k.
    names = GPU_SHAPES if kernel_size == 5 else ("convnext_t_stage1", "image_224")
    for shape in map(GPU_SHAPES.__getitem__, names):
        sizes = shape.batch, shape.height, shape.width, shape.channels
        images = Images(sizes, dtype, channels_last)
        for kernel in ("forward", "weights"):
            what = kernel, images, kernel_size, shape.levels, device
            found += [cuda_launches.planned(*what, **size) for size in offered]
    return list(dict.fromkeys(found))


OFFERED = cuda_launches.search_space()[1:]


@COMPILER
@pytest.mark.parametrize(
    ("target", "kernel_size", "channels_last", "sizes"),
    [
        ("sm_90", 3, False, [{}]),
        *(
            pytest.param(
                target,
                kernel_size,
                channels_last,
                [{}],
                marks=pytest.mark.slow,
            )
            for target, kernel_size, channels_last in (
                *((target, 5, False) for target in TARGETS),
                ("sm_90", 5, True),
                ("sm_90", 7, False),
                ("sm_90", 9, False),
            )
        ),
        *(
            pytest.param("sm_90", 5, channels_last, OFFERED, marks=pytest.mark.slow)
            for channels_last in (False, True)
        ),
    ],
)
def test_what_is_picked_for_the_named_shapes_keeps_to_registers(
    target, kernel_size, channels_last, sizes
):
    cubins = pytest.importorskip("helpers.cubins", reason="what reads cubins comes with Triton")
    wanted = variants(target, kernel_size, channels_last, sizes)
    source, (_, device) = source_text(cuda_launches.SOURCE), TARGETS[target]
    # The compiler lets other threads run.
    with ThreadPoolExecutor(2) as pool:
        compiled = pool.map(lambda v: nvrtc.compile_source(source, v.macros(), target), wanted)
    for variant, cubin in zip(wanted, compiled, strict=True):
        registers, spilled = cubins.usage(cubin)
        assert spilled <= 8, variant
        # As many blocks as it is made for fit into a multiprocessor.
        assert registers * variant.threads * variant.blocks <= 65536, variant
        assert variant.blocks * (variant.shared() + 1024) <= device.shared + 1024, variant


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(nvrtc, "cache_folder", lambda: tmp_path / "cubins")
    return tmp_path / "cubins"


SOURCE = 'extern "C" __global__ void fill(int* x) { *x = VALUE; }'


@COMPILER
def test_machine_code_is_kept_on_disk(own_cache, monkeypatch):
    code = nvrtc.compiled(SOURCE, {"VALUE": 1}, "sm_80")
    assert code[:4] == b"\x7fELF" and len(list(own_cache.iterdir())) == 1
    other = nvrtc.compiled(SOURCE, {"VALUE": 2}, "sm_80")
    assert other != code and len(list(own_cache.iterdir())) == 2
    monkeypatch.setattr(nvrtc, "compile_source", None)
    assert nvrtc.compiled(SOURCE, {"VALUE": 1}, "sm_80") == code


@COMPILER
def test_a_disk_that_cannot_be_written_costs_time_alone(own_cache, monkeypatch):
    own_cache.write_text("a file where the folder should be")
    assert nvrtc.compiled(SOURCE, {"VALUE": 1}, "sm_80")[:4] == b"\x7fELF"
    own_cache.unlink()

    def full(path, code):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert nvrtc.compiled(SOURCE, {"VALUE": 1}, "sm_80")[:4] == b"\x7fELF"
    assert list(own_cache.iterdir()) == []


@COMPILER
def test_a_compile_failure_shows_the_log(own_cache):
    with pytest.raises(RuntimeError, match=r'(?s)--gpu-architecture=sm_80.*"NONE" is undefined'):
        nvrtc.compiled(SOURCE, {"VALUE": "NONE"}, "sm_80")
    assert not own_cache.exists()


@pytest.mark.gpu
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("shape", "levels", "kernel_size", "dtype"),
    [
        *(
            (shape, 5, 5, torch.float32)
            for shape in ((2, 3, 1, 1), (2, 3, 4096, 1), (3, 9, 57, 44))
        ),
        ((1, 2, 1, 4096), 5, 3, torch.float16),
        ((2, 5, 301, 130), 4, 7, torch.float32),
        ((2, 3, 40, 150), 2, 9, torch.bfloat16),
        ((1, 6, 2048, 1030), 5, 5, torch.float32),
        *(
            ((2, shape.channels, shape.height, shape.width), shape.levels, 5, torch.float32)
            for shape in GPU_SHAPES.values()
        ),
    ],
    ids=str,
)
def test_against_plain_torch_in_float64(shape, levels, kernel_size, dtype, memory_format):
    torch.manual_seed(0)
    channels = shape[1]
    keys = {"wt_levels": levels, "device": "cuda"}
    layer = torch_bridge.WTConv2d(
        channels, channels, kernel_size, implementation="cuda", dtype=dtype, **keys
    )
    for parameter in layer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    plain = torch_bridge.WTConv2d(
        channels, channels, kernel_size, implementation="eager", dtype=torch.float64, **keys
    )
    plain.load_state_dict({n: value.double() for n, value in layer.state_dict().items()})
    x, dy = torch.randn(2, *shape, device="cuda", dtype=dtype)
    x, dy = (t.contiguous(memory_format=memory_format) for t in (x, dy))
    poison = torch.full((8 * x.numel(),), float("nan"), device="cuda")
    del poison  # The next tensors get its memory.
    results = []
    for one in (layer, plain):
        leaf = x.to(next(one.parameters()).dtype).requires_grad_()
        y = one(leaf)
        inputs = [leaf, *(p for p in one.parameters() if p.requires_grad)]
        results.append([y, *torch.autograd.grad(y, inputs, dy.to(y.dtype))])
    rounding = {torch.float32: 1e-5, torch.bfloat16: 0.04, torch.float16: 0.005}[dtype]
    terms = x.numel() / channels
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        error = (got.double() - want).abs().max() / want.square().mean().sqrt()
        allowed = rounding * (max(1.0, terms**0.5 / 300) if i > 1 else 1.0)
        assert error <= allowed, i
