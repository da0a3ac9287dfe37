"""StyleViT: a transformer that gives an image the style of another.

Sources: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, for the blocks; Huang and
Belongie, "Arbitrary Style Transfer in Real-Time with Adaptive Instance Normalization", ICCV 2017,
for style as mean and deviation of features.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from flash_wtconv_jax.functional.arguments import checked_rngs
from flash_wtconv_jax.nnx import Conv2d
from pallas_kernels.common.arguments import checked_array
from pallas_kernels.common.device import platform

_PATCH = 8
_WIDE = 4
"""Features of the hidden layer of a block over those of a token."""
_STYLE_BLOCKS = 2
_DRAWN = 16
"""Features of a pixel before the last convolution."""
_EPS = 1e-6
_INIT = nnx.initializers.truncated_normal(0.02)


class _Size(NamedTuple):
    """Features of a token, blocks, and heads of attention."""

    dim: int
    depth: int
    heads: int


_SIZES = {
    "nano": _Size(96, 4, 3),
    "tiny": _Size(192, 6, 3),
    "small": _Size(384, 8, 6),
    "base": _Size(768, 12, 12),
}


class StyleViT(nnx.Module):
    """Image transformation by attention, with the style of a second image.

    Patches of 8 x 8 pixels become tokens, with sines and cosines of their row and column, so that
    any size is taken. Pre-norm blocks follow, whose norms are scaled by one plus, and shifted by,
    linear functions of the style's code. The code is the mean and the deviation of each feature
    over the tokens of the style's image, behind two blocks of their own. A style of one colour,
    whose deviations are 0, so leaves the content as visible as any other. Tokens become pixels
    again, and a convolution that mirrors at the border draws over the edges of patches.

    Args:
        size: "nano" (4 blocks of 96 features), "tiny" (6 of 192), "small" (8 of 384) or "base" (12
            of 768).
        dtype: Dtype of the computation; None promotes the images with the parameters. Attention in
            16 bits is cuDNN's on a GPU.
        param_dtype: Dtype of the parameters.
        rngs: Source of the keys.

    Raises:
        ValueError: If the size is another.

    Example:
        >>> model = nnx.eval_shape(lambda: StyleViT("nano", rngs=nnx.Rngs(0)))
        >>> content, style = jnp.zeros((2, 65, 40, 3)), jnp.zeros((1, 32, 32, 3))
        >>> nnx.eval_shape(lambda model, *images: model(*images), model, content, style).shape
        (2, 65, 40, 3)
    """

    def __init__(
        self,
        size: str = "tiny",
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if size not in _SIZES:
            raise ValueError(f"size is {size!r}, expected one of {', '.join(_SIZES)}")
        checked_rngs(rngs)
        dim, depth, heads = _SIZES[size]
        dtypes = _Dtypes(dtype, param_dtype)
        self.patches = _patches(dim, dtypes, rngs)
        self.style_patches = _patches(dim, dtypes, rngs)
        self.style_blocks = nnx.List(
            [_Block(dim, heads, dtypes, rngs) for _ in range(_STYLE_BLOCKS)]
        )
        self.codes = nnx.List([_linear(2 * dim, 4 * dim, dtypes, rngs) for _ in range(depth)])
        self.blocks = nnx.List([_Block(dim, heads, dtypes, rngs) for _ in range(depth)])
        self.norm = _norm(dim, dtypes, rngs)
        self.pixels = _linear(dim, _PATCH**2 * _DRAWN, dtypes, rngs)
        self.draw = Conv2d(
            _DRAWN + 3,
            3,
            3,
            padding="REFLECT",
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=_INIT,
            rngs=rngs,
        )

    def __call__(self, content: ArrayLike, style: ArrayLike) -> jax.Array:
        """Give images a style.

        Args:
            content: Images `[N, H, W, 3]` from 0 to 255, of any size.
            style: Images `[N, H', W', 3]`, or `[1, H', W', 3]` for all, at least 8 pixels high and
                wide.

        Returns:
            Images `[N, H, W, 3]` of the same range, not clipped.

        Raises:
            ValueError: If an image is not floating point or its shape does not fit.
        """
        content, style = checked_array(content, "content"), checked_array(style, "style")
        for name, images in (("content", content), ("style", style)):
            if images.ndim != 4 or images.shape[-1] != 3 or 0 in images.shape:
                raise ValueError(f"{name} must have shape (N, H, W, 3), got {images.shape}")
        if style.shape[0] not in (1, content.shape[0]):
            raise ValueError(
                f"style must be 1 image or {content.shape[0]}, as content is, got {style.shape}"
            )
        if min(style.shape[1:3]) < _PATCH:
            raise ValueError(
                f"style must be at least {_PATCH} pixels high and wide, got {style.shape}"
            )
        _, height, width, _ = content.shape
        # What is there twice at the border is cut off again.
        padding = [(0, 0), (0, -height % _PATCH), (0, -width % _PATCH), (0, 0)]
        x = _centred(jnp.pad(content, padding, mode="edge"))
        code = self._code(_centred(style))
        tokens = self.patches(x)
        _, rows, columns, dim = tokens.shape
        tokens = _with_places(tokens)
        for block, of_code in zip(self.blocks, self.codes, strict=True):
            tokens = block(tokens, jnp.split(of_code(code)[:, None], 4, axis=-1))
        features = self.pixels(self.norm(tokens))
        features = features.reshape(-1, rows, columns, _PATCH, _PATCH, _DRAWN)
        features = features.transpose(0, 1, 3, 2, 4, 5).reshape(*x.shape[:3], _DRAWN)
        drawn = self.draw(jnp.concatenate([nnx.gelu(features), x.astype(features.dtype)], -1))
        # Without weights of any size the image is what it was.
        result = (x.astype(drawn.dtype) + drawn) * 127.5 + 127.5
        return result[:, :height, :width]

    def _code(self, style: jax.Array) -> jax.Array:
        """Mean and deviation of each feature of the style's image, `[N, 2 * dim]`."""
        tokens = _with_places(self.style_patches(style))
        for block in self.style_blocks:
            tokens = block(tokens)
        mean = tokens.mean(1, keepdims=True)
        # The square root of 0 has no derivative.
        deviation = jnp.sqrt(jnp.square(tokens - mean).mean(1) + _EPS)
        return jnp.concatenate([mean[:, 0], deviation], -1)


class _Dtypes(NamedTuple):
    dtype: DTypeLike | None
    param_dtype: DTypeLike


class _Block(nnx.Module):
    """Attention and a hidden layer, each behind a norm and added to what came in."""

    def __init__(self, dim: int, heads: int, dtypes: _Dtypes, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.norm1, self.norm2 = _norm(dim, dtypes, rngs), _norm(dim, dtypes, rngs)
        self.qkv = _linear(dim, 3 * dim, dtypes, rngs)
        self.out = _linear(dim, dim, dtypes, rngs)
        self.fc1 = _linear(dim, _WIDE * dim, dtypes, rngs)
        self.fc2 = _linear(_WIDE * dim, dim, dtypes, rngs)

    def __call__(self, x: jax.Array, code: list[jax.Array] | None = None) -> jax.Array:
        """Map `[N, T, dim]` to the same shape; a code has two scales less one and two shifts."""
        scale1, shift1, scale2, shift2 = code or (jnp.zeros((), x.dtype),) * 4
        y = self.norm1(x) * (1 + scale1) + shift1
        x = x + self.out(self._attention(*jnp.split(self.qkv(y), 3, axis=-1)))
        y = self.norm2(x) * (1 + scale2) + shift2
        return x + self.fc2(nnx.gelu(self.fc1(y)))

    def _attention(self, *qkv: jax.Array) -> jax.Array:
        samples, tokens, dim = qkv[0].shape
        heads = (one.reshape(samples, tokens, self.heads, -1) for one in qkv)
        fused = platform() == "gpu" and qkv[0].dtype.itemsize == 2
        mixed = jax.nn.dot_product_attention(*heads, implementation="cudnn" if fused else None)
        return mixed.reshape(samples, tokens, dim)


def _patches(dim: int, dtypes: _Dtypes, rngs: nnx.Rngs) -> Conv2d:
    return Conv2d(
        3,
        dim,
        _PATCH,
        _PATCH,
        padding="VALID",
        dtype=dtypes.dtype,
        param_dtype=dtypes.param_dtype,
        kernel_init=_INIT,
        rngs=rngs,
    )


def _linear(inputs: int, outputs: int, dtypes: _Dtypes, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, **dtypes._asdict(), kernel_init=_INIT, rngs=rngs)


def _norm(dim: int, dtypes: _Dtypes, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(dim, epsilon=_EPS, use_fast_variance=False, **dtypes._asdict(), rngs=rngs)


def _centred(images: jax.Array) -> jax.Array:
    """0 to 255 as -1 to 1."""
    return images / 127.5 - 1


def _with_places(patches: jax.Array) -> jax.Array:
    """Tokens `[N, T, dim]` of patches `[N, rows, columns, dim]`, with where they are.

    A quarter of the features each has sines and cosines of the row and of the column.
    """
    samples, rows, columns, dim = patches.shape
    rates = 10_000 ** -(jnp.arange(dim // 4) / (dim // 4))
    angles = [jnp.arange(count)[:, None] * rates for count in (rows, columns)]
    of_row, of_column = (jnp.concatenate([jnp.sin(a), jnp.cos(a)], -1) for a in angles)
    shape = rows, columns, dim // 2
    places = jnp.concatenate(
        [
            jnp.broadcast_to(of_row[:, None], shape),
            jnp.broadcast_to(of_column[None], shape),
        ],
        -1,
    )
    return (patches + places.astype(patches.dtype)).reshape(samples, rows * columns, dim)
