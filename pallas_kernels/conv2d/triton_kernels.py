"""The dense convolution's Triton kernels: an implicit GEMM, whose im2col matrix is never stored.

Row m of that matrix is a pixel of the output of all images, column k a tap and a channel (channel
fastest); the address of an element in x is computed as it is loaded. Samples outside x are read as
zero, or, with `REFLECT`, mirrored about the edge. Rows, columns and features are masked, so that
any number of them is correct. Frameworks launch the kernels through `triton_launches`.

A program computes a tile of `BM` rows by `BN` features, `BK` products at a time, in float32
accumulators; Triton pipelines the loads in `num_stages` stages. `ROWS` rows of tiles at a time are
swizzled for L2. Sums have a fixed order, so results are bitwise reproducible.

`H`, `W`, `C` are x's sizes, `C` a group's channels; `HO`, `WO`, `F` those of the output, `F` a
group's features. Strides are constants, of any layout: `X_N` of x along images, `W_C` of the
filters along channels, and so on. With `UP` greater than one, `UP - 1` zeros lie between
neighbouring samples of x, and with `FLIP` the taps are read backwards: together they make the
transpose in x of a convolution of stride `UP`.

Where `conv` gets `mean` and `squares`, tiles do not cross images, and it writes the mean and the
sum of squared deviations of each tile and feature, `[images, tiles, features]` in float32.

With `PHASES` 2 it computes a convolution of images that are upsampled by 2: rows m are windows of
the images as they are, `F` features those of four phases, and each is written at its place in the
output (`upsampling` has the phases). Those of odd rows read windows that begin `SHIFT_H` further
down, so what an odd row `2 p + 1` gets is the window `p + SHIFT_H`; `HO` and `WO` are windows.
`REPEAT` reads the edge outside of x.
"""

import triton
import triton.language as tl


@triton.jit
def conv(
    x,
    w,
    bias,
    images,
    y,
    mean,
    squares,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    X_N: tl.constexpr,
    X_H: tl.constexpr,
    X_W: tl.constexpr,
    X_C: tl.constexpr,
    HF: tl.constexpr,
    WF: tl.constexpr,
    W_H: tl.constexpr,
    W_W: tl.constexpr,
    W_C: tl.constexpr,
    W_F: tl.constexpr,
    HO: tl.constexpr,
    WO: tl.constexpr,
    F: tl.constexpr,
    Y_N: tl.constexpr,
    Y_H: tl.constexpr,
    Y_W: tl.constexpr,
    Y_F: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    UP_H: tl.constexpr,
    UP_W: tl.constexpr,
    REFLECT: tl.constexpr,
    REPEAT: tl.constexpr,
    PHASES: tl.constexpr,
    SHIFT_H: tl.constexpr,
    SHIFT_W: tl.constexpr,
    FLIP: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program of the forward, or of the gradient of x: product, then bias and activation.

    The grid's axes are tiles and groups; with moments tiles of an image, groups and images.
    """
    TAPS: tl.constexpr = HF * WF
    if mean is not None:
        images = 1
    # A group's filters are consecutive along the axis of w's features.
    GROUP: tl.constexpr = C * W_C if FLIP else F * W_F
    down, across = _tile(images * HO * WO, F, BM, BN, ROWS)
    group = tl.program_id(1)
    m = down * BM + tl.arange(0, BM)
    image, row, column = m // (HO * WO), m % (HO * WO) // WO, m % WO
    known = (m < images * HO * WO)[:, None]
    if mean is not None:
        image += tl.program_id(2)
    top, left = (row * STRIDE_H - PAD_H)[:, None], (column * STRIDE_W - PAD_W)[:, None]
    x_image = x + (image.to(tl.int64) * X_N)[:, None] + group * (C * X_C)
    f = across * BN + tl.arange(0, BN)[None, :]
    filters = w + group.to(tl.int64) * GROUP + f * W_F
    total = tl.zeros((BM, BN), tl.float32)
    for step in range(tl.cdiv(TAPS * C, BK)):
        i, j, c, some = _columns(step, tl.arange(0, BK)[None, :], WF, TAPS, C, BK)
        v, above = _sample(top + i * DILATION_H, H, UP_H, REFLECT, REPEAT)
        u, beside = _sample(left + j * DILATION_W, W, UP_W, REFLECT, REPEAT)
        inside = known & some & above & beside
        patches = tl.load(x_image + (v * X_H + u * X_W + c * X_C), mask=inside, other=0.0)
        i, j, c, some = _columns(step, tl.arange(0, BK)[:, None], WF, TAPS, C, BK)
        if FLIP:
            i, j = HF - 1 - i, WF - 1 - j
        taps = filters + (i * W_H + j * W_W + c * W_C)
        taps = tl.load(taps, mask=some & (f < F), other=0.0)
        total = tl.dot(patches, taps, total, input_precision=PRECISION)
    written, feature, place = known & (f < F), f, (group * F + f).to(tl.int64) * Y_F
    if PHASES > 1:
        OWN: tl.constexpr = F // (PHASES * PHASES)
        feature, below, right = f % OWN, f // OWN // PHASES, f // OWN % PHASES
        # All integers are those of a row or of a column of the tile, which takes fewer registers.
        above, under = (row < HO - SHIFT_H)[:, None], (row >= SHIFT_H)[:, None]
        beside, beyond = (column < WO - SHIFT_W)[:, None], (column >= SHIFT_W)[:, None]
        written &= ((below == 0) & above) | ((below == 1) & under)
        written &= ((right == 0) & beside) | ((right == 1) & beyond)
        place = below * (1 - 2 * SHIFT_H) * Y_H + right * (1 - 2 * SHIFT_W) * Y_W + feature * Y_F
    if BIAS:
        total += tl.load(bias + group * F + feature, mask=f < F, other=0.0)
    if ACTIVATION == "relu":
        # Not a maximum, which would hide NaN.
        total = tl.where(total < 0, 0.0, total)
    elif ACTIVATION == "gelu":
        total = 0.5 * total * (1 + tl.erf(total * 0.7071067811865476))
    at = y + (image.to(tl.int64) * Y_N + (row * Y_H + column * Y_W) * PHASES)[:, None] + place
    tl.store(at, total.to(y.dtype.element_ty), mask=written)
    if mean is not None:
        tiles = tl.cdiv(HO * WO, BM)
        if PHASES > 1:
            known = written
            # Of a phase a tile may have no pixel.
            count = tl.maximum(tl.sum(known.to(tl.float32), axis=0, keep_dims=True), 1.0)
        else:
            count = min(HO * WO - down * BM, BM)
        middle = tl.sum(tl.where(known, total, 0.0), axis=0, keep_dims=True) / count
        # The mean of large numbers is inexact by some of their last bits; that of the rest is not.
        rest = tl.where(known, total - middle, 0.0)
        off = tl.sum(rest, axis=0, keep_dims=True) / count
        spread = tl.sum(rest * rest, axis=0, keep_dims=True) - count * off * off
        tile = (tl.program_id(2) * tiles + down).to(tl.int64) * (tl.num_programs(1) * F)
        at = tile + group * F + f
        tl.store(mean + at, middle + off, mask=f < F)
        tl.store(squares + at, tl.where(spread < 0, 0.0, spread), mask=f < F)


@triton.jit
def weights(
    x,
    dy,
    images,
    rows_per_split,
    sums,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    X_N: tl.constexpr,
    X_H: tl.constexpr,
    X_W: tl.constexpr,
    X_C: tl.constexpr,
    HF: tl.constexpr,
    WF: tl.constexpr,
    W_H: tl.constexpr,
    W_W: tl.constexpr,
    W_C: tl.constexpr,
    W_F: tl.constexpr,
    HO: tl.constexpr,
    WO: tl.constexpr,
    F: tl.constexpr,
    Y_N: tl.constexpr,
    Y_H: tl.constexpr,
    Y_W: tl.constexpr,
    Y_F: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    REFLECT: tl.constexpr,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program of the filters' gradient: the im2col matrix, transposed, times dy.

    The grid's axes are tiles, groups, and splits of the rows that are summed (split-K). A split has
    `rows_per_split` rows, a multiple of `BK`, and its own `sums`, `SIZE` elements (those of the
    filters) after those of the split before.
    """
    TAPS: tl.constexpr = HF * WF
    down, across = _tile(TAPS * C, F, BM, BN, ROWS)
    group, split = tl.program_id(1), tl.program_id(2)
    i, j, c, some = _columns(down, tl.arange(0, BM)[:, None], WF, TAPS, C, BM)
    f = across * BN + tl.arange(0, BN)[None, :]
    x_group = x + (group * C + c).to(tl.int64) * X_C
    y_group = dy + (group * F + f).to(tl.int64) * Y_F
    total = tl.zeros((BM, BN), tl.float32)
    rows = images * HO * WO
    first = split * rows_per_split
    for start in range(first, min(first + rows_per_split, rows), BK):
        m = start + tl.arange(0, BK)[None, :]
        image, row, column = m // (HO * WO), m % (HO * WO) // WO, m % WO
        v, above = _sample(row * STRIDE_H - PAD_H + i * DILATION_H, H, 1, REFLECT)
        u, beside = _sample(column * STRIDE_W - PAD_W + j * DILATION_W, W, 1, REFLECT)
        inside = (m < rows) & some & above & beside
        at = x_group + image.to(tl.int64) * X_N + (v * X_H + u * X_W)
        patches = tl.load(at, mask=inside, other=0.0)
        m = start + tl.arange(0, BK)[:, None]
        image, row, column = m // (HO * WO), m % (HO * WO) // WO, m % WO
        at = y_group + image.to(tl.int64) * Y_N + (row * Y_H + column * Y_W)
        slopes = tl.load(at, mask=(m < rows) & (f < F), other=0.0)
        total = tl.dot(patches, slopes, total, input_precision=PRECISION)
    at = sums + split.to(tl.int64) * SIZE + (group * F + f) * W_F + (i * W_H + j * W_W + c * W_C)
    tl.store(at, total, mask=some & (f < F))


@triton.jit
def _tile(rows, columns: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr):
    """The row and column of a program's tile, `ROWS` rows of tiles at a time, which stay in L2."""
    down, across = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
    band = tl.program_id(0) // (ROWS * across)
    high = min(down - band * ROWS, ROWS)
    within = tl.program_id(0) % (ROWS * across)
    return band * ROWS + within % high, within // high


@triton.jit
def _columns(step, k, WF: tl.constexpr, TAPS: tl.constexpr, C: tl.constexpr, BK: tl.constexpr):
    """The taps' rows and columns, the channels, and the mask of a block of im2col columns.

    Where all of a block belongs to one tap, the tap is a scalar, and the channels are consecutive.
    """
    if C % BK == 0:
        tap, c = step // (C // BK), step % (C // BK) * BK + k
    else:
        tap, c = (step * BK + k) // C, (step * BK + k) % C
    return tap // WF, tap % WF, c, tap < TAPS


@triton.jit
def _sample(
    at, SIZE: tl.constexpr, UP: tl.constexpr, REFLECT: tl.constexpr, REPEAT: tl.constexpr = False
):
    """The index of the sample of x at a position, and whether there is one."""
    if REPEAT:
        at = tl.minimum(tl.maximum(at, 0), SIZE - 1)
    if REFLECT:
        at = SIZE - 1 - tl.abs(SIZE - 1 - tl.abs(at))
    if UP > 1:
        return at // UP, (at >= 0) & (at // UP < SIZE) & (at % UP == 0)
    return at, (at >= 0) & (at < SIZE)
