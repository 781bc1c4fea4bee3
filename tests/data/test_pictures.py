"""Picture files become what a viewer shows, or are refused in one sentence that names them."""

import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_files import assert_one_sentence
from hostile import changed_bytes, few
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.Image import Transpose

from dbdist.data.pictures import as_shown, read_picture
from dbdist.errors import DataError

RAMP = np.linspace(0, 1, 8)[None].repeat(4, 0)
"""Black at the left, white at the right."""
BYTES = (RAMP * 255).round().astype(np.uint8)
GREY = Image.fromarray(BYTES)
DEEP = Image.fromarray((RAMP * 65535).astype(np.uint16))


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    written = io.BytesIO()
    image.save(written, kind, **options)
    return written.getvalue()


def shown_row(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as file:
        image = as_shown(file)
        assert image.mode == "RGB"
        return np.asarray(image)[1].astype(int)


def tiff(pixels: np.ndarray, bits: int, sample_format: int, photometric: int = 1) -> bytes:
    """A little-endian TIFF file of grey pixels, of kinds that PIL reads and does not write."""
    data, (height, width) = pixels.tobytes(), RAMP.shape
    values = {
        **{256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1},
        **{278: height, 279: len(data), 339: sample_format},
    }
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    header = b"II*\0" + struct.pack("<I", 8 + len(data))
    return header + data + struct.pack("<H", len(values)) + tags + bytes(4)


def pack_12_bits(pixels: np.ndarray) -> np.ndarray:
    """Two pixels in three bytes."""
    a, b = pixels[:, ::2], pixels[:, 1::2]
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype(np.uint8)


SIGNED_16 = tiff((RAMP * 32767).astype("<i2"), 16, 2)
DEEP_FILES = {
    "16-bit PNG": encode(DEEP, "PNG"),
    "16-bit TIFF": encode(DEEP, "TIFF"),
    "16-bit TIFF, compressed": encode(DEEP, "TIFF", compression="tiff_lzw"),
    "16-bit TIFF, big-endian": encode(Image.fromarray((RAMP * 65535).astype(">u2")), "TIFF"),
    "16-bit TIFF with a sign": SIGNED_16,
    "12-bit TIFF": tiff(pack_12_bits((RAMP * 4095).astype(np.uint16)), 12, 1),
    "32-bit TIFF": tiff((RAMP * (2**32 - 1)).astype("<u4"), 32, 1),
    "16 bits in a TIFF of 32": tiff((RAMP * 65535).astype("<i4"), 32, 2),
    "32-bit TIFF with a sign": tiff((RAMP * (2**31 - 1)).astype("<i4"), 32, 2),
    "float TIFF": encode(Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
    "16-bit PGM": encode(DEEP, "PPM"),
    "12-bit PGM": b"P5 8 4 4095\n" + (RAMP * 4095).astype(">u2").tobytes(),
    "float PFM": encode(Image.fromarray(RAMP.astype(np.float32)), "PPM"),
    "16-bit JPEG 2000": encode(DEEP, "JPEG2000"),
}


def rgb_png_16() -> bytes:
    """PIL writes none."""
    rows = (RAMP[..., None].repeat(3, -1) * 65535).astype(">u2")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 4, 16, 2, 0, 0, 0))
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", data) + chunk(b"IEND", b"")


COLOURS = {
    "grey": encode(GREY, "PNG"),
    "RGB": encode(GREY.convert("RGB"), "PNG"),
    "16-bit RGB": rgb_png_16(),
    "palette": encode(GREY.convert("P"), "PNG"),
    "opaque alpha": encode(Image.merge("LA", (GREY, Image.new("L", (8, 4), 255))), "PNG"),
    "CMYK": encode(GREY.convert("CMYK"), "JPEG", quality=100),
    "CMYK TIFF": encode(GREY.convert("CMYK"), "TIFF"),
    "white is zero": encode(GREY, "TIFF", tiffinfo={262: 0}),
    "GIF": encode(GREY, "GIF"),
}


@pytest.mark.parametrize("kind", [*DEEP_FILES, *COLOURS])
def test_dark_is_dark_and_bright_is_bright_in_every_mode(kind: str) -> None:
    row = shown_row({**DEEP_FILES, **COLOURS}[kind])
    assert np.abs(row - BYTES[0][:, None]).max() <= 2


@pytest.mark.parametrize(
    "content",
    [
        encode(DEEP, "TIFF", tiffinfo={262: 0}),
        tiff(RAMP.astype("<f4"), 32, 3, photometric=0),
    ],
    ids=["16-bit", "float"],
)
def test_white_is_zero_is_heeded_beyond_8_bits(content: bytes) -> None:
    assert np.abs(shown_row(content) - BYTES[0][::-1, None]).max() <= 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (tiff((RAMP * 255).astype("<f4"), 32, 3), "floats from 0 to 255"),
        (tiff((RAMP - 0.5).astype("<f4"), 32, 3), "floats from -0.5"),
        (tiff((RAMP * np.nan).astype("<f4"), 32, 3), r"finite \(mode F"),
        (tiff((RAMP * 255).astype("<i4"), 32, 2), r"\(mode I\) up to 255"),
        (tiff((RAMP * 255).astype("<u2"), 16, 1), r"\(mode I;16\) up to 255"),
        (tiff((RAMP * 2000 - 1000).astype("<i2"), 16, 2), "from -1000 to 1000"),
    ],
    ids=["0..255", "negative", "nan", "small in 32 bits", "small in 16 bits", "signed"],
)
def test_a_range_that_is_not_certain_is_refused_by_file_and_mode(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    path = tmp_path / "x-ray.tif"
    path.write_bytes(content)
    with pytest.raises(DataError, match=expected) as caught:
        read_picture(path, 8)
    assert str(caught.value).startswith(f"{path} holds ")
    assert_one_sentence(caught.value)


def test_black_pictures_of_many_bits_are_black() -> None:
    assert shown_row(encode(Image.fromarray(np.zeros((4, 8), np.uint16)), "PNG")).max() == 0


def test_transparent_pixels_lie_on_white() -> None:
    rgba = np.stack([BYTES, BYTES, BYTES, np.full_like(BYTES, 255)], -1)
    rgba[:, 0, 3], rgba[:, 1, 3] = 0, 128
    palette = GREY.convert("P")
    for content in (
        encode(Image.fromarray(rgba), "PNG"),
        encode(palette, "PNG", transparency=palette.getpixel((0, 0))),
        encode(palette, "GIF", transparency=palette.getpixel((0, 0))),
        encode(GREY, "PNG", transparency=0),
        encode(GREY.convert("RGB"), "PNG", transparency=(0, 0, 0)),
    ):
        row = shown_row(content)
        assert row[0].tolist() == [255] * 3
        assert abs(row[3] - BYTES[0, 3]).max() <= 2
    assert shown_row(encode(Image.fromarray(rgba), "PNG"))[1].tolist() == [145] * 3


def test_a_picture_that_is_transparent_everywhere_keeps_its_colours() -> None:
    rgba = np.stack([BYTES, BYTES, BYTES, np.zeros_like(BYTES)], -1)
    row = shown_row(encode(Image.fromarray(rgba), "PNG"))
    assert row[:, 0].tolist() == BYTES[0].tolist()


BACK = {
    **{2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM},
    **{5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_90, 7: Transpose.TRANSVERSE},
    8: Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation_is_applied(kind: str, orientation: int) -> None:
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :12], upright[:8, 12:] = 255, 100
    image = Image.fromarray(upright)
    stored = image.transpose(BACK[orientation]) if orientation in BACK else image
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(io.BytesIO(encode(stored, kind, exif=exif, quality=95))) as file:
        seen = np.asarray(as_shown(file)).astype(int)
    assert seen.shape == upright.shape
    assert np.abs(seen - upright).mean() < 10


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_metadata_does_not_hide_a_picture() -> None:
    content = encode(GREY, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert np.abs(shown_row(content) - BYTES[0][:, None]).max() == 0


# -- damaged and hostile files ---------------------------------------------------------------------


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8))


ENCODED = {k: encode(noise(), k) for k in ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [*ENCODED, "16-bit TIFF", "12-bit TIFF", "float TIFF"])
@settings(few, max_examples=30)
@given(data=st.data())
def test_a_changed_picture_is_read_or_refused(tmp_path: Path, kind: str, data: Any) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(data.draw(changed_bytes({**ENCODED, **DEEP_FILES}[kind])))
    try:
        assert read_picture(path, 16).shape == (3, 16, 16)
    except DataError as error:
        assert_one_sentence(error)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("size", [(60_000, 60_000), (12_000, 12_000), (1, 200_000), (200_000, 1)])
def test_a_picture_too_large_or_too_narrow_is_refused_at_once(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    content = bytearray(ENCODED["PNG"])
    content[16:24] = struct.pack(">II", *size)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DataError, match=r"a\.png (has|is not a readable).*pixels"):
            read_picture(path, 64)


def test_formats_that_start_other_programs_are_not_read(tmp_path: Path) -> None:
    """PIL hands PostScript to Ghostscript."""
    path = tmp_path / "a.png"
    path.write_bytes(encode(Image.new("RGB", (8, 8)), "EPS"))
    with pytest.raises(DataError, match="not a readable image"):
        read_picture(path, 8)


@pytest.mark.timeout(20)
def test_what_is_no_file_is_named_and_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "dead.png").symlink_to("nowhere.png")
    for name, expected in (
        ("pipe.png", "is a named pipe, not a file"),
        ("folder.png", "is a folder, not a file"),
        ("dead.png", "is a link to nowhere.png, which cannot be followed"),
        ("missing.png", "is missing"),
    ):
        with pytest.raises(DataError) as caught:
            read_picture(tmp_path / name, 8)
        assert str(caught.value) == f"{tmp_path / name} {expected}"


def test_a_name_that_is_not_utf8_can_be_printed(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n.png"))
    path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"caf\\xe9\\n\.png is not a readable image") as caught:
        read_picture(path, 8)
    assert_one_sentence(caught.value)
    str(caught.value).encode("ascii")
