"""The Triton launches of the dense convolution, for any framework."""

from collections.abc import Sequence

from pallas_kernels.common.refusals import refusal, refuse, unsupported_sizes
from pallas_kernels.common.tiles import TileConfig, launched, tiles
from pallas_kernels.common.triton import AnyArray, Launch, cdiv, contiguous
from pallas_kernels.conv2d import triton_kernels as kernels
from pallas_kernels.conv2d.problem import Joint, Problem, Window

_DTYPES = ("float32", "bfloat16", "float16")
_ROWS = 8
"""The rows of tiles that consecutive programs work on, so that L2 holds their operands."""
_MOST_IMAGES = 65535
"""The most images of a grid, along an axis after the first."""
_PROGRAMS = 512
"""The number of programs up to which a weight gradient's sums are split (split-K)."""


def check(problem: Problem) -> None:
    """Raises `NotImplementedError` where the kernels do not take a problem."""
    reasons = [
        f"{dtype}, {', '.join(_DTYPES)} alone"
        for dtype in sorted({str(problem.dtype), str(problem.out_dtype)} - set(_DTYPES))
    ]
    sizes = unsupported_sizes(problem.shape)
    reasons += sizes
    if not sizes:
        images, *size, channels = problem.shape
        height, width = problem.window.output(size, (problem.kernel_height, problem.kernel_width))
        # The gradient of reflected images is first computed for the padded ones.
        size = [n + sum(pads) for n, pads in zip(size, problem.window.pads, strict=True)]
        taps = problem.kernel_height * problem.kernel_width * channels * problem.features
        for count, what in (
            (size[0] * size[1] * channels, f"images of {size[0]}x{size[1]}x{channels}"),
            (height * width * problem.features, f"outputs of {height}x{width}x{problem.features}"),
            (images * max(height * width, size[0] * size[1]), f"the pixels of {images} images"),
            (taps, f"{problem.features} filters of {channels} channels"),
        ):
            # Offsets reach one block past the end, so the limit leaves room for it.
            if count >= 1 << 30:
                reasons.append(f"{what}, which are too many")
        if problem.window.groups > 65535:
            reasons.append(f"{problem.window.groups} groups, up to 65535")
    refuse(reasons)


def check_moments(images: int) -> None:
    """Raises `NotImplementedError` where the kernel leaves no moments of so many images."""
    if images > _MOST_IMAGES:
        raise refusal([f"{images} images with their moments, up to {_MOST_IMAGES}"])


def search_space(problem: Problem) -> list[dict[str, int]]:
    """The tiles that are worth timing, beside those that are taken unasked."""
    if str(problem.dtype) == "float32":
        sizes = [(64, 32, 32, 3), (128, 64, 16, 3)]
    else:
        sizes = [(128, 128, 64, 4), (128, 64, 64, 4), (64, 128, 64, 4), (64, 64, 64, 4)]
        sizes += [(128, 256, 64, 3), (128, 128, 32, 4)]
    found = []
    for block_m, block_n, block_k, stages in sizes:
        warps = 8 if block_m * block_n >= 128 * 128 else 4
        found.append(TileConfig(block_m, block_n, block_k, warps // 2, 2, stages)._asdict())
    return found


def forward(
    x: AnyArray,
    w: AnyArray,
    bias: AnyArray | None,
    window: Window,
    activation: str | None,
    out_dtype: object,
    precision: str,
    config: TileConfig | None,
    launch: Launch[AnyArray],
) -> AnyArray:
    """The operator on contiguous arrays of one dtype.

    Args:
        x: Images in the window's layout.
        w: Filters in the window's layout.
        bias: float32 `[NF]`, or None.
        window: Which samples a tap reads.
        activation: None, "relu" or "gelu".
        out_dtype: Dtype of the output.
        precision: Triton's name for the precision of float32 products.
        config: Tiles, or None for the default ones of the shape.
        launch: The framework's launch function.

    Returns:
        Contiguous images of NF features.
    """
    (y,) = _forward(x, w, bias, window, activation, out_dtype, precision, config, launch, False)
    return y


def forward_with_moments(
    x: AnyArray,
    w: AnyArray,
    bias: AnyArray | None,
    window: Window,
    activation: str | None,
    out_dtype: object,
    precision: str,
    config: TileConfig | None,
    launch: Launch[AnyArray],
) -> tuple[AnyArray, list[int], AnyArray, AnyArray]:
    """The same, and the moments of its tiles, each of pixels of one image.

    Args:
        x: See `forward`.
        w: See `forward`.
        bias: See `forward`.
        window: See `forward`.
        activation: See `forward`.
        out_dtype: See `forward`.
        precision: See `forward`.
        config: See `forward`.
        launch: See `forward`.

    Returns:
        The output; the number of pixels of each tile; their means and their sums of squared
        deviations, float32 `[N, tiles, NF]`.

    Raises:
        NotImplementedError: There are more images than a grid has blocks along an axis.
    """
    n, h, wide, _ = window.images(x.shape)
    check_moments(n)
    hf, wf, each, features = window.filters(w.shape)
    height, width = window.output((h, wide), (hf, wf))
    pixels = height * width
    config = config or tiles(pixels, features // window.groups, each, x.dtype)
    y, mean, squares = _forward(
        x, w, bias, window, activation, out_dtype, precision, config, launch, True
    )
    counts = [min(config.block_m, pixels - at) for at in range(0, pixels, config.block_m)]
    return y, counts, mean, squares


def upsampled_with_moments(
    x: AnyArray,
    w: AnyArray,
    joint: Joint,
    out_dtype: object,
    precision: str,
    config: TileConfig | None,
    launch: Launch[AnyArray],
) -> tuple[AnyArray, list[int], AnyArray, AnyArray]:
    """The same of images upsampled by 2, whose phases are one launch.

    Args:
        x: The images, not upsampled.
        w: The filters of all phases, see `upsampling.joint_filters`.
        joint: The phases.
        out_dtype: See `forward`.
        precision: See `forward`.
        config: See `forward`.
        launch: See `forward`.

    Returns:
        The output; the numbers of pixels of each phase of each tile; their means and their sums of
        squared deviations, float32 `[N, tiles, 4 NF]`, phase by phase.

    Raises:
        NotImplementedError: There are more images than a grid has blocks along an axis.
    """
    window = joint.window
    n, h, wide, channels = window.images(x.shape)
    check_moments(n)
    _, _, _, features = window.filters(w.shape)
    height, width = joint.windows
    if config is None:
        config = tiles(height * width, features, channels, x.dtype)
        if config.block_m == 128:
            # What is masked takes registers: two blocks of half the size hide each other's waits.
            config = config._replace(block_m=64, ratio_m=2)
    y, mean, squares = _convolve(
        x,
        w,
        None,
        (channels, features),
        window,
        (window.laid_out(n, 2 * h, 2 * wide, features // 4), out_dtype),
        precision,
        config,
        launch,
        True,
        joint,
        STRIDE_H=1,
        STRIDE_W=1,
        PAD_H=window.pads[0][0],
        PAD_W=window.pads[1][0],
        UP_H=1,
        UP_W=1,
        REFLECT=False,
        FLIP=False,
        ACTIVATION=None,
    )
    return y, joint.counts(config.block_m), mean, squares


def _forward(
    x: AnyArray,
    w: AnyArray,
    bias: AnyArray | None,
    window: Window,
    activation: str | None,
    out_dtype: object,
    precision: str,
    config: TileConfig | None,
    launch: Launch[AnyArray],
    moments: bool,
) -> list[AnyArray]:
    """The output, and where asked for the means and the squared deviations of its tiles."""
    n, h, wide, _ = window.images(x.shape)
    hf, wf, each, features = window.filters(w.shape)
    height, width = window.output((h, wide), (hf, wf))
    output = window.laid_out(n, height, width, features)
    return _convolve(
        x,
        w,
        bias,
        (each, features // window.groups),
        window,
        (output, out_dtype),
        precision,
        config,
        launch,
        moments,
        STRIDE_H=window.stride[0],
        STRIDE_W=window.stride[1],
        PAD_H=window.pads[0][0],
        PAD_W=window.pads[1][0],
        UP_H=1,
        UP_W=1,
        REFLECT=window.reflect,
        FLIP=False,
        ACTIVATION=activation,
    )


def input_grad(
    dy: AnyArray,
    w: AnyArray,
    shape: Sequence[int],
    window: Window,
    out_dtype: object,
    precision: str,
    config: TileConfig | None,
    launch: Launch[AnyArray],
) -> AnyArray:
    """The transpose in x, applied to dy, of a convolution that does not reflect.

    Args:
        dy: Gradient of the output, contiguous.
        w: Filters of dy's dtype, contiguous.
        shape: Shape of x.
        window: Which samples a tap reads.
        out_dtype: Dtype of the gradient.
        precision: See `forward`.
        config: See `forward`.
        launch: The framework's launch function.

    Returns:
        The gradient of x, contiguous.
    """
    hf, wf, each, features = window.filters(w.shape)
    before = [
        d * (k - 1) - pad
        for d, k, (pad, _) in zip(window.dilation, (hf, wf), window.pads, strict=True)
    ]
    (dx,) = _convolve(
        dy,
        w,
        None,
        (features // window.groups, each),
        window,
        (tuple(shape), out_dtype),
        precision,
        config,
        launch,
        False,
        STRIDE_H=1,
        STRIDE_W=1,
        PAD_H=before[0],
        PAD_W=before[1],
        UP_H=window.stride[0],
        UP_W=window.stride[1],
        REFLECT=False,
        FLIP=True,
        ACTIVATION=None,
    )
    return dx


def weight_grad(
    x: AnyArray,
    dy: AnyArray,
    shape: Sequence[int],
    window: Window,
    precision: str,
    config: TileConfig | None,
    launch: Launch[AnyArray],
) -> AnyArray:
    """The transpose in w, applied to dy.

    Args:
        x: Images, contiguous.
        dy: Gradient of the output, of x's dtype, contiguous.
        shape: Shape of the filters.
        window: Which samples a tap reads.
        precision: See `forward`.
        config: See `forward`; pixels are summed here, so `block_k` counts pixels.
        launch: The framework's launch function.

    Returns:
        float32 `[splits, *shape]`, to be summed over the splits.
    """
    n, *_ = window.images(x.shape)
    hf, wf, each, features = window.filters(shape)
    _, height, width, _ = window.images(dy.shape)
    own = features // window.groups
    if config is None:
        config = tiles(hf * wf * each, own, n * height * width, x.dtype)
        # A tile holds one tap where the channels allow it, as in `tiles`; here the rows are
        # channels.
        if each % config.block_m and each % 64 == 0:
            config = config._replace(block_m=64, ratio_m=2)
    down, across = cdiv(hf * wf * each, config.block_m), cdiv(own, config.block_n)
    blocks = cdiv(n * height * width, config.block_k)
    splits = min(blocks, max(1, _PROGRAMS // (down * across * window.groups)), 65535)
    rows_per_split = cdiv(blocks, splits) * config.block_k
    splits = cdiv(n * height * width, rows_per_split)
    (sums,) = launch(
        kernels.weights,
        [x, dy, n, rows_per_split],
        [((splits, *shape), "float32")],
        (down * across, window.groups, splits),
        **_sizes(window, x.shape, (each, own), shape, dy.shape),
        STRIDE_H=window.stride[0],
        STRIDE_W=window.stride[1],
        PAD_H=window.pads[0][0],
        PAD_W=window.pads[1][0],
        REFLECT=window.reflect,
        SIZE=hf * wf * each * features,
        PRECISION=precision,
        ROWS=_ROWS,
        **launched(config),
    )
    return sums


def _convolve(
    x: AnyArray,
    w: AnyArray,
    bias: AnyArray | None,
    channels: tuple[int, int],
    window: Window,
    output: tuple[tuple[int, ...], object],
    precision: str,
    config: TileConfig | None,
    launch: Launch[AnyArray],
    moments: bool,
    joint: Joint | None = None,
    **which: object,
) -> list[AnyArray]:
    """The outputs of one launch of `kernels.conv`.

    `channels` are the numbers of a group's channels that are read and written.
    """
    n, height, width, _ = window.images(output[0])
    phases: dict[str, object] = {"PHASES": 1, "SHIFT_H": 0, "SHIFT_W": 0, "REPEAT": False}
    if joint is not None:
        height, width = joint.windows
        phases = {"PHASES": 2, "SHIFT_H": joint.shifts[0], "SHIFT_W": joint.shifts[1]}
        phases |= {"REPEAT": joint.repeats}
    config = config or tiles(n * height * width, channels[1], channels[0], x.dtype)
    across = cdiv(channels[1], config.block_n)
    sizes = _sizes(window, x.shape, channels, w.shape, output[0]) | {"HO": height, "WO": width}
    if which["FLIP"]:
        sizes["W_C"], sizes["W_F"] = sizes["W_F"], sizes["W_C"]
    grid: tuple[int, ...] = cdiv(n * height * width, config.block_m) * across, window.groups
    outputs, unwritten = [output], {"mean": None, "squares": None}
    if moments:
        down = cdiv(height * width, config.block_m)
        grid, unwritten = (down * across, window.groups, n), {}
        outputs += [((n, down, channels[1] * window.groups), "float32")] * 2
    return launch(
        kernels.conv,
        [x, w, w if bias is None else bias, n],
        outputs,
        grid,
        **sizes,
        **phases,
        **which,
        **unwritten,
        BIAS=bias is not None,
        PRECISION=precision,
        ROWS=_ROWS,
        **launched(config),
    )


def _sizes(
    window: Window,
    read: Sequence[int],
    channels: tuple[int, int],
    filters: Sequence[int],
    written: Sequence[int],
) -> dict[str, int]:
    """The constants of a launch: sizes and strides of what it reads, of filters, and of y or dy."""
    _, h, w, _ = window.images(read)
    hf, wf, *_ = window.filters(filters)
    _, height, width, _ = window.images(written)
    sizes = {"H": h, "W": w, "C": channels[0], "HF": hf, "WF": wf}
    sizes |= {"HO": height, "WO": width, "F": channels[1]}
    for letters, steps in (
        (("X_N", "X_H", "X_W", "X_C"), window.images(contiguous(read))),
        (("W_H", "W_W", "W_C", "W_F"), window.filters(contiguous(filters))),
        (("Y_N", "Y_H", "Y_W", "Y_F"), window.images(contiguous(written))),
    ):
        sizes |= dict(zip(letters, steps, strict=True))
    return sizes | {"DILATION_H": window.dilation[0], "DILATION_W": window.dilation[1]}
