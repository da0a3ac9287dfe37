"""Every picture of the package: functions from arrays to `matplotlib.figure.Figure`."""

from flash_wtconv_jax.plots.bench import ladders, roofline, speedups, static_cycles, throughput
from flash_wtconv_jax.plots.style import check_path, png, save
from flash_wtconv_jax.plots.training import (
    class_colours,
    masks,
    predictions,
    run_curves,
    training_curve,
)
from flash_wtconv_jax.plots.voxels import View, voxel_labels
from flash_wtconv_jax.plots.wavelets import receptive_fields, wavelet_cascade

__all__ = [
    "View",
    "check_path",
    "class_colours",
    "ladders",
    "masks",
    "png",
    "predictions",
    "receptive_fields",
    "roofline",
    "run_curves",
    "save",
    "speedups",
    "static_cycles",
    "throughput",
    "training_curve",
    "voxel_labels",
    "wavelet_cascade",
]
