"""`flash-wtconv bench stylize`: the norm, its layers and whole networks of style transfer."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import entry_points
from itertools import product
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from flash_wtconv_jax import checkpoints
from flash_wtconv_jax.bench import clocks
from flash_wtconv_jax.bench.clocks import Call
from flash_wtconv_jax.bench.defaults import OURS, able, entries
from flash_wtconv_jax.bench.networks import drawn
from flash_wtconv_jax.bench.reports import Keep, head, unkept
from flash_wtconv_jax.bench.timing import Spread, comparison
from flash_wtconv_jax.bench.wtconv import check_dtype
from flash_wtconv_jax.models import StyleViT, TransformerNet
from flash_wtconv_jax.stylize.stained_glass import drawn as drawn_glass
from flash_wtconv_jax.stylize.stylizer import STAINED_GLASS, Stylizer
from pallas_kernels.common import device
from pallas_kernels.common.types import Json, Keywords, Tree
from pallas_kernels.conv2d import baseline_jax as plain_conv2d
from pallas_kernels.conv2d import conv2d
from pallas_kernels.conv2d.api import checked_call
from pallas_kernels.dispatch import Operator
from pallas_kernels.dispatch.table import Entry
from pallas_kernels.stylize import baseline_jax, conv2d_instance_norm, instance_norm
from pallas_kernels.stylize.api import OPERATOR as NORM
from pallas_kernels.stylize.convolution.api import OPERATOR as LAYER
from pallas_kernels.stylize.convolution.api import PARTS
from pallas_kernels.stylize.convolution.problem import Problem as LayerProblem
from pallas_kernels.stylize.convolution.shapes import SHAPES as LAYERS
from pallas_kernels.stylize.problem import Problem as NormProblem
from pallas_kernels.stylize.shapes import SHAPES as NORMS

WORKS = ("norm", "layer", "network", "ladder", "training", "style_vit", "large")
"""The kinds of what is timed, see `run`."""

GROUP = "flash_wtconv.bench.stylize"
"""The entry point group of every `RegisteredContender`."""

NAMES = (*tuple(NORMS)[:3], *LAYERS)
"""Names of the norms and the layers that are timed unasked."""

_PLAIN, _COPY = "plain jax", "copy"
_BOTH = "forward", "forward+backward"
_VITS = ("nano", "tiny", "small", "base")
_STYLE = 256
"""The side of a StyleViT's style."""
_SCORES = 2**33
"""The most bytes of attention's scores: in float32, which no kernel fuses, they exist."""
_HEADS = {"nano": 3, "tiny": 3, "small": 6, "base": 12}
_LARGE = (12_000, 9_000), (3_072, 2_304), 1024
"""Width and height of a picture by tiles, and of one that is computed whole too; a tile's side."""
_LARGE_ON_A_CPU = (96, 72), (72, 64), 64
_LARGE_ROUNDS = 3
"""Timed computations of a large picture."""


class RegisteredContender(Protocol):
    """A contender of another package: the module or object that its entry point names."""

    def runs(self, dtype: str, *, on_cpu: bool) -> bool:
        """Whether it can be timed here, beside JAX on a CPU or on an accelerator."""
        ...

    def versions(self) -> dict[str, str]:
        """The versions of the packages that its times depend on, by name."""
        ...

    def times(
        self,
        parameters: Mapping[str, np.ndarray],
        images: np.ndarray,
        dtype: str,
        *,
        training: bool,
    ) -> dict[str, Spread | str]:
        """Times of TransformerNet by the name of what computes it, or why there are none.

        Args:
            parameters: The network's, by PyTorch's names.
            images: `[N, H, W, 3]` in float32.
            dtype: Dtype of the computation; products of float32 are full ones.
            training: Whether it takes the steps of training that this module has, or infers.
        """
        ...


class _Program(NamedTuple):
    """A compiled call, and the bytes of its temporaries."""

    call: Call
    temporaries: int


class _Group(NamedTuple):
    """Contenders that are timed in turns, and what their rows share.

    Attributes:
        head: `work`, `name`, `dtype`, `direction`, and for networks `size` and `batch`.
        baseline: The contender that `speedup` refers to.
        programs: Programs by contender.
        others: Times that contenders of other packages have taken themselves.
    """

    head: Json
    baseline: str
    programs: dict[str, _Program]
    others: dict[str, Spread | str] = {}


def run(
    progress: Callable[[str, int], Callable[[], None]],
    works: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    sizes: Sequence[int] | None = None,
    batches: Sequence[int] | None = None,
    dtypes: Sequence[str] | None = None,
    keep: Keep = unkept,
) -> Json:
    """Times what was asked for, each group of contenders in one run.

    - "norm": `instance_norm` beside a copy and plain JAX.
    - "layer": `conv2d_instance_norm` beside plain JAX, "flash parts" being `conv2d` and
      `instance_norm` one by one.
    - "network": TransformerNet in steps: plain JAX, with our norm alone, with our convolution too,
      whole, and whole by each implementation that computes convolution and norm at once.
    - "ladder": the steps in float32, behind them the whole in each dtype.
    - "training": steps with Adam on the mean square that the network's output is off its input.
    - "style_vit": StyleViT of every size beside TransformerNet.
    - "large": a picture of 12,000 x 9,000 pixels by tiles, from the host's memory to the host's.
      `peak` is the most bytes in use on the device, if no work before had more, and `off` the most
      that a smaller picture by tiles is off the same computed whole, of 255.

    Networks of other packages, which register under `GROUP`, stand beside them: PyTorch's.

    Args:
        progress: Told a label and a number of steps, returns what to call after each step.
        works: From `WORKS`; None is all.
        names: Norms and layers, from `pallas_kernels.stylize.shapes` and
            `pallas_kernels.stylize.convolution.shapes`; None is `NAMES`.
        sizes: Heights and widths of the networks' images; None is 256, 512 and 1024, on a CPU 64.
        batches: Numbers of images; None is 1 and 8, on a CPU 1.
        dtypes: From `wtconv.DTYPES`; None is bfloat16, float16 and float32, on a TPU without
            float16, on a CPU float32.
        keep: Told the report so far whenever rows are added, `left` naming what is to come.

    Returns:
        A JSON-able report: device, versions, date, `clock` and `no_device_events` as in
        `wtconv.run`, and a row for each group and contender with its times in milliseconds,
        `speedup`, the baseline's median over its own, of a norm `over_copy`, and the bytes of its
        `temporaries`. A row without times says `why_not`. `left` is empty in the end.

    Raises:
        ValueError: An argument is unknown or out of range.
    """
    here = device.platform()
    works = list(works or WORKS)
    names = list(NAMES if names is None else names)
    sizes = list(sizes or ((64,) if here == "cpu" else (256, 512, 1024)))
    batches = list(batches or ((1,) if here == "cpu" else (1, 8)))
    unasked = {"cpu": ("float32",), "tpu": ("bfloat16", "float32")}
    dtypes = list(dtypes or unasked.get(here, ("bfloat16", "float16", "float32")))
    for asked, known, what in ((works, WORKS, "work"), (names, (*NORMS, *LAYERS), "shape")):
        unknown = sorted(set(asked) - set(known))
        if unknown:
            raise ValueError(f"{what}: {unknown} is not one of {list(known)}")
    for dtype in dtypes:
        check_dtype(dtype)
    for value, least, what in ((min(sizes), 8, "size"), (min(batches), 1, "batch")):
        if value < least:
            raise ValueError(f"{what} must be at least {least}, got {value}")
    clock, no_device_events = clocks.best()
    jobs = _jobs(works, names, sizes, batches, dtypes)
    report: Json = {
        **head("stylize", clock, no_device_events, _registered()),
        "rows": [],
        "left": [*jobs],
    }
    for job, groups in jobs.items():
        for group in groups():
            label = " ".join(str(group.head[key]) for key in ("work", "name", "dtype", "direction"))
            step = progress(label, clock.turns(len(group.programs)))
            calls = {who: one.call for who, one in group.programs.items()}
            times = clock.take_turns(calls, step) if calls else {}
            report["rows"] += _rows(group, times)
        report["left"].remove(job)
        keep(report)
    return report


def implementations(name: str, dtype: str) -> list[str]:
    """Our implementations that can compute a norm or a layer here, in every direction.

    Args:
        name: One of the norms or layers.
        dtype: Dtype of the images.

    Example:
        >>> with jax.default_device(jax.devices("cpu")[0]):
        ...     implementations("style_512_trunk", "float32")
        ['xla']
    """
    check_dtype(dtype)
    return able(*_problem("norm" if name in NORMS else "layer", name, dtype))


def defaults(report: Json) -> list[Entry]:
    """The fastest implementations of a report's norms and layers, as `defaults.entries` has them.

    Args:
        report: A report of `run`.

    Returns:
        An entry for each direction of each problem that several implementations can compute; where
        a layer's parts one by one were the fastest, it names these.
    """
    found = []
    for work, operator in (("norm", NORM), ("layer", LAYER)):
        own = [row for row in report["rows"] if row["work"] == work]

        def problem(row: Json, work: str = work) -> Json:
            _, of = _problem(work, row["name"], row["dtype"])
            fields = of._asdict() | {"dtype": row["dtype"]}
            if work == "layer":
                window = of.window._asdict()
                del window["pads"]
                fields["window"] = window
            return fields

        each = entries(operator, report | {"rows": own}, problem)
        found += [entry for entry in each if entry["direction"] in operator.directions]
    return found


def _rows(group: _Group, times: Mapping[str, Spread]) -> list[Json]:
    """The rows of a group that was timed."""
    every: dict[str, Spread | str] = {**group.others, **times}
    baseline = every.get(group.baseline)
    copy = times.get(_COPY)
    rows = []
    for who, found in every.items():
        row: Json = {**group.head, "contender": who, "baseline": group.baseline}
        if isinstance(found, str):
            rows.append(row | {"why_not": found})
            continue
        row |= found.row()
        if isinstance(baseline, Spread):
            row |= comparison(found, baseline)
        if copy is not None:
            row["over_copy"] = found.median / copy.median
        if who in group.programs:
            row["temporaries"] = group.programs[who].temporaries
        rows.append(row)
    return rows


def _jobs(
    works: Sequence[str],
    names: Sequence[str],
    sizes: Sequence[int],
    batches: Sequence[int],
    dtypes: Sequence[str],
) -> dict[str, Callable[[], Iterator[_Group]]]:
    """Everything that is timed, by its name; each group is compiled when it is its turn."""
    found: dict[str, Callable[[], Iterator[_Group]]] = {}
    if "large" in works:  # Before what takes more memory.
        found |= {f"large {dtype}": partial(_large, dtype) for dtype in dtypes}
    for work, own in (("norm", _norm), ("layer", _layer)):
        known: Mapping[str, Any] = NORMS if work == "norm" else LAYERS
        if work in works:
            for name, dtype in product(names, dtypes):
                if name in known:
                    found[f"{work} {name} {dtype}"] = partial(own, name, dtype)
    networks: dict[str, Callable[[int, int, str], Iterator[_Group]]] = {
        "network": _network,
        "training": _training,
        "style_vit": _style_vit,
    }
    for size, batch in product(sizes, batches):
        pictures = f"{size} x {size}, batch {batch}"
        if "ladder" in works:
            found[f"ladder {pictures}"] = partial(_ladder, size, batch, dtypes)
        for work, make in networks.items():
            if work in works:
                for dtype in dtypes:
                    found[f"{work} {pictures}, {dtype}"] = partial(make, size, batch, dtype)
    return found


def _norm(name: str, dtype: str) -> Iterator[_Group]:
    """A norm with a ReLU behind."""
    x, dy = _drawn(NORMS[name], NORMS[name], dtype=dtype)
    parameters = jnp.ones(x.shape[-1]), jnp.zeros(x.shape[-1])
    rest: Keywords = {"activation": "relu"}
    functions: dict[str, Callable[..., jax.Array]] = {
        _COPY: lambda x, *_: jnp.negative(x),
        _PLAIN: partial(baseline_jax.instance_norm, **rest),
        OURS: partial(instance_norm, **rest),
    }
    for one in implementations(name, dtype):
        functions[f"{OURS} {one}"] = partial(instance_norm, implementation=one, **rest)
    yield from _both_ways("norm", name, dtype, functions, (x, *parameters), dy)


def _layer(name: str, dtype: str) -> Iterator[_Group]:
    """A convolution with its norm and a ReLU behind, or with a residual before none."""
    layer = LAYERS[name]
    _, problem = _problem("layer", name, dtype)
    taps = (layer.kernel, layer.kernel, layer.channels, layer.features)
    x, w, residual, dy = _drawn(layer[:4], taps, *[problem.norm.shape] * 2, dtype=dtype)
    w = (w / (layer.kernel * layer.channels**0.5)).astype(w.dtype)
    given = x, w, jnp.ones(layer.features), jnp.zeros(layer.features)
    rest: Keywords = {"stride": layer.stride, "padding": layer.padding, "upsample": layer.upsample}
    rest["activation"] = None if layer.residual else "relu"
    joined = conv2d_instance_norm
    named: dict[str, Callable[..., jax.Array]] = {
        _PLAIN: _precise(_with_residual(baseline_jax.conv2d_instance_norm, **rest)),
        OURS: _with_residual(joined, **rest),
        f"{OURS} {PARTS}": _with_residual(_parts, **rest),
    }
    for one in implementations(name, dtype):
        named[f"{OURS} {one}"] = _with_residual(joined, implementation=one, **rest)
    arrays = (*given, residual) if layer.residual else given
    yield from _both_ways("layer", name, dtype, named, arrays, dy)


def _with_residual(function: Callable[..., jax.Array], **rest: object) -> Callable[..., jax.Array]:
    """A function whose residual, where it is given, is its fifth array."""

    def call(*arrays: jax.Array) -> jax.Array:
        residual = {"residual": arrays[4]} if len(arrays) > 4 else {}
        return function(*arrays[:4], **residual, **rest)

    return call


def _both_ways(
    work: str,
    name: str,
    dtype: str,
    functions: Mapping[str, Callable[..., jax.Array]],
    arrays: tuple[jax.Array, ...],
    dy: jax.Array,
) -> Iterator[_Group]:
    """The groups of an operator, forward and with its gradients."""

    def both(function: Callable[..., jax.Array], dy: jax.Array, *arrays: jax.Array) -> Tree:
        y, pullback = jax.vjp(function, *arrays)
        return y, pullback(dy)

    for direction in _BOTH:
        calls: dict[str, _Call] = {
            who: (one, *arrays) if direction == "forward" else (partial(both, one), dy, *arrays)
            for who, one in functions.items()
        }
        head: Json = {"work": work, "name": name, "dtype": dtype, "direction": direction}
        yield _Group(head, _PLAIN, _programs(calls))


ConvNorm = Callable[..., jax.Array]
"""A convolution of `x` by `w` with its norm, as `conv2d_instance_norm`, by keywords."""


def _parts(x: jax.Array, w: jax.Array, *norm: jax.Array, **rest: Any) -> jax.Array:
    """Our convolution and our norm, one by one."""
    return _one_by_one(conv2d, x, w, *norm, **rest)


def _norm_alone(x: jax.Array, w: jax.Array, *norm: jax.Array, **rest: Any) -> jax.Array:
    """The convolution as one writes it, and our norm."""
    return _one_by_one(plain_conv2d.conv2d, x, w, *norm, **rest)


def _one_by_one(
    convolution: Callable[..., jax.Array],
    x: jax.Array,
    w: jax.Array,
    *norm: jax.Array,
    activation: str | None = None,
    residual: jax.Array | None = None,
    **window: Any,
) -> jax.Array:
    z = convolution(x, w, **window)
    return instance_norm(z, *norm, activation=activation, residual=residual)


def _at_once(name: str, *arrays: jax.Array, **rest: Any) -> jax.Array:
    """Both at once by one implementation; the parts where it does not take a layer."""
    with suppress(NotImplementedError):
        return conv2d_instance_norm(*arrays, implementation=name, **rest)
    return _parts(*arrays, **rest)


def _precise(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A function whose products of float32 are full ones, which JAX does not promise."""

    def call(*arrays: Tree) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return function(*arrays)

    return call


def _steps(model: TransformerNet, dtype: str) -> dict[str, Callable[..., jax.Array]]:
    """TransformerNet, a function of its parameters and images, with more and more of ours."""
    definition, _, *rest = nnx.split(model, nnx.Param, ...)

    def styled(convolution: Any, both: ConvNorm, params: nnx.State, x: jax.Array) -> jax.Array:
        return _styled(nnx.merge(definition, params, *rest), convolution, both, x)

    def whole(params: nnx.State, x: jax.Array) -> jax.Array:
        return nnx.merge(definition, params, *rest)(x)

    plain = plain_conv2d.conv2d
    found: dict[str, Callable[..., jax.Array]] = {
        _PLAIN: _precise(partial(styled, plain, baseline_jax.conv2d_instance_norm)),
        "norm alone": _precise(partial(styled, plain, _norm_alone)),
        "convolution+norm": partial(styled, conv2d, _parts),
        OURS: whole,
    }
    for name in implementations("style_512_trunk_end", dtype):
        found[f"{OURS} {name}"] = partial(styled, conv2d, partial(_at_once, name))
    return found


def _styled(
    model: TransformerNet, convolution: Callable[..., jax.Array], both: ConvNorm, x: jax.Array
) -> jax.Array:
    """The network by functions of arrays."""

    def normed(conv: Any, norm: Any, x: jax.Array, **rest: Any) -> jax.Array:
        kernel = conv.kernel[...].astype(x.dtype)
        stride, padding = conv.strides or 1, ("reflect", kernel.shape[0] // 2)
        branch = kernel, norm.scale[...], norm.bias[...]
        return both(x, *branch, stride=stride, padding=padding, **rest)

    relu: Keywords = {"activation": "relu"}
    for conv, norm in (
        (model.conv1, model.in1),
        (model.conv2, model.in2),
        (model.conv3, model.in3),
    ):
        x = normed(conv, norm, x, **relu)
    for block in (model.res1, model.res2, model.res3, model.res4, model.res5):
        inner = normed(block.conv1, block.in1, x, **relu)
        x = normed(block.conv2, block.in2, inner, residual=x)
    for conv, norm in ((model.deconv1, model.in4), (model.deconv2, model.in5)):
        x = normed(conv, norm, x, upsample=2, **relu)
    last = model.deconv3
    assert last.bias is not None
    kernel, bias = (value[...].astype(x.dtype) for value in (last.kernel, last.bias))
    return convolution(x, kernel, bias=bias, padding=("reflect", kernel.shape[0] // 2))


def _network(size: int, batch: int, dtype: str) -> Iterator[_Group]:
    """Inference."""
    model, params, images = _made(size, batch, dtype)
    steps = _steps(model, dtype)
    programs = _programs({who: (step, params, images) for who, step in steps.items()})
    others = _registered_times(params, images, dtype, training=False)
    yield _Group(_head("network", size, batch, dtype, "forward"), _PLAIN, programs, others)


def _ladder(size: int, batch: int, dtypes: Sequence[str]) -> Iterator[_Group]:
    """Inference in float32, step by step, and the whole in other dtypes."""
    model, params, images = _made(size, batch, "float32")
    calls: dict[str, _Call] = {
        f"{who} float32": (step, params, images)
        for who, step in _steps(model, "float32").items()
        if not who.startswith(f"{OURS} ")
    }
    for dtype in dtypes:
        if dtype != "float32":
            model, params, images = _made(size, batch, dtype)
            calls[f"{OURS} {dtype}"] = _steps(model, dtype)[OURS], params, images
    found = _registered_times(params, images, "float32", training=False)
    others = {f"{who} float32": one for who, one in found.items()}
    timed = [who for who, one in others.items() if isinstance(one, Spread)]
    baseline = timed[0] if timed else f"{_PLAIN} float32"
    head = _head("ladder", size, batch, "float32", "forward")
    yield _Group(head, baseline, _programs(calls), others)


def _training(size: int, batch: int, dtype: str) -> Iterator[_Group]:
    """Steps of training, which are given the memory of the state before them."""
    model, params, images = _made(size, batch, dtype)
    optimizer = optax.adam(1e-3)
    state = params, optimizer.init(params)
    lowered = {}
    for who, styled in _steps(model, dtype).items():

        def loss(params: nnx.State, images: jax.Array, styled: Any = styled) -> jax.Array:
            off = styled(params, images).astype(jnp.float32) - images.astype(jnp.float32)
            return (off**2).mean()

        def step(state: Tree, images: jax.Array, loss: Any = loss) -> tuple[Tree, jax.Array]:
            params, memory = state
            value, gradients = jax.value_and_grad(loss)(params, images)
            updates, memory = optimizer.update(gradients, memory, params)
            return (optax.apply_updates(params, updates), memory), value

        lowered[who] = jax.jit(step, donate_argnums=0).lower(state, images)
    programs = {
        who: _Program(_Trained(step, jax.tree.map(jnp.copy, state), images), _temporaries(step))
        for who, step in clocks.compiled(lowered).items()
    }
    others = _registered_times(params, images, dtype, training=True)
    yield _Group(_head("training", size, batch, dtype, "step"), _PLAIN, programs, others)


class _Trained:
    """A call that takes one step of training after the other."""

    def __init__(self, compiled: Callable[..., Tree], state: Tree, images: jax.Array) -> None:
        self._compiled, self._state, self._images = compiled, state, images

    def __call__(self) -> Tree:
        self._state, value = self._compiled(self._state, self._images)
        return value


def _style_vit(size: int, batch: int, dtype: str) -> Iterator[_Group]:
    """StyleViT beside TransformerNet; left out is what needs more memory than there may be."""
    model, params, images = _made(size, batch, dtype)
    calls: dict[str, _Call] = {"TransformerNet": (_steps(model, dtype)[OURS], params, images)}
    others: dict[str, Spread | str] = {}
    style = jnp.full((1, _STYLE, _STYLE, 3), 127.5, dtype)
    for name in _VITS:
        scores = 4 * batch * _HEADS[name] * (size // 8) ** 4
        if dtype == "float32" and scores > _SCORES:
            others[f"StyleViT {name}"] = f"attention's scores would be {scores / 1e9:.0f} GB"
            continue

        def make(name: str = name) -> StyleViT:
            return StyleViT(name, rngs=nnx.Rngs(0), dtype=dtype)

        vit = drawn(make)
        definition, own, *rest = nnx.split(vit, nnx.Param, ...)

        def infer(own: nnx.State, *pair: jax.Array, made: Any = (definition, rest)) -> jax.Array:
            return cast(jax.Array, nnx.merge(made[0], own, *made[1])(*pair))

        calls[f"StyleViT {name}"] = infer, own, images, style
    head = _head("style_vit", size, batch, dtype, "forward")
    yield _Group(head, "TransformerNet", _programs(calls), others)


def _large(dtype: str) -> Iterator[_Group]:
    """A large picture by tiles, timed by the host, after it was computed once."""
    large, smaller, tile = _LARGE_ON_A_CPU if device.on_cpu() else _LARGE
    by_tiles = Stylizer([STAINED_GLASS], dtype=dtype, tile=tile)
    pixels = _glass(*large)
    before = _most_in_use()
    times = []
    for _ in range(1 + _LARGE_ROUNDS):
        begin = time.perf_counter()
        by_tiles.start(pixels)()
        times.append(1e3 * (time.perf_counter() - begin))
    peak = _most_in_use()
    pixels = _glass(*smaller)
    whole = Stylizer([STAINED_GLASS], dtype=dtype).start(pixels)()
    off = int(np.abs(by_tiles.start(pixels)().astype(int) - whole).max())
    head: Json = {"work": "large", "name": f"{large[0]} x {large[1]}", "dtype": dtype}
    head |= {"direction": "forward", "off": off}
    if peak > before:
        head["peak"] = peak
    yield _Group(head, "tiles", {}, {"tiles": Spread.of(times[1:])})


def _glass(width: int, height: int) -> np.ndarray:
    """A picture `[1, H, W, 3]`, of panes that repeat."""
    glass = drawn_glass(128)
    times = (-(-side // len(glass)) for side in (height, width))
    return np.tile(glass, (*times, 1))[None, :height, :width]


def _most_in_use() -> int:
    """The most bytes that have been in use on the device; 0 where it does not tell."""
    return int((jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0))


def _head(work: str, size: int, batch: int, dtype: str, direction: str) -> Json:
    """Returns the columns that the rows of a network share."""
    name = f"{size} x {size}, batch {batch}"
    head: Json = {"work": work, "name": name, "size": size, "batch": batch}
    return head | {"dtype": dtype, "direction": direction}


def _made(size: int, batch: int, dtype: str) -> tuple[TransformerNet, nnx.State, jax.Array]:
    """A network, its parameters in float32, and images."""
    model = drawn(lambda: TransformerNet(rngs=nnx.Rngs(0), dtype=dtype))
    images = jax.random.uniform(jax.random.key(0), (batch, size, size, 3), maxval=255.0)
    return model, nnx.state(model, nnx.Param), images.astype(dtype)


def _drawn(*shapes: Sequence[int], dtype: str) -> list[jax.Array]:
    """Arrays of normal numbers."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    draw = partial(jax.random.normal, dtype=dtype)
    return [draw(key, tuple(shape)) for key, shape in zip(keys, shapes, strict=True)]


_Call = tuple[Any, ...]
"""A function, and its arrays."""


def _programs(calls: Mapping[str, _Call]) -> dict[str, _Program]:
    """The programs of some calls, by the same names."""
    lowered = {who: jax.jit(function).lower(*arrays) for who, (function, *arrays) in calls.items()}
    return {
        who: _Program(partial(program, *calls[who][1:]), _temporaries(program))
        for who, program in clocks.compiled(lowered).items()
    }


def _temporaries(compiled: Any) -> int:
    """The bytes that a program needs beside its arguments and results."""
    return int(compiled.memory_analysis().temp_size_in_bytes)


def _problem(work: str, name: str, dtype: str) -> tuple[Operator, Any]:
    """The operator of a norm or a layer, and its description of the call."""
    if work == "norm":
        return NORM, NormProblem(tuple(NORMS[name]), jnp.dtype(dtype), "relu")
    layer = LAYERS[name]
    x, w = (
        jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
        for shape in (layer[:4], (layer.kernel, layer.kernel, layer.channels, layer.features))
    )
    window: Keywords = {"stride": layer.stride, "padding": layer.padding}
    call = checked_call(x, w, None, upsample=layer.upsample, **window)
    activation = None if layer.residual else "relu"
    return LAYER, LayerProblem(*call.problem[:6], activation, layer.residual)


def _registered_times(
    params: nnx.State, images: jax.Array, dtype: str, *, training: bool
) -> dict[str, Spread | str]:
    """The times of other packages' networks."""
    on_cpu = device.platform() == "cpu"
    contenders = [one for one in _registered() if one.runs(dtype, on_cpu=on_cpu)]
    if not contenders:
        return {}
    model = nnx.eval_shape(lambda: TransformerNet(rngs=nnx.Rngs(0)))
    nnx.update(model, params)
    state = checkpoints.to_torch(checkpoints.variables_of(model))
    pixels = np.asarray(images, np.float32)
    found: dict[str, Spread | str] = {}
    for contender in contenders:
        found |= contender.times(state, pixels, dtype, training=training)
    return found


def _registered() -> list[RegisteredContender]:
    """The contenders of other packages."""
    return [entry.load() for entry in entry_points(group=GROUP)]
