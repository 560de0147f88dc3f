"""Image files as Pillow opens them, where more is asked than it does by itself: another page, other than 8 bits."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cnnrs.errors import DecodeError
from cnnrs.image import plugins

if TYPE_CHECKING:
    from PIL import Image

#: How samples of more than 8 bits become bytes.
SCALES = ("none", "full", "percentile")
#: What "percentile" makes black and white: the percentiles to which nnU-Net clips CT images (Isensee et al., Nature
#: Methods 18, 2021), there of a data set's foreground, here of all samples of the image.
PERCENTILES = (0.5, 99.5)
# The second picture of a JPEG (to Pillow: MPO) is a preview, or says where a screen is to shine brighter.
_ONE_PAGE = ("JPEG", "MPO")


@dataclass(frozen=True)
class Reader:
    """Opens an image file as a PIL image in mode RGB: what a data set calls with a path.

    Samples of 8 bits or fewer are as Pillow has them, whatever ``scale`` is. Of 16-bit colours Pillow keeps the high
    bytes: "full" leaves these as they are, "percentile" stretches them.

    Args:
        scale: how samples of more than 8 bits become 0 to 255. "none": as Pillow does it, 16-bit gray above 255 and
            floats above 255 are white. "full": 0 to the largest value of the type (65,535; 1.0 for floats).
            "percentile": from the 0.5th to the 99.5th percentile of the image, what is outside is black or white.
        page: which page is taken, from 0 on, of a file that has several (TIFF, GIF, WebP, animated PNG). A file with
            one page is read as it is; so are JPEGs, whose further pictures are previews.

    Raises:
        ValueError: one of them is no such value.
        DecodeError: when called, for a file with several pages, but not so many.
    """

    scale: str = "none"
    page: int = 0

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f"scale must be {' or '.join(map(repr, SCALES))}, got {self.scale!r}")
        if type(self.page) is not int or self.page < 0:
            raise ValueError(f"page must be a whole number from 0 on, got {self.page!r}")

    def __call__(self, path: str | os.PathLike[str]) -> Image.Image:
        from PIL import Image

        name = os.fspath(path)
        plugins.register()
        # As torchvision does it: Pillow would leave the file open.
        with open(name, "rb") as file, Image.open(file) as image:
            turn_to(image, self.page, name)
            return to_rgb(image, self.scale)


def pages(image: Image.Image) -> int:
    """How many pages a file has."""
    return 1 if image.format in _ONE_PAGE else int(getattr(image, "n_frames", 1))


def turn_to(image: Image.Image, page: int, path: str) -> None:
    """Opens a page.

    Raises:
        DecodeError: there are several, but not so many.
    """
    if not page or image.format in _ONE_PAGE:
        return
    try:
        image.seek(page)
    except EOFError:
        count = _count(path)
        if count == 1:
            return
        error = DecodeError(f"{path} has {count} pages, 0 to {count - 1}: there is no page {page}")
        error.kind = "unsupported"
        raise error from None


def _count(path: str) -> int:
    from PIL import Image

    # Behind a page that is not there Pillow counts one TIFF page too many.
    with Image.open(path) as image:
        return pages(image)


def to_rgb(image: Image.Image, scale: str) -> Image.Image:
    """An image that Pillow has opened, in mode RGB, with its ``info``."""
    from PIL import Image

    found = samples(image) if scale != "none" else None
    if found is None:
        return image.convert("RGB")
    levels = scaled(found, scale)
    scaled_image = Image.fromarray(levels) if levels.ndim == 3 else Image.fromarray(levels).convert("RGB")
    # Where EXIF is looked for.
    scaled_image.info = dict(image.info)
    return scaled_image


# -- samples of more than 8 bits ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """Samples of more than 8 bits.

    Attributes:
        kind: in words.
        values: (H, W) numbers of the file; (H, W, 3) uint8 of 16-bit colours, whose high bytes are all that Pillow has.
    """

    kind: str
    values: NDArray[Any]

    @property
    def most(self) -> float:
        """What "full" makes white."""
        return 255.0 if self.kind == _COLOR else _most(self.kind)


def samples(image: Image.Image) -> Samples | None:
    """The samples of an image that has more than 8 bits of each, None where it has not."""
    kind = depth(image)
    if kind is None:
        return None
    if kind == _COLOR:
        return Samples(kind, np.asarray(image.convert("RGB")))
    values = np.asarray(image)
    # Pillow has no unsigned ones of 32 bits, and keeps their bits.
    return Samples(kind, values.view(np.uint32) if kind == "32-bit gray" else values)


def depth(image: Image.Image) -> str | None:
    """What the samples are, by the file's header, where they have more than 8 bits; None where they have not."""
    if image.mode == "F":
        return _FLOAT
    if image.mode.startswith("I"):
        tags = getattr(image, "tag_v2", None)
        if tags is None:
            # PNG and PNM, whose numbers go up to 65,535 here whatever their maximum is.
            return "16-bit gray"
        bits, is_signed = tags.get(258, (16,))[0], tags.get(339, (1,))[0] == 2
        return f"{bits}-bit {'signed ' if is_signed else ''}gray"
    return _COLOR if image.mode in ("RGB", "RGBA", "RGBX", "LA", "CMYK") and ";16" in _raw_mode(image) else None


_FLOAT, _COLOR = "float", "16-bit colour"


def _most(kind: str) -> float:
    """The largest value of a type."""
    if kind == _FLOAT:
        return 1.0
    return float(2 ** (int(kind.partition("-")[0]) - ("signed" in kind)) - 1)


def _raw_mode(image: Image.Image) -> str:
    """How Pillow calls the samples in the file."""
    # Of every tile the codec, where it is, and what the codec is told: a raw mode, or a tuple that begins with it.
    tiles = getattr(image, "tile", None)
    told = tiles[0][3] if tiles else ""
    return str(told[0] if isinstance(told, tuple) and told else told)


def scaled(found: Samples, scale: str) -> NDArray[np.uint8]:
    """The samples as bytes, by "full" or "percentile"; NaN is black."""
    values = found.values
    low, high = 0.0, found.most
    if scale == "percentile":
        numbers = values[np.isfinite(values)] if values.dtype.kind == "f" else values
        # In double precision, whatever the file has.
        kept = numbers.astype(np.float64) if values.dtype.itemsize > 2 else numbers
        low, high = np.percentile(kept, PERCENTILES) if kept.size else (0.0, 1.0)
    if values.dtype.kind == "u" and values.dtype.itemsize <= 2:
        # A value is looked up faster than it is divided.
        table = _levels(np.arange(256**values.dtype.itemsize), low, high)
        levels: NDArray[np.uint8] = table[values]
        return levels
    return _levels(values, low, high)


def _levels(values: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    values = values.astype(np.float64)
    # Of an image of one value all is black but what is above.
    share = (values - low) / (high - low) if high > low else np.where(values > high, 1.0, 0.0)
    levels: NDArray[np.uint8] = np.rint(np.nan_to_num(share, nan=0.0).clip(0, 1) * 255).astype(np.uint8)
    return levels


# -- what is lost ------------------------------------------------------------------------------------------------------


class Span(NamedTuple):
    """The values of an image with more than 8 bits.

    Attributes:
        kind: of the samples, in words.
        low, high: the lowest and the highest that is a number.
    """

    kind: str
    low: float
    high: float

    def loss(self, scale: str = "none") -> str:
        """What is lost when the image is read with this scale; "" when nothing is."""
        if scale == "percentile":
            return ""
        if self.kind == _COLOR:
            # Of two bytes the higher is kept: a camera's 12 or 14 bits leave little of it.
            return "nearly black" if self.high < _DARK else ""
        if scale == "none" and self.kind == _FLOAT and self.low >= 0 and 0 < self.high <= 1:
            return "black, for fractions are cut off"
        if scale == "full" and self.kind != _FLOAT and self.high * 16 < _most(self.kind):
            return "nearly black"
        most = 255 if scale == "none" else _most(self.kind)
        over, under = f"white above {most:g}" if self.high > most else "", "black below 0" if self.low < 0 else ""
        return " and ".join(filter(None, (over, under)))

    def __str__(self) -> str:
        return f"{self.kind}, {_number(self.low)} to {_number(self.high)}"


# A quarter of 16 bits.
_DARK = 2**14


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def span(path: str) -> Span | None:
    """The values of the first page of a file with more than 8 bits, None of another; reads its pixels."""
    from PIL import Image

    with open(path, "rb") as file, Image.open(file) as image:
        found = samples(image)
    if found is None:
        return None
    values = found.values
    if found.kind == _FLOAT:
        numbers = values[np.isfinite(values)]
        return Span(_FLOAT, float(numbers.min()), float(numbers.max())) if numbers.size else None
    low, high = int(values.min()), int(values.max())
    # The high bytes stand for all that begins with them.
    return Span(_COLOR, low << 8, high << 8 | 255) if found.kind == _COLOR else Span(found.kind, low, high)
