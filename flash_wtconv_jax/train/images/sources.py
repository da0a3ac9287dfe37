"""Images by index: in folders of classes or with masks, tar shards, ArrayRecord files and arrays.

Each is a random-access source of grain: `len(source)`, `source[i]`, and `classes`. Reading one
image reads nothing else, so that any order costs the same.
"""

import json
import mmap
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pallas_kernels.common.files import replacing

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
"""Endings of the files that are taken for images."""
INDEX = "index.json"
"""The file beside tar shards that says where in them each image lies."""
CLASSES = "classes.json"
"""The file that names the classes: beside ArrayRecord files, or above images with masks."""
IMAGES, MASKS = "images", "masks"
"""The two folders of images with masks."""
UNLABELLED = 255
"""The pixel of a mask that is of no class."""


class Sample(NamedTuple):
    """One image as it is stored.

    Attributes:
        content: The bytes of its file, or its pixels.
        label: Its class, or the bytes of the mask's file.
    """

    content: bytes | NDArray[np.uint8]
    label: int | bytes


class Source(Protocol):
    """Images with a class or a mask of classes each, by index.

    Attributes:
        classes: The names of the classes, in the order of their numbers.
    """

    classes: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...

    def name(self, index: int) -> str:
        """The name of an image in messages: its file."""

    def counts(self) -> list[int] | None:
        """Images of each class; None where only reading all of them would tell."""


class ImageFolder:
    """A folder of a folder for each class, as torchvision's `ImageFolder` has it.

    Args:
        folder: The folder; classes are numbered by the order of their names.

    Raises:
        ValueError: If it holds no folder of a class.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "cat").mkdir()
        >>> _ = (folder / "cat" / "0.png").write_bytes(b"...")
        >>> ImageFolder(folder)[0]
        Sample(content=b'...', label=0)
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
        if not self.classes:
            raise ValueError(f"{folder} holds no folder of a class, such as {folder / 'cat'}")
        self.files: list[str] = []
        labels = []
        for label, name in enumerate(self.classes):
            found = sorted(_images_below(folder / name))
            self.files += [os.path.relpath(path, folder) for path in found]
            labels += [label] * len(found)
        self.labels = np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        content = (self.folder / self.files[index]).read_bytes()
        return Sample(content, int(self.labels[index]))

    def name(self, index: int) -> str:
        """The path of the file."""
        return str(self.folder / self.files[index])

    def counts(self) -> list[int]:
        """Images of each class."""
        return np.bincount(self.labels, minlength=len(self.classes)).tolist()


class TarShards:
    """Tar files of images, each read at its offset.

    Each image has beside it, in the same shard and under the same name, a `.cls` file with the
    number of its class, as in WebDataset. The index of offsets, `index.json`, is made when it is
    first needed; it is what makes access random.

    Args:
        folder: Holds `*.tar`.

    Raises:
        ValueError: If the index is of other shards, or a shard is damaged or has an image without a
            class.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / INDEX
        if not path.is_file():
            index_shards(folder)
        try:
            index = json.loads(path.read_text())
            self.shards: list[str] = index["shards"]
            self.classes: list[str] = index["classes"]
            self.names: list[str] = index["names"]
            self.places = np.asarray(index["places"], np.int64).reshape(-1, 4)
            sizes: list[int] = index["sizes"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged; delete it, and it is made anew") from error
        if [(folder / shard).stat().st_size for shard in _shards(folder)] != sizes:
            raise ValueError(f"{path} is an index of other shards; delete it, and it is made anew")

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Sample:
        shard, offset, size, label = self.places[index].tolist()
        # Mapped into memory they have no position, which threads would have to share.
        return Sample(self._shards[shard][offset : offset + size], label)

    def __getstate__(self) -> dict[str, Any]:
        # Each process opens the shards for itself.
        return {name: value for name, value in vars(self).items() if name != "_shards"}

    @cached_property
    def _shards(self) -> list[mmap.mmap]:
        def mapped(path: Path) -> mmap.mmap:
            with path.open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

        return [mapped(self.folder / shard) for shard in self.shards]

    def name(self, index: int) -> str:
        """The shard, and the image's name in it."""
        return f"{self.folder / self.shards[self.places[index, 0]]}:{self.names[index]}"

    def counts(self) -> list[int]:
        """Images of each class."""
        return np.bincount(self.places[:, 3], minlength=len(self.classes)).tolist()


def index_shards(folder: Path, classes: Sequence[str] | None = None) -> None:
    """Reads the headers of tar shards and writes the index of offsets beside them.

    Args:
        folder: Holds `*.tar`.
        classes: Names of the classes; None numbers them "0", "1", ….

    Raises:
        OSError: If the index cannot be written.
        ValueError: If a shard is damaged, or an image has no class.
    """
    shards = _shards(folder)
    names: list[str] = []
    places: list[tuple[int, int, int, int]] = []
    for number, shard in enumerate(shards):
        images: dict[str, tarfile.TarInfo] = {}
        labels: dict[str, int] = {}
        try:
            with tarfile.open(folder / shard, "r:") as archive:
                for member in archive:
                    stem, suffix = os.path.splitext(member.name)
                    if suffix.lower() in SUFFIXES:
                        images[stem] = member
                    elif suffix == ".cls" and (file := archive.extractfile(member)):
                        labels[stem] = int(file.read())
        except (tarfile.TarError, ValueError) as error:
            raise ValueError(f"{folder / shard} is a damaged shard: {error}") from error
        if missing := sorted(images.keys() - labels.keys()):
            raise ValueError(f"{folder / shard}: {missing[0]} has no class, expected a .cls file")
        for stem, member in images.items():
            names.append(member.name)
            places.append((number, member.offset_data, member.size, labels[stem]))
    most = max((label for *_, label in places), default=-1)
    if classes is not None and most >= len(classes):
        raise ValueError(f"{folder}: an image has class {most} of {len(classes)}, counted from 0")
    index = {
        "shards": shards,
        "sizes": [(folder / shard).stat().st_size for shard in shards],
        "classes": list(map(str, range(most + 1))) if classes is None else list(classes),
        "names": names,
        "places": places,
    }
    with replacing(folder / INDEX, force=True) as temporary:
        temporary.write_text(json.dumps(index))


def _shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.tar"))


class ArrayRecords:
    """ArrayRecord files of `tf.train.Example`, as TFDS and `data pack` write them.

    Args:
        folder: Holds `*.array_record*`, and the names of the classes: a line each in TFDS's
            `label.labels.txt`, or a list in `classes.json`.

    Raises:
        ValueError: If nothing names the classes.
    """

    def __init__(self, folder: Path) -> None:
        self.files = [str(path) for path in sorted(folder.glob("*.array_record*"))]
        lists = [folder / CLASSES, folder / "label.labels.txt"]
        named = next((path for path in lists if path.is_file()), None)
        if named is None:
            raise ValueError(
                f"nothing in {folder} names the classes: write their names, in order, as a list "
                f"into {folder / CLASSES}"
            )
        text = named.read_text(encoding="utf-8")
        self.classes = json.loads(text) if named.name == CLASSES else text.split("\n")
        self.classes = [name for name in self.classes if name]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Sample:
        content, label = read_example(self._records[index])
        return Sample(content, label)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_records"}

    @cached_property
    def _records(self) -> Any:
        from grain.sources import ArrayRecordDataSource

        return ArrayRecordDataSource(self.files)

    def name(self, index: int) -> str:
        """The number of the record, counted over all files."""
        return f"record {index} of {self.files[0]}" + ("" if len(self.files) == 1 else ", …")

    def counts(self) -> None:
        """None: the classes are inside the records."""


class Arrays:
    """Images and classes in memory, or in a `.npz` file.

    Args:
        images: `uint8 [N, H, W]` or `[N, H, W, C]`.
        labels: Integers `[N]`, the classes.
        classes: Their names; None numbers them.
        title: What they are called in messages.

    Raises:
        ValueError: If shapes or dtypes are others.

    Example:
        >>> len(Arrays(np.zeros((3, 8, 8), np.uint8), np.array([0, 1, 1])))
        3
    """

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[np.integer],
        classes: Sequence[str] | None = None,
        title: str = "images",
    ) -> None:
        if images.dtype != np.uint8 or images.ndim not in (3, 4):
            raise ValueError(
                f"{title}: images are {images.dtype} {images.shape}, expected uint8 [N, H, W] or "
                "[N, H, W, C]"
            )
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"{title}: labels are {labels.dtype} {labels.shape}, expected integers of shape "
                f"{images.shape[:1]}"
            )
        count = len(classes) if classes is not None else int(labels.max(initial=-1)) + 1
        if labels.size and not 0 <= labels.min() <= labels.max() < count:
            raise ValueError(
                f"{title}: labels go from {labels.min()} to {labels.max()}, expected 0 to "
                f"{count - 1}"
            )
        self.images, self.labels, self.title = images, labels, title
        self.classes = list(map(str, range(count) if classes is None else classes))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.images[index], int(self.labels[index]))

    def name(self, index: int) -> str:
        """The number of the image."""
        return f"image {index} of {self.title}"

    def counts(self) -> list[int]:
        """Images of each class."""
        return np.bincount(self.labels, minlength=len(self.classes)).tolist()


class Masks:
    """A folder `images` and a folder `masks`, in which a PNG of the same name tells each pixel.

    A mask has one channel of 8 bits: the numbers of the classes, and 255 where there is none.

    Args:
        folder: Holds the two folders.
        named: The list of the classes' names, a JSON file.

    Raises:
        ValueError: If nothing names the classes, or an image has no mask.
    """

    def __init__(self, folder: Path, named: Path) -> None:
        self.folder = folder
        try:
            self.classes: list[str] = list(map(str, json.loads(named.read_text("utf-8"))))
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(
                f"nothing names the classes of {folder / MASKS}: write their names, in order, as a "
                f"list into {named}"
            ) from error
        if not 0 < len(self.classes) <= UNLABELLED:
            raise ValueError(f"{named} names {len(self.classes)} classes, expected 1 to 255")
        inside = folder / IMAGES
        self.files = [os.path.relpath(path, inside) for path in sorted(_images_below(inside))]
        for index in range(len(self.files)):
            if not self._mask(index).is_file():
                raise ValueError(f"{self.name(index)} has no mask, expected {self._mask(index)}")

    def _mask(self, index: int) -> Path:
        return (self.folder / MASKS / self.files[index]).with_suffix(".png")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        content = (self.folder / IMAGES / self.files[index]).read_bytes()
        return Sample(content, self._mask(index).read_bytes())

    def name(self, index: int) -> str:
        """The path of the image's file."""
        return str(self.folder / IMAGES / self.files[index])

    def counts(self) -> None:
        """None: the classes are inside the masks."""


def read_arrays(path: Path) -> Arrays:
    """The images of a `.npz` file with `images`, `labels` and, if it has them, `classes`.

    Raises:
        ValueError: If it is no such file, or lacks one of the two.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except ValueError as error:
        raise ValueError(f"{path} is no .npz file of arrays: {error}") from error
    for name in ("images", "labels"):
        if name not in arrays:
            raise ValueError(f"{path} holds {', '.join(arrays)}, expected images and labels")
    classes = [str(name) for name in arrays["classes"]] if "classes" in arrays else None
    return Arrays(arrays["images"], arrays["labels"], classes, str(path))


def opened(folder: Path, part: str) -> Source:
    """The source of a part of a data set, whatever kind it is of.

    Args:
        folder: Holds the part.
        part: "train" or "val": a folder, or the `.npz` file of that name.

    Raises:
        FileNotFoundError: If there is no such part.
        ValueError: If it holds nothing that is known, or no images.
    """
    file = folder / f"{part}.npz"
    inside = file if file.is_file() else folder / part
    if inside == file:
        source: Source = read_arrays(file)
    elif not inside.is_dir():
        raise FileNotFoundError(
            f"{folder} has no {part}: expected a folder {inside} of a folder a class, of .tar "
            f"shards, of .array_record files or of images and masks, or a file {inside}.npz"
        )
    elif next(inside.glob("*.tar"), None):
        source = TarShards(inside)
    elif next(inside.glob("*.array_record*"), None):
        source = ArrayRecords(inside)
    elif all((inside / name).is_dir() for name in (IMAGES, MASKS)):
        source = Masks(inside, folder / CLASSES)
    else:
        source = ImageFolder(inside)
    if not len(source):
        files = f": expected files that end in {', '.join(sorted(SUFFIXES))}"
        raise ValueError(f"{inside} holds no images{files if inside != file else ''}")
    counts = source.counts() or [1] * len(source.classes)
    empty = [name for name, count in zip(source.classes, counts, strict=True) if not count]
    if empty:
        raise ValueError(
            f"{inside}: class {empty[0]!r} has no images"
            + (f", nor have {len(empty) - 1} others" if empty[1:] else "")
        )
    twice = [name for name, count in Counter(source.classes).items() if count > 1]
    if twice:
        raise ValueError(f"{inside}: two classes have the name {twice[0]!r}")
    return source


def opened_pair(folder: Path) -> tuple[Source, Source]:
    """Training and validation images of a folder, of the same classes.

    Raises:
        FileNotFoundError: If one is missing.
        ValueError: If it holds nothing that is known, or their classes differ; the message names
            those that only one has.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}, expected one that holds train and val")
    train, val = opened(folder, "train"), opened(folder, "val")
    if isinstance(train, Masks) != isinstance(val, Masks):
        raise ValueError(f"{folder}: of train and val one has masks and the other has none")
    if train.classes != val.classes:
        only = [
            f"only in {name}: {', '.join(sorted(set(one.classes) - set(other.classes))[:5])}"
            for name, one, other in (("train", train, val), ("val", val, train))
            if set(one.classes) - set(other.classes)
        ]
        reason = "; ".join(only) or "they are the same, in another order"
        raise ValueError(f"{folder}: the classes of train and val differ, {reason}")
    return train, val


def _images_below(folder: Path) -> list[str]:
    return [
        os.path.join(root, file)
        for root, _, files in os.walk(folder, followlinks=True)
        for file in files
        if os.path.splitext(file)[1].lower() in SUFFIXES
    ]


def write_example(image: bytes, label: int, name: str) -> bytes:
    """A `tf.train.Example` with `image`, `label` and `file_name`, as TFDS writes images.

    Example:
        >>> read_example(write_example(b"...", 300, "a.png"))
        (b'...', 300)
    """
    example = _example_class()()
    features = example.features.feature
    features["image"].bytes_list.value.append(image)
    features["label"].int64_list.value.append(label)
    features["file_name"].bytes_list.value.append(name.encode())
    return example.SerializeToString(deterministic=True)


def read_example(record: bytes) -> tuple[bytes, int]:
    """The image and the label of a `tf.train.Example`.

    Raises:
        ValueError: If the record is no Example, or lacks `image` or `label`.
    """
    from google.protobuf.message import DecodeError

    try:
        features = _example_class().FromString(record).features.feature
        return features["image"].bytes_list.value[0], int(features["label"].int64_list.value[0])
    except (DecodeError, IndexError) as error:
        raise ValueError("a record is no tf.train.Example with image and label") from error


def _example_class() -> Any:
    """The class of TensorFlow's message, from its definition and without TensorFlow."""
    if not _EXAMPLE:
        _EXAMPLE.append(_define_example())
    return _EXAMPLE[0]


_EXAMPLE: list[Any] = []


def _define_example() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    # A package of its own: TensorFlow, if it is imported too, defines "tensorflow".
    file = descriptor_pb2.FileDescriptorProto(
        name="flash_wtconv/example.proto", package="flash_wtconv", syntax="proto3"
    )

    def message(name: str, parent: Any = None) -> Any:
        return (parent.nested_type if parent else file.message_type).add(name=name)

    def field(of: Any, name: str, number: int, kind: int, many: bool, target: str = "") -> Any:
        label = kinds.LABEL_REPEATED if many else kinds.LABEL_OPTIONAL
        made = of.field.add(name=name, number=number, type=kind, label=label)
        if target:
            made.type_name = f".flash_wtconv.{target}"
        return made

    field(message("BytesList"), "value", 1, kinds.TYPE_BYTES, True)
    field(message("FloatList"), "value", 1, kinds.TYPE_FLOAT, True)
    field(message("Int64List"), "value", 1, kinds.TYPE_INT64, True)
    feature = message("Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(("bytes", "float", "int64"), 1):
        target = f"{name.capitalize()}List"
        field(feature, f"{name}_list", number, kinds.TYPE_MESSAGE, False, target).oneof_index = 0
    features = message("Features")
    entry = message("FeatureEntry", features)
    entry.options.map_entry = True
    field(entry, "key", 1, kinds.TYPE_STRING, False)
    field(entry, "value", 2, kinds.TYPE_MESSAGE, False, "Feature")
    field(features, "feature", 1, kinds.TYPE_MESSAGE, True, "Features.FeatureEntry")
    field(message("Example"), "features", 1, kinds.TYPE_MESSAGE, False, "Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("flash_wtconv.Example"))
