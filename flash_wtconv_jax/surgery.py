"""Replace the depthwise convolutions of an existing nnx model, in place: by WTConv, or by ours."""

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.nn.initializers import Initializer

from flash_wtconv_jax.checkpoints.modules import placed_like
from flash_wtconv_jax.functional.arguments import (
    ImplementationLike,
    PrecisionLike,
    check_constructor,
)
from flash_wtconv_jax.functional.conv2d import Padding
from flash_wtconv_jax.functional.wtconv import default_scale_init
from flash_wtconv_jax.nnx import DepthwiseConv2d, WTConv1d, WTConv2d, WTConv3d
from pallas_kernels.common.types import Tree
from pallas_kernels.depthwise.api import OPERATOR as DEPTHWISE

__all__ = ["obstacle", "replace_depthwise", "use_depthwise"]

_LAYERS = {1: WTConv1d, 2: WTConv2d, 3: WTConv3d}


def replace_depthwise(
    model: nnx.Module,
    *,
    depth: int,
    kernel_size: int | None = None,
    rngs: nnx.Rngs,
    where: Callable[[str, nnx.Conv], bool] | None = None,
    keep_weights: bool = True,
    wavelet: str = "haar",
    scale_init: Initializer = default_scale_init,
    implementation: ImplementationLike = None,
) -> list[str]:
    """Replace every depthwise `nnx.Conv` of a model by a WTConv of the same channels and stride.

    `flash_wtconv_jax.nnx.DepthwiseConv2d`, which is one, is replaced too.

    The model is changed in place, also inside lists, tuples, dicts, `nnx.List`, `nnx.Dict` and
    `nnx.Sequential`. A convolution used in several places becomes one WTConv used in all of them.
    With `keep_weights` the kernel and bias of the convolution become those of the base convolution
    (the same variables, where the size stays), so that with `scale_init=zeros` the model computes
    what it computed before. Kernels and biases that are tied stay so, and keep their variable type,
    metadata and sharding, new values too. An optimizer made before must be made anew: the
    parameters changed.

    Nothing is changed unless all can be: a depthwise convolution that WTConv cannot stand in for
    (see `obstacle`) is an error naming it, and `where` leaves it out. For different depths in
    different places call this once for each.

    Args:
        model: The model. Its own attributes change, so it cannot be the convolution itself.
        depth: Number of wavelet levels; 0 only swaps the convolution for the base convolution.
        kernel_size: Taps along each axis; None keeps those of the convolution. A larger kernel
            starts as the convolution's with zeros around it.
        rngs: Source of the keys for the new parameters.
        where: Called with the path, such as "stages.0.blocks.1.conv_dw", and the convolution;
            False leaves it alone. One used in several places is asked for at its first.
        keep_weights: Whether the base convolution takes over kernel and bias.
        wavelet: Any discrete PyWavelets name.
        scale_init: Initialiser of the wavelet scales.
        implementation: See `flash_wtconv_jax.nnx.WTConv2d`.

    Returns:
        The paths at which a convolution was replaced.

    Raises:
        ValueError: If there is nothing to replace, a convolution cannot be replaced, or an
            argument is out of range.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from flash_wtconv_jax import surgery
        >>> conv = nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=nnx.Rngs(0))
        >>> model = nnx.Sequential(conv, jax.nn.relu)
        >>> surgery.replace_depthwise(model, depth=2, rngs=nnx.Rngs(1))
        ['layers.0']
        >>> model(jax.numpy.ones((1, 8, 8, 4))).shape
        (1, 8, 8, 4)
    """
    check_constructor(depth=depth)
    if kernel_size is not None:
        check_constructor(kernel_size=kernel_size)
    sites = _select(model, where)

    def reason(conv: nnx.Conv) -> str | None:
        found, k = obstacle(conv, keep_weights=keep_weights), _tuple(conv.kernel_size, 1)[0]
        if found is None and keep_weights and kernel_size is not None and kernel_size < k:
            found = (
                f"its kernel of {k} taps does not fit into kernel_size={kernel_size}; "
                "give keep_weights=False to start from new weights"
            )
        return found

    _check(sites, reason, "WTConv", "give where=lambda path, conv: obstacle(conv) is None")

    replacements: dict[int, nnx.Module] = {}
    moved: dict[int, nnx.Param[jax.Array]] = {}
    for _, conv in sites:
        if id(conv) not in replacements:
            replacements[id(conv)] = _wtconv(
                conv,
                moved,
                depth=depth,
                kernel_size=kernel_size,
                rngs=rngs,
                keep_weights=keep_weights,
                wavelet=wavelet,
                scale_init=scale_init,
                implementation=implementation,
            )
    _substitute(model, replacements, set())
    return [path for path, _ in sites]


def use_depthwise(
    model: nnx.Module,
    *,
    where: Callable[[str, nnx.Conv], bool] | None = None,
    implementation: ImplementationLike = None,
) -> list[str]:
    """Let every depthwise `nnx.Conv` of a model compute on kernels of ours, weights untouched.

    The model is changed in place, as by `replace_depthwise`: each depthwise convolution of images
    becomes a `flash_wtconv_jax.nnx.DepthwiseConv2d` of the same arguments, with the same variables
    at the same paths. So checkpoints load as before, an optimizer stays valid, and results are the
    same but for rounding.

    Nothing is changed unless all can be: a depthwise convolution that `DepthwiseConv2d` cannot
    stand in for (of signals or volumes, with several features a channel, or of a class, a function
    or a rule for dtypes of its own) is an error naming it, and `where` leaves it out. Those that
    are `DepthwiseConv2d` stay as they are.

    Args:
        model: The model. Its own attributes change, so it cannot be the convolution itself.
        where: As in `replace_depthwise`.
        implementation: See `flash_wtconv_jax.DepthwiseConv2d`.

    Returns:
        The paths at which a convolution was replaced.

    Raises:
        ValueError: If there is nothing to replace, a convolution cannot be replaced, or an
            argument is out of range.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from flash_wtconv_jax import surgery
        >>> conv = nnx.Conv(4, 4, (7, 7), feature_group_count=4, rngs=nnx.Rngs(0))
        >>> model = nnx.Sequential(conv, jax.nn.relu)
        >>> surgery.use_depthwise(model)
        ['layers.0']
        >>> model.layers[0].kernel is conv.kernel
        True
    """
    DEPTHWISE.check_names(implementation)
    sites = [
        (path, conv)
        for path, conv in _select(model, where)
        if not isinstance(conv, DepthwiseConv2d)
    ]
    _check(sites, _no_image, "DepthwiseConv2d", "give a `where` that is False for them")
    replacements: dict[int, nnx.Module] = {
        id(conv): _depthwise(conv, implementation) for _, conv in sites
    }
    _substitute(model, replacements, set())
    return [path for path, _ in sites]


def obstacle(conv: nnx.Conv, *, keep_weights: bool = True) -> str | None:
    """The reason why WTConv cannot stand in for a depthwise convolution; None if it can.

    WTConv has a square kernel without dilation, zero-pads to the same size with `(k - 1) // 2`
    before, and subsamples its output from the first pixel on. JAX's "SAME" shifts the windows of a
    strided convolution depending on the image size, so with `stride > 1` it matches WTConv only
    where that shift is always zero; explicit padding `((k - 1) // 2, k // 2)` always matches. With
    `keep_weights=False` nothing is claimed to stay equal, and a strided "SAME" is accepted.

    Args:
        conv: A depthwise convolution.
        keep_weights: As in `replace_depthwise`.

    Returns:
        The reason in words, or None.

    Example:
        >>> from flax import nnx
        >>> conv = nnx.Conv(4, 4, (3, 5), feature_group_count=4, rngs=nnx.Rngs(0))
        >>> obstacle(conv)
        'its kernel (3, 5) is not square'
    """
    kernel, strides = _tuple(conv.kernel_size, 1), _strides(conv)
    ndim, k, stride = len(kernel), kernel[0], strides[0]
    foreign = _foreign(conv)
    if foreign is not None:
        return foreign
    if ndim not in _LAYERS:
        return f"it has {ndim} spatial axes"
    if len(set(kernel)) > 1:
        return f"its kernel {kernel} is not square"
    if set(_tuple(conv.kernel_dilation, ndim)) | set(_tuple(conv.input_dilation, ndim)) != {1}:
        return "it is dilated"
    if len(set(strides)) > 1:
        return f"its strides {strides} differ"
    if conv.mask is not None:
        return "its kernel is masked"
    if ndim == 1 and stride > 1:
        return f"it has stride {stride}, and a strided WTConv1d averages where this one skips"
    if conv.padding == "SAME":
        if stride > 1 and keep_weights and _same_shifts(k, stride):
            return (
                f"it has stride {stride} with SAME padding, which shifts with the image size; "
                f"pad explicitly with {((k - 1) // 2, k // 2)}, or give keep_weights=False"
            )
        return None
    if _explicit_padding(conv.padding, ndim) != (((k - 1) // 2, k // 2),) * ndim:
        return f"its padding is {conv.padding!r}, not that of SAME"
    return None


def _foreign(conv: nnx.Conv) -> str | None:
    """The reason why a layer of ours may compute something else than a depthwise convolution."""
    if type(conv) not in (nnx.Conv, DepthwiseConv2d):
        return f"it is a {type(conv).__name__}, which may compute something else than nnx.Conv"
    if conv.out_features != conv.in_features:
        return f"it makes {conv.out_features} features of {conv.in_features} channels"
    if isinstance(conv.precision, tuple):
        return f"its precision is {conv.precision}, and ours takes one for both"
    kernel = _tuple(conv.kernel_size, 1)
    if conv.kernel.shape != (*kernel, 1, conv.in_features):
        return f"its kernel has shape {conv.kernel.shape}: layers stacked by nnx.vmap or nnx.scan"
    if conv.conv_general_dilated is not jax.lax.conv_general_dilated:
        return "it calls a convolution function of its own"
    if conv.promote_dtype is not promote_dtype or conv.preferred_element_type is not None:
        return "it has a rule for dtypes of its own"
    return None


def _no_image(conv: nnx.Conv) -> str | None:
    """The reason why `DepthwiseConv2d` cannot stand in for a depthwise convolution."""
    ndim = len(_tuple(conv.kernel_size, 1))
    return _foreign(conv) or (None if ndim == 2 else f"it has {ndim} spatial axes")


def _select(
    model: nnx.Module, where: Callable[[str, nnx.Conv], bool] | None
) -> list[tuple[str, nnx.Conv]]:
    """Paths and convolutions to be replaced."""
    if not isinstance(model, nnx.Module) or isinstance(model, nnx.Conv):
        raise ValueError(
            f"model must be an nnx.Module that contains convolutions, got {type(model).__name__}; "
            "a convolution of its own cannot be replaced in place: make a layer of ours instead"
        )
    found = [(path, conv) for path, conv in _convolutions(model, (), set()) if _is_depthwise(conv)]
    chosen: dict[int, bool] = {}
    for path, conv in found:
        if id(conv) not in chosen:
            chosen[id(conv)] = where is None or bool(where(path, conv))
    sites = [(path, conv) for path, conv in found if chosen[id(conv)]]
    if not sites:
        raise ValueError(
            f"model has no depthwise convolution to replace: where refused all {len(found)}"
            if found
            else "model has no depthwise convolution to replace: no nnx.Conv in it has "
            "feature_group_count equal to its in_features"
        )
    return sites


def _check(
    sites: list[tuple[str, nnx.Conv]],
    reason: Callable[[nnx.Conv], str | None],
    layer: str,
    advice: str,
) -> None:
    """Raises an error that names every convolution with a reason why a layer cannot replace it."""
    found = ((path, reason(conv)) for path, conv in sites)
    problems = [f"  {path}: {why}" for path, why in found if why is not None]
    if problems:
        raise ValueError(
            f"these depthwise convolutions cannot be replaced by {layer} (nothing was changed; to "
            f"leave them as they are, {advice}):\n" + "\n".join(problems)
        )


def _depthwise(conv: nnx.Conv, implementation: ImplementationLike) -> DepthwiseConv2d:
    """The same convolution, of the same variables, on kernels of ours."""
    layer = DepthwiseConv2d(
        conv.in_features,
        cast("tuple[int, int]", conv.kernel_size),
        conv.strides,
        padding=cast(Padding, conv.padding),
        input_dilation=conv.input_dilation,
        kernel_dilation=conv.kernel_dilation,
        use_bias=conv.bias is not None,
        mask=conv.mask,
        dtype=conv.dtype,
        param_dtype=conv.param_dtype,
        # _foreign() has refused a precision of two parts.
        precision=cast(PrecisionLike, conv.precision),
        kernel_init=nnx.initializers.zeros,
        implementation=implementation,
        rngs=nnx.Rngs(0),
    )
    layer.kernel, layer.bias = conv.kernel, conv.bias
    return layer


def _wtconv(
    conv: nnx.Conv,
    moved: dict[int, nnx.Param[jax.Array]],
    *,
    depth: int,
    kernel_size: int | None,
    rngs: nnx.Rngs,
    keep_weights: bool,
    wavelet: str,
    scale_init: Initializer,
    implementation: ImplementationLike,
) -> nnx.Module:
    window = _tuple(conv.kernel_size, 1)
    layer = _LAYERS[len(window)](
        conv.in_features,
        kernel_size or window[0],
        depth,
        _strides(conv)[0],
        use_bias=conv.bias is not None,
        wavelet=wavelet,
        dtype=conv.dtype,
        param_dtype=conv.param_dtype,
        # _foreign() has refused a precision of two parts.
        precision=cast(PrecisionLike, conv.precision),
        scale_init=scale_init,
        implementation=implementation,
        rngs=rngs,
    )
    kernel = layer.base_kernel.get_value()
    if keep_weights:
        kernel = _embed(conv.kernel.get_value(), layer.kernel_size, len(window))
    layer.base_kernel = _moved(conv.kernel, kernel, moved)
    if conv.bias is not None and layer.base_bias is not None:
        bias = conv.bias if keep_weights else layer.base_bias
        layer.base_bias = _moved(conv.bias, bias.get_value(), moved)
    return layer


def _moved(
    variable: nnx.Param[jax.Array], value: jax.Array, moved: dict[int, nnx.Param[jax.Array]]
) -> nnx.Param[jax.Array]:
    """The variable itself if the value is its own, else one of the same kind and sharding.

    `moved` holds what became of each variable before: what was tied stays tied.
    """
    if value is variable.get_value():
        return variable
    if id(variable) not in moved:
        new = variable.replace(placed_like(value, variable.get_value()))
        moved[id(variable)] = cast("nnx.Param[jax.Array]", new)
    return moved[id(variable)]


def _embed(kernel: jax.Array, size: int, ndim: int) -> jax.Array:
    k = kernel.shape[0]
    if k == size:
        return kernel
    before = (size - 1) // 2 - (k - 1) // 2
    return jnp.pad(kernel, [(before, size - k - before)] * ndim + [(0, 0)] * 2)


def _is_depthwise(conv: nnx.Conv) -> bool:
    # An ordinary convolution of a grey image has one group and one input channel too.
    groups = conv.feature_group_count
    return groups == conv.in_features and (groups > 1 or conv.out_features == 1)


def _convolutions(
    node: Tree, path: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[str, nnx.Conv]]:
    """Every convolution with its path; a shared one at each of its places."""
    if isinstance(node, nnx.Conv):
        yield ".".join(path), node
        return
    if id(node) in seen:
        return
    seen.add(id(node))
    for key, child in _children(node):
        yield from _convolutions(child, (*path, str(key)), seen)


def _substitute(node: Tree, replacements: dict[int, nnx.Module], seen: set[int]) -> Tree:
    """Puts the replacements in place below a node; returns the node or its own replacement."""
    if id(node) in replacements:
        return replacements[id(node)]
    if isinstance(node, tuple):
        items = [_substitute(child, replacements, seen) for child in node]
        return type(node)(*items) if hasattr(node, "_fields") else tuple(items)
    if id(node) in seen:
        return node
    seen.add(id(node))
    for key, child in _children(node):
        new = _substitute(child, replacements, seen)
        # A rebuilt tuple that holds the same things is not worth an assignment.
        if new is child or (isinstance(child, tuple) and _same_items(new, child)):
            continue
        if isinstance(node, nnx.List | list | dict):
            node[cast(int, key)] = new
        else:
            setattr(node, str(key), new)
    return node


def _children(node: Tree) -> list[tuple[str | int, Tree]]:
    if isinstance(node, nnx.List | list | tuple):
        return list(enumerate(node))
    if isinstance(node, dict):
        return list(node.items())
    if isinstance(node, nnx.Module):
        return [(key, child) for key, child in vars(node).items() if not key.startswith("_pytree")]
    return []


def _same_items(a: tuple[Tree, ...], b: tuple[Tree, ...]) -> bool:
    return all(
        _same_items(x, y) if isinstance(x, tuple) and isinstance(y, tuple) else x is y
        for x, y in zip(a, b, strict=True)
    )


def _tuple(value: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    if value is None:
        return (1,) * ndim
    return (value,) * ndim if isinstance(value, int) else tuple(value)


def _strides(conv: nnx.Conv) -> tuple[int, ...]:
    return _tuple(conv.strides, len(_tuple(conv.kernel_size, 1)))


def _explicit_padding(
    padding: str | int | Sequence[int | Sequence[int]], ndim: int
) -> tuple[tuple[int, int], ...] | None:
    if isinstance(padding, str):
        return None
    pads = (padding,) * ndim if isinstance(padding, int) else tuple(padding)
    return tuple((p, p) if isinstance(p, int) else (p[0], p[1]) for p in pads)


def _same_shifts(k: int, stride: int) -> bool:
    """Whether XLA's SAME ever pads another amount before than (k - 1) // 2."""
    # The last window ends up to stride - 1 samples before the last pixel, by the image size.
    return any(max(k - 1 - slack, 0) // 2 != (k - 1) // 2 for slack in range(stride))
