"""`flash-wtconv bench sharding`: operators, training and large images over the devices of a host.

Nothing is wrapped: arrays are put on a mesh, of Explicit or of Auto axes, and functions are called.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from flash_wtconv_jax import models
from flash_wtconv_jax.bench.clocks import HostClock
from flash_wtconv_jax.bench.collectives import collectives
from flash_wtconv_jax.bench.reports import Keep, head, unkept
from flash_wtconv_jax.bench.sharding_cases import Case, cases
from flash_wtconv_jax.bench.wtconvnext import Network
from pallas_kernels.common import device
from pallas_kernels.common.types import Json, Tree
from pallas_kernels.wtconv import wtconv2d

PARTS = ("operators", "training", "rows")
KINDS = ("Explicit", "Auto")
"""The kinds of a mesh's axes."""
_OWN = "shard_map"
"""The caller's own `jax.shard_map`, over the first axis of a case."""
_OUTPUTS_ROUNDING = 1e-5
"""The most that outputs may be off over their RMS."""
_KERNELS = 'custom_call_target="'
Progress = Callable[[str, int], Callable[[], None]]


def run(
    progress: Progress,
    parts: Sequence[str] | None = None,
    devices: Sequence[int] | None = None,
    operators: Sequence[str] | None = None,
    minutes: float = 8.0,
    keep: Keep = unkept,
) -> Json:
    """Compares operators over several devices with one, and times training and a large image.

    Operators are not timed: processes of which each compares some may run beside each other.

    Args:
        progress: Told a label and a number of steps, returns what to call after each step.
        parts: Some of `PARTS`; None is all.
        devices: The numbers of devices; None is 1, 2, 4, ... as many as there are, for operators
            the most of these.
        operators: Names of cases of `sharding_cases.cases`; None is all.
        minutes: Nothing is begun after so many; the report names what is left.
        keep: Told the report so far after each call, `left` naming what is to come.

    Returns:
        A JSON-able report: device, versions, date, `rows` by part, each with what it found `wrong`,
        what `failed` with its error, and what is `left`.

    Raises:
        ValueError: An argument is out of range; says what was expected.
    """
    platform, end = device.platform(), time.monotonic() + 60 * minutes
    here = len(jax.local_devices(backend=platform))
    counts = [n for n in (1, 2, 4, 8) if n <= here] if devices is None else [*devices]
    for count in counts:
        if not 1 <= count <= here:
            raise ValueError(f"devices: {count}, expected 1 to the {here} of this host")
    unknown = [part for part in parts or () if part not in PARTS]
    if unknown or not counts:
        raise ValueError(f"parts: {unknown or counts}, expected some of {', '.join(PARTS)}")
    known = [case.name for case in cases(True, 1)]
    for name in operators or ():
        if name not in known:
            raise ValueError(f"operators: {name!r} is not one of {', '.join(known)}")
    small = platform == "cpu"
    jobs: dict[str, Iterator[tuple[str, Callable[[], Json]]]] = {
        "operators": _operators(max(counts), small, operators),
        "training": _training(counts, small),
        "rows": _rows(counts, small),
    }
    chosen = {part: [*jobs[part]] for part in parts or PARTS}
    report: Json = {
        **head("sharding", HostClock(), None),
        "rows": [],
        "failed": [],
        "left": [f"{part}: {label}" for part, todo in chosen.items() for label, _ in todo],
    }
    for part, todo in chosen.items():
        step = progress(part, len(todo))
        for label, job in todo:
            if time.monotonic() < end:
                try:
                    report["rows"].append({"part": part, "label": label, **job()})
                # Whatever one call dies of, the others are still told of.
                except Exception as error:
                    failed = f"{part}: {label}: {type(error).__name__}: {error}"
                    report["failed"].append(failed)
                report["left"].remove(f"{part}: {label}")
                _compare(report["rows"])
                keep(report)
            step()
    return report


def mesh_of(count: int, name: str, kind: str) -> Mesh:
    """A mesh of the first so many devices, with one axis.

    Args:
        count: The number of devices.
        name: The name of the axis.
        kind: One of `KINDS`.

    Example:
        >>> mesh_of(1, "data", "Auto").shape["data"]
        1
    """
    devices = jax.local_devices(backend=device.platform())[:count]
    return jax.make_mesh((count,), (name,), axis_types=(AxisType[kind],), devices=devices)


class Alone(NamedTuple):
    """A case on one device, which several are compared with.

    Attributes:
        results: The output and the gradients.
        kernels: The custom calls of its program by their names, and how many there are.
    """

    results: tuple[Tree, Tree]
    kernels: dict[str, int]


def alone(case: Case, one: jax.Device) -> Alone:
    """A case on one device."""
    arrays = jax.device_put((case.arrays, case.given), one)
    compiled = jax.jit(partial(_both, case.function)).lower(*arrays).compile()
    return Alone(jax.device_get(compiled(*arrays)), _kernels(compiled.as_text() or ""))


def compared(case: Case, one: Callable[[], Alone], split: str, kind: str, count: int) -> Json:
    """An operator and its gradients over several devices, beside one.

    Args:
        case: The call.
        one: Returns the case on one device.
        split: The axis that is split.
        kind: One of `KINDS`, or "shard_map", the caller's own over Explicit axes.
        count: The number of devices.

    Returns:
        Whether outputs are bitwise alike, the worst errors of outputs and gradients over their
        RMS, the collectives of the program, its kernels, and what is wrong: None, or text.
    """
    mesh = mesh_of(count, split, "Explicit" if kind == _OWN else kind)
    arrays, given = _placed(case, split, mesh)
    function = _own_shard_map(case, split, mesh) if kind == _OWN else case.function
    with jax.set_mesh(mesh):
        over = jax.jit(partial(_both, function)).lower(arrays, given).compile()
    got, text = over(arrays, given), over.as_text() or ""
    found = collectives(text)
    want, kernels_of_one = one()
    errors = [_worst(g, w) for g, w in zip(got, want, strict=True)]
    image = max(leaf.size for leaf in jax.tree.leaves(case.arrays))
    bounds = {"output": _OUTPUTS_ROUNDING, "gradients": case.rounding}
    wrong = [
        f"{name} off by {error:.1e}"
        for (name, most), error in zip(bounds.items(), errors, strict=True)
        if not error <= most
    ]
    kernels = _kernels(text)
    # Libraries' names tell what XLA has fused into a call, of which a shard may have less.
    lost = {name for name in kernels_of_one if not name.startswith("__cu")} - kernels.keys()
    if lost:
        wrong.append(f"{', '.join(sorted(lost))} not called, as one device does")
    # On Auto axes plain JAX but for convolutions is XLA's to split, which gathers split rows.
    if found.get("all-gather", (0, 0))[1] >= image and (kernels or kind != "Auto"):
        wrong.append("an image is gathered")
    return {
        "operator": case.name,
        "split": split,
        "kind": kind,
        "devices": count,
        "bitwise": all(map(np.array_equal, *map(jax.tree.leaves, (got[0], want[0])))),
        "errors": errors,
        "collectives": found,
        "kernels": kernels,
        "wrong": "; ".join(wrong) or None,
    }


def _operators(
    count: int, small: bool, names: Sequence[str] | None
) -> Iterator[tuple[str, Callable[[], Json]]]:
    for case in cases(small, count):
        if names is None or case.name in names:
            # Computed where it is first asked for, and once.
            one = cache(partial(alone, case, mesh_of(1, "n", "Auto").devices.flat[0]))
            for split in case.splits:
                # Sums in a `shard_map` of one's own are one's own: images and scenes alone.
                own = (_OWN,) if split in "ns" else ()
                for kind in (*KINDS, *own):
                    label = f"{case.name} over {split}, {kind}"
                    yield label, partial(compared, case, one, split, kind, count)


def _training(counts: Sequence[int], small: bool) -> Iterator[tuple[str, Callable[[], Json]]]:
    """Training steps of WTConvNeXt-T, as many images a device whatever their number."""
    for kind, count in _spreads(counts):
        yield f"{count} devices, {kind}", partial(_trained, count, kind, small)


def _trained(count: int, kind: str, small: bool) -> Json:
    each, size, dtype, options = 128, 224, "bfloat16", dict[str, Any]()
    if small:
        each, size, dtype = 4, 32, "float32"
        options = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "levels": (2, 2, 1, 1)}
    make = partial(models.wtconvnext_tiny, **options)
    step, arguments = Network(make, each * count, size, dtype).function("training")
    mesh = mesh_of(count, "data", kind)
    whole, split = NamedSharding(mesh, jax.P()), NamedSharding(mesh, jax.P("data"))
    state, images, labels = jax.device_put(
        jax.tree.map(np.asarray, arguments), (whole, split, split)
    )
    # Where axes are Auto XLA would choose how the new state lies, and compile for that again.
    pinned: Json = {"out_shardings": (whole, whole)} if kind == "Auto" else {}
    compiled = jax.jit(step, donate_argnums=0, **pinned).lower(state, images, labels).compile()
    text = compiled.as_text() or ""
    losses = []
    for _ in range(3):
        state, loss = compiled(state, images, labels)
        losses.append(float(loss))

    def train() -> jax.Array:
        nonlocal state
        state, loss = compiled(state, images, labels)
        return loss

    times = HostClock().take_turns({"step": train}, lambda: None)["step"]
    found = collectives(text)
    gathered = found.get("all-gather", (0, 0))[1]
    return {
        "devices": count,
        "kind": kind,
        "batch": each * count,
        "losses": losses,
        "median_ms": times.median,
        "images_per_s": each * count / times.median * 1e3,
        "collectives": found,
        "kernels": _kernels(text),
        "wrong": "images are gathered" if gathered >= images.size else None,
    }


def _rows(counts: Sequence[int], small: bool) -> Iterator[tuple[str, Callable[[], Json]]]:
    """A wavelet convolution of one large image, whose rows are split, and its gradients."""
    for kind, count in _spreads(counts):
        yield f"{count} devices, {kind}", partial(_cut, count, kind, small)


def _spreads(counts: Sequence[int]) -> list[tuple[str, int]]:
    """Kinds of axes and numbers of devices; of one device axes of either kind split nothing."""
    first, *rest = KINDS
    return [*((first, n) for n in counts), *((kind, n) for kind in rest for n in counts if n > 1)]


def _cut(count: int, kind: str, small: bool) -> Json:
    shape, dtype = ((1, 512, 32, 8), "float32") if small else ((1, 4096, 2048, 64), "bfloat16")
    c, levels, k = shape[-1], 3, 5
    mesh = mesh_of(count, "h", kind)
    keys = iter(jax.random.split(jax.random.key(0), 2 + levels))
    params = {
        "base_kernel": jax.random.normal(next(keys), (k, k, 1, c)) / k,
        "base_scale": jnp.ones(c),
    }
    for i in range(levels):
        params[f"wavelet_kernel_{i}"] = jax.random.normal(next(keys), (k, k, 4, c)) / k
        params[f"wavelet_scale_{i}"] = jnp.full((4, c), 0.5)
    image = np.asarray(jax.random.normal(next(keys), shape, dtype))
    x = jax.device_put(image, NamedSharding(mesh, jax.P(None, "h")))
    params = jax.device_put(params, NamedSharding(mesh, jax.P()))
    compiled = jax.jit(partial(_both, wtconv2d)).lower((x, params), ()).compile()
    text = compiled.as_text() or ""
    times = HostClock().take_turns({"": partial(compiled, (x, params), ())}, lambda: None)[""]
    found, kernels = collectives(text), _kernels(text)
    gathered = "all-gather" in found and (kernels or kind != "Auto")
    return {
        "devices": count,
        "kind": kind,
        "shape": shape,
        "levels": levels,
        "median_ms": times.median,
        "collectives": found,
        "kernels": kernels,
        "wrong": "the image is gathered" if gathered else None,
    }


def _compare(rows: Sequence[dict[str, Any]]) -> None:
    """Adds to rows of training and of large images how near they are to linear in the devices."""
    ones = {row["part"]: row for row in rows if row["devices"] == 1}
    for row in rows:
        one = ones.get(row["part"])
        if one is None or row["part"] == "operators":
            continue
        ratio = one["median_ms"] / row["median_ms"]
        # Training has as many images a device, the large image as many in all.
        row["efficiency"] = ratio if row["part"] == "training" else ratio / row["devices"]


def _both(function: Callable[..., Tree], arrays: Tree, given: Tree) -> tuple[Tree, Tree]:
    """The output, and the gradients of a sum of its values' sines."""
    y, pullback = jax.vjp(lambda *arrays: function(*arrays, *given), *arrays)
    return y, pullback(jax.tree.map(jnp.sin, y))


def _placed(case: Case, split: str, mesh: Mesh) -> tuple[Tree, Tree]:
    """The arrays of a case on a mesh, of which an axis is split."""

    def put(axes: str, part: Tree) -> Tree:
        return jax.device_put(part, NamedSharding(mesh, _spec(axes, split)))

    arrays = tuple(
        jax.tree.map(put, axes, array) for axes, array in zip(case.axes, case.arrays, strict=True)
    )
    return arrays, tuple(put("s", part) for part in case.given)


def _own_shard_map(case: Case, split: str, mesh: Mesh) -> Callable[..., Tree]:
    specs = jax.tree.map(lambda axes: _spec(axes, split), case.axes)
    given = (_spec("s", split),) * len(case.given)
    return jax.shard_map(
        case.function, mesh=mesh, in_specs=(*specs, *given), out_specs=jax.P(split)
    )


def _spec(axes: str, split: str) -> jax.P:
    return jax.P(*(name if name == split else None for name in axes.split()))


def _worst(got: Tree, want: Tree) -> float:
    """The greatest error of any array over the RMS of what it should be."""
    errors = [0.0]
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        have, expected = np.asarray(g, np.float64), np.asarray(w, np.float64)
        scale = float(np.sqrt(np.mean(expected**2))) or 1.0
        errors.append(float(np.abs(have - expected).max()) / scale)
    return max(errors)


def _kernels(text: str) -> dict[str, int]:
    """The custom calls of a program by their names: a CPU has none."""
    names = [part.split('"')[0] for part in text.split(_KERNELS)[1:]]
    return {name: names.count(name) for name in dict.fromkeys(names)}
