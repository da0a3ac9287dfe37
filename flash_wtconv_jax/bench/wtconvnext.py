"""`flash-wtconv bench wtconvnext`: images a second of WTConvNeXt beside ConvNeXt of its size."""

from collections.abc import Callable
from datetime import date
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from flash_wtconv_jax import environment, models
from flash_wtconv_jax.bench import clocks
from flash_wtconv_jax.bench.clocks import Call
from flash_wtconv_jax.bench.wtconv import check_dtype
from pallas_kernels.common.device import on_cpu
from pallas_kernels.common.types import Json, Tree

MODELS: dict[str, dict[str, Callable[..., models.ConvNeXt]]] = {
    "tiny": {"WTConvNeXt": models.wtconvnext_tiny, "ConvNeXt": models.convnext_tiny},
    "small": {"WTConvNeXt": models.wtconvnext_small, "ConvNeXt": models.convnext_small},
    "base": {"WTConvNeXt": models.wtconvnext_base, "ConvNeXt": models.convnext_base},
}
"""By size, the network with WTConv and its baseline with 7x7 depthwise convolutions."""

WORK = ("inference", "training")
Step = Callable[[Tree, jax.Array, jax.Array], tuple[Tree, jax.Array]]
"""A function of a state, images and labels to the next state and the loss."""


def run(
    model: str,
    progress: Callable[[str, int], Callable[[], None]],
    batch: int | None = None,
    size: int | None = None,
    dtype: str | None = None,
) -> Json:
    """Times inference, and training steps with AdamW, of a network and of its 7x7 baseline.

    Images and state stay on the device, and a step is given the memory of the state before it.
    Parameters are float32, and dtype is that of the images and the computation.

    Args:
        model: One of `MODELS`.
        progress: Told a label and a number of steps, returns what to call after each step.
        batch: Images a call; None is 128, on a CPU 4.
        size: Their height and width; None is 224, on a CPU 64.
        dtype: One of `wtconv.DTYPES`; None is bfloat16, on a CPU float32.

    Returns:
        A JSON-able report: device, versions, date, `clock` and `no_device_events` as in
        `wtconv.run`, and a row for each kind of work and network with its times in milliseconds,
        `images_per_s`, and `speedup`, the baseline's median over its own.

    Raises:
        ValueError: An argument is out of range.
    """
    batch = (4 if on_cpu() else 128) if batch is None else batch
    size = (64 if on_cpu() else 224) if size is None else size
    dtype = dtype or ("float32" if on_cpu() else "bfloat16")
    if model not in MODELS:
        raise ValueError(f"model: {model!r} is not one of {list(MODELS)}")
    check_dtype(dtype)
    for name, value in (("batch", batch), ("size", size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    clock, no_device_events = clocks.best()
    calls: dict[str, dict[str, Call]] = {work: {} for work in WORK}
    for name, make in MODELS[model].items():
        for work, call in _calls(make, batch, size, dtype).items():
            calls[work][name] = call
    *_, baseline = MODELS[model]
    rows = []
    for work in WORK:
        step = progress(work, clock.turns(len(calls[work])))
        times = clock.take_turns(calls[work], step)
        rows += [
            {
                "work": work,
                "contender": name,
                **{f"{key}_ms": value for key, value in spread._asdict().items()},
                "images_per_s": batch / spread.median * 1e3,
                "speedup": times[baseline].median / spread.median,
            }
            for name, spread in times.items()
        ]
    return {
        "benchmark": "wtconvnext",
        "date": date.today().isoformat(),
        "device": environment.device(),
        "versions": environment.versions(),
        "model": model,
        "batch": batch,
        "size": size,
        "dtype": dtype,
        "baseline": baseline,
        "clock": clock.name,
        "no_device_events": no_device_events,
        "rows": rows,
    }


def _calls(
    make: Callable[..., models.ConvNeXt], batch: int, size: int, dtype: str
) -> dict[str, Call]:
    """Both kinds of work of one network, compiled."""
    network = nnx.jit(lambda: make(rngs=nnx.Rngs(0), dtype=dtype))()
    definition, params, *rest = nnx.split(network, nnx.Param, ...)
    images = jax.random.normal(jax.random.key(0), (batch, size, size, 3), dtype)
    labels = jax.random.randint(jax.random.key(1), (batch,), 0, network.config.num_classes)

    def logits(params: nnx.State, images: jax.Array) -> jax.Array:
        return cast(jax.Array, nnx.merge(definition, params, *rest)(images))

    infer = jax.jit(logits).lower(params, images).compile()
    state, step = training(network)
    # A copy, because a step takes the memory of its state, and inference keeps the parameters.
    state = jax.tree.map(jnp.copy, state)
    train = jax.jit(step, donate_argnums=0).lower(state, images, labels).compile()

    def train_on() -> jax.Array:
        nonlocal state
        state, value = train(state, images, labels)
        return value

    return {"inference": partial(infer, params, images), "training": train_on}


def training(network: models.ConvNeXt) -> tuple[Tree, Step]:
    """A training step with AdamW.

    Args:
        network: The network, whose parameters are trained from where they are.

    Returns:
        The state that it begins with, and the step: a function of a state, images and labels to the
        next state and the loss.
    """
    definition, params, *rest = nnx.split(network, nnx.Param, ...)
    optimizer = optax.adamw(1e-3, weight_decay=0.05, mask=models.weight_decay_mask)

    def loss(params: nnx.State, images: jax.Array, labels: jax.Array) -> jax.Array:
        scores = cast(jax.Array, nnx.merge(definition, params, *rest)(images)).astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(scores, labels).mean()

    def step(state: Tree, images: jax.Array, labels: jax.Array) -> tuple[Tree, jax.Array]:
        params, memory = state
        value, gradients = jax.value_and_grad(loss)(params, images, labels)
        updates, memory = optimizer.update(gradients, memory, params)
        return (optax.apply_updates(params, updates), memory), value

    return (params, optimizer.init(params)), step
