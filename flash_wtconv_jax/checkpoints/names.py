"""From a PyTorch state dict to variables and back, read off the tables of `layouts`."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import chain, groupby
from math import prod
from operator import attrgetter
from typing import Literal, NamedTuple, cast

import ml_dtypes
import numpy as np
import pywt

from flash_wtconv_jax.checkpoints.layouts import (
    LAYOUTS,
    TABLES,
    Rule,
    Rules,
    Table,
    groups_of,
    pattern_of,
)
from flash_wtconv_jax.checkpoints.tensors import bare_names, check_nested, to_array, weights_of
from pallas_kernels.common.types import Tree
from pallas_kernels.haar.filters import IS_HAAR, filter_bank, wavelet_name

Side = Literal["torch", "ours"]
Axes = tuple[tuple[str, ...], ...]
Index = tuple[tuple[str, int], ...]
Arrays = dict[str, np.ndarray]

# A name with a stray number calls for all below it: an error of thousands of lines helps nobody.
_LONG_RUN = 8
_MOST_LINES = 200
# A line about a tensor: what comes before the last number of a level or a block, it, and the rest.
_COUNTED = re.compile(r"(\S*[._])(\d+)((?:\.\S*)? .*)")


class Recognised(NamedTuple):
    """The layout, number of axes and wavelet that a state dict was recognised by.

    Attributes:
        layout: One of `LAYOUTS`.
        ndim: Number of spatial axes.
        wavelet: PyWavelets name of the frozen filters, "haar" where there are none.
    """

    layout: str
    ndim: int
    wavelet: str


def from_torch(
    state_dict: Mapping[str, object], layout: str | None = None, *, wavelet: str = "haar"
) -> dict[str, Tree]:
    """Variables of the Flax layer or model that a PyTorch state dict belongs to.

    Args:
        state_dict: Tensors or arrays by name, in any order. The frozen `wt_filter` and
            `iwt_filter` of the published layer are checked, not loaded. What wrappers put before
            or into names (`module.`, `_orig_mod.`, `model.`, `backbone.`, …) goes, and so do
            `n_averaged` and the other heads of a backbone.
        layout: One of `LAYOUTS`, recognised by the names and ranks if None. Of layers, in 1-D, 2-D
            or 3-D: "published" (Finder et al., ECCV 2024), "fast" (its fast variant) and "metal"
            (that for Apple GPUs, 2-D, which does not scale its bias: ours is the quotient). Of
            whole WTConvNeXts and ConvNeXts, with any of these layers inside: "wtconvnext" (timm's
            names), "features_only" (those of its `features_only=True`), "original" (ConvNeXt's
            authors', V1 and V2) and "mmseg" (mmsegmentation's and mmpretrain's). Of whole
            TransformerNets: "transformer_net" (PyTorch's example, or `conv1.conv` and `conv1.norm`
            in one layer, whose norms may have `gamma` and `beta`; statistics of the training, as
            in old files, are dropped).
        wavelet: The wavelet that the frozen filters must be: they are no part of the variables,
            so the Flax layer must be given the same one.

    Returns:
        `{"params": nested dict}` of NumPy arrays, copied, in the dtypes of the state dict; for
        linen's `apply` as it is, for an nnx model through `load_into`.

    Raises:
        TypeError: The state dict is no mapping, but a module or a path.
        ValueError: The layout is unknown or not recognised, or the state dict does not fit it:
            the first 200 missing, surplus and misshapen names and wrong filters are in the message.
            Or its tensors are quantized, sparse, of 8 bits or without values.

    Example:
        >>> import torch_bridge
        >>> variables = from_torch(torch_bridge.WTConv2d(8, 8).state_dict())
        >>> variables["params"]["wavelet_kernel_0"].shape
        (5, 5, 4, 8)
    """
    arrays = weights_of(state_dict)
    table = _pick(arrays, layout, "torch", wavelet)
    entries, sizes = _fit(table, arrays, "torch", "state_dict", wavelet)
    flat = {
        entry.ours: _rearranged(arrays[entry.torch], entry.torch_axes, entry.ours_axes, sizes)
        for entry in entries
        if entry.ours
    }
    params: dict[str, Tree] = {}
    for entry in entries:
        if entry.scaled_by:
            flat[entry.ours] = _unscaled(entry.torch, flat[entry.ours], flat[entry.scaled_by])
        if entry.ours:
            *path, leaf = entry.ours.split(".")
            node = params
            for part in path:
                node = node.setdefault(part, {})
            node[leaf] = flat[entry.ours]
    return {"params": params}


def to_torch(
    variables: Mapping[str, Tree],
    layout: str | None = None,
    *,
    wavelet: str = "haar",
    like: Mapping[str, object] | None = None,
) -> Arrays:
    """PyTorch state dict of the layer or model that variables belong to.

    Args:
        variables: `{"params": nested dict of arrays}` or the nested dict alone; `variables_of`
            makes it of an nnx model.
        layout: One of `LAYOUTS`; if None, "published" for a layer, "wtconvnext" or
            "transformer_net" for a model.
        wavelet: Wavelet of the layers, for the frozen filters that the published layout holds.
        like: State dict of the module that is to load the result, whose names and ranks it takes
            over where a layout has several (`conv_mlp`, WTConvNeXts of fast layers, wrappers). Its
            filters must be those of the wavelet.

    Returns:
        NumPy arrays by name, copied, in the dtypes of the variables; `to_tensors` makes tensors
        of them. The frozen filters have the dtype of the first array and are rounded to float32
        before they are multiplied, as published (0.49999997 for Haar), or stay float64.

    Raises:
        TypeError: The variables are no nested dict, but a model.
        ValueError: The layout is unknown or the variables or `like` do not fit it: the first 200
            missing, surplus and misshapen names are in the message.

    Example:
        >>> params = {"base_kernel": np.ones((3, 1, 8)), "base_scale": np.ones(8)}
        >>> {name: a.shape for name, a in to_torch({"params": params}, layout="fast").items()}
        {'base_weight': (8, 1, 3), 'base_scale': (1, 8, 1)}
    """
    arrays = flatten(variables)
    if like is None:
        table, full = _pick(arrays, layout, "ours", wavelet), {}
    else:
        theirs = weights_of(like)
        table = _pick(theirs, layout, "torch", wavelet)
        _fit(table, theirs, "torch", "like", wavelet)
        full = {bare: name for name, bare in bare_names(like).items()}
    entries, sizes = _fit(table, arrays, "ours", "variables", wavelet)
    state_dict = {}
    for entry in entries:
        if entry.ours:
            array = arrays[entry.ours]
            if entry.scaled_by:
                array = array * arrays[entry.scaled_by]
            converted = _rearranged(array, entry.ours_axes, entry.torch_axes, sizes)
        else:
            channels = sizes[entry.torch_axes[0][0]]
            dtype = next(iter(arrays.values())).dtype
            converted = _frozen_filters(wavelet, table.ndim, entry.frozen, channels, dtype)
        state_dict[full.get(entry.torch, entry.torch)] = converted
    return state_dict


def recognise(state_dict: Mapping[str, object]) -> Recognised:
    """Recognises a PyTorch state dict by its names, ranks and frozen filters.

    Args:
        state_dict: Tensors or arrays by name.

    Returns:
        Layout, number of spatial axes and wavelet; the names may still misfit, which `from_torch`
        reports.

    Raises:
        ValueError: No name belongs to any layout.

    Example:
        >>> import torch_bridge
        >>> recognise(torch_bridge.WTConv1d(4, 4, wt_type="db2").state_dict())
        Recognised(layout='published', ndim=1, wavelet='db2')
    """
    arrays = weights_of(state_dict)
    table = _pick(arrays, None, "torch", "haar")
    filters = (array for name, array in arrays.items() if re.fullmatch(r"(.*\.)?wt_filter", name))
    first = next(filters, None)
    wavelet = None if first is None else _wavelet_of(first, table.ndim, "analysis")
    return Recognised(table.layout, table.ndim, wavelet or "haar")


def flatten(variables: Mapping[str, Tree]) -> Arrays:
    """The arrays of `{"params": ...}`, or of the nested dict inside, by names joined by dots."""
    check_nested(variables)
    if "params" in variables:
        others = sorted(set(variables) - {"params"})
        if others:
            raise ValueError(
                f"variables hold the collections {others} beside 'params', expected 'params' "
                "alone: no layout has names for the others"
            )
        variables = variables["params"]
        check_nested(variables, "variables['params']")
    flat: Arrays = {}
    for key, value in variables.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": array for name, array in flatten({"params": value}).items()}
        else:
            flat[str(key)] = to_array(value)
    return flat


@dataclass(frozen=True)
class _Entry:
    """A rule with numbers in its placeholders: one tensor that must be there."""

    torch: str
    torch_axes: Axes
    ours: str
    ours_axes: Axes
    frozen: str
    scaled_by: str

    def name(self, side: Side) -> str:
        return self.torch if side == "torch" else self.ours

    def axes(self, side: Side) -> Axes:
        return self.torch_axes if side == "torch" else self.ours_axes


@dataclass(frozen=True)
class _Chosen:
    """A table of whose parts the alternatives are chosen."""

    layout: str
    ndim: int
    rules: Rules
    score: int

    @property
    def wavelets(self) -> bool:
        """Whether its layers may have any wavelet: the others, which save no filters, are Haar."""
        ours = {rule.ours.rpartition(".")[2] for rule in self.rules}
        frozen = {rule.frozen for rule in self.rules}
        return "wavelet_kernel_{i}" not in ours or "analysis" in frozen


def _pick(arrays: Arrays, layout: str | None, side: Side, wavelet: str) -> _Chosen:
    """The table that most of the arrays belong to, by name and rank."""
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}, expected one of {', '.join(LAYOUTS)}, or None")
    table = _best(arrays, side, [table for table in TABLES if layout in (None, table.layout)])
    if layout is None and table.score == 0:
        some = ", ".join(list(arrays)[:4]) or "none"
        raise ValueError(
            f"no layout recognised among {len(arrays)} names ({some}{', …' * (len(arrays) > 4)}), "
            f"expected the names of one of: {', '.join(LAYOUTS)}"
        )
    if wavelet_name(wavelet) not in IS_HAAR and not table.wavelets:
        raise ValueError(
            f"wavelet is {wavelet!r}, but layers of layout {table.layout!r} are Haar where they "
            "save no filters; those of 'published' have any wavelet"
        )
    return table


def _best(arrays: Arrays, side: Side, tables: Iterable[Table] = TABLES) -> _Chosen:
    """The table, and of each of its parts the alternative, that knows most of the arrays."""
    chosen = []
    for table in tables:
        scores = [
            [_score(rules, table.ndim, arrays, side) for rules in part] for part in table.parts
        ]
        rules = [part[own.index(max(own))] for part, own in zip(table.parts, scores, strict=True)]
        score = sum(map(max, scores))
        chosen.append(_Chosen(table.layout, table.ndim, tuple(chain.from_iterable(rules)), score))
    return max(chosen, key=attrgetter("score"))


def _score(rules: Rules, ndim: int, arrays: Arrays, side: Side) -> int:
    return sum(
        len(groups_of(shape, ndim)) == array.ndim
        for name, array in arrays.items()
        for rule, _ in _matches(rules, name, side)
        for shape in [rule.torch_shape if side == "torch" else rule.ours_shape]
    )


def _matches(rules: Rules, name: str, side: Side) -> Iterable[tuple[Rule, Index]]:
    """The rule that a name belongs to, with the numbers in its placeholders; at most one."""
    for rule in rules:
        template = rule.torch if side == "torch" else rule.ours
        if template and (match := _pattern(template).fullmatch(name)):
            yield rule, tuple((key, int(value)) for key, value in match.groupdict().items())
            return


_pattern = lru_cache(maxsize=None)(pattern_of)


def _fit(
    table: _Chosen, arrays: Arrays, side: Side, what: str, wavelet: str
) -> tuple[list[_Entry], dict[str, int]]:
    """The entries that must be there and the size of every symbol; one error lists all misfits."""
    entries = _entries(table, arrays, side)
    sizes = _sizes(entries, arrays, side, {"band": 2**table.ndim})
    expected = {entry.name(side): entry for entry in entries if entry.name(side)}
    kinds = ("missing", "surplus", "misshapen", "not floating", "filter")
    problems: dict[str, list[str]] = {kind: [] for kind in kinds}
    for name, entry in expected.items():
        shape = _shape(entry.axes(side), sizes)
        if name not in arrays:
            problems["missing"].append(f"{name} {shape}")
        elif str(arrays[name].shape) != shape:
            problems["misshapen"].append(f"{name} is {arrays[name].shape}, expected {shape}")
        elif not _is_floating(arrays[name]) and entry.frozen != "anything":
            problems["not floating"].append(f"{name} is {arrays[name].dtype}")
        elif entry.frozen and side == "torch":
            problems["filter"] += _filter_problem(name, arrays[name], entry, table.ndim, wavelet)
    problems["surplus"] = [f"{n} {a.shape}" for n, a in arrays.items() if n not in expected]
    if any(problems.values()):
        raise ValueError(_message(table, what, problems) + _hint(table, arrays, side))
    return entries, sizes


def _entries(table: _Chosen, names: Iterable[str], side: Side) -> list[_Entry]:
    """Every tensor that must be there, given those that are."""
    found = [match for name in names for match in _matches(table.rules, name, side)]
    groups = {group for rule, _ in found for group in rule.group.split()}
    indices = _grow(index for _, index in found)
    last = max((index[0][1] for index in indices if index), default=0)
    entries = []
    for rule in table.rules:
        placeholders = tuple(re.findall(r"{(\w)}", rule.torch))
        for index in sorted(i for i in indices if tuple(key for key, _ in i) == placeholders):
            values = dict(index)
            stage = values.get("s", rule.first_stage)
            if groups.issuperset(rule.group.split()) and stage >= rule.first_stage:
                values |= {"p": stage - 1, "n": last}
                entries.append(_entry(rule, values, table.ndim))
    return entries


def _grow(indices: Iterable[Index]) -> set[Index]:
    """All indices that those found call for: level 2 calls for levels 0 and 1, and so on."""
    grown: set[Index] = {()}
    for index in indices:
        for depth, (key, last) in enumerate(index):
            grown.update((*index[:depth], (key, value)) for value in range(last + 1))
    # A stage without blocks is no stage: its first block is missing.
    grown.update((*index, ("b", 0)) for index in list(grown) if index and index[-1][0] == "s")
    return grown


def _entry(rule: Rule, values: dict[str, int], ndim: int) -> _Entry:
    return _Entry(
        rule.torch.format(**values),
        groups_of(rule.torch_shape.format(**values), ndim),
        rule.ours.format(**values),
        groups_of(rule.ours_shape.format(**values), ndim),
        rule.frozen,
        rule.scaled_by.format(**values),
    )


def _sizes(
    entries: list[_Entry], arrays: Arrays, side: Side, known: dict[str, int]
) -> dict[str, int]:
    """The size of every symbol, as most arrays have it: a misshapen one is outvoted."""
    readings = [
        _reading(entry.axes(side), arrays[entry.name(side)].shape, known)
        for entry in entries
        if entry.name(side) in arrays
    ]
    first = _majority(readings)
    # Two tensors may disagree alone: one that is outvoted on another symbol has no say then.
    trusted = [
        {
            symbol: size
            for symbol, size in reading.items()
            if all(first[other] == reading[other] for other in reading if other != symbol)
        }
        for reading in readings
    ]
    return known | first | _majority(trusted)


def _reading(axes: Axes, shape: tuple[int, ...], known: dict[str, int]) -> dict[str, int]:
    """The sizes that one shape gives the symbols of `axes`; none if the rank differs."""
    if len(axes) != len(shape):
        return {}
    reading = {}
    for axis, size in zip(axes, shape, strict=True):
        unknown = [symbol for symbol in axis if symbol not in known and not symbol.isdigit()]
        rest = prod(known.get(symbol, 1) for symbol in axis)
        if unknown and size % rest == 0:
            reading[unknown[0]] = size // rest
    return reading


def _majority(readings: list[dict[str, int]]) -> dict[str, int]:
    votes: dict[str, Counter[int]] = defaultdict(Counter)
    for reading in readings:
        for symbol, size in reading.items():
            votes[symbol][size] += 1
    return {symbol: count.most_common(1)[0][0] for symbol, count in votes.items()}


def _shape(axes: Axes, sizes: dict[str, int]) -> str:
    """The shape in numbers as NumPy prints it; a symbol that no array told the size of stays."""
    parts = []
    for axis in axes:
        known = all(symbol in sizes or symbol.isdigit() for symbol in axis)
        size = prod(sizes.get(symbol, 1) for symbol in axis)
        parts.append(str(size) if known else "*".join(axis))
    return f"({', '.join(parts)}{',' * (len(parts) == 1)})"


def _rearranged(array: np.ndarray, source: Axes, target: Axes, sizes: dict[str, int]) -> np.ndarray:
    """A copy of `array`, its axes `source` reordered, split and joined into `target`."""
    symbols = [symbol for axis in source for symbol in axis if symbol != "1"]
    order = [symbols.index(symbol) for axis in target for symbol in axis if symbol != "1"]
    split = array.reshape([sizes[symbol] for symbol in symbols]).transpose(order)
    shape = [prod(sizes.get(symbol, 1) for symbol in axis) for axis in target]
    return np.array(split, order="C").reshape(shape)


def _unscaled(name: str, bias: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The bias that a scale makes `bias` of."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        quotient = bias.astype(np.float64) / scale.astype(np.float64)
        result = np.where(bias == 0, 0.0, quotient).astype(bias.dtype)
    if not np.all(np.isfinite(result)):
        raise ValueError(
            f"{name} is added after the scale in this layout and before it here: divided by the "
            f"scale it is not finite in channels {np.flatnonzero(~np.isfinite(result)).tolist()}"
        )
    return result


def _is_floating(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16


def _message(table: _Chosen, what: str, problems: dict[str, list[str]]) -> str:
    kinds = {kind: lines for kind, lines in problems.items() if lines}
    count = ", ".join(f"{len(lines)} {kind}" for kind, lines in kinds.items())
    head = f"the tensors of {what} are not layout {table.layout!r} ({table.ndim}-D): {count}"
    lines = [f"  {kind}: {line}" for kind in kinds for line in _runs(kinds[kind])]
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"  … and {len(lines) - _MOST_LINES} more"]
    return "\n".join([head, *lines])


def _runs(lines: list[str]) -> list[str]:
    """The lines, with a long run that counts a level or block as one of them: `a.{2…998}.b`."""

    def key(numbered: tuple[int, str]) -> tuple[int] | tuple[str, int, str]:
        place, line = numbered
        found = _COUNTED.fullmatch(line)
        return (found[1], int(found[2]) - place, found[3]) if found else (place,)

    result = []
    for same, run in groupby(enumerate(lines), key):
        members = list(run)
        if len(members) < _LONG_RUN:
            result += [line for _, line in members]
        else:
            (first, _), (last, _) = members[0], members[-1]
            head, offset, tail = cast(tuple[str, int, str], same)
            result.append(f"{head}{{{first + offset}…{last + offset}}}{tail}")
    return result


def _hint(table: _Chosen, arrays: Arrays, side: Side) -> str:
    """A line that names the layout which knows more of the arrays' names, if there is one."""
    best = _best(arrays, side)
    if best.score <= table.score:
        return ""
    return f"\n  hint: these are the names of layout {best.layout!r} ({best.ndim}-D)"


def _filter_problem(
    name: str, array: np.ndarray, entry: _Entry, ndim: int, wavelet: str
) -> list[str]:
    if _holds(array, wavelet, ndim, entry.frozen):
        return []
    if entry.frozen == "ones":
        return [f"{name} is not all ones"]
    other = _wavelet_of(array, ndim, entry.frozen)
    hint = f"they are those of {other!r}: pass wavelet={other!r}" if other else "nor any other's"
    return [f"{name} does not hold the {entry.frozen} filters of {wavelet!r}, {hint}"]


def _wavelet_of(array: np.ndarray, ndim: int, kind: str) -> str | None:
    """The wavelet whose filters these are, by its plainest name: several are Haar."""
    discrete = set(pywt.wavelist(kind="discrete"))
    names = [name for family in pywt.families() for name in pywt.wavelist(family)]
    fitting = (n for n in names if n in discrete and _holds(array, n, ndim, kind))
    return next(fitting, None)


def _holds(array: np.ndarray, wavelet: str, ndim: int, kind: str) -> bool:
    """Whether a frozen tensor holds the values that it must, to its rounding."""
    if kind == "anything":
        return True
    if kind == "ones":
        return bool(np.all(array == 1))
    if array.ndim != ndim + 2 or array.shape[0] % 2**ndim or not _is_floating(array):
        return False
    filters = _frozen_filters(wavelet, ndim, kind, array.shape[0] // 2**ndim, np.dtype(np.float64))
    if array.shape != filters.shape:
        return False
    tolerance = max(1e-6, float(ml_dtypes.finfo(array.dtype).eps))
    return bool(np.max(np.abs(array - filters), initial=0.0) <= tolerance)


def _frozen_filters(
    wavelet: str, ndim: int, kind: str, channels: int, dtype: np.dtype
) -> np.ndarray:
    """Filters `[2**ndim * channels, 1, F, ...]` as the published layer makes them."""
    dec, rec = filter_bank(wavelet)
    pair = dec if kind == "analysis" else rec
    pair = pair.astype(np.float64 if dtype == np.float64 else np.float32)
    products = np.stack(
        [
            reduce(np.multiply.outer, [pair[subband >> axis & 1] for axis in range(ndim)])
            for subband in range(2**ndim)
        ]
    )
    return np.tile(products[:, None].astype(dtype), (channels, *(1,) * (ndim + 1)))
