"""`flash-wtconv bench wtconvnext`: images a second of WTConvNeXt beside ConvNeXt of its size."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from flash_wtconv_jax import models
from flash_wtconv_jax.bench import clocks, profile
from flash_wtconv_jax.bench.clocks import Call
from flash_wtconv_jax.bench.networks import drawn
from flash_wtconv_jax.bench.reports import Keep, head, unkept
from flash_wtconv_jax.bench.timing import Spread, comparison
from flash_wtconv_jax.bench.wtconv import (
    Contender,
    by_both_clocks,
    check_dtype,
)
from flash_wtconv_jax.train import loop
from flash_wtconv_jax.train.images import optimizers
from flash_wtconv_jax.train.images.settings import Optimizer
from flash_wtconv_jax.train.images.vectors import Vectors
from pallas_kernels.common.device import on_cpu
from pallas_kernels.common.types import Json, Tree

MODELS: dict[str, dict[str, Callable[..., models.ConvNeXt]]] = {
    "tiny": {"WTConvNeXt": models.wtconvnext_tiny, "ConvNeXt": models.convnext_tiny},
    "small": {"WTConvNeXt": models.wtconvnext_small, "ConvNeXt": models.convnext_small},
    "base": {"WTConvNeXt": models.wtconvnext_base, "ConvNeXt": models.convnext_base},
}
"""By size, the network with WTConv and its baseline with 7x7 depthwise convolutions."""

WORK = ("inference", "training")

_NO_GRAPH = str(2**30)
"""More operations than XLA finds for a CUDA graph."""

PARTS = (
    *("stem", "downsample", "depthwise", "norm", "fold", "fc1", "slope", "fc2", "fc1_fc2"),
    *("head", "loss", "optimizer"),
)
"""The scopes of networks and steps that a profile tells apart."""


def run(
    model: str,
    progress: Callable[[str, int], Callable[[], None]],
    batch: int | None = None,
    size: int | None = None,
    dtype: str | None = None,
    work: Sequence[str] | None = None,
    profiled: bool = False,
    keep: Keep = unkept,
) -> Json:
    """Times inference, and training steps with AdamW, of a network and of its 7x7 baseline.

    A step is that of `flash-wtconv train` without augmentation, drop path and averaged weights.
    Images and state stay on the device, and a step is given the memory of the state before it.
    Parameters are float32, and dtype is that of the images and the computation.

    Args:
        model: One of `MODELS`.
        progress: Told a label and a number of steps, returns what to call after each step.
        batch: Images a call; None is 128, on a CPU 4.
        size: Their height and width; None is 224, on a CPU 64.
        dtype: One of `wtconv.DTYPES`; None is bfloat16, on a CPU float32.
        work: Some of `WORK`; None is all.
        profiled: Whether to say where the time goes too, which needs a GPU. Programs are then
            compiled without CUDA graphs, of whose kernels the profiler does not tell the origin,
            so that there are no times as users have them.
        keep: Told the report so far whenever rows are added, `left` naming what is to come.

    Returns:
        A JSON-able report: device, versions, date, the clocks and `no_device_events` as in
        `wtconv.run`, and a row for each kind of work and network with its times in milliseconds,
        `images_per_s`, `speedup`, the baseline's median over its own, and the three again as
        `users` have them; `profile`, None or a row for each part and direction of each; and the
        kinds of work that are `left`, none in the end.

    Raises:
        ValueError: An argument is out of range.
        RuntimeError: A profile is asked for, and the profiler shows no event of a GPU.
    """
    batch, size, dtype = sizes(batch, size, dtype)
    if model not in MODELS:
        raise ValueError(f"model: {model!r} is not one of {list(MODELS)}")
    check_dtype(dtype)
    for name, value in (("batch", batch), ("size", size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    works = list(dict.fromkeys(WORK if work is None else work))
    if unknown := sorted(set(works) - set(WORK)):
        raise ValueError(f"work: {unknown} is not one of {list(WORK)}")
    clock, no_device_events = clocks.best()
    users = None if profiled else clocks.users(clock)
    networks = {
        name: Network(make, batch, size, dtype, graphs=not profiled)
        for name, make in MODELS[model].items()
    }
    *_, baseline = networks
    report: Json = {
        **head("wtconvnext", clock, no_device_events),
        "model": model,
        "batch": batch,
        "size": size,
        "dtype": dtype,
        "baseline": baseline,
        "users_clock": users.name if users else None,
        "rows": [],
        "profile": [] if profiled else None,
        "left": works,
    }
    for one in [*works]:
        # One by one: XLA times convolutions and products while it compiles them.
        programs = {name: network.program(one) for name, network in networks.items()}
        calls = {name: Contender(program.call, program.call) for name, program in programs.items()}
        times, theirs = by_both_clocks(clock, users, calls, partial(progress, one))
        report["rows"] += [
            {
                "work": one,
                "contender": name,
                **_figures(times, name, baseline, batch),
                "users": _figures(theirs, name, baseline, batch) if theirs else None,
            }
            for name in calls
        ]
        if profiled:
            report["profile"] += [
                {"work": one, "contender": name, **share._asdict()}
                for name, program in programs.items()
                for share in profile.shares(program.text, program.call, PARTS)
            ]
        works.remove(one)
        keep(report)
    return report


def sizes(
    batch: int | None = None, size: int | None = None, dtype: str | None = None
) -> tuple[int, int, str]:
    """Batch, height and dtype of the images of this device, where they are not given.

    Example:
        >>> with jax.default_device(jax.devices("cpu")[0]):
        ...     sizes(batch=8)
        (8, 64, 'float32')
    """
    usual = (4, 64, "float32") if on_cpu() else (128, 224, "bfloat16")
    return (
        usual[0] if batch is None else batch,
        usual[1] if size is None else size,
        dtype or usual[2],
    )


def _figures(times: Mapping[str, Spread], name: str, baseline: str, batch: int) -> dict[str, float]:
    """The times of a network, its images a second, and its speed over the baseline's."""
    median = times[name].median
    return {
        **times[name].row(),
        "images_per_s": batch / median * 1e3,
        **comparison(times[name], times[baseline]),
    }


class Program(NamedTuple):
    """One kind of work of a network, compiled: its text, and one call of it."""

    text: str
    call: Call


class Network:
    """A network with its images and labels, and what a step does with them.

    Args:
        make: One of `MODELS`.
        batch: Images a call.
        size: Their height and width.
        dtype: The dtype of images and computation.
        graphs: Whether XLA may launch kernels as CUDA graphs.
    """

    def __init__(
        self,
        make: Callable[..., models.ConvNeXt],
        batch: int,
        size: int,
        dtype: str,
        *,
        graphs: bool = True,
    ) -> None:
        self.options: dict[str, str | bool] = (
            {} if graphs else {"xla_gpu_graph_min_graph_size": _NO_GRAPH}
        )
        network = drawn(lambda: make(rngs=nnx.Rngs(0), dtype=dtype))
        self.definition, self.params, *self.rest = nnx.split(network, nnx.Param, ...)
        self.images = jax.random.normal(jax.random.key(0), (batch, size, size, 3), dtype)
        classes = network.config.num_classes
        self.labels = jax.random.randint(jax.random.key(1), (batch,), 0, classes)
        settings = Optimizer()
        rate = optax.constant_schedule(settings.rate)
        self.optimizer = optimizers.made(settings, rate, self.params)
        self.vectors = Vectors(self.params, optimizers.kinds(settings, self.params))

    def function(self, work: str) -> tuple[Callable[..., Tree], tuple[Tree, ...]]:
        """One of `WORK`, and the arguments of a call; training returns the next state first.

        States are lists of their arrays: to take those of nnx apart and to put them together again
        can take Python as long as a GPU takes for the step.

        Args:
            work: Which.
        """
        training = work == "training"
        leaves, tree = jax.tree.flatten(
            loop.begun(self.optimizer, self.vectors.joined(self.params))
            if training
            else self.params
        )

        def logits(leaves: list[jax.Array], images: jax.Array) -> jax.Array:
            return self.logits(jax.tree.unflatten(tree, leaves), images)

        def step(
            leaves: list[jax.Array], images: jax.Array, labels: jax.Array
        ) -> tuple[list[jax.Array], jax.Array]:
            state, value = self.step(jax.tree.unflatten(tree, leaves), images, labels)
            return jax.tree.leaves(state), value

        if not training:
            return logits, (leaves, self.images)
        # A copy, because a step takes the memory of its state, and inference keeps the parameters.
        return step, ([*map(jnp.copy, leaves)], self.images, self.labels)

    def program(self, work: str) -> Program:
        """One of `WORK`, compiled.

        Args:
            work: Which.
        """
        function, arguments = self.function(work)
        donated = () if work == "inference" else (0,)
        lowered = jax.jit(function, donate_argnums=donated).lower(*arguments)
        compiled = lowered.compile(self.options)
        if work == "inference":
            return Program(compiled.as_text() or "", partial(compiled, *arguments))
        state, *others = arguments

        def train_on() -> jax.Array:
            nonlocal state
            state, value = compiled(state, *others)
            return value

        return Program(compiled.as_text() or "", train_on)

    def logits(self, params: nnx.State, images: jax.Array) -> jax.Array:
        """The network's output."""
        return cast(jax.Array, nnx.merge(self.definition, params, *self.rest)(images))

    def step(
        self, state: loop.State, images: jax.Array, labels: jax.Array
    ) -> tuple[loop.State, jax.Array]:
        """The state after a step of AdamW, and the loss before it."""

        def loss(joined: nnx.State, batch: tuple[jax.Array, jax.Array], _: jax.Array) -> loop.Sums:
            images, labels = batch
            params = self.vectors.parameters(joined)
            scores = self.logits(params, images).astype(jnp.float32)
            with jax.named_scope("loss"):
                # Picking a number of each row has no transpose on Explicit axes (JAX 0.11).
                wanted = jax.nn.one_hot(labels, scores.shape[-1])
                losses = optax.softmax_cross_entropy(scores, wanted)
                count = jnp.asarray(len(losses), jnp.int32)
                return loop.Sums(losses.sum(), count, count)

        # Nothing is by chance, so that any key will do.
        key = jax.random.key(0)
        state, metrics = loop.step(loss, self.optimizer, state, (images, labels), key)
        return state, metrics.loss
