"""Image files of every kind that tags, flags and markers can make: what the corpora of other libraries are full of.

The pixels are noise or small waves; what varies is everything around them. Whether a file is sound is Pillow's to say.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator

import numpy as np

from image_files import noise
from image_matrix_tiff import lzw, tiff_cases
from image_matrix_web import jpeg_cases, png_cases, webp_cases

Case = tuple[str, bytes]

# -- GIF ---------------------------------------------------------------------------------------------------------------


def gif_cases(rng: np.random.Generator) -> Iterator[Case]:
    """Palettes global, local, both and none; transparency, disposal, offsets, interlacing, extensions, ends."""
    width, height = 9, 7
    tables = {"none": None, "two": 0, "four": 1, "all": 7}
    for (whole, shared), (own, local), bits in itertools.product(tables.items(), tables.items(), (2, 8)):
        most = 2 ** min(bits, 2 if bits == 2 else 8)
        pixels = bytes(rng.integers(0, most, width * height, dtype=np.uint8))
        packed = lzw(pixels, bits, msb=False)
        blocks = b"".join(bytes([len(packed[i : i + 255])]) + packed[i : i + 255] for i in range(0, len(packed), 255))
        data = bytes([bits]) + blocks + b"\0"
        colors = [None if depth is None else noise(rng, 6 << depth) for depth in (shared, local)]
        flag = [0 if depth is None else 0x80 | depth for depth in (shared, local)]
        for control, place, more in itertools.product(range(6), range(5), range(4)):
            left, top, screen = [(0, 0, (9, 7)), (2, 3, (14, 12)), (2, 3, (9, 7)), (0, 0, (20, 2)), (0, 0, (0, 0))][
                place
            ]
            if (control, place, more).count(0) < 2 and (whole, own) != ("all", "all"):
                # One deviation at a time is enough for the others.
                continue
            flags = [None, 0, 1, 0b1001, 0b101, 0b1101][control]
            extension = b"" if flags is None else b"!\xf9\4" + struct.pack("<BHBB", flags, 5, 1, 0)
            head = b"GIF89a" + struct.pack("<HHBBB", *screen, flag[0], 1, 0) + (colors[0] or b"")
            interlaced = 0x40 if more == 1 else 0
            frame = (
                b"," + struct.pack("<HHHHB", left, top, width, height, flag[1] | interlaced) + (colors[1] or b"") + data
            )
            comment = b"!\xfe\3hey\0" + b"!\xff\x0bNETSCAPE2.0\3\1\0\0\0" if more == 2 else b""
            end = [b";", b";", frame + b";", b""][more]
            yield f"gif {whole} {own} {bits} bits, {control} {place} {more}", head + comment + extension + frame + end


# -- BMP ---------------------------------------------------------------------------------------------------------------

MASKS = [
    (0, 0, 0, 0),
    (0xFF0000, 0xFF00, 0xFF, 0),
    (0xFF0000, 0xFF00, 0xFF, 0xFF000000),
    (0xFF, 0xFF00, 0xFF0000, 0),
    (0xFF, 0xFF00, 0xFF0000, 0xFF000000),
    (0xFF000000, 0xFF0000, 0xFF00, 0xFF),
    (0xFF000000, 0xFF00, 0xFF, 0xFF0000),
    (0xFF00, 0xFF, 0xFF0000, 0),
    (0xF800, 0x7E0, 0x1F, 0),
    (0x7C00, 0x3E0, 0x1F, 0),
    (0x7C00, 0x3E0, 0x1F, 0x8000),
    (0xF00, 0xF0, 0xF, 0),
]


def bmp_cases(rng: np.random.Generator) -> Iterator[Case]:
    """Headers of all systems, masks, colours announced and there, the picture upside down, gaps and overlaps."""
    for size, bits, compression, masks in itertools.product(
        (12, 16, 40, 52, 56, 64, 108, 124), (1, 2, 4, 8, 16, 24, 32), (0, 1, 2, 3, 6), MASKS
    ):
        if (compression in (0, 1, 2) and masks != MASKS[0]) or (size in (12, 16) and compression):
            continue
        for colors, height, gap in ((0, 5, 0), (0, -5, 0), (3, 5, 0), (0, 5, 7)):
            entry = 3 if size == 12 else 4
            table = noise(rng, entry * (colors or (1 << bits))) if bits <= 8 else b""
            data = (
                noise(rng, (9 * bits + 31) // 32 * 4 * 5) if compression in (0, 3, 6) else b"\7\1\2\2\0\0" * 5 + b"\0\1"
            )
            if size == 12:
                info = struct.pack("<IHHHH", 12, 9, abs(height), 1, bits)
            else:
                info = struct.pack("<IiiHHIIiiII", size, 9, height, 1, bits, compression, len(data), 0, 0, colors, 0)
                info += struct.pack("<4I", *masks)[: 12 if compression == 3 and size == 40 else 16]
                fixed = size + (12 if compression == 3 and size == 40 else 0)
                info = info[:fixed].ljust(fixed, b"\0")
            start = 14 + len(info) + len(table) + gap
            head = b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start)
            yield (
                f"bmp {size} {bits} {compression} {masks} {colors} {height} {gap}",
                head + info + table + bytes(gap) + data,
            )


# -- PNM ---------------------------------------------------------------------------------------------------------------


def pnm_cases(rng: np.random.Generator) -> Iterator[Case]:
    """Comments and white space everywhere, maxima, numbers too large, tokens too long, ends that are missing."""
    for kind, maximum in itertools.product(b"1234567", (0, 1, 7, 255, 256, 65535, 65536)):
        channels = 3 if kind in b"36" else 1
        values = rng.integers(0, min(maximum, 1 if kind in b"14" else maximum) + 1, 3 * 4 * channels)
        if kind in b"123":
            body = b" ".join(b"%d" % v for v in values)
        elif kind in b"4":
            body = noise(rng, 4)
        else:
            body = values.astype(">u2" if maximum > 255 else "u1").tobytes()
        tokens = [b"P%c" % kind, b"3", b"4"] + ([] if kind in b"14" else [b"%d" % maximum])
        for gap in (
            b" ",
            b"\n",
            b"\r\n",
            b"\t",
            b"\x0b",
            b"\x0c",
            b" # a\n",
            b"\n#\n",
            b"#b\r",
            b"\n# a\n# b\n",
            b"\0",
        ):
            yield (
                f"pnm P{kind - 48} {maximum} {gap!r}",
                gap.join(tokens) + (b"\n" if gap.endswith(b" ") else gap) + body,
            )
        head = b"\n".join(tokens) + b"\n"
        for name, tail in [
            ("whole", body),
            ("cut", body[:-1]),
            ("more", body + b" 1 2 3"),
            ("comment inside", body[:5] + b" # note\n" + body[5:]),
            ("letters", b"x" + body),
            ("large", b"99999 " + body),
            ("long", b"0" * 12 + body),
            ("negative", b"-" + body),
            ("close", body.replace(b" ", b"")),
        ]:
            yield f"pnm P{kind - 48} {maximum} {name}", head + tail
    for head in (
        b"P6 -3 4 255\n",
        b"P6 3 0 255\n",
        b"P5 3 4 -1\n",
        b"P5 3.0 4 255\n",
        b"P5 00000000003 4 255\n",
        b"P6\n3 4",
    ):
        yield f"pnm {head!r}", head + bytes(99)


CASES = {
    "tiff": tiff_cases,
    "png": png_cases,
    "gif": gif_cases,
    "bmp": bmp_cases,
    "pnm": pnm_cases,
    "webp": webp_cases,
    "jpeg": jpeg_cases,
}
