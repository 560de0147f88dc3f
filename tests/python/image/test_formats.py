"""Files: every format and mode that Pillow writes, EXIF, files cut short, bombs, and any size to any size."""

from __future__ import annotations

import io
import itertools
import random
import re
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps
from test_image_parity import FILTERS, apply, assert_same, by_pillow, by_us, outcome, photo

import image_files
from image_doors import decode_image, decoded
from image_files import encoded

# -- the matrix --------------------------------------------------------------------------------------------------------

MODES: dict[str, tuple[str, ...]] = {
    "JPEG": ("1", "L", "RGB", "CMYK", "YCbCr"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"),
    "GIF": ("1", "L", "P", "RGB", "RGBA"),
    "WEBP": ("L", "P", "RGB", "RGBA", "RGBX"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I", "I;16", "F"),
    "PPM": ("1", "L", "RGB", "I;16"),
}
# What the same pixels may be written as.
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "JPEG": (
        {"quality": 75},
        {"quality": 92, "subsampling": 0, "progressive": True},
        {"quality": 30, "subsampling": 1, "optimize": True},
        {"quality": 60, "subsampling": 2, "restart_marker_rows": 1},
    ),
    "PNG": ({}, {"compress_level": 0}, {"optimize": True}),
    "GIF": ({"interlace": 0}, {"interlace": 1}),
    "WEBP": ({"quality": 40}, {"lossless": True}, {"quality": 90, "method": 0, "exact": True}),
    "BMP": ({},),
    "TIFF": ({}, {"compression": "tiff_lzw"}, {"compression": "tiff_deflate"}, {"compression": "packbits"}),
    "PPM": ({},),
}
SIDES = range(1, 18)


def in_mode(rgb: Image.Image, mode: str) -> Image.Image:
    """The picture in any of Pillow's modes, transparency and high bits included."""
    rng = np.random.default_rng([rgb.width, rgb.height])
    if mode in ("LA", "RGBA"):
        return image_files.with_alpha(rgb).convert(mode)
    if mode == "P":
        return rgb.quantize(19)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 700, (rgb.height, rgb.width), dtype=np.uint16))
    if mode == "I":
        return Image.fromarray(rng.integers(0, 700, (rgb.height, rgb.width), dtype=np.int32))
    return rgb.convert("RGB").convert(mode)


def matrix(format: str) -> Iterator[tuple[object, bytes]]:
    """Each mode in each way of writing, over all pairs of sides 1 to 17 in turn."""
    sizes = itertools.cycle(random.Random(format).sample(list(itertools.product(SIDES, SIDES)), 289))
    ways = len(MODES[format]) * len(OPTIONS[format])
    for mode in MODES[format]:
        for options in OPTIONS[format]:
            for _ in range(-(-289 // ways) + 8):
                size = next(sizes)
                rgb = image_files.picture(*size, np.random.default_rng(size))
                try:
                    data = encoded(in_mode(rgb, mode), format, **options)
                except (OSError, ValueError):
                    # Pillow does not write this combination.
                    break
                yield (format, mode, options, size), data


@pytest.mark.parametrize("format", MODES)
def test_the_matrix_of_formats_decodes_as_pillow_does(format: str) -> None:
    count = 0
    for name, data in matrix(format):
        assert_same(by_us(data), by_pillow(data), name)
        count += 1
    assert count >= 289


@pytest.mark.parametrize("interlaced", [False, True])
def test_every_png_of_small_size(interlaced: bool) -> None:
    rng = np.random.default_rng(int(interlaced))
    for size in itertools.product(SIDES, SIDES):
        bits, color = image_files.PNG_KINDS[(size[0] * 17 + size[1]) % len(image_files.PNG_KINDS)]
        data = image_files.png(size, bits, color, rng, adam7=interlaced, trns=False)
        assert_same(by_us(data), by_pillow(data), (size, bits, color))


def test_real_pictures_of_matplotlib_decode_as_pillow_does() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    files = [p for p in Path(matplotlib.get_data_path()).rglob("*") if p.suffix in (".png", ".jpg", ".ppm", ".gif")]
    assert files
    for path in files:
        data = path.read_bytes()
        assert_same(by_us(data), by_pillow(data), path)


# -- EXIF --------------------------------------------------------------------------------------------------------------


def upright(data: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


# What turns a picture with that orientation upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def assert_upright(data: bytes, orientation: int, what: object) -> None:
    assert_same(by_us(data), by_pillow(data), what)
    height, width, pixels, turned = decoded(data, exif=True)
    ours = np.frombuffer(pixels, np.uint8).reshape(height, width, 3)
    assert turned == (orientation != 1), what
    assert_same(ours, upright(data), what)
    image = Image.fromarray(by_us(data))
    assert_same(ours, image if orientation == 1 else image.transpose(UPRIGHT[orientation]), what)


def exif_with(orientation: int, *, little: bool = False) -> Image.Exif:
    exif = Image.Exif()
    exif.endian = "<" if little else ">"
    exif[0x010F] = "a maker"
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientations_are_applied_as_exif_transpose_does(format: str, orientation: int) -> None:
    for i, size in enumerate([(7, 4), (1, 9), (16, 16), (33, 17)]):
        rgb = image_files.picture(*size, np.random.default_rng(orientation))
        exif = exif_with(orientation, little=i % 2 == 0)
        options: dict[str, Any] = {"tiffinfo": {274: orientation}} if format == "TIFF" else {"exif": exif}
        data = encoded(rgb, format, **options)
        # Pillow turns TIFF upright by itself, always.
        assert_upright(data, 1 if format == "TIFF" else orientation, (format, orientation, size))


def xmp(orientation: int, *, element: bool) -> bytes:
    inside = f"<tiff:Orientation>{orientation}</tiff:Orientation>" if element else ""
    attribute = "" if element else f' tiff:Orientation="{orientation}"'
    return f"<x:xmpmeta><rdf:Description{attribute}>{inside}</rdf:Description></x:xmpmeta>".encode()


@pytest.mark.parametrize("element", [False, True])
def test_orientation_in_xmp_counts_where_exif_is_silent(element: bool) -> None:
    rgb = image_files.picture(9, 5, np.random.default_rng(0))
    text = xmp(6, element=element)
    assert_upright(encoded(rgb, "JPEG", xmp=text), 6, "jpeg")
    assert_upright(encoded(rgb, "JPEG", xmp=text, exif=exif_with(3)), 3, "jpeg with both")
    assert_upright(encoded(rgb, "WEBP", xmp=text), 6, "webp")
    body = encoded(rgb, "PNG")
    for compressed in (False, True):
        packed = zlib.compress(text) if compressed else text
        chunk = image_files.chunk(b"iTXt", b"XML:com.adobe.xmp\0" + bytes([compressed, 0]) + b"\0\0" + packed)
        assert_upright(body[:33] + chunk + body[33:], 6, ("png", compressed))


def test_orientation_in_the_text_of_a_png() -> None:
    rgb = image_files.picture(9, 5, np.random.default_rng(0))
    profile = exif_with(8).tobytes()
    text = b"\nexif\n%8d\n%s\n" % (len(profile), profile.hex().encode())
    plain = image_files.chunk(b"tEXt", b"Raw profile type exif\0" + text)
    packed = image_files.chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))
    behind = image_files.chunk(b"eXIf", exif_with(5).tobytes()[6:])
    body = encoded(rgb, "PNG")
    assert_upright(body[:33] + plain + body[33:], 8, "text")
    assert_upright(body[:33] + packed + body[33:], 8, "compressed text")
    assert_upright(body[:-12] + behind + body[-12:], 5, "behind the pixels")


def test_broken_exif_is_no_orientation() -> None:
    rgb = image_files.picture(9, 5, np.random.default_rng(0))
    whole = exif_with(6).tobytes()
    for value in (0, 9, 255):
        assert_upright(encoded(rgb, "JPEG", exif=exif_with(value)), 1, value)
    for cut in range(6, len(whole)):
        data = encoded(rgb, "JPEG", exif=whole[:cut])
        height, width, pixels, turned = decoded(data, exif=True)
        image = Image.fromarray(by_us(data))
        expected = image.transpose(UPRIGHT[6]) if turned else image
        assert (width, height, pixels) == (*expected.size, expected.tobytes())


# -- cut short ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)


def accepted(data: bytes) -> np.ndarray:
    height, width, pixels = decode_image(data, truncated="accept")
    return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


JPEGS: dict[str, dict[str, Any]] = {
    "baseline": {"quality": 80},
    "progressive": {"quality": 80, "progressive": True},
    "restarts": {"quality": 60, "restart_marker_blocks": 3},
    "gray": {"quality": 80},
    "CMYK": {"quality": 80},
}


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("kind", JPEGS)
def test_cut_and_broken_jpegs_are_shown_as_pillow_shows_them(kind: str) -> None:
    rng = np.random.default_rng(3)
    shown = 0
    for i in range(60):
        image = image_files.picture(int(rng.integers(9, 90)), int(rng.integers(9, 90)), rng)
        image = image.convert({"gray": "L", "CMYK": "CMYK"}.get(kind, "RGB"))
        data = bytearray(encoded(image, "JPEG", **JPEGS[kind]))
        if i % 3 == 0:
            data[rng.integers(len(data) // 2, len(data))] ^= 1 << int(rng.integers(8))
        cut = bytes(data[: rng.integers(len(data) // 4, len(data) + 1)])
        ours, theirs = outcome(accepted, cut), outcome(by_pillow, cut)
        if ours is None and theirs is not None:
            # Broken tables: Pillow shows a black picture, which is no picture.
            assert not theirs.any(), (kind, i, len(cut))
            continue
        assert (ours is None) == (theirs is None), (kind, i, len(cut))
        if ours is not None and theirs is not None:
            assert_same(ours, theirs, (kind, i, len(cut)))
            shown += outcome(by_us, cut) is None
    assert shown > 20


@pytest.mark.parametrize("adam7", [False, True])
def test_cut_and_broken_pngs_are_refused_where_pillow_refuses_them(adam7: bool) -> None:
    rng = np.random.default_rng(4)
    shown = refused = 0
    for i in range(180):
        bits, color = image_files.PNG_KINDS[i % len(image_files.PNG_KINDS)]
        size = (int(rng.integers(1, 40)), int(rng.integers(1, 40)))
        data = image_files.png(size, bits, color, rng, adam7=adam7, trns=False)
        if i % 2:
            # What real pictures compress to, rather than noise.
            image = image_files.picture(*size, rng)
            data = encoded(in_mode(image, ("RGB", "L", "P", "RGBA", "1")[i % 5]), "PNG")
        # Half of them lose only what is behind the last pixel.
        cut = data[: rng.integers(len(data) // 3, len(data) + 1) if i % 4 < 2 else len(data) - rng.integers(20)]
        ours, theirs = outcome(accepted, cut), outcome(by_pillow, cut)
        assert (ours is None) == (theirs is None), (i, size, bits, color, len(cut))
        if ours is not None and theirs is not None:
            assert_same(ours, theirs, (i, size, bits, color, len(cut)))
            shown += len(cut) < len(data)
        refused += ours is None
    assert shown > 40 and refused > 40


def test_what_is_not_truncated_is_the_same_in_both_ways() -> None:
    for name, data in image_files.files((17, 13)):
        assert_same(accepted(data), by_us(data), name)
    for bad in (b"", b"hello", b"\xff\xd8\xff\xd9", b"GIF89a"):
        with pytest.raises(OSError, match=r"empty|not an image|ends|truncated|broken"):
            decode_image(bad, truncated="accept")


# -- what is not as in Pillow: docs/parity.md says so, with the largest difference -------------------------------------


@pytest.mark.parametrize("format", ["JPEG2000", "ICO", "TGA", "PCX", "SGI", "DDS", "AVIF"])
def test_formats_that_are_not_read_are_refused_by_name(format: str) -> None:
    try:
        data = encoded(image_files.picture(16, 16, np.random.default_rng(0)), format)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow does not write {format}")
    with pytest.raises(OSError, match=r"not an image \(JPEG, PNG, GIF, WebP, BMP, TIFF, PNM\)"):
        decode_image(data)


def test_pngs_cut_in_their_last_bits_are_read_as_pillow_reads_them() -> None:
    read = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        data = encoded(image_files.picture(30 + seed, 20, rng), "PNG")
        for missing in range(1, 30):
            cut = data[:-missing]
            ours, theirs = outcome(by_us, cut), outcome(by_pillow, cut)
            assert (ours is None) == (theirs is None), (seed, missing)
            if ours is not None and theirs is not None:
                assert_same(ours, theirs, (seed, missing))
                read += 1
    # Checksum, name and length of the last chunks: 16 bytes at least are not missed.
    assert read >= 60 * 16


def test_pngs_whose_pixels_end_early_but_in_order_are_read_as_pillow_reads_them() -> None:
    header = image_files.chunk(b"IHDR", struct.pack(">IIBBBBB", 6, 9, 8, 0, 0, 0, 0))
    for rows in (1, 4, 8):
        body = image_files.chunk(b"IDAT", zlib.compress(b"".join(b"\0" + bytes([9 * y]) * 6 for y in range(rows))))
        data = b"\x89PNG\r\n\x1a\n" + header + body + image_files.chunk(b"IEND", b"")
        assert_same(by_us(data), by_pillow(data), rows)


# -- bombs -------------------------------------------------------------------------------------------------------------


def bombs() -> dict[str, bytes]:
    """A few bytes each that promise pixels beyond any memory."""
    side = 65_000
    png = image_files.chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 16, 6, 0, 0, 0))
    png_small = image_files.chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    idat = image_files.chunk(b"IDAT", zlib.compress(bytes(1000))) + image_files.chunk(b"IEND", b"")
    jpeg = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG"))
    at = jpeg.index(b"\xff\xc0")
    struct.pack_into(">HH", jpeg, at + 5, side, side)
    progressive = bytearray(encoded(Image.new("RGB", (8, 8)), "JPEG", progressive=True))
    struct.pack_into(">HH", progressive, progressive.index(b"\xff\xc2") + 5, side, side)
    gif = bytearray(encoded(Image.new("P", (8, 8)), "GIF"))
    struct.pack_into("<HH", gif, 6, 65_535, 65_535)
    gif_frame = bytearray(gif)
    struct.pack_into("<HH", gif_frame, gif_frame.index(b",", 13 + 3 * (2 << (gif[10] & 7))) + 5, 65_535, 65_535)
    lossless = b"VP8L" + struct.pack("<I", 5) + b"\x2f" + (16382 | 16382 << 14).to_bytes(4, "little") + b"\0"
    size = (side - 1).to_bytes(3, "little")
    extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + size + size + lossless
    webp = [b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body for body in (lossless, extended)]
    tags = {256: side, 257: side, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: side, 279: 100}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    tiff = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(104)
    strips = tiff.replace(struct.pack("<HHII", 273, 4, 1, 8), struct.pack("<HHII", 273, 4, 2**31, 8))
    many = struct.pack("<IH", 8, 1) + struct.pack("<HHII", 259, 3, 2**26, 100) + bytes(100)
    big = struct.pack("<HHQQHHQQ", 8, 0, 16, 1, 258, 3, 2**26, 40) + bytes(100)
    bmp = image_files.bmp((2**31 - 1, 2**31 - 1), 24, 0, b"\0" * 16)
    rle = image_files.bmp((side, side), 8, 1, b"\xff\0" * 8, head=bytes(1024), colors=256)
    return {
        "png": b"\x89PNG\r\n\x1a\n" + png + idat,
        "png of 65000": b"\x89PNG\r\n\x1a\n" + png_small + idat,
        "jpeg": bytes(jpeg),
        "progressive jpeg": bytes(progressive),
        "gif screen": bytes(gif),
        "gif frame": bytes(gif_frame),
        "webp lossless": webp[0],
        "webp extended": webp[1],
        "tiff": tiff,
        "tiff strips": strips,
        # Found by fuzzing: memory was taken for the values a tag announces.
        "tiff values": b"II*\0" + many,
        "big tiff values": b"II+\0" + big,
        "bmp": bmp,
        "bmp run lengths": rle,
        "pnm": b"P6 4000000000 4000000000 255\n",
        "pnm bits": b"P4 65000 65000\n" + bytes(100),
    }


# A script of `-c` imports from where it starts.
SUPPORT = Path(image_files.__file__).parent
GUARDED = """
import resource, sys
from image_doors import decode_image
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
for line in sys.stdin:
    try:
        decode_image(bytes.fromhex(line), truncated=sys.argv[1])
    except OSError as error:
        print(error)
    else:
        print("decoded")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the memory limit is Linux's")
@pytest.mark.parametrize("truncated", ["error", "accept"])
def test_bombs_are_refused_before_memory_is_taken(truncated: str) -> None:
    files = bombs()
    assert all(len(data) < 4000 for data in files.values())
    lines = "\n".join(data.hex() for data in files.values())
    # 64 MiB are left to the process, the smallest bomb wants 260 MB: taking the memory would end it.
    done = subprocess.run(
        [sys.executable, "-c", GUARDED, truncated],
        cwd=SUPPORT,
        input=lines,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    answers = dict(zip(files, done.stdout.splitlines(), strict=True))
    for name, answer in answers.items():
        assert re.search(r"over the limit of \d+ pixels|cannot be decoded", answer), (name, answer)
    headers = {name for name, answer in answers.items() if "over the limit" in answer}
    assert headers >= {name for name in files if not name.endswith(("strips", "values"))}, answers


# -- any size to any size ----------------------------------------------------------------------------------------------

SIDE = st.one_of(st.integers(1, 24), st.integers(1, 2000))
TARGET = st.one_of(st.integers(1, 24), st.integers(1, 512))


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(SIDE, SIDE, TARGET, TARGET, st.sampled_from(sorted(FILTERS)), st.integers(0, 8))
def test_any_size_to_any_size_equals_pillow(
    width: int, height: int, new_width: int, new_height: int, filter: str, seed: int
) -> None:
    image = photo(width, height, seed)
    expected = image.resize((new_width, new_height), FILTERS[filter])
    assert_same(
        apply(image, "resize", height=new_height, width=new_width, filter=filter),
        expected,
        (image.size, expected.size, filter),
    )


MAGIC = [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\x40\0\0\0WEBPVP8X", b"BM", b"II*\0", b"P6 "]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.binary(max_size=64), st.sampled_from(MAGIC))
def test_bytes_behind_a_magic_number_are_an_error_or_an_image(tail: bytes, magic: bytes) -> None:
    for truncated in ("error", "accept"):
        try:
            height, width, pixels = decode_image(magic + tail, exif=True, truncated=truncated)
        except OSError:
            continue
        assert len(pixels) == 3 * height * width
