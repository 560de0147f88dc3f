"""Where a ``DataLoader`` keeps decoded images: ``cache="ram"`` and ``cache=<folder>``."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnnrs import _cnnrs
from cnnrs._records import Op
from cnnrs._util.notes import note
from cnnrs._util.units import size
from cnnrs.data.read_options import ReadOptions
from cnnrs.image.lowering import pillow13

# What a cache in a folder leaves to others on that disk.
SPARED = 1 << 30


class ImageCache:
    """One cache of one ``DataLoader``: opened when first used, again when the transform has changed.

    Args:
        place: ``"ram"``, or a folder.
        limit: bytes; None means half of the free memory, or all but 1 GiB of what is free on the disk.
    """

    def __init__(self, place: str | os.PathLike[str], limit: int | None) -> None:
        self.place = os.fspath(place)
        if self.place == "":
            raise ValueError('cache must be "ram" or a folder, got ""')
        if limit is not None and (not isinstance(limit, int) or limit <= 0):
            raise ValueError(f"cache_bytes must be a positive number of bytes, got {limit!r}")
        self.limit = limit
        self._open: tuple[bytes, _cnnrs.Cache] | None = None
        self._told: set[str] = set()

    def open(self, ops: Sequence[Op], read: ReadOptions) -> _cnnrs.Cache:
        """The cache of images behind ``ops``."""
        key = self.key(ops, read)
        if self._open is None or self._open[0] != key:
            # First the old one: two of them may be more than the memory holds.
            self._open = None
            limit = self.limit if self.limit is not None else self._free()
            path = None if self.place == "ram" else self.path(key)
            self._open = key, _cnnrs.Cache(limit, path, key)
        else:
            self._open[1].refresh()
        return self._open[1]

    def key(self, ops: Sequence[Op], read: ReadOptions) -> bytes:
        """Everything that shapes an image besides its file, whose path, size and time are kept with the image."""
        import PIL

        shaped = {
            "cnnrs": _cnnrs.__version__,
            # It decodes what Rust does not, and decides the order of the passes of a resize.
            "pillow": PIL.__version__,
            "vertical first": pillow13(),
            **read.shaping,
            # In the spelling of the first version, whose caches stay good: without the names of the arguments.
            "ops": [list(op.values()) for op in ops],
        }
        return json.dumps(shaped, sort_keys=True).encode()

    def path(self, key: bytes) -> str:
        """The file for ``key`` in the folder."""
        return os.path.join(self.place, f"{hashlib.blake2b(key, digest_size=8).hexdigest()}.images")

    def tell(self, samples: int) -> None:
        """At the end of an epoch: one warning when images did not fit, one when they could not be stored."""
        if self._open is None:
            return
        images, used, limit, refused, trouble = self._open[1].status()
        where = "in memory" if self.place == "ram" else f"in {self.place}"
        if refused and "full" not in self._told:
            self._told.add("full")
            note(
                f"the cache {where} is full: {images:,} of {samples:,} images in {size(used)}, the limit is "
                f"{size(limit)}; the others are decoded in every epoch. Raise cache_bytes, or resize to fewer pixels"
            )
        if trouble is not None and "trouble" not in self._told:
            self._told.add("trouble")
            note(f"the cache {where} takes no more images: {trouble}. The others are decoded in every epoch")

    def status(self) -> dict[str, int]:
        """Images and bytes that are kept, the limit in bytes, and images that found no room."""
        images, used, limit, refused, _ = self._open[1].status() if self._open is not None else (0, 0, 0, 0, None)
        return {"images": images, "bytes": used, "limit": limit, "refused": refused}

    def _free(self) -> int:
        if self.place == "ram":
            return available_memory() // 2
        folder = Path(self.place).absolute()
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        # What is already in the folder counts as free: the limit is about the whole file.
        ours = sum(file.stat().st_size for file in folder.glob("*.images")) if folder.is_dir() else 0
        return max(shutil.disk_usage(there).free + ours - SPARED, 0)

    def __getstate__(self) -> dict[str, Any]:
        # In another process a folder is opened again, memory starts empty.
        return {**self.__dict__, "_open": None}


def open_cache(place: str | os.PathLike[str] | None, limit: int | None) -> ImageCache | None:
    """The cache that a ``DataLoader`` with these arguments has.

    Raises:
        ValueError: a limit without a cache, or one of them is no such value.
    """
    if place is None and limit is not None:
        raise ValueError('cache_bytes limits a cache: give cache="ram" or cache=<folder> as well')
    return None if place is None else ImageCache(place, limit)


def available_memory() -> int:
    """Bytes that this process may still take: the machine's, or its container's where that is less."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        if not hasattr(os, "sysconf"):
            raise OSError("this system does not say how much memory is free: give cache_bytes") from None
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most = int(Path("/sys/fs/cgroup", limit).read_text())
            free = min(free, max(most - int(Path("/sys/fs/cgroup", used).read_text()), 0))
        except (OSError, ValueError):
            # No such file, or "max".
            continue
    return free
