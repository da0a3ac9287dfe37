"""AdamW as the settings say it: schedule, clipping, layer decay, frozen parameters."""

import re
from collections.abc import Sequence
from functools import partial

import jax
import optax

from flash_wtconv_jax.functional.weight_decay import weight_decay_mask
from flash_wtconv_jax.train.images.settings import Optimizer
from pallas_kernels.common.types import Tree


def schedule(settings: Optimizer, epoch: float, steps: int) -> optax.Schedule:
    """The learning rate by the step: it rises linearly, then falls along a cosine.

    Args:
        settings: Rates and warm-up.
        epoch: Steps of an epoch.
        steps: Steps in all.

    Example:
        >>> rate = schedule(Optimizer(rate=1.0, final_rate=0.0, warmup=1.0), 10, 20)
        >>> float(rate(0)), float(rate(10)), float(rate(20))
        (0.0, 1.0, 0.0)
    """
    warmup = min(round(settings.warmup * epoch), steps - 1)
    first = 0.0 if warmup else settings.rate
    return optax.warmup_cosine_decay_schedule(
        first, settings.rate, warmup, steps, settings.final_rate
    )


def made(
    settings: Optimizer, rate: optax.Schedule, params: Tree, freeze: Sequence[str] = ()
) -> optax.GradientTransformation:
    """The optimizer of parameters.

    Args:
        settings: See `settings.Optimizer`.
        rate: The learning rate by the step.
        params: The parameters; only their names count.
        freeze: Beginnings of the names of parameters that stay as they are.

    Raises:
        ValueError: If one of `freeze` is the beginning of no name, or all are frozen.
    """
    parts: list[optax.GradientTransformation] = []
    if settings.clip:
        parts.append(optax.clip_by_global_norm(settings.clip))
    one, two = settings.betas
    parts.append(
        optax.adamw(
            rate, b1=one, b2=two, weight_decay=settings.weight_decay, mask=weight_decay_mask
        )
    )
    if settings.layer_decay != 1:
        parts.append(_scaled(layer_scales(params, settings.layer_decay)))
    optimizer = optax.chain(*parts)
    if not freeze:
        return optimizer
    _check_frozen(params, freeze)
    # By the names of what it is given: vectors are named after one of their parameters.
    labels = partial(_labels, freeze)
    return optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def kinds(
    settings: Optimizer, params: Tree, freeze: Sequence[str] = ()
) -> list[tuple[bool, float, str]]:
    """The properties by which the optimizer of `made` distinguishes parameters.

    Args:
        settings: As `made` takes them.
        params: The parameters; only their names count.
        freeze: As `made` takes it.

    Returns:
        For each, in the order of `jax.tree.leaves`, whether it takes weight decay, the factor on
        its rate, and "trained" or "frozen".

    Example:
        >>> kinds(Optimizer(), {"fc": {"bias": 0.0, "kernel": 0.0}}, ["fc.bias"])
        [(False, 1.0, 'frozen'), (True, 1.0, 'trained')]
    """
    scales = layer_scales(params, settings.layer_decay)
    factors = jax.tree.map(scales.__getitem__, names_of(params))
    trees = weight_decay_mask(params), factors, _labels(freeze, params)
    return [*zip(*map(jax.tree.leaves, trees), strict=True)]


def names_of(params: Tree) -> Tree:
    """The same tree with the name of each parameter, such as "stages.0.blocks.1.norm.scale".

    Example:
        >>> names_of({"stages": [{"kernel": 1.0}]})
        {'stages': [{'kernel': 'stages.0.kernel'}]}
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: _joined(path), params)


def _joined(path: Sequence[object]) -> str:
    keys = [getattr(key, "key", getattr(key, "name", getattr(key, "idx", None))) for key in path]
    # An nnx variable adds an entry of its own below its name.
    return ".".join(str(key) for key in keys if key not in (None, "value"))


def _check_frozen(params: Tree, freeze: Sequence[str]) -> None:
    """Raises ValueError where one is the beginning of no name, or all would be frozen."""
    names = jax.tree.leaves(names_of(params))
    for one in freeze:
        if not any(_begins(name, one) for name in names):
            parts = sorted({name.partition(".")[0] for name in names})
            raise ValueError(
                f"model.freeze has {one!r}, but no parameter's name begins so; there are "
                f"{', '.join(parts)}, and parts of them such as {names[0]}"
            )
    if "trained" not in jax.tree.leaves(_labels(freeze, params)):
        raise ValueError(f"model.freeze is {list(freeze)}, which leaves nothing to train")


def _labels(freeze: Sequence[str], params: Tree) -> Tree:
    def label(name: str) -> str:
        return "frozen" if any(_begins(name, one) for one in freeze) else "trained"

    return jax.tree.map(label, names_of(params))


def _begins(name: str, beginning: str) -> bool:
    if beginning == "backbone":
        return name.partition(".")[0] not in ("head", "decoder")
    return f"{name}.".startswith(f"{beginning}.")


def layer_scales(params: Tree, decay: float) -> dict[str, float]:
    """Factors on the rates by the names of parameters: smaller the further from the head.

    Args:
        params: The parameters; only their names count.
        decay: The factor of a block on that of the block behind it.

    Example:
        >>> layer_scales({"stem": {"bias": 0.0}, "head": {"bias": 0.0}}, 0.5)
        {'head.bias': 1.0, 'stem.bias': 0.5}
    """
    places = {name: _place(name) for name in jax.tree.leaves(names_of(params))}
    order = sorted(set(places.values()), reverse=True)
    return {name: decay ** order.index(place) for name, place in places.items()}


def _scaled(scales: dict[str, float]) -> optax.GradientTransformation:
    def update(updates: Tree, params: Tree | None = None) -> Tree:
        return jax.tree.map(lambda one, name: one * scales[name], updates, names_of(updates))

    return optax.stateless(update)


def _place(name: str) -> tuple[int, ...]:
    """The place of a parameter between image and head: stem, stage and block, head."""
    found = re.match(r"stages\.(\d+)\.(?:blocks\.(\d+)|downsample)", name)
    if found:
        # A stage's downsampling belongs to its first block.
        return 1, int(found[1]), int(found[2] or 0)
    return (0,) if name.startswith("stem") else (2,)
