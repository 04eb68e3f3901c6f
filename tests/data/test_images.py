import io
import os
import zlib

import numpy as np
import pytest
from PIL import Image

from ercn.data import DataError, read_picture

LIMIT = 10_000


def noise(width=40, height=30, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def encoded(picture, format, **options):
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP"])
def test_pixels_are_read_exactly(tmp_path, format):
    noise().save(tmp_path / "p.x", format)
    read = read_picture(tmp_path / "p.x", max_pixels=LIMIT)
    assert read.mode == "RGB" and not read.info
    np.testing.assert_array_equal(np.asarray(read), np.asarray(noise()))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_8_bit_mode_becomes_rgb(tmp_path, mode):
    noise().convert(mode).save(tmp_path / "p.tif", "TIFF")
    assert read_picture(tmp_path / "p.tif", max_pixels=LIMIT).mode == "RGB"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise().save(tmp_path / "p.png", exif=exif)
    a = np.asarray(noise())
    across = np.rot90(a, 2).swapaxes(0, 1)
    turned = [np.rot90(a, -1), across, np.rot90(a)]
    upright = [a, a[:, ::-1], a[::-1, ::-1], a[::-1], a.swapaxes(0, 1), *turned]
    read = read_picture(tmp_path / "p.png", max_pixels=LIMIT)
    np.testing.assert_array_equal(np.asarray(read), upright[orientation - 1])


def broken():
    jpeg, png = encoded(noise(), "JPEG"), encoded(noise(), "PNG")
    flipped = bytearray(png)
    flipped[60] ^= 0xFF
    return {
        "truncated.jpeg": (jpeg[: len(jpeg) // 2], "cannot be decoded"),
        "truncated.png": (png[: len(png) // 2], "cannot be decoded"),
        "header only.png": (png[:20], "not a picture|cannot be decoded"),
        "bit error.png": (bytes(flipped), "cannot be decoded"),
        "text.jpeg": (b"image,level\n10_left,0\n", "not a picture"),
        "empty.jpeg": (b"", "not a picture"),
        "gif.jpeg": (encoded(noise().convert("P"), "GIF"), "not a picture"),
        "deep.png": (encoded(Image.fromarray(np.zeros((9, 9), np.uint16)), "PNG"), "8 bits a channel"),
        "thin.png": (encoded(noise(101, 1), "PNG"), "101 x 1 lies in a square of 10201 pixels; max_pixels is 10000"),
        "large.png": (
            encoded(noise(101, 100), "PNG"),
            "101 x 100 lies in a square of 10201 pixels; max_pixels is 10000",
        ),
    }


@pytest.mark.parametrize("name", broken())
def test_a_bad_file_is_named_with_its_fault(tmp_path, name):
    content, reason = broken()[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=reason) as raised:
        read_picture(tmp_path / name, max_pixels=LIMIT)
    assert str(tmp_path / name) in str(raised.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(DataError, match="nowhere.jpeg: no such file"):
        read_picture(tmp_path / "nowhere.jpeg", max_pixels=LIMIT)
    with pytest.raises(DataError, match="cannot be decoded"):
        read_picture(tmp_path, max_pixels=LIMIT)


def test_a_bomb_is_refused_by_its_header(tmp_path):
    """A PNG whose header says 50,000 x 50,000 pixels, without any: decoding would need 7.5 GB."""
    header = bytearray(encoded(noise(), "PNG"))
    header[16:24] = (50_000).to_bytes(4, "big") * 2
    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(header)
    message = "bomb.png: 50000 x 50000 lies in a square of 2500000000 pixels; max_pixels is 200000000"
    with pytest.raises(DataError, match=message):
        read_picture(tmp_path / "bomb.png", max_pixels=200_000_000)


def test_a_picture_above_pillows_own_limit_can_be_allowed_and_the_limit_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    noise().save(tmp_path / "p.png")
    assert read_picture(tmp_path / "p.png", max_pixels=LIMIT).size == (40, 30)
    with pytest.raises(DataError):
        read_picture(tmp_path / "none.png", max_pixels=LIMIT)
    assert Image.MAX_IMAGE_PIXELS == 100


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted in /proc")
def test_files_are_closed(tmp_path):
    noise().save(tmp_path / "p.png")
    (tmp_path / "bad.png").write_bytes(b"bad")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        read_picture(tmp_path / "p.png", max_pixels=LIMIT)
        with pytest.raises(DataError):
            read_picture(tmp_path / "bad.png", max_pixels=LIMIT)
    assert len(os.listdir("/proc/self/fd")) <= before
