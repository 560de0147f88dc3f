"""PNG, WebP and JPEG: chunks, flags and markers, short, twice, in the wrong place, and files without their ends."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterable, Iterator

import numpy as np

import image_files
from image_files import chunk, encoded

Case = tuple[str, bytes]

# -- PNG ---------------------------------------------------------------------------------------------------------------

ANCILLARY: dict[bytes, bytes] = {
    b"pHYs": bytes(9),
    b"cHRM": bytes(32),
    b"gAMA": bytes(4),
    b"sRGB": bytes(1),
    b"tRNS": bytes(6),
    b"sBIT": b"\x08\x08\x08",
    b"bKGD": bytes(6),
    b"tIME": bytes(7),
    b"iCCP": b"name\0\0" + zlib.compress(b"profile"),
    b"tEXt": b"key\0value",
    b"zTXt": b"key\0\0" + zlib.compress(b"value"),
    b"iTXt": b"key\0\1\0\0\0" + zlib.compress(b"value"),
    b"eXIf": b"II*\0",
    b"acTL": struct.pack(">II", 1, 0),
    b"fcTL": struct.pack(">IIIIIHHBB", 0, 7, 5, 0, 0, 1, 1, 0, 0),
    b"fdAT": bytes(8),
    b"PLTE": bytes(range(9)),
    b"abCd": b"private",
    b"CrIT": b"critical",
}
LONG = zlib.compress(bytes(2**20 + 9))
ODD_CHUNKS: list[tuple[bytes, bytes]] = [
    (b"iCCP", b"name\0\1" + zlib.compress(b"profile")),
    (b"iCCP", b"name"),
    (b"iCCP", b"name\0\0" + LONG),
    (b"zTXt", b"key\0\1" + zlib.compress(b"value")),
    (b"zTXt", b"key\0\0" + LONG),
    (b"zTXt", b"key\0\0" + LONG[:-20]),
    (b"zTXt", b"key\0\0broken" + bytes(2000)),
    (b"iTXt", b"key\0\1\0\0\0" + LONG),
    (b"tEXt", b"key\0" + bytes(2**20 + 9)),
    (b"acTL", struct.pack(">II", 2, 0)),
    (b"fcTL", struct.pack(">IIIIIHHBB", 0, 7, 4, 0, 1, 1, 1, 0, 0)),
    (b"fcTL", struct.pack(">IIIIIHHBB", 0, 7, 5, 1, 0, 1, 1, 0, 0)),
    (b"fcTL", struct.pack(">IIIIIHHBB", 3, 7, 5, 0, 0, 1, 1, 0, 0)),
    (b"fdAT", struct.pack(">I", 1) + zlib.compress(bytes(110))),
    (b"PLTE", bytes(3 * 300)),
    (b"PLTE", bytes(7)),
    (b"PLTE", b""),
    (b"IHDR", struct.pack(">IIBBBBB", 5, 7, 8, 2, 0, 0, 0)),
    (b"IDAT", b""),
    (b"a\0Cd", b""),
]


def png(header: bytes, before: Iterable[bytes], idat: list[bytes], behind: Iterable[bytes]) -> bytes:
    """Chunks in their places."""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join([*before, *idat, *behind])


def png_cases(rng: np.random.Generator) -> Iterator[Case]:
    """Chunks short, long, twice, in front of and behind the pixels; headers; data in pieces; ends that are missing."""
    end, palette = chunk(b"IEND", b""), chunk(b"PLTE", bytes(range(9)))
    for color, line in ((0, 7), (2, 21), (3, 7)):
        header = struct.pack(">IIBBBBB", 7, 5, 8, color, 0, 0, 0)
        data = zlib.compress(b"".join(b"\0" + bytes(rng.integers(0, 3, line, dtype=np.uint8)) for _ in range(5)))
        idat, first = [chunk(b"IDAT", data)], [palette] if color == 3 else []
        odd = [(name, whole[:length]) for name, whole in ANCILLARY.items() for length in range(len(whole) + 1)]
        for name, body in odd + ODD_CHUNKS:
            one, what = chunk(name, body), f"png type {color}, {name!r} {body[:30]!r} of {len(body)}"
            yield f"{what} before", png(header, [*first, one], idat, [end])
            yield f"{what} behind", png(header, first, idat, [one, end])
            wrong = one[:-1] + bytes([one[-1] ^ 1])
            yield f"{what} before, checksum", png(header, [*first, wrong], idat, [end])
            yield f"{what} behind, checksum", png(header, first, idat, [wrong, end])
        animated = [chunk(b"acTL", struct.pack(">II", 2, 0)), chunk(b"fcTL", ANCILLARY[b"fcTL"])]
        second = [
            chunk(b"fcTL", struct.pack(">I", 1) + ANCILLARY[b"fcTL"][4:]),
            chunk(b"fdAT", struct.pack(">I", 2) + data),
        ]
        for name, before, behind in [
            ("whole", animated, [*second, end]),
            ("default image", animated[:1], [animated[1], second[1], end]),
            ("no frames", [], [*second, end]),
            ("data first", animated, [second[1], end]),
            ("twice", [*animated[:1], *animated], [end]),
        ]:
            yield f"png type {color}, animated: {name}", png(header, [*first, *before], idat, behind)
        pieces = [chunk(b"IDAT", data[i : i + 5]) for i in range(0, len(data), 5)]
        for name, parts in [
            ("in pieces", pieces),
            ("empty ones between", [piece + chunk(b"IDAT", b"") for piece in pieces]),
            ("one too many", [*idat, chunk(b"IDAT", b"more")]),
            ("torn apart", [pieces[0], chunk(b"tEXt", b"a\0b"), *pieces[1:]]),
        ]:
            whole = png(header, first, parts, [end])
            yield f"png type {color}, {name}", whole
            for cut in range(1, 40):
                yield f"png type {color}, {name}, {cut} missing", whole[:-cut]
            yield f"png type {color}, {name}, something behind", whole + b"something"
        for place, value in itertools.product(range(8, 13), range(10)):
            other = header[:place] + bytes([value]) + header[place + 1 :]
            yield f"png header {list(other[8:])}", png(other, first, idat, [end])


# -- WebP --------------------------------------------------------------------------------------------------------------


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    """Chunks of a WebP, padded to even lengths."""
    body = b"".join(name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for name, data in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def parts(data: bytes) -> dict[bytes, bytes]:
    """The chunks of a WebP."""
    found, at = {}, 12
    while at + 8 <= len(data):
        (length,) = struct.unpack_from("<I", data, at + 4)
        found[data[at : at + 4]] = data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2
    return found


def webp_cases(rng: np.random.Generator) -> Iterator[Case]:
    """All flags of the extended header, all flags of a first frame, places, backgrounds, unknown chunks, ends."""
    size = (13, 9)
    rgb = image_files.picture(*size, rng)
    rgba = image_files.with_alpha(rgb)
    sides = b"".join((side - 1).to_bytes(3, "little") for side in size)
    wider = b"".join((side + 5).to_bytes(3, "little") for side in size)
    kinds = {
        "lossy": encoded(rgb, "WEBP"),
        "lossless": encoded(rgb, "WEBP", lossless=True),
        "lossy alpha": encoded(rgba, "WEBP", exact=True),
        "lossy alpha filtered": encoded(rgba, "WEBP", method=6, alpha_quality=40),
        "lossless alpha": encoded(rgba, "WEBP", lossless=True, exact=True),
    }
    for name, data in kinds.items():
        inside = [(tag, body) for tag, body in parts(data).items() if tag != b"VP8X"]
        bare = b"".join(tag + struct.pack("<I", len(b)) + b + b"\0" * (len(b) % 2) for tag, b in inside)
        more = [(b"EXIF", b"II*\0"), (b"XMP ", b"<x/>"), (b"ICCP", b"profile"), (b"what", b"odd")]
        for flags in range(64):
            head = (b"VP8X", bytes([flags, 0, 0, 0]) + sides)
            yield f"webp {name}, flags {flags}", riff(head, *inside)
            yield f"webp {name}, flags {flags}, more behind", riff(head, *inside, *more)
            yield f"webp {name}, flags {flags}, more before", riff(head, *more, *inside)
        yield f"webp {name}, bare", riff(*inside)
        yield f"webp {name}, something behind", riff(*inside) + b"something"
        for cut in range(1, 12):
            yield f"webp {name}, {cut} missing", data[:-cut]
        for change in (-9, -2, -1, 1, 2, 9):
            length = struct.unpack_from("<I", data, 4)[0] + change
            yield f"webp {name}, length {change}", data[:4] + struct.pack("<I", length) + data[8:]
        canvases = {"same": (sides, 0, 0), "offset": (wider, 2, 1), "outside": (sides, 1, 0)}
        for (place, (canvas, x, y)), flags, alpha, color in itertools.product(
            canvases.items(), range(4), (2, 18), (b"\0\0\0\0", b"\x10\x80\xf0\xff")
        ):
            corner = x.to_bytes(3, "little") + y.to_bytes(3, "little")
            frame = corner + sides + b"\x64\0\0" + bytes([flags]) + bare
            chunks = [(b"VP8X", bytes([alpha, 0, 0, 0]) + canvas), (b"ANIM", color + b"\0\0"), (b"ANMF", frame)]
            yield f"webp {name}, frame {place} {flags} {alpha} {color!r}", riff(*chunks)
            yield f"webp {name}, frames {place} {flags} {alpha} {color!r}", riff(*chunks, chunks[-1])


# -- JPEG --------------------------------------------------------------------------------------------------------------


def without(data: bytes, marker: int) -> bytes:
    """A JPEG without the first segment of that marker."""
    at = data.find(bytes([0xFF, marker]))
    return data if at < 0 else data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def jpeg_cases(rng: np.random.Generator) -> Iterator[Case]:
    """Adobe's transforms, names and sampling of components, processes, restarts, thumbnails, heights told later."""
    rgb = image_files.picture(45, 37, rng)
    kinds = {
        "gray": encoded(rgb.convert("L"), "JPEG"),
        "colour": encoded(rgb, "JPEG", subsampling=0),
        "progressive": encoded(rgb, "JPEG", subsampling=0, progressive=True),
        "kept RGB": encoded(rgb, "JPEG", keep_rgb=True),
        "CMYK": encoded(rgb.convert("CMYK"), "JPEG"),
    }
    for name, data in kinds.items():
        bare = without(without(data, 0xE0), 0xEE)
        jfif = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"
        for transform, first in itertools.product((None, 0, 1, 2, 3), (b"", jfif)):
            adobe = b"" if transform is None else b"\xff\xee\0\x0eAdobe\0d\0\0\0\0" + bytes([transform])
            yield f"jpeg {name}, Adobe {transform}, JFIF {bool(first)}", bare[:2] + first + adobe + bare[2:]
        frame = bare.find(b"\xff\xc2" if name == "progressive" else b"\xff\xc0")
        components = bare[frame + 9]
        for process in (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC)):
            yield f"jpeg {name}, process {process:x}", bare[: frame + 1] + bytes([process]) + bare[frame + 2 :]
        for precision in (2, 7, 12, 16):
            yield f"jpeg {name}, {precision} bits", bare[: frame + 4] + bytes([precision]) + bare[frame + 5 :]
        samplings = [(h, v) for h in (1, 2, 3, 4) for v in (1, 2, 3, 4)]
        for (h, v), which in itertools.product(samplings, range(components)):
            other = bytearray(bare)
            other[frame + 11 + 3 * which] = h << 4 | v
            # Fewer rows, so that the data suffices.
            other[frame + 5 : frame + 9] = struct.pack(">HH", 11, 17)
            yield f"jpeg {name}, {h} x {v} of {which}", bytes(other)
        if components == 3:
            for names in (b"RGB", b"\0\1\2", b"\1\2\3", b"\1\1\1", b"rgb"):
                other = bytearray(bare)
                scans = [i for i in range(len(other) - 4) if other[i : i + 2] == b"\xff\xda"]
                for i, letter in enumerate(names):
                    old = other[frame + 10 + 3 * i]
                    other[frame + 10 + 3 * i] = letter
                    for scan in scans:
                        for j in range(other[scan + 4]):
                            if bare[scan + 5 + 2 * j] == old:
                                other[scan + 5 + 2 * j] = letter
                yield f"jpeg {name}, called {names!r}", bytes(other)
        scan = bare.find(b"\xff\xda")
        late = bare[: frame + 5] + b"\0\0" + bare[frame + 7 :]
        yield f"jpeg {name}, height later", late[:-2] + b"\xff\xdc\0\4" + struct.pack(">H", 37) + b"\xff\xd9"
        thumbnail = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + kinds["gray"]
        app1 = b"\xff\xe1" + struct.pack(">H", 2 + len(thumbnail)) + thumbnail
        for what, other in {
            "thumbnail": bare[:2] + app1 + bare[2:],
            "fill bytes": bare[:2] + b"\xff\xff\xff" + bare[2:],
            "two in one": bare + kinds["gray"],
            "something behind": bare + b"something",
            "no end": bare[:-2],
            "end early": bare[: scan + 40] + b"\xff\xd9",
            "restarts announced": bare[:scan] + b"\xff\xdd\0\4\0\2" + bare[scan:],
            "comment": bare[:2] + b"\xff\xfe\0\5abc" + bare[2:],
            "unknown segment": bare[:2] + b"\xff\xf0\0\5abc" + bare[2:],
            "garbage between": bare[:2] + b"abc" + bare[2:],
            "restart inside": bare[: scan + 30] + b"\xff\xd0" + bare[scan + 30 :],
        }.items():
            yield f"jpeg {name}, {what}", other
        for cut in range(1, 20):
            yield f"jpeg {name}, {cut} missing", bare[:-cut]
