"""The Triton launches of the wavelet convolution, for any framework."""

from collections.abc import Sequence

from pallas_kernels.common.refusals import refuse
from pallas_kernels.common.triton import MAX_ROW, AnyArray, Launch, cdiv, contiguous, strides
from pallas_kernels.common.types import DeviceArray, Output
from pallas_kernels.wtconv import triton_kernels as kernels
from pallas_kernels.wtconv.problem import Problem

_CHANNELS = 32
_STRIPS = 4
"""The strips of a program, a power of two; each has a warp, with a thread for each channel."""
_COLUMNS = 4
"""The most columns of coefficients of a strip; half as many for weight gradients."""
_SUMS = 2048
"""The number of warps that share the sums of a weight gradient."""
_MAX_KERNEL = 9
_MAX_LEVELS = 5
_MAX_CHANNELS = 65535 * _CHANNELS
"""The most channels, whose blocks are the second axis of the grid."""


def check(problem: Problem) -> None:
    """Raises `NotImplementedError` where the kernels do not take a problem."""
    dtypes = ("float32", "bfloat16", "float16")
    reasons = problem.unsupported(dtypes, _MAX_KERNEL, range(1, _MAX_LEVELS + 1), odd=True)
    if not reasons:
        *_, width, channels = problem.shape
        if channels > _MAX_CHANNELS or width * channels >= MAX_ROW:
            reasons.append(f"rows of {width} pixels of {channels} channels, which are too long")
    refuse(reasons)


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The sizes of a program that are worth timing, the default ones first; see `forward`.

    Wider strips reread less of their halo, but only for small kernels do a thread's registers hold
    the accumulators of all columns.
    """
    sizes = [{}, {"columns": 2}, {"strips": 2}, {"strips": 8}]
    return sizes + [{"columns": 8}] * (problem.kernel_size <= 3)


def forward(
    x: AnyArray,
    taps: Sequence[AnyArray],
    bias: AnyArray | None,
    kernel_size: int,
    launch: Launch[AnyArray],
    y_strides: tuple[int, ...] | None = None,
    *,
    columns: int = _COLUMNS,
    strips: int = _STRIPS,
) -> AnyArray:
    """The operator on `x [N, H, W, C]`.

    Args:
        x: In float32, bfloat16 or float16, of any strides.
        taps: float32 `[(k + 1) * k, 1, C']`, then for each level `[(k + 1) * k, 4, C']`, the latter
            times 1/4; C' is `padded(C)`, filled with zeros, and the last k rows are zero.
        bias: float32 `[C']`, or None.
        kernel_size: k, odd.
        launch: The framework's launch function.
        y_strides: Strides of the output, which is contiguous if None.
        columns: The most columns of coefficients of a strip.
        strips: Number of strips of a program, each of one warp.

    Returns:
        `[N, H, W, C]` in x's dtype.
    """
    lows = _lows(x, len(taps) - 1, launch, strips)
    below = None
    for level in range(len(taps) - 1, 0, -1):
        # The array may be freed once this is launched.
        source, first = lows.pop(), level == 1
        n, h, w, c = source.shape
        height, width = cdiv(h, 2), cdiv(w, 2)
        wide = _even(width, columns)
        x_n, x_h, x_w, x_c = strides(source)
        output: Output = (source.shape, x.dtype if first else _between(x))
        y_n, y_h, y_w, y_c = contiguous(source.shape)
        if first and y_strides is not None:
            output = (*output, y_strides)
            y_n, y_h, y_w, y_c = y_strides
        (below,) = launch(
            kernels.level_forward,
            [
                source,
                source if below is None else below,
                taps[level],
                taps[0] if first else taps[level],
                taps[level] if bias is None else bias,
                *(n, h, w, x_n, x_h, y_n, y_h),
            ],
            [output],
            (cdiv(width, wide) * cdiv(n * cdiv(height, 2), strips), cdiv(c, _CHANNELS)),
            C=c,
            C_TAPS=padded(c),
            X_W=x_w,
            X_C=x_c,
            Y_W=y_w,
            Y_C=y_c,
            K=kernel_size,
            BELOW=below is not None,
            BASE=first,
            BIAS=first and bias is not None,
            INNER=cdiv(width, wide) >= 4,
            TW=wide,
            **_block(strips),
        )
    assert below is not None
    return below


def weight_grad(
    x: AnyArray,
    dy: AnyArray,
    kernel_size: int,
    levels: int,
    launch: Launch[AnyArray],
    *,
    columns: int = _COLUMNS,
    strips: int = _STRIPS,
) -> list[list[AnyArray]]:
    """The gradients of the taps; those of the levels are four times too large.

    Args:
        x: `[N, H, W, C]`.
        dy: Gradient of the output, of x's shape and dtype.
        kernel_size: k, odd.
        levels: Number of levels, at least one.
        launch: The framework's launch function.
        columns: See `forward`; a level's strips have half as many here, the base's twice as many.
        strips: See `forward`.

    Returns:
        For the base and for each level a list of float32 arrays `[k * k, bands, C]`, which together
        hold all of its bands.
    """
    shared = launch, strips
    wide = 2 * columns
    found = [[_correlate(kernels.base_weights, x, dy, kernel_size, 1, wide, *shared)]]
    # A program takes as many bands as its registers hold accumulators for.
    bands = 4 if kernel_size <= 5 else 2 if kernel_size <= 7 else 1
    wide = columns // 2
    for lows in zip(_lows(x, levels, *shared), _lows(dy, levels, *shared), strict=True):
        found.append(
            [
                _correlate(
                    *(kernels.level_weights, *lows, kernel_size, bands, wide, *shared),
                    FIRST=first,
                    BANDS=bands,
                )
                for first in range(0, 4, bands)
            ]
        )
    return found


def _correlate(
    kernel: object,
    x: AnyArray,
    dy: AnyArray,
    kernel_size: int,
    bands: int,
    columns: int,
    launch: Launch[AnyArray],
    strips: int,
    **which: int,
) -> AnyArray:
    """The gradient `[k * k, bands, C]` of the base, or of some bands (`which`) of a level."""
    n, h, w, c = x.shape
    height, width = (cdiv(h, 2), cdiv(w, 2)) if which else (h, w)
    columns, rows = _even(width, columns), min(height, 32)
    blocks = cdiv(width, columns) * cdiv(n * cdiv(height, rows), strips)
    across = cdiv(c, _CHANNELS)
    programs = min(blocks, max(1, _SUMS // strips // across))
    x_n, x_h, x_w, x_c = strides(x)
    y_n, y_h, y_w, y_c = strides(dy)
    (sums,) = launch(
        kernel,
        [x, dy, n, h, w, c, x_n, x_h, y_n, y_h],
        [((programs, kernel_size**2, bands, c), "float32")],
        (programs, across),
        X_W=x_w,
        X_C=x_c,
        Y_W=y_w,
        Y_C=y_c,
        K=kernel_size,
        **which,
        BLOCKS=cdiv(blocks, programs),
        TW=columns,
        R=rows,
        **_block(strips),
    )
    # Summed here, not at the end: for small images all programs' shares are as large as low bands.
    return sums.sum(0)


def _lows(x: AnyArray, levels: int, launch: Launch[AnyArray], strips: int) -> list[AnyArray]:
    """The image and its low bands, down to the band that the deepest level reads."""
    lows = [x]
    while len(lows) < levels:
        source = lows[-1]
        n, h, w, c = source.shape
        count = min(3, levels - len(lows))
        shapes = []
        for _ in range(count):
            h, w = cdiv(h, 2), cdiv(w, 2)
            shapes.append(((n, h, w, c), _between(x)))
        x_n, x_h, x_w, x_c = strides(source)
        height, width = (cdiv(size, 2**count) for size in source.shape[1:3])
        found = launch(
            kernels.low_bands,
            [source, *source.shape, x_n, x_h],
            # The kernel has three outputs; it leaves those of unwanted levels unwritten.
            shapes + [((1,), _between(x))] * (3 - count),
            (width * cdiv(n * height, strips), cdiv(c, _CHANNELS)),
            X_W=x_w,
            X_C=x_c,
            LEVELS=count,
            **_block(strips),
        )
        lows += found[:count]
    return lows


def _block(strips: int) -> dict[str, int]:
    """The constants and options of a launch that set a program's size."""
    return {"P": strips, "BC": _CHANNELS, "num_warps": strips}


def _between(x: DeviceArray) -> object:
    """The dtype of arrays between launches: not float16, since low bands double with each level."""
    return "float32" if str(x.dtype).split(".")[-1] == "float16" else x.dtype


def _even(size: int, most: int) -> int:
    """The largest width of strips, up to `most`, that leaves the fewest columns idle."""
    widths = range(1, min(size, most) + 1)
    return min(widths, key=lambda width: (cdiv(size, width) * (width + 2), -width))


def padded(channels: int) -> int:
    """The number of channels that taps must have: whole blocks, filled with zeros."""
    return cdiv(channels, _CHANNELS) * _CHANNELS
