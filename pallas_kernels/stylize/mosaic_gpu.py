"""Instance normalisation on Hopper GPUs in one launch: Pallas kernels of Mosaic GPU.

An item is one image's pixels in some neighbouring channels. A group of blocks takes an item
together: each keeps its pixels in shared memory between the pass that sums and the pass that
writes, so x is read once and y is written once. Items of up to 20 MB are kept so, since the group
may be the whole GPU. Of larger ones each block keeps the last chunks and reads the rest again, the
latest first, as the L2 cache has them.

- **Tiles:** a tile is as many pixels as a warpgroup holds at four channels a thread. A chunk is
  some tiles, one TMA copy. Blocks are persistent and at most one for each multiprocessor.
- **Warpgroups:** four, each of which is the producer and the only consumer of a pipeline of its
  own. Warpgroup 0 also adds up what all have summed, and meets the other blocks of the group.
- **Pipeline:** up to 8 stages a warpgroup, as many as shared memory holds, of a chunk of each
  input. Stages hold the chunks of an item until they are written, in place. Stages beyond those
  are filled with the next item's while blocks meet.
- **mbarriers:** `full` of a stage, one arrival for each TMA load. `loaded` of the parameters, of
  two items in turn. `written`, four arrivals: all warpgroups have put their sums where warpgroup 0
  reads them, which it tells by `free`. `ready`: it has put there what the others write by, which
  they have read when they arrive on `taken`. A stage needs no `empty`, since its consumer issues
  the loads itself.
- **Meeting:** a block's sums go to global memory, `mailbox`. Up to 8 blocks are a cluster, launched
  together, and meet by a cluster's mbarrier between two fences. More of them count on a semaphore
  in global memory, and wait for each other; all of them are resident, as there are no more than
  multiprocessors, and JAX runs no two such launches at once, which might wait for each other's for
  ever. Distributed shared memory would save a microsecond of a meeting.
- **Registers:** no `setmaxnreg`, since all roles are alike: of 128 a thread for four warpgroups
  `ptxas` takes 64 to 127, and spills none.

Bytes: of 225 KiB of shared memory a block 160 are stages, in each of 132 blocks. In 16 bits a
128² x 128 image is 4 MiB, 64 KiB for each of 64 blocks, or 8 blocks of a cluster have 128 KiB each
of 32 channels; 256² x 64 are 8 MiB, 64 KiB for each of 128; 512² x 32 are 16 MiB, 128 KiB each, or
64 in halves of 16 channels, whose rows of 32 bytes cost more to copy. A multiprocessor's share of
the memory's bandwidth is 30 KB a microsecond, so the 128 KB that an item of 64 KiB moves take
longer than a meeting, about 3.5. The machine code has 8 instructions for each element in either
pass, half of the time of the copies that it goes on during. On an H200 these three take 1.34 to
1.40 copies, in float32 1.58 to 1.60 (2026-11-29), where larger items keep their last chunks.
Summing the next item before this one's sums are awaited was never faster.

The sums are those of the Triton kernels: relative to the image's first pixel, which is subtracted
exactly, by Welford's method in each thread, then combined as Chan, Golub and LeVeque say, in a
fixed order.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial, reduce
from itertools import product
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import device, mosaic_gpu_call
from pallas_kernels.common._compat import gpu_fence, gpu_load, gpu_store, in_32_bits, vary_like
from pallas_kernels.common.mosaic_gpu import (
    MANUAL_BARRIERS,
    MULTIPROCESSORS,
    SHARED,
    Scratch,
    unavailable,
)
from pallas_kernels.common.refusals import refuse
from pallas_kernels.common.types import Index, Keywords, Ref, Slice
from pallas_kernels.stylize.formulas import Gradients
from pallas_kernels.stylize.problem import Problem

__all__ = ["DIFFERENTIABLE", "backward", "check", "forward", "search_space", "unavailable"]

DIFFERENTIABLE = False

_DTYPES = ("float32", "bfloat16", "float16")
_SIZES = "channels", "members", "pixels"
"""The names of the sizes that `search_space` offers."""
_THREADS = 128
"""Threads of a warpgroup."""
_WARPGROUPS = 4
_VECTOR = 4
"""Channels of a thread."""
_STAGES = 8
"""The most stages of a warpgroup: Mosaic takes 32 mbarriers in one array."""
_BOX = 256
"""The most pixels of a TMA copy."""
_ROW = 256
"""The most bytes of a pixel's channels; more of them are several items."""
_CHUNK = 8192
"""Bytes of a chunk unasked."""
_CLUSTER = 8
"""The most blocks of a cluster; larger groups wait for each other."""
_RATE = 25
"""Bytes that a multiprocessor moves in a nanosecond."""
_MEETING = {"none": 2000, "cluster": 5000, "all": 2300}
"""Nanoseconds of a meeting of a single block, of a cluster's and of more.

They and the rest of `_Plan.cost` fit what launches took on an H200 (2026-11-29).
"""
_LAUNCH = 2000
"""Nanoseconds of a launch; what takes less need not be told apart."""
_OFFERED = 9
"""The most divisions that are timed."""
_ENTRIES = 16
"""Entries that warpgroup 0 adds up in one go, no fewer than the tiles of a block's sums."""
_UNROLLED = 4
"""Tiles of a pass of the loops."""

Pair = tuple[jax.Array, jax.Array]
"""Mean and squared deviations, or the two sums of the backward pass."""
Tile = list[jax.Array]


class _Call(NamedTuple):
    """The quantities that times and sizes of a launch depend on.

    Attributes:
        shape: `(N, H, W, C)`.
        itemsize: Bytes of an element.
        reads: Images that it reads.
        writes: Images that it writes.
        parameters: Values of each channel of each image that it reads.
        told: Values of each channel that warpgroup 0 tells the others.
    """

    shape: tuple[int, ...]
    itemsize: int
    reads: int
    writes: int
    parameters: int
    told: int

    @property
    def size(self) -> int:
        """The pixels of an image."""
        return self.shape[1] * self.shape[2]


class _Plan(NamedTuple):
    """The division of all images among the blocks of a launch.

    Attributes:
        channels: Channels of an item, a power of two.
        members: Blocks of a group.
        pixels: Pixels of a chunk, a power of two.
        chunks: Chunks of an item of a warpgroup.
        stages: Stages of a warpgroup's pipeline.
        groups: Groups, which take alternate items.
        items: The number of all items.
    """

    channels: int
    members: int
    pixels: int
    chunks: int
    stages: int
    groups: int
    items: int

    @property
    def rows(self) -> int:
        """The pixels of a tile."""
        return _THREADS * _VECTOR // self.channels

    @property
    def thin(self) -> int:
        """The rows that a warpgroup holds at one channel a thread."""
        return _THREADS // self.channels

    @property
    def kept(self) -> bool:
        """Whether stages hold a whole item, which is read once."""
        return self.chunks <= self.stages

    @property
    def rounds(self) -> int:
        """The items of the busiest group."""
        return pl.cdiv(self.items, self.groups)

    @property
    def own(self) -> int:
        """The pixels of a warpgroup."""
        return self.chunks * self.pixels

    @property
    def block(self) -> int:
        """The pixels of a block."""
        return _WARPGROUPS * self.own

    def cost(self, call: _Call) -> float:
        """Returns the estimated nanoseconds of the busiest block."""
        row = self.channels * call.itemsize
        # What is read again comes in part from the L2 cache.
        again = call.reads * (1 - min(1, self.stages / self.chunks))
        moved = self.block * row * (call.reads + call.writes + again / 2) / _RATE
        # Rows are parts of lines of the cache.
        moved *= 1 + (24 / row) ** 2
        kind = "none" if self.members == 1 else "cluster" if self.members <= _CLUSTER else "all"
        return self.rounds * (moved + _MEETING[kind])


def check(direction: str, problem: Problem) -> None:
    """Raises `NotImplementedError` where these kernels do not take a problem.

    Args:
        direction: "fwd" or "bwd".
        problem: The call.
    """
    reasons = problem.unsupported(_DTYPES)
    if not reasons:
        n, *_, c = problem.shape
        if c % 8:
            reasons.append(f"{c} channels, multiples of 8 alone")
        # Rows of the parameters and of what is summed are counted in 32 bits.
        elif n * c * _THREADS >= 1 << 31:
            reasons.append(f"{n} images of {c} channels, which are too many")
        elif not _plans(_call(direction, problem), _multiprocessors()):
            reasons.append(f"{problem}, of which no division fits shared memory and TMA's boxes")
    refuse(reasons)


def search_space(direction: str, problem: Problem) -> list[dict[str, int]]:
    """The divisions that are worth timing, none for the one that is taken unasked first.

    They are the cheapest by the estimate for each number of channels and of items of a group, and
    each way to meet, and the cheapest of all with other chunks.
    """
    call = _call(direction, problem)
    default, *others = _plans(call, _multiprocessors())
    if default.cost(call) < _LAUNCH:
        return [{}]
    found: dict[object, _Plan] = {}
    for plan in others:
        met = min(plan.members, 2) if plan.members <= _CLUSTER else 3
        alike = (plan.channels, plan.members) == (default.channels, default.members)
        found.setdefault((plan.channels, plan.rounds, met, plan.pixels * alike), plan)
    most = 2 * default.cost(call)
    return [{}, *(_sizes(plan) for plan in found.values() if plan.cost(call) < most)][:_OFFERED]


@partial(jax.jit, static_argnames=("eps", "activation", *_SIZES))
@in_32_bits
def forward(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None,
    *,
    eps: float,
    activation: str | None,
    **sizes: int,
) -> tuple[jax.Array, jax.Array]:
    """The operator and the statistics; see `vjp` for the arguments.

    The sizes are those of `search_space`.
    """
    inputs = x, scale, bias, residual
    read = [x] if residual is None else [x, residual]
    call = _forward_call(x.shape, x.dtype.itemsize, len(read))
    first = x[:, 0, 0].astype(jnp.float32)
    kernel = partial(_Forward, eps=eps, activation=activation)
    y, statistics = _launch(kernel, call, _plan(call, sizes), read, [first, scale, bias], 3)
    return vary_like(inputs, (y, statistics))


@partial(jax.jit, static_argnames=("activation", *_SIZES))
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
    **sizes: int,
) -> Gradients:
    """The gradients; see `vjp` for the arguments, and `forward` for the sizes."""
    inputs = x, statistics, scale, bias, residual, dy
    read = [x, dy] if residual is None else [x, dy, residual]
    call = _backward_call(x.shape, x.dtype.itemsize, residual is not None)
    parameters = [*(statistics[:, i] for i in range(3)), scale, bias]
    kernel = partial(_Backward, activation=activation)
    *found, sums = _launch(kernel, call, _plan(call, sizes), read, parameters, 2)
    dx, *rest = found
    gradients = Gradients(dx, sums[:, 1], sums[:, 0], rest[0] if rest else None)
    return vary_like(inputs, gradients)


def _forward_call(shape: tuple[int, ...], itemsize: int, reads: int) -> _Call:
    return _Call(shape, itemsize, reads, 1, 3, 4)


def _backward_call(shape: tuple[int, ...], itemsize: int, residual: bool) -> _Call:
    return _Call(shape, itemsize, 2 + residual, 1 + residual, 5, 2)


def _call(direction: str, problem: Problem) -> _Call:
    """The launch of a problem."""
    itemsize = jnp.dtype(problem.dtype).itemsize
    if direction == "fwd":
        return _forward_call(problem.shape, itemsize, 1 + problem.residual)
    return _backward_call(problem.shape, itemsize, problem.residual)


def _multiprocessors() -> int:
    """The multiprocessors that blocks may wait for each other on."""
    return min(MULTIPROCESSORS, getattr(device.current(), "core_count", MULTIPROCESSORS))


@cache
def _plans(call: _Call, most: int) -> list[_Plan]:
    """Returns the plans that memory, TMA and so many multiprocessors allow, the cheapest first."""
    wide = {most // groups for groups in (1, 2, 3, 4, 6, 8, 12)} | {16, 32, 64, 128}
    members = (1, 2, 4, 8, *sorted(size for size in wide if _CLUSTER < size <= most))
    found = []
    for own in (8, 16, 32, 64, 128):
        unasked = _CHUNK // (own * call.itemsize)
        pixels = unasked, 2 * unasked, unasked // 2
        for sizes in product(members, pixels):
            plan = _planned(call, most, own, *sizes)
            # Others leave blocks without pixels.
            if plan is not None and plan.block * (plan.members - 1) < call.size:
                found.append(plan)
    return sorted(dict.fromkeys(found), key=lambda plan: plan.cost(call))


def _planned(call: _Call, most: int, channels: int, members: int, pixels: int) -> _Plan | None:
    """Returns the plan of these sizes on so many multiprocessors, or None where there is none."""
    n, *_, c = call.shape
    rows = _THREADS * _VECTOR // channels
    # No more than the pixels of a warpgroup.
    share = pl.cdiv(call.size, members * _WARPGROUPS)
    pixels = max(rows, min(pixels, _BOX, 1 << (share - 1).bit_length()))
    items, groups = n * (c // channels), most // members
    if not groups or pixels > _BOX or c % channels or channels * call.itemsize > _ROW:
        return None
    size = call.reads * pixels * channels * call.itemsize
    tile = 4 * _THREADS * _VECTOR
    fixed = (2 * call.parameters + 2 * _WARPGROUPS + call.told + 2) * tile
    stages = min(_STAGES, (SHARED - fixed) // (_WARPGROUPS * size))
    chunks = pl.cdiv(share, pixels)
    plan = _Plan(channels, members, pixels, chunks, stages, min(items, groups), items)
    uneven = call.size % (members * plan.block)
    # Mosaic stores what is contiguous in memory without TMA's bounds, so beyond an image's end.
    if stages < (1 if plan.kept else 2) or channels == c and uneven:
        return None
    return plan


def _plan(call: _Call, sizes: dict[str, int]) -> _Plan:
    """Returns the plan of sizes of `search_space`, the cheapest for none.

    What was the fastest for another shape may not be possible for this one: that is as none.
    """
    most = _multiprocessors()
    plan = None
    if sizes:
        plan = _planned(call, most, *(sizes[name] for name in _SIZES))
    return _plans(call, most)[0] if plan is None else plan


def _sizes(plan: _Plan) -> dict[str, int]:
    """Returns what `search_space` says of a plan."""
    return {name: getattr(plan, name) for name in _SIZES}


def _launch(
    kind: "Callable[..., _Block]",
    call: _Call,
    plan: _Plan,
    read: Sequence[jax.Array],
    parameters: Sequence[jax.Array],
    kept: int,
) -> list[jax.Array]:
    """Runs a kernel.

    Args:
        kind: The block, of which references are wanted.
        call: The launch.
        plan: How blocks share it.
        read: Images `[N, H, W, C]`.
        parameters: float32 `[N, C]` each.
        kept: Values of each channel of each image that it returns.

    Returns:
        Images that are written in place of the first ones read, and float32 `[N, kept, C]`.
    """
    x = read[0]
    n, h, w, c = x.shape
    tiles = c // plan.channels
    # In every row of a tile, so that threads read theirs; XLA writes them with what made them.
    spread = jnp.stack([value.reshape(n, tiles, plan.channels) for value in parameters], 2)
    shape = n, tiles, len(parameters), plan.rows, plan.channels
    spread = jnp.broadcast_to(spread[:, :, :, None], shape)
    images = [image.reshape(n, h * w, c) for image in read]
    outputs = [jax.ShapeDtypeStruct((n, h * w, c), x.dtype)] * call.writes
    outputs.append(jax.ShapeDtypeStruct((n, kept, c), jnp.float32))
    # Rows behind the last member's are read, and left out.
    inbox = 2, pl.cdiv(plan.members, plan.thin) * plan.thin, plan.channels
    together, apart = plan.members <= _CLUSTER, plan.members == 1
    if not apart:
        outputs.append(jax.ShapeDtypeStruct((plan.items, *inbox), jnp.float32))
    scratch = _scratch(call, plan, x.dtype)
    names = [f"image{i}" for i in range(len(read))] + ["parameters"]
    names += [f"result{i}" for i in range(call.writes)] + ["sums"]
    names += [*(["mailbox"] if not apart else []), *scratch]

    def body(*refs: Ref) -> None:
        every = dict(zip(names, refs, strict=True))
        lists = {
            name: [every.pop(f"{prefix}{i}") for i in range(number)]
            for name, prefix, number in (
                ("images", "image", len(read)),
                ("results", "result", call.writes),
                ("stages", "stages", len(read)),
            )
        }
        if together:
            group, member = lax.axis_index("group"), lax.axis_index("member")
        else:
            block = lax.axis_index("block")
            group, member = lax.div(block, plan.members), lax.rem(block, plan.members)
            # Those among what a launch reserves would be each block's own.
            every["met"] = pl.get_global(plgpu.SemaphoreType.REGULAR((plan.items,)))
        warpgroup = lax.axis_index("warpgroup")
        place = {"group": group, "member": member, "warpgroup": warpgroup}
        kind(size=call.size, tiles=tiles, plan=plan, **place, **lists, **every).run()

    grid: Keywords = {"grid": (plan.groups * plan.members,), "grid_names": ("block",)}
    if together:
        grid = {
            "grid": (plan.groups,),
            "grid_names": ("group",),
            "cluster": (plan.members,),
            "cluster_names": ("member",),
        }
    found = mosaic_gpu_call.kernel(
        body,
        out_type=outputs,
        scratch_types=list(scratch.values()),
        num_threads=_WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=MANUAL_BARRIERS,
        **grid,
    )(*images, spread)
    written = [image.reshape(x.shape) for image in found[: call.writes]]
    return [*written, found[call.writes]]


def _scratch(call: _Call, plan: _Plan, dtype: jnp.dtype) -> dict[str, Scratch]:
    """Returns what a block reserves, by the names of `_Block`."""
    tile = plan.rows, plan.channels
    stages = _WARPGROUPS, plan.stages
    found: dict[str, Scratch] = {
        f"stages{i}": plgpu.SMEM((*stages, plan.pixels, plan.channels), dtype)
        for i in range(call.reads)
    }
    found |= {
        "known": plgpu.SMEM((2, call.parameters, *tile), jnp.float32),
        "state": plgpu.SMEM((_WARPGROUPS, 2, *tile), jnp.float32),
        "told": plgpu.SMEM((call.told, *tile), jnp.float32),
        "spare": plgpu.SMEM((2 * plan.thin, plan.channels), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=call.reads, num_barriers=math.prod(stages)),
        "loaded": plgpu.Barrier(num_arrivals=1, num_barriers=2),
        "written": plgpu.Barrier(num_arrivals=_WARPGROUPS),
        "free": plgpu.Barrier(num_arrivals=1),
        "ready": plgpu.Barrier(num_arrivals=1),
        "taken": plgpu.Barrier(num_arrivals=_WARPGROUPS),
    }
    if plan.members == 1:
        found["mailbox"] = plgpu.SMEM((2, 2, plan.thin, plan.channels), jnp.float32)
    elif plan.members <= _CLUSTER:
        found["met"] = plgpu.ClusterBarrier(
            collective_axes=("member",), num_arrivals=1, num_barriers=2
        )
    return found


@dataclass(frozen=True, kw_only=True)
class _Block:
    """The work of one warpgroup of one block: its references, and both passes over its items.

    Attributes:
        size: Pixels of an image.
        tiles: Items of an image.
        plan: How blocks share all items.
        group: The group of this block.
        member: The index of this block in its group.
        warpgroup: The index of this warpgroup in its block.
        images: What is read, in global memory.
        parameters: The parameters in global memory, `[N, tiles, number, rows, channels]`.
        results: What is written, in global memory.
        sums: What is returned of each channel, in global memory.
        mailbox: What each block has summed; of a single block in shared memory.
        stages: The pipeline's stages in shared memory, for each image.
        known: The parameters of two items in shared memory.
        state: The sums of each warpgroup.
        told: What warpgroup 0 tells.
        spare: What warpgroup 0 adds up in.
        full: An mbarrier a stage of each warpgroup.
        loaded: An mbarrier for the parameters of each of two items.
        written: The mbarrier for `state`.
        free: The mbarrier for its being read.
        ready: The mbarrier for `told`.
        taken: The mbarrier for its being read.
        met: The mbarriers or semaphores on which the blocks of a group meet.
    """

    size: int
    tiles: int
    plan: _Plan
    group: Index
    member: Index
    warpgroup: Index
    images: list[Ref]
    parameters: Ref
    results: list[Ref]
    sums: Ref
    mailbox: Ref
    stages: list[Ref]
    known: Ref
    state: Ref
    told: Ref
    spare: Ref
    full: Ref
    loaded: Ref
    written: Ref
    free: Ref
    ready: Ref
    taken: Ref
    met: Ref = None

    masked: ClassVar[bool]
    """Whether what lies outside an image would change the sums; TMA fills it with zeros."""

    def begin(self, i: Index) -> Tile:
        """Returns what sums of the i-th item need to know, in registers."""
        raise NotImplementedError

    def add(
        self,
        context: Tile,
        sums: Pair,
        tiles: list[list[Ref]],
        count: jax.Array,
        known: jax.Array | None,
    ) -> Pair:
        """Returns the sums with those of more tiles.

        Args:
            context: What `begin` returned.
            sums: The sums of the tiles before.
            tiles: The tiles, of each image.
            count: The number of all tiles so far, these included.
            known: Which pixels of a single tile exist; None is all.
        """
        raise NotImplementedError

    def combined(
        self,
        entries: int,
        load: Callable[[int, Index], jax.Array],
        weights: Callable[[Index], jax.Array],
    ) -> Pair:
        """Returns the sums of so many entries, of which a warpgroup holds `thin` at once.

        Args:
            entries: The number of times that it holds some.
            load: Function of 0 or 1, and of the time, that returns some.
            weights: Function of the time that returns the pixels of each; where there are none
                stands what nobody has written.
        """
        raise NotImplementedError

    def describe(self, i: Index, sums: Pair) -> tuple[list[jax.Array], list[jax.Array]]:
        """Returns what is told the others, and what is returned, of the i-th item's sums."""
        raise NotImplementedError

    def recall(self, i: Index) -> Tile:
        """Returns what `apply` needs to know of the i-th item, in registers."""
        raise NotImplementedError

    def apply(self, context: Tile, tile: list[Ref]) -> None:
        """Writes the results of a tile in place."""
        raise NotImplementedError

    @property
    def count(self) -> jax.Array:
        """The number of items of this block, at least one."""
        return lax.div(self.plan.items - self.group + self.plan.groups - 1, self.plan.groups)

    @property
    def start(self) -> Index:
        """The first pixel of this warpgroup."""
        return (self.member * _WARPGROUPS + self.warpgroup) * self.plan.own

    def run(self) -> None:
        """Runs both passes over all items."""

        @pl.when(self.warpgroup == 0)
        def _() -> None:
            self.load_parameters(0)
            pl.when(self.count > 1)(partial(self.load_parameters, 1))

        def prefill(q: Index, carry: tuple[()]) -> tuple[()]:
            i, j = lax.div(q, self.plan.chunks), lax.rem(q, self.plan.chunks)
            pl.when(i < self.count)(partial(self.load, i, j))
            return ()

        def item(i: Index, carry: tuple[()]) -> tuple[()]:
            self.tell(i)
            self.finish(i)
            return ()

        lax.fori_loop(0, self.plan.stages, prefill, ())
        lax.fori_loop(0, self.count, item, ())
        # Who waits for an mbarrier has to wait for every phase of it.
        plgpu.barrier_wait(self.free)
        plgpu.wait_smem_to_gmem(0)

    def tell(self, i: Index) -> None:
        """Sums the i-th item's pixels of this block, and leaves the sums for its group."""
        plgpu.barrier_wait(self.loaded.at[lax.rem(i, 2)])
        sums = self.summed(i)

        @pl.when(i > 0)
        def _() -> None:
            plgpu.barrier_wait(self.free)

        for which, value in enumerate(sums):
            gpu_store(self.state.at[self.warpgroup, which], value)
        plgpu.barrier_arrive(self.written)

        @pl.when(self.warpgroup == 0)
        def _() -> None:
            plgpu.barrier_wait(self.written)
            found = self.of_block()
            plgpu.barrier_arrive(self.free)
            self.publish(i, found)

    def finish(self, i: Index) -> None:
        """Waits for the sums of the i-th item's group, and writes the results of this block."""
        plan = self.plan

        @pl.when(self.warpgroup == 0)
        def _() -> None:
            told, returned = self.describe(i, self.collect(i))
            for number, value in enumerate(told):
                for row in range(0, plan.rows, plan.thin):
                    gpu_store(self.told.at[number, pl.ds(row, plan.thin)], value)
            plgpu.barrier_arrive(self.ready)

            @pl.when(self.member == 0)
            def _() -> None:
                image, _, channels = self.place(i)
                for number, value in enumerate(returned):
                    self.store_row(value, self.sums.at[image, number, channels])

        plgpu.barrier_wait(self.ready)
        context = self.recall(i)
        plgpu.barrier_arrive(self.taken)
        # What does not fit is read again, the latest first, as stages and the cache have it.
        last, back = (plan.chunks - 1, -1) if plan.kept else (0, 1)

        def chunk(number: Index, carry: tuple[()]) -> tuple[()]:
            j = number if plan.kept else plan.chunks - 1 - number
            if not plan.kept:
                pl.when(j + plan.stages < plan.chunks)(partial(self.wait, i, j))

            def tiles(s: Index, carry: tuple[()]) -> tuple[()]:
                for u in range(self.unrolled):
                    self.apply(context, self.tile(i, j, s * self.unrolled + u))
                return ()

            lax.fori_loop(0, plan.pixels // plan.rows // self.unrolled, tiles, ())
            # After this fence, all threads have written, and TMA sees what they wrote.
            plgpu.commit_smem()
            for result, stages in zip(self.results, self.stages, strict=False):
                plgpu.copy_smem_to_gmem(
                    stages.at[self.warpgroup, self.stage(i, j)],
                    result.at[self.window(i, j)],
                    commit_group=False,
                )
            plgpu.commit_smem_to_gmem_group()
            # After this, the store of the chunk before has read its stage.
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            pl.when(number > 0)(partial(self.refill, i, j + back))
            return ()

        lax.fori_loop(0, plan.chunks, chunk, ())
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.refill(i, last)

        @pl.when(self.warpgroup == 0)
        def _() -> None:
            plgpu.barrier_wait(self.taken)
            pl.when(i + 2 < self.count)(partial(self.load_parameters, i + 2))

    def summed(self, i: Index) -> Pair:
        """Returns the sums of this warpgroup's pixels of the i-th item, a thread's own each."""
        plan = self.plan
        context = self.begin(i)
        steps = plan.pixels // plan.rows
        # Tiles that lie in the image, the last of them perhaps in part.
        there = jnp.clip(self.size - self.start, 0, plan.own)
        uneven = self.size % (plan.members * plan.block) != 0
        whole = lax.div(there if self.masked else there + plan.rows - 1, plan.rows)

        def step(
            j: Index, before: jax.Array, width: int, mask: bool, at: Index, sums: Pair
        ) -> Pair:
            first, known = at * width, None
            if mask:
                shape = plan.rows, plan.channels
                row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=self.layout)
                known = row < there - (before + first) * plan.rows
            tiles = [self.tile(i, j, first + u) for u in range(width)]
            return self.add(context, sums, tiles, before + first + width, known)

        def chunk(j: jax.Array, sums: Pair) -> Pair:
            self.wait(i, j)
            before, width = j * steps, self.unrolled
            if not uneven:
                sums = lax.fori_loop(
                    0, steps // width, partial(step, j, before, width, False), sums
                )
            else:
                here = jnp.clip(whole - before, 0, steps)
                many = lax.div(here, width)
                sums = lax.fori_loop(0, many, partial(step, j, before, width, False), sums)
                single = partial(step, j, before, 1)
                sums = lax.fori_loop(many * width, here, partial(single, False), sums)
                if self.masked:
                    part = jnp.where(here * plan.rows < there - before * plan.rows, 1, 0)
                    part = jnp.where(here < steps, part, 0)
                    sums = lax.fori_loop(here, here + part, partial(single, True), sums)
            if not plan.kept:

                @pl.when(j + plan.stages < plan.chunks)
                def _() -> None:
                    # After this fence, all threads have read, and TMA may write.
                    plgpu.commit_smem()
                    self.load(i, j + plan.stages)

            return sums

        zeros = plgpu.layout_cast(jnp.zeros((plan.rows, plan.channels), jnp.float32), self.layout)
        return lax.fori_loop(0, plan.chunks, chunk, (zeros, zeros))

    def of_block(self) -> Pair:
        """Returns the sums of all warpgroups of this block."""
        plan = self.plan
        each = plan.rows // plan.thin

        def load(which: int, entry: Index) -> jax.Array:
            state = self.state.at[entry // each, which, pl.ds(entry % each * plan.thin, plan.thin)]
            return gpu_load(state, self.thin)

        def weights(entry: Index) -> jax.Array:
            row = entry % each * plan.thin + self.row
            before = (self.member * _WARPGROUPS + entry // each) * plan.own
            there = jnp.clip(self.size - before, 0, plan.own)
            # One of every so many pixels.
            return lax.div(jnp.maximum(there - row + plan.rows - 1, 0), plan.rows)

        return self.combined(_WARPGROUPS * each, load, weights)

    def publish(self, i: Index, sums: Pair) -> None:
        """Leaves the sums of this block where its group finds them."""
        number, _, _ = self.place(i)
        if self.plan.members == 1:
            for which, value in enumerate(sums):
                gpu_store(self.mailbox.at[lax.rem(i, 2), which], value)
            return
        number = self.number(i)
        for which, value in enumerate(sums):
            self.store_row(value, self.mailbox.at[number, which, self.member])
        if self.plan.members <= _CLUSTER:
            gpu_fence()
            plgpu.commit_smem()
            plgpu.barrier_arrive(self.met.at[lax.rem(i, 2)])
        else:
            # All threads have stored before one of them signals.
            plgpu.commit_smem()
            plgpu.semaphore_signal(self.met.at[number], memory_scope="gpu")

    def collect(self, i: Index) -> Pair:
        """Waits for the sums of all blocks of the group, and returns their sums."""
        plan, number = self.plan, self.number(i)
        if plan.members == 1:
            one, other = (
                gpu_load(self.mailbox.at[lax.rem(i, 2), which], self.thin) for which in range(2)
            )
            return one, other
        if plan.members <= _CLUSTER:
            plgpu.barrier_wait(self.met.at[lax.rem(i, 2)])
            gpu_fence()
        else:
            # It stays at what it counts to: each launch gets semaphores of its own, which are 0.
            plgpu.semaphore_wait(
                self.met.at[number], plan.members, decrement=False, memory_scope="gpu"
            )

        def load(which: int, entry: Index) -> jax.Array:
            rows = pl.ds(entry * plan.thin, plan.thin)
            return gpu_load(self.mailbox.at[number, which, rows], self.thin)

        def weights(entry: Index) -> jax.Array:
            member = entry * plan.thin + self.row
            return jnp.clip(self.size - member * plan.block, 0, plan.block)

        return self.combined(pl.cdiv(plan.members, plan.thin), load, weights)

    def added(self, entries: int, term: Callable[[Index], jax.Array]) -> jax.Array:
        """Returns the sum of the terms of so many entries, in every row; see `combined`."""

        def some(k: Index, total: jax.Array) -> jax.Array:
            for entry in range(_ENTRIES):
                total = total + term(k * _ENTRIES + entry)
            return total

        rows, many = self.plan.thin, entries // _ENTRIES
        total = plgpu.layout_cast(jnp.zeros((rows, self.plan.channels), jnp.float32), self.thin)
        # More of them in one go would take more registers than there are.
        if many > 1:
            total = lax.fori_loop(0, many, some, total)
        for entry in range(many * _ENTRIES if many > 1 else 0, entries):
            total = total + term(entry)
        return self.replicated(total)

    def replicated(self, total: jax.Array) -> jax.Array:
        """Returns the sum over all rows, in every row."""
        rows = self.plan.thin
        half = rows // 2
        while half:
            for at in (0, rows):
                gpu_store(self.spare.at[pl.ds(at, rows)], total)
            plgpu.commit_smem()
            total = total + gpu_load(self.spare.at[pl.ds(half, rows)], self.thin)
            plgpu.commit_smem()
            half //= 2
        return total

    def store_row(self, value: jax.Array, to: Ref) -> None:
        """Stores one of the rows of a replicated value, `[channels]`, in global memory."""
        gpu_store(self.spare.at[pl.ds(0, self.plan.thin)], value)
        plgpu.commit_smem()
        gpu_store(to, gpu_load(self.spare.at[0], plgpu.Layout.WGMMA.reduce(0)))
        plgpu.commit_smem()

    @property
    def layout(self) -> Any:
        """How a warpgroup holds a tile."""
        return plgpu.Layout.WG_STRIDED((self.plan.rows, self.plan.channels), vec_size=_VECTOR)

    @property
    def thin(self) -> Any:
        """How a warpgroup holds a row of values, or several, one of each thread."""
        return plgpu.Layout.WG_STRIDED((self.plan.thin, self.plan.channels), vec_size=1)

    @property
    def row(self) -> jax.Array:
        """The row of each value of such rows."""
        shape = self.plan.thin, self.plan.channels
        return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=self.thin)

    @property
    def unrolled(self) -> int:
        """Tiles of a pass of a loop over those of a chunk."""
        return min(_UNROLLED, self.plan.pixels // self.plan.rows)

    def number(self, i: Index) -> Index:
        """Returns the number of this group's i-th item among all."""
        return self.group + i * self.plan.groups

    def place(self, i: Index) -> tuple[Index, Index, Slice]:
        """Returns the image of the i-th item, its number among the image's, and its channels."""
        number = self.number(i)
        image, tile = lax.div(number, self.tiles), lax.rem(number, self.tiles)
        return image, tile, pl.ds(tile * self.plan.channels, self.plan.channels)

    def window(self, i: Index, j: Index) -> tuple[Index, Slice, Slice]:
        """Returns the pixels of this warpgroup's j-th chunk of the i-th item."""
        image, _, channels = self.place(i)
        return image, pl.ds(self.start + j * self.plan.pixels, self.plan.pixels), channels

    def stage(self, i: Index, j: Index) -> Index:
        """Returns the stage of the j-th chunk of the i-th item.

        Where an item does not fit, its last chunks stay, and are written first. So stages get free
        backwards, in which order the next item fills them.
        """
        plan = self.plan
        if plan.kept:
            return lax.rem(i * plan.chunks + j, plan.stages)
        forward = lax.rem(j, plan.stages)
        return jnp.where(lax.rem(i, 2) == 0, forward, plan.stages - 1 - forward)

    def tile(self, i: Index, j: Index, s: Index) -> list[Ref]:
        """Returns the s-th tile of the j-th chunk of the i-th item, of each image."""
        rows = pl.ds(s * self.plan.rows, self.plan.rows)
        stage = self.stage(i, j)
        return [stages.at[self.warpgroup, stage, rows] for stages in self.stages]

    def barrier(self, i: Index, j: Index) -> Ref:
        """Returns the `full` mbarrier of the stage of the j-th chunk of the i-th item."""
        return self.full.at[self.warpgroup * self.plan.stages + self.stage(i, j)]

    def wait(self, i: Index, j: Index) -> None:
        """Waits for the j-th chunk of the i-th item."""
        plgpu.barrier_wait(self.barrier(i, j))

    def load(self, i: Index, j: Index) -> None:
        """Issues the TMA loads of the j-th chunk of the i-th item, one for each image."""
        window, stage = self.window(i, j), self.stage(i, j)
        for image, stages in zip(self.images, self.stages, strict=True):
            plgpu.copy_gmem_to_smem(
                image.at[window], stages.at[self.warpgroup, stage], self.barrier(i, j)
            )

    def refill(self, i: Index, j: Index) -> None:
        """Issues the next load into the stage of a chunk that is written, if there is one."""
        plan = self.plan
        if plan.kept:
            following = i * plan.chunks + j + plan.stages
            image, chunk = lax.div(following, plan.chunks), lax.rem(following, plan.chunks)
        else:
            again = j >= plan.stages
            image = jnp.where(again, i, i + 1)
            chunk = jnp.where(again, j - plan.stages, plan.stages - 1 - j)
        pl.when(image < self.count)(partial(self.load, image, chunk))

    def load_parameters(self, i: Index) -> None:
        """Issues the TMA load of the i-th item's parameters."""
        image, tile, _ = self.place(i)
        which = lax.rem(i, 2)
        plgpu.copy_gmem_to_smem(
            self.parameters.at[image, tile], self.known.at[which], self.loaded.at[which]
        )

    def parameter(self, i: Index, number: int) -> jax.Array:
        """Returns a parameter of the i-th item, a tile."""
        return gpu_load(self.known.at[lax.rem(i, 2), number], self.layout)

    def of_channel(self, i: Index, number: int) -> jax.Array:
        """Returns a parameter of the i-th item, a row of values or several."""
        rows = pl.ds(0, self.plan.thin)
        return gpu_load(self.known.at[lax.rem(i, 2), number, rows], self.thin)

    def heard(self, number: int) -> jax.Array:
        """Returns what warpgroup 0 has told, a tile."""
        return gpu_load(self.told.at[number], self.layout)

    def wide(self, ref: Ref) -> jax.Array:
        """Returns a tile in float32."""
        return gpu_load(ref, self.layout).astype(jnp.float32)


@dataclass(frozen=True, kw_only=True)
class _Forward(_Block):
    """The norm and the statistics; parameters are the first pixel, the scale and the bias.

    Attributes:
        eps: Is added to the variance.
        activation: None or "relu".
    """

    eps: float
    activation: str | None

    masked: ClassVar[bool] = True

    def begin(self, i: Index) -> Tile:
        """Returns what sums of the i-th item need to know, in registers."""
        return [self.parameter(i, 0)]

    def add(
        self,
        context: Tile,
        sums: Pair,
        tiles: list[list[Ref]],
        count: jax.Array,
        known: jax.Array | None,
    ) -> Pair:
        """Returns the mean and squared deviations with those of more tiles; see `_Block`."""
        mean, squares = sums
        differences = [self.wide(tile[0]) - context[0] - mean for tile in tiles]
        # Welford's step by several members at once.
        step = reduce(operator.add, differences) * (1.0 / count.astype(jnp.float32))
        terms = [d * (d - step) for d in differences]
        if known is not None:
            step = jnp.where(known, step, 0.0)
            terms = [jnp.where(known, term, 0.0) for term in terms]
        return mean + step, reduce(operator.add, terms, squares)

    def combined(
        self,
        entries: int,
        load: Callable[[int, Index], jax.Array],
        weights: Callable[[Index], jax.Array],
    ) -> Pair:
        """Returns mean and squared deviations of entries that have their own."""

        def term(entry: Index, function: Callable[[jax.Array], jax.Array]) -> jax.Array:
            """A function of the pixels of an entry, 0 where there are none."""
            count = weights(entry)
            return jnp.where(count > 0, function(count.astype(jnp.float32)), 0.0)

        total = jnp.maximum(self.added(entries, lambda e: term(e, lambda pixels: pixels)), 1.0)
        weighted = self.added(entries, lambda e: term(e, lambda pixels: pixels * load(0, e)))
        mean = weighted / total

        def squared(entry: Index) -> jax.Array:
            d = load(0, entry) - mean
            return term(entry, lambda pixels: load(1, entry) + pixels * d * d)

        return mean, self.added(entries, squared)

    def describe(self, i: Index, sums: Pair) -> tuple[list[jax.Array], list[jax.Array]]:
        """Returns what is told the others, and what is returned, of the i-th item's sums."""
        mean, squares = sums
        first, scale, bias = (self.of_channel(i, number) for number in range(3))
        centre = first + mean
        offset = mean - (centre - first)
        inverse = lax.rsqrt(squares * (1 / self.size) + self.eps)
        return [centre, offset, inverse * scale, bias], [centre, offset, inverse]

    def recall(self, i: Index) -> Tile:
        """Returns what `apply` needs to know of the i-th item, in registers."""
        return [self.heard(number) for number in range(4)]

    def apply(self, context: Tile, tile: list[Ref]) -> None:
        """Writes the norm of a tile in place of it."""
        centre, offset, factor, bias = context
        z = (self.wide(tile[0]) - centre - offset) * factor + bias
        if len(tile) > 1:
            z = z + self.wide(tile[1])
        z = z if self.activation is None else jnp.maximum(z, 0.0)
        gpu_store(tile[0], z.astype(self.results[0].dtype))


@dataclass(frozen=True, kw_only=True)
class _Backward(_Block):
    """The gradients of x, of the residual and of the parameters.

    Parameters are the statistics, the scale and the bias; images are x, dy and, where an
    activation's slope depends on it, the residual.

    Attributes:
        activation: None or "relu".
    """

    activation: str | None

    # Outside of the image dy is 0, and so are both sums.
    masked: ClassVar[bool] = False

    def begin(self, i: Index) -> Tile:
        """Returns what sums of the i-th item need to know, in registers."""
        return [self.parameter(i, number) for number in range(5)]

    def add(
        self,
        context: Tile,
        sums: Pair,
        tiles: list[list[Ref]],
        count: jax.Array,
        known: jax.Array | None,
    ) -> Pair:
        """Returns both sums with those of more tiles; see `_Block`."""
        summed, correlated = sums
        for tile in tiles:
            n, g = self.gradient(context, tile)
            summed, correlated = summed + g, correlated + n * g
        return summed, correlated

    def gradient(self, context: Tile, tile: list[Ref]) -> Pair:
        """Returns the norm of a tile, and the gradient of what the activation takes."""
        centre, offset, inverse, scale, bias = context[:5]
        n = (self.wide(tile[0]) - centre - offset) * inverse
        g = self.wide(tile[1])
        if self.activation is not None:
            z = n * scale + bias
            z = z if len(tile) == 2 else z + self.wide(tile[2])
            g = jnp.where(z > 0, g, 0.0)
        return n, g

    def combined(
        self,
        entries: int,
        load: Callable[[int, Index], jax.Array],
        weights: Callable[[Index], jax.Array],
    ) -> Pair:
        """Returns the sums of entries."""

        def term(which: int, entry: Index) -> jax.Array:
            return jnp.where(weights(entry) > 0, load(which, entry), 0.0)

        one, other = (self.added(entries, partial(term, which)) for which in range(2))
        return one, other

    def describe(self, i: Index, sums: Pair) -> tuple[list[jax.Array], list[jax.Array]]:
        """Returns what is told the others, and what is returned, of the i-th item's sums."""
        return [value * (1 / self.size) for value in sums], list(sums)

    def recall(self, i: Index) -> Tile:
        """Returns what `apply` needs to know of the i-th item, in registers."""
        return [*self.begin(i), *(self.heard(number) for number in range(2))]

    def apply(self, context: Tile, tile: list[Ref]) -> None:
        """Writes the gradients of a tile in place of x and dy."""
        _, _, inverse, scale, _, mean, covariance = context
        n, g = self.gradient(context, tile)
        dx = inverse * scale * (g - mean - n * covariance)
        dtype = self.results[0].dtype
        gpu_store(tile[0], dx.astype(dtype))
        if len(self.results) > 1:
            gpu_store(tile[1], g.astype(dtype))
