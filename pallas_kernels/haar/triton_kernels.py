"""The Haar cascade's Triton kernels: up to three fused levels, whose low bands stay in registers.

Frameworks launch them through `triton_launches`; strides are arguments, so any layout runs. The
grid has one axis. A program's tile is `P` rows of squares of `2**LEVELS` x `2**LEVELS` pixels, and
`BE` elements of each row, channels fastest: neighbouring threads take neighbouring channels, then
the next square, so every thread works whatever C is.

`lh1`, `hl1` and `hh1` are the details of the finest level, `lh2` to `hh3` those of the next two,
unused where `LEVELS` is less; `low` is the coarsest low band. Level l of an image `[N, H, W, C]`
has bands `[N, ceil(H / 2**l), ceil(W / 2**l), C]`. Strides along images and rows count in units of
`UNIT` elements, from which the compiler learns that it may vectorise loads across channels.

Arithmetic is in float32. Loads outside an image or a band give zero, and stores there are masked.
"""

import triton
import triton.language as tl


@triton.jit
def analysis(
    x,
    images,
    H,
    W,
    x_n,
    x_h,
    low_n,
    low_h,
    high1_n,
    high1_h,
    high2_n,
    high2_h,
    high3_n,
    high3_h,
    low,
    lh1,
    hl1,
    hh1,
    lh2,
    hl2,
    hh2,
    lh3,
    hl3,
    hh3,
    C: tl.constexpr,
    X_W: tl.constexpr,
    X_C: tl.constexpr,
    LOW_W: tl.constexpr,
    LOW_C: tl.constexpr,
    HIGH1_W: tl.constexpr,
    HIGH1_C: tl.constexpr,
    HIGH2_W: tl.constexpr,
    HIGH2_C: tl.constexpr,
    HIGH3_W: tl.constexpr,
    HIGH3_C: tl.constexpr,
    UNIT: tl.constexpr,
    LEVELS: tl.constexpr,
    P: tl.constexpr,
    BE: tl.constexpr,
):
    """One program of `wavedec`: one to three levels, the coarsest low band and all details."""
    SIDE: tl.constexpr = 2**LEVELS
    square = _squares(images, H, W, C, SIDE, P, BE)
    steps = (x_n, x_h, X_W, X_C)
    steps1, steps2 = (high1_n, high1_h, HIGH1_W, HIGH1_C), (high2_n, high2_h, HIGH2_W, HIGH2_C)
    size1 = ((H + 1) // 2, (W + 1) // 2)
    lows = ()
    # Two rows of pixels at a time need fewer registers a thread than the whole square.
    for v in tl.static_range(SIDE // 2):
        pair = _load(x, square, steps, (H, W), UNIT, 2 * v, 2, SIDE)
        low_row, lh, hl, hh = _analyse(pair, 1, SIDE // 2)
        _store(lh1, lh, square, steps1, size1, UNIT, v, 1, SIDE // 2)
        _store(hl1, hl, square, steps1, size1, UNIT, v, 1, SIDE // 2)
        _store(hh1, hh, square, steps1, size1, UNIT, v, 1, SIDE // 2)
        lows = lows + low_row
    if LEVELS > 1:
        size2 = ((size1[0] + 1) // 2, (size1[1] + 1) // 2)
        lows, lh, hl, hh = _analyse(lows, SIDE // 4, SIDE // 4)
        _store(lh2, lh, square, steps2, size2, UNIT, 0, SIDE // 4, SIDE // 4)
        _store(hl2, hl, square, steps2, size2, UNIT, 0, SIDE // 4, SIDE // 4)
        _store(hh2, hh, square, steps2, size2, UNIT, 0, SIDE // 4, SIDE // 4)
    # The coarsest bands have a value wherever a square lies in the image.
    if LEVELS > 2:
        steps3 = (high3_n, high3_h, HIGH3_W, HIGH3_C)
        lows, lh, hl, hh = _analyse(lows, 1, 1)
        _store(lh3, lh, square, steps3, (H, W), UNIT, 0, 1, 1)
        _store(hl3, hl, square, steps3, (H, W), UNIT, 0, 1, 1)
        _store(hh3, hh, square, steps3, (H, W), UNIT, 0, 1, 1)
    _store(low, lows, square, (low_n, low_h, LOW_W, LOW_C), (H, W), UNIT, 0, 1, 1)


@triton.jit
def synthesis(
    low,
    lh1,
    hl1,
    hh1,
    lh2,
    hl2,
    hh2,
    lh3,
    hl3,
    hh3,
    images,
    H,
    W,
    x_n,
    x_h,
    low_n,
    low_h,
    high1_n,
    high1_h,
    high2_n,
    high2_h,
    high3_n,
    high3_h,
    x,
    C: tl.constexpr,
    X_W: tl.constexpr,
    X_C: tl.constexpr,
    LOW_W: tl.constexpr,
    LOW_C: tl.constexpr,
    HIGH1_W: tl.constexpr,
    HIGH1_C: tl.constexpr,
    HIGH2_W: tl.constexpr,
    HIGH2_C: tl.constexpr,
    HIGH3_W: tl.constexpr,
    HIGH3_C: tl.constexpr,
    UNIT: tl.constexpr,
    LEVELS: tl.constexpr,
    P: tl.constexpr,
    BE: tl.constexpr,
):
    """One program of `waverec`: x from the coarsest low band and the details of 1 to 3 levels."""
    SIDE: tl.constexpr = 2**LEVELS
    square = _squares(images, H, W, C, SIDE, P, BE)
    steps = (x_n, x_h, X_W, X_C)
    steps1, steps2 = (high1_n, high1_h, HIGH1_W, HIGH1_C), (high2_n, high2_h, HIGH2_W, HIGH2_C)
    size1 = ((H + 1) // 2, (W + 1) // 2)
    # The coarsest bands have a value wherever a square lies in the image.
    lows = _load(low, square, (low_n, low_h, LOW_W, LOW_C), (H, W), UNIT, 0, 1, 1)
    if LEVELS > 2:
        steps3 = (high3_n, high3_h, HIGH3_W, HIGH3_C)
        lh = _load(lh3, square, steps3, (H, W), UNIT, 0, 1, 1)
        hl = _load(hl3, square, steps3, (H, W), UNIT, 0, 1, 1)
        hh = _load(hh3, square, steps3, (H, W), UNIT, 0, 1, 1)
        lows = _synthesise(lows, lh, hl, hh, 1, 1)
    if LEVELS > 1:
        size2 = ((size1[0] + 1) // 2, (size1[1] + 1) // 2)
        lh = _load(lh2, square, steps2, size2, UNIT, 0, SIDE // 4, SIDE // 4)
        hl = _load(hl2, square, steps2, size2, UNIT, 0, SIDE // 4, SIDE // 4)
        hh = _load(hh2, square, steps2, size2, UNIT, 0, SIDE // 4, SIDE // 4)
        lows = _synthesise(lows, lh, hl, hh, SIDE // 4, SIDE // 4)
    HALF: tl.constexpr = SIDE // 2
    for v in tl.static_range(HALF):
        lh = _load(lh1, square, steps1, size1, UNIT, v, 1, HALF)
        hl = _load(hl1, square, steps1, size1, UNIT, v, 1, HALF)
        hh = _load(hh1, square, steps1, size1, UNIT, v, 1, HALF)
        pair = _synthesise(lows[v * HALF : (v + 1) * HALF], lh, hl, hh, 1, HALF)
        _store(x, pair, square, steps, (H, W), UNIT, 2 * v, 2, SIDE)


@triton.jit
def _squares(images, H, W, C: tl.constexpr, SIDE: tl.constexpr, P: tl.constexpr, BE: tl.constexpr):
    """The images, rows, columns, channels of a program's squares, and the mask of existing ones."""
    across, down = (W + SIDE - 1) // SIDE, (H + SIDE - 1) // SIDE
    # Consecutive programs take neighbours in memory, so they share cache lines.
    blocks = (across * C + BE - 1) // BE
    row = tl.program_id(0) // blocks * P + tl.arange(0, P)[:, None]
    element = tl.program_id(0) % blocks * BE + tl.arange(0, BE)[None, :]
    ok = (row < images * down) & (element < across * C)
    return (row // down).to(tl.int64), (row % down).to(tl.int64), element // C, element % C, ok


@triton.jit
def _start(array, square, steps, UNIT: tl.constexpr, SIDE: tl.constexpr):
    """Pointers to the first values of squares of `SIDE` x `SIDE` values of an array."""
    n, i, j, c, _ = square
    at = UNIT * (n * steps[0] + SIDE * i * steps[1]) + SIDE * j * steps[2]
    return array + (at + c.to(tl.int64) * steps[3])


@triton.jit
def _load(
    array,
    square,
    steps,
    size,
    UNIT: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    SIDE: tl.constexpr,
):
    """`ROWS` rows of squares of `SIDE` x `SIDE` values in float32, zero outside the array."""
    _, i, j, _, ok = square
    at = _start(array, square, steps, UNIT, SIDE)
    values = ()
    for v in tl.static_range(FIRST, FIRST + ROWS):
        for u in tl.static_range(SIDE):
            inside = ok & (SIDE * i + v < size[0]) & (SIDE * j + u < size[1])
            value = tl.load(at + (UNIT * v * steps[1] + u * steps[2]), mask=inside, other=0.0)
            values = values + (value.to(tl.float32),)
    return values


@triton.jit
def _store(
    array,
    values,
    square,
    steps,
    size,
    UNIT: tl.constexpr,
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    SIDE: tl.constexpr,
):
    """Stores the values that `_load` with the same arguments would read, inside the array alone."""
    _, i, j, _, ok = square
    at = _start(array, square, steps, UNIT, SIDE)
    for v in tl.static_range(FIRST, FIRST + ROWS):
        for u in tl.static_range(SIDE):
            inside = ok & (SIDE * i + v < size[0]) & (SIDE * j + u < size[1])
            value = values[(v - FIRST) * SIDE + u].to(array.dtype.element_ty)
            tl.store(at + (UNIT * v * steps[1] + u * steps[2]), value, mask=inside)


@triton.jit
def split(a, b, c, d, HALVE: tl.constexpr):
    """The four bands of pixels `[[a, b], [c, d]]`, without `HALVE` twice as large."""
    top, bottom, right, cross = a + b, c + d, a - b, c - d
    if HALVE:
        return (
            0.5 * (top + bottom),
            0.5 * (top - bottom),
            0.5 * (right + cross),
            0.5 * (right - cross),
        )
    return top + bottom, top - bottom, right + cross, right - cross


@triton.jit
def _analyse(values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The four bands of `ROWS` x `COLUMNS` coefficients from twice as many rows and columns."""
    low, vertical, horizontal, diagonal = (), (), (), ()
    for v in tl.static_range(ROWS):
        for u in tl.static_range(COLUMNS):
            a, b = values[4 * v * COLUMNS + 2 * u], values[4 * v * COLUMNS + 2 * u + 1]
            c, d = values[(4 * v + 2) * COLUMNS + 2 * u], values[(4 * v + 2) * COLUMNS + 2 * u + 1]
            ll, lh, hl, hh = split(a, b, c, d, True)
            low = low + (ll,)
            vertical = vertical + (lh,)
            horizontal = horizontal + (hl,)
            diagonal = diagonal + (hh,)
    return low, vertical, horizontal, diagonal


@triton.jit
def _synthesise(low, vertical, horizontal, diagonal, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of `_analyse`."""
    values = ()
    for v in tl.static_range(ROWS):
        upper, lower = (), ()
        for at in tl.static_range(v * COLUMNS, (v + 1) * COLUMNS):
            top, bottom = low[at] + vertical[at], low[at] - vertical[at]
            right, cross = horizontal[at] + diagonal[at], horizontal[at] - diagonal[at]
            upper = upper + (0.5 * (top + right), 0.5 * (top - right))
            lower = lower + (0.5 * (bottom + cross), 0.5 * (bottom - cross))
        values = values + upper + lower
    return values
