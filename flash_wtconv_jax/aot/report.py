"""`flash-wtconv tpu-report`: static cycles of our TPU kernels beside XLA's program and the floors.

For the wavelet convolution "backward" is the gradients of x and of the taps; for the Haar cascade,
whose gradient is its inverse, "forward" is the analysis and "backward" the synthesis.

Every figure is the compiler's, none is measured: `cycles` counts the bundles of the compiled
kernels (`bundles`), `around_cycles` is XLA's estimate for the instructions around them, traffic to
HBM included (`estimated_cycles`: copies into another layout, the factors of the taps), `xla_cycles`
is its estimate for XLA's own program of the same function, and `xla_bundle_cycles` counts the
bundles of that program where they are dumped, without its traffic.
"""

from collections.abc import Callable, Sequence
from datetime import date
from itertools import product

import jax.numpy as jnp

from flash_wtconv_jax import environment
from flash_wtconv_jax.aot import compiling
from flash_wtconv_jax.aot.chips import CHIPS, VALU_LANES, Chip
from pallas_kernels.common.types import Json
from pallas_kernels.depthwise.shapes import TPU_SHAPES as DEPTHWISE
from pallas_kernels.wtconv.shapes import TPU_SHAPES, Shape

SHAPES: dict[str, dict[str, Shape]] = {
    "wtconv": TPU_SHAPES,
    # The wavelet convolution of 0 levels.
    "depthwise": {name: Shape(*shape.x, 0, shape.kernel_size) for name, shape in DEPTHWISE.items()},
    "haar": TPU_SHAPES,
}
"""The shapes of every kernel of the report, by name."""
KERNELS = tuple(SHAPES)
DTYPES = ("float32", "bfloat16")
DIRECTIONS = ("forward", "backward")


def run(
    chip: str,
    shapes: Sequence[str],
    on_row: Callable[[], None] = lambda: None,
    kernels: Sequence[str] = KERNELS,
) -> Json:
    """Compiles our kernels and plain JAX for a chip, and counts both.

    Args:
        chip: Name in `CHIPS`.
        shapes: Names in `pallas_kernels.wtconv.shapes.TPU_SHAPES`.
        on_row: Called after each row, for a progress bar.
        kernels: Names in `KERNELS`.

    Returns:
        A JSON-able report: `chip`, `versions`, `date`, and `rows`, see `row`.

    Raises:
        ModuleNotFoundError: libtpu, the compiler, is not installed.
        ValueError: An unknown chip, kernel or shape, or none of the kernels has one of the shapes.
    """
    if chip not in CHIPS:
        raise ValueError(f"chip: {chip!r} is not one of {list(CHIPS)}")
    unknown = sorted(set(shapes) - set(TPU_SHAPES))
    if unknown:
        raise ValueError(f"shape: {unknown} is not one of {list(TPU_SHAPES)}")
    strange = sorted(set(kernels) - set(KERNELS))
    if strange:
        raise ValueError(f"kernel: {strange} is not one of {list(KERNELS)}")
    keys = rows(shapes, kernels)
    if not keys:
        raise ValueError(f"shape: {list(shapes)} are none of the kernel's, {list(kernels)}")
    jobs = [job(chip, *key, plain=plain) for key in keys for plain in (False, True)]
    done = 0

    def on_result(_: compiling.Result) -> None:
        nonlocal done
        done += 1
        if done % 2 == 0:
            on_row()

    results = compiling.run(jobs, on_result)
    pairs = zip(keys, results[::2], results[1::2], strict=True)
    return {
        "report": "tpu",
        "date": date.today().isoformat(),
        "chip": chip,
        "versions": environment.versions() | {"libtpu": compiling.libtpu_version()},
        "rows": [row(CHIPS[chip], *key, ours, xla) for key, ours, xla in pairs],
    }


def rows(
    shapes: Sequence[str], kernels: Sequence[str] = KERNELS
) -> list[tuple[str, str, str, str]]:
    """The kernel, shape, dtype and direction of each row of a report of some shapes and kernels.

    Example:
        >>> len(rows(["image_56"])), len(rows(["image_2048"]))
        (12, 8)
    """
    every = product(KERNELS, shapes, DTYPES, DIRECTIONS)
    return [key for key in every if key[0] in kernels and key[1] in SHAPES[key[0]]]


def job(
    chip: str, kernel: str, name: str, dtype: str, direction: str, *, plain: bool = False
) -> compiling.Job:
    """The job that compiles one kernel, or with `plain` the same function in plain JAX."""
    return compiling.Job(
        f"{__package__}.programs:{'plain_' * plain}{kernel}",
        chip,
        {"shape": list(SHAPES[kernel][name]), "dtype": dtype, "direction": direction},
    )


def row(
    chip: Chip,
    kernel: str,
    name: str,
    dtype: str,
    direction: str,
    ours: compiling.Result,
    xla: compiling.Result,
) -> Json:
    """One row of the report.

    Returns:
        `kernel`, `name`, `x`, `levels`, `kernel_size`, `dtype`, `direction`; of our kernels
        `cycles` and `around_cycles`, the share of each unit's slots that they fill as `busy`,
        `vmem_bytes` of `vmem_capacity`, and `error`, why they do not compile or cannot be counted;
        of XLA's program `xla_cycles`, `xla_bundle_cycles` and `xla_error`; `fewer`, `xla_cycles`
        over the sum of ours; `valu_floor_cycles`, `hbm_floor_cycles`, and `floor_cycles`, the
        greater of the two. What is not known is None.
    """
    shape = SHAPES[kernel][name]
    valu, hbm = floors(chip, kernel, shape, dtype, direction)
    own = [c for c in ours.computations if c["name"].startswith(kernel)]
    cycles = sum(c["cycles"] for c in own) or None
    total = cycles and cycles + (ours.estimated_cycles or 0)
    return {
        "kernel": kernel,
        "name": name,
        "x": list(shape.x),
        "levels": shape.levels,
        "kernel_size": shape.kernel_size,
        "dtype": dtype,
        "direction": direction,
        "cycles": cycles,
        "around_cycles": ours.estimated_cycles,
        "xla_cycles": xla.estimated_cycles,
        "fewer": total and xla.estimated_cycles and round(xla.estimated_cycles / total, 2),
        "xla_bundle_cycles": xla.cycles,
        "floor_cycles": max(valu, hbm),
        "valu_floor_cycles": valu,
        "hbm_floor_cycles": hbm,
        "vmem_bytes": ours.vmem_bytes,
        "vmem_capacity": ours.vmem_capacity,
        "busy": _busy(own),
        "error": ours.error or ours.uncounted,
        "xla_error": xla.error or xla.uncounted,
    }


def floors(chip: Chip, kernel: str, shape: Shape, dtype: str, direction: str) -> tuple[int, int]:
    """The cycles of arithmetic and of traffic, below which no kernel of this method can be.

    Forward, a coefficient costs k² products and as many sums, four operations of the transforms
    there and back, and a quarter of the sum with the level below; float32, as no unit multiplies
    and adds in one. Backward adds to the same for dx k² products and sums for the taps, and a
    second transform. The cascade alone is two sums and a product a coefficient. Traffic is x and y
    once, or x, dy and dx once.

    Args:
        chip: The chip whose slots and bandwidth count.
        kernel: One of `KERNELS`.
        shape: The layer.
        dtype: Dtype of x and y.
        direction: "forward" or "backward".

    Returns:
        `(arithmetic, traffic)`.

    Example:
        >>> floors(CHIPS["v5e"], "wtconv", TPU_SHAPES["image_56"], "float32", "forward")
        (95023, 47051)
    """
    samples = shape.batch * shape.height * shape.width * shape.channels
    taps, below = 2 * shape.kernel_size**2, sum(4.0**-i for i in range(shape.levels))
    operations, tensors = taps + below * (taps + 4.25), 2
    if kernel == "haar":
        operations = 3 * below
    elif direction == "backward":
        operations += taps + below * (taps + 4)
        tensors = 3
    traffic = tensors * samples * jnp.dtype(dtype).itemsize
    return (
        round(samples * operations / (VALU_LANES * chip.cores)),
        round(traffic / chip.hbm_bytes_per_cycle),
    )


def _busy(computations: Sequence[Json]) -> dict[str, float]:
    """The shares of slots that all computations fill, each weighed by its cycles."""
    total = sum(c["cycles"] for c in computations) or 1
    units = computations[0]["busy"] if computations else {}
    return {
        unit: round(sum(c["busy"][unit] * c["cycles"] for c in computations) / total, 4)
        for unit in units
    }
