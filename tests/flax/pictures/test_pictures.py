"""Pictures of every mode, orientation and depth: read as RGB, written back with what was beside."""

import io
import re
import struct

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from flash_wtconv_jax import pictures
from flash_wtconv_jax.pictures import Clip, Picture

imagecodecs = pytest.importorskip("imagecodecs")
tifffile = pytest.importorskip("tifffile")

COLOURS = np.random.default_rng(0).integers(0, 256, (5, 7, 4), np.uint8)
DEEP = np.random.default_rng(1).integers(0, 65536, (5, 7, 4), np.uint16)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def saved(folder, image, name="a.png", **keys):
    path = folder / name
    image.save(path, **keys)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("deep", [False, True])
def test_pixels_are_upright_and_the_rest_is_kept(tmp_path, orientation, deep):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Artist] = "A. Painter"
    image = Image.fromarray(COLOURS[..., :3])
    path = saved(tmp_path, image, exif=exif, icc_profile=SRGB)
    upright = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: a.swapaxes(0, 1)[:, ::-1],
        7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
        8: lambda a: a.swapaxes(0, 1)[::-1],
    }[orientation]
    samples = COLOURS
    if deep:
        samples = DEEP
        # The same chunks around pixels of 16 bits.
        encoded, chunks = imagecodecs.png_encode(DEEP[..., :3].copy()), path.read_bytes()
        between = chunks[33 : chunks.index(b"IDAT") - 4]
        path.write_bytes(encoded[:33] + between + encoded[33:])
    picture = pictures.read(path)
    np.testing.assert_array_equal(picture.pixels, upright(samples[..., :3]))
    assert picture.pixels.dtype == samples.dtype and picture.alpha is None
    assert picture.profile == SRGB
    pictures.write(tmp_path / "b.png", picture)
    with Image.open(tmp_path / "b.png") as written:
        kept = written.getexif()
        assert kept[ExifTags.Base.Artist] == "A. Painter"
        assert kept.get(ExifTags.Base.Orientation, 1) == 1
        assert written.info["icc_profile"] == SRGB
    again = pictures.read(tmp_path / "b.png")
    np.testing.assert_array_equal(again.pixels, picture.pixels)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_modes_become_rgb(tmp_path, mode):
    image = Image.fromarray(COLOURS, "RGBA").convert("RGB")
    if mode in ("LA", "RGBA"):
        image = Image.fromarray(COLOURS, "RGBA")
    image = image.convert(mode)
    name = {"CMYK": "a.tiff", "YCbCr": "a.jpg", "HSV": "a.tiff", "LA": "a.png"}.get(mode, "a.png")
    if mode == "HSV":
        with pytest.raises(OSError, match="cannot write mode HSV"):
            image.save(tmp_path / name)
        return
    path = saved(tmp_path, image, name)
    picture = pictures.read(path)
    expected = np.asarray(Image.open(path).convert("RGB"))
    np.testing.assert_array_equal(picture.pixels, expected)
    assert picture.pixels.shape == (5, 7, 3) and picture.pixels.dtype == np.uint8
    if mode in ("LA", "RGBA"):
        np.testing.assert_array_equal(picture.alpha, COLOURS[..., 3])
    else:
        assert picture.alpha is None


def test_a_palette_has_a_transparent_colour(tmp_path):
    image = Image.fromarray(COLOURS[..., 0] // 64, "P")
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    picture = pictures.read(saved(tmp_path, image, transparency=2))
    np.testing.assert_array_equal(picture.alpha == 0, COLOURS[..., 0] // 64 == 2)


def test_inks_are_converted_by_their_profile(tmp_path):
    image = Image.fromarray(COLOURS, "CMYK")
    # A broken profile is no reason to refuse the picture, and describes no RGB.
    path = saved(tmp_path, image, "a.tiff", icc_profile=b"broken")
    picture = pictures.read(path)
    assert picture.profile is None
    np.testing.assert_array_equal(picture.pixels, np.asarray(image.convert("RGB")))


def test_greys_are_converted_by_their_profile(tmp_path):
    """A gamma of 1 where sRGB has about 2.2 makes them brighter."""
    image = Image.fromarray(np.full((5, 7), 55, np.uint8))
    path = saved(tmp_path, image, icc_profile=grey_profile())
    picture = pictures.read(path)
    assert picture.profile is None
    np.testing.assert_allclose(picture.pixels, 128, atol=3)


def grey_profile():
    """A profile of greys with a gamma of 1 (ICC.1:2010): a white point and a curve."""
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    curve = b"curv\0\0\0\0" + struct.pack(">I", 0)
    tags = struct.pack(">I4sII4sII", 2, b"wtpt", 156, 20, b"kTRC", 176, 12)
    head = struct.pack(
        ">I4sI4s4s4s12s4s28s3i48s",
        188,
        b"",
        0x02100000,
        b"mntr",
        b"GRAY",
        b"XYZ ",
        b"",
        b"acsp",
        b"",
        63190,
        65536,
        54061,
        b"",
    )
    return head + tags + white + curve


@pytest.mark.parametrize("samples", [1, 2, 3, 4])
@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_sixteen_bits_a_sample(tmp_path, samples, suffix):
    stored = DEEP[..., 0] if samples == 1 else DEEP[..., :samples]
    path = tmp_path / f"a{suffix}"
    if suffix == ".png":
        path.write_bytes(imagecodecs.png_encode(stored.copy()))
    else:
        extra = {"extrasamples": ["unassalpha"]} if samples in (2, 4) else {}
        photometric = "rgb" if samples > 2 else "minisblack"
        keys = {"planarconfig": "contig"} if samples > 1 else {}
        tifffile.imwrite(path, stored, photometric=photometric, metadata=None, **extra, **keys)
    picture = pictures.read(path)
    colours = stored[..., None] if samples == 1 else stored[..., : samples - (samples % 2 == 0)]
    np.testing.assert_array_equal(picture.pixels, np.broadcast_to(colours, (5, 7, 3)))
    assert (picture.alpha is None) == (samples % 2 == 1)
    for name in ("b.png", "b.tiff"):
        pictures.write(tmp_path / name, picture._replace(profile=SRGB), force=True)
        again = pictures.read(tmp_path / name)
        np.testing.assert_array_equal(again.pixels, picture.pixels)
        assert again.profile == SRGB
        if picture.alpha is not None:
            np.testing.assert_array_equal(again.alpha, picture.alpha)
    if picture.alpha is None:
        pictures.write(tmp_path / "c.jpg", picture)
        assert pictures.read(tmp_path / "c.jpg").pixels.dtype == np.uint8


def test_tiff_files_say_what_their_samples_are(tmp_path):
    path, keys = tmp_path / "a.tiff", {"photometric": "rgb", "metadata": None}
    # Colours that are multiplied by the opacity.
    opacity = DEEP[..., 3:] | 0x4000
    multiplied = np.rint(DEEP[..., :3] * (opacity / 65535)).astype(np.uint16)
    tifffile.imwrite(path, np.dstack([multiplied, opacity]), extrasamples=["assocalpha"], **keys)
    picture = pictures.read(path)
    np.testing.assert_allclose(picture.pixels.astype(int), DEEP[..., :3], atol=3)
    np.testing.assert_array_equal(picture.alpha, opacity[..., 0])
    # Samples that are no opacity, and more than one.
    tifffile.imwrite(path, DEEP, extrasamples=["unspecified"], **keys)
    assert pictures.read(path).alpha is None
    five = np.dstack([DEEP, DEEP[..., 0]])
    tifffile.imwrite(path, five, extrasamples=["unassalpha", "unspecified"], **keys)
    np.testing.assert_array_equal(pictures.read(path).alpha, DEEP[..., 3])
    # Twelve bits a sample fill the range of sixteen.
    tifffile.imwrite(
        path, np.full((5, 7), 4095, np.uint16), bitspersample=12, photometric="minisblack"
    )
    assert (pictures.read(path).pixels == 65535).all()
    # Whites at zero, with opacity.
    grey = {"photometric": "miniswhite", "planarconfig": "contig", "metadata": None}
    tifffile.imwrite(path, DEEP[..., :2].copy(), extrasamples=["unassalpha"], **grey)
    picture = pictures.read(path)
    np.testing.assert_array_equal(picture.pixels[..., 0], 65535 - DEEP[..., 0])
    np.testing.assert_array_equal(picture.alpha, DEEP[..., 1])
    # Any order of bytes.
    tifffile.imwrite(path, DEEP[..., :3].copy(), byteorder=">", **keys)
    np.testing.assert_array_equal(pictures.read(path).pixels, DEEP[..., :3])


def test_descriptions_of_tiff_files_are_kept(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Artist] = 6, "A. Painter"
    path = saved(tmp_path, Image.fromarray(COLOURS[..., :3]), "a.tiff", exif=exif)
    for name in ("b.jpg", "b.png", "b.tiff"):
        pictures.write(tmp_path / name, pictures.read(path))
        with Image.open(tmp_path / name) as written:
            kept = written.getexif()
            assert kept[ExifTags.Base.Artist] == "A. Painter"
            assert kept.get(ExifTags.Base.Orientation, 1) == 1 and written.size == (5, 7)
            assert ExifTags.Base.StripOffsets not in kept or name == "b.tiff"


def test_greys_of_16_bits_in_other_formats(tmp_path):
    """Pillow clips their conversion at 255, which makes them white."""
    frames = [Image.fromarray(DEEP[..., index].copy()) for index in range(2)]
    path = saved(tmp_path, frames[0], save_all=True, append_images=frames[1:])
    clip = pictures.read_clip(path)
    np.testing.assert_array_equal(clip.frames[0].pixels[..., 1], DEEP[..., 0])


def test_planes_and_whites_at_zero(tmp_path):
    path = tmp_path / "a.tiff"
    tifffile.imwrite(path, np.moveaxis(DEEP[..., :3], -1, 0), photometric="rgb", metadata=None)
    np.testing.assert_array_equal(pictures.read(path).pixels, DEEP[..., :3])
    tifffile.imwrite(path, DEEP[..., 0], photometric="miniswhite", metadata=None)
    np.testing.assert_array_equal(pictures.read(path).pixels[..., 1], 65535 - DEEP[..., 0])


def test_what_is_no_picture_is_said_in_one_line(tmp_path):
    text = tmp_path / "notes.png"
    text.write_text("not a picture")
    with pytest.raises(ValueError, match=r"notes\.png is no picture of a kind that can be read$"):
        pictures.read(text)
    whole = io.BytesIO()
    Image.fromarray(np.tile(COLOURS[..., :3], (40, 40, 1))).save(whole, "PNG")
    (tmp_path / "half.png").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    with pytest.raises(OSError, match=r"half\.png cannot be read: "):
        pictures.read(tmp_path / "half.png")
    deep = imagecodecs.png_encode(np.tile(DEEP, (9, 9, 1)))
    (tmp_path / "deep.png").write_bytes(deep[: len(deep) // 2])
    with pytest.raises((OSError, ValueError), match=r"deep\.png cannot be read: "):
        pictures.read(tmp_path / "deep.png")
    with pytest.raises(FileNotFoundError, match="none.png"):
        pictures.read(tmp_path / "none.png")
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        pictures.read(tmp_path)
    path = saved(tmp_path, Image.fromarray(COLOURS[..., 0].astype(np.float32)), "f.tiff")
    with pytest.raises(ValueError, match="samples are floating-point numbers, expected 8 or 16"):
        pictures.read(path)
    large = saved(tmp_path, Image.new("1", (2000, 1000)), "large.png")
    with pytest.raises(ValueError, match=r"large\.png .*2000 x 1000 pixels, more than the 1,000 a"):
        pictures.read(large, max_pixels=1000)
    assert Image.MAX_IMAGE_PIXELS is not None


def test_whatever_a_decoder_raises_is_said_in_one_line(tmp_path, monkeypatch):
    path = saved(tmp_path, Image.fromarray(COLOURS[..., 0], "L"))
    for error in (IndexError(), TypeError("Missing\ndimensions"), KeyError(3)):

        def broken(image, error=error):
            raise error

        monkeypatch.setattr(pictures.still.ImageOps, "exif_transpose", broken)
        with pytest.raises(ValueError, match=r"a\.png cannot be read: (IndexError|Missing|3)$"):
            pictures.read(path)


def test_a_sample_of_another_kind_names_its_file_once(tmp_path):
    path = saved(tmp_path, Image.fromarray(COLOURS[..., 0].astype(np.int32)), "i.tiff")
    with pytest.raises(ValueError, match="32-bit integers") as error:
        pictures.read(path)
    assert str(error.value).count("i.tiff") == 1


def test_files_are_written_whole_or_not_at_all(tmp_path):
    picture = Picture(COLOURS[..., :3], COLOURS[..., 3])
    with pytest.raises(ValueError, match=r"a\.jpg: JPEG holds no transparency"):
        pictures.write(tmp_path / "a.jpg", picture)
    with pytest.raises(ValueError, match=r"the ending is '\.psd', expected one of \.bmp, \.gif"):
        pictures.write(tmp_path / "a.psd", picture)
    pictures.write(tmp_path / "a.webp", picture)
    with pytest.raises(FileExistsError, match=r"a\.webp exists already"):
        pictures.write(tmp_path / "a.webp", picture)
    with pytest.raises(FileNotFoundError, match="no folder"):
        pictures.write(tmp_path / "none" / "a.png", picture)
    with pytest.raises(OSError, match=r"b\.png cannot be written: "):
        pictures.write(tmp_path / "b.png", picture._replace(pixels=COLOURS[:0, :, :3]))
    np.testing.assert_array_equal(pictures.read(tmp_path / "a.webp").alpha, picture.alpha)
    assert [path.name for path in tmp_path.iterdir()] == ["a.webp"]


@pytest.mark.parametrize("suffix", [".gif", ".png", ".webp"])
@pytest.mark.parametrize("transparent", [False, True])
def test_animations_keep_their_frames(tmp_path, suffix, transparent):
    frames = []
    for value in (20, 120, 220):
        pixels = np.full((6, 8, 3), value, np.uint8)
        alpha = np.where(np.arange(8) < 4, 255, 0).astype(np.uint8) * np.ones((6, 1), np.uint8)
        frames.append(Picture(pixels, alpha if transparent else None))
    path = tmp_path / f"a{suffix}"
    pictures.write_clip(path, Clip(frames, [40.0, 80.0, 120.0], 3))
    assert pictures.is_clip(path)
    clip = pictures.read_clip(path)
    assert clip.durations == [40.0, 80.0, 120.0] and clip.loop == 3
    for read, written in zip(clip.frames, frames, strict=True):
        shown = np.s_[:, :4] if transparent else np.s_[:]
        np.testing.assert_allclose(read.pixels[shown], written.pixels[shown], atol=4)
        if transparent:
            np.testing.assert_array_equal(read.alpha, written.alpha)
    with pytest.raises(ValueError, match="3 frames of 8 x 6 pixels, more than 100 pixels"):
        pictures.read_clip(path, max_pixels=100)
    with pytest.raises(ValueError, match=r"an animation wants one of \.gif, \.png, \.webp"):
        pictures.write_clip(tmp_path / "a.jpg", clip)


def test_frames_that_become_transparent(tmp_path):
    half = np.where(np.arange(8) < 4, 255, 0).astype(np.uint8) * np.ones((6, 1), np.uint8)
    frames = [
        Picture(np.full((6, 8, 3), 200, np.uint8)),
        Picture(np.full((6, 8, 3), 100, np.uint8), half),
    ]
    pictures.write_clip(tmp_path / "a.gif", Clip(frames, [40.0] * 2))
    # Decoders differ in what they show: some, against the format, the frame before. It says that
    # each frame is cleared after it (2), and that one has transparent pixels.
    controls = re.findall(rb"\x21\xf9\x04(.)", (tmp_path / "a.gif").read_bytes(), re.DOTALL)
    assert [(one[0] >> 2 & 7, one[0] & 1) for one in controls] == [(2, 0), (2, 1)]


@pytest.mark.parametrize("loop", [0, 1, 4])
def test_an_animation_is_shown_as_often_as_before(tmp_path, loop):
    frames = [Picture(np.full((6, 8, 3), value, np.uint8)) for value in (20, 220)]
    for suffix in ("gif", "png", "webp"):
        path = tmp_path / f"a.{suffix}"
        pictures.write_clip(path, Clip(frames, [0.0, 40.0], loop))
        clip = pictures.read_clip(path)
        assert clip.loop == loop and clip.durations == [0.0, 40.0]
    with Image.open(tmp_path / "a.gif") as image:
        # A GIF file holds repetitions, or nothing.
        assert image.info.get("loop") == {0: 0, 1: None, 4: 3}[loop]


def test_one_frame_is_no_animation(tmp_path):
    assert not pictures.is_clip(saved(tmp_path, Image.fromarray(COLOURS[..., :3]), "a.gif"))
    # Pages are no frames.
    pages = tmp_path / "pages.tiff"
    tifffile.imwrite(pages, np.stack([DEEP[..., 0]] * 2))
    assert not pictures.is_clip(pages)
