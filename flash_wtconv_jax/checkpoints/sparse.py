"""Weights of sparse convolutions and MinkUNets of other libraries.

A kernel's offsets stand in another order in each library; here they are row-major, the first axis
slowest, as columns of coordinates stand. All of them multiply the voxel at `stride u + offset` with
the offset's matrix, so nothing is flipped; a transposed convolution is the swapped map of the
convolution that it inverts.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike

from flash_wtconv_jax.checkpoints.tensors import to_array, weights_of
from pallas_kernels.common.types import Keywords, Tree

Arrays = Mapping[str, np.ndarray]

LIBRARIES = ("flexgemm", "minkowski", "spconv1", "spconv2", "torchsparse", "warpconvnet")
"""Libraries whose weights are known."""


class SparseUNetWeights(NamedTuple):
    """A MinkUNet of another library.

    Attributes:
        variables: `{"params": ..., "batch_stats": ...}` for `load_into`.
        options: The arguments of the `models.SparseUNet` that they belong to.
    """

    variables: dict[str, Tree]
    options: Keywords


def sparse_kernel(
    weight: ArrayLike,
    library: str,
    kernel_size: int | Sequence[int],
    *,
    num_spatial_dims: int = 3,
) -> np.ndarray:
    """The `kernel` of a `SparseConv` from another library's weight.

    Two things belong to the layer, not to its kernel. A strided convolution of spconv has
    `output_rule="full"` and its `padding`. torchsparse begins an even size k at `1 - k / 2`, which
    differs from ours where k > 2: `padding=k // 2 - 1` then.

    Args:
        weight: "spconv2" and "flexgemm" have `[C_out, *k, C_in]`, "spconv1" `[*k, C_in, C_out]`,
            the others `[K, C_in, C_out]`: "minkowski" with the first axis fastest; "torchsparse"
            likewise if K is odd, else with the first axis slowest; "warpconvnet" as here, groups
            `[K, G, C_in / G, C_out / G]` and depthwise `[K, C]` included. "minkowski" and
            "torchsparse" have `[C_in, C_out]` if K is 1.
        library: One of these.
        kernel_size: Offsets along each axis, an int or one for each.
        num_spatial_dims: Axes.

    Returns:
        `[K, C_in, C_out]`, copied; other axes behind K stay.

    Raises:
        ValueError: An unknown library, or a weight of another shape, as of a cross-shaped kernel.

    Example:
        >>> sparse_kernel(np.arange(9).reshape(9, 1, 1), "minkowski", 3, num_spatial_dims=2).ravel()
        array([0, 3, 6, 1, 4, 7, 2, 5, 8])
    """
    if library not in LIBRARIES:
        raise ValueError(f"library={library!r}: expected one of {', '.join(LIBRARIES)}")
    array = to_array(weight)
    sizes = tuple(kernel_size) if isinstance(kernel_size, Sequence) else (kernel_size,)
    sizes = sizes * num_spatial_dims if len(sizes) == 1 else sizes
    if len(sizes) != num_spatial_dims:
        raise ValueError(f"kernel_size={kernel_size!r}: expected an int, or {num_spatial_dims}")
    taps, shape = math.prod(sizes), array.shape
    if library in ("spconv2", "flexgemm"):
        fits = shape[1:-1] == sizes
    elif library == "spconv1":
        fits = shape[:-2] == sizes
    elif taps == 1 and library != "warpconvnet":
        fits = len(shape) == 2 or (len(shape) == 3 and shape[0] == 1)
    else:
        fits = len(shape) in (2, 3, 4) and shape[0] == taps
    if not fits:
        expected = _written(library, sizes, "C_in", "C_out")
        cross = library == "minkowski" and shape[:1] == (1 + sum(k - 1 for k in sizes),)
        note = "; cross-shaped kernels have no dense offsets" if cross else ""
        raise ValueError(f"weight: expected {expected} of {library}, got shape {shape}{note}")
    if library in ("spconv2", "flexgemm"):
        array = np.moveaxis(array, 0, -1)
    elif library == "minkowski" or (library == "torchsparse" and taps % 2):
        channels = shape[-2:] if taps == 1 else shape[1:]
        backwards = tuple(range(num_spatial_dims))[::-1]
        axes = (*backwards, *range(num_spatial_dims, num_spatial_dims + len(channels)))
        array = array.reshape(*sizes[::-1], *channels).transpose(axes)
    else:
        array = array.reshape(*sizes, *(shape[-2:] if library == "spconv1" else shape[1:]))
    return np.array(array.reshape(taps, *array.shape[num_spatial_dims:]), order="C")


def sparse_unet_from_torch(
    state_dict: Mapping[str, object], library: str | None = None
) -> SparseUNetWeights:
    """Variables and arguments of a `models.SparseUNet` from the state dict of a MinkUNet in space.

    Args:
        state_dict: Tensors or arrays by name. Names are those of MinkowskiEngine's examples
            (`conv0p1s1.kernel`), of Pointcept's SpUNet, which is spconv's (`conv_input.0.weight`),
            or of torchsparse's MinkUNet (`stem.0.kernel`); any number of stages and blocks. What
            wrappers put before names goes.
        library: "minkowski", "spconv1", "spconv2" or "torchsparse"; None tells by the names, and
            spconv's version by the shapes.

    Returns:
        Both; `models.load_sparse_unet` makes the model. Names do not tell the norms' epsilon: it is
        1e-3 for spconv's, as in Pointcept, else 1e-5.

    Raises:
        TypeError: The state dict is no mapping.
        ValueError: The library is unknown or not recognised, or tensors are missing, surplus or
            misshapen: every one is in the message.
    """
    arrays = {
        name: array
        for name, array in weights_of(state_dict).items()
        if not name.endswith("num_batches_tracked")
    }
    names = _names(arrays, library)
    flat: dict[str, dict[str, np.ndarray]] = {"params": {}, "batch_stats": {}}
    problems: list[str] = []
    expected: set[str] = set()

    def take(theirs: str, shape: str) -> np.ndarray | None:
        """A tensor, if it is there and fits."""
        expected.add(theirs)
        if theirs not in arrays:
            problems.append(f"missing: {theirs} {shape}")
        elif str(arrays[theirs].shape) != shape:
            problems.append(f"misshapen: {theirs} is {arrays[theirs].shape}, expected {shape}")
        else:
            return arrays[theirs]
        return None

    biased = any(f"{part.conv}.bias" in arrays for part in names.parts if part.may_be_biased)
    for part in names.parts:
        inside, outside = names.widths(arrays, part)
        name = f"{part.conv}.{part.kernel}"
        known = isinstance(inside, int) and isinstance(outside, int)
        if part.ours.endswith("shortcut.conv") and (
            inside == outside if known else name not in arrays
        ):
            continue
        shape = _written(part.layout, (part.size,) * 3, inside, outside)
        if (weight := take(name, shape)) is not None:
            linear = part.layout == "linear"
            kernel = weight.T[None] if linear else sparse_kernel(weight, part.layout, part.size)
            flat["params"][f"{part.ours}.kernel"] = kernel
        if part.norm is None or (biased and part.may_be_biased):
            # MinkowskiEngine writes a bias as a row.
            shape = f"(1, {outside})" if names.library == "minkowski" else f"({outside},)"
            if (bias := take(f"{part.conv}.bias", shape)) is not None:
                flat["params"][f"{part.ours}.bias"] = bias.reshape(-1)
        if part.norm is not None:
            for theirs, ours, collection in _NORM:
                if (array := take(f"{part.norm}.{theirs}", f"({outside},)")) is not None:
                    flat[collection][f"{part.ours.removesuffix('conv')}norm.{ours}"] = array
    problems += [f"surplus: {n} {a.shape}" for n, a in arrays.items() if n not in expected]
    if problems:
        kinds = Counter(line.partition(":")[0] for line in problems)
        count = ", ".join(f"{number} {kind}" for kind, number in kinds.items())
        head = f"state_dict is no whole MinkUNet of {names.library}: {count}"
        raise ValueError("\n  ".join([head, *problems]))
    variables = {collection: _nested(tensors) for collection, tensors in flat.items()}
    epsilon = _SPELLINGS[names.library].epsilon
    return SparseUNetWeights(variables, _options(variables["params"]) | {"epsilon": epsilon})


class _Part(NamedTuple):
    """A convolution, and the norm behind it.

    Attributes:
        ours: The convolution's name here.
        conv: Its name there.
        kernel: The name of its weight there.
        layout: The library whose order of axes that has.
        norm: The norm's name there; None behind the last convolution.
        size: Offsets along each axis.
        inside: The norms of the parts whose channels it takes; none for the first.
        outside: The norm of as many channels as it makes, its own or one beside it.
    """

    ours: str
    conv: str
    kernel: str
    layout: str
    norm: str | None
    size: int
    inside: tuple[str, ...]
    outside: str = ""

    @property
    def may_be_biased(self) -> bool:
        """Whether it has a bias where convolutions in front of norms have one."""
        return self.norm is not None and not self.ours.endswith("shortcut.conv")


_NORM = (
    ("weight", "scale", "params"),
    ("bias", "bias", "params"),
    ("running_mean", "mean", "batch_stats"),
    ("running_var", "var", "batch_stats"),
)


class _Spelling(NamedTuple):
    """The names that a library gives to the parts of a MinkUNet.

    Numbers in names: `{s}` counts the stages of one side from 0, `{s1}` from 1, `{r}` from the last
    one to 0; `{m}` counts those of both sides from 0, `{n}` from 1; `{b}` counts the blocks of a
    stage from 0, `{b1}` from 1; `{p}` is the stride of the voxels that a stage begins with.

    Attributes:
        kernel: The tensor of a kernel.
        stem: Convolutions and norms of the stem.
        down: The convolution of stride 2 of a stage of the encoder, and its norm.
        encoder: A block of the encoder.
        up: The transposed convolution of a stage of the decoder, and its norm.
        decoder: A block of the decoder.
        block: Convolutions and norms of a block: first, second, shortcut.
        head: The last convolution.
        epsilon: Is added to the variance of the norms.
    """

    kernel: str
    stem: tuple[tuple[str, str], ...]
    down: tuple[str, str]
    encoder: str
    up: tuple[str, str]
    decoder: str
    block: tuple[tuple[str, str], tuple[str, str], tuple[str, str]]
    head: str
    epsilon: float = 1e-5


_SPCONV = _Spelling(
    kernel="weight",
    stem=(("conv_input.0", "conv_input.1"),),
    down=("down.{s}.0", "down.{s}.1"),
    encoder="enc.{s}.block{b}",
    up=("up.{r}.0", "up.{r}.1"),
    decoder="dec.{r}.block{b}",
    block=(("conv1", "bn1"), ("conv2", "bn2"), ("proj.0", "proj.1")),
    head="final",
    epsilon=1e-3,
)
_SPELLINGS = {
    "minkowski": _Spelling(
        kernel="kernel",
        stem=(("conv0p1s1", "bn0.bn"),),
        down=("conv{n}p{p}s2", "bn{n}.bn"),
        encoder="block{n}.{b}",
        up=("convtr{m}p{p}s2", "bntr{m}.bn"),
        decoder="block{n}.{b}",
        block=(
            ("conv1", "norm1.bn"),
            ("conv2", "norm2.bn"),
            ("downsample.0", "downsample.1.bn"),
        ),
        head="final",
    ),
    "spconv1": _SPCONV,
    "spconv2": _SPCONV,
    "torchsparse": _Spelling(
        kernel="kernel",
        stem=(("stem.0", "stem.1"), ("stem.3", "stem.4")),
        down=("stage{n}.0.net.0", "stage{n}.0.net.1"),
        encoder="stage{n}.{b1}",
        up=("up{s1}.0.net.0", "up{s1}.0.net.1"),
        decoder="up{s1}.1.{b}",
        block=(("net.0", "net.1"), ("net.3", "net.4"), ("downsample.0", "downsample.1")),
        head="classifier.0",
    ),
}


class _Names(NamedTuple):
    """The parts of a MinkUNet in a state dict."""

    library: str
    parts: tuple[_Part, ...]

    def widths(self, arrays: Arrays, part: _Part) -> tuple[int | str, int | str]:
        """The channels that a part takes and makes, by the sizes of norms; letters if unknown."""
        inside = _width(arrays, part.inside, "C_in")
        weight = arrays.get(f"{part.conv}.{part.kernel}")
        if not part.inside and weight is not None and weight.ndim > 2:
            inside = weight.shape[-1 if part.layout == "spconv2" else -2]
        if part.norm is not None:
            return inside, _width(arrays, (part.outside,), "C_out")
        bias = arrays.get(f"{part.conv}.bias")
        return inside, "classes" if bias is None else bias.size


def _width(arrays: Arrays, norms: Sequence[str], unknown: str) -> int | str:
    """The channels of some norms together."""
    found = [arrays.get(f"{norm}.weight") for norm in norms]
    sizes = [array.size for array in found if array is not None]
    return sum(sizes) if sizes and len(sizes) == len(found) else unknown


def _names(arrays: Arrays, library: str | None) -> _Names:
    """The parts of the network, as many as the state dict has."""
    if library is not None and library not in _SPELLINGS:
        raise ValueError(f"library={library!r}: expected one of {', '.join(_SPELLINGS)}, or None")
    if library is None:
        firsts = {name: f"{s.stem[0][0]}.{s.kernel}" for name, s in _SPELLINGS.items()}
        library = next((name for name, first in firsts.items() if first in arrays), None)
        if library is None:
            expected = ", ".join(dict.fromkeys(firsts.values()))
            raise ValueError(
                f"no MinkUNet recognised among {len(arrays)} names ({', '.join(list(arrays)[:4])}"
                f"), expected one of {expected}"
            )
        if library == "spconv1":
            # Both have the same names; spconv 2 has the features of a convolution in front.
            norm = arrays.get(f"{_SPCONV.stem[0][1]}.weight")
            weight = arrays[firsts[library]]
            if norm is None or weight.shape[:1] == norm.shape:
                library = "spconv2"
    return _Names(library, tuple(_parts(library, arrays)))


def _parts(library: str, arrays: Arrays) -> Iterator[_Part]:
    """The parts in order, for as many stages and blocks as the state dict has names of."""
    spelling = _SPELLINGS[library]

    def there(prefix: str) -> bool:
        return any(name.startswith(f"{prefix}.") for name in arrays)

    def part(
        ours: str,
        names: tuple[str, str],
        size: int,
        inside: tuple[str, ...],
        before: str = "",
        outside: str | None = None,
    ) -> _Part:
        conv, norm = (before + name for name in names)
        kernel = spelling.kernel
        return _Part(f"{ours}.conv", conv, kernel, library, norm, size, inside, outside or norm)

    def blocks(
        ours: str, template: str, numbers: dict[str, int], inside: tuple[str, ...]
    ) -> Iterator[_Part]:
        b = 0
        # A stage without any block misses its first.
        while b == 0 or there(template.format(b=b, b1=b + 1, **numbers)):
            before = template.format(b=b, b1=b + 1, **numbers) + "."
            first, second, shortcut = spelling.block
            yield part(f"{ours}.{b}.first", first, 3, inside, before)
            yield part(f"{ours}.{b}.second", second, 3, (before + first[1],), before)
            last = before + second[1]
            yield part(f"{ours}.{b}.shortcut", shortcut, 1, inside, before, outside=last)
            inside = (last,)
            b += 1

    inside: tuple[str, ...] = ()
    for i, names in enumerate(spelling.stem):
        weight = arrays.get(f"{names[0]}.{spelling.kernel}")
        size = 3 if weight is None else _side(_taps(weight, library))
        yield part(f"stem.{i}", names, size, inside)
        inside = (names[1],)
    stages = 1
    while there(spelling.down[0].format(s=stages, n=stages + 1, p=2**stages)):
        stages += 1
    skips = []
    for s in range(2 * stages):
        side, own = ("encoder", s) if s < stages else ("decoder", s - stages)
        numbers = {"s": own, "s1": own + 1, "n": s + 1, "m": s, "r": stages - 1 - own}
        numbers["p"] = 2**own if side == "encoder" else 2 ** (stages - own)
        template, names = spelling.encoder, spelling.down
        if side == "encoder":
            skips.append(inside)
        else:
            template, names = spelling.decoder, spelling.up
        conv, norm = (name.format(**numbers) for name in names)
        yield part(f"{'down' if side == 'encoder' else 'up'}.{own}", (conv, norm), 2, inside)
        inside = (norm,) if side == "encoder" else (norm, *skips.pop())
        for block in blocks(f"{side}.{own}", template, numbers, inside):
            yield block
            if block.ours.endswith("second.conv"):
                inside = (cast(str, block.norm),)
    # torchsparse's network ends in a linear layer.
    linear = library == "torchsparse"
    kernel, layout = ("weight", "linear") if linear else (spelling.kernel, library)
    yield _Part("head", spelling.head, kernel, layout, None, 1, inside)


def _written(library: str, sizes: tuple[int, ...], inside: int | str, outside: int | str) -> str:
    """The shape of a weight in a library, or of a "linear" layer, as errors name it."""
    if library == "linear":
        return f"({outside}, {inside})"
    window = ", ".join(map(str, sizes))
    if library in ("spconv2", "flexgemm"):
        return f"({outside}, {window}, {inside})"
    if library == "spconv1":
        return f"({window}, {inside}, {outside})"
    taps = math.prod(sizes)
    two = taps == 1 and library != "warpconvnet"
    return f"({inside}, {outside})" if two else f"({taps}, {inside}, {outside})"


def _taps(weight: np.ndarray, library: str) -> int:
    """Offsets of a kernel of a library."""
    if library == "spconv2":
        return math.prod(weight.shape[1:-1])
    if library == "spconv1":
        return math.prod(weight.shape[:-2])
    return weight.shape[0] if weight.ndim == 3 else 1


def _side(taps: int) -> int:
    """Offsets along an axis of a cube of so many."""
    return round(taps ** (1 / 3))


def _nested(flat: Mapping[str, np.ndarray]) -> dict[str, Tree]:
    """A nested dict of arrays, copied, from names joined by dots."""
    tree: dict[str, Tree] = {}
    for name, array in flat.items():
        *path, leaf = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = np.array(array, order="C")
    return tree


def _options(params: Mapping[str, Tree]) -> Keywords:
    """The arguments of a `SparseUNet` that its parameters tell."""
    stages = [
        params[side][str(i)] for side in ("encoder", "decoder") for i in range(len(params[side]))
    ]
    dims = tuple(stage["0"]["second"]["conv"]["kernel"].shape[2] for stage in stages)
    down = [params["down"][str(i)]["conv"]["kernel"].shape for i in range(len(params["down"]))]
    stem = [params["stem"][str(i)]["conv"] for i in range(len(params["stem"]))]
    return {
        "in_channels": stem[0]["kernel"].shape[1],
        "num_classes": params["head"]["kernel"].shape[2],
        "stem_dim": stem[0]["kernel"].shape[2],
        "dims": dims,
        "depths": tuple(map(len, stages)),
        "stem_kernel_sizes": tuple(_side(conv["kernel"].shape[0]) for conv in stem),
        "widening_downsamples": any(inside != outside for _, inside, outside in down),
        "conv_bias": "bias" in stem[0],
    }
