"""Instance normalisation as Pallas TPU kernels.

The grid is images, blocks of 128 channels, two phases, and tiles of an image's pixels. The first
phase reads each tile and sums, the second reads it again and writes. Pallas copies no block that it
already holds, so an image of one tile is read once. Sums stay in VMEM scratch; they are made in a
fixed order, so results are bitwise reproducible.

A tile's mean and squared deviations are summed in two loops over VMEM, relative to the image's
first pixel, which is subtracted exactly; tiles combine as Chan, Golub and LeVeque say. None of this
has run on a TPU.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.common._compat import in_32_bits, pallas_output, tpu_vmem_bytes
from pallas_kernels.common.mosaic_tpu import LANES, SUBLANES, VMEM_SHARE, round_up, unavailable
from pallas_kernels.common.refusals import refuse
from pallas_kernels.common.types import Ref
from pallas_kernels.stylize.formulas import Gradients
from pallas_kernels.stylize.problem import Problem

__all__ = ["DIFFERENTIABLE", "backward", "check", "forward", "search_space", "unavailable"]

DIFFERENTIABLE = False

_DTYPES = ("float32", "bfloat16")
_CHUNK = 64
"""Pixels that a loop takes at once: eight registers, or four of bfloat16."""
_MOST_BLOCKS = 5
"""The most blocks of pixels of a kernel: x, residual, dy, and two gradients."""
_TILE_BYTES = 1 << 20
"""The least size of a tile of an image that is cut, so that a step's fixed cost is small."""


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` where these kernels do not take a problem.

    Args:
        direction: "fwd" or "bwd".
        problem: The call.
    """
    refuse(problem.unsupported(_DTYPES))


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The pixels of a tile that are worth timing, none for those that are taken unasked first."""
    _, h, w, _ = problem.shape
    itemsize = jnp.dtype(problem.dtype).itemsize
    default = _tile(h * w, itemsize)
    sizes = [_TILE_BYTES * factor // (LANES * itemsize) for factor in (1, 2, 4)]
    return [{}, *({"pixels": size} for size in sizes if size < min(h * w, default))]


@partial(jax.jit, static_argnames=("eps", "activation", "pixels"))
@in_32_bits
def forward(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None,
    *,
    eps: float,
    activation: str | None,
    pixels: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The operator and the statistics; see `vjp` for the arguments.

    A tile has so many `pixels`, see `search_space`.
    """
    n, h, w, c = x.shape
    read = [x] if residual is None else [x, residual]
    y, statistics = _call(
        partial(_forward_kernel, h * w, eps, activation, residual is not None),
        "instance_norm",
        read,
        [scale[:, None], bias[:, None]],
        1,
        [(n, 3, c)],
        pixels,
        (3, 1),
    )
    return y, statistics


@partial(jax.jit, static_argnames=("activation", "pixels"))
@in_32_bits
def backward(
    x: jax.Array,
    statistics: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None,
    dy: jax.Array,
    *,
    activation: str | None,
    pixels: int | None = None,
) -> Gradients:
    """The gradients; see `vjp` for the arguments, and `forward` for the pixels."""
    n, h, w, c = x.shape
    read = [x, dy] if residual is None else [x, dy, residual]
    *found, dscale, dbias = _call(
        partial(_backward_kernel, h * w, activation, residual is not None),
        "instance_norm_gradients",
        read,
        [statistics, scale[:, None], bias[:, None]],
        len(read) - 1,
        [(n, 1, c), (n, 1, c)],
        pixels,
        (2, 1),
    )
    dx, *rest = found
    return Gradients(dx, dscale[:, 0], dbias[:, 0], rest[0] if rest else None)


def _tile(pixels: int, itemsize: int) -> int:
    """The pixels of a tile: all of an image where they fit, else what fits."""
    # Each block is double-buffered.
    limit = int(tpu_vmem_bytes() * VMEM_SHARE) // (2 * _MOST_BLOCKS * LANES * itemsize)
    whole = round_up(pixels, _CHUNK)
    return whole if whole <= limit else limit // _CHUNK * _CHUNK


def _call(
    kernel: Callable[..., None],
    name: str,
    read: Sequence[jax.Array],
    of_images: Sequence[jax.Array],
    written: int,
    sums: Sequence[tuple[int, int, int]],
    tile: int | None,
    scratch: tuple[int, int],
) -> list[jax.Array]:
    """Runs a kernel.

    Args:
        kernel: Function of the references of what is read, of what is written, and of scratch.
        name: Its name in profiles.
        read: Images `[N, H, W, C]`, of which it gets tiles of pixels.
        of_images: Arrays `[N, rows, C]`, of which it gets those of an image.
        written: The number of images that it writes.
        sums: The shapes of float32 arrays `[N, rows, C]` that it writes behind them.
        tile: The pixels of a tile; None takes those of `_tile`.
        scratch: The shape of its scratch but for the lanes.
    """
    x = read[0]
    n, h, w, c = x.shape
    lanes = min(c, LANES)
    tile = tile or _tile(h * w, x.dtype.itemsize)
    block = (None, tile, lanes)
    pixels = pl.BlockSpec(block, lambda n, c, phase, t: (n, t, c))
    # In the first phase, which writes nothing, it stays where the second starts.
    output = pl.BlockSpec(block, lambda n, c, phase, t: (n, phase * t, c))

    def whole(rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, rows, lanes), lambda n, c, phase, t: (n, 0, c))

    arrays = [*(a.reshape(n, h * w, c) for a in read), *of_images]
    shapes = [((n, h * w, c), x.dtype)] * written + [(shape, jnp.float32) for shape in sums]
    found = pl.pallas_call(
        kernel,
        out_shape=[pallas_output(shape, dtype, *arrays) for shape, dtype in shapes],
        grid=(n, pl.cdiv(c, lanes), 2, pl.cdiv(h * w, tile)),
        in_specs=[pixels] * len(read) + [whole(a.shape[1]) for a in of_images],
        out_specs=[output] * written + [whole(rows) for _, rows, _ in sums],
        scratch_shapes=[pltpu.VMEM((*scratch, lanes), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=tpu_vmem_bytes(),
        ),
        name=name,
    )(*arrays)
    return [*(a.reshape(x.shape) for a in found[:written]), *found[written:]]


def _forward_kernel(size: int, eps: float, activation: str | None, added: bool, *refs: Ref) -> None:
    """The norm of a tile, and the statistics of its image."""
    every = refs if added else (refs[0], None, *refs[1:])
    x, residual, scale, bias, y, statistics, sums = every
    phase, count = pl.program_id(2), _count(size, x)

    @pl.when((phase == 0) & _at_first())
    def _() -> None:
        sums[0] = x[:1].astype(jnp.float32)
        sums[1] = jnp.zeros_like(sums[1])
        sums[2] = jnp.zeros_like(sums[2])

    @pl.when(phase == 0)
    def _() -> None:
        def shifted(i: jax.Array) -> tuple[jax.Array, jax.Array]:
            return x[_chunk(i)].astype(jnp.float32) - sums[0], _known(i, count)

        def first(i: jax.Array) -> list[jax.Array]:
            v, known = shifted(i)
            return [jnp.where(known, v, 0.0)]

        (total,) = _summed(x, count, first, 1)
        mean = total / _float(count)

        def second(i: jax.Array) -> list[jax.Array]:
            v, known = shifted(i)
            d = jnp.where(known, v - mean, 0.0)
            return [d * d]

        (squares,) = _summed(x, count, second, 1)
        before = _float(pl.program_id(3) * x.shape[0])
        share = _float(count) / (before + _float(count))
        d = mean - sums[1]
        sums[1] += d * share
        sums[2] += squares + d * d * before * share

    @pl.when(phase == 1)
    def _() -> None:
        centre = sums[0] + sums[1]
        offset = sums[1] - (centre - sums[0])
        inverse = 1.0 / jnp.sqrt(sums[2] / size + eps)

        @pl.when(_at_first())
        def _() -> None:
            statistics[...] = jnp.concatenate([centre, offset, inverse])

        def body(i: jax.Array, _: None) -> None:
            n = (x[_chunk(i)].astype(jnp.float32) - centre - offset) * inverse
            z = n * scale[...] + bias[...]
            if residual is not None:
                z += residual[_chunk(i)].astype(jnp.float32)
            z = z if activation is None else jnp.maximum(z, 0.0)
            y[_chunk(i)] = z.astype(y.dtype)

        lax.fori_loop(0, _chunks(count), body, None)


def _backward_kernel(size: int, activation: str | None, added: bool, *refs: Ref) -> None:
    """The gradients of a tile, and of the parameters of its image."""
    every = refs if added else (*refs[:2], None, *refs[2:6], None, *refs[6:])
    x, dy, residual, statistics, scale, bias, dx, dresidual, dscale, dbias, sums = every
    phase, count = pl.program_id(2), _count(size, x)
    centre, offset, inverse = (statistics[i : i + 1] for i in range(3))

    def gradient(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The norm of a chunk, and the gradient of what the activation takes; zeros outside."""
        known = _known(i, count)
        n = (x[_chunk(i)].astype(jnp.float32) - centre - offset) * inverse
        g = jnp.where(known, dy[_chunk(i)].astype(jnp.float32), 0.0)
        if activation is not None:
            z = n * scale[...] + bias[...]
            if residual is not None:
                z += residual[_chunk(i)].astype(jnp.float32)
            g = jnp.where(z > 0, g, 0.0)
        return jnp.where(known, n, 0.0), g

    @pl.when((phase == 0) & _at_first())
    def _() -> None:
        sums[...] = jnp.zeros_like(sums)

    @pl.when(phase == 0)
    def _() -> None:
        def terms(i: jax.Array) -> list[jax.Array]:
            n, g = gradient(i)
            return [g, n * g]

        summed, correlated = _summed(x, count, terms, 2)
        sums[0] += summed
        sums[1] += correlated

    @pl.when(phase == 1)
    def _() -> None:
        summed, correlated = sums[0], sums[1]

        @pl.when(_at_first())
        def _() -> None:
            dbias[...] = summed
            dscale[...] = correlated

        factor, mean, covariance = inverse * scale[...], summed / size, correlated / size

        def body(i: jax.Array, _: None) -> None:
            n, g = gradient(i)
            dx[_chunk(i)] = (factor * (g - mean - n * covariance)).astype(dx.dtype)
            if dresidual is not None:
                dresidual[_chunk(i)] = g.astype(dresidual.dtype)

        lax.fori_loop(0, _chunks(count), body, None)


def _at_first() -> jax.Array:
    """Whether this is the first tile of a phase."""
    return pl.program_id(3) == 0


def _count(size: int, x: Ref) -> jax.Array:
    """The pixels of this tile that exist."""
    tile = x.shape[0]
    return jnp.minimum(tile, size - pl.program_id(3) * tile)


def _chunks(count: jax.Array) -> jax.Array:
    """The chunks that hold so many pixels."""
    return pl.cdiv(count, _CHUNK)


def _chunk(i: jax.Array) -> pl.Slice:
    """The pixels of a chunk."""
    return pl.ds(pl.multiple_of(i * _CHUNK, _CHUNK), _CHUNK)


def _known(i: jax.Array, count: jax.Array) -> jax.Array:
    """Which pixels of a chunk exist, `[chunk, 1]`."""
    return lax.broadcasted_iota(jnp.int32, (_CHUNK, 1), 0) < count - i * _CHUNK


def _float(count: jax.Array) -> jax.Array:
    return count.astype(jnp.float32)


def _summed(
    x: Ref, count: jax.Array, terms: Callable[[jax.Array], list[jax.Array]], number: int
) -> list[jax.Array]:
    """The sums over this tile of so many terms of each chunk, `[1, lanes]`."""
    lanes = x.shape[-1]

    def body(i: jax.Array, totals: list[jax.Array]) -> list[jax.Array]:
        added = (term.reshape(-1, SUBLANES, lanes).sum(0) for term in terms(i))
        return [total + part for total, part in zip(totals, added, strict=True)]

    zeros = [jnp.zeros((SUBLANES, lanes), jnp.float32) for _ in range(number)]
    totals = lax.fori_loop(0, _chunks(count), body, zeros)
    return [total.sum(0, keepdims=True) for total in totals]
