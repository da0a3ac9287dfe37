"""The derivatives of the depthwise convolution: those of any sparse one, for `w [K, C]`."""

from pallas_kernels.sparse.vjp import Kernels, Plan, convolution, measurement, timed_function

__all__ = ["Kernels", "Plan", "convolution", "measurement", "timed_function"]
