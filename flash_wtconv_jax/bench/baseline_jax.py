"""The room of the baseline is `pallas_kernels.wtconv.baseline_jax`; here for the tests' helpers."""

from pallas_kernels.wtconv.baseline_jax import wtconv

__all__ = ["wtconv"]
