"""Image files of more than 8 bits, several pages, or unusual channels, with the numbers that are in them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from image_files import chunk

SHAPE = (30, 40)


def deep(kind: str, seed: int = 0, high: int = 4095) -> NDArray[Any]:
    """Numbers of a camera of 12 bits, or fractions."""
    rng = np.random.default_rng(seed)
    if kind == "f4":
        return rng.random(SHAPE, dtype=np.float32)
    values = rng.integers(100, high + 1, SHAPE).astype(kind)
    values.flat[:2] = 100, high
    return values


def write(path: Path, values: NDArray[Any], **options: Any) -> Path:
    """The numbers as Pillow writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path, **options)
    return path


def big_endian_tiff(path: Path, values: NDArray[Any]) -> Path:
    """(H, W) gray or (H, W, C) of any number of channels, in the byte order that Pillow calls I;16B."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, channels = (*values.shape, 1)[:3]
    data = values.astype(values.dtype.newbyteorder(">")).tobytes()
    # Beyond colours there are only "extra samples" of no meaning (0).
    extra = max(channels - 3, 0)
    counts = struct.pack(f">{channels}H", *[8 * values.dtype.itemsize] * channels)
    behind = data + counts + struct.pack(f">{extra}H", *[0] * extra)

    def entry(tag: int, kind: int, count: int, value: int) -> bytes:
        packed = struct.pack(">I", value) if kind == 4 or count > 2 else struct.pack(">HH", value, value * (count == 2))
        return struct.pack(">HHI", tag, kind, count) + packed

    tags = [
        entry(256, 4, 1, width), entry(257, 4, 1, height),
        entry(258, 3, channels, 8 * values.dtype.itemsize if channels < 3 else 8 + len(data)), entry(259, 3, 1, 1),
        entry(262, 3, 1, 2 if channels > 2 else 1), entry(273, 4, 1, 8), entry(277, 3, 1, channels),
        entry(278, 4, 1, height), entry(279, 4, 1, len(data)),
        *([entry(338, 3, extra, 0 if extra < 3 else 8 + len(data) + len(counts))] if extra else []),
    ]  # fmt: skip
    directory = struct.pack(">H", len(tags)) + b"".join(tags) + struct.pack(">I", 0)
    path.write_bytes(b"MM\0*" + struct.pack(">I", 8 + len(behind)) + behind + directory)
    return path


def color_png(path: Path, values: NDArray[Any]) -> Path:
    """16-bit colour, which Pillow does not write; (H, W, 3)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def pages(path: Path, images: list[Image.Image]) -> Path:
    """A file of several pages."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images[0].save(path, save_all=True, append_images=images[1:])
    return path
