"""How image files are read: what a user says of it once, and everybody below goes by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cnnrs._records import ReadOptions as Record
from cnnrs.image.limits import pixel_limit
from cnnrs.image.reading import Reader


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises a ``ValueError`` when ``value`` is none of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")


@dataclass(frozen=True)
class ReadOptions:
    """The arguments of a ``DataLoader`` about image files, by the same names.

    Raises:
        ValueError: one of them is no such value.
    """

    truncated: str = "error"
    exif: bool = False
    decode: str = "exact"
    max_pixels: int | None = None
    max_bytes: int | None = None
    scale: str = "none"
    page: int = 0

    def __post_init__(self) -> None:
        check_choice("truncated", self.truncated, ("error", "accept"))
        check_choice("decode", self.decode, ("exact", "scaled", "gpu"))
        # Says whether these are scale and page.
        Reader(self.scale, self.page)
        for name, limit in (("max_pixels", self.max_pixels), ("max_bytes", self.max_bytes)):
            if limit is not None and limit <= 0:
                raise ValueError(f"{name} must be positive, got {limit}")

    @property
    def accepts_truncated(self) -> bool:
        """Whether files that end too early are read as far as they go."""
        return self.truncated == "accept"

    @property
    def is_scaled(self) -> bool:
        """Whether a JPEG before a resize may be decoded at a part of its size."""
        return self.decode == "scaled"

    @property
    def is_on_gpu(self) -> bool:
        """Whether a JPEG is decoded where the batches are delivered; the extension reads the others exactly."""
        return self.decode == "gpu"

    @property
    def reader(self) -> Reader:
        """What reads the files that the extension does not."""
        return Reader(self.scale, self.page)

    @property
    def is_plain(self) -> bool:
        """Whether the first page and Pillow's bytes are wanted, which Rust knows; the rest is left to Python."""
        return self.reader == Reader()

    @property
    def limits(self) -> tuple[int | None, int | None]:
        """Above how many pixels and bytes an image is an error; None for the limit as it comes."""
        return pixel_limit(self.max_pixels), self.max_bytes

    def record(self) -> Record:
        """The same for the extension."""
        pixels, size = self.limits
        return {
            "decode": "scaled" if self.is_scaled else "exact",
            "truncated": "accept" if self.accepts_truncated else "error",
            "exif": self.exif,
            "limits": {"pixels": pixels, "bytes": size},
            "deep": "read" if self.scale == "none" else "leave",
            "paged": "leave" if self.page else "read",
        }

    @property
    def shaping(self) -> dict[str, Any]:
        """Those that decide about the pixels of an image: stored images and features hold for the same ones only.

        A loader that is made with these reads alike.
        """
        shaping: dict[str, Any] = {"truncated": self.truncated, "exif": self.exif, "decode": self.decode}
        # What was stored before there were these goes on being found.
        if self.scale != "none":
            shaping["scale"] = self.scale
        if self.page:
            shaping["page"] = self.page
        return shaping
