"""Single images through the extension's loader alone: what the parity tests compare with Pillow."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from cnnrs._cnnrs import Loader, Memory
from cnnrs._records import ReadOptions


def decode_image(data: bytes, *, exif: bool = False, truncated: str = "error") -> tuple[int, int, bytes]:
    """(height, width, height * width * 3 bytes of RGB) of an image file's bytes."""
    height, width, pixels, _ = decoded(data, exif=exif, truncated=truncated)
    return height, width, pixels


def decoded(data: bytes, *, exif: bool = False, truncated: str = "error") -> tuple[int, int, bytes, bool]:
    """The same, and whether the file says that the camera was turned."""
    loader = Loader({"ops": [], "finish": None, "pillow13": True}, _read(exif, truncated), 0, 0, Memory(0))
    descriptor, path = tempfile.mkstemp()
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        height, width, _, pixels = _only(loader, loader.submit_files([0], [0], [path]))
    finally:
        os.unlink(path)
    return height, width, pixels, loader.saw_turned()


def apply_op(
    rgb: bytes, height: int, width: int, spec: Any, order: str, key: tuple[int, int, int] = (0, 0, 0)
) -> tuple[int, int, bytes]:
    """One operation, spelled as for `Loader`, on RGB: (height, width, bytes), 3 bytes per pixel or 1 if gray.

    `key` is (seed, sample, position) of the draws.
    """
    seed, sample, position = key
    transform: Any = {"ops": [spec], "finish": None, "pillow13": order == "pillow13"}
    loader = Loader(transform, _read(False, "error"), seed, 0, Memory(0))
    image = _only(loader, loader.submit_pixels([sample], [position], [(height, width, 3, rgb)]))
    return image[0], image[1], image[3]


def _read(exif: bool, truncated: Any) -> ReadOptions:
    return {
        "limits": {"pixels": None, "bytes": None}, "exif": exif, "truncated": truncated, "decode": "exact",
        "deep": "read", "paged": "read",
    }  # fmt: skip


def _only(loader: Loader, ticket: int) -> tuple[int, int, int, bytes]:
    kind, results = loader.poll(ticket)
    if kind == "failed":
        raise results[0][1]
    return results[0]
