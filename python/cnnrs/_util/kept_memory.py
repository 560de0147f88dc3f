"""Memory that is freed stays with the process while a training runs, instead of going back to the system."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

#: Of glibc's malloc.h: mallopt's names.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
#: Without trimming, and without mappings of their own for large blocks.
_KEPT = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
#: Where glibc's own adaption ends once a large block has been freed, as every network does; it cannot be switched on
#: again.
_USUAL = ((_MMAP_MAX, 65536), (_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 64 << 20))

_LOCK = threading.Lock()
_users = 0


@contextmanager
def kept_memory(wanted: bool = True) -> Iterator[None]:
    """Inside, what is freed is used again; behind the last one it goes back to the system.

    Every step of a network takes and frees the same activations and gradients. glibc gives large blocks back at once,
    so each step pays for new, zeroed pages: up to a sixth of a step of mobilenet_v3_large at 224 x 224. Does nothing
    without glibc, and where the user has set up its malloc.
    """
    malloc = _malloc() if wanted else None
    if malloc is None:
        yield
        return
    _count(malloc, 1)
    try:
        yield
    finally:
        _count(malloc, -1)


def _count(malloc: Any, change: int) -> None:
    global _users
    with _LOCK:
        _users += change
        if change > 0 and _users == 1:
            _set(malloc, _KEPT)
        elif _users == 0:
            _set(malloc, _USUAL)
            malloc.malloc_trim(0)


def _set(malloc: Any, options: tuple[tuple[int, int], ...]) -> None:
    for name, value in options:
        malloc.mallopt(name, value)


@lru_cache(maxsize=1)
def _malloc() -> Any:
    if sys.platform != "linux" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return None
    try:
        library = ctypes.CDLL(None)
        # Another C library has other numbers, or none.
        library.gnu_get_libc_version  # noqa: B018
    except (AttributeError, OSError):
        return None
    library.malloc_trim.argtypes = [ctypes.c_size_t]
    return library
