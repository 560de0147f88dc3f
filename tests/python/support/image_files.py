"""Image files of many formats and modes, generated from a seed: what the parity tests decode."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

SIZES = [(1, 1), (2, 3), (7, 5), (16, 16), (17, 13), (33, 9)]
PNG_KINDS = [
    (b, c)
    for c, bits in {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}.items()
    for b in bits
]
ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]


def picture(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Waves with noise: compresses like a photo."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [(np.sin(x / 7 + k) + np.cos(y / 5 - k)) * 60 + 128 + rng.normal(0, 8, (height, width)) for k in range(3)]
    return Image.fromarray(np.stack(planes, -1).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    """The bytes `Image.save` writes."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(rng: np.random.Generator, count: int) -> bytes:
    """`count` random bytes."""
    return rng.integers(0, 256, count, dtype=np.uint8).tobytes()


def chunk(name: bytes, data: bytes) -> bytes:
    """One PNG chunk."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(size: tuple[int, int], bits: int, color: int, rng: np.random.Generator, *, adam7: bool, trns: bool) -> bytes:
    """A PNG of random samples in any depth and colour type, every filter, with or without interlacing and tRNS."""
    width, height = size
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    head = b""
    if color == 3:
        # Fewer colours than the depth could name: the others must be black.
        head = chunk(b"PLTE", noise(rng, 3 * {1: 2, 2: 3, 4: 11, 8: 200}[bits]))
    if trns:
        head += chunk(b"tRNS", {0: b"\0\1", 2: b"\0\1\0\2\0\3", 3: b"\0\x80"}[color])
    raw = b""
    for x0, y0, dx, dy in ADAM7 if adam7 else [(0, 0, 1, 1)]:
        columns, rows = max(0, -(-(width - x0) // dx)), max(0, -(-(height - y0) // dy))
        if columns:
            line = (columns * bits * channels + 7) // 8
            raw += b"".join(bytes([rng.integers(0, 5)]) + noise(rng, line) for _ in range(rows))
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, int(adam7))
    body = chunk(b"IHDR", header) + head + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def bmp(
    size: tuple[int, int], bits: int, compression: int, data: bytes, *, head: bytes = b"", colors: int = 0
) -> bytes:
    """A bitmap of given pixel data; `head` holds masks or palette."""
    info = struct.pack("<IiiHHIIiiII", 40, *size, 1, bits, compression, len(data), 0, 0, colors, 0) + head
    return b"BM" + struct.pack("<IHHI", 14 + len(info) + len(data), 0, 0, 14 + len(info)) + info + data


def bmp_files(size: tuple[int, int], rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Depths, masks, palettes and run lengths that Pillow itself does not write."""
    width, height = size
    upside_down = (width, -height)
    words = noise(rng, (width * 2 + 3) // 4 * 4 * height)
    yield "bmp 16 bits", bmp(size, 16, 0, words)
    yield "bmp 16 bits 565", bmp(size, 16, 3, words, head=struct.pack("<III", 0xF800, 0x7E0, 0x1F))
    yield "bmp 16 bits 555", bmp(upside_down, 16, 3, words, head=struct.pack("<III", 0x7C00, 0x3E0, 0x1F))
    pixels = noise(rng, 4 * width * height)
    yield "bmp 32 bits", bmp(size, 32, 0, pixels)
    masks = [(0xFF0000, 0xFF00, 0xFF), (0xFF000000, 0xFF0000, 0xFF00), (0xFF000000, 0xFF00, 0xFF)]
    for mask in masks:
        yield f"bmp 32 bits {mask}", bmp(upside_down, 32, 3, pixels, head=struct.pack("<III", *mask))
    for bits, colors in ((1, 2), (4, 13), (4, 16), (8, 77), (8, 256)):
        data = noise(rng, (width * bits + 31) // 32 * 4 * height)
        yield f"bmp {bits} bits, {colors} colours", bmp(size, bits, 0, data, head=noise(rng, 4 * colors), colors=colors)
    end, line = b"\0\1", b"\0\0"
    runs = b"".join(b"".join(b"\1" + noise(rng, 1) for _ in range(width)) + line for _ in range(height)) + end
    yield "bmp RLE8", bmp(size, 8, 1, runs, head=noise(rng, 1024), colors=256)
    runs = b"".join(bytes([width, 0x3C]) + line for _ in range(height)) + end
    yield "bmp RLE4", bmp(size, 4, 2, runs, head=noise(rng, 64), colors=16)
    if width > 2:
        rows = (bytes([0, width]) + noise(rng, width) + b"\0" * (width % 2) + line for _ in range(height))
        yield "bmp RLE8 literal", bmp(size, 8, 1, b"".join(rows) + end, head=noise(rng, 1024), colors=256)


def pnm_files(size: tuple[int, int], rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Plain and raw, gray and colour, several maxima, with comments."""
    width, height = size
    for maximum in (1, 100, 255, 1000, 65535):
        for gray, color, raw in ((b"P5", b"P6", True), (b"P2", b"P3", False)):
            for magic, channels in ((gray, 1), (color, 3)):
                values = rng.integers(0, maximum + 1, height * width * channels)
                head = b"%s # made\n%d %d\n# up\n%d\n" % (magic, width, height, maximum)
                plain = b" ".join(b"%d" % v for v in values) + b"\n"
                body = values.astype(">u2" if maximum > 255 else "u1").tobytes() if raw else plain
                yield f"pnm {magic.decode()} {maximum}", head + body
    bits = rng.integers(0, 2, width * height)
    yield "pnm P1", b"P1\n%d %d\n" % size + b"".join(b"%d" % v for v in bits)


def tiff_files(rgb: Image.Image, rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Modes, compressions, orientations."""
    modes = {"RGB": rgb, "L": rgb.convert("L"), "P": rgb.quantize(17), "1": rgb.convert("1"), "RGBA": with_alpha(rgb)}
    for mode, image in modes.items():
        for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits"):
            yield f"tiff {mode} {compression}", encoded(image, "TIFF", compression=compression)
    yield "tiff LA", encoded(with_alpha(rgb).convert("LA"), "TIFF")
    yield "tiff CMYK", encoded(rgb.convert("CMYK"), "TIFF")
    yield "tiff group4", encoded(modes["1"], "TIFF", compression="group4")
    yield "tiff white is zero", encoded(modes["L"], "TIFF", tiffinfo={262: 0})
    shape = (rgb.height, rgb.width)
    yield "tiff I;16", encoded(Image.fromarray(rng.integers(0, 600, shape, dtype=np.uint16)), "TIFF")
    yield "tiff I", encoded(Image.fromarray(rng.integers(-100, 600, shape, dtype=np.int32)), "TIFF")
    yield "tiff F", encoded(Image.fromarray(rng.random(shape, dtype=np.float32) * 400 - 50), "TIFF")
    for orientation in range(1, 9):
        yield f"tiff orientation {orientation}", encoded(rgb, "TIFF", tiffinfo={274: orientation})


def jpeg_files(rgb: Image.Image) -> Iterator[tuple[str, bytes]]:
    """Qualities, subsamplings, progressive, restart markers, gray, CMYK, RGB without conversion."""
    for quality in (30, 75, 95):
        for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
            for progressive in (False, True):
                name = f"jpeg {quality} {subsampling}{' progressive' if progressive else ''}"
                yield name, encoded(rgb, "JPEG", quality=quality, subsampling=subsampling, progressive=progressive)
        yield f"jpeg L {quality}", encoded(rgb.convert("L"), "JPEG", quality=quality)
        yield f"jpeg CMYK {quality}", encoded(rgb.convert("CMYK"), "JPEG", quality=quality)
        yield f"jpeg RGB {quality}", encoded(rgb, "JPEG", quality=quality, keep_rgb=True)
        yield f"jpeg restarts {quality}", encoded(rgb, "JPEG", quality=quality, restart_marker_blocks=2)


def animated_files(rgb: Image.Image) -> Iterator[tuple[str, bytes]]:
    """WebP and GIF, still and moving, and the animated PNG."""
    more = {"save_all": True, "append_images": [rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]}
    for mode, image in {"RGB": rgb, "RGBA": with_alpha(rgb), "L": rgb.convert("L")}.items():
        yield f"gif {mode}", encoded(image, "GIF")
        for quality in (20, 80):
            yield f"webp {mode} {quality}", encoded(image, "WEBP", quality=quality)
            yield f"webp {mode} {quality} lossless", encoded(image, "WEBP", quality=quality, lossless=True)
    for format in ("GIF", "WEBP", "PNG"):
        yield f"animated {format}", encoded(rgb, format, **more)
    palette = rgb.quantize(17)
    yield "gif 1", encoded(rgb.convert("1"), "GIF")
    yield "gif interlaced", encoded(palette, "GIF", interlace=1)
    yield "gif transparent", encoded(palette, "GIF", transparency=3)
    # The frame of 2, 3 inside a larger screen.
    data = bytearray(encoded(palette, "GIF"))
    struct.pack_into("<HH", data, 6, rgb.width + 5, rgb.height + 4)
    frame = bytes(data).index(b",", 13 + 3 * (2 << (data[10] & 7)))
    struct.pack_into("<HH", data, frame + 1, 2, 3)
    yield "gif offset", bytes(data)


def with_alpha(rgb: Image.Image) -> Image.Image:
    """Colours under all degrees of transparency."""
    rgba = rgb.convert("RGBA")
    rgba.putalpha(rgb.convert("L"))
    return rgba


def files(size: tuple[int, int], seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """`(what it is, bytes)` for everything that must decode as Pillow decodes it."""
    rng = np.random.default_rng([seed, *size])
    rgb = picture(*size, rng)
    for bits, color in PNG_KINDS:
        for adam7 in (False, True):
            yield f"png {bits} bits, type {color}", png(size, bits, color, rng, adam7=adam7, trns=False)
        if color in (0, 2, 3):
            yield f"png {bits} bits, type {color}, tRNS", png(size, bits, color, rng, adam7=False, trns=True)
    for mode in ("RGB", "L", "1"):
        yield f"bmp {mode}", encoded(rgb.convert(mode), "BMP")
        yield f"ppm {mode}", encoded(rgb.convert(mode), "PPM")
    yield from bmp_files(size, rng)
    yield from pnm_files(size, rng)
    yield from tiff_files(rgb, rng)
    yield from jpeg_files(rgb)
    yield from animated_files(rgb)
