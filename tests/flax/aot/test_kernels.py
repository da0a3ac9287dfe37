"""What the TPU's compiler says of the kernels, on a machine without a TPU."""

import os
from itertools import product
from pathlib import Path

import pytest

from flash_wtconv_jax.aot import compiling, report
from flash_wtconv_jax.aot.chips import CHIPS
from pallas_kernels.conv2d.cases import TABLE, Case
from pallas_kernels.wtconv.shapes import TPU_SHAPES

pytest.importorskip("libtpu", reason="libtpu, the TPU's compiler, is for Linux alone")

WTCONV, HAAR = (
    list(product([kernel], TPU_SHAPES, report.DTYPES, report.DIRECTIONS))
    for kernel in report.KERNELS
)
# Five levels on a whole image do not fit in the 16 MiB of a v4, and XLA takes over.
REFUSED = {("v4", "wtconv", "convnext_t_stage1")}
# Every shape, and with it both dtypes and both directions: forward in one, backward in the other.
EVEN = [key for key in WTCONV + HAAR if (key[2] == "float32") == (key[3] == "forward")]
# The compiler takes up to two minutes for the synthesis of five levels.
LONG = [key for key in HAAR if key[1] == "convnext_t_stage1" and key[3] == "backward"]


def assert_compiled(chip, keys):
    results = dict(zip(keys, compiling.run([report.job(chip, *key) for key in keys]), strict=True))
    for key, result in results.items():
        if (chip, *key[:2]) in REFUSED:
            assert "NotImplementedError: does not take 5 levels" in result.error
            continue
        assert (result.error, result.uncounted) == (None, None), key
        assert result.cycles > 0 and 0 < result.vmem_bytes <= result.vmem_capacity
    return results


def test_v5e_takes_every_wtconv_in_few_cycles():
    found = assert_compiled("v5e", WTCONV)
    assert found["wtconv", "image_56", "float32", "forward"].cycles <= 150_000
    assert found["wtconv", "image_56", "bfloat16", "forward"].cycles <= 150_000
    assert found["wtconv", "image_56", "float32", "backward"].cycles <= 300_000
    for (kernel, name, dtype, direction), result in found.items():
        valu, _ = report.floors(CHIPS["v5e"], kernel, TPU_SHAPES[name], dtype, direction)
        assert result.cycles >= valu


def test_v5e_takes_every_haar():
    assert_compiled("v5e", [key for key in HAAR if key not in LONG])


@pytest.mark.parametrize("chip", ["v6e", "v5p"])
def test_other_chips_take_every_shape(chip):
    assert_compiled(chip, [key for key in EVEN if key not in LONG])


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_every_chip_takes_everything(chip):
    assert_compiled(chip, WTCONV + HAAR)


# Remainders of channels and of tiles, odd sizes, even and large kernels, no level, tiny images.
ODD = (
    ([3, 13, 21, 130, 3, 2], "bfloat16"),
    ([48, 9, 11, 130, 2, 7], "float32"),
    ([8, 5, 6, 260, 1, 3], "bfloat16"),
    ([16, 1, 1, 130, 1, 1], "float32"),
    ([1, 9, 10, 5, 0, 9], "float32"),
    ([1, 700, 700, 130, 2, 3], "float32"),
)


@pytest.mark.parametrize(
    "program", ["flash_wtconv_jax.aot.programs:{}", "helpers.tpu_programs:wide"]
)
def test_odd_shapes_compile_also_with_64_bit_integers(program, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), *_path()]))
    jobs = [
        compiling.Job(
            program.format(kernel),
            "v5e",
            {"shape": shape, "dtype": dtype, "direction": direction}
            | ({"kernel": kernel} if "wide" in program else {}),
        )
        for kernel in report.KERNELS
        for shape, dtype in ODD
        for direction in report.DIRECTIONS
        if (kernel, shape[4]) != ("haar", 0)
    ]
    for job, result in zip(jobs, compiling.run(jobs), strict=True):
        assert (result.error, result.uncounted) == (None, None), job


# The table in both dtypes, and what is not in it: patches, planes of a stride, mirrored edges,
# images in tiles along both axes, blocks of channels, and layers of networks.
DENSE = (
    *(
        case._replace(dtype=("bfloat16", "float32")[i % 2], out_dtype=None)
        for i, case in enumerate(TABLE)
    ),
    Case(2, 56, 56, 3, 4, 4, 96, 4, bias=True),
    Case(3, 20, 23, 130, 2, 1, 200, 2, "reflect", activation="gelu"),
    Case(1, 9, 1100, 24, 3, 3, 40, 1, "SAME", 2, dtype="bfloat16", activation="relu"),
)
LAYERS = (
    Case(2, 64, 64, 640, 3, 3, 640, padding="SAME", dtype="bfloat16", bias=True),
    Case(2, 128, 128, 16, 3, 3, 320, padding="SAME", dtype="bfloat16", activation="gelu"),
)


def assert_dense_compiled(chip, cases, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), *_path()]))
    jobs = [compiling.Job("helpers.tpu_programs:dense", chip, case._asdict()) for case in cases]
    results = compiling.run(jobs)
    # Cycles of what XLA does around the kernels are not always known.
    for case, result in zip(cases, results, strict=True):
        assert result.error is None, case
    return results


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_dense_layers_compile_to_few_cycles(chip, monkeypatch):
    table = DENSE[:22:5] if chip == "v5e" else DENSE[1:22:5]
    wide, *_ = assert_dense_compiled(chip, LAYERS + table + DENSE[-3:], monkeypatch)
    # Three products of 461,000 cycles of a v5e's matrix units; a v6e's are four times as large.
    assert wide.cycles <= {"v5e": 1_500_000, "v6e": 600_000}[chip]


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_every_chip_takes_every_dense_layer(chip, monkeypatch):
    assert_dense_compiled(chip, DENSE + LAYERS, monkeypatch)


def test_loops_are_counted_as_by_hand(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), *_path()]))
    jobs = [
        compiling.Job("helpers.tpu_programs:nested", chip, {"outer": 6, "inner": inner})
        for chip in ("v5e", "v4")
        for inner in (9, 90)
    ]
    for few, many in zip(*[iter(compiling.run(jobs))] * 2, strict=True):
        for result, inner in ((few, 9), (many, 90)):
            _, rounds, additions = result.computations[0]["loops"]
            assert (rounds["entries"], rounds["trips"]) == (1, 6)
            assert (additions["entries"], additions["trips"]) == (6, 6 * inner)
        assert many.cycles - few.cycles == 6 * 81 * additions["bundles"]
    short, long = compiling.run(
        [compiling.Job("helpers.tpu_programs:stepped", "v5e", {"steps": n}) for n in (14, 28)]
    )
    for result, steps in ((short, 14), (long, 28)):
        _, grid, work = result.computations[0]["loops"]
        # A pipeline runs two steps longer than its grid: the first copy in, the last one out.
        assert grid["trips"] == steps + 2
        assert (work["entries"], work["trips"]) == (steps // 2, 5 * steps // 2)


def _path():
    return [path for path in [os.environ.get("PYTHONPATH")] if path]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", report.DTYPES)
@pytest.mark.parametrize("direction", report.DIRECTIONS)
@pytest.mark.parametrize("name", [name for name in TPU_SHAPES if name.startswith("convnext")])
def test_four_times_fewer_cycles_than_xla(name, direction, dtype, monkeypatch):
    monkeypatch.setattr(compiling, "SECONDS", 3600)
    jobs = [
        report.job("v5e", "wtconv", name, dtype, direction, plain=plain) for plain in (False, True)
    ]
    ours, xla = compiling.run(jobs)
    row = report.row(CHIPS["v5e"], "wtconv", name, dtype, direction, ours, xla)
    assert row["fewer"] >= 4


def test_a_program_that_does_not_compile_is_told_and_does_not_stop_the_next():
    broken = report.job("v5e", *HAAR[0])._replace(program="math:nothing", arguments={})
    first, second = compiling.run([broken, report.job("v5e", *HAAR[0])])
    assert first.error.startswith("AttributeError: module")
    assert second.error is None


def test_a_compiler_that_dies_or_takes_too_long_is_told(monkeypatch):
    monkeypatch.setattr(compiling, "SECONDS", 0.01)
    late, dead = (
        compiling.run([compiling.Job(program, "v5e", {})])[0]
        for program in ("time:sleep", "os:abort")
    )
    assert late.error == "not compiled within 0.01 s"
    assert dead.error
