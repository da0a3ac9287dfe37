"""The correctness cases of sparse convolution, shared by the tests of every implementation.

Imports NumPy and the oracle alone. A case says what to compute, and what the oracle expects.
"""

import math
import zlib
from typing import NamedTuple

import numpy as np

from pallas_kernels.common.conformance import rounded
from pallas_kernels.common.types import Keywords
from pallas_kernels.oracle import (
    Array,
    sparse_conv,
    sparse_conv_vjp,
    sparse_offsets,
    sparse_outputs,
    sparse_pool,
)

PerAxis = int | tuple[int, ...]
Pairs = list[tuple[list[int], list[int]]]
Drawn = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None, np.ndarray]


class Case(NamedTuple):
    """One call: `voxels` of each sample, drawn from a cube of `extent` voxels a side."""

    voxels: tuple[int, ...]
    extent: int
    channels: int
    features: int
    kernel_size: PerAxis = 3
    stride: PerAxis = 1
    dilation: PerAxis = 1
    groups: int = 1
    ndim: int = 3
    bias: bool = False
    generative: bool = False
    transposed: bool = False
    output_rule: str = "floor"
    padding: int | None = None
    stride_mode: str = "stride_only"
    stride_reduce: str = "max"
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """A short name for test ids: the sizes, then what is not its default.

        Example:
            >>> Case((40, 0), 6, 4, 8, stride=2).name
            '40_0-e6-4x8-stride2'
        """
        sizes = ["_".join(map(str, self.voxels)), f"e{self.extent}"]
        sizes.append(f"{self.channels}x{self.features}")
        rest = zip(self[4:], self._fields[4:], strict=True)
        other = [
            value if isinstance(value, str) else f"{field}{value}"
            for value, field in rest
            if value != self._field_defaults[field]
        ]
        return "-".join(sizes + other).replace(" ", "")

    @property
    def arguments(self) -> Keywords:
        """Keywords of the operator, but for the bias and `output_voxels`."""
        names = ["kernel_size", "stride", "groups", "generative", "transposed", "stride_mode"]
        names += ["stride_reduce", "output_rule", "padding"]
        given = {name: getattr(self, name) for name in names}
        return given | {"kernel_dilation": self.dilation}

    @property
    def tensor_stride(self) -> PerAxis:
        """The tensor stride of the input, which a transposed convolution divides."""
        return self.stride if self.transposed else 1

    @property
    def onto(self) -> bool:
        """Whether the output's voxels are given: those that were drawn."""
        return self.transposed and not self.generative

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        """`(K, G, C / G, F / G)`."""
        taps, groups = len(sparse_offsets(self.kernel_size, self.ndim)), self.groups
        return taps, groups, self.channels // groups, self.features // groups

    def sites(self) -> np.ndarray:
        """The voxels that are drawn, in no order, `int32 [n, 1 + ndim]`.

        Example:
            >>> Case((3, 0), 6, 1, 1).sites().shape
            (3, 4)
        """
        rng = np.random.default_rng(zlib.crc32(self.name.encode()))
        places = []
        for sample, count in enumerate(self.voxels):
            cells = rng.choice(self.extent**self.ndim, count, replace=False)
            found = np.unravel_index(cells, (self.extent,) * self.ndim)
            # Negative ones too: a division that rounds toward zero shows.
            axes = [axis - self.extent // 2 for axis in found]
            places.append(np.stack([np.full(count, sample), *axes], 1))
        return rng.permutation(np.concatenate(places)).astype(np.int32)

    def inputs(self) -> np.ndarray:
        """The voxels of the input, `int32 [n, 1 + ndim]`."""
        sites = self.sites()
        if self.onto:
            return sparse_outputs(sites, self.kernel_size, self.stride).astype(np.int32)
        return sites

    def outputs(self) -> np.ndarray:
        """The voxels of the output, `int64 [n, 1 + ndim]`, in their order."""
        if self.onto:
            return self.sites()
        places, stride = self._convolved_at()
        full = self.generative or self.output_rule == "full"
        if not full and np.all(np.equal(stride, 1)):
            return places
        return sparse_outputs(
            places,
            self.kernel_size,
            stride,
            self.dilation,
            rule="full" if full else "floor",
            padding=self.padding,
            transposed=self.transposed,
        )

    def capacity(self) -> int:
        """Rows of the input: more than there are voxels, and room for its output's."""
        return 1 << max(len(self.sites()), 3).bit_length()

    def drawn(self) -> Drawn:
        """Returns coordinates, x, w, the bias and dy, rounded; x is NaN where there is no voxel.

        Example:
            >>> coords, x, w, bias, dy = Case((40, 0), 6, 4, 8, stride=2).drawn()
            >>> coords.shape, x.shape, w.shape, bias, dy.shape[1]
            ((64, 4), (64, 4), (27, 1, 4, 8), None, 8)
        """
        rng = np.random.default_rng(zlib.crc32(self.name.encode()) + 1)
        places, rows = self.inputs(), self.capacity()
        coords = np.full((rows, self.ndim + 1), -1, np.int32)
        coords[: len(places)] = places
        x = np.full((rows, self.channels), np.nan)
        x[: len(places)] = rng.normal(size=(len(places), self.channels))
        taps, _, each, _ = self.weight_shape
        w = rng.normal(size=self.weight_shape) / math.sqrt(each * min(taps, 8))
        bias = None
        if self.bias:
            wide = "float64" if self.dtype == "float64" else "float32"
            bias = rounded(rng.normal(size=self.features), wide)
        dy = rounded(rng.normal(size=(len(self.outputs()), self.features)), self.dtype)
        return coords, rounded(x, self.dtype), rounded(w, self.dtype), bias, dy

    def expected(self) -> dict[str, Array]:
        """Returns the oracle's "y" and "coords", and the gradients "dx", "dw" and "dbias".

        Example:
            >>> sorted(Case((40, 0), 6, 4, 8).expected())
            ['coords', 'dw', 'dx', 'y']
        """
        _, x, w, bias, dy = (
            None if array is None else array.astype(np.float64) for array in self.drawn()
        )
        assert x is not None and w is not None and dy is not None
        places, outputs = self.inputs(), self.outputs()
        values, shape = x[: len(places)], w.shape
        w = w.reshape(self.weight_shape)
        convolved, stride = self._convolved_at()
        pooled = convolved is not places and self.pools
        given = self.kernel_size, stride, self.dilation
        rest: Keywords = {"padding": self.padding, "transposed": self.transposed}
        if pooled:
            cells = self.stride
            values = sparse_pool(
                places, values, convolved, cells, cells, padding=0, reduce=self.stride_reduce
            )
        y = sparse_conv(convolved, values, w, outputs, *given, **rest)
        dvalues, dw = sparse_conv_vjp(convolved, values, w, outputs, dy, *given, **rest)
        if pooled:
            dvalues = self._pool_vjp(x[: len(places)], values, dvalues)
        dx = np.zeros_like(x)
        dx[: len(places)] = dvalues
        wanted = {"y": y, "coords": outputs.astype(np.float64), "dx": dx}
        wanted["dw"] = dw.reshape(shape)
        if bias is not None:
            wanted |= {"y": y + bias, "dbias": dy.sum(0)}
        return wanted

    @property
    def pools(self) -> bool:
        """Whether the stride is a pooling."""
        return self.stride_mode == "reduce_and_stride" and not np.all(np.equal(self.stride, 1))

    def _convolved_at(self) -> tuple[np.ndarray, PerAxis]:
        """The voxels that are convolved, and the stride: after the pooling, where there is one."""
        places = self.inputs()
        if not self.pools:
            return places, self.stride
        return sparse_outputs(places, self.kernel_size, self.stride), 1

    def tolerance(self, name: str) -> float:
        """Returns what rounding may do to any result.

        Example:
            >>> Case((40, 0), 6, 4, 8).tolerance("y")
            1e-05
        """
        return {"float32": 1e-5, "float64": 1e-12}[self.dtype]

    def cells(self) -> np.ndarray:
        """For each voxel of the input the row of the cell that the pooling puts it into."""
        cells, _ = self._convolved_at()
        row_of = {tuple(cell): row for row, cell in enumerate(cells.tolist())}
        steps = [1, *np.broadcast_to(self.stride, self.ndim)]
        places = np.floor_divide(self.inputs(), steps).tolist()
        return np.array([row_of[tuple(place)] for place in places], int)

    def _pool_vjp(self, x: Array, pooled: Array, dy: Array) -> Array:
        """The derivative of the pooling: a maximum is shared by those that are equal."""
        own = self.cells()
        share = np.ones_like(x)
        if self.stride_reduce == "max":
            share = (x == pooled[own]).astype(float)
        counts = np.zeros_like(pooled)
        np.add.at(counts, own, share)
        return share * dy[own] / (1 if self.stride_reduce == "sum" else counts[own])

    def pairs(self) -> Pairs:
        """For each offset the rows of the input and those of the output that read them."""
        convolved, stride = self._convolved_at()
        steps = np.array([1, *np.broadcast_to(stride, self.ndim)])
        offsets = sparse_offsets(self.kernel_size, self.ndim, self.dilation, self.padding)
        reading, read = (
            (convolved, self.outputs()) if self.transposed else (self.outputs(), convolved)
        )
        row_of = {tuple(place): row for row, place in enumerate(read.tolist())}
        found: Pairs = []
        for offset in offsets:
            rows = [row_of.get(tuple(at)) for at in (reading * steps + [0, *offset]).tolist()]
            here = [m for m, row in enumerate(rows) if row is not None]
            there = [row for row in rows if row is not None]
            found.append((here, there) if self.transposed else (there, here))
        return found


CASES: tuple[Case, ...] = (
    Case((64,), 4, 4, 6, bias=True),
    Case((40, 0, 23), 6, 4, 8, 2, 2),
    Case((17, 9), 24, 3, 5, 4, 1, 3, ndim=1),
    Case((40, 23), 12, 4, 6, 5, 3, 2, groups=2, ndim=2, bias=True),
    Case((40,), 6, 6, 3, (3, 1, 3), (1, 2, 3), groups=3),
    Case((12,), 24, 5, 7, 3, 2),
    Case((30,), 5, 33, 17, 1, bias=True),
    Case((1,), 1, 2, 3),
    Case((0, 0), 4, 16, 16),
    Case((60,), 6, 2, 2, 5),
    Case((60,), 6, 2, 2, 7, 2),
    Case((20, 6), 6, 4, 4, 3, 2, ndim=2, output_rule="full", padding=1),
    Case((20, 6), 6, 4, 4, 3, 3, 2, ndim=2, output_rule="full"),
    Case((20,), 8, 4, 4, 3, ndim=2, generative=True),
    Case((40, 3), 6, 4, 4, 3, 2, transposed=True, bias=True),
    Case((30, 3), 6, 4, 4, 2, 2, ndim=2, transposed=True, padding=0),
    Case((9, 3), 6, 4, 4, 2, 2, ndim=2, transposed=True, generative=True),
    Case((40, 9), 6, 4, 4, 3, 2, stride_mode="reduce_and_stride", bias=True),
    Case((30, 9), 6, 4, 4, 3, 3, ndim=2, stride_mode="reduce_and_stride", stride_reduce="mean"),
    Case((40, 23), 6, 4, 8, dtype="bfloat16", bias=True),
    Case((40, 23), 6, 4, 8, 3, 2, groups=2, dtype="float16"),
    Case((40, 23), 6, 4, 8, 3, 2, dtype="float64", bias=True),
)
"""Every kind of call once, and what others get wrong: full grids, isolated voxels, empty samples,
one voxel and none, kernels of more than 32 and 64 offsets, channels that no tile divides."""
