"""TIFF: every kind of samples, every tag, and combinations of them."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

import image_files
from image_files import encoded, noise

Case = tuple[str, bytes]

# Photometric interpretation, sample format, bits, samples, extra samples.
TIFF_KINDS: list[tuple[int, int, int, int, tuple[int, ...]]] = [
    *[(photo, 1, bits, 1, ()) for photo in (0, 1, 3) for bits in (1, 2, 4, 8, 12, 16)],
    *[(photo, form, bits, 1, ()) for photo in (0, 1) for form, bits in ((1, 32), (2, 8), (2, 16), (2, 32))],
    *[(photo, 3, bits, 1, ()) for photo in (0, 1) for bits in (16, 32, 64)],
    *[(photo, 1, 8, 2, extra) for photo in (0, 1, 3) for extra in ((), (0,), (1,), (2,))],
    *[(2, 1, bits, 3, ()) for bits in (4, 8, 12, 16, 32)],
    *[(2, 1, bits, 4, extra) for bits in (8, 16) for extra in ((), (0,), (1,), (2,), (999,))],
    *[(2, 1, 8, 5, extra) for extra in ((0, 0), (1, 0), (2, 0))],
    (5, 1, 8, 4, ()),
    (5, 1, 16, 4, ()),
    (5, 1, 8, 5, (0,)),
    (6, 1, 8, 3, ()),
    (8, 1, 8, 3, ()),
]
# Rows and columns of a piece: one strip, several, tiles that do and do not divide the picture of 37 x 21.
PIECES = [(21, None), (4, None), (16, 16), (32, 48)]
TIFF_TAGS: dict[str, list[Any]] = {
    "kind": TIFF_KINDS,
    "order": ["<", ">"],
    "big": [False, True],
    "compression": [1, 5, 8, 32946, 32773],
    "predictor": [None, 1, 2, 3],
    "pieces": PIECES,
    "fill_order": [None, 1, 2],
    "planar": [None, 1, 2],
    "orientation": [None, *range(10)],
    "xmp": [None, 6],
}


def lzw(data: bytes, bits: int, *, msb: bool) -> bytes:
    """Literals with a clear code in front of every few, so that codes never grow: any reader takes it."""
    clear, width = 1 << bits, bits + 1
    codes: list[int] = []
    step = max(2, (1 << bits) - 8)
    for start in range(0, len(data), step):
        codes += [clear, *data[start : start + step]]
    codes.append(clear + 1)
    text = [format(code, f"0{width}b") for code in codes]
    joined = "".join(text if msb else [t[::-1] for t in text])
    whole = [joined[i : i + 8].ljust(8, "0") for i in range(0, len(joined), 8)]
    return bytes(int(byte if msb else byte[::-1], 2) for byte in whole)


def packbits(data: bytes) -> bytes:
    """Literals only."""
    pieces = (data[i : i + 100] for i in range(0, len(data), 100))
    return b"".join(bytes([len(piece) - 1]) + piece for piece in pieces)


COMPRESSED = {
    1: bytes,
    5: lambda data: lzw(data, 8, msb=True),
    8: zlib.compress,
    32946: zlib.compress,
    32773: packbits,
}


def tiff(fields: dict[int, Any], pieces: list[bytes], *, order: str = "<", big: bool = False, tiled: bool) -> bytes:
    """A TIFF of one page; `fields` are numbers, tuples of numbers, or bytes."""
    offsets, counts = (324, 325) if tiled else (273, 279)
    start = 16 if big else 8
    fields = fields | {counts: tuple(map(len, pieces))}
    fields[offsets] = tuple(start + sum(map(len, pieces[:i])) for i in range(len(pieces)))
    wide, head, size = ("Q", "Q", 20) if big else ("I", "H", 12)
    directory = start + sum(map(len, pieces))
    values_at = directory + struct.calcsize(order + head) + size * len(fields) + struct.calcsize(order + wide)
    entries, behind = b"", b""
    for tag, value in sorted(fields.items()):
        if isinstance(value, bytes):
            kind, count, data = 1, len(value), value
        else:
            many = value if isinstance(value, tuple) else (value,)
            kind = 4 if tag in (256, 257, offsets, counts) else 3
            count, data = len(many), struct.pack(f"{order}{len(many)}{'I' if kind == 4 else 'H'}", *many)
        room = struct.calcsize(order + wide)
        if len(data) > room:
            place = struct.pack(order + wide, values_at + len(behind))
            behind += data
        else:
            place = data.ljust(room, b"\0")
        entries += struct.pack(f"{order}HH{wide}", tag, kind, count) + place
    magic = b"II" if order == "<" else b"MM"
    version = struct.pack(order + "HHHQ", 43, 8, 0, directory) if big else struct.pack(order + "HI", 42, directory)
    body = struct.pack(order + head, len(fields)) + entries + struct.pack(order + wide, 0) + behind
    return magic + version + b"".join(pieces) + body


def tiff_of(tags: dict[str, Any], rng: np.random.Generator) -> bytes:
    """The TIFF that `tags`, one of each of `TIFF_TAGS`, describe."""
    photo, form, bits, samples, extra = tags["kind"]
    width, height = 37, 21
    rows, columns = tags["pieces"]
    planes = samples if tags["planar"] == 2 else 1
    count = -(-height // rows) * (1 if columns is None else -(-width // columns)) * planes
    pieces = []
    for i in range(count):
        tall = min(rows, height - i % -(-height // rows) * rows) if columns is None else rows
        per_row = (columns or width) * samples // planes
        if form == 3 and bits == 32:
            data = (rng.random((tall, per_row)) * 400 - 50).astype(tags["order"] + "f4").tobytes()
        else:
            data = noise(rng, tall * -(-per_row * bits // 8))
        pieces.append(COMPRESSED[tags["compression"]](data))
    fields: dict[int, Any] = {256: width, 257: height, 258: (bits,) * samples, 259: tags["compression"], 262: photo}
    fields |= {277: samples, 339: (form,) * samples}
    fields |= {278: rows} if columns is None else {322: columns, 323: rows}
    fields |= {338: extra} if extra else {}
    fields |= {320: tuple(map(int, rng.integers(0, 65536, 3 << bits)))} if photo == 3 and bits <= 8 else {}
    optional = {317: "predictor", 266: "fill_order", 284: "planar", 274: "orientation"}
    fields |= {tag: tags[name] for tag, name in optional.items() if tags[name] is not None}
    if tags["xmp"] is not None:
        fields[700] = b'<x tiff:Orientation="%d">' % tags["xmp"]
    return tiff(fields, pieces, order=tags["order"], big=tags["big"], tiled=columns is not None)


def tiff_cases(rng: np.random.Generator) -> Iterator[Case]:
    """Every kind, every tag on some of them, and drawn combinations; and Pillow's own Group 4."""
    plain = {name: values[0] for name, values in TIFF_TAGS.items()}
    some = [(0, 1, 1, 1, ()), (1, 1, 8, 1, ()), (3, 1, 4, 1, ()), (2, 1, 8, 3, ()), (2, 1, 16, 4, (2,))]
    varied = [plain | {"kind": kind, "order": order} for kind in TIFF_KINDS for order in "<>"]
    varied += [plain | {"kind": kind, name: v} for name, values in TIFF_TAGS.items() for v in values for kind in some]
    drawn = [{name: values[rng.integers(len(values))] for name, values in TIFF_TAGS.items()} for _ in range(400)]
    for tags in varied + drawn:
        if tags["xmp"] is None or tags["orientation"] is None or tags in drawn:
            yield f"tiff {tags}", tiff_of(tags, rng)
    bitmap = image_files.picture(37, 21, rng).convert("1")
    for photo, fill in itertools.product((0, 1), (1, 2)):
        yield (
            f"tiff group4 {photo} {fill}",
            encoded(bitmap, "TIFF", compression="group4", tiffinfo={262: photo, 266: fill}),
        )
