"""Trains a network on one style: perceptual losses over crops of photographs.

Source: Johnson, Alahi and Fei-Fei, "Perceptual Losses for Real-Time Style Transfer and
Super-Resolution", ECCV 2016. Each loss is relative to its target, so that weights mean the same
whatever the features.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from flash_wtconv_jax import checkpoints, pictures
from flash_wtconv_jax.models import StyleViT, TransformerNet
from flash_wtconv_jax.pictures import Picture
from flash_wtconv_jax.train import vgg
from pallas_kernels.common.arguments import checked_seed
from pallas_kernels.common.files import replacing
from pallas_kernels.common.types import Tree

_CONTENT = 1
"""The block of features that content is compared in, `relu2_2`."""
_LEAST_CROP = 32
"""The last block of features then has 4 x 4 pixels."""


class Settings(NamedTuple):
    """How a style is trained; a run goes on with the settings that it began with alone.

    Attributes:
        steps: Steps in all.
        batch: Crops of a step.
        crop: Their side in pixels.
        rate: Adam's first rate, which falls to a twentieth along a cosine.
        content_weight: Weight of the content's loss.
        style_weight: Weight of the style's, the sum over four blocks of features.
        smooth_weight: Weight of the differences of neighbouring pixels.
        seed: Of initial values, crops and mirroring.
        dtype: Of the computation.
        model: "transformer_net", or "style_vit" for a StyleViT of 4 blocks, which sees the style's
            picture too.
    """

    steps: int = 2000
    batch: int = 4
    crop: int = 256
    rate: float = 1e-3
    content_weight: float = 1.0
    style_weight: float = 3.0
    smooth_weight: float = 0.05
    seed: int = 0
    dtype: str = "float32"
    model: str = "transformer_net"


class Losses(NamedTuple):
    """The losses of a step, each relative to its target, and their weighted sum."""

    total: jax.Array
    content: jax.Array
    style: jax.Array
    smooth: jax.Array


MODELS = ("transformer_net", "style_vit")
"""Names of the networks."""

FILES = {
    "style.safetensors": "the TransformerNet in PyTorch's names, for `stylize --style`",
    "network": "the StyleViT's variables, for `checkpoints.restore` and `load_into`",
    "checkpoint": "what `--resume` goes on from",
    "losses.csv": "the losses of every step",
    "sample.png": "a photograph, and what the network makes of it",
}
"""The files that a run leaves in its folder; of the networks the one that was trained."""

Network = TransformerNet | StyleViT


def train(
    out: Path,
    photographs: Sequence[np.ndarray],
    style: np.ndarray,
    layers: vgg.Layers,
    settings: Settings,
    *,
    resume: bool = False,
    save_every: int = 500,
    on_step: Callable[[int, Losses], None] = lambda step, losses: None,
) -> Network:
    """Trains a network, and writes it with its losses into a folder.

    A run that was stopped goes on from its last checkpoint, and ends bitwise as if it had not been.

    Args:
        out: The folder, which exists.
        photographs: Pixels `[H, W, 3]` of uint8, at least `crop` high and wide.
        style: Pixels of the picture whose style is learnt.
        layers: The network of the losses' features.
        settings: See `Settings`.
        resume: Whether to go on from the folder's checkpoint, if there is one.
        save_every: Steps from one checkpoint to the next.
        on_step: Called with the number of steps done and the losses of the last.

    Returns:
        The trained network.

    Raises:
        ValueError: If photographs are too small, settings out of range, or settings or pictures not
            those of the checkpoint; or if a loss is no longer a number.
        OSError: If the folder cannot be written to.
    """
    _check(photographs, style, settings)
    model = _new_network(settings)
    definition, params = nnx.split(model, nnx.Param)
    optimizer = optax.adam(optax.cosine_decay_schedule(settings.rate, settings.steps, 0.05))
    state = (params, optimizer.init(params))
    done = 0
    rows: list[list[float]] = []
    inputs = _digest(photographs, style, layers)
    if resume and (out / "checkpoint").exists():
        state, done, rows = _restored(out / "checkpoint", state, settings, inputs)
    picture = jnp.asarray(style[None], settings.dtype)
    target = [_gram(one) for one in vgg.features(layers, picture)]
    step = jax.jit(partial(_step, definition, optimizer, settings), donate_argnums=0)
    for index in range(done, settings.steps):
        images = jnp.asarray(_crops(photographs, settings, index), settings.dtype)
        state, losses = step(state, layers, picture, target, images)
        rows.append([float(one) for one in jax.device_get(losses)])
        if not np.isfinite(rows[-1][0]):
            raise ValueError(
                f"step {index + 1}: the loss is {rows[-1][0]}; a smaller rate than {settings.rate} "
                "may help, and the checkpoint before is as it was"
            )
        on_step(index + 1, losses)
        if (index + 1) % save_every == 0 and index + 1 < settings.steps:
            _save(out / "checkpoint", state, settings, inputs, rows)
    nnx.update(model, state[0])
    _save(out / "checkpoint", state, settings, inputs, rows)
    _write(out, model, rows, photographs[0], picture, settings)
    return model


def losses_of(
    layers: vgg.Layers,
    target: Sequence[jax.Array],
    images: jax.Array,
    styled: jax.Array,
    settings: Settings,
) -> Losses:
    """The losses of styled images.

    Args:
        layers: The network of the features.
        target: The Gram matrix of each block of the style's features.
        images: The photographs `[N, H, W, 3]`, 0 to 255.
        styled: What the network makes of them.
        settings: The weights.
    """
    of_styled = vgg.features(layers, styled)
    of_image = vgg.features(layers, images)[_CONTENT].astype(jnp.float32)
    difference = of_styled[_CONTENT].astype(jnp.float32) - of_image
    content = jnp.square(difference).mean() / jnp.square(of_image).mean()
    style = sum(
        jnp.square(_gram(found) - wanted).mean() / jnp.square(wanted).mean()
        for found, wanted in zip(of_styled, target, strict=True)
    )
    y = styled.astype(jnp.float32) / 255
    smooth = jnp.abs(jnp.diff(y, axis=1)).mean() + jnp.abs(jnp.diff(y, axis=2)).mean()
    # What no picture can show is no way to a smaller loss.
    beyond = (jnp.square(nnx.relu(y - 1)) + jnp.square(nnx.relu(-y))).mean()
    total = (
        settings.content_weight * content
        + settings.style_weight * style
        + settings.smooth_weight * smooth
        + beyond
    )
    return Losses(total, content, jnp.asarray(style), smooth)


def _check(photographs: Sequence[np.ndarray], style: np.ndarray, settings: Settings) -> None:
    checked_seed(settings.seed)
    if settings.model not in MODELS:
        raise ValueError(f"model is {settings.model!r}, expected one of {', '.join(MODELS)}")
    for name, least in (("steps", 1), ("batch", 1), ("crop", _LEAST_CROP)):
        if getattr(settings, name) < least:
            raise ValueError(f"{name} is {getattr(settings, name)}, expected at least {least}")
    if not photographs:
        raise ValueError("photographs is empty, expected pixels [H, W, 3] of at least one")
    sizes = [min(one.shape[:2]) for one in photographs]
    if min(sizes) < settings.crop:
        raise ValueError(
            f"photographs[{int(np.argmin(sizes))}] has {min(sizes)} pixels along its shorter side, "
            f"expected at least the crop's {settings.crop}"
        )
    if min(style.shape[:2]) < _LEAST_CROP:
        raise ValueError(
            f"style has shape {style.shape}, expected [H, W, 3] with H and W of at least "
            f"{_LEAST_CROP}: give a larger picture"
        )


def _new_network(settings: Settings) -> Network:
    """A network; the first pictures of a TransformerNet are grey ones, not black."""
    if settings.model == "style_vit":
        return StyleViT("nano", dtype=settings.dtype, rngs=nnx.Rngs(settings.seed))
    model = TransformerNet(dtype=settings.dtype, rngs=nnx.Rngs(settings.seed))
    model.deconv3.kernel[...] = model.deconv3.kernel[...] * 20
    if model.deconv3.bias is not None:
        model.deconv3.bias[...] = jnp.full_like(model.deconv3.bias[...], 120)
    return model


def _styled(model: Network, images: jax.Array, picture: jax.Array) -> jax.Array:
    return model(images, picture) if isinstance(model, StyleViT) else model(images)


def _crops(photographs: Sequence[np.ndarray], settings: Settings, step: int) -> np.ndarray:
    """The batch of a step, which depends on the seed and the step alone: uint8 `[N, S, S, 3]`."""
    rng = np.random.default_rng([settings.seed, step])
    crops = []
    for _ in range(settings.batch):
        pixels = photographs[int(rng.integers(len(photographs)))]
        shorter = min(pixels.shape[:2])
        # From half of the photograph on, so that things have many sizes.
        side = int(rng.integers(max(settings.crop, shorter // 2), shorter + 1))
        row, column = (int(rng.integers(extent - side + 1)) for extent in pixels.shape[:2])
        crop = pixels[row : row + side, column : column + side]
        resized = pictures.resized(Picture(crop), settings.crop).pixels
        crops.append(resized[:, ::-1] if rng.random() < 0.5 else resized)
    return np.stack(crops)


def _gram(features: jax.Array) -> jax.Array:
    """The mean product of each pair of features over the pixels, float32 `[N, C, C]`."""
    count = features.shape[1] * features.shape[2]
    rows = features.reshape(features.shape[0], count, -1)
    # Sums of 16 bits would overflow.
    products = jnp.einsum("npc,npd->ncd", rows, rows, preferred_element_type=jnp.float32)
    return products / count


_State = tuple[nnx.State, optax.OptState]


def _step(
    definition: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    settings: Settings,
    state: _State,
    layers: vgg.Layers,
    picture: jax.Array,
    target: Sequence[jax.Array],
    images: jax.Array,
) -> tuple[_State, Losses]:
    params, memory = state

    def loss(params: nnx.State) -> tuple[jax.Array, Losses]:
        styled = _styled(nnx.merge(definition, params), images, picture)
        losses = losses_of(layers, target, images, styled, settings)
        return losses.total, losses

    gradients, losses = jax.grad(loss, has_aux=True)(params)
    updates, memory = optimizer.update(gradients, memory, params)
    return (optax.apply_updates(params, updates), memory), losses


def _digest(*arrays: Tree) -> np.ndarray:
    """A number of 256 bits that tells arrays from others, as bytes."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(arrays):
        array = np.ascontiguousarray(leaf)
        found.update(repr((array.shape, array.dtype)).encode())
        found.update(array.data)
    return np.frombuffer(found.digest(), np.uint8)


def _save(
    folder: Path,
    state: _State,
    settings: Settings,
    inputs: np.ndarray,
    rows: Sequence[Sequence[float]],
) -> None:
    """Writes a checkpoint in place of the one before; a kill leaves one of the two."""
    leaves = jax.tree.leaves(state)
    arrays = {
        "settings": np.frombuffer(json.dumps(settings._asdict()).encode(), np.uint8),
        "inputs": inputs,
        "losses": np.asarray(rows, np.float64),
        "state": {f"{index:04d}": np.asarray(leaf) for index, leaf in enumerate(leaves)},
    }
    checkpoints.save(folder, arrays, force=True)


def _restored(
    folder: Path, like: _State, settings: Settings, inputs: np.ndarray
) -> tuple[_State, int, list[list[float]]]:
    """The state of a checkpoint, the steps done, and their losses."""
    arrays: Tree = checkpoints.restore(folder)
    leaves, structure = jax.tree.flatten(like)
    try:
        kept = Settings(**json.loads(bytes(np.asarray(arrays["settings"], np.uint8))))
        rows = np.asarray(arrays["losses"]).reshape(-1, len(Losses._fields)).tolist()
        found = [arrays["state"][f"{index:04d}"] for index in range(len(leaves))]
    except (KeyError, TypeError, ValueError):
        found = []
    if [np.shape(one) for one in found] != [leaf.shape for leaf in leaves]:
        raise ValueError(f"{folder} is no checkpoint of train-style; name another folder")
    differ = [
        f"{name} is {new}, was {old}"
        for name, old, new in zip(Settings._fields, kept, settings, strict=True)
        if old != new
    ]
    if differ:
        raise ValueError(f"{folder} was made with other settings: {'; '.join(differ)}")
    if not np.array_equal(arrays.get("inputs"), inputs):
        raise ValueError(f"{folder} was made with another style, photographs or features")
    state_of = [jnp.asarray(array, leaf.dtype) for array, leaf in zip(found, leaves, strict=True)]
    state = jax.tree.unflatten(structure, state_of)
    return state, len(rows), rows


def _write(
    out: Path,
    model: Network,
    rows: Sequence[Sequence[float]],
    photograph: np.ndarray,
    picture: jax.Array,
    settings: Settings,
) -> None:
    """Writes what a run leaves beside its checkpoint."""
    variables = checkpoints.variables_of(model)
    if isinstance(model, TransformerNet):
        tensors = checkpoints.to_torch(variables, "transformer_net")
        checkpoints.write_state_dict(out / "style.safetensors", tensors, force=True)
    else:
        checkpoints.save(out / "network", variables, force=True)
    with (
        replacing(out / "losses.csv", force=True) as temporary,
        temporary.open("w", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["step", *Losses._fields])
        writer.writerows([index, *row] for index, row in enumerate(rows, 1))
    longer = 2 * settings.crop
    seen = pictures.resized(Picture(photograph), longer).pixels
    styled = nnx.jit(_styled)(model, jnp.asarray(seen[None], settings.dtype), picture)
    result = np.asarray(styled[0, : len(seen), : seen.shape[1]], np.float32)
    pixels = np.concatenate([seen, np.rint(result.clip(0, 255)).astype(np.uint8)], 1)
    pictures.write(out / "sample.png", Picture(pixels), force=True)
