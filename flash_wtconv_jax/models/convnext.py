"""WTConvNeXt and ConvNeXt: one network, whose depthwise convolution is WTConv or a plain 7x7.

Sources: Finder et al., "Wavelet Convolutions for Large Receptive Fields", ECCV 2024 (WTConvNeXt);
Liu et al., "A ConvNet for the 2020s", CVPR 2022 (ConvNeXt); Woo et al., "ConvNeXt V2", CVPR 2023
(global response normalisation). Parameters are named as in timm's ConvNeXt, with Flax's `kernel`
and `scale` for PyTorch's `weight`.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike

from flash_wtconv_jax.functional import mlp as functional
from flash_wtconv_jax.functional.arguments import (
    ImplementationLike,
    PrecisionLike,
    check_constructor,
    checked_rngs,
)
from flash_wtconv_jax.functional.conv2d import Padding
from flash_wtconv_jax.functional.mlp import gelu, response_norm
from flash_wtconv_jax.functional.wtconv import Computation, check_computation
from flash_wtconv_jax.nnx import Conv2d, DepthwiseConv2d, WTConv2d
from pallas_kernels.common import sharding
from pallas_kernels.common.arguments import (
    MOST_LEVELS,
    checked_array,
    checked_integer,
)
from pallas_kernels.common.border import border
from pallas_kernels.common.dtypes import accumulation_dtype
from pallas_kernels.common.integers import LARGEST
from pallas_kernels.common.types import Keywords
from pallas_kernels.conv2d.api import OPERATOR as CONV2D
from pallas_kernels.depthwise.api import OPERATOR as DEPTHWISE
from pallas_kernels.wtconv.api import OPERATOR as WTCONV

_MLP_RATIO = 4
# The places of the two convolutions in timm's sequence: the second follows an activation, or not.
_OVERLAPPED = {"overlap": (0, 1), "overlap_tiered": (0, 1), "overlap_act": (0, 2)}
_EPSILON = 1e-6

# The published code truncates at +-2, that is at 100 standard deviations, not at +-2 of them.
_kernel_init: Initializer = nnx.initializers.truncated_normal(0.02, lower=-100.0, upper=100.0)


@dataclasses.dataclass(frozen=True)
class ConvNeXtConfig:
    """Everything that `ConvNeXt` is made from; the defaults are WTConvNeXt-T.

    Attributes:
        depths: Blocks in each stage.
        dims: Channels of each stage.
        kernel_size: Taps of the depthwise convolutions along each axis, or those of each stage.
        levels: Wavelet levels of the WTConv in each stage; None has plain depthwise convolutions.
        in_channels: Channels of the input.
        num_classes: Features of the head; 0 leaves out the linear layer.
        patch_size: Size and stride of the stem's convolution. Overlapped stems do not use it.
        stem_type: "patch"; or a stem of two 3x3 convolutions of stride 2, as timm has them:
            "overlap", "overlap_tiered" with half the channels between them, "overlap_act" with the
            activation between them.
        first_downsample: Whether the first stage downsamples too, as timm's does behind a stem of
            `patch_size=2`.
        conv_bias: Whether convolutions have a bias; the MLPs and the head always have.
        drop_path: Stochastic depth of the last block; it grows linearly from 0 at the first.
        dropout: Dropout before the head's linear layer.
        layer_scale: Initial value of each block's `gamma`; None leaves it out.
        use_grn: Whether the MLPs have global response normalisation (as in ConvNeXt V2).
        head_init_scale: Factor on the initial kernel of the head.
        head_norm_first: Whether the last map is normalised before it is averaged, not after.
        head_hidden_size: Features of a linear layer and a GELU before the head's linear layer; None
            leaves them out.
        features_only: Whether the model returns the maps of all stages, and has no head.
        feature_norms: Whether it normalises each of them, as backbones of dense prediction do.
        remat: Whether blocks are recomputed in the backward pass, to save memory.
        wavelet: Any discrete PyWavelets name.
        dtype: Dtype of the computation; None promotes the input with the parameters.
        param_dtype: Dtype of the parameters.
        precision: See `jax.lax.Precision`. None is JAX's default, and full float32 in the
            depthwise convolutions, the stem and the downsampling.
        implementation: Implementations of WTConv, see `flash_wtconv_jax.nnx.WTConv2d`; without
            `levels` of the depthwise convolutions, see `flash_wtconv_jax.nnx.DepthwiseConv2d`.
        conv_implementation: Implementations of the stem's and the downsampling's convolutions, see
            `flash_wtconv_jax.nnx.Conv2d`. The MLPs are matrix products, which XLA computes.

    Raises:
        ValueError: If a field is out of range.

    Example:
        >>> ConvNeXtConfig(depths=(1, 2), dims=(8, 16), levels=(2, 1), num_classes=10).kernel_size
        5
    """

    depths: tuple[int, ...] = (3, 3, 9, 3)
    dims: tuple[int, ...] = (96, 192, 384, 768)
    kernel_size: int | tuple[int, ...] = 5
    levels: tuple[int, ...] | None = (5, 4, 3, 2)
    in_channels: int = 3
    num_classes: int = 1000
    patch_size: int = 4
    stem_type: str = "patch"
    first_downsample: bool = False
    conv_bias: bool = True
    drop_path: float = 0.0
    dropout: float = 0.0
    layer_scale: float | None = 1e-6
    use_grn: bool = False
    head_init_scale: float = 1.0
    head_norm_first: bool = False
    head_hidden_size: int | None = None
    features_only: bool = False
    feature_norms: bool = False
    remat: bool = False
    wavelet: str = "haar"
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    precision: PrecisionLike = None
    implementation: ImplementationLike = None
    conv_implementation: ImplementationLike = None

    def __post_init__(self) -> None:
        # Lists, as JSON has them, become tuples: the config must hash, for linen and nnx.jit.
        # NumPy's numbers become Python's: it must go into JSON too.
        lists = ("depths", "dims", "levels", "kernel_size", "implementation", "conv_implementation")
        for name in lists:
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_stages()
        for name in ("kernel_size", "in_channels", "patch_size", "num_classes"):
            value = getattr(self, name)
            if not isinstance(value, tuple):
                check_constructor(**{name: value})
                object.__setattr__(self, name, int(value))
        self._check_stem_and_head()
        # A protocol's attributes are settable, those of a frozen dataclass are not.
        operator = DEPTHWISE if self.levels is None else WTCONV
        check_computation(cast(Computation, self), operator)
        CONV2D.check_names(self.conv_implementation, "conv_implementation")
        for name in ("drop_path", "dropout", "layer_scale", "head_init_scale"):
            value = getattr(self, name)
            if name == "layer_scale" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise ValueError(f"{name} must be a number, got {value!r}")
            try:
                number = float(value)
            except OverflowError:  # An integer beyond all floats.
                number = math.inf
            if not math.isfinite(number):
                raise ValueError(f"{name} must be a finite number, got {value!r}")
            if name.startswith("drop") and not 0.0 <= number < 1.0:
                raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")
            object.__setattr__(self, name, number)

    def _check_stages(self) -> None:
        for name in ("depths", "dims", "levels", "kernel_size"):
            value = getattr(self, name)
            if name == "levels" and value is None:
                continue
            if name == "kernel_size" and not isinstance(value, tuple):
                continue
            if not isinstance(value, tuple) or not value:
                raise ValueError(f"{name} must hold one int for each stage, got {value!r}")
            if len(value) != len(self.depths):
                raise ValueError(
                    f"{name} must have one entry for each of the {len(self.depths)} stages of "
                    f"depths={self.depths}, got {value}"
                )
            least, most = (0, MOST_LEVELS) if name == "levels" else (1, LARGEST)
            try:
                plain = tuple(checked_integer(one, name, least=least, most=most) for one in value)
            except ValueError:
                raise ValueError(
                    f"each entry of {name}={value} must be an integer >= {least} and <= {most}"
                ) from None
            object.__setattr__(self, name, plain)

    def _check_stem_and_head(self) -> None:
        if self.stem_type not in _OVERLAPPED and self.stem_type != "patch":
            known = ", ".join(repr(name) for name in ("patch", *_OVERLAPPED))
            raise ValueError(f"stem_type must be one of {known}, got {self.stem_type!r}")
        if self.head_hidden_size is not None:
            size = checked_integer(self.head_hidden_size, "head_hidden_size", least=1)
            object.__setattr__(self, "head_hidden_size", size)
            if self.head_norm_first:
                raise ValueError("head_hidden_size must be None with head_norm_first=True")
        if self.feature_norms and not self.features_only:
            raise ValueError("feature_norms=True needs features_only=True")

    @property
    def kernel_sizes(self) -> tuple[int, ...]:
        """Taps of the depthwise convolutions of each stage.

        Example:
            >>> ConvNeXtConfig().kernel_sizes
            (5, 5, 5, 5)
        """
        size = self.kernel_size
        return size if isinstance(size, tuple) else (size,) * len(self.depths)

    @property
    def total_stride(self) -> int:
        """Pixels of the input for each unit of the last map, along an axis.

        Example:
            >>> ConvNeXtConfig().total_stride
            32
        """
        stem = self.patch_size if self.stem_type == "patch" else 4
        return stem * 2 ** (len(self.depths) - 1 + self.first_downsample)


class ConvNeXt(nnx.Module):
    """ConvNeXt with WTConv (`config.levels`) or plain depthwise convolutions (None).

    A stem that cuts the image into patches, stages of residual blocks with a 2x2 downsampling
    between them, and a head on the averaged last map. Dropout and drop path follow nnx's idiom:
    on after construction and `model.train()`, off after `model.eval()`, and
    `nnx.reseed(model, dropout=key)` begins their randomness anew.

    In linen, through Flax's bridge (give a "dropout" key too if `drop_path` or `dropout` is set):
    see the second example.

    Args:
        config: The sizes and options of the model.
        rngs: Source of the keys: `params`, and `dropout` for dropout and drop path.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> config = ConvNeXtConfig(depths=(1,), dims=(8,), levels=(1,), num_classes=10)
        >>> model = ConvNeXt(config, rngs=nnx.Rngs(0))
        >>> x = jax.numpy.ones((2, 32, 32, 3))
        >>> model(x).shape
        (2, 10)

        >>> linen_model = nnx.bridge.to_linen(ConvNeXt, config)
        >>> variables = linen_model.init(jax.random.key(0), x)
        >>> linen_model.apply(variables, x, deterministic=True).shape
        (2, 10)
    """

    def __init__(self, config: ConvNeXtConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        checked_rngs(rngs)
        make = Stem if config.stem_type == "patch" else OverlappedStem
        self.stem = make(config, rngs=rngs)
        drop_paths = np.linspace(0.0, config.drop_path, sum(config.depths)).tolist()
        starts = np.cumsum((0, *config.depths))
        self.stages = nnx.List(
            Stage(config, s, drop_paths[starts[s] : starts[s + 1]], rngs=rngs)
            for s in range(len(config.depths))
        )
        self.norms = nnx.data(None)
        if config.feature_norms:
            self.norms = nnx.List(layer_norm(config, dim, rngs=rngs) for dim in config.dims)
        # Here and not in the head, as timm has it.
        self.norm_pre = nnx.data(None)
        if config.head_norm_first and not config.features_only:
            self.norm_pre = layer_norm(config, config.dims[-1], rngs=rngs)
        self.head = nnx.data(None if config.features_only else Head(config, rngs=rngs))

    def __call__(
        self, x: ArrayLike, *, deterministic: bool | None = None
    ) -> jax.Array | list[jax.Array]:
        """Compute the logits, or the pyramid of maps with `features_only`.

        Args:
            x: Images `[N, H, W, in_channels]`; H and W at least `patch_size * 2**(stages - 1)`.
            deterministic: Turns dropout and drop path off (True) or on (False); None leaves it to
                `model.train()` and `model.eval()`.

        Returns:
            Logits `[N, num_classes]`; with `num_classes=0` what the head's linear layer would take,
            by default the normalised average of the last map `[N, dims[-1]]`; with `features_only`
            what `features` returns.

        Raises:
            ValueError: If `x` is not floating point, its shape does not fit, or Explicit axes of a
                mesh split its rows or columns so that a stage does not split evenly.
        """
        maps = self.features(x, deterministic=deterministic)
        if self.head is None:
            return maps
        last = maps[-1] if self.norm_pre is None else self.norm_pre(maps[-1])
        with jax.named_scope("head"):
            return self.head(last, deterministic=deterministic)

    def features(self, x: ArrayLike, *, deterministic: bool | None = None) -> list[jax.Array]:
        """Compute the map that each stage returns, finest first.

        Args:
            x: Images `[N, H, W, in_channels]`.
            deterministic: As in `__call__`.

        Returns:
            One map `[N, H // (patch_size * 2**s), W // (patch_size * 2**s), dims[s]]` a stage s;
            normalised with `feature_norms`.

        Raises:
            ValueError: If `x` is not floating point or its shape does not fit.
        """
        x = checked_array(x, "x")
        self._check_input(x.shape)
        self._check_split(x)
        with jax.named_scope("stem"):
            x = self.stem(x)
        maps = []
        for stage in self.stages:
            x = stage(x, deterministic=deterministic)
            maps.append(x)
        if self.norms is not None:
            maps = [_of_rows(norm, x) for norm, x in zip(self.norms, maps, strict=True)]
        return maps

    def _check_input(self, shape: tuple[int, ...]) -> None:
        channels = self.config.in_channels
        least = self.config.total_stride
        if len(shape) != 4 or shape[-1] != channels:
            raise ValueError(
                f"x must have shape (N, H, W, in_channels) with in_channels={channels}, got {shape}"
            )
        if min(shape[1:3]) < least:
            raise ValueError(
                f"x must be at least {least} pixels high and wide, so that the last stage has a "
                f"pixel left, got {shape}; give a smaller patch_size or fewer stages"
            )

    def _check_split(self, x: jax.Array) -> None:
        """Raises ValueError where a stage would not split as the image does."""
        config = self.config
        stem = (config.patch_size,) if config.stem_type == "patch" else (2, 2)
        steps = [("the stem", step) for step in stem]
        later = range(0 if config.first_downsample else 1, len(config.depths))
        steps += [(f"the downsampling before stage {s}", 2) for s in later]
        for axis, name in ((1, "H"), (2, "W")):
            parts, size = sharding.parts(x, axis), x.shape[axis]
            for place, step in steps if parts > 1 else ():
                if size % (step * parts):
                    least = parts * config.total_stride
                    raise ValueError(
                        f"x {x.shape} is split into {parts} shards along {name}, but {place} maps "
                        f"{size} samples to {size // step}, which do not split evenly; make {name} "
                        f"a multiple of {least}, or split the image into fewer shards"
                    )
                size //= step


class Stem(nnx.Module):
    """Patch embedding: a convolution as large as its stride, then LayerNorm.

    Args:
        config: The config of the model.
        rngs: Source of the keys.
    """

    def __init__(self, config: ConvNeXtConfig, *, rngs: nnx.Rngs) -> None:
        self.conv = _patch_conv(
            config, config.in_channels, config.dims[0], config.patch_size, rngs=rngs
        )
        self.norm = layer_norm(config, config.dims[0], rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, H, W, in_channels]` to `[N, H // patch_size, W // patch_size, dims[0]]`."""
        return _of_rows(self.norm, self.conv(x))


class OverlappedStem(nnx.Module):
    """Two 3x3 convolutions of stride 2, an activation between them or none, then LayerNorm.

    Args:
        config: The config of the model.
        rngs: Source of the keys.
    """

    def __init__(self, config: ConvNeXtConfig, *, rngs: nnx.Rngs) -> None:
        dim = config.dims[0]
        mid = _half(dim) if config.stem_type == "overlap_tiered" else dim
        self.names = tuple(f"conv_{place}" for place in _OVERLAPPED[config.stem_type])
        self.activated = config.stem_type == "overlap_act"
        widths = (config.in_channels, mid, dim)
        for name, before, after in zip(self.names, widths, widths[1:], strict=False):
            conv = _patch_conv(config, before, after, 3, rngs=rngs, stride=2, padding=((1, 1),) * 2)
            setattr(self, name, conv)
        self.norm = layer_norm(config, dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, H, W, in_channels]` to `[N, ceil(H / 4), ceil(W / 4), dims[0]]`."""
        first, second = (getattr(self, name) for name in self.names)
        x = first(x)
        if self.activated:
            x = gelu(x)
        return _of_rows(self.norm, second(x))


def _half(dim: int) -> int:
    """Half of the channels as timm rounds it: to a multiple of 8, by no more than a tenth down."""
    half = dim // 2
    rounded = max(8, (half + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * half else rounded


class Downsample(nnx.Module):
    """LayerNorm, then a 2x2 convolution of stride 2, between two stages.

    Args:
        config: The config of the model.
        stage: Index of the stage that follows.
        rngs: Source of the keys.
    """

    def __init__(self, config: ConvNeXtConfig, stage: int, *, rngs: nnx.Rngs) -> None:
        before, after = config.dims[max(stage - 1, 0)], config.dims[stage]
        self.norm = layer_norm(config, before, rngs=rngs)
        self.conv = _patch_conv(config, before, after, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, H, W, dims[stage - 1]]` to `[N, H // 2, W // 2, dims[stage]]`."""
        return self.conv(_of_rows(self.norm, x))


class Stage(nnx.Module):
    """Downsampling, for all but the first stage, and the blocks.

    Args:
        config: The config of the model.
        stage: Index of the stage.
        drop_paths: Drop path rate of each block.
        rngs: Source of the keys.
    """

    def __init__(
        self, config: ConvNeXtConfig, stage: int, drop_paths: list[float], *, rngs: nnx.Rngs
    ) -> None:
        downsamples = stage or config.first_downsample
        self.downsample = nnx.data(Downsample(config, stage, rngs=rngs) if downsamples else None)
        self.blocks = nnx.List(Block(config, stage, rate, rngs=rngs) for rate in drop_paths)
        self.remat = config.remat

    def __call__(self, x: jax.Array, *, deterministic: bool | None = None) -> jax.Array:
        """Run the stage; maps as in `ConvNeXt.features`."""

        def run(block: Block, x: jax.Array) -> jax.Array:
            return block(x, deterministic=deterministic)

        if self.downsample is not None:
            with jax.named_scope("downsample"):
                x = self.downsample(x)
        if self.remat:
            # Without graph updates only what a block changes, its random state, is written back:
            # a model from outside a jax.jit or jax.grad can be called inside, as without remat.
            run = nnx.remat(run, graph_updates=False)
        for block in self.blocks:
            x = run(block, border(x))
        return border(x)


class Block(nnx.Module):
    """Residual block: depthwise convolution, LayerNorm, MLP, layer scale, drop path.

    Args:
        config: The config of the model.
        stage: Index of the stage.
        drop_path: Probability that the block is skipped for a sample in training.
        rngs: Source of the keys.
    """

    def __init__(
        self, config: ConvNeXtConfig, stage: int, drop_path: float, *, rngs: nnx.Rngs
    ) -> None:
        dim = config.dims[stage]
        self.conv_dw = _depthwise_conv(config, stage, rngs=rngs)
        self.norm = layer_norm(config, dim, rngs=rngs)
        self.mlp = Mlp(config, dim, rngs=rngs)
        if config.layer_scale is None:
            self.gamma = nnx.data(None)
        else:
            self.gamma = nnx.Param(jnp.full((dim,), config.layer_scale, config.param_dtype))
        # Dropping whole samples is drop path.
        self.drop_path = _dropout(drop_path, broadcast_dims=(-3, -2, -1), rngs=rngs)

    def __call__(self, x: jax.Array, *, deterministic: bool | None = None) -> jax.Array:
        """Map `[N, H, W, dim]` to the same shape."""
        with jax.named_scope("depthwise"):
            y = self.conv_dw(x)
        gamma = None if self.gamma is None else self.gamma[...]
        if self._as_made():
            still = self.drop_path.deterministic if deterministic is None else deterministic
            if not self.drop_path.rate or still:
                return self.mlp.folded(y, self.norm, gamma, residual=x)
            y = self.mlp.folded(y, self.norm, gamma)
        else:
            y = self.mlp(self.norm(y))
            y = y if gamma is None else y * gamma.astype(y.dtype)
        return x + self.drop_path(y, deterministic=deterministic)

    def _as_made(self) -> bool:
        """Whether all that `folded` computes is still what it was made as, and nobody's own."""
        mlp, norm = self.mlp, self.norm
        if type(mlp) is not Mlp or type(norm) is not nnx.LayerNorm:
            return False
        layers = mlp.fc1, mlp.fc2
        plain = all(
            type(layer) is nnx.Linear and layer.dot_general is jax.lax.dot_general
            for layer in layers
        )
        alike = all(
            getattr(mlp.fc1, name) == getattr(mlp.fc2, name) for name in ("dtype", "precision")
        )
        own = norm.scale, norm.bias, *(layer.bias for layer in layers)
        known = type(mlp.grn) in (type(None), GlobalResponseNorm)
        return plain and alike and known and all(one is not None for one in own)


class Mlp(nnx.Module):
    """Pointwise MLP of four times the width, with exact GELU and optional GRN.

    Args:
        config: The config of the model.
        dim: Channels.
        rngs: Source of the keys.
    """

    def __init__(self, config: ConvNeXtConfig, dim: int, *, rngs: nnx.Rngs) -> None:
        hidden = _MLP_RATIO * dim
        self.fc1 = linear(config, dim, hidden, rngs=rngs)
        self.grn = nnx.data(
            GlobalResponseNorm(hidden, config.param_dtype) if config.use_grn else None
        )
        self.fc2 = linear(config, hidden, dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, H, W, dim]` to the same shape."""
        x = gelu(self.fc1(x))
        if self.grn is not None:
            x = self.grn(x)
        return self.fc2(x)

    def folded(
        self,
        x: jax.Array,
        norm: nnx.LayerNorm,
        gamma: jax.Array | None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """Map `[N, H, W, dim]` to the same shape: LayerNorm first, layer scale and a sum last."""
        fc1, fc2 = self.fc1, self.fc2
        assert fc1.bias is not None and fc2.bias is not None
        assert norm.scale is not None and norm.bias is not None
        params = functional.MlpParams(
            (fc1.kernel[...], fc2.kernel[...]),
            (fc1.bias[...], fc2.bias[...]),
            (norm.scale[...], norm.bias[...]),
            None if self.grn is None else (self.grn.scale[...], self.grn.bias[...]),
            gamma,
        )
        how: Keywords = {"dtype": fc1.dtype, "precision": fc1.precision}
        return functional.norm_mlp(x, params, residual=residual, epsilon=norm.epsilon, **how)


class GlobalResponseNorm(nnx.Module):
    """Global response normalisation: channels compete by their norm over the whole map.

    Starts as the identity. Norms are computed in float32 or better.

    Source: Woo et al., "ConvNeXt V2", CVPR 2023.

    Args:
        dim: Channels.
        param_dtype: Dtype of the parameters `scale [dim]` and `bias [dim]`.

    Example:
        >>> import jax
        >>> GlobalResponseNorm(4)(jax.numpy.ones((1, 2, 2, 4))).shape
        (1, 2, 2, 4)
    """

    def __init__(self, dim: int, param_dtype: DTypeLike = jnp.float32) -> None:
        self.scale = nnx.Param(jnp.zeros((dim,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((dim,), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map `[N, H, W, dim]` to the same shape and dtype."""
        return response_norm(x, self.scale[...], self.bias[...], _EPSILON)


class Head(nnx.Module):
    """Global average, LayerNorm, a hidden layer or none, dropout and the linear classifier.

    Args:
        config: The config of the model.
        rngs: Source of the keys.
    """

    def __init__(self, config: ConvNeXtConfig, *, rngs: nnx.Rngs) -> None:
        dim = config.dims[-1]
        # As nnx.data, so that a model without classes can be given a head of one's own later.
        self.norm, self.pre_logits, self.fc = nnx.data(None), nnx.data(None), nnx.data(None)
        if not config.head_norm_first:
            self.norm = layer_norm(config, dim, rngs=rngs)
        if config.head_hidden_size is not None:
            self.pre_logits = linear(config, dim, config.head_hidden_size, rngs=rngs)
            dim = config.head_hidden_size
        self.dropout = _dropout(config.dropout, rngs=rngs)
        if config.num_classes:
            self.fc = linear(config, dim, config.num_classes, rngs=rngs)
            self.fc.kernel[...] *= config.head_init_scale

    def __call__(self, x: jax.Array, *, deterministic: bool | None = None) -> jax.Array:
        """Map `[N, H, W, dims[-1]]` to `[N, num_classes]`, or `[N, dims[-1]]` for 0 classes."""
        x = jnp.mean(x, axis=(-3, -2))
        if self.norm is not None:
            x = self.norm(x)
        if self.pre_logits is not None:
            x = gelu(self.pre_logits(x))
        x = self.dropout(x, deterministic=deterministic)
        return x if self.fc is None else self.fc(x)


def _dropout(rate: float, *, broadcast_dims: Sequence[int] = (), rngs: nnx.Rngs) -> nnx.Dropout:
    """A dropout whose stream is named so: `nnx.reseed(model, dropout=key)` reaches it.

    One forked off `nnx.Rngs(0)` would be named "default", and `reseed` would pass it over.
    """
    # Without a rate no random state is carried along.
    own = nnx.Rngs(dropout=rngs.dropout()) if rate else None
    return nnx.Dropout(rate, broadcast_dims=broadcast_dims, rngs=own)


def _depthwise_conv(config: ConvNeXtConfig, stage: int, *, rngs: nnx.Rngs) -> nnx.Module:
    dim, kernel_size = config.dims[stage], config.kernel_sizes[stage]
    shared: Keywords = {
        "use_bias": config.conv_bias,
        "kernel_init": _kernel_init,
        "bias_init": nnx.initializers.zeros,
        "dtype": config.dtype,
        "param_dtype": config.param_dtype,
        "precision": config.precision,
        "rngs": rngs,
    }
    if config.levels is None:
        return DepthwiseConv2d(dim, kernel_size, implementation=config.implementation, **shared)
    return WTConv2d(
        dim,
        kernel_size,
        config.levels[stage],
        wavelet=config.wavelet,
        implementation=config.implementation,
        **shared,
    )


def _patch_conv(
    config: ConvNeXtConfig,
    before: int,
    after: int,
    size: int,
    *,
    stride: int | None = None,
    padding: Padding = "VALID",
    rngs: nnx.Rngs,
) -> Conv2d:
    """A convolution of the stem or of a downsampling; None strides by the kernel's size."""
    return Conv2d(
        before,
        after,
        size,
        strides=stride or size,
        padding=padding,
        use_bias=config.conv_bias,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        precision=config.precision,
        kernel_init=_kernel_init,
        implementation=config.conv_implementation,
        rngs=rngs,
    )


def linear(config: ConvNeXtConfig, before: int, after: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer as all in the network are."""
    return nnx.Linear(
        before,
        after,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        precision=config.precision,
        kernel_init=_kernel_init,
        rngs=rngs,
    )


def _of_rows(norm: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """A normalisation of the channels of images, by their pixels as rows where that is the same."""
    if type(norm) is not nnx.LayerNorm or norm.reduction_axes != -1:
        # Somebody's own may look at more than one pixel.
        return norm(x)
    if norm.scale is not None and norm.bias is not None and norm.feature_axes == -1:
        scale, bias = norm.scale[...], norm.bias[...]
        dtypes = x.dtype, scale.dtype, bias.dtype, norm.dtype or x.dtype
        # As in the blocks, so that a CPU compiles both once. In 16 bits Flax rounds once less.
        if all(jnp.dtype(one) == accumulation_dtype(x.dtype) for one in dtypes):
            return functional.layer_norm(x, scale, bias, norm.epsilon)
    return sharding.by_pixel(norm, x)


def layer_norm(config: ConvNeXtConfig, dim: int, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A normalisation of channels as all in the network are."""
    # The fast variance, E[x^2] - E[x]^2, loses digits where the mean is large; PyTorch's does not.
    return nnx.LayerNorm(
        dim,
        epsilon=_EPSILON,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        use_fast_variance=False,
        rngs=rngs,
    )


_TINY = {"depths": (3, 3, 9, 3), "dims": (96, 192, 384, 768)}
_SMALL = {"depths": (3, 3, 27, 3), "dims": (96, 192, 384, 768)}
_BASE = {"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)}
_WAVELET = {"kernel_size": 5, "levels": (5, 4, 3, 2)}
_PLAIN = {"kernel_size": 7, "levels": None}


def wtconvnext_tiny(*, rngs: nnx.Rngs, **options: Any) -> ConvNeXt:
    """WTConvNeXt-T: 30,383,656 parameters.

    Args:
        rngs: Source of the keys.
        **options: Fields of `ConvNeXtConfig` to change.

    Returns:
        The model.

    Raises:
        TypeError: If an option is no field of `ConvNeXtConfig`.
        ValueError: If an option is out of range.

    Example:
        >>> from flax import nnx
        >>> make = lambda: wtconvnext_tiny(num_classes=10, drop_path=0.1, rngs=nnx.Rngs(0))
        >>> nnx.eval_shape(make).head.fc.kernel.shape
        (768, 10)
    """
    return _make(_TINY, _WAVELET, options, rngs)


def wtconvnext_small(*, rngs: nnx.Rngs, **options: Any) -> ConvNeXt:
    """WTConvNeXt-S: 54,015,784 parameters; otherwise as `wtconvnext_tiny`."""
    return _make(_SMALL, _WAVELET, options, rngs)


def wtconvnext_base(*, rngs: nnx.Rngs, **options: Any) -> ConvNeXt:
    """WTConvNeXt-B: 93,647,592 parameters; otherwise as `wtconvnext_tiny`."""
    return _make(_BASE, _WAVELET, options, rngs)


def convnext_tiny(*, rngs: nnx.Rngs, **options: Any) -> ConvNeXt:
    """ConvNeXt-T, the 7x7 baseline: 28,589,128 parameters; otherwise as `wtconvnext_tiny`."""
    return _make(_TINY, _PLAIN, options, rngs)


def convnext_small(*, rngs: nnx.Rngs, **options: Any) -> ConvNeXt:
    """ConvNeXt-S, the 7x7 baseline: 50,223,688 parameters; otherwise as `wtconvnext_tiny`."""
    return _make(_SMALL, _PLAIN, options, rngs)


def convnext_base(*, rngs: nnx.Rngs, **options: Any) -> ConvNeXt:
    """ConvNeXt-B, the 7x7 baseline: 88,591,464 parameters; otherwise as `wtconvnext_tiny`."""
    return _make(_BASE, _PLAIN, options, rngs)


def _make(size: Keywords, operator: Keywords, options: Keywords, rngs: nnx.Rngs) -> ConvNeXt:
    return ConvNeXt(ConvNeXtConfig(**{**size, **operator, **options}), rngs=rngs)
