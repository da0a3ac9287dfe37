"""Every operator in NumPy float64, as plain loops over taps: easy to verify, and slow.

This package is the definition that every kernel of both frameworks is tested against. It imports
NumPy alone. Arrays are channels-last: `(*batch, *spatial, C)`. Subbands have an axis of their own
before the channels, `(*batch, *spatial, 2**ndim, C)`; subband `s` is `b_0 + 2 * b_1 + 4 * b_2`,
where `b_a` is 1 for the high band along spatial axis `a`.

Source: Finder, Amoyal, Treister, Freifeld, "Wavelet Convolutions for Large Receptive Fields",
ECCV 2024.
"""

from pallas_kernels.oracle.arrays import Array
from pallas_kernels.oracle.conv2d import conv2d, conv2d_pads, conv2d_vjp, reflects
from pallas_kernels.oracle.depthwise import depthwise_conv2d, depthwise_conv2d_vjp
from pallas_kernels.oracle.haar import HAAR, analysis, synthesis, wavedec, waverec
from pallas_kernels.oracle.mlp import mlp, mlp_vjp
from pallas_kernels.oracle.sparse import (
    sparse_conv,
    sparse_conv_vjp,
    sparse_offsets,
    sparse_outputs,
    sparse_pool,
)
from pallas_kernels.oracle.stylize import (
    conv2d_instance_norm,
    conv2d_instance_norm_vjp,
    instance_norm,
    instance_norm_vjp,
    residual_block,
    residual_block_vjp,
)
from pallas_kernels.oracle.wtconv import depthwise, subsample, wtconv, wtconv_vjp

__all__ = [
    "HAAR",
    "Array",
    "analysis",
    "conv2d",
    "conv2d_instance_norm",
    "conv2d_instance_norm_vjp",
    "conv2d_pads",
    "conv2d_vjp",
    "depthwise",
    "depthwise_conv2d",
    "depthwise_conv2d_vjp",
    "instance_norm",
    "instance_norm_vjp",
    "mlp",
    "mlp_vjp",
    "reflects",
    "residual_block",
    "residual_block_vjp",
    "sparse_conv",
    "sparse_conv_vjp",
    "sparse_offsets",
    "sparse_outputs",
    "sparse_pool",
    "subsample",
    "synthesis",
    "wavedec",
    "waverec",
    "wtconv",
    "wtconv_vjp",
]
