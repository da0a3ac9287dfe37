"""What the TPU's compiler says of the kernels, on a machine without a TPU."""

import math
import os
from pathlib import Path

import pytest

from flash_wtconv_jax.bench.tpu import compiling, report
from flash_wtconv_jax.bench.tpu.chips import CHIPS
from pallas_kernels.wtconv.shapes import TPU_SHAPES

pytest.importorskip("libtpu", reason="libtpu, the TPU's compiler, is for Linux alone")

PROGRAMS = "flash_wtconv_jax.bench.tpu.programs"
KEYS = [(n, d, way) for n in TPU_SHAPES for d in report.DTYPES for way in report.DIRECTIONS]


def job(chip, key, program="wtconv"):
    name, dtype, direction = key
    arguments = {"shape": list(TPU_SHAPES[name]), "dtype": dtype, "direction": direction}
    return compiling.Job(f"{PROGRAMS}:{program}", chip, arguments)


# Five levels on a whole image do not fit in the 16 MiB of a v4, and XLA takes over.
REFUSED = {("v4", "convnext_t_stage1")}


@pytest.mark.parametrize("chip", ["v5e", "v6e", "v5p", pytest.param("v4", marks=pytest.mark.slow)])
def test_the_compiler_takes_every_kernel(chip):
    results = dict(zip(KEYS, compiling.run([job(chip, key) for key in KEYS]), strict=True))
    for (name, dtype, direction), result in results.items():
        if (chip, name) in REFUSED:
            assert "NotImplementedError: does not take 5 levels" in result.error
            continue
        assert (result.error, result.uncounted) == (None, None), (name, dtype, direction)
        assert 0 < result.vmem_bytes <= result.vmem_capacity
        floor = max(report.floors(CHIPS[chip], TPU_SHAPES[name], dtype, direction))
        # Two cores share the channels, and a count is that of one of them.
        assert result.cycles >= floor
    if chip == "v5e":
        assert results["image_56", "float32", "forward"].cycles <= 150_000
        assert results["image_56", "bfloat16", "forward"].cycles <= 190_000
        assert results["image_56", "float32", "backward"].cycles <= 420_000


def test_loops_are_counted_as_by_hand(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *_path()]))
    jobs = [
        compiling.Job("tpu_programs:nested", chip, {"outer": 6, "inner": inner})
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
        [compiling.Job("tpu_programs:stepped", "v5e", {"steps": n}) for n in (14, 28)]
    )
    for result, steps in ((short, 14), (long, 28)):
        _, grid, work = result.computations[0]["loops"]
        # A pipeline runs two steps longer than its grid: the first copy in, the last one out.
        assert grid["trips"] == steps + 2
        assert (work["entries"], work["trips"]) == (steps // 2, 5 * steps // 2)


def _path():
    return [path for path in [os.environ.get("PYTHONPATH")] if path]


@pytest.mark.slow
@pytest.mark.parametrize("direction", report.DIRECTIONS)
@pytest.mark.parametrize("name", [name for name in TPU_SHAPES if name.startswith("convnext")])
def test_four_times_fewer_cycles_than_xla(name, direction, monkeypatch):
    monkeypatch.setattr(compiling, "SECONDS", 3600)
    key = (name, "float32", direction)
    ours, xla = compiling.run([job("v5e", key), job("v5e", key, "plain_wtconv")])
    assert math.ceil(xla.estimated_cycles / ours.cycles) >= 4


def test_a_program_that_does_not_compile_is_told_and_does_not_stop_the_next():
    broken = compiling.Job(f"{PROGRAMS}:nothing", "v5e", {})
    first, second = compiling.run([broken, job("v5e", KEYS[0])])
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
