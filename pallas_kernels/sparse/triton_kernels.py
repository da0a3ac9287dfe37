"""The sparse convolution's Triton kernels: the search of a table of rows, an implicit GEMM over it.

`table [K, M]` holds for each offset and each row of the result the row of x that is read, or -1.
Nothing gathered is stored, and nothing is scattered: a program computes a tile of `BM` rows of the
result by `BN` features over all offsets, in float32 accumulators. With `ORDERED` it takes the rows
in `order`, where rows that lack the same offsets are neighbours, and skips the offsets that all of
them lack: `masks [ceil(K / 32), ceil(M / TILE)]` has a bit of each offset for `TILE` rows at a
time. Offsets are taken in ascending order wherever a row stands, so that permuted rows give
permuted results, bit by bit.

`G` groups have `C` channels and `F` features each. Rows are addressed in 64 bits, rows, channels
and features are masked, so that any number of them is correct. Frameworks launch the kernels
through `triton_launches`. Every sum has a fixed order, so results are bitwise reproducible.
"""

import triton
import triton.language as tl

from pallas_kernels.sparse.checks import LIMIT

_LIMIT = tl.constexpr(LIMIT)
_MISSING = tl.constexpr(0xFFFFFFFF)


@triton.jit
def search(
    high,
    low,
    stood,
    asked_high,
    asked_low,
    places,
    steps,
    count,
    asked,
    last,
    near,
    halvings,
    near_halvings,
    stride_x,
    stride_y,
    stride_z,
    table,
    BLOCK: tl.constexpr,
):
    """One program of the table of a map: rows by one column of offsets, for `BLOCK` sites.

    The grid's axes are sites, and columns of `last` offsets along the last axis, `near` apart. Keys
    are those of `voxels.pack`, in halves: `count` sorted ones, which `stood` in these rows, and
    those of `asked` sites. Site u, to whose place the row is written, reads the key of
    `stride u + steps[column]`, `steps [columns, 3]`, and those behind it. Sites that follow each
    other as keys do search the same places. A first offset takes so many `halvings` of all keys;
    between two offsets there are no more keys than voxels, which takes `near_halvings`.
    """
    site, column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    known = site < asked
    upper = tl.load(asked_high + site, mask=known, other=0).to(tl.uint32, bitcast=True)
    lower = tl.load(asked_low + site, mask=known, other=0).to(tl.uint32, bitcast=True)
    place = tl.load(places + site, mask=known, other=0)
    x = _moved(upper >> 5, stride_x, tl.load(steps + 3 * column))
    y = _moved((upper << 13) | (lower >> 18), stride_y, tl.load(steps + 3 * column + 1))
    z = _moved(lower, stride_z, tl.load(steps + 3 * column + 2))
    # A key has 31 bits in its lower half, a missing one 32.
    inside = known & ((lower >> 31) == 0) & _within(x) & _within(y)
    x, y = x.to(tl.uint32), y.to(tl.uint32)
    wanted = tl.where(inside, (upper >> 23 << 23) | (x << 5) | (y >> 13), _MISSING)
    left = tl.zeros((BLOCK,), tl.int32)
    right = left + count
    turns = halvings
    for i in range(last):
        # A place beyond the limit is searched at it: the next column's keys are not its own.
        end = tl.minimum(tl.maximum(z, 0), 2 * _LIMIT - 1).to(tl.uint32)
        rest = tl.where(inside, ((y & 0x1FFF) << 18) | end, _MISSING)
        for _ in range(turns):
            middle = left + (right - left) // 2
            some = left < right
            there, below = _key(high, low, middle, some)
            before = some & ((there < wanted) | ((there == wanted) & (below < rest)))
            left = tl.where(before, middle + 1, left)
            right = tl.where(before, right, middle)
        some = inside & _within(z) & (left < count)
        there, below = _key(high, low, left, some)
        hit = some & (there == wanted) & (below == rest)
        row = tl.load(stood + left, mask=hit, other=-1)
        at = (column * last + i).to(tl.int64) * asked + place
        tl.store(table + at, row, mask=known)
        z += near
        right = tl.minimum(left + near, count)
        turns = near_halvings


@triton.jit
def conv(
    x,
    w,
    table,
    order,
    masks,
    rows,
    y,
    K: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
    ORDERED: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One program of `y[m] = sum over k of x[table[k, m]] w[k]`, for `w [K, G, C, F]`.

    The grid's axes are tiles, groups, and splits of the offsets, each of which writes its own
    `y [M, G F]` after that of the split before.
    """
    ACROSS: tl.constexpr = (F + BN - 1) // BN
    STEPS: tl.constexpr = (C + BK - 1) // BK
    tile, across = tl.program_id(0) // ACROSS, tl.program_id(0) % ACROSS
    group, split = tl.program_id(1), tl.program_id(2)
    row, known = _rows(order, tile, rows, ORDERED, BM)
    c = tl.arange(0, BK)
    f = across * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for word in range((K + 31) // 32):
        left, count = _offsets(masks, tile, word, split, rows, K, ORDERED, SPLITS, TILE, BM)
        # One loop over offsets and channels, so that the loads of the next offset are under way.
        for step in range(count * STEPS):
            k, rest = _lowest(left)
            k = (word * 32 + k).to(tl.int64)
            at = tl.load(table + k * rows + row, mask=known, other=-1)
            channel = step % STEPS * BK + c
            patches = tl.load(
                x + at.to(tl.int64)[:, None] * (G * C) + (group * C + channel)[None, :],
                mask=(at >= 0)[:, None] & (channel < C)[None, :],
                other=0.0,
            )
            taps = tl.load(
                w + (k * G + group) * (C * F) + channel[:, None] * F + f[None, :],
                mask=(channel < C)[:, None] & (f < F)[None, :],
                other=0.0,
            )
            total = tl.dot(patches, taps, total, input_precision=PRECISION)
            left = tl.where(step % STEPS == STEPS - 1, rest, left)
    at = y + (split.to(tl.int64) * rows + row)[:, None] * (G * F) + (group * F + f)[None, :]
    tl.store(at, total.to(y.dtype.element_ty), mask=known[:, None] & (f < F)[None, :])


@triton.jit
def tile_lists(masks, count, tiles, counts, BLOCK: tl.constexpr):
    """One program lists the tiles whose rows read through one offset, the grid's axis.

    `tiles [K, count]` has them first, in ascending order; `counts [K]` says how many they are.
    """
    k = tl.program_id(0)
    total = 0
    for start in range(0, count, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        word = tl.load(masks + k // 32 * count + tile, mask=tile < count, other=0)
        some = (word.to(tl.uint32, bitcast=True) >> (k % 32).to(tl.uint32)).to(tl.int32) & 1
        place = total + tl.cumsum(some, 0) - some
        tl.store(tiles + k.to(tl.int64) * count + place, tile, mask=some != 0)
        total += tl.sum(some)
    tl.store(counts + k, total)


@triton.jit
def pair_counts(
    table, after, first, mirror, rows, counts, BLOCK: tl.constexpr, TWINS: tl.constexpr
):
    """One program counts which of `BLOCK` rows read through one offset; with `TWINS` through two.

    The grid's axes are blocks of rows, and offsets from `first` on; `counts [offsets, blocks]`.
    The other of two offsets is `mirror` minus the one.
    Nothing of `after` is read: its kernels are done before, and their memory is free.
    """
    block, blocks, k = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    row = block * BLOCK + tl.arange(0, BLOCK)
    some = _reads(table, first + k, mirror, rows, row, TWINS)
    tl.store(counts + k * blocks + block, tl.sum(some))


@triton.jit
def pair_lists(
    table,
    counts,
    first,
    mirror,
    rows,
    pairs,
    totals,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    TWINS: tl.constexpr,
):
    """One program lists which of `BLOCK` rows `pair_counts` counts, behind those before them.

    The grid's axes are those of `pair_counts`, whose `counts` it takes. `pairs [offsets, rows]` has
    them first, in ascending order; `totals [offsets]` says how many they are.
    """
    block, blocks, k = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    before = 0
    for start in range(0, block, AT_ONCE):
        other = start + tl.arange(0, AT_ONCE)
        before += tl.sum(tl.load(counts + k * blocks + other, mask=other < block, other=0))
    row = block * BLOCK + tl.arange(0, BLOCK)
    some = _reads(table, first + k, mirror, rows, row, TWINS)
    place = before + tl.cumsum(some, 0) - some
    tl.store(pairs + k * rows + place, row, mask=some != 0)
    tl.store(totals + k, before + tl.sum(some), mask=block == blocks - 1)


@triton.jit
def weights(
    x,
    dy,
    table,
    order,
    listed,
    counts,
    first,
    mirror,
    rows,
    parts,
    K: tl.constexpr,
    G: tl.constexpr,
    C: tl.constexpr,
    F: tl.constexpr,
    ORDERED: tl.constexpr,
    TWINS: tl.constexpr,
    PARTS: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One program of the weights' gradient: gathered rows of x, transposed, times rows of dy.

    It is that of `K` offsets, from `first` on. The grid's axes are parts, each of what is listed
    for one offset, with tiles of `BM` channels by `BN` features; and groups. `ORDERED` lists are
    those of `tile_lists`, of tiles in `order`; the others are of rows, from `pair_lists`, where
    `TILE` is 1. `BK` rows are summed at a time. The parts of an offset take turns: all pass over
    the rows together, so that rows which one part has read are in L2 for the others. Part p writes
    `parts [p, G, C, F]`.

    With `TWINS` a list is of the rows that read through an offset or through its mirror image,
    `mirror` minus it, and a part is of both, `parts [p, 2, G, C, F]`. On a surface a row mostly
    reads through both or neither, and its dy is loaded once for the two. The offset in the middle
    has no other, whose part is zero.
    """
    ACROSS: tl.constexpr = (F + BN - 1) // BN
    BLOCKS: tl.constexpr = (C + BM - 1) // BM * ACROSS
    part, block = tl.program_id(0) // BLOCKS, tl.program_id(0) % BLOCKS
    group = tl.program_id(1)
    f = block % ACROSS * BN + tl.arange(0, BN)
    tap, count, share, ends = _shares(counts, K, PARTS, BK // TILE)
    # The offset whose parts these are; none behind the last part that is needed.
    k = tl.sum((ends <= part).to(tl.int32))
    mine = tap == k
    last = tl.sum(tl.where(mine, count, 0))
    # None behind the last part that is needed, which has nothing to sum.
    turns = tl.maximum(tl.cdiv(last, share), 1)
    turn = part - tl.sum(tl.where(mine, ends, 0)) + turns
    listed += k.to(tl.int64) * tl.cdiv(rows, TILE)
    k += first
    # Of the channels of an offset, and behind them those of its mirror image.
    both = tl.arange(0, (1 + TWINS) * BM)
    second = both >= BM
    c = block // ACROSS * BM + both % BM
    total = tl.zeros(((1 + TWINS) * BM, BN), tl.float32)
    for start in range(turn * (BK // TILE), last, turns * (BK // TILE)):
        place = start + tl.arange(0, BK) // TILE
        known = place < last
        # Behind the last one it is taken again, times zeros.
        row = tl.load(listed + tl.minimum(place, last - 1)) * TILE + tl.arange(0, BK) % TILE
        if ORDERED:
            known &= row < rows
            row = tl.load(order + row, mask=known, other=0)
        at = tl.load(table + k.to(tl.int64) * rows + row, mask=known, other=-1)[:, None]
        needed = (f < F)[None, :]
        if ORDERED:
            # Of a tile, other than of listed rows, some may read nothing and hold anything.
            needed &= at >= 0
        if TWINS:
            other = tl.load(
                table + (mirror - k).to(tl.int64) * rows + row,
                mask=known & (mirror != 2 * k),
                other=-1,
            )[:, None]
            at = tl.where(second[None, :], other, at)
        patches = tl.load(
            x + at.to(tl.int64) * (G * C) + (group * C + c)[None, :],
            mask=(at >= 0) & (c < C)[None, :],
            other=0.0,
        )
        slopes = tl.load(
            dy + row.to(tl.int64)[:, None] * (G * F) + (group * F + f)[None, :],
            mask=needed,
            other=0.0,
        )
        total = tl.dot(tl.trans(patches), slopes, total, input_precision=PRECISION)
    which = part * (1 + TWINS) + second.to(tl.int32)
    at = parts + which.to(tl.int64)[:, None] * (G * C * F)
    at += group * (C * F) + c[:, None] * F + f[None, :]
    tl.store(at, total, mask=(c < C)[:, None] & (f < F)[None, :])


@triton.jit
def sum_parts(
    parts,
    counts,
    dw,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    PARTS: tl.constexpr,
    PER: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK: tl.constexpr,
    TWINS: tl.constexpr,
):
    """One program sums the parts of `weights` for one offset, in their order.

    The grid's axes are offsets; blocks of an offset's `SIZE` weights; and twins, whose weights are
    `dw [2, K, SIZE]`, those of mirrored offsets in the order of the offsets that they are. `PER` is
    how much of a list `weights` sums at a time.
    """
    k, twin = tl.program_id(0), tl.program_id(2)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tap, count, share, ends = _shares(counts, K, PARTS, PER)
    last = tl.sum(tl.where(tap == k, ends, 0))
    first = last - tl.sum(tl.where(tap == k, tl.cdiv(count, share), 0))
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, AT_ONCE):
        part = start + tl.arange(0, AT_ONCE)
        total += tl.sum(
            tl.load(
                parts + (part * (1 + TWINS) + twin).to(tl.int64)[:, None] * SIZE + at[None, :],
                mask=(part < last)[:, None] & (at < SIZE)[None, :],
                other=0.0,
            ),
            0,
        )
    k = tl.where(twin == 0, k, 2 * K - 1 - k).to(tl.int64)
    tl.store(dw + k * SIZE + at, total.to(dw.dtype.element_ty), mask=at < SIZE)


@triton.jit
def depthwise(
    x,
    w,
    table,
    order,
    masks,
    rows,
    y,
    K: tl.constexpr,
    C: tl.constexpr,
    ORDERED: tl.constexpr,
    TILE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """One program of `y[m, c] = sum over k of x[table[k, m], c] w[k, c]`.

    The grid's axes are tiles of `BM` rows, and blocks of `BN` channels.
    """
    tile = tl.program_id(0)
    row, known = _rows(order, tile, rows, ORDERED, BM)
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for word in range((K + 31) // 32):
        left, count = _offsets(masks, tile, word, 0, rows, K, ORDERED, 1, TILE, BM)
        k, left = _next(left, word)
        at = _read(table, k, rows, row, known & (count > 0))
        for i in range(count):
            patches = _gathered(x, at, c, C)
            # While they come: the indices of the next offset, which would be waited for too.
            after, left = _next(left, word)
            at = _read(table, after, rows, row, known & (i + 1 < count))
            # Nothing is multiplied before all is under way: to save registers the compiler would
            # load and wait for one row after the other.
            tl.debug_barrier()
            taps = tl.load(w + k * C + c, mask=c < C, other=0.0)
            total += _float32(patches) * _float32(taps)[None, :]
            k = after
    at = y + row.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(at, total.to(y.dtype.element_ty), mask=known[:, None] & (c < C)[None, :])


@triton.jit
def depthwise_weights(
    x,
    dy,
    table,
    order,
    masks,
    rows,
    parts,
    K: tl.constexpr,
    C: tl.constexpr,
    TILE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """One program of `dw[k, c] = sum over m of x[table[k, m], c] dy[m, c]`, for some of the rows.

    The grid's axes are parts, and blocks of `BN` channels. The parts take turns at tiles of `BM`
    rows in their order: all pass over the rows together, so that these are in L2 for each other.
    Part p adds up its own `parts [p, K, C]`, which nobody else reads or writes; rows of dy are
    loaded once for all offsets.
    """
    c = tl.program_id(1) * BN + tl.arange(0, BN)
    own = parts + tl.program_id(0).to(tl.int64) * (K * C) + c
    for tap in range(K):
        tl.store(own + tap * C, tl.zeros((BN,), tl.float32), mask=c < C)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BM), tl.num_programs(0)):
        row, known = _rows(order, tile, rows, True, BM)
        reads = known
        if _is_first(masks, tile * (BM // TILE), tl.cdiv(rows, TILE), K):
            # Rows that read nothing are the first ones, and dy may hold anything there.
            reads = row < 0
            for tap in range(K):
                reads |= _read(table, tap, rows, row, known) >= 0
        slopes = _float32(_gathered(dy, tl.where(reads, row, -1), c, C))
        for word in range((K + 31) // 32):
            left, count = _offsets(masks, tile, word, 0, rows, K, True, 1, TILE, BM)
            k, left = _next(left, word)
            at = _read(table, k, rows, row, known & (count > 0))
            patches = _gathered(x, at, c, C)
            after, left = _next(left, word)
            at = _read(table, after, rows, row, known & (count > 1))
            for i in range(count):
                # The rows of the next offset, and the indices of the one behind it, are under way.
                coming = _gathered(x, at, c, C)
                then, left = _next(left, word)
                at = _read(table, then, rows, row, known & (i + 2 < count))
                # Who reads what others of the program have stored waits for them.
                tl.debug_barrier()
                total = tl.load(own + k * C, mask=c < C, other=0.0)
                total += tl.sum(_float32(patches) * slopes, 0)
                tl.store(own + k * C, total, mask=c < C)
                patches, k, after = coming, after, then


@triton.jit
def _moved(bits, stride, step):
    """The place along an axis, from 0 on, that a site whose lowest 18 `bits` tell its own reads."""
    return ((bits & (2 * _LIMIT - 1)).to(tl.int32) - _LIMIT) * stride + step + _LIMIT


@triton.jit
def _within(place):
    """Whether a place along an axis has a key."""
    return (place >= 0) & (place < 2 * _LIMIT)


@triton.jit
def _key(high, low, at, some):
    """The halves of some of the sorted keys."""
    upper = tl.load(high + at, mask=some, other=0).to(tl.uint32, bitcast=True)
    lower = tl.load(low + at, mask=some, other=0).to(tl.uint32, bitcast=True)
    return upper, lower


@triton.jit
def _rows(order, tile, rows, ORDERED: tl.constexpr, BM: tl.constexpr):
    """The rows of a tile, and which of them there are."""
    row = tile * BM + tl.arange(0, BM)
    known = row < rows
    if ORDERED:
        row = tl.load(order + row, mask=known, other=0)
    return row, known


@triton.jit
def _is_first(masks, tile, tiles, K: tl.constexpr):
    """Whether no tile before one of `tiles` needs any offset."""
    found = tl.zeros((), tl.int32)
    for word in range((K + 31) // 32):
        before = tl.load(masks + word * tiles + tile - 1, mask=tile > 0, other=0)
        found |= before.to(tl.int32, bitcast=True)
    return found == 0


@triton.jit
def _offsets(
    masks,
    tile,
    word,
    split,
    rows,
    K: tl.constexpr,
    ORDERED: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    BM: tl.constexpr,
):
    """The offsets among 32 that a tile needs of a split: a bit each, and their number."""
    bit = tl.arange(0, 32)
    k = word * 32 + bit
    # Splits divide the offsets, not what a tile needs of them: a row's sums are then the same
    # whichever tile it is in.
    some = ((k >= split * K // SPLITS) & (k < (split + 1) * K // SPLITS)).to(tl.uint32)
    if ORDERED:
        at = tile * (BM // TILE) + tl.arange(0, BM // TILE)
        count = tl.cdiv(rows, TILE)
        found = tl.load(masks + word * count + at, mask=at < count, other=0)
        bits = found.to(tl.uint32, bitcast=True)[:, None] >> bit.to(tl.uint32)[None, :]
        some &= tl.max(bits & 1, 0)
    return tl.sum(some << bit.to(tl.uint32)), tl.sum(some.to(tl.int32))


@triton.jit
def _lowest(bits):
    """The place of the lowest bit of a word of 32, and the word without it."""
    rest = bits & (bits - 1)
    # A power of two is its exponent in float32.
    lowest = (bits ^ rest).to(tl.float32).to(tl.int32, bitcast=True)
    return (lowest >> 23) - 127, rest


@triton.jit
def _next(bits, word):
    """The lowest offset, in 64 bits, among those of a word of 32; and the word without it."""
    k, rest = _lowest(bits)
    return (word * 32 + k).to(tl.int64), rest


@triton.jit
def _read(table, k, rows, row, some):
    """The rows of x that some rows read through an offset, -1 for the others."""
    return tl.load(table + tl.cast(k, tl.int64) * rows + row, mask=some, other=-1)


@triton.jit
def _gathered(x, at, c, C: tl.constexpr):
    """Channels c of rows of x `[N, C]`, zeros where there is none."""
    some = (at >= 0)[:, None] & (c < C)[None, :]
    return tl.load(x + at.to(tl.int64)[:, None] * C + c[None, :], mask=some, other=0.0)


@triton.jit
def _float32(a):
    """Numbers in float32."""
    if a.dtype == tl.bfloat16:
        # Two of a register take an instruction each; the conversion takes three for both.
        return (a.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return a.to(tl.float32)


@triton.jit
def _reads(table, k, mirror, rows, row, TWINS: tl.constexpr):
    """1 for rows that read through an offset, or with `TWINS` through its mirror image, else 0."""
    at = tl.load(table + k * rows + row, mask=row < rows, other=-1)
    if TWINS:
        at = tl.maximum(at, tl.load(table + (mirror - k) * rows + row, mask=row < rows, other=-1))
    return (at >= 0).to(tl.int32)


@triton.jit
def _shares(counts, K: tl.constexpr, PARTS: tl.constexpr, PER: tl.constexpr):
    """How the lists of all offsets are divided into `PARTS` parts, more than there are offsets.

    Parts are of a share of about equal length, a multiple of `PER`, or of less: as one offset has
    fewer than one part too many, `PARTS - K` full ones of all that is listed are as many as fit.

    Returns:
        The offsets, a power of two of them; the length of each one's list; that of a share; and the
        parts up to each offset's last.
    """
    tap = tl.arange(0, triton.next_power_of_2(K))
    count = tl.load(counts + tap, mask=tap < K, other=0)
    share = tl.cdiv(tl.maximum(tl.sum(count), 1), PARTS - K)
    share = tl.cdiv(share, PER) * PER
    return tap, count, share, tl.cumsum(tl.cdiv(count, share), 0)
