"""The wavelet convolution's Triton kernels, whose high bands never leave the registers.

Frameworks launch them through `triton_launches`; strides are arguments, so any layout runs. The
grid's axes are blocks of strips and blocks of channels. A program's tile is `P` strips, each `TW`
columns of coefficients wide, of one or more images, by `BC` channels. A thread holds one channel of
one strip, and its accumulators in registers.

The kernel of a level reads the low band of the level above (x itself at the first level), computes
its four bands, and stores their filtered synthesis, to which it adds the synthesis of the next
level and, at the first level, the base convolution. The factors 1/2 of analysis and synthesis are
folded into its taps. It filters two rows at once: each row of bands that it loads adds to the upper
row with one row of taps, and to the lower row with the row of taps before, still in registers.

The taps are padded with a row of zeros, so an infinite pixel makes NaN one row beyond its radius.

A weight gradient keeps one accumulator for each tap, and the `K` rows of dy within the radius of a
row of x.
"""

import triton
import triton.language as tl

from pallas_kernels.haar.triton_kernels import split


@triton.jit
def _strips(block, images, across, down, P: tl.constexpr):
    """The column, the images and the rows of a block's strips, and the mask of existing ones."""
    at = block // across * P + tl.arange(0, P)[:, None]
    return block % across, (at // down).to(tl.int64), at % down, at < images * down


@triton.jit
def _across(c, STEP: tl.constexpr):
    """The offsets of channels, which may be whole images apart and then need 64 bits."""
    if STEP == 1:
        return c
    else:
        return c.to(tl.int64) * STEP


@triton.jit
def _row(start, ok, first, size, COUNT: tl.constexpr, STEP: tl.constexpr, CHECK: tl.constexpr):
    """`COUNT` consecutive pixels of a row in float32, zero outside the image.

    Without `CHECK` the columns are known to lie inside and are not masked.
    """
    values = ()
    for j in tl.static_range(COUNT):
        if CHECK:
            inside = ok & (first + j >= 0) & (first + j < size)
        else:
            inside = ok
        value = tl.load(start + j * STEP, mask=inside, other=0.0)
        values = values + (value.to(tl.float32),)
    return values


@triton.jit
def _bands(top, bottom, COUNT: tl.constexpr):
    """The four bands of `COUNT` pairs of columns of two rows, twice as large as the transform's."""
    bands = ()
    for j in tl.static_range(COUNT):
        bands = bands + split(top[2 * j], top[2 * j + 1], bottom[2 * j], bottom[2 * j + 1], False)
    return bands


@triton.jit
def _zeros(COUNT: tl.constexpr, P: tl.constexpr, BC: tl.constexpr):
    """`COUNT` accumulators `[P, BC]` of zeros."""
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros((P, BC), tl.float32),)
    return zeros


@triton.jit
def low_bands(
    x,
    images,
    H,
    W,
    C,
    x_n,
    x_h,
    low1,
    low2,
    low3,
    X_W: tl.constexpr,
    X_C: tl.constexpr,
    LEVELS: tl.constexpr,
    P: tl.constexpr,
    BC: tl.constexpr,
):
    """One program of the low bands of one to three levels of x.

    Each is `[N, ceil(H / 2), ceil(W / 2), C]` of the one before.
    """
    SIDE: tl.constexpr = 2**LEVELS
    across = (W + SIDE - 1) // SIDE
    down = (H + SIDE - 1) // SIDE
    j, n, i, ok = _strips(tl.program_id(0), images, across, down, P)
    c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    ok = ok & (c < C)
    row = x + n * x_n + (SIDE * i).to(tl.int64) * x_h + SIDE * j * X_W + _across(c, X_C)
    lows = ()
    for v in tl.static_range(SIDE // 2):
        top_ok, bottom_ok = ok & (SIDE * i + 2 * v < H), ok & (SIDE * i + 2 * v + 1 < H)
        top = _row(row + 2 * v * x_h, top_ok, SIDE * j, W, SIDE, X_W, True)
        bottom = _row(row + (2 * v + 1) * x_h, bottom_ok, SIDE * j, W, SIDE, X_W, True)
        for u in tl.static_range(SIDE // 2):
            low, _, _, _ = split(top[2 * u], top[2 * u + 1], bottom[2 * u], bottom[2 * u + 1], True)
            lows = lows + (low,)
    h, w = (H + 1) // 2, (W + 1) // 2
    _store_low(low1, lows, n, i, j, c, ok, h, w, C, SIDE // 2)
    if LEVELS > 1:
        lows = _halve(lows, SIDE // 2)
        h, w = (h + 1) // 2, (w + 1) // 2
        _store_low(low2, lows, n, i, j, c, ok, h, w, C, SIDE // 4)
    if LEVELS > 2:
        lows = _halve(lows, SIDE // 4)
        h, w = (h + 1) // 2, (w + 1) // 2
        _store_low(low3, lows, n, i, j, c, ok, h, w, C, SIDE // 8)


@triton.jit
def _halve(lows, SIDE: tl.constexpr):
    """The low band of squares of `SIDE` x `SIDE` values."""
    found = ()
    for v in tl.static_range(SIDE // 2):
        for u in tl.static_range(SIDE // 2):
            a, b = lows[2 * v * SIDE + 2 * u], lows[2 * v * SIDE + 2 * u + 1]
            c, d = lows[(2 * v + 1) * SIDE + 2 * u], lows[(2 * v + 1) * SIDE + 2 * u + 1]
            low, _, _, _ = split(a, b, c, d, True)
            found = found + (low,)
    return found


@triton.jit
def _store_low(low, lows, n, i, j, c, ok, h, w, C, SIDE: tl.constexpr):
    """Stores squares of `SIDE` x `SIDE` values to a low band, inside it alone."""
    for v in tl.static_range(SIDE):
        for u in tl.static_range(SIDE):
            row, column = SIDE * i + v, SIDE * j + u
            to = low + ((n * h + row) * w + column) * C + c
            value = lows[v * SIDE + u].to(low.dtype.element_ty)
            tl.store(to, value, mask=ok & (row < h) & (column < w))


@triton.jit
def level_forward(
    x,
    below,
    taps,
    base,
    bias,
    images,
    H,
    W,
    x_n,
    x_h,
    y_n,
    y_h,
    y,
    C: tl.constexpr,
    C_TAPS: tl.constexpr,
    X_W: tl.constexpr,
    X_C: tl.constexpr,
    Y_W: tl.constexpr,
    Y_C: tl.constexpr,
    K: tl.constexpr,
    BELOW: tl.constexpr,
    BASE: tl.constexpr,
    BIAS: tl.constexpr,
    INNER: tl.constexpr,
    TW: tl.constexpr,
    P: tl.constexpr,
    BC: tl.constexpr,
):
    """One program of a level: `y [N, H, W, C]` from x and from `below [N, H / 2, W / 2, C]`.

    `taps [(K + 1) * K, 4, C']`, `base [(K + 1) * K, C']` and `bias [C']` are float32, where C' is C
    rounded up to whole blocks; they are zero after the `K * K` taps and the C channels. `below` is
    the synthesis of the next level.
    """
    rows, columns = (H + 1) // 2, (W + 1) // 2
    across, down = (columns + TW - 1) // TW, (rows + 1) // 2
    j0, n, o, ok = _strips(tl.program_id(0), images, across, down, P)
    o, j0 = 2 * o, j0 * TW
    c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    if C % BC != 0:
        ok = ok & (c < C)
    source = x + n * x_n + 2 * (j0 - K // 2) * X_W + _across(c, X_C)
    target = y + n * y_n + 2 * j0 * Y_W + _across(c, Y_C)
    below_start = below + (n * rows * columns + j0) * C + c
    # Strips away from the border need no masks along columns. They have code of their own where
    # there are enough of them (`INNER`).
    if (j0 >= K // 2) & (2 * (j0 + TW + K // 2) <= W) & INNER:
        _two_rows(
            *(
                source,
                target,
                below_start,
                taps + c,
                base + c,
                bias + c,
                o,
                j0,
                ok,
                H,
                W,
                rows,
                columns,
            ),
            *(x_h, y_h, C, C_TAPS, X_W, Y_W, K, BELOW, BASE, BIAS, TW, P, BC, False),
        )
    else:
        _two_rows(
            *(
                source,
                target,
                below_start,
                taps + c,
                base + c,
                bias + c,
                o,
                j0,
                ok,
                H,
                W,
                rows,
                columns,
            ),
            *(x_h, y_h, C, C_TAPS, X_W, Y_W, K, BELOW, BASE, BIAS, TW, P, BC, True),
        )


@triton.jit
def _two_rows(
    source,
    target,
    below,
    taps,
    base,
    bias,
    o,
    j0,
    ok,
    H,
    W,
    rows,
    columns,
    x_h,
    y_h,
    C: tl.constexpr,
    C_TAPS: tl.constexpr,
    X_W: tl.constexpr,
    Y_W: tl.constexpr,
    K: tl.constexpr,
    BELOW: tl.constexpr,
    BASE: tl.constexpr,
    BIAS: tl.constexpr,
    TW: tl.constexpr,
    P: tl.constexpr,
    BC: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Computes and stores four rows of pixels: two rows of bands, filtered and synthesised."""
    RADIUS: tl.constexpr = K // 2
    WIDE: tl.constexpr = TW + 2 * RADIUS
    sums = _zeros(2 * TW * 4, P, BC)
    above = _zeros(K * 4, 1, BC)
    for d in range(K + 1):
        i = o + d - RADIUS
        start = source + (2 * i).to(tl.int64) * x_h
        first, top_ok = 2 * (j0 - RADIUS), ok & (i >= 0) & (2 * i < H)
        top = _row(start, top_ok, first, W, 2 * WIDE, X_W, CHECK)
        bottom_ok = top_ok & (2 * i + 1 < H)
        bottom = _row(start + x_h, bottom_ok, first, W, 2 * WIDE, X_W, CHECK)
        here = _taps(taps + d * K * 4 * C_TAPS, K * 4, C_TAPS)
        sums = _add_row(sums, _bands(top, bottom, WIDE), here, above, K, TW, 4)
        above = here
    for half in range(2):
        done = ()
        for t in tl.static_range(4 * TW):
            done = done + (tl.where(half == 0, sums[t], sums[4 * TW + t]),)
        row = o + half
        pixels = ()
        for j in tl.static_range(TW):
            low = done[4 * j]
            if BELOW:
                inside = ok & (row < rows)
                if CHECK:
                    inside = inside & (j0 + j < columns)
                at = below + (row.to(tl.int64) * columns + j) * C
                low += 0.5 * tl.load(at, mask=inside, other=0.0).to(tl.float32)
            vertical, horizontal, diagonal = done[4 * j + 1], done[4 * j + 2], done[4 * j + 3]
            # In the order of `haar.triton_kernels` these sums compile to other machine code.
            right, cross = horizontal + diagonal, horizontal - diagonal
            top, bottom = low + vertical, low - vertical
            pixels = pixels + (top + right, top - right, bottom + cross, bottom - cross)
        if BASE:
            start = source + (2 * row).to(tl.int64) * x_h + RADIUS * X_W
            pixels = _add_base(
                *(pixels, start, base, 2 * row, 2 * j0, ok, H, W, x_h, C_TAPS, X_W, K, TW, BC),
                CHECK,
            )
        if BIAS:
            offset = tl.load(bias)
        for v in tl.static_range(2):
            to = target + (2 * row + v).to(tl.int64) * y_h
            row_ok = ok & (2 * row + v < H)
            for j in tl.static_range(2 * TW):
                inside = row_ok
                if CHECK:
                    inside = inside & (2 * j0 + j < W)
                value = pixels[4 * (j // 2) + 2 * v + j % 2]
                if BIAS:
                    value += offset
                tl.store(to + j * Y_W, value.to(target.dtype.element_ty), mask=inside)


@triton.jit
def _taps(start, COUNT: tl.constexpr, STEP: tl.constexpr):
    """`COUNT` taps, `STEP` elements apart."""
    found = ()
    for t in tl.static_range(COUNT):
        found = found + (tl.load(start + t * STEP),)
    return found


@triton.jit
def _add_row(sums, values, here, above, K: tl.constexpr, COUNT: tl.constexpr, BANDS: tl.constexpr):
    """Adds a row of pixels or bands, times taps, to two rows of `COUNT` accumulators.

    The upper row takes the taps `here`, the lower row those `above`.
    """
    found = ()
    for row in tl.static_range(2):
        for j in tl.static_range(COUNT):
            for s in tl.static_range(BANDS):
                total = sums[(row * COUNT + j) * BANDS + s]
                for e in tl.static_range(K):
                    if row == 0:
                        total += values[(j + e) * BANDS + s] * here[e * BANDS + s]
                    else:
                        total += values[(j + e) * BANDS + s] * above[e * BANDS + s]
                found = found + (total,)
    return found


@triton.jit
def _add_base(
    pixels,
    start,
    base,
    row,
    column,
    ok,
    H,
    W,
    x_h,
    C_TAPS: tl.constexpr,
    X_W: tl.constexpr,
    K: tl.constexpr,
    TW: tl.constexpr,
    BC: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Adds the base convolution to two rows of `2 * TW` pixels.

    `start` points `RADIUS` columns left of the first.
    """
    RADIUS: tl.constexpr = K // 2
    COUNT: tl.constexpr = 2 * TW + 2 * RADIUS
    sums = ()
    for v in tl.static_range(2):
        for j in tl.static_range(TW):
            sums = sums + (pixels[4 * j + 2 * v], pixels[4 * j + 2 * v + 1])
    above = _zeros(K, 1, BC)
    for q in range(K + 1):
        i = row + q - RADIUS
        inside = ok & (i >= 0) & (i < H)
        at = start + (q - RADIUS) * x_h
        values = _row(at, inside, column - RADIUS, W, COUNT, X_W, CHECK)
        here = _taps(base + q * K * C_TAPS, K, C_TAPS)
        sums = _add_row(sums, values, here, above, K, 2 * TW, 1)
        above = here
    pixels = ()
    for j in tl.static_range(TW):
        pixels = pixels + (sums[2 * j], sums[2 * j + 1], sums[2 * (TW + j)], sums[2 * (TW + j) + 1])
    return pixels


@triton.jit
def base_weights(
    x,
    dy,
    images,
    H,
    W,
    C,
    x_n,
    x_h,
    y_n,
    y_h,
    sums,
    X_W: tl.constexpr,
    X_C: tl.constexpr,
    Y_W: tl.constexpr,
    Y_C: tl.constexpr,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    TW: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    BC: tl.constexpr,
):
    """One program of the base's gradient: x correlated with dy over the program's blocks of strips.

    The program is persistent: it takes `BLOCKS` blocks of strips, one after the other, and stores
    its accumulators once, to its share of `sums [programs, K * K, C]`.
    """
    RADIUS: tl.constexpr = K // 2
    across, down = (W + TW - 1) // TW, (H + R - 1) // R
    c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    c_ok = c < C
    totals = _zeros(K * K, P, BC)
    for index in range(BLOCKS):
        block = tl.program_id(0) + index * tl.num_programs(0)
        j0, n, i0, ok = _strips(block, images, across, down, P)
        i0, j0, ok = i0 * R, j0 * TW, ok & c_ok
        source = x + n * x_n + (j0 - RADIUS) * X_W + _across(c, X_C)
        other = dy + n * y_n + j0 * Y_W + _across(c, Y_C)
        rows = _zeros(K * TW, P, BC)
        for step in range(R + 2 * RADIUS):
            i = i0 + step - RADIUS
            o = i0 + step
            inside = ok & (step < R) & (o < H)
            start = other + o.to(tl.int64) * y_h
            rows = _row(start, inside, j0, W, TW, Y_W, True) + rows[: (K - 1) * TW]
            inside = ok & (i >= 0) & (i < H)
            start = source + i.to(tl.int64) * x_h
            values = _row(start, inside, j0 - RADIUS, W, TW + 2 * RADIUS, X_W, True)
            totals = _correlate(totals, values, rows, K, TW, 1)
    _store_sums(sums, totals, c, c_ok, C, K * K)


@triton.jit
def level_weights(
    x,
    dy,
    images,
    H,
    W,
    C,
    x_n,
    x_h,
    y_n,
    y_h,
    sums,
    X_W: tl.constexpr,
    X_C: tl.constexpr,
    Y_W: tl.constexpr,
    Y_C: tl.constexpr,
    K: tl.constexpr,
    FIRST: tl.constexpr,
    BANDS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TW: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    BC: tl.constexpr,
):
    """One program of a level's gradient: bands of x correlated with those of dy, times four.

    The program is persistent, as in `base_weights`. It takes `BANDS` of the four bands, from
    `FIRST` on; its share is of `sums [programs, K * K * BANDS, C]`.
    """
    RADIUS: tl.constexpr = K // 2
    WIDE: tl.constexpr = TW + 2 * RADIUS
    height, width = (H + 1) // 2, (W + 1) // 2
    across, down = (width + TW - 1) // TW, (height + R - 1) // R
    c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :]
    c_ok = c < C
    totals = _zeros(K * K * BANDS, P, BC)
    for index in range(BLOCKS):
        block = tl.program_id(0) + index * tl.num_programs(0)
        j0, n, i0, ok = _strips(block, images, across, down, P)
        i0, j0, ok = i0 * R, j0 * TW, ok & c_ok
        source = x + n * x_n + 2 * (j0 - RADIUS) * X_W + _across(c, X_C)
        other = dy + n * y_n + 2 * j0 * Y_W + _across(c, Y_C)
        rows = _zeros(K * TW * BANDS, P, BC)
        for step in range(R + 2 * RADIUS):
            i = i0 + step - RADIUS
            o = i0 + step
            start = other + (2 * o).to(tl.int64) * y_h
            top_ok = ok & (step < R) & (2 * o < H)
            bottom_ok = top_ok & (2 * o + 1 < H)
            top = _row(start, top_ok, 2 * j0, W, 2 * TW, Y_W, True)
            bottom = _row(start + y_h, bottom_ok, 2 * j0, W, 2 * TW, Y_W, True)
            found = _chosen(_bands(top, bottom, TW), FIRST, BANDS, TW)
            rows = found + rows[: (K - 1) * TW * BANDS]
            start = source + (2 * i).to(tl.int64) * x_h
            top_ok = ok & (i >= 0) & (2 * i < H)
            bottom_ok = top_ok & (2 * i + 1 < H)
            top = _row(start, top_ok, 2 * (j0 - RADIUS), W, 2 * WIDE, X_W, True)
            bottom = _row(start + x_h, bottom_ok, 2 * (j0 - RADIUS), W, 2 * WIDE, X_W, True)
            found = _chosen(_bands(top, bottom, WIDE), FIRST, BANDS, WIDE)
            totals = _correlate(totals, found, rows, K, TW, BANDS)
    _store_sums(sums, totals, c, c_ok, C, K * K * BANDS)


@triton.jit
def _chosen(bands, FIRST: tl.constexpr, BANDS: tl.constexpr, COUNT: tl.constexpr):
    """`BANDS` of the four bands of each column, from `FIRST` on."""
    found = ()
    for j in tl.static_range(COUNT):
        found = found + bands[4 * j + FIRST : 4 * j + FIRST + BANDS]
    return found


@triton.jit
def _correlate(totals, values, rows, K: tl.constexpr, TW: tl.constexpr, BANDS: tl.constexpr):
    """Adds a row of x, times each of `K` rows of dy, to the accumulators of their taps."""
    found = ()
    for d in tl.static_range(K):
        for e in tl.static_range(K):
            for s in tl.static_range(BANDS):
                total = totals[(d * K + e) * BANDS + s]
                for j in tl.static_range(TW):
                    total += values[(j + e) * BANDS + s] * rows[(d * TW + j) * BANDS + s]
                found = found + (total,)
    return found


@triton.jit
def _store_sums(sums, totals, c, ok, C, COUNT: tl.constexpr):
    """Stores a program's `COUNT` accumulators, each summed over its strips."""
    to = sums + tl.program_id(0).to(tl.int64) * COUNT * C + c
    for t in tl.static_range(COUNT):
        tl.store(to + t * C, tl.sum(totals[t], axis=0, keep_dims=True), mask=ok)
