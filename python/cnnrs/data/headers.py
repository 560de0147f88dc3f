"""What a file's header says, as Pillow reads it."""

from __future__ import annotations

from struct import iter_unpack, unpack
from typing import IO, NamedTuple

from cnnrs.image.reading import depth, pages


class Header(NamedTuple):
    """What is known of an image before its pixels are read.

    Attributes:
        format: Pillow's name.
        mode: Pillow's.
        channels: how many a TIFF has, of which Pillow may have left some out; 0 for other formats.
        size: width and height.
        orientation: EXIF's, 1 to 8; 1 is upright.
        pages: how many there are.
        depth: what the samples are, where they have more than 8 bits.
    """

    format: str
    mode: str
    channels: int
    size: tuple[int, int]
    orientation: int
    pages: int
    depth: str | None

    @property
    def unusual(self) -> str:
        """The mode and channels in words, where the image is neither RGB nor gray of 8 bits; "" where it is."""
        if self.mode == "RGB" and self.channels > 3:
            return f"RGB, the first three of {self.channels} channels"
        return "" if self.mode in ("RGB", "L") else self.mode


def open_header(path: str, *, exif: bool = True) -> Header:
    """The header of a file.

    Args:
        path: the file.
        exif: whether the orientation is looked for, which takes a PNG's pixels; without it it is 1.

    Raises:
        Exception: whatever Pillow and its plug-ins raise about files that they do not understand.
    """
    from PIL import Image

    with Image.open(path) as image:
        # Before the image is loaded for its EXIF data, and pages are turned to be counted.
        name, mode, size, kind = image.format or "unknown", image.mode, image.size, depth(image)
        orientation = image.getexif().get(0x0112, 1) if exif else 1
        if not (isinstance(orientation, int) and 1 <= orientation <= 8):
            orientation = 1
        channels = getattr(image, "tag_v2", {}).get(277, 0)
        return Header(name, mode, channels, size, orientation, pages(image), kind)


# Bits per sample, photometric interpretation, samples per pixel, extra samples, their format.
_TAGS = (258, 262, 277, 338, 339)
_BYTES = {1: 1, 3: 2, 4: 4}


def tiff_kind(file: IO[bytes]) -> tuple[bytes, ...] | None:
    """What TIFFs have in common whose first page Pillow reads alike, and that have no second; None of any other file.

    Opening one with Pillow takes half a millisecond, which is much for each of thousands.

    Args:
        file: at its beginning.

    Raises:
        struct.error: the file ends too early.
    """
    head = file.read(8)
    if head[:4] not in (b"II*\0", b"MM\0*"):
        return None
    order = "<" if head.startswith(b"II") else ">"
    file.seek(unpack(f"{order}I", head[4:])[0])
    (count,) = unpack(f"{order}H", file.read(2))
    entries = file.read(12 * count)
    if file.read(4) != bytes(4):
        return None
    found = [head[:2]]
    for tag, kind, number, value in iter_unpack(f"{order}HHI4s", entries):
        if tag in _TAGS:
            length = number * _BYTES.get(kind, 1 << 20)
            if length > 64:
                return None
            if length > 4:
                file.seek(unpack(f"{order}I", value)[0])
                value = file.read(length)
            found += [bytes([tag & 255, kind]), value[:length]]
    return tuple(found)
