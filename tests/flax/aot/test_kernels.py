"""The TPU's compiler takes the kernels, on a machine without a TPU."""

import math
import os
from itertools import product
from pathlib import Path

import pytest

from flash_wtconv_jax.aot import compiling, programs, report
from flash_wtconv_jax.aot.chips import CHIPS
from pallas_kernels.conv2d.cases import TABLE, Case
from pallas_kernels.stylize.shapes import SHAPES as PICTURES
from pallas_kernels.wtconv.shapes import TPU_SHAPES

pytest.importorskip("libtpu", reason="libtpu, the TPU's compiler, is for Linux alone")


WTCONV, HAAR = (
    list(product([kernel], TPU_SHAPES, report.DTYPES, report.DIRECTIONS))
    for kernel in ("wtconv", "haar")
)
DEPTHWISE = list(
    product(["depthwise"], report.SHAPES["depthwise"], report.DTYPES, report.DIRECTIONS)
)
# Five levels on a whole image do not fit in the 16 MiB of a v4, and XLA takes over.
REFUSED = {("v4", "wtconv", "convnext_t_stage1")}
# Both dtypes and both directions: forward in one, backward in the other.
EVEN = [key for key in WTCONV + HAAR if (key[2] == "float32") == (key[3] == "forward")]
# The compiler takes up to two minutes for the synthesis of five levels.
LONG = [key for key in HAAR if key[1] == "convnext_t_stage1" and key[3] == "backward"]
# Upper bounds of the cycles, on a v5e.
FEW_CYCLES = {
    ("wtconv", "image_56", "float32", "forward"): 150_000,
    ("wtconv", "image_56", "bfloat16", "forward"): 150_000,
    ("wtconv", "image_56", "float32", "backward"): 300_000,
    ("depthwise", "image_56", "float32", "forward"): 56_000,
    ("depthwise", "image_56", "bfloat16", "backward"): 115_000,
}
# Of these what always runs; the backward pass is compiled longest, and odd shapes have it too.
ALWAYS = [("wtconv", "image_56", "float32", "forward")]
THEN = [key for key in FEW_CYCLES if key not in EVEN and key[0] == "wtconv"]


@pytest.fixture(autouse=True)
def helpers_in_the_worker(monkeypatch):
    """The worker's process imports `helpers` as pytest's does."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


def assert_compiled(chip, keys):
    most = FEW_CYCLES if chip == "v5e" else {}
    results = dict(zip(keys, compiling.run([report.job(chip, *key) for key in keys]), strict=True))
    for key, result in results.items():
        if (chip, *key[:2]) in REFUSED:
            assert "NotImplementedError: does not take 5 levels" in result.error
            continue
        assert (result.error, result.uncounted) == (None, None), key
        assert 0 < result.cycles <= most.get(key, math.inf)
        assert 0 < result.vmem_bytes <= result.vmem_capacity
        kernel, name, dtype, direction = key
        if kernel != "haar":
            shape = report.SHAPES[kernel][name]
            valu, _ = report.floors(CHIPS[chip], kernel, shape, dtype, direction)
            assert result.cycles >= valu


@pytest.mark.parametrize("keys", [ALWAYS, pytest.param(THEN, marks=pytest.mark.slow)], ids=str)
def test_v5e_takes_an_image_in_few_cycles(keys):
    assert_compiled("v5e", keys)


# Of each shape four programs, of each kernel one dtype forward and the other backward: one kernel's
# on a v5e, of the other one on a v6e and one on a v5p. So all pairs of two choices come.
SOME = [
    ("v5e" if key not in EVEN else ("v6e", "v5p")[(i + (key[3] == "backward")) % 2], key)
    for i, name in enumerate(TPU_SHAPES)
    for key in WTCONV + HAAR
    if key[1] == name and (key in EVEN) == ((key[0] == "wtconv") == (i % 2 == 0))
]
SOME += [("v5e", key) for key in FEW_CYCLES if key not in (*ALWAYS, *THEN)]


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e", "v5p"])
def test_some_chip_takes_every_shape(chip):
    """Below it has every shape on every chip."""
    assert_compiled(chip, [key for on, key in SOME if on == chip and key not in LONG])


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_every_chip_takes_everything(chip):
    assert_compiled(chip, WTCONV + DEPTHWISE + HAAR)


# Remainders of channels and of tiles, odd sizes, even and large kernels, no level, tiny images.
ODD = (
    ([3, 13, 21, 130, 3, 2], "bfloat16"),
    ([48, 9, 11, 130, 1, 7], "float32"),
    ([8, 5, 6, 260, 1, 3], "bfloat16"),
    ([16, 1, 1, 130, 1, 1], "float32"),
    ([1, 700, 700, 130, 2, 3], "float32"),
    ([1, 9, 10, 5, 0, 9], "float32"),
)
LARGER = ([48, 9, 11, 130, 2, 7], "float32")


def odd_jobs(chip, shapes, halves=(0, 1), integers_of_64_bits=False):
    """Both kernels of shapes: in half 0 wtconv forward and haar backward, in half 1 the others."""
    program = f"{programs.__name__}:{{}}"
    if integers_of_64_bits:
        program = "helpers.tpu_programs:{}_in_64_bits"
    return [
        compiling.Job(
            program.format(kernel), chip, {"shape": shape, "dtype": dtype, "direction": direction}
        )
        for shape, dtype in shapes
        for kernel, direction in product(("wtconv", "haar"), report.DIRECTIONS)
        if (kernel, shape[4]) != ("haar", 0)
        if ((kernel == "haar") == (direction == "forward")) in halves
    ]


def assert_odd_compiled(jobs):
    for job, result in zip(jobs, compiling.run(jobs), strict=True):
        assert (result.error, result.uncounted) == (None, None), job


def odd_jobs_of_chips(half):
    """An odd shape for each chip, of both kernels and in both directions together."""
    chips = {"v6e": (ODD[0], half), "v5p": (ODD[2], 1 - half), "v5e": (ODD[4], half)}
    return [job for chip, (odd, at) in chips.items() for job in odd_jobs(chip, [odd], [at])]


@pytest.mark.slow
def test_every_chip_takes_an_odd_shape_in_the_other_direction():
    assert_odd_compiled(odd_jobs_of_chips(1))


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 1])
def test_odd_shapes_compile_with_integers_of_32_and_of_64_bits(first):
    """Every other shape: one half with integers of 32 bits, the other with those of 64."""
    jobs = []
    for i, odd in enumerate((*ODD, LARGER)[first::2]):
        for half in (0, 1):
            jobs += odd_jobs("v5e", [odd], [half], integers_of_64_bits=(i + half) % 2 == 1)
    assert_odd_compiled(jobs)


@pytest.mark.slow
@pytest.mark.parametrize("integers_of_64_bits", [False, True])
def test_every_odd_shape_compiles_in_both_directions(integers_of_64_bits):
    shapes = (*ODD, LARGER)
    assert_odd_compiled(odd_jobs("v5e", shapes, integers_of_64_bits=integers_of_64_bits))


@pytest.mark.slow
def test_other_chips_take_small_shapes():
    assert_odd_compiled([*odd_jobs("v6e", [ODD[2]]), *odd_jobs("v5p", [ODD[0]])])


# The table in both dtypes, and what is not in it: patches, planes of a stride, mirrored edges,
# images in tiles along both axes, blocks of channels, and layers of networks.
TABLE_DENSE = tuple(
    case._replace(dtype=("bfloat16", "float32")[i % 2], out_dtype=None)
    for i, case in enumerate(TABLE)
)
HARD_DENSE = (
    Case(2, 56, 56, 3, 4, 4, 96, 4, bias=True),
    Case(3, 20, 23, 130, 2, 1, 200, 2, "reflect", activation="gelu"),
    Case(1, 9, 1100, 24, 3, 3, 40, 1, "SAME", 2, dtype="bfloat16", activation="relu"),
)
LAYERS = (
    Case(2, 64, 64, 640, 3, 3, 640, padding="SAME", dtype="bfloat16", bias=True),
    Case(2, 128, 128, 16, 3, 3, 320, padding="SAME", dtype="bfloat16", activation="gelu"),
)
# Of the table every fifth case with an example of each size, another example for each chip.
SOME_DENSE = {"v5e": TABLE_DENSE[:22:5], "v6e": TABLE_DENSE[1:22:5]}


def dense_jobs(chip, cases):
    return [compiling.Job("helpers.tpu_programs:dense", chip, case._asdict()) for case in cases]


def assert_compiles(jobs):
    results = compiling.run(jobs)
    # Cycles of what XLA does around the kernels are not always known.
    for job, result in zip(jobs, results, strict=True):
        assert result.error is None, job
    return results


def norm_jobs(chip, shapes):
    return [
        compiling.Job(
            "helpers.tpu_programs:norm",
            chip,
            {
                "shape": list(shape),
                "dtype": ("bfloat16", "float32")[i % 2],
                "residual": i % 4 > 1,
            },
        )
        for i, shape in enumerate(shapes)
    ]


# Of one tile, and of several of which the last is in part; a width that fills no registers.
NORMS = ((2, 300, 1001, 3), PICTURES["style_256_trunk"], (1, 1, 1, 200), (3, 5, 7, 96))


@pytest.mark.wide
def test_every_chip_takes_an_odd_shape_and_dense_layers_and_a_norm_compile():
    """All in one process, which takes longest to start.

    Of the odd shapes any two of chip, kernel and direction, or kernel and dtype, are there; of the
    rest a layer of tiles along both axes, a layer of the table on another chip, two norms.
    """
    odd = odd_jobs_of_chips(0)
    jobs = dense_jobs("v5e", HARD_DENSE[2:]) + dense_jobs("v6e", SOME_DENSE["v6e"][:1])
    # The first norm takes longest; it is compiled below.
    jobs += norm_jobs("v5e", (NORMS[1], NORMS[3]))
    results = assert_compiles(odd + jobs)
    assert [result.uncounted for result in results[: len(odd)]] == [None] * len(odd)


@pytest.mark.slow
def test_other_dense_layers_compile():
    jobs = dense_jobs("v6e", HARD_DENSE[1:2]) + dense_jobs("v5e", SOME_DENSE["v5e"][:1])
    assert_compiles(jobs)


@pytest.mark.parametrize(
    ("chip", "hard"),
    [
        pytest.param("v5e", HARD_DENSE[:2], marks=pytest.mark.slow),
        pytest.param("v6e", HARD_DENSE[::2], marks=pytest.mark.slow),
    ],
)
def test_dense_layers_of_networks_compile_to_few_cycles(chip, hard):
    cases = (*LAYERS, *SOME_DENSE[chip][1:], *hard)
    layer, *_ = assert_compiles(dense_jobs(chip, cases))
    # Three products of 461,000 cycles of a v5e's matrix units; a v6e's are four times as large.
    assert layer.cycles <= {"v5e": 1_500_000, "v6e": 600_000}[chip]


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_every_chip_takes_every_dense_layer(chip):
    assert_compiles(dense_jobs(chip, TABLE_DENSE + HARD_DENSE + LAYERS))


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_norms_of_networks_compile(chip):
    assert_compiles(norm_jobs(chip, (*PICTURES.values(), *NORMS)))


def test_loops_are_counted_as_by_hand():
    nested = [
        compiling.Job("helpers.tpu_programs:nested", chip, {"outer": 6, "inner": inner})
        for chip in ("v5e", "v4")
        for inner in (9, 90)
    ]
    stepped = [
        compiling.Job("helpers.tpu_programs:stepped", "v5e", {"steps": steps}) for steps in (14, 28)
    ]
    *results, short, long = compiling.run(nested + stepped)
    for few, many in zip(*[iter(results)] * 2, strict=True):
        for result, inner in ((few, 9), (many, 90)):
            _, rounds, additions = result.computations[0]["loops"]
            assert (rounds["entries"], rounds["trips"]) == (1, 6)
            assert (additions["entries"], additions["trips"]) == (6, 6 * inner)
        assert many.cycles - few.cycles == 6 * 81 * additions["bundles"]
    for result, steps in ((short, 14), (long, 28)):
        _, grid, work = result.computations[0]["loops"]
        # A pipeline runs two steps longer than its grid: the first copy in, the last one out.
        assert grid["trips"] == steps + 2
        assert (work["entries"], work["trips"]) == (steps // 2, 5 * steps // 2)


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
    broken = compiling.Job("math:nothing", "v5e", {})
    whole = compiling.Job("helpers.tpu_programs:nested", "v5e", {"outer": 1, "inner": 1})
    first, second = compiling.run([broken, whole])
    assert first.error.startswith("AttributeError: module")
    assert second.error is None


def test_a_compiler_that_dies_or_takes_too_long_is_told():
    late, dead = (
        compiling.run([compiling.Job(program, "v5e", {}, limit=0.01)])[0]
        for program in ("time:sleep", "os:abort")
    )
    assert late.error == "not compiled within 0.01 s"
    assert dead.error
