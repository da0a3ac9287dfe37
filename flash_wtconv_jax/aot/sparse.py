"""Sparse convolutions in the TPU report: XLA's programs of the map, of y and of the gradients.

On a TPU plain JAX computes them. Every figure is the compiler's, none is measured: cycles are what
XLA's cost model estimates, bytes are what the program takes beside its arguments and its results.
"""

from collections.abc import Callable, Sequence
from datetime import date
from itertools import product

import jax.numpy as jnp

from flash_wtconv_jax import environment
from flash_wtconv_jax.aot import compiling
from flash_wtconv_jax.aot.chips import CHIPS, Chip
from pallas_kernels.common.types import Json
from pallas_kernels.sparse.shapes import SHAPES, Shape

DTYPE = "bfloat16"
PARTS = ("map", "forward", "backward")
SECONDS = 3600
"""Seconds after which a compilation is stopped: a map of a million rows takes minutes of a core."""


def run(chip: str, shapes: Sequence[str], on_row: Callable[[], None] = lambda: None) -> Json:
    """Compiles the map, the forward pass and the gradients of sparse layers for a chip.

    Args:
        chip: Name in `CHIPS`.
        shapes: Names in `pallas_kernels.sparse.shapes.SHAPES`.
        on_row: Called after each row, for a progress bar.

    Returns:
        A JSON-able report: `chip`, `versions`, `date`, and `rows`, see `row`.

    Raises:
        ModuleNotFoundError: libtpu, the compiler, is not installed.
        ValueError: An unknown chip or shape.
    """
    if chip not in CHIPS:
        raise ValueError(f"chip: {chip!r} is not one of {list(CHIPS)}")
    unknown = sorted(set(shapes) - set(SHAPES))
    if unknown:
        raise ValueError(f"shape: {unknown} is not one of {list(SHAPES)}")
    keys = list(product(shapes, PARTS))
    results = compiling.run([job(chip, *key) for key in keys], lambda _: on_row())
    return {
        "report": "tpu sparse",
        "date": date.today().isoformat(),
        "chip": chip,
        "dtype": DTYPE,
        "versions": environment.versions() | {"libtpu": compiling.libtpu_version()},
        "rows": [row(CHIPS[chip], *key, result) for key, result in zip(keys, results, strict=True)],
    }


def job(chip: str, name: str, part: str) -> compiling.Job:
    """The job that compiles one part of a layer."""
    arguments = {"shape": list(SHAPES[name]), "dtype": DTYPE, "direction": part}
    return compiling.Job(f"{__package__}.programs:sparse", chip, arguments, SECONDS)


def row(chip: Chip, name: str, part: str, result: compiling.Result) -> Json:
    """One row of the report.

    Returns:
        `name`, `part`, `estimated_cycles`, `floor_cycles`, in which HBM moves every array once,
        `temporary_bytes`, `seconds` of compilation, and `error`, why it does not compile. What is
        not known is None.
    """
    return {
        "name": name,
        "part": part,
        "estimated_cycles": result.estimated_cycles,
        "floor_cycles": floor(chip, SHAPES[name], part),
        "temporary_bytes": result.temporary_bytes,
        "seconds": round(result.seconds, 1),
        "error": result.error,
    }


def floor(chip: Chip, shape: Shape, part: str) -> int:
    """The cycles in which HBM moves the arrays of a part once each.

    A strided layer counts as many rows of the output as of the input, as its arrays have.

    Example:
        >>> floor(CHIPS["v5e"], SHAPES["room_10000_64_128_s1"], "forward")
        9821
    """
    taps, size = shape.kernel_size**3, jnp.dtype(DTYPE).itemsize
    both = shape.channels + shape.features
    weights, table = taps * shape.channels * shape.features * size, 4 * taps * shape.voxels
    tables = 1 if shape.stride == 1 else 2
    traffic = {
        "map": 4 * 4 * shape.voxels + tables * table,
        "forward": shape.voxels * both * size + weights + table,
        # x, dy and dx, the weights and their gradient.
        "backward": shape.voxels * (both + shape.channels) * size + 2 * weights + tables * table,
    }
    return round(traffic[part] / chip.hbm_bytes_per_cycle)
