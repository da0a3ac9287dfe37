"""The parts of sparse convolution that no framework computes: names, limits, sizes and checks.

Both frameworks' functions take arguments and refuse them alike.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from pallas_kernels.common.integers import checked_integer
from pallas_kernels.sparse.problem import Window

LIMIT = 1 << 17
"""Coordinates lie in [-LIMIT, LIMIT)."""
MOST_SAMPLES = 512
"""The batch index lies in [0, MOST_SAMPLES)."""
FULL, OUTSIDE, TWICE = 1, 2, 4
"""The faults that `Voxels.overflow` adds up."""

OUTPUT_RULES = ("floor", "full")
"""Names of the rules that say which voxels the output of a strided convolution has."""
STRIDE_MODES = ("stride_only", "reduce_and_stride")
"""Names of what a stride does."""
POINT_REDUCTIONS = ("mean", "max", "first", "sum")
"""Names of what `from_points` makes of the points of a voxel."""
POOL_REDUCTIONS = ("max", "mean", "sum")
"""Names of what a pooling makes of the voxels of a window."""


class Voxels(Protocol):
    """The sizes of either framework's voxels."""

    @property
    def capacity(self) -> int:
        """The number of rows."""

    @property
    def ndim(self) -> int:
        """The number of axes, D."""

    @property
    def batch_size(self) -> int:
        """Samples."""

    @property
    def tensor_stride(self) -> tuple[int, ...]:
        """Voxels of the finest grid along each axis of one of these."""


class KernelMap(Protocol):
    """The sizes of either framework's kernel map."""

    @property
    def window(self) -> Window:
        """The offsets."""

    @property
    def in_capacity(self) -> int:
        """Rows of the input."""

    @property
    def out_capacity(self) -> int:
        """Rows of the output."""


class MapRequest(NamedTuple):
    """A kernel map that was asked for, checked.

    Attributes:
        window: The offsets.
        first: The coordinates that offset 0 adds to `stride u`, along each axis.
        tensor_stride: That of the output.
        full: Whether the output has every voxel that reads one of the input.
        keeps: Whether the output's voxels are the input's.
        rows: Rows of the output.
    """

    window: Window
    first: tuple[int, ...]
    tensor_stride: tuple[int, ...]
    full: bool
    keeps: bool
    rows: int


def check_name(value: object, name: str, known: Sequence[str]) -> None:
    """Raises an error where an argument is none of some names.

    Example:
        >>> check_name("max", "reduce", POOL_REDUCTIONS)
    """
    if value not in known:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(known)}")


def check_faults(faults: int, capacity: int) -> None:
    """Raises an error that tells what `Voxels.overflow` says went wrong, if anything did.

    Example:
        >>> check_faults(0, 8)
    """
    messages = {
        FULL: f"more voxels than a capacity, here {capacity}: give a larger capacity= or "
        "out_capacity=",
        OUTSIDE: f"a sample beyond [0, {MOST_SAMPLES}), or a coordinate beyond [{-LIMIT}, {LIMIT})",
        TWICE: "a coordinate that is there twice: from_points merges them",
    }
    told = [message for bit, message in messages.items() if faults & bit]
    if told:
        raise ValueError(f"voxels: {'; '.join(told)}")


def check_rows(features: Sequence[int], rows: int, called: str = "n") -> None:
    """Raises an error where the shape of features is not `[n, C]` of so many rows.

    Args:
        features: The shape.
        rows: Rows that there should be.
        called: The name of their number.

    Example:
        >>> check_rows((5, 3), 5)
    """
    if len(features) != 2 or features[0] != rows:
        shape = tuple(features)
        raise ValueError(f"features: expected [{called}, C] of {rows} rows, got shape {shape}")


def checked_samples(batch_size: object) -> int:
    """The number of samples.

    Raises:
        ValueError: It is no positive integer, or too large.

    Example:
        >>> checked_samples(3)
        3
    """
    samples = checked_integer(batch_size, "batch_size", least=1)
    if samples > MOST_SAMPLES:
        raise ValueError(f"batch_size={samples}: expected at most {MOST_SAMPLES}")
    return samples


def checked_voxel_size(voxel_size: float | Sequence[float], ndim: int) -> np.ndarray:
    """The size of a voxel, a number or one for each axis, in float64.

    Raises:
        ValueError: It is neither, or not positive.

    Example:
        >>> checked_voxel_size(0.5, 3)
        array(0.5)
    """
    size = np.asarray(voxel_size, np.float64)
    if size.shape not in ((), (ndim,)) or not (np.isfinite(size) & (size > 0)).all():
        raise ValueError(f"voxel_size={voxel_size!r}: expected a number > 0, or one for each axis")
    return size


def rounded_capacity(count: int) -> int:
    """The power of two from `count` on: few different capacities are few programs to compile.

    Example:
        >>> rounded_capacity(5), rounded_capacity(0)
        (8, 1)
    """
    return 1 << max(count - 1, 0).bit_length()


def per_axis(value: int | Sequence[int], name: str, ndim: int) -> tuple[int, ...]:
    """An argument that is one positive integer for all axes or one for each, as one for each.

    Raises:
        ValueError: It is neither.

    Example:
        >>> per_axis(3, "kernel_size", 2)
        (3, 3)
    """
    each = tuple(value) if isinstance(value, Sequence) else (value,) * ndim
    try:
        if len(each) == ndim and not isinstance(value, str):
            return tuple(checked_integer(one, name, least=1) for one in each)
    except ValueError:
        pass
    raise ValueError(f"{name}={value!r}: expected an integer >= 1, or {ndim} of them")


def checked_capacity(capacity: int | None, count: int) -> int:
    """Rows for so many voxels; None takes the power of two from their number on.

    Raises:
        ValueError: Fewer rows than voxels.

    Example:
        >>> checked_capacity(None, 5), checked_capacity(6, 5)
        (8, 6)
    """
    if capacity is None:
        return rounded_capacity(count)
    rows = checked_integer(capacity, "capacity", least=1)
    if rows < count:
        raise ValueError(f"capacity={rows}: expected at least {count}, the number of voxels")
    return rows


def check_places(places: np.ndarray, samples: int) -> None:
    """Raises an error that names the first row of coordinates that nobody can take.

    Args:
        places: `[n, 1 + D]`: the sample, then the axes.
        samples: The number of samples.

    Example:
        >>> check_places(np.array([[0, 5], [0, 6]]), 1)
    """
    for column, name in enumerate(["sample", *(f"axis {i}" for i in range(places.shape[1] - 1))]):
        low, high = (0, samples) if column == 0 else (-LIMIT, LIMIT)
        wrong = (places[:, column] < low) | (places[:, column] >= high)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ValueError(
                f"coords: row {row} has {name} {places[row, column]}, expected {low} to {high - 1}"
            )
    order = np.lexsort(places.T[::-1])
    same = (places[order[1:]] == places[order[:-1]]).all(1)
    if same.any():
        first, second = sorted(order[int(np.argmax(same)) :][:2].tolist())
        raise ValueError(
            f"coords: row {second} is {places[second].tolist()}, as row {first} is; expected each "
            "once, from_points merges what falls into one voxel"
        )


def checked_request(
    voxels: Voxels,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    *,
    transposed: bool,
    generative: bool,
    output_voxels: Voxels | None,
    output_rule: str,
    padding: int | Sequence[int] | None,
    out_capacity: int | None,
) -> MapRequest:
    """The request of a call of `kernel_map`, which documents the arguments.

    Raises:
        ValueError: A bad argument: which, what came, and what was expected.
    """
    window = checked_window(kernel_size, stride, dilation, voxels.ndim)
    window = window._replace(transposed=bool(transposed))
    check_name(output_rule, "output_rule", OUTPUT_RULES)
    if padding is not None and output_rule != "full" and not transposed:
        raise ValueError(
            f"padding={padding!r}: belongs to output_rule='full', and to transposed convolutions"
        )
    if output_rule == "full" and transposed:
        raise ValueError(
            "output_rule='full': belongs to convolutions that are not transposed; generative=True "
            "makes every output of a transposed one"
        )
    if output_voxels is not None and (generative or output_rule == "full"):
        which = "generative=True" if generative else "output_rule='full'"
        raise ValueError(f"output_voxels: {which} makes its own; leave one of them out")
    if transposed and not generative and output_voxels is None:
        raise ValueError(
            "output_voxels=None: a transposed convolution needs the voxels of its output, or "
            "generative=True"
        )
    tensor_stride = _tensor_stride(voxels, window)
    if output_voxels is not None:
        _check_output(voxels, output_voxels, tensor_stride)
    full = generative or output_rule == "full"
    keeps = not full and not window.transposed and set(window.stride) == {1}
    rows = _out_capacity(out_capacity, voxels, output_voxels, window, full, keeps)
    return MapRequest(window, _first_offsets(window, padding), tensor_stride, full, keeps, rows)


def checked_window(
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    ndim: int,
) -> Window:
    """The window of a call.

    Raises:
        ValueError: A size that is no positive integer, or too large for coordinates of 32 bits.

    Example:
        >>> checked_window(3, (2, 1), 1, 2).stride
        (2, 1)
    """
    window = Window(
        per_axis(kernel_size, "kernel_size", ndim),
        per_axis(stride, "stride", ndim),
        per_axis(dilation, "kernel_dilation", ndim),
    )
    span = max(k * d for k, d in zip(window.kernel_size, window.dilation, strict=True))
    if max(window.stride) * 16 > LIMIT or span > LIMIT:
        raise ValueError(
            f"stride={window.stride}, kernel_size={window.kernel_size}, "
            f"kernel_dilation={window.dilation}: expected strides up to {LIMIT // 16} and windows "
            f"of up to {LIMIT} voxels"
        )
    return window


def _first_offsets(window: Window, padding: int | Sequence[int] | None) -> tuple[int, ...]:
    """The coordinates that offset 0 adds to `stride u`, along each axis."""
    if padding is None:
        return window.offsets()[0]
    each = tuple(padding) if isinstance(padding, Sequence) else (padding,) * len(window.stride)
    if len(each) != len(window.stride):
        raise ValueError(f"padding={padding!r}: expected an integer, or {len(window.stride)}")
    return tuple(-checked_integer(one, "padding", least=0) for one in each)


def _tensor_stride(voxels: Voxels, window: Window) -> tuple[int, ...]:
    """The tensor stride of the output."""
    pairs = list(zip(voxels.tensor_stride, window.stride, strict=True))
    if not window.transposed:
        return tuple(t * s for t, s in pairs)
    if any(t % s for t, s in pairs):
        raise ValueError(
            f"stride={window.stride}: a transposed convolution divides the voxels' tensor_stride "
            f"{voxels.tensor_stride} by it"
        )
    return tuple(t // s for t, s in pairs)


def _check_output(voxels: Voxels, out: Voxels, tensor_stride: tuple[int, ...]) -> None:
    """Raises an error where voxels cannot be the output of others."""
    if (out.ndim, out.batch_size) != (voxels.ndim, voxels.batch_size):
        raise ValueError(
            f"output_voxels: expected {voxels.ndim} axes and {voxels.batch_size} samples, got "
            f"{out.ndim} and {out.batch_size}"
        )
    if out.tensor_stride != tensor_stride:
        raise ValueError(
            f"output_voxels: expected the tensor_stride {tensor_stride} that this stride leads to, "
            f"got {out.tensor_stride}"
        )


def _out_capacity(
    given: int | None,
    voxels: Voxels,
    out: Voxels | None,
    window: Window,
    full: bool,
    keeps: bool,
) -> int:
    """Rows of the output."""
    if out is not None:
        if given not in (None, out.capacity):
            raise ValueError(f"out_capacity={given}: output_voxels have {out.capacity}")
        return out.capacity
    if keeps:
        if given not in (None, voxels.capacity):
            raise ValueError(f"out_capacity={given}: stride 1 keeps the input's {voxels.capacity}")
        return voxels.capacity
    if given is not None:
        return checked_integer(given, "out_capacity", least=1)
    if not full:
        return voxels.capacity
    # How many outputs may read one voxel: each offset at most one.
    each = 1
    for k, s, d in zip(window.kernel_size, window.stride, window.dilation, strict=True):
        each *= k if window.transposed or d % s == 0 else min(k, -(-(d * (k - 1) + 1) // s))
    return rounded_capacity(each * voxels.capacity)


def checked_weight(
    shape: Sequence[int], window: Window, channels: int
) -> tuple[int, int, int, int]:
    """The shape of weights as implementations get them, `(K, G, C / G, F / G)`.

    Args:
        shape: Their shape, `[K, C, F]` or `[K, G, C / G, F / G]`.
        window: The offsets, and the groups.
        channels: Channels of the input.

    Raises:
        ValueError: Another shape, or groups that do not divide the channels.

    Example:
        >>> checked_weight((3, 4, 8), Window((3,), (1,), (1,)), 4)
        (3, 1, 4, 8)
    """
    taps, groups = window.taps, window.groups
    if channels % groups:
        raise ValueError(f"groups={groups}: expected a divisor of the {channels} channels")
    each = channels // groups
    wanted = f"[K, C_in, C_out] = [{taps}, {channels}, C_out]"
    if groups > 1:
        wanted = f"[K, G, C_in / G, C_out / G] = [{taps}, {groups}, {each}, C_out / G]"
    own = tuple(shape)
    grouped = (own[0], 1, *own[1:]) if len(own) == 3 and groups == 1 else own
    if len(grouped) != 4 or grouped[:3] != (taps, groups, each) or grouped[3] == 0:
        raise ValueError(f"weight: expected {wanted}, got shape {own}")
    return taps, groups, each, grouped[3]


def check_pools(transposed: bool, output_voxels: Voxels | None) -> None:
    """Raises an error where a stride cannot be a pooling.

    Args:
        transposed: Whether the convolution is.
        output_voxels: The voxels that its output was given.

    Example:
        >>> check_pools(False, None)
    """
    if transposed or output_voxels is not None:
        given = "transposed=True" if transposed else "output_voxels"
        raise ValueError(f"{given}: stride_mode='reduce_and_stride' pools onto voxels of its own")


def check_map(
    found: KernelMap, window: Window, voxels: Voxels, output_voxels: Voxels | None, expands: bool
) -> None:
    """Raises an error where a map is not that of a call.

    Args:
        found: The map.
        window: The offsets of the call.
        voxels: The voxels of the input.
        output_voxels: Those that the output was given.
        expands: Whether the output has every voxel that reads one of the input.
    """
    own = expands or window.transposed or set(window.stride) != {1}
    if own and output_voxels is None:
        raise ValueError(
            "output_voxels=None: with kernel_map= give the voxels too that kernel_map() returned "
            "beside it, for the output has other voxels than the input"
        )
    out = output_voxels or voxels
    asked = window._replace(groups=1)
    if found.window != asked:
        raise ValueError(f"kernel_map: is that of {found.window}, expected {asked}")
    if (found.in_capacity, found.out_capacity) != (voxels.capacity, out.capacity):
        raise ValueError(
            f"kernel_map: leads from {found.in_capacity} rows to {found.out_capacity}, expected "
            f"{voxels.capacity} to {out.capacity}; where the output's voxels are not the input's, "
            "give output_voxels= too, which kernel_map() returned beside it"
        )


def checked_depthwise(
    features: Sequence[int], weight: Sequence[int], found: KernelMap, num_out_coords: object
) -> int:
    """The rows of the output of a depthwise convolution.

    Args:
        features: Shape of the features.
        weight: Shape of the weights.
        found: The map.
        num_out_coords: The rows that were asked for.

    Raises:
        ValueError: They do not fit each other.
    """
    if len(features) != 2 or features[0] != found.in_capacity:
        raise ValueError(
            f"in_features: expected [in_capacity, C] of {found.in_capacity} rows, got shape "
            f"{tuple(features)}"
        )
    wanted = found.window.taps, features[1]
    if tuple(weight) != wanted:
        raise ValueError(f"weight: expected [K, C] = {wanted}, got shape {tuple(weight)}")
    rows = checked_integer(num_out_coords, "num_out_coords", least=0)
    if rows > found.out_capacity:
        raise ValueError(
            f"num_out_coords={rows}: expected at most {found.out_capacity}, the map's rows"
        )
    return rows
