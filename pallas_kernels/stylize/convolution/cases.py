"""The correctness cases of a convolution with its norm. Imports NumPy and the oracle alone."""

from pallas_kernels.stylize.cases import CONV_CASES as CASES
from pallas_kernels.stylize.cases import ConvCase as Case

__all__ = ["CASES", "Case"]
