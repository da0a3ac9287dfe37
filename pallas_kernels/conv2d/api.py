"""Dense 2-D convolution as a function: validate, pick, call.

`pallas_kernels.oracle.conv2d` is the definition.
"""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from pallas_kernels.common import device, sharding
from pallas_kernels.common.arguments import (
    Precision,
    checked_array,
    checked_dtype,
    checked_integer,
    checked_pair,
    checked_precision,
    hashable,
    remembered,
    surely,
)
from pallas_kernels.common.integers import LARGEST
from pallas_kernels.common.measurement import request
from pallas_kernels.common.tiles import TileConfig
from pallas_kernels.conv2d import shards, upsampling, vjp
from pallas_kernels.conv2d.activations import ACTIVATIONS
from pallas_kernels.conv2d.problem import LAYOUTS, Pair, Problem, Window
from pallas_kernels.dispatch import Choice, Operator
from pallas_kernels.oracle.conv2d import Padding, Sides, reflects

_MOST_ELEMENTS = 2**47
"""More than any machine has memory for; XLA ends the process where 64 bits cannot count them."""


class Implementation(StrEnum):
    """Implementations of the dense convolution."""

    TRITON = "triton"
    XLA = "xla"
    MOSAIC_GPU = "mosaic_gpu"
    MOSAIC_TPU = "mosaic_tpu"


OPERATOR = Operator(
    name="conv2d",
    package="pallas_kernels.conv2d",
    implementations=Implementation,
    # On a GPU, XLA means cuDNN. Where ours were measured to be faster, the table of that kind of
    # GPU goes before this. On a TPU its convolutions are made for the matrix unit, and of ours
    # nothing has run on one.
    rule={
        "tpu": ("xla", "mosaic_tpu"),
        "gpu": ("xla", "triton", "mosaic_gpu"),
        "cpu": ("xla",),
    },
    directions={"fwd": ("forward",), "bwd": ("input_grad", "weight_grad")},
)


def conv2d(
    x: ArrayLike,
    w: ArrayLike,
    *,
    stride: int | Sequence[int] = 1,
    padding: Padding = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    upsample: int = 1,
    bias: ArrayLike | None = None,
    activation: str | None = None,
    layout: str = "nhwc_hwcf",
    out_dtype: DTypeLike | None = None,
    precision: Precision = None,
    implementation: Choice = None,
    config: TileConfig | None = None,
    out_sharding: sharding.OutSharding = None,
) -> jax.Array:
    """Dense convolution (cross-correlation) of images, with bias and activation in one kernel.

    Sums run in float32 or better, and bias and activation are applied to them before they are
    rounded (by XLA on a GPU after: cuDNN writes the dtype that it reads). Every implementation has
    derivatives of every order, in reverse and in forward mode (`jvp`, `linearize`, `hessian`).

    Args:
        x: Images `[*batch, H, W, C]`, or `[*batch, C, H, W]` in the layout "nchw_fchw"; float16,
            bfloat16, float32 or float64.
        w: Filters `[HF, WF, C / groups, NF]`, or `[NF, C / groups, HF, WF]`, of x's dtype.
        stride: The stride of the output, an int or one for H and one for W.
        padding: Zeros around the image: an int, one for H and one for W, `((top, bottom), (left,
            right))`, "VALID" (none) or "SAME" (`ceil(size / stride)` samples come out, as of
            `jax.lax`). "reflect" mirrors the image about its edge samples, by as many as a
            convolution of stride 1 needs to keep the size: `k // 2` on each side for odd k.
            `("reflect", numbers)` mirrors so many samples, given as numbers of zeros are; they
            must be fewer than the image has.
        dilation: Distance of the samples that neighbouring taps read, as stride.
        groups: Channels and features fall into so many groups, each convolved apart.
        upsample: 2 repeats each pixel of the images as four before they are padded and convolved.
            The larger images never exist (but where more than one sample is mirrored): it is as
            many as four convolutions of the small ones by filters of half the size.
        bias: `[NF]`, any floating dtype.
        activation: None, "relu", or "gelu" (exact, by the error function).
        layout: "nhwc_hwcf" (channels last) or "nchw_fchw".
        out_dtype: Dtype of the output; None is x's.
        precision: The precision of float32 products on matrix units; None is full float32.
        implementation: Filter on the implementations: a name, a sequence of names or `"auto"`
            for the fastest of them, which is measured once and remembered, or `None` for the
            environment's (`FLASH_WTCONV_CONV2D_FWD`, `..._BWD`), the one that was the fastest
            for such a call on this kind of device, where that was measured, or the device's rule.
        config: Tiles of a kernel of ours; None takes those measured or made for the shape. XLA
            picks its own.
        out_sharding: How the output is split over a mesh, as `wtconv2d` takes it; of x the batch
            is split alike, of w and the bias the features.

    Returns:
        `[*batch, H_out, W_out, NF]`, in "nchw_fchw" `[*batch, NF, H_out, W_out]`, with `H_out =
        (upsample * H + top + bottom - dilation * (HF - 1) - 1) // stride + 1`.

    Raises:
        ValueError: A bad argument: which, what came, and what was expected.
        NotImplementedError: No allowed implementation can run here; says why for each.

    Example:
        >>> import jax.numpy as jnp
        >>> x, w = jnp.ones((2, 9, 8, 4)), jnp.ones((3, 3, 4, 16))
        >>> conv2d(x, w, stride=2, padding="reflect", bias=jnp.ones(16), activation="relu").shape
        (2, 5, 4, 16)
        >>> conv2d(x, w, upsample=2, padding=("reflect", 1)).shape
        (2, 18, 16, 16)
    """
    x, w = checked_array(x, "x"), checked_array(w, "w")
    bias = None if bias is None else checked_array(bias, "bias")
    call = checked_call(
        x,
        w,
        None if bias is None else bias.shape,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        upsample=upsample,
        activation=activation,
        layout=layout,
        out_dtype=out_dtype,
        precision=precision,
        config=config,
    )
    fwd, bwd = (request(OPERATOR, direction, implementation) for direction in OPERATOR.directions)
    rule = shards.rule_of(call.problem.window, x.shape, w.shape)
    spread = sharding.spread(rule, [x, w], out_sharding)
    fwd, bwd = spread.allowed(fwd, bwd)
    problem = vjp.of_shard(call.implemented, spread.shard)
    measured = problem, bias is not None, activation, call.precision, config
    chosen = fwd.choose(problem, vjp.measurement, OPERATOR, "fwd", *measured)
    module, tiles = OPERATOR.module(chosen.implementation), vjp.tiles(config, chosen)
    rows = vjp.takes_whole_rows(chosen, spread.shard)
    static = call.problem.window, call.precision, config, bwd, rows, fwd, spread.stated
    plan = vjp.Plan(module, tiles, *static)
    return vjp.conv2d(plan, activation, problem.out_dtype, x, w, bias)


def get_igemm_conv2d(
    layout: str,
    n: int,
    h: int,
    w: int,
    c: int,
    hf: int,
    wf: int,
    nf: int,
    stride: int,
    input_dtype: DTypeLike,
    output_dtype: DTypeLike,
    mem_space: str = "shared",
    block_m: int = 64,
    block_n: int = 128,
    block_k: int = 32,
    ratio_m: int = 2,
    ratio_n: int = 2,
    *,
    padding: int = 0,
    implementation: Choice = None,
) -> tuple[Callable[..., jax.Array], dict[str, int]]:
    """A convolution compiled for one shape, and the sizes of its matrix product.

    Args:
        layout: "nhwc_hwcf" or "nchw_fchw".
        n: Images.
        h: Their height.
        w: Their width.
        c: Their channels.
        hf: Height of the filters.
        wf: Their width.
        nf: Their number.
        stride: Along both axes.
        input_dtype: The dtype of images and filters.
        output_dtype: The dtype of the result; sums run in float32 or better.
        mem_space: "shared": tiles are under way to shared memory while others are multiplied;
            "global": each is loaded as it is needed.
        block_m: See `TileConfig`.
        block_n: See `TileConfig`.
        block_k: See `TileConfig`.
        ratio_m: See `TileConfig`.
        ratio_n: See `TileConfig`.
        padding: Zeros on each side of the images.
        implementation: Filter on the implementations, as `conv2d`; None takes Triton where it can
            run, because XLA's tiles are its own.

    Returns:
        `(kernel, symbols)`: `kernel(x, w)` takes arrays of exactly these shapes and dtypes, and
        cannot be differentiated (`conv2d` can). The symbols are N, C, H, W, NF, HF, WF, H_OUT,
        W_OUT, M = N H_OUT W_OUT, K = HF WF C, BLOCK_M, BLOCK_N, BLOCK_K, and ELEMS_PER_THREAD,
        the sums of a tile that each of its `32 ratio_m ratio_n` threads keeps.

    Raises:
        ValueError: A bad argument: which, what came, and what was expected.
        NotImplementedError: No allowed implementation can run here; says why for each.

    Example:
        >>> import jax.numpy as jnp
        >>> kernel, symbols = get_igemm_conv2d(
        ...     "nhwc_hwcf", 2, 6, 5, 4, 3, 2, 8, 1, "float16", "float32"
        ... )
        >>> kernel(jnp.ones((2, 6, 5, 4), "float16"), jnp.ones((3, 2, 4, 8), "float16")).shape
        (2, 4, 4, 8)
        >>> symbols["M"], symbols["K"], symbols["ELEMS_PER_THREAD"]
        (32, 24, 64)
    """
    sizes = {"n": n, "h": h, "w": w, "c": c, "hf": hf, "wf": wf, "nf": nf, "stride": stride}
    sizes = {name: checked_integer(value, name, least=1) for name, value in sizes.items()}
    n, h, w, c, hf, wf, nf, stride = sizes.values()
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: expected one of {', '.join(LAYOUTS)}")
    if mem_space not in ("shared", "global"):
        raise ValueError(f"mem_space={mem_space!r}: expected 'shared' or 'global'")
    stages = TileConfig().stages if mem_space == "shared" else 1
    config = _checked_config(TileConfig(block_m, block_n, block_k, ratio_m, ratio_n, stages))
    dtype = checked_dtype(input_dtype, "input_dtype")
    out_dtype = checked_dtype(output_dtype, "output_dtype")
    images, filters = (n, h, w, c), (hf, wf, c, nf)
    if layout == "nchw_fchw":
        images, filters = (n, c, h, w), (nf, c, hf, wf)
    window = checked_window(images, filters, stride, padding, 1, 1, 1, layout)
    if implementation is None:
        implementation = _preferred(Problem((n, h, w, c), dtype, hf, wf, nf, window, out_dtype))

    def run(x: jax.Array, w: jax.Array) -> jax.Array:
        return conv2d(
            x,
            w,
            stride=stride,
            padding=padding,
            layout=layout,
            out_dtype=out_dtype,
            implementation=implementation,
            config=config,
        )

    given = (jax.ShapeDtypeStruct(shape, dtype) for shape in (images, filters))
    kernel = jax.jit(run).lower(*given).compile()
    h_out, w_out = window.output((h, w), (hf, wf))
    symbols = {"N": n, "C": c, "H": h, "W": w, "NF": nf, "HF": hf, "WF": wf}
    symbols |= {"H_OUT": h_out, "W_OUT": w_out, "M": n * h_out * w_out, "K": hf * wf * c}
    symbols |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    symbols["ELEMS_PER_THREAD"] = block_m * block_n // (32 * ratio_m * ratio_n)
    return kernel, symbols


def _preferred(problem: Problem) -> str:
    """Triton where it can run, else XLA."""
    here = device.platform()
    try:
        return OPERATOR.pick("fwd", "triton", here, problem)
    except NotImplementedError:
        return "xla"


class Call(NamedTuple):
    """The checked arguments of a call, and the problem that implementations get of it."""

    problem: Problem
    implemented: Problem
    precision: jax.lax.Precision | None


def checked_call(
    x: jax.Array | jax.ShapeDtypeStruct,
    w: jax.Array | jax.ShapeDtypeStruct,
    bias: tuple[int, ...] | None,
    *,
    stride: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    upsample: int = 1,
    activation: str | None = None,
    layout: str = "nhwc_hwcf",
    out_dtype: DTypeLike | None = None,
    precision: Precision = None,
    config: TileConfig | None = None,
) -> Call:
    """The call of `conv2d` with these arguments; a shape stands for the bias.

    Raises:
        ValueError: A bad argument: which, what came, and what was expected.
    """
    # `remembered` tells True and 2.0 from the integers that they equal, but not inside a tuple.
    plain = all(type(leaf) in (int, str) for leaf in _leaves((stride, padding, dilation, config)))
    return (remembered(_checked_call) if plain else _checked_call)(
        x.shape,
        x.dtype,
        w.shape,
        w.dtype,
        bias,
        hashable(stride),
        hashable(padding),
        hashable(dilation),
        groups,
        upsample,
        activation,
        layout,
        out_dtype,
        precision,
        config,
    )


def _checked_call(
    images: tuple[int, ...],
    dtype: jnp.dtype,
    filters: tuple[int, ...],
    filters_dtype: jnp.dtype,
    bias: tuple[int, ...] | None,
    stride: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
    groups: int,
    upsample: int,
    activation: str | None,
    layout: str,
    out_dtype: DTypeLike | None,
    precision: Precision,
    config: TileConfig | None,
) -> Call:
    """Checks all that shapes, dtypes and plain arguments tell; raises ValueError."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: expected one of {', '.join(LAYOUTS)}")
    if activation not in (None, *ACTIVATIONS):
        raise ValueError(f"activation={activation!r}: expected None, 'relu' or 'gelu'")
    if len(images) < 3 or any(size == 0 for size in images[-3:]):
        axes = "H, W, C" if layout == "nhwc_hwcf" else "C, H, W"
        raise ValueError(
            f"x: expected [*batch, {axes}] of at least one sample and channel, got shape {images}"
        )
    if len(filters) != 4 or 0 in filters:
        axes = "HF, WF, C / groups, NF" if layout == "nhwc_hwcf" else "NF, C / groups, HF, WF"
        raise ValueError(f"w: expected [{axes}] of at least one tap, got shape {filters}")
    if dtype != filters_dtype:
        raise ValueError(f"w: expected x's dtype, {dtype}, got {filters_dtype}; cast one of them")
    flat = (math.prod(images[:-3]), *images[-3:])
    groups = checked_integer(groups, "groups", least=1)
    upsample = checked_integer(upsample, "upsample", least=1)
    if upsample > 2:
        raise ValueError(f"upsample={upsample}: expected 1 or 2")
    window = checked_window(flat, filters, stride, padding, dilation, groups, upsample, layout)
    height, width, _, features = window.filters(filters)
    if bias not in (None, (features,)):
        raise ValueError(f"bias: expected shape {(features,)}, one a filter, got {bias}")
    out = dtype if out_dtype is None else checked_dtype(out_dtype, "out_dtype")
    problem = Problem(window.images(flat), dtype, height, width, features, window, out)
    _checked_config(config)
    return Call(problem, upsampling.implemented(problem), checked_precision(precision))


def _leaves(value: object) -> Iterator[object]:
    """The values in nested sequences, none of None."""
    if isinstance(value, list | tuple):
        for one in value:
            yield from _leaves(one)
    elif value is not None:
        yield value


def checked_window(
    images: tuple[int, ...],
    filters: tuple[int, ...],
    stride: int | Sequence[int],
    padding: Padding,
    dilation: int | Sequence[int],
    groups: int,
    upsample: int = 1,
    layout: str = "nhwc_hwcf",
    *,
    name: str = "w",
) -> Window:
    """The window of a call, whose shapes and numbers fit each other.

    Args:
        images: The shape of x, with one batch axis.
        filters: The shape of the filters.
        stride: As `conv2d` takes it, like all that follow.
        padding: Zeros, or mirrored samples, around the images.
        dilation: Distance of the samples that neighbouring taps read.
        groups: Number of groups of channels.
        upsample: How many times pixels are repeated.
        layout: The layout of images and filters.
        name: The operator's name for the filters, for errors.

    Raises:
        ValueError: A bad argument, or what does not fit: which, what came, and what was expected.

    Example:
        >>> checked_window((2, 9, 8, 4), (3, 3, 1, 4), 2, "SAME", 1, 4).pads
        ((1, 1), (0, 1))
    """
    plain = Window(
        stride=checked_pair(stride, "stride", least=1),
        dilation=checked_pair(dilation, "dilation", least=1),
        groups=groups,
        reflect=reflects(padding),
        layout=layout,
        upsample=upsample,
    )
    _, *size, channels = plain.images(images)
    *taps, each, features = plain.filters(filters)
    if channels != each * groups:
        raise ValueError(
            f"{name}: expected filters of C / groups = {channels} / {groups} channels, got "
            f"{each} (shape {filters}, layout {layout!r})"
        )
    if features % groups:
        raise ValueError(f"groups={groups}: expected a divisor of the {features} filters")
    large = [upsample * n for n in size]
    window = plain._replace(pads=_pads(padding, large, taps, plain))
    if any(surely(operator.lt, n, 1) for n in window.output(size, taps)):
        raise ValueError(
            f"{name}: filters of {taps[0]}x{taps[1]} taps with dilation {window.dilation} do not "
            f"fit into images of {large[0]}x{large[1]} padded by {window.pads}"
        )
    for n, pads, axis in zip(large, window.pads, "HW", strict=True):
        if window.reflect and surely(operator.ge, max(pads), n):
            raise ValueError(
                f"padding={padding!r}: mirroring {max(pads)} samples along {axis} takes an image "
                f"of more than those, got {n}"
            )
    count, padded = images[0], [n + sum(pads) for n, pads in zip(large, window.pads, strict=True)]
    for shape in ((count, *padded, channels), (count, *window.output(size, taps), features)):
        if all(isinstance(n, int) for n in shape) and math.prod(shape) > _MOST_ELEMENTS:
            raise ValueError(
                f"padding={padding!r}: makes an array of {shape} out of images {images}, too large "
                "to exist"
            )
    return window


def _pads(
    padding: Padding, size: Sequence[int], taps: Sequence[int], window: Window
) -> tuple[Pair, Pair]:
    """Samples before and after along H and W."""
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID", "reflect"):
            raise ValueError(f"padding={padding!r}: the names are 'SAME', 'VALID' and 'reflect'")
        pads = []
        for n, k, s, d in zip(size, taps, window.stride, window.dilation, strict=True):
            span = d * (k - 1)
            total = 0 if padding == "VALID" else span
            if padding == "SAME":
                total = (-(-n // s) - 1) * s + span + 1 - n
            total = total if surely(operator.ge, total, 0) else max(total, 0)
            pads.append((total // 2, total - total // 2))
        return pads[0], pads[1]
    numbers = cast(tuple[str, Sides], padding)[1] if reflects(padding) else padding
    sides = numbers if isinstance(numbers, Sequence) else [numbers, numbers]
    if len(sides) == 2 and not isinstance(sides, str):
        above, left = (_checked_side(side, padding) for side in sides)
        return above, left
    raise ValueError(
        f"padding={padding!r}: expected an int, one for H and one for W, ((top, bottom), (left, "
        "right)), ('reflect', any of these), 'SAME', 'VALID' or 'reflect'"
    )


def _checked_side(side: object, padding: object) -> Pair:
    """Samples before and after along one axis; an error tells of the whole padding."""
    try:
        return checked_pair(side, "padding", least=0)
    except ValueError:
        raise ValueError(
            f"padding={padding!r}: expected integers >= 0 and <= {LARGEST}: one, one for H and one "
            "for W, or ((top, bottom), (left, right)), or ('reflect', any of these)"
        ) from None


def _checked_config(config: object) -> TileConfig | None:
    if config is None:
        return None
    if not isinstance(config, TileConfig):
        raise ValueError(f"config={config!r}: expected None or a TileConfig")
    for name, value in config._asdict().items():
        number = checked_integer(value, f"config.{name}", least=1)
        least = 16 if name.startswith("block") else 1
        if name == "block_n" and number % least:
            raise ValueError(f"config.{name}={value}: expected a multiple of {least}")
        if name not in ("block_n", "stages") and (number < least or number & (number - 1)):
            raise ValueError(f"config.{name}={value}: expected a power of two from {least} on")
    if config.ratio_m * config.ratio_n > 32:
        raise ValueError(f"config={config!r}: expected at most 32 warps, ratio_m * ratio_n")
    return config
