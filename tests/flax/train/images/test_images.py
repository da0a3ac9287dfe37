"""Images of every kind of source, their batches, and the errors that come before a training."""

import io
import itertools
import json
import pickle
import queue
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageEnhance

pytest.importorskip("grain")

from grain._src.python.dataset.transformations import prefetch

from flash_wtconv_jax.train.images import decoding, loading, packing, randaugment, sources
from flash_wtconv_jax.train.images.settings import Data

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (11, 12, 14, 3), np.uint8)
LABELS = np.arange(11) % 3
NAMES = ["ant", "bee", "cat"]
SMALL = Data(size=8, scale=(0.5, 1.0))


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_folder(folder):
    for index, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
        (folder / NAMES[label]).mkdir(parents=True, exist_ok=True)
        (folder / NAMES[label] / f"{index:02d}.png").write_bytes(png(pixels))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Train and val of the same eleven images: files of classes."""
    folder = tmp_path_factory.mktemp("images")
    for part in ("train", "val"):
        write_folder(folder / part)
    return folder


def read_all(source):
    """Pixels and class of each image, in an order that all kinds of sources share."""
    found = [
        (decoding.pixels_of(decoding.decoded(content), 3).tobytes(), source.classes[label])
        for content, label in (source[index] for index in range(len(source)))
    ]
    return sorted(found)


def test_all_kinds_of_sources_hold_the_same_images(folder, tmp_path):
    wanted = sources.opened(folder, "train")
    for kind in packing.KINDS:
        packed = packing.pack(wanted, tmp_path / kind, kind=kind, shard=4)
        assert packed.images == 11 and not packed.broken
        assert len(list((tmp_path / kind).glob(f"*.{kind}"))) == 3
    np.savez(tmp_path / "npz.npz", images=PIXELS, labels=LABELS, classes=NAMES)
    for part in (*packing.KINDS, "npz"):
        source = sources.opened(tmp_path, part)
        assert source.classes == NAMES
        assert source.counts() in ([4, 4, 3], None)
        # Once opened, as a worker gets it.
        assert read_all(source) == read_all(pickle.loads(pickle.dumps(source)))
        assert read_all(source) == read_all(wanted)
        assert str(tmp_path) in source.name(1)


def test_shards_of_others_are_indexed_and_an_old_index_is_refused(tmp_path):
    (tmp_path / "val").mkdir()
    shard = tmp_path / "val" / "a.tar"
    with tarfile.open(shard, "w") as archive:
        for name, content in (("x.png", png(PIXELS[0])), ("x.cls", b"0")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    source = sources.opened(tmp_path, "val")
    assert (len(source), source.classes, source.names) == (1, ["0"], ["x.png"])
    with shard.open("ab") as file:
        file.write(b"\0" * 512)
    with pytest.raises(ValueError, match="an index of other shards; delete it"):
        sources.opened(tmp_path, "val")


def test_large_images_are_packed_small(tmp_path):
    large = sources.Arrays(np.repeat(np.repeat(PIXELS[:2], 5, 1), 5, 2), LABELS[:2])
    packing.pack(large, tmp_path / "train", size=16)
    packed = sources.opened(tmp_path, "train")
    assert decoding.decoded(packed[1].content).size == (19, 16)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_that_are_packed_uncompressed_are_the_same(channels, tmp_path):
    images = sources.Arrays(PIXELS[..., :channels], LABELS)
    packing.pack(images, tmp_path / "train", size=14, compressed=False)
    packed = sources.opened(tmp_path, "train")
    for index in range(len(images)):
        whole = decoding.decoded(packed[index].content)
        assert whole.format == "BMP"
        np.testing.assert_array_equal(decoding.pixels_of(whole, channels), images[index].content)


BAD = {
    "no folder": (lambda f: None, FileNotFoundError, "no folder"),
    "no val": (lambda f: write_folder(f / "train"), FileNotFoundError, "has no val: expected"),
    "no images": (
        lambda f: [(f / part / "ant").mkdir(parents=True) for part in ("train", "val")],
        ValueError,
        "holds no images: expected files that end in",
    ),
    "no rows": (
        lambda f: [f.mkdir(), np.savez(f / "train.npz", images=PIXELS[:0], labels=LABELS[:0])],
        ValueError,
        "train.npz holds no images$",
    ),
    "empty class": (
        lambda f: [write_folder(f / "train"), (f / "train" / "dog").mkdir()],
        ValueError,
        "class 'dog' has no images",
    ),
    "other classes": (
        lambda f: [
            write_folder(f / "train"),
            write_folder(f / "val"),
            (f / "val" / "cat").rename(f / "val" / "dog"),
        ],
        ValueError,
        "differ, only in train: cat; only in val: dog",
    ),
    "bad labels": (
        lambda f: [f.mkdir(), np.savez(f / "train.npz", images=PIXELS, labels=LABELS[:3])],
        ValueError,
        r"labels are int64 \(3,\), expected integers of shape \(11,\)",
    ),
    "no array": (
        lambda f: [f.mkdir(), np.savez(f / "train.npz", pictures=PIXELS)],
        ValueError,
        "holds pictures, expected images and labels",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_told_of(case, tmp_path):
    make, kind, message = BAD[case]
    make(tmp_path / "data")
    with pytest.raises(kind, match=message):
        sources.opened_pair(tmp_path / "data")


def batches(source, data=SMALL, steps=range(6), batch=4, share=loading.Share(), skip=None):  # noqa: B008
    dataset = loading.training(source, data, batch=batch, seed=3, steps=steps, share=share)
    with loading.iterating(dataset) as iterator:
        if skip is not None:
            iterator.set_state(skip)
        return list(iterator)


def crops_of(batch):
    crops = zip(batch["image"], batch["extent"], strict=True)
    return [image[:height, :width] for image, (height, width) in crops]


def same(one, other):
    for name in ("extent", "label", "index"):
        np.testing.assert_array_equal(one[name], other[name])
    for crop, again in zip(crops_of(one), crops_of(other), strict=True):
        np.testing.assert_array_equal(crop, again)


def test_batches_depend_on_seed_and_step_alone(folder):
    source = sources.opened(folder, "train")
    whole = batches(source, replace(SMALL, randaugment=9.0))
    assert whole[0]["image"].shape == (4, 9, 9, 3)
    # Two epochs of eleven images, in an order of their own.
    order = np.concatenate([each["index"] for each in whole])
    assert sorted(order[:11]) == sorted(order[11:22]) == list(range(11))
    assert list(order[:11]) != list(order[11:22])
    data = replace(SMALL, randaugment=9.0)
    for one, other in zip(whole[2:], batches(source, data, range(2, 6)), strict=True):
        same(one, other)
    halves = [batches(source, data, share=loading.Share(part, 2)) for part in (0, 1)]
    for step, parts in zip(whole, zip(*halves, strict=True), strict=True):
        same(step, {name: np.concatenate([part[name] for part in parts]) for name in step})


@pytest.mark.wide
def test_an_iterator_goes_on_from_its_state(folder):
    source = sources.opened(folder, "train")
    dataset = loading.training(source, SMALL, batch=4, seed=3, steps=range(6))
    with loading.iterating(dataset) as iterator:
        list(itertools.islice(iterator, 2))
        state = json.loads(json.dumps(iterator.get_state()))
    for one, other in zip(batches(source)[2:], batches(source, skip=state), strict=True):
        same(one, other)


def test_batches_are_made_ready_ahead_and_the_place_is_of_the_last_taken(folder):
    source = sources.opened(folder, "train")
    dataset = loading.training(source, SMALL, batch=4, seed=3, steps=range(6))
    made: queue.Queue[int] = queue.Queue()

    def make(arrays):
        made.put(len(arrays))
        return arrays["index"]

    with loading.iterating(loading.ahead(dataset, make)) as iterator:
        first = next(iterator)
        # The one that was taken, and two more that nobody has asked for.
        for _ in range(3):
            made.get(timeout=60)
        state = json.loads(json.dumps(iterator.get_state()))
    whole = batches(source)
    np.testing.assert_array_equal(first, whole[0]["index"])
    with loading.iterating(loading.ahead(dataset, make)) as iterator:
        iterator.set_state(state)
        indices = list(iterator)
    for one, other in zip(whole[1:], indices, strict=True):
        np.testing.assert_array_equal(one["index"], other)


def test_workers_begin_together(folder, monkeypatch):
    started = set()
    threads = prefetch.ThreadPrefetchDatasetIterator
    monkeypatch.setattr(threads, "start_prefetch", lambda self: started.add(id(self)))
    source = sources.opened(folder, "train")
    data = replace(SMALL, workers=3)
    dataset = loading.training(source, data, batch=4, seed=3, steps=range(6))
    with loading.iterating(loading.ahead(dataset, len)) as iterator:
        loading.begin(iterator)
    # A thread of each worker, and the two that are ahead.
    assert len(started) == 5


@pytest.mark.slow
def test_workers_read_the_same_batches(folder):
    source = sources.opened(folder, "train")
    for one, other in zip(batches(source), batches(source, replace(SMALL, workers=2)), strict=True):
        same(one, other)


def test_broken_images_become_rows_without_a_class(folder, tmp_path):
    write_folder(tmp_path / "train")
    source = sources.opened(tmp_path, "train")
    (tmp_path / "train" / "ant" / "00.png").write_bytes(png(PIXELS[0])[:-60])
    (tmp_path / "train" / "ant" / "03.png").unlink()
    for each in batches(source):
        np.testing.assert_array_equal(each["read"], ~np.isin(each["index"], [0, 1]))
        np.testing.assert_array_equal(each["label"] == loading.NO_CLASS, ~each["read"])
    assert "00.png: image file is truncated" in loading.reason(source, SMALL, 0)
    assert "No such file" in loading.reason(source, SMALL, 1)


def test_evaluation_reads_all_images_once_and_fills_up(folder):
    source = sources.opened(folder, "val")
    with loading.iterating(loading.evaluation(source, SMALL, batch=4)) as iterator:
        found = list(iterator)
    assert np.concatenate([each["index"] for each in found]).tolist() == list(range(12))
    assert np.concatenate([each["read"] for each in found]).tolist() == 11 * [True] + [False]


def test_boxes_in_the_centre_are_of_whole_pixels():
    assert decoding.centre_box((14, 12), 1.0) == (1, 0, 13, 12)
    assert decoding.centre_box((341, 256), 0.875) == (58, 16, 282, 240)
    assert decoding.centre_box((3, 9), 0.1) == (1, 4, 2, 5)


def test_crops_are_scaled_where_they_are_large_and_only_there():
    image = Image.fromarray(PIXELS[0])
    for box, size in (
        ((2, 1, 9, 8), (7, 7)),
        ((2, 1, 9, 11), (7, 6)),
        ((0, 5, 14, 12), (6, 7)),
        ((0, 0, 14, 12), (6, 6)),
    ):
        found = decoding.cropped(image, box, 6, 7)
        wanted = image.crop(box).resize(size, Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(found, wanted)


def test_batches_hold_crops_of_every_size(folder):
    source = sources.opened(folder, "train")
    (batch,) = batches(source, replace(SMALL, scale=(0.1, 0.7)), range(1), batch=11)
    extents = batch["extent"]
    assert len(np.unique(extents, axis=0)) > 4 and extents.max() == 9
    compared = 0
    for crop, index in zip(crops_of(batch), batch["index"], strict=True):
        height, width, _ = crop.shape
        if 8 in (height, width):  # An axis of more may have been scaled to that.
            continue
        compared += 1
        whole = decoding.pixels_of(decoding.decoded(source[index].content), 3)
        parts = np.lib.stride_tricks.sliding_window_view(whole, (height, width, 3))
        assert (parts[:, :, 0] == crop).all((2, 3, 4)).any()
    assert compared > 3


def test_a_large_jpeg_is_decoded_small_and_looks_the_same():
    smooth = Image.fromarray(PIXELS[0]).resize((640, 480), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    smooth.save(file, "JPEG", quality=95)
    box = (64, 32, 480, 448)
    found = decoding.cropped(decoding.decoded(file.getvalue()), box, 32, 36)
    wanted = smooth.resize((32, 32), Image.Resampling.BICUBIC, box)
    assert np.abs(np.asarray(found, int) - np.asarray(wanted, int)).mean() < 2


def test_random_boxes_have_the_shares_that_are_asked_for():
    rng = np.random.default_rng(0)
    boxes = np.array(
        [decoding.random_box((60, 40), (0.2, 0.5), (0.5, 2.0), rng) for _ in range(500)]
    )
    wide, high = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert (boxes >= 0).all() and (boxes[:, 2] <= 60).all() and (boxes[:, 3] <= 40).all()
    shares, shapes = wide * high / 2400, wide / high
    assert 0.18 < shares.min() < 0.22 and 0.48 < shares.max() < 0.52
    assert 0.45 < shapes.min() < 0.6 and 1.7 < shapes.max() < 2.2
    # None of a shape that is allowed fits in: the largest from the centre.
    assert decoding.random_box((100, 2), (0.9, 1.0), (0.5, 2.0), rng) == (48, 0, 52, 2)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_operations_of_randaugment_change_a_picture(mode):
    image = Image.fromarray(PIXELS[0]).resize((32, 32)).convert(mode)
    for name, operation in randaugment.OPERATIONS.items():
        changed = operation(image, 0.9, 1.0)
        assert (changed.mode, changed.size) == (mode, (32, 32)), name
        # A crop may be as small as can be.
        assert operation(image.crop((0, 0, 1, 2)), 0.9, 1.0).size == (1, 2), name
        if name != "color" or mode == "RGB":
            assert changed.tobytes() != image.tobytes() or name == "auto_contrast", name


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pictures_are_moved_as_pillow_moves_them(mode):
    image = Image.fromarray(PIXELS[0]).resize((40, 30), Image.Resampling.BICUBIC).convert(mode)
    grey = 128 if mode == "L" else (128, 128, 128)
    how = {"resample": Image.Resampling.BILINEAR, "fillcolor": grey}
    affine = Image.Transform.AFFINE
    wanted = {
        "rotate": image.rotate(0.7 * 30, **how),
        "shear_x": image.transform(image.size, affine, (1, 0.7 * 0.3, 0, 0, 1, 0), **how),
        "shear_y": image.transform(image.size, affine, (1, 0, 0, 0.7 * 0.3, 1, 0), **how),
        # Of 12.6 and 9.45 pixels.
        "translate_x": image.transform(image.size, affine, (1, 0, 13, 0, 1, 0), **how),
        "translate_y": image.transform(image.size, affine, (1, 0, 0, 0, 1, 9), **how),
    }
    white = Image.new(mode, image.size, "white")
    for name, expected in wanted.items():
        move = randaugment.OPERATIONS[name]
        differences = abs(np.asarray(move(image, 0.7, 1.0), int) - np.asarray(expected, int))
        # But for the outermost half pixel, which is mixed with the grey outside.
        pure = np.isin(np.asarray(move(white, 0.7, 1.0)), (128, 255))
        assert pure.mean() > 0.85 and differences[pure].max() <= 2, name


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_pictures_are_sharpened_as_pillow_sharpens_them(sign):
    image = Image.fromarray(PIXELS[0])
    found = randaugment.OPERATIONS["sharpness"](image, 0.7, sign)
    wanted = ImageEnhance.Sharpness(image).enhance(1 + sign * 0.7 * 0.9)
    # But for the outermost pixels, which Pillow leaves as they are.
    inner = (slice(1, -1),) * 2
    assert abs(np.asarray(found, int) - np.asarray(wanted, int))[inner].max() <= 1


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "I;16", "CMYK"])
def test_images_of_every_mode_become_colours_and_greys(mode):
    image = Image.fromarray(PIXELS[0])
    image = (
        Image.fromarray(np.full((12, 14), 51400, np.uint16))
        if mode == "I;16"
        else image.convert(mode)
    )
    for channels, side in itertools.product((1, 3), (6, 12)):
        plain = decoding.cropped(image, (0, 0, 12, 12), side, side)
        pixels = decoding.pixels_of(plain, channels)
        assert pixels.shape == (side, side, channels)
    if mode == "I;16":
        assert np.unique(pixels).tolist() == [200]
