"""The wavelet convolution on Hopper GPUs, in Pallas' Mosaic GPU: the operator's implementation."""

from pallas_kernels.common.mosaic_gpu import unavailable
from pallas_kernels.wtconv.mosaic_gpu.level1 import BIAS_GRADIENT, DIFFERENTIABLE, check, forward
from pallas_kernels.wtconv.mosaic_gpu.weights import weight_grad

__all__ = [
    "BIAS_GRADIENT",
    "DIFFERENTIABLE",
    "check",
    "forward",
    "unavailable",
    "weight_grad",
]
