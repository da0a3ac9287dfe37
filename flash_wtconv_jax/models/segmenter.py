"""WTConvNeXt and ConvNeXt for dense prediction: the maps of all stages, and a light decoder.

The decoder is a feature pyramid without convolutions (Lin et al., "Feature Pyramid Networks", CVPR
2017): what a pixel sees of its surroundings is the backbone's work.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax.typing import ArrayLike

from flash_wtconv_jax.functional.mlp import gelu
from flash_wtconv_jax.models.convnext import ConvNeXt, ConvNeXtConfig, layer_norm, linear
from pallas_kernels.common.arguments import checked_array, checked_integer


class Segmenter(ConvNeXt):
    """Tells the class of each pixel: a ConvNeXt with `features_only`, and a `Decoder`.

    Args:
        config: The backbone's; `num_classes` are the classes of pixels, and its maps are normalised
            (`feature_norms`).
        decoder_dim: Channels of the decoder.
        rngs: Source of the keys, as `ConvNeXt` takes them.

    Raises:
        ValueError: If `config` has no classes, or `decoder_dim` is below 1.

    Example:
        >>> from flax import nnx
        >>> config = ConvNeXtConfig(depths=(1,), dims=(8,), levels=(1,), num_classes=3)
        >>> run = lambda x: Segmenter(config, 16, rngs=nnx.Rngs(0))(x)
        >>> nnx.eval_shape(run, jax.numpy.ones((2, 30, 32, 3))).shape
        (2, 30, 32, 3)
    """

    def __init__(self, config: ConvNeXtConfig, decoder_dim: int = 128, *, rngs: nnx.Rngs) -> None:
        if not config.num_classes:
            raise ValueError("config.num_classes is 0, expected the number of classes of pixels")
        self.decoder_dim = checked_integer(decoder_dim, "decoder_dim", least=1)
        config = dataclasses.replace(config, features_only=True, feature_norms=True)
        super().__init__(config, rngs=rngs)
        self.decoder = Decoder(config, self.decoder_dim, rngs=rngs)

    def __call__(self, x: ArrayLike, *, deterministic: bool | None = None) -> jax.Array:
        """Compute the logits of each pixel.

        Args:
            x: Images `[N, H, W, in_channels]`.
            deterministic: As in `ConvNeXt`.

        Returns:
            Logits `[N, H, W, num_classes]`.

        Raises:
            ValueError: If `x` is not floating point or its shape does not fit.
        """
        x = checked_array(x, "x")
        logits = self.decoder(self.features(x, deterministic=deterministic))
        return _enlarged(logits, x.shape[1:3])


class Decoder(nnx.Module):
    """Logits from a pyramid of maps: from the coarsest down, each is added to the next, enlarged.

    Args:
        config: The backbone's.
        dim: Channels that all maps are brought to.
        rngs: Source of the keys.
    """

    def __init__(self, config: ConvNeXtConfig, dim: int, *, rngs: nnx.Rngs) -> None:
        self.laterals = nnx.List(linear(config, before, dim, rngs=rngs) for before in config.dims)
        self.norm = layer_norm(config, dim, rngs=rngs)
        self.fc = linear(config, dim, config.num_classes, rngs=rngs)

    def __call__(self, maps: list[jax.Array]) -> jax.Array:
        """Map the pyramid, finest first, to logits `[N, H, W, num_classes]` of its finest map."""
        *finer, x = (lateral(one) for lateral, one in zip(self.laterals, maps, strict=True))
        for one in reversed(finer):
            x = one + _enlarged(x, one.shape[1:3])
        return self.fc(gelu(self.norm(x)))


def _enlarged(x: jax.Array, size: Any) -> jax.Array:
    """Maps `[N, h, w, C]` as `[N, *size, C]`, bilinear between the middles of pixels."""
    return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "bilinear").astype(x.dtype)
