"""Settings of a training, each of a type: read from TOML, and written back as they were resolved.

A recipe is a set of defaults by name; what a file says comes before it, and what the command line
says before both.
"""

import dataclasses
import difflib
import math
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pallas_kernels.common.arguments import checked_seed
from pallas_kernels.common.types import Keywords

Pair = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Model:
    """The network.

    Attributes:
        name: A function of `flash_wtconv_jax.models`, such as "wtconvnext_tiny", or "ConvNeXt".
        options: Fields of `models.ConvNeXtConfig`; classes and channels are those of the data.
        checkpoint: What `flash-wtconv convert` reads, to begin from; a head of another number of
            classes is left out. Then `name` may be empty: the network is the checkpoint's.
        freeze: Beginnings of the names of parameters that stay as they are, such as "stem" or
            "stages.0"; "backbone" is all but head and decoder.
        decoder: Channels of the decoder, which tells pixels apart where images have masks.
    """

    name: str = "wtconvnext_tiny"
    options: Keywords = dataclasses.field(default_factory=dict)
    checkpoint: str = ""
    freeze: tuple[str, ...] = ()
    decoder: int = 128


@dataclasses.dataclass(frozen=True)
class Data:
    """The images, and what is done to them before they are augmented.

    Attributes:
        folder: Holds `train` and `val`, each a folder of classes, of tar shards, of ArrayRecord
            files or of images and masks; or `train.npz` and `val.npz`.
        size: Side of the images that the network sees, in pixels.
        channels: 3 for colours, 1 for grey.
        scale: Least and greatest share of an image's area in a random crop.
        ratio: Least and greatest width by height of a random crop.
        eval_crop: Share of the shorter side in the centre crop of evaluation.
        randaugment: RandAugment's magnitude, of ten; 0 leaves it out.
        randaugment_ops: Operations a picture.
        mean: Of each channel, for pixels in 0 to 1.
        std: Of each channel.
        workers: Processes that read images; 0 reads them in threads.
        max_broken: Share of images that cannot be read from which on the training stops.
    """

    folder: str = ""
    size: int = 224
    channels: int = 3
    scale: Pair = (0.08, 1.0)
    ratio: Pair = (3 / 4, 4 / 3)
    eval_crop: float = 0.875
    randaugment: float = 0.0
    randaugment_ops: int = 2
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    workers: int = 0
    max_broken: float = 0.01


@dataclasses.dataclass(frozen=True)
class Augment:
    """Random changes of a batch on the device, from the step's key.

    Attributes:
        flip: Probability that an image is mirrored.
        erasing: Probability that a rectangle of an image becomes noise.
        mixup: Alpha of mixup's Beta distribution; 0 leaves it out.
        cutmix: Alpha of cutmix's; where both are on, each batch takes one of the two.
        smoothing: Share of a label that all classes have in common.
    """

    flip: float = 0.5
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.1


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with a cosine schedule.

    Attributes:
        rate: Learning rate after the warm-up.
        final_rate: Learning rate at the end.
        warmup: Epochs of the warm-up.
        weight_decay: Of kernels alone, see `models.weight_decay_mask`.
        betas: AdamW's two.
        clip: Norm that gradients are cut to; 0 leaves them.
        layer_decay: Factor on the rate of each block from the head down.
        ema: Decay of the averaged weights; 0 leaves them out.
    """

    rate: float = 1e-3
    final_rate: float = 1e-6
    warmup: float = 1.0
    weight_decay: float = 0.05
    betas: Pair = (0.9, 0.999)
    clip: float = 0.0
    layer_decay: float = 1.0
    ema: float = 0.0


@dataclasses.dataclass(frozen=True)
class Run:
    """The length of the training, its batches, devices and files.

    Attributes:
        epochs: Passes over the images.
        batch: Images of a step, of all devices and processes together.
        accumulate: Parts that a batch is computed in, one after the other, to save memory.
        seed: Of initial values, order, crops and everything else by chance.
        mesh: Devices along axes: "data" and "fsdp" split the batch, "fsdp" also the parameters,
            "model" the channels. Empty: all devices along "data".
        save_every: Steps from one checkpoint to the next; 0 is an epoch.
        keep: The last checkpoints that are kept, beside the best.
        log_every: Steps from one line of `steps.csv` to the next.
        max_steps: Steps after which to stop; 0 is all of them.
    """

    epochs: int = 300
    batch: int = 128
    accumulate: int = 1
    seed: int = 0
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    save_every: int = 0
    keep: int = 2
    log_every: int = 10
    max_steps: int = 0


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that a training is made of; the sections of the TOML file.

    Example:
        >>> settings = resolved({"recipe": "convnext_tiny", "run": {"batch": 1024}})
        >>> settings.run.epochs, settings.run.batch, settings.augment.cutmix
        (300, 1024, 1.0)
    """

    recipe: str = "plain"
    model: Model = Model()
    data: Data = Data()
    augment: Augment = Augment()
    optimizer: Optimizer = Optimizer()
    run: Run = Run()


# ConvNeXt-T's on ImageNet-1K: Liu et al., "A ConvNet for the 2020s", CVPR 2022, table 5. The
# weights of WTConvNeXt-T were trained by the same.
_CONVNEXT_TINY: dict[str, Any] = {
    "model": {"options": {"drop_path": 0.1, "dtype": "bfloat16"}},
    "data": {"randaugment": 9.0},
    "augment": {"erasing": 0.25, "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1},
    "optimizer": {"rate": 4e-3, "warmup": 20.0, "weight_decay": 0.05, "ema": 0.9999},
    "run": {"epochs": 300, "batch": 4096},
}
# Their fine-tuning of the same network, table 5 again.
_CONVNEXT_TINY_FINETUNE: dict[str, Any] = {
    "model": {"options": {"drop_path": 0.1, "dtype": "bfloat16"}},
    "data": {"randaugment": 9.0, "eval_crop": 1.0},
    "augment": {"erasing": 0.25, "smoothing": 0.1},
    "optimizer": {
        "rate": 5e-5,
        "warmup": 0.0,
        "weight_decay": 1e-8,
        "layer_decay": 0.7,
        "ema": 0.9999,
    },
    "run": {"epochs": 30, "batch": 512},
}
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "convnext_tiny": _CONVNEXT_TINY,
    "convnext_tiny_finetune": _CONVNEXT_TINY_FINETUNE,
}
"""Defaults by name."""


def read(path: Path) -> dict[str, Any]:
    """The content of a TOML file.

    Raises:
        FileNotFoundError: If there is none.
        OSError: If it cannot be read.
        ValueError: If it is no TOML; the message names file and line.
    """
    if not path.exists():
        raise FileNotFoundError(f"no file {path}, expected settings in TOML")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is no TOML: {error}") from error


def resolved(*layers: Mapping[str, Any]) -> Settings:
    """Settings of layers of nested dicts, of which later ones come before earlier ones.

    Args:
        *layers: Such as the content of a TOML file, and what the command line says.

    Raises:
        ValueError: If a key is unknown, a value is of another type or out of range, or the recipe
            is unknown.

    Example:
        >>> resolved({"run": {"epoch": 3}})
        Traceback (most recent call last):
        ...
        ValueError: run.epoch is unknown; did you mean run.epochs?
    """
    said: dict[str, Any] = {}
    for layer in layers:
        said = _merged(said, layer)
    recipe = said.get("recipe", "plain")
    if recipe not in RECIPES:
        raise ValueError(f"recipe is {recipe!r}, expected one of {', '.join(RECIPES)}")
    settings = _made(Settings, _merged(RECIPES[recipe], said), "")
    _check(settings)
    return settings


def as_toml(settings: Settings) -> str:
    """Settings as the text of a TOML file, from which `resolved` makes the same.

    Example:
        >>> settings = resolved({"run": {"mesh": {"data": 2}}})
        >>> resolved(tomllib.loads(as_toml(settings))) == settings
        True
    """
    lines = [f"recipe = {_value(settings.recipe)}"]
    for field in dataclasses.fields(settings)[1:]:
        lines += ["", f"[{field.name}]"]
        section = getattr(settings, field.name)
        lines += [
            f"{inner.name} = {_value(getattr(section, inner.name))}"
            for inner in dataclasses.fields(section)
        ]
    return "\n".join(lines) + "\n"


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        inner = result.get(key)
        both = isinstance(inner, Mapping) and isinstance(value, Mapping)
        result[key] = _merged(inner, value) if both else value  # type: ignore[arg-type]
    return result


def _made(kind: type, values: Mapping[str, Any], prefix: str) -> Any:
    """A dataclass of the values of a table, each checked against its field's type."""
    hints = typing.get_type_hints(kind)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"{prefix}{key} is unknown{_nearest(key, kind, prefix)}")
        arguments[key] = _typed(hints[key], value, f"{prefix}{key}")
    return kind(**arguments)


def _nearest(key: str, kind: type, prefix: str) -> str:
    """The known key that a wrong one most looks like, of this section or of another."""
    known = {field.name: f"{prefix}{field.name}" for field in dataclasses.fields(kind)}
    for section in dataclasses.fields(Settings):
        if dataclasses.is_dataclass(section.type):
            for field in dataclasses.fields(typing.cast(type, section.type)):
                known.setdefault(field.name, f"{section.name}.{field.name}")
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {known[near[0]]}?" if near else f"; expected one of {', '.join(known)}"


def _typed(hint: Any, value: Any, name: str) -> Any:
    """The value as a field of this type holds it."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} is {value!r}, expected a table, [{name}]")
        return _made(hint, value, f"{name}.")
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        repeated = inner[-1] is Ellipsis
        if not isinstance(value, list | tuple) or not (repeated or len(value) == len(inner)):
            count = "values" if repeated else f"{len(inner)} values"
            raise ValueError(f"{name} is {value!r}, expected a list of {count}")
        kinds = inner[:1] * len(value) if repeated else inner
        return tuple(
            _typed(kind, one, f"{name}[{place}]")
            for place, (kind, one) in enumerate(zip(kinds, value, strict=True))
        )
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} is {value!r}, expected a table of names and values")
        return {
            str(key): one if inner[1] is Any else _typed(inner[1], one, f"{name}.{key}")
            for key, one in value.items()
        }
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{name} is {value!r}, expected {_WORDS[hint]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}, expected a finite number")
    return value


_WORDS = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}


def _value(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c >= " " else f"\\u{ord(c):04x}" for c in escaped) + '"'
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        pairs = ", ".join(f"{_value(str(key))} = {_value(one)}" for key, one in value.items())
        return f"{{ {pairs} }}" if pairs else "{}"
    return repr(value)


_AT_LEAST_ONE = (
    "model.decoder",
    "data.size",
    "data.randaugment_ops",
    "run.epochs",
    "run.batch",
    "run.accumulate",
    "run.keep",
    "run.log_every",
)
_NOT_NEGATIVE = (
    "data.randaugment",
    "data.workers",
    "augment.mixup",
    "augment.cutmix",
    "optimizer.rate",
    "optimizer.final_rate",
    "optimizer.warmup",
    "optimizer.weight_decay",
    "optimizer.clip",
    "run.save_every",
    "run.max_steps",
)
_SHARES = (
    "data.eval_crop",
    "data.max_broken",
    "augment.flip",
    "augment.erasing",
    "augment.smoothing",
    "optimizer.layer_decay",
    "optimizer.ema",
)
AXES = ("data", "fsdp", "model")
"""Names of a mesh's axes."""


def _check(settings: Settings) -> None:
    """Raises ValueError for what no training can be run with."""

    def of(name: str) -> Any:
        section, _, field = name.partition(".")
        return getattr(getattr(settings, section), field)

    for names, fits, wanted in (
        (_AT_LEAST_ONE, lambda value: value >= 1, "1 or more"),
        (_NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
        (_SHARES, lambda value: 0 <= value <= 1, "a number from 0 to 1"),
    ):
        for name in names:
            if not fits(of(name)):
                raise ValueError(f"{name} is {of(name)}, expected {wanted}")
    checked_seed(settings.run.seed)
    data, run = settings.data, settings.run
    if data.channels not in (1, 3):
        raise ValueError(f"data.channels is {data.channels}, expected 3 for colours or 1 for grey")
    for name in ("mean", "std"):
        if len(getattr(data, name)) != data.channels:
            raise ValueError(
                f"data.{name} has {len(getattr(data, name))} values, expected one for each of the "
                f"{data.channels} channels"
            )
    if min(data.std) <= 0:
        raise ValueError(f"data.std is {data.std}, expected numbers above 0")
    for name in ("scale", "ratio"):
        low, high = getattr(data, name)
        if not 0 < low <= high or (name == "scale" and high > 1):
            most = " <= 1" if name == "scale" else ""
            raise ValueError(
                f"data.{name} is {low, high}, expected a least and a greatest number, "
                f"0 < least <= greatest{most}"
            )
    if data.eval_crop == 0:
        raise ValueError("data.eval_crop is 0, expected a share above it")
    if not 0 < settings.optimizer.layer_decay:
        raise ValueError("optimizer.layer_decay is 0, expected a factor above it")
    if settings.optimizer.ema == 1:
        raise ValueError("optimizer.ema is 1, with which averaged weights never change")
    if run.batch % run.accumulate:
        raise ValueError(
            f"run.accumulate is {run.accumulate}, which does not divide run.batch, {run.batch}"
        )
    for axis, count in run.mesh.items():
        if axis not in AXES:
            raise ValueError(f"run.mesh has the axis {axis!r}, expected {', '.join(AXES)}")
        if count < 1:
            raise ValueError(f"run.mesh.{axis} is {count}, expected 1 or more devices")
