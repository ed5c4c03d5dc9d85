"""Image files as people have them: every kind is written here and read back."""

import os
import struct
import zlib
from contextlib import suppress
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from wantrt.errors import MediaError
from wantrt.images import image_size, load_image


def gradient(width=40, height=24):
    y, x = np.mgrid[:height, :width]
    return np.stack([6 * x, 10 * y, 255 - 3 * (x + y)], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "gif", "webp", "jpg"])
@pytest.mark.parametrize("name", ["plain", "名 前"])
def test_kinds(tmp_path, suffix, name):
    path = tmp_path / f"{name}.{suffix}"
    Image.fromarray(gradient()).save(path, quality=100)
    tolerance = {"jpg": 12, "webp": 12, "gif": 40}.get(suffix, 0)
    actual = load_image(path)
    assert actual.dtype == np.uint8
    np.testing.assert_allclose(actual.astype(int), gradient(), atol=tolerance)


def test_suffix_does_not_matter(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "x.bin", format="png")
    np.testing.assert_array_equal(load_image(tmp_path / "x.bin"), gradient())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    """Stored as the camera held it; each orientation is undone by hand."""
    image = gradient()
    stored = {
        1: image,
        2: image[:, ::-1],
        3: image[::-1, ::-1],
        4: image[::-1],
        5: image.transpose(1, 0, 2),
        6: np.rot90(image, 1),  # to be shown turned clockwise
        7: image[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(image, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(load_image(tmp_path / "x.png"), image)


def test_broken_exif_is_ignored(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "x.png", exif=b"Exif\0\0this is no TIFF header")
    np.testing.assert_array_equal(load_image(tmp_path / "x.png"), gradient())


def test_transparency_becomes_white(tmp_path):
    rgba = np.zeros((2, 4, 4), np.uint8)
    rgba[..., :3] = (200, 0, 100)
    rgba[:, 1, 3], rgba[:, 2, 3], rgba[:, 3, 3] = 51, 204, 255
    expected = [[255, 255, 255], [244, 204, 224], [211, 51, 131], [200, 0, 100]]
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    np.testing.assert_allclose(load_image(tmp_path / "rgba.png")[0].astype(int), expected, atol=1)
    Image.fromarray(rgba).convert("LA").save(tmp_path / "la.png")
    assert load_image(tmp_path / "la.png")[0, 0].tolist() == [255, 255, 255]

    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert load_image(tmp_path / "palette.png").tolist() == [[[255, 255, 255], [200, 100, 50]]]
    palette.save(tmp_path / "palette.gif")
    assert load_image(tmp_path / "palette.gif").tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_16_bits(tmp_path):
    values = np.array([[0, 128, 257, 25_700, 65_535]], np.uint16)
    for suffix in ("png", "tif"):
        Image.fromarray(values).save(tmp_path / f"x.{suffix}")
        expected = [0, 0, 1, 100, 255]
        assert load_image(tmp_path / f"x.{suffix}")[0].tolist() == [[v] * 3 for v in expected]
    write_png(tmp_path / "rgb16.png", 1, 1, struct.pack(">3H", 65_535, 25_700, 0), 16, 2)
    assert load_image(tmp_path / "rgb16.png").tolist() == [[[255, 100, 0]]]


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr"])
def test_modes(tmp_path, mode):
    image = Image.fromarray(gradient()).convert(mode)
    path = tmp_path / ("x.jpg" if mode == "YCbCr" else "x.tif")
    image.save(path)
    assert load_image(path).shape == (24, 40, 3)
    if mode == "L":
        grey = load_image(path)
        assert np.array_equal(grey[..., 0], np.asarray(image))
        assert np.array_equal(grey[..., 0], grey[..., 2])


@pytest.mark.parametrize("mode, dtype", [("F", np.float32), ("I", np.int32)])
def test_32_bits_are_refused(tmp_path, mode, dtype):
    Image.fromarray(np.ones((2, 2), dtype)).save(tmp_path / "x.tif")
    with pytest.raises(MediaError, match="32 bits; save it with 8 or 16"):
        load_image(tmp_path / "x.tif")


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_first_frame_of_an_animation(tmp_path, suffix, caplog):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    path = tmp_path / f"x.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert load_image(path)[0, 0].tolist() == [255, 0, 0]
    assert f"{path} holds several frames; the first is taken" in caplog.text


def test_what_the_interface_takes(tmp_path):
    np.testing.assert_array_equal(load_image(gradient()), gradient())
    np.testing.assert_array_equal(load_image(Image.fromarray(gradient())), gradient())
    Image.fromarray(gradient()).save(tmp_path / "x.png")
    whole = (tmp_path / "x.png").read_bytes()
    with pytest.raises(MediaError, match="cannot read the image that was given"):
        load_image(Image.open(BytesIO(whole[: len(whole) // 2])))
    for wrong in (gradient().astype(np.float32), gradient()[..., 0], gradient()[:0]):
        with pytest.raises(MediaError, match=r"pixels uint8 \[H, W, 3\]"):
            load_image(wrong)


def write_png(path, width, height, row=b"", depth=1, colour=0):
    """A PNG by hand; without rows, it has none of the pixels that it speaks of."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">2I5B", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(b"\0" + row)
    signature = b"\x89PNG\r\n\x1a\n"
    path.write_bytes(
        signature + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [9_500, 14_000, 60_000], ids=["larger", "bomb", "huge"])
@pytest.mark.filterwarnings("error")
def test_bombs_are_refused_by_their_header(tmp_path, side):
    write_png(tmp_path / "bomb.png", side, side)
    with pytest.raises(MediaError, match=r"more than 89 million pixels; scale it down$") as caught:
        load_image(tmp_path / "bomb.png")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tif"])
def test_truncated_anywhere(tmp_path, suffix):
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    Image.fromarray(gradient(200, 150)).save(whole)
    content = whole.read_bytes()
    for share in (0, 0.01, 0.1, 0.3, 0.5, 0.8):
        cut.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(MediaError, match="cannot read the image") as caught:
            load_image(cut)
        assert "\n" not in str(caught.value)


def test_damaged_bytes_are_errors_of_ours_or_pixels(tmp_path):
    generator = np.random.default_rng(0)
    for suffix in ("png", "jpg", "webp", "gif", "tif"):
        whole = tmp_path / f"whole.{suffix}"
        Image.fromarray(gradient()).save(whole)
        for _ in range(40):
            content = np.frombuffer(whole.read_bytes(), np.uint8).copy()
            places = generator.integers(0, min(len(content), 400), 6)
            content[places] = generator.integers(0, 256, 6)
            (tmp_path / "damaged").write_bytes(content.tobytes())
            with suppress(MediaError):
                assert load_image(tmp_path / "damaged").dtype == np.uint8


def test_no_images(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name, reason in [
        ("text.png", "it is none of PNG, JPEG"),
        ("script.png", "it is none of PNG, JPEG"),
        ("folder.png", "it is not a file"),
        ("pipe.png", "it is not a file"),
        ("missing.png", "there is no such file"),
    ]:
        with pytest.raises(MediaError, match=f"cannot read the image .*{name}: {reason}"):
            load_image(tmp_path / name)


@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_the_size_in_the_header_is_that_of_the_pixels(orientation, tmp_path):
    path, exif = tmp_path / "a.jpg", Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    Image.new("RGB", (48, 32)).save(path, exif=exif)
    height, width = load_image(path).shape[:2]
    assert image_size(path) == (width, height)


def test_the_size_of_what_is_no_image(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(MediaError, match="it is none of PNG"):
        image_size(tmp_path / "a.png")
