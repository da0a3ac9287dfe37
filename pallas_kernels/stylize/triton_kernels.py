"""The instance normalisation's Triton kernels. Imports Triton alone.

Arrays are `[N, HW, C]`, channels last. A group is the pixels of one image in `BC` neighbouring
channels; its slices are `rounds * PX` neighbouring pixels each, the last perhaps fewer, and belong
to a program each. What a slice sums is in `parts [groups, SLICES, 2, BC]`, and each program of the
next launch adds up all slices of its group, in a fixed order: results are bitwise reproducible.
Where one program holds a group's pixels at once, one launch does it all, and reads once; where one
has a group to itself, `rolled`, one launch reads twice, the second time what the caches still have.
Where a convolution has left the moments of its tiles, `combine` adds them, `normalise` reads once.

The mean and the squared deviations of a slice are relative to the image's first pixel, which is
subtracted exactly. They follow Welford in each row of the tile; rows and slices combine as Chan,
Golub and LeVeque say. Arithmetic is in float32. Of statistics `[N, 3, C]` see `formulas`.

Sources: Welford, "Note on a method for calculating corrected sums of squares and products", 1962;
Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
variances", 1979.
"""

import triton
import triton.language as tl


@triton.jit
def whole(
    x,
    scale,
    bias,
    residual,
    HW,
    y,
    statistics,
    EPS: tl.constexpr,
    RELU: tl.constexpr,
    ADD: tl.constexpr,
    C: tl.constexpr,
    PX: tl.constexpr,
    BC: tl.constexpr,
):
    """The norm of a group that a program holds."""
    group = tl.program_id(0)
    of_image, c, inside = _group(group, C, BC)
    at, known = _tile(group, 0, HW, c, inside, C, PX, BC)
    first = _first(x, group, HW, c, inside, C, BC)
    v = tl.load(x + at, mask=known, other=0.0).to(tl.float32)
    mean = tl.sum(tl.where(known, v - first[None, :], 0.0), 0) / HW
    d = tl.where(known, v - first[None, :] - mean[None, :], 0.0)
    centre, offset, inverse = _described(first, mean, tl.sum(d * d, 0) / HW, EPS)
    _store_statistics(statistics, group, c, inside, centre, offset, inverse, C, BC)
    a = tl.load(scale + of_image + c, mask=inside, other=0.0)
    b = tl.load(bias + of_image + c, mask=inside, other=0.0)
    _store_norm(v, residual, y, at, known, centre, offset, inverse, a, b, RELU, ADD)


@triton.jit
def moments(
    x,
    HW,
    rounds,
    parts,
    C: tl.constexpr,
    SLICES: tl.constexpr,
    PX: tl.constexpr,
    BC: tl.constexpr,
):
    """The mean and the sum of squared deviations of a slice."""
    group, s = tl.program_id(0) // SLICES, tl.program_id(0) % SLICES
    _, c, inside = _group(group, C, BC)
    first = _first(x, group, HW, c, inside, C, BC)
    mean, squares = _moments(x, group, s * rounds * PX, HW, rounds, first, c, inside, C, PX, BC)
    _store_parts(parts, group, s, mean, squares, SLICES, BC)


@triton.jit
def apply(
    x,
    scale,
    bias,
    residual,
    parts,
    HW,
    rounds,
    y,
    statistics,
    EPS: tl.constexpr,
    RELU: tl.constexpr,
    ADD: tl.constexpr,
    C: tl.constexpr,
    SLICES: tl.constexpr,
    BS: tl.constexpr,
    PX: tl.constexpr,
    BC: tl.constexpr,
):
    """The norm of a slice, from the moments of all slices of its group."""
    # What the launch before read last is the likeliest to be in the cache.
    item = tl.num_programs(0) - 1 - tl.program_id(0)
    group, s = item // SLICES, item % SLICES
    of_image, c, inside = _group(group, C, BC)
    first = _first(x, group, HW, c, inside, C, BC)
    means, squares, counts = _slices(parts, group, HW, rounds, SLICES, BS, PX, BC)
    mean, total = _combined(means, squares, counts, HW)
    centre, offset, inverse = _described(first, mean, total / HW, EPS)
    if s == 0:
        _store_statistics(statistics, group, c, inside, centre, offset, inverse, C, BC)
    start = s * rounds * PX
    a = tl.load(scale + of_image + c, mask=inside, other=0.0)
    b = tl.load(bias + of_image + c, mask=inside, other=0.0)
    for r in range(rounds):
        # All programs run at once, so that the last rounds of each are the likeliest.
        at, known = _tile(group, start + (rounds - 1 - r) * PX, HW, c, inside, C, PX, BC)
        _apply(x, residual, y, at, known, centre, offset, inverse, a, b, RELU, ADD)


@triton.jit
def rolled(
    x,
    scale,
    bias,
    residual,
    HW,
    rounds,
    y,
    statistics,
    EPS: tl.constexpr,
    RELU: tl.constexpr,
    ADD: tl.constexpr,
    C: tl.constexpr,
    PX: tl.constexpr,
    BC: tl.constexpr,
):
    """The norm of a group that a program reads twice."""
    group = tl.program_id(0)
    of_image, c, inside = _group(group, C, BC)
    first = _first(x, group, HW, c, inside, C, BC)
    mean, squares = _moments(x, group, 0, HW, rounds, first, c, inside, C, PX, BC)
    centre, offset, inverse = _described(first, mean, squares / HW, EPS)
    _store_statistics(statistics, group, c, inside, centre, offset, inverse, C, BC)
    a = tl.load(scale + of_image + c, mask=inside, other=0.0)
    b = tl.load(bias + of_image + c, mask=inside, other=0.0)
    for r in range(rounds):
        # Backwards: what was read last is the likeliest to be in the cache.
        at, known = _tile(group, (rounds - 1 - r) * PX, HW, c, inside, C, PX, BC)
        _apply(x, residual, y, at, known, centre, offset, inverse, a, b, RELU, ADD)


@triton.jit
def combine(
    pixels,
    mean,
    squares,
    TILES,
    statistics,
    EPS: tl.constexpr,
    C: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """The statistics of a group, from the moments `[N, TILES]` and `[N, TILES, C]` of tiles."""
    group = tl.program_id(0)
    of_image, c, inside = _group(group, C, BC)
    # The first tile of the image, and of those before it.
    tile = of_image // C * TILES
    first = tl.load(mean + tile * C + c, mask=inside, other=0.0)
    weighted = tl.zeros((BT, BC), tl.float32)
    total = tl.zeros((BT,), tl.float32)
    for start in range(0, TILES, BT):
        at, known, n = _tiles(pixels, tile, start, TILES, c, inside, C, BT)
        # Of numbers that are near each other the difference is exact.
        apart = tl.load(mean + at, mask=known, other=0.0) - first[None, :]
        weighted += tl.where(known, apart, 0.0) * n[:, None]
        total += n
    count = tl.sum(total, 0)
    middle = tl.sum(weighted, 0) / count
    summed = tl.zeros((BT, BC), tl.float32)
    for start in range(0, TILES, BT):
        at, known, n = _tiles(pixels, tile, start, TILES, c, inside, C, BT)
        apart = tl.load(mean + at, mask=known, other=0.0) - first[None, :] - middle[None, :]
        summed += tl.load(squares + at, mask=known, other=0.0)
        summed += tl.where(known, apart * apart, 0.0) * n[:, None]
    centre, offset, inverse = _described(first, middle, tl.sum(summed, 0) / count, EPS)
    _store_statistics(statistics, group, c, inside, centre, offset, inverse, C, BC)


@triton.jit
def normalise(
    x,
    statistics,
    scale,
    bias,
    residual,
    HW,
    slices,
    y,
    RELU: tl.constexpr,
    ADD: tl.constexpr,
    C: tl.constexpr,
    PX: tl.constexpr,
    BC: tl.constexpr,
):
    """The norm of a tile of a group whose statistics are known."""
    # What the convolution wrote last is the likeliest to be in the cache.
    item = tl.num_programs(0) - 1 - tl.program_id(0)
    group, s = item // slices, item % slices
    of_image, c, inside = _group(group, C, BC)
    centre, offset, inverse = _load_statistics(statistics, group, c, inside, C, BC)
    a = tl.load(scale + of_image + c, mask=inside, other=0.0)
    b = tl.load(bias + of_image + c, mask=inside, other=0.0)
    at, known = _tile(group, s * PX, HW, c, inside, C, PX, BC)
    _apply(x, residual, y, at, known, centre, offset, inverse, a, b, RELU, ADD)


@triton.jit
def whole_gradients(
    x,
    statistics,
    scale,
    bias,
    residual,
    dy,
    HW,
    dx,
    dscale,
    dbias,
    dresidual,
    RELU: tl.constexpr,
    ADD: tl.constexpr,
    C: tl.constexpr,
    PX: tl.constexpr,
    BC: tl.constexpr,
):
    """The gradients of a group that a program holds."""
    group = tl.program_id(0)
    of_image, c, inside = _group(group, C, BC)
    centre, offset, inverse = _load_statistics(statistics, group, c, inside, C, BC)
    a = tl.load(scale + of_image + c, mask=inside, other=0.0)
    b = tl.load(bias + of_image + c, mask=inside, other=0.0)
    at, known = _tile(group, 0, HW, c, inside, C, PX, BC)
    n, g = _gradient(x, residual, dy, at, known, centre, offset, inverse, a, b, RELU, ADD)
    summed, correlated = tl.sum(g, 0), tl.sum(g * n, 0)
    tl.store(dbias + of_image + c, summed, mask=inside)
    tl.store(dscale + of_image + c, correlated, mask=inside)
    mean, covariance = summed / HW, correlated / HW
    _store_gradients(n, g, inverse * a, mean, covariance, at, known, dx, dresidual, RELU, ADD)


@triton.jit
def gradient_sums(
    x,
    statistics,
    scale,
    bias,
    residual,
    dy,
    HW,
    rounds,
    parts,
    RELU: tl.constexpr,
    ADD: tl.constexpr,
    C: tl.constexpr,
    SLICES: tl.constexpr,
    PX: tl.constexpr,
    BC: tl.constexpr,
):
    """The sums of a slice of the gradient before the activation, and of it times the norm."""
    group, s = tl.program_id(0) // SLICES, tl.program_id(0) % SLICES
    of_image, c, inside = _group(group, C, BC)
    centre, offset, inverse = _load_statistics(statistics, group, c, inside, C, BC)
    a = tl.load(scale + of_image + c, mask=inside, other=0.0)
    b = tl.load(bias + of_image + c, mask=inside, other=0.0)
    start = s * rounds * PX
    summed, correlated = _sums(
        x, residual, dy, group, start, HW, rounds, c, inside, centre, offset, inverse, a, b,
        RELU, ADD, C, PX, BC,
    )  # fmt: skip
    _store_parts(parts, group, s, summed, correlated, SLICES, BC)


@triton.jit
def apply_gradients(
    x,
    statistics,
    scale,
    bias,
    residual,
    dy,
    parts,
    HW,
    rounds,
    dx,
    dscale,
    dbias,
    dresidual,
    RELU: tl.constexpr,
    ADD: tl.constexpr,
    C: tl.constexpr,
    SLICES: tl.constexpr,
    BS: tl.constexpr,
    PX: tl.constexpr,
    BC: tl.constexpr,
):
    """The gradients of a slice, from the sums of all slices of its group."""
    item = tl.num_programs(0) - 1 - tl.program_id(0)
    group, s = item // SLICES, item % SLICES
    of_image, c, inside = _group(group, C, BC)
    centre, offset, inverse = _load_statistics(statistics, group, c, inside, C, BC)
    a = tl.load(scale + of_image + c, mask=inside, other=0.0)
    b = tl.load(bias + of_image + c, mask=inside, other=0.0)
    sums, products, _ = _slices(parts, group, HW, rounds, SLICES, BS, PX, BC)
    summed, correlated = tl.sum(sums, 0), tl.sum(products, 0)
    if s == 0:
        tl.store(dbias + of_image + c, summed, mask=inside)
        tl.store(dscale + of_image + c, correlated, mask=inside)
    mean, covariance = summed / HW, correlated / HW
    for r in range(rounds):
        # Backwards, as `apply` does.
        at, known = _tile(group, (s * rounds + rounds - 1 - r) * PX, HW, c, inside, C, PX, BC)
        n, g = _gradient(x, residual, dy, at, known, centre, offset, inverse, a, b, RELU, ADD)
        _store_gradients(n, g, inverse * a, mean, covariance, at, known, dx, dresidual, RELU, ADD)


@triton.jit
def rolled_gradients(
    x,
    statistics,
    scale,
    bias,
    residual,
    dy,
    HW,
    rounds,
    dx,
    dscale,
    dbias,
    dresidual,
    RELU: tl.constexpr,
    ADD: tl.constexpr,
    C: tl.constexpr,
    PX: tl.constexpr,
    BC: tl.constexpr,
):
    """The gradients of a group that a program reads twice."""
    group = tl.program_id(0)
    of_image, c, inside = _group(group, C, BC)
    centre, offset, inverse = _load_statistics(statistics, group, c, inside, C, BC)
    a = tl.load(scale + of_image + c, mask=inside, other=0.0)
    b = tl.load(bias + of_image + c, mask=inside, other=0.0)
    summed, correlated = _sums(
        x, residual, dy, group, 0, HW, rounds, c, inside, centre, offset, inverse, a, b,
        RELU, ADD, C, PX, BC,
    )  # fmt: skip
    tl.store(dbias + of_image + c, summed, mask=inside)
    tl.store(dscale + of_image + c, correlated, mask=inside)
    mean, covariance = summed / HW, correlated / HW
    for r in range(rounds):
        at, known = _tile(group, (rounds - 1 - r) * PX, HW, c, inside, C, PX, BC)
        n, g = _gradient(x, residual, dy, at, known, centre, offset, inverse, a, b, RELU, ADD)
        _store_gradients(n, g, inverse * a, mean, covariance, at, known, dx, dresidual, RELU, ADD)


@triton.jit
def _group(group, C: tl.constexpr, BC: tl.constexpr):
    """The offset of a group's image in `[N, C]`, its channels, and which of them exist."""
    tiles: tl.constexpr = (C + BC - 1) // BC
    c = group % tiles * BC + tl.arange(0, BC)
    return (group // tiles).to(tl.int64) * C, c, c < C


@triton.jit
def _tile(group, start, HW, c, inside, C: tl.constexpr, PX: tl.constexpr, BC: tl.constexpr):
    """The offsets of `PX` pixels of a group from `start` on, and which of them exist."""
    tiles: tl.constexpr = (C + BC - 1) // BC
    pixel = start + tl.arange(0, PX)
    row = ((group // tiles).to(tl.int64) * HW + pixel) * C
    return row[:, None] + c[None, :], (pixel < HW)[:, None] & inside[None, :]


@triton.jit
def _first(x, group, HW, c, inside, C: tl.constexpr, BC: tl.constexpr):
    """The first pixel of a group."""
    tiles: tl.constexpr = (C + BC - 1) // BC
    at = (group // tiles).to(tl.int64) * HW * C + c
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _moments(
    x,
    group,
    start,
    HW,
    rounds,
    first,
    c,
    inside,
    C: tl.constexpr,
    PX: tl.constexpr,
    BC: tl.constexpr,
):
    """The mean, relative to the first pixel, and the squared deviations of pixels from `start`."""
    mean = tl.zeros((PX, BC), tl.float32)
    squares = tl.zeros((PX, BC), tl.float32)
    for r in range(rounds):
        at, known = _tile(group, start + r * PX, HW, c, inside, C, PX, BC)
        v = tl.load(x + at, mask=known, other=0.0).to(tl.float32) - first[None, :]
        d = v - mean
        mean += tl.where(known, d * (1.0 / (r + 1)), 0.0)
        squares += tl.where(known, d * (v - mean), 0.0)
    left = tl.maximum(HW - start - tl.arange(0, PX) + PX - 1, 0) // PX
    count = tl.minimum(left, rounds).to(tl.float32)
    total = tl.minimum(HW - start, rounds * PX).to(tl.float32)
    return _combined(mean, squares, count, total)


@triton.jit
def _sums(
    x,
    residual,
    dy,
    group,
    start,
    HW,
    rounds,
    c,
    inside,
    centre,
    offset,
    inverse,
    a,
    b,
    RELU: tl.constexpr,
    ADD: tl.constexpr,
    C: tl.constexpr,
    PX: tl.constexpr,
    BC: tl.constexpr,
):
    """The sums over pixels from `start` of the gradient, and of it times the norm."""
    summed = tl.zeros((PX, BC), tl.float32)
    correlated = tl.zeros((PX, BC), tl.float32)
    for r in range(rounds):
        at, known = _tile(group, start + r * PX, HW, c, inside, C, PX, BC)
        n, g = _gradient(x, residual, dy, at, known, centre, offset, inverse, a, b, RELU, ADD)
        summed += g
        correlated += g * n
    return tl.sum(summed, 0), tl.sum(correlated, 0)


@triton.jit
def _apply(
    x,
    residual,
    y,
    at,
    known,
    centre,
    offset,
    inverse,
    a,
    b,
    RELU: tl.constexpr,
    ADD: tl.constexpr,
):
    """Reads a tile and writes its norm."""
    v = tl.load(x + at, mask=known, other=0.0).to(tl.float32)
    _store_norm(v, residual, y, at, known, centre, offset, inverse, a, b, RELU, ADD)


@triton.jit
def _store_norm(
    v,
    residual,
    y,
    at,
    known,
    centre,
    offset,
    inverse,
    a,
    b,
    RELU: tl.constexpr,
    ADD: tl.constexpr,
):
    """Writes the norm of a tile."""
    z = _moved(_normed(v, centre, offset, inverse), a, b, residual, at, known, ADD)
    if RELU:
        z = tl.where(z < 0, 0.0, z)
    tl.store(y + at, z.to(y.dtype.element_ty), mask=known)


@triton.jit
def _store_gradients(
    n,
    g,
    factor,
    mean,
    covariance,
    at,
    known,
    dx,
    dresidual,
    RELU: tl.constexpr,
    ADD: tl.constexpr,
):
    """Writes the gradients of a tile."""
    found = factor[None, :] * (g - mean[None, :] - n * covariance[None, :])
    tl.store(dx + at, found.to(dx.dtype.element_ty), mask=known)
    if RELU and ADD:
        tl.store(dresidual + at, g.to(dresidual.dtype.element_ty), mask=known)


@triton.jit
def _tiles(pixels, tile, start, TILES, c, inside, C: tl.constexpr, BT: tl.constexpr):
    """The offsets of `BT` tiles of an image's convolution, which exist, and their pixels."""
    t = start + tl.arange(0, BT)
    row = tile + t
    n = tl.load(pixels + row, mask=t < TILES, other=0.0)
    return row[:, None] * C + c[None, :], (t < TILES)[:, None] & inside[None, :], n


@triton.jit
def _combined(means, squares, counts, total):
    """The mean and the squared deviations of all rows, which have so many members each."""
    mean = tl.sum(means * counts[:, None], 0) / total
    d = means - mean[None, :]
    return mean, tl.sum(squares + counts[:, None] * d * d, 0)


@triton.jit
def _store_parts(parts, group, s, one, other, SLICES: tl.constexpr, BC: tl.constexpr):
    """Keeps what a slice summed."""
    to = parts + (group.to(tl.int64) * SLICES + s) * (2 * BC) + tl.arange(0, BC)
    tl.store(to, one)
    tl.store(to + BC, other)


@triton.jit
def _slices(
    parts,
    group,
    HW,
    rounds,
    SLICES: tl.constexpr,
    BS: tl.constexpr,
    PX: tl.constexpr,
    BC: tl.constexpr,
):
    """The sums of a group's slices, `[BS, BC]` twice, and their pixels; zeros behind them."""
    s = tl.arange(0, BS)
    exists = (s < SLICES)[:, None]
    at = parts + (group.to(tl.int64) * SLICES + s)[:, None] * (2 * BC) + tl.arange(0, BC)[None, :]
    one = tl.load(at, mask=exists, other=0.0)
    other = tl.load(at + BC, mask=exists, other=0.0)
    # Not `s * rounds * PX`, which may be beyond 32 bits behind the last slice.
    before = tl.where(s < SLICES, s, 0) * rounds * PX
    counts = tl.where(s < SLICES, tl.minimum(HW - before, rounds * PX), 0)
    return one, other, counts.to(tl.float32)


@triton.jit
def _described(first, mean, variance, EPS: tl.constexpr):
    """The statistics, from the first pixel, what the mean exceeds it by, and the variance."""
    centre = first + mean
    return centre, mean - (centre - first), 1.0 / tl.sqrt(variance + EPS)


@triton.jit
def _store_statistics(
    statistics, group, c, inside, centre, offset, inverse, C: tl.constexpr, BC: tl.constexpr
):
    """Keeps the statistics of a group."""
    of_image, _, _ = _group(group, C, BC)
    to = statistics + of_image * 3 + c
    tl.store(to, centre, mask=inside)
    tl.store(to + C, offset, mask=inside)
    tl.store(to + 2 * C, inverse, mask=inside)


@triton.jit
def _load_statistics(statistics, group, c, inside, C: tl.constexpr, BC: tl.constexpr):
    """The statistics of a group."""
    of_image, _, _ = _group(group, C, BC)
    at = statistics + of_image * 3 + c
    centre = tl.load(at, mask=inside, other=0.0)
    offset = tl.load(at + C, mask=inside, other=0.0)
    return centre, offset, tl.load(at + 2 * C, mask=inside, other=0.0)


@triton.jit
def _normed(v, centre, offset, inverse):
    """Pixels less their mean, over their deviation."""
    return (v - centre[None, :] - offset[None, :]) * inverse[None, :]


@triton.jit
def _moved(n, a, b, residual, at, known, ADD: tl.constexpr):
    """The argument of the activation."""
    z = n * a[None, :] + b[None, :]
    if ADD:
        z += tl.load(residual + at, mask=known, other=0.0).to(tl.float32)
    return z


@triton.jit
def _gradient(
    x,
    residual,
    dy,
    at,
    known,
    centre,
    offset,
    inverse,
    a,
    b,
    RELU: tl.constexpr,
    ADD: tl.constexpr,
):
    """The norm of a tile, and the gradient of what the activation takes; zeros outside."""
    v = tl.load(x + at, mask=known, other=0.0).to(tl.float32)
    g = tl.load(dy + at, mask=known, other=0.0).to(tl.float32)
    n = tl.where(known, _normed(v, centre, offset, inverse), 0.0)
    if RELU:
        g = tl.where(_moved(n, a, b, residual, at, known, ADD) > 0, g, 0.0)
    return n, g
