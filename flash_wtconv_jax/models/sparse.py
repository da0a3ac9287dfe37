"""Networks of voxels: a U-Net that labels each voxel, and a ResNet that classifies each sample.

Sources: Choy, Gwak and Savarese, "4D Spatio-Temporal ConvNets: Minkowski Convolutional Neural
Networks", CVPR 2019 (MinkUNet); He et al., "Deep Residual Learning for Image Recognition", CVPR
2016.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from flash_wtconv_jax import checkpoints
from flash_wtconv_jax.functional.arguments import (
    ImplementationLike,
    PrecisionLike,
    check_constructor,
    checked_rngs,
)
from flash_wtconv_jax.functional.conv2d import PerAxis
from flash_wtconv_jax.nnx import SparseBatchNorm, SpatiallySparseConv
from pallas_kernels.common.arguments import checked_integer
from pallas_kernels.sparse import Voxels, add, concatenate, global_pool, sparse_maps

MakeConv = Callable[..., SpatiallySparseConv]
MakeNorm = Callable[[int], SparseBatchNorm]


class SparseUNet(nnx.Module):
    """MinkUNet: a U-Net of residual blocks that labels each voxel.

    A stem, then stages that each halve the resolution by a convolution of size and stride 2, and
    as many that double it again by a transposed one and concatenate what the encoder had there. A
    convolution of size 1 makes the classes. Every convolution but the last is followed by batch
    norm. All convolutions of one resolution share a kernel map. The defaults are MinkUNet-14.

    `load_sparse_unet` loads networks that were trained with other libraries.

    Args:
        in_channels: Channels of the input.
        num_classes: Channels of the output.
        stem_dim: Channels of the stem.
        dims: Channels of the stages, first those of the encoder, then as many of the decoder.
        depths: Residual blocks of each stage.
        stem_kernel_sizes: Sizes of the stem's convolutions.
        widening_downsamples: Whether the convolutions of stride 2 make the channels of their stage,
            as in spconv's networks; else the first block does, as in MinkowskiEngine's.
        conv_bias: Whether the convolutions in front of norms have a bias.
        num_spatial_dims: Axes of the voxels, 1, 2 or 3.
        momentum: What stays of the norms' running statistics at each update.
        epsilon: Is added to the variance in norms.
        axis_name: Axis of a mesh that the norms' statistics are taken over.
        fwd_algo: Algorithms of all convolutions, see `flash_wtconv_jax.nnx.SpatiallySparseConv`.
        bwd_algo: Those of the backward pass.
        dtype: Dtype of the computation; None promotes the input with the parameters.
        param_dtype: Dtype of the parameters.
        precision: See `jax.lax.Precision`. None is full float32.
        rngs: Source of the keys.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from flax import nnx
        >>> from pallas_kernels.sparse import from_coords
        >>> voxels = from_coords([[0, 1, 1, 1], [0, 9, 2, 3]], jnp.ones((2, 4)))
        >>> small = {"dims": (8, 8), "depths": (1, 1)}
        >>> model = nnx.eval_shape(lambda: SparseUNet(4, 20, **small, rngs=nnx.Rngs(0)))
        >>> nnx.eval_shape(lambda model, x: model(x), model, voxels).features.shape
        (2, 20)
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        stem_dim: int = 32,
        dims: Sequence[int] = (32, 64, 128, 256, 256, 128, 96, 96),
        depths: Sequence[int] = (1,) * 8,
        stem_kernel_sizes: Sequence[PerAxis] = (5,),
        widening_downsamples: bool = False,
        conv_bias: bool = False,
        num_spatial_dims: int = 3,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        axis_name: str | None = None,
        fwd_algo: ImplementationLike = None,
        bwd_algo: ImplementationLike = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        rngs: nnx.Rngs,
    ) -> None:
        _check_stages(dims, depths)
        if len(dims) % 2:
            raise ValueError(f"dims={dims!r}: expected as many of the encoder as of the decoder")
        check_constructor(in_channels=in_channels, stem_dim=stem_dim)
        conv = partial(
            SpatiallySparseConv,
            num_spatial_dims=num_spatial_dims,
            fwd_algo=fwd_algo,
            bwd_algo=bwd_algo,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            rngs=checked_rngs(rngs),
        )
        norm = partial(
            SparseBatchNorm,
            momentum=momentum,
            epsilon=epsilon,
            axis_name=axis_name,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        biased, half = partial(conv, bias=conv_bias), len(dims) // 2
        self.stem: nnx.List[ConvNorm] = nnx.List([])
        width = in_channels
        for size in stem_kernel_sizes:
            self.stem.append(ConvNorm(width, stem_dim, size, conv=biased, norm=norm))
            width = stem_dim
        self.down: nnx.List[ConvNorm] = nnx.List([])
        self.encoder: nnx.List[nnx.List[SparseBasicBlock]] = nnx.List([])
        skips = []
        for dim, depth in zip(dims[:half], depths[:half], strict=True):
            skips.append(width)
            inner = dim if widening_downsamples else width
            self.down.append(ConvNorm(width, inner, 2, 2, conv=biased, norm=norm))
            self.encoder.append(_blocks(inner, dim, depth, conv=biased, norm=norm))
            width = dim
        self.up: nnx.List[ConvNorm] = nnx.List([])
        self.decoder: nnx.List[nnx.List[SparseBasicBlock]] = nnx.List([])
        for dim, depth in zip(dims[half:], depths[half:], strict=True):
            opposite = partial(biased, transposed=True)
            self.up.append(ConvNorm(width, dim, 2, 2, conv=opposite, norm=norm))
            self.decoder.append(_blocks(dim + skips.pop(), dim, depth, conv=biased, norm=norm))
            width = dim
        self.head = conv(width, num_classes, 1)

    def __call__(self, voxels: Voxels) -> Voxels:
        """Label voxels.

        Args:
            voxels: Voxels with `in_channels` features, in any order.

        Returns:
            The same voxels in the same order, with a score of each class.

        Raises:
            ValueError: If the voxels do not fit.
            NotImplementedError: If a named algorithm cannot run here; it says why.
        """
        with sparse_maps():
            for layer in self.stem:
                voxels = _relu(layer(voxels))
            skips = []
            for down, blocks in zip(self.down, self.encoder, strict=True):
                skips.append(voxels)
                voxels = _through(blocks, _relu(down(voxels)))
            for up, blocks in zip(self.up, self.decoder, strict=True):
                skip = skips.pop()
                voxels = _through(blocks, concatenate(_relu(up(voxels, skip)), skip))
            return self.head(voxels)


class SparseResNet(nnx.Module):
    """A ResNet of basic blocks that classifies each sample.

    A stem of stride 2, stages of which each but the first halves the resolution, the mean over the
    voxels of a sample, and a linear layer. The defaults are ResNet-14.

    Args:
        in_channels: Channels of the input.
        num_classes: Classes; 0 leaves out the linear layer.
        dims: Channels of the stages.
        depths: Residual blocks of each stage.
        num_spatial_dims: Axes of the voxels, 1, 2 or 3.
        momentum: What stays of the norms' running statistics at each update.
        epsilon: Is added to the variance in norms.
        axis_name: Axis of a mesh that the norms' statistics are taken over.
        fwd_algo: Algorithms of all convolutions, see `flash_wtconv_jax.nnx.SpatiallySparseConv`.
        bwd_algo: Those of the backward pass.
        dtype: Dtype of the computation; None promotes the input with the parameters.
        param_dtype: Dtype of the parameters.
        precision: See `jax.lax.Precision`. None is full float32.
        rngs: Source of the keys.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from flax import nnx
        >>> from pallas_kernels.sparse import from_coords
        >>> voxels = from_coords([[0, 1, 1, 1], [1, 9, 2, 3]], jnp.ones((2, 4)))
        >>> small = {"dims": (8,), "depths": (1,)}
        >>> model = nnx.eval_shape(lambda: SparseResNet(4, 10, **small, rngs=nnx.Rngs(0)))
        >>> nnx.eval_shape(lambda model, x: model(x), model, voxels).shape
        (2, 10)
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (1, 1, 1, 1),
        num_spatial_dims: int = 3,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        axis_name: str | None = None,
        fwd_algo: ImplementationLike = None,
        bwd_algo: ImplementationLike = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        rngs: nnx.Rngs,
    ) -> None:
        _check_stages(dims, depths)
        check_constructor(in_channels=in_channels, num_classes=num_classes)
        conv = partial(
            SpatiallySparseConv,
            bias=False,
            num_spatial_dims=num_spatial_dims,
            fwd_algo=fwd_algo,
            bwd_algo=bwd_algo,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            rngs=checked_rngs(rngs),
        )
        norm = partial(
            SparseBatchNorm,
            momentum=momentum,
            epsilon=epsilon,
            axis_name=axis_name,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        width = dims[0]
        self.stem = ConvNorm(in_channels, width, 3, 2, conv=conv, norm=norm)
        self.stages: nnx.List[nnx.List[SparseBasicBlock]] = nnx.List([])
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            stride = 2 if i else 1
            self.stages.append(_blocks(width, dim, depth, stride, conv=conv, norm=norm))
            width = dim
        self.head = nnx.data(None)
        if num_classes:
            self.head = nnx.Linear(
                width,
                num_classes,
                dtype=dtype,
                param_dtype=param_dtype,
                precision=precision,
                rngs=rngs,
            )

    def __call__(self, voxels: Voxels) -> jax.Array:
        """Classify samples.

        Args:
            voxels: Voxels with `in_channels` features, in any order.

        Returns:
            `[batch_size, num_classes]`, or the features of the last stage without classes.

        Raises:
            ValueError: If the voxels do not fit.
            NotImplementedError: If a named algorithm cannot run here; it says why.
        """
        with sparse_maps():
            voxels = _relu(self.stem(voxels))
            for blocks in self.stages:
                voxels = _through(blocks, voxels)
        pooled = global_pool(voxels)
        return pooled if self.head is None else self.head(pooled)


def load_sparse_unet(
    path: str | os.PathLike[str], library: str | None = None, **options: Any
) -> SparseUNet:
    """A MinkUNet of MinkowskiEngine, spconv or torchsparse, with its weights.

    Args:
        path: `.safetensors` or `.pth` file with its state dict.
        library: See `checkpoints.sparse_unet_from_torch`; None recognises it.
        **options: Arguments of `SparseUNet`, such as `dtype`, that the weights do not tell.

    Returns:
        The model; `model.eval()` applies its running statistics.

    Raises:
        FileNotFoundError: There is no file at path.
        ValueError: It is no state dict of a MinkUNet: everything that does not fit is listed.
    """
    weights = checkpoints.sparse_unet_from_torch(checkpoints.read_state_dict(path), library)
    arguments = weights.options | options
    model = nnx.eval_shape(lambda: SparseUNet(**arguments, rngs=nnx.Rngs(0)))
    checkpoints.load_into(model, weights.variables)
    return model


class ConvNorm(nnx.Module):
    """A convolution and the batch norm behind it.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Offsets along each axis.
        stride: The stride.
        conv: Makes a convolution from these four.
        norm: Makes a norm from channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: PerAxis,
        stride: PerAxis = 1,
        *,
        conv: MakeConv,
        norm: MakeNorm,
    ) -> None:
        self.conv = conv(in_channels, out_channels, kernel_size, stride)
        self.norm = norm(out_channels)

    def __call__(self, voxels: Voxels, output_voxels: Voxels | None = None) -> Voxels:
        """Map voxels to those of the output, which may be given."""
        return self.norm(self.conv(voxels, output_voxels))


class SparseBasicBlock(nnx.Module):
    """Two convolutions of size 3 with batch norm, and what came in added before the last ReLU.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; where they differ, or with a stride, a convolution of
            size 1 with batch norm leads past the block.
        stride: Stride of the first convolution.
        conv: Makes a convolution, see `ConvNorm`.
        norm: Makes a norm from channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        *,
        conv: MakeConv,
        norm: MakeNorm,
    ) -> None:
        self.first = ConvNorm(in_channels, out_channels, 3, stride, conv=conv, norm=norm)
        self.second = ConvNorm(out_channels, out_channels, 3, conv=conv, norm=norm)
        self.shortcut = nnx.data(None)
        if stride != 1 or in_channels != out_channels:
            unbiased = partial(conv, bias=False)
            self.shortcut = ConvNorm(in_channels, out_channels, 1, stride, conv=unbiased, norm=norm)

    def __call__(self, voxels: Voxels) -> Voxels:
        """Map voxels to those of the output."""
        y = self.second(_relu(self.first(voxels)))
        if self.shortcut is not None:
            # At a stride both ways must lead to the same rows.
            voxels = self.shortcut(voxels, None if y.coords is voxels.coords else y)
        return _relu(add(y, voxels))


def _blocks(
    in_channels: int,
    out_channels: int,
    depth: int,
    stride: int = 1,
    *,
    conv: MakeConv,
    norm: MakeNorm,
) -> nnx.List[SparseBasicBlock]:
    """The blocks of a stage, of which the first may change the channels and the resolution."""
    first = SparseBasicBlock(in_channels, out_channels, stride, conv=conv, norm=norm)
    others = [
        SparseBasicBlock(out_channels, out_channels, conv=conv, norm=norm) for _ in range(depth - 1)
    ]
    return nnx.List([first, *others])


def _through(blocks: nnx.List[SparseBasicBlock], voxels: Voxels) -> Voxels:
    for block in blocks:
        voxels = block(voxels)
    return voxels


def _relu(voxels: Voxels) -> Voxels:
    return voxels.with_features(nnx.relu(voxels.features))


def _check_stages(dims: Sequence[int], depths: Sequence[int]) -> None:
    """Raises an error where channels and blocks are not those of some stages."""
    if not dims or len(dims) != len(depths):
        raise ValueError(f"depths={depths!r}: expected one for each of dims={dims!r}")
    for dim, depth in zip(dims, depths, strict=True):
        checked_integer(dim, "dims", least=1)
        checked_integer(depth, "depths", least=1)
