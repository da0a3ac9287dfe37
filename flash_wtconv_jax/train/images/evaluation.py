"""The use of a trained network: scores on held-out images, the classes and masks of any."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from numpy.typing import NDArray
from PIL import Image

from flash_wtconv_jax import models
from flash_wtconv_jax.train.images import augment, decoding, loading, sources, steps
from flash_wtconv_jax.train.images.settings import Data, Settings
from pallas_kernels.common.types import Keywords

IMAGES = "images.json"
"""The file beside a network that says what its images and classes are."""
_FIELDS = ("size", "channels", "eval_crop", "mean", "std")

LEADING = ("top1", "miou")
"""The scores of images and of pixels that networks are judged by."""

Evaluator = Callable[[nnx.State, steps.Batch], tuple[steps.Sums, jax.Array]]
"""See `steps.evaluator`."""


class Trained(NamedTuple):
    """A network, and what is known of its images.

    Attributes:
        model: The network.
        data: Their size, crop, mean and deviation.
        classes: The names of its classes; numbers where nothing names them.
    """

    model: models.ConvNeXt
    data: Data
    classes: list[str]

    @property
    def of_pixels(self) -> bool:
        """Whether the network tells the classes of pixels, not of whole images."""
        return isinstance(self.model, models.Segmenter)


class Prediction(NamedTuple):
    """The likeliest classes of an image.

    Attributes:
        path: Its file.
        classes: Their names, the likeliest first.
        probabilities: Theirs.
    """

    path: Path
    classes: list[str]
    probabilities: list[float]


class Mask(NamedTuple):
    """The likeliest class of each pixel of an image.

    Attributes:
        path: Its file.
        classes: Their numbers `[H, W]`, as large as the image.
    """

    path: Path
    classes: NDArray[np.uint8]


def leading(scores: Mapping[str, float]) -> float:
    """The score that a network is judged by: that of the averages where there are some.

    Example:
        >>> leading({"loss": 1.0, "top1": 0.5, "ema_loss": 0.9, "ema_top1": 0.6})
        0.6
    """
    names = [f"{prefix}{name}" for prefix in ("ema_", "") for name in LEADING]
    return next(scores[name] for name in names if name in scores)


def described(settings: Settings, classes: Sequence[str]) -> str:
    """The content of the file that `load` reads beside a network."""
    images = {"classes": list(classes)}
    images |= {name: getattr(settings.data, name) for name in _FIELDS}
    return json.dumps(images, indent=2) + "\n"


def load(path: Path) -> Trained:
    """A network from the folder of a run, of one of its checkpoints, or from any checkpoint.

    Args:
        path: What `flash-wtconv train` has written, or whatever `models.load_network` reads. Where
            nothing beside it describes its images, they are ImageNet's.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is a network without classes, or the description does not fit.
    """
    inside = path / "network"
    model = models.load_network(inside if inside.is_dir() else path)
    without = model.head is None and not isinstance(model, models.Segmenter)
    if without or not model.config.num_classes:
        raise ValueError(f"{path} is a network without a head, which tells no classes")
    count, channels = model.config.num_classes, model.config.in_channels
    near = [folder / IMAGES for folder in (path, *list(path.absolute().parents)[:3])]
    file = next((one for one in near if path.is_dir() and one.is_file()), None)
    if file is None:
        data = Data() if channels == 3 else Data(channels=channels, mean=(0.5,), std=(0.5,))
        return Trained(model, data, list(map(str, range(count))))
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        classes = [str(name) for name in content["classes"]]
        known: Keywords = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in ((name, content[name]) for name in _FIELDS)
        }
        data = Data(**known)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged, expected classes, {', '.join(_FIELDS)}") from error
    if len(classes) != count or data.channels != channels:
        raise ValueError(
            f"{file} has {len(classes)} classes and {data.channels} channels, the network in "
            f"{path} {count} and {channels}"
        )
    return Trained(model, data, classes)


def evaluate(
    trained: Trained,
    source: sources.Source,
    *,
    batch: int = 128,
    workers: int = 0,
    on_images: Callable[[int], None] = lambda count: None,
) -> dict[str, float]:
    """The scores of a network on all images of a source; see `scores`.

    Args:
        trained: See `load`.
        source: The images, of the network's classes.
        batch: Images at once.
        workers: Processes that read images.
        on_images: Called with the number of images done.

    Raises:
        ValueError: If the classes are others, the network tells images apart and the source pixels
            or the other way round, or too many images cannot be read.
    """
    if trained.of_pixels != isinstance(source, sources.Masks):
        kinds = ("images", "images with masks")
        raise ValueError(
            f"the network tells {('images', 'pixels')[trained.of_pixels]} apart, expected "
            f"{kinds[trained.of_pixels]}, got {kinds[not trained.of_pixels]}"
        )
    named = trained.classes != list(map(str, range(len(trained.classes))))
    if len(source.classes) != len(trained.classes) or (named and source.classes != trained.classes):
        raise ValueError(
            f"the images have {len(source.classes)} classes, {', '.join(source.classes[:3])}, …, "
            f"and the network {len(trained.classes)}, {', '.join(trained.classes[:3])}, …"
        )
    data = dataclasses.replace(trained.data, workers=workers)
    batch = -(-batch // jax.device_count()) * jax.device_count()
    mesh = steps.mesh_of({}, batch)
    done = 0

    def count(arrays: loading.Arrays, said: jax.Array) -> None:
        nonlocal done
        done = min(len(source), done + len(arrays["index"]))
        on_images(done)

    return scores(
        steps.evaluator(trained.model, data, mesh),
        nnx.state(trained.model, nnx.Param),
        source,
        data,
        batch=batch,
        rows=steps.split_rows(mesh),
        on_batch=count,
    )


def predict(
    trained: Trained,
    files: Sequence[Path],
    *,
    top: int = 5,
    on_broken: Callable[[str], None] = lambda message: None,
) -> list[Prediction]:
    """The likeliest classes of images, in the order of the files.

    Args:
        trained: See `load`.
        files: The images.
        top: Classes of each.
        on_broken: Called with what cannot be read, and why; it is left out.

    Raises:
        ValueError: If the network tells pixels apart: see `predict_masks`.
    """
    if trained.of_pixels:
        raise ValueError("the network tells pixels apart, expected one that tells images apart")
    mesh = steps.mesh_of({}, jax.device_count())
    batch = -(-min(len(files), 64) // mesh.size) * mesh.size
    source = _Files(files, trained.classes)
    found: list[Prediction] = []

    def keep(arrays: loading.Arrays, logits: jax.Array) -> None:
        shares = np.asarray(jax.nn.softmax(logits), np.float64)
        for row, index in enumerate(arrays["index"].tolist()):
            if index >= len(files):
                continue
            if not arrays["read"][row]:
                on_broken(loading.reason(source, trained.data, index))
                continue
            best = np.argsort(-shares[row], kind="stable")[:top]
            names = [trained.classes[place] for place in best]
            found.append(Prediction(files[index], names, shares[row, best].tolist()))

    scores(
        steps.evaluator(trained.model, trained.data, mesh),
        nnx.state(trained.model, nnx.Param),
        source,
        # Each is told of by itself.
        dataclasses.replace(trained.data, max_broken=1.0),
        batch=batch,
        rows=steps.split_rows(mesh),
        on_batch=keep,
    )
    return found


def predict_masks(
    trained: Trained,
    files: Sequence[Path],
    *,
    on_broken: Callable[[str], None] = lambda message: None,
) -> Iterator[Mask]:
    """The classes of the pixels of images, in the order of the files.

    Each is seen whole and in its shape, its shorter side with as many pixels as in the training.

    Args:
        trained: See `load`.
        files: The images.
        on_broken: Called with what cannot be read, and why; it is left out.
    """
    definition, state = nnx.split(trained.model)

    @jax.jit
    def said(pixels: jax.Array) -> jax.Array:
        model = nnx.merge(definition, state)
        logits = model(augment.normalised(pixels, trained.data), deterministic=True)
        return jnp.argmax(cast(jax.Array, logits), -1)

    stride = trained.model.config.total_stride
    for path in files:
        try:
            image = decoding.decoded(path.read_bytes())
            size = image.size
            small = [max(1, round(side * trained.data.size / min(size) / stride)) for side in size]
            pixels = decoding.resized(image, (small[0] * stride, small[1] * stride))
            array = decoding.pixels_of(pixels, trained.data.channels)
        except Exception as error:  # Pillow raises whatever it stumbles over.
            on_broken(f"{path}: {decoding.reason(error)}")
            continue
        classes = Image.fromarray(np.asarray(said(array[None])[0], np.uint8))
        yield Mask(path, np.asarray(classes.resize(size, Image.Resampling.NEAREST)))


def scores(
    evaluator: Evaluator,
    params: nnx.State,
    source: sources.Source,
    data: Data,
    *,
    batch: int,
    rows: NamedSharding,
    on_batch: Callable[[loading.Arrays, jax.Array], None],
) -> dict[str, float]:
    """The mean loss and the scores of parameters, as `steps.means` gives them.

    Of pixels also "iou NAME", the intersection over union of each class that occurs.

    Args:
        evaluator: See `steps.evaluator`.
        params: The parameters to evaluate.
        source: The images.
        data: Size and the crop from the centre.
        batch: Images at once, of all processes together.
        rows: Where the rows of a batch lie.
        on_batch: Called with this process's arrays of each batch, and what the evaluator says of
            all of it.

    Raises:
        ValueError: If too many of the images cannot be read.
    """
    share = loading.Share(jax.process_index(), jax.process_count())
    dataset = loading.evaluation(source, data, batch=batch, share=share)
    sums: dict[str, Any] = {}
    with loading.iterating(dataset) as batches:
        for arrays in batches:
            found, said = evaluator(params, steps.on_devices(arrays, rows))
            on_batch(arrays, said)
            for name, value in jax.device_get(found).items():
                sums[name] = sums.get(name, 0) + np.asarray(value, np.float64)
    missing = len(source) - int(sums["images"])
    if missing > data.max_broken * len(source):
        raise ValueError(
            f"{missing} of {len(source)} held-out images could not be read, more than "
            f"data.max_broken, {data.max_broken:.1%}"
        )
    result = steps.means(sums)
    if "either" in sums:
        named = zip(source.classes, steps.overlaps(sums).tolist(), strict=True)
        result |= {f"iou {name}": value for name, value in named if np.isfinite(value)}
    return result


class _Files:
    """Image files of no known class, as a source; see `sources.Source`."""

    def __init__(self, files: Sequence[Path], classes: list[str]) -> None:
        self.files, self.classes = files, classes

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> sources.Sample:
        return sources.Sample(self.files[index].read_bytes(), 0)

    def name(self, index: int) -> str:
        return str(self.files[index])

    def counts(self) -> None:
        return None
