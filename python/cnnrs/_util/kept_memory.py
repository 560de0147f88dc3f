"""Memory that is freed stays with the process from step to step and from epoch to epoch, then goes back."""

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

#: Of Linux's madvise.
_MADV_HUGEPAGE = 14
#: Of the physical memory: the share that comes in large pages; behind it in usual ones.
_LARGE = 0.5

#: Seconds behind the last use: validation, or the next epoch, begins sooner, and wants the same memory.
LINGERS = 2.0

_LOCK = threading.Lock()
#: One for each that is inside, taken out once, whatever interrupts it.
_users: set[object] = set()
_lingering: threading.Timer | None = None


@contextmanager
def kept_memory(wanted: bool = True) -> Iterator[None]:
    """Inside, what is freed is used again; a moment behind the last one it goes back to the system.

    Every step of a network takes and frees the same activations and gradients. glibc gives large blocks back at once,
    so each step pays for new, zeroed pages: up to a sixth of a step of mobilenet_v3_large at 224 x 224. What is kept
    comes in pages of 2 MiB where Linux has them: fewer faults, and fewer misses when addresses are looked up (of
    that network's step, a tenth on a virtual machine). Does nothing without glibc, and where the user has set up its
    malloc.
    """
    malloc = _malloc() if wanted else None
    if malloc is None:
        yield
        return
    user = object()
    try:
        _begin(malloc, user)
        yield
    finally:
        _end(malloc, user)


def _begin(malloc: Any, user: object) -> None:
    global _lingering
    with _LOCK:
        _users.add(user)
        if _lingering is not None:
            _lingering.cancel()
            _lingering = None
        elif len(_users) == 1:
            _set(malloc, _KEPT)
            _use_large_pages(malloc)


def _end(malloc: Any, user: object) -> None:
    global _lingering
    with _LOCK:
        if user not in _users:
            return  # It began in the parent of this process.
        _users.remove(user)
        if not _users:
            _lingering = threading.Timer(LINGERS, _give_back, (malloc,))
            # Nobody waits for it at the end of the program.
            _lingering.daemon = True
            try:
                _lingering.start()
            except RuntimeError:
                # No more threads: the program ends, or the system has a limit.
                _lingering = None
                _free(malloc)


def give_back() -> None:
    """Now, not in a moment: for whoever measures something else in the same process."""
    global _lingering
    with _LOCK:
        if _lingering is not None:
            _lingering.cancel()
            _lingering = None
            _free(_malloc())


def _give_back(malloc: Any) -> None:
    global _lingering
    with _LOCK:
        # Cancelled when it had begun: another one will come.
        if _lingering is threading.current_thread():
            _lingering = None
            _free(malloc)


def _free(malloc: Any) -> None:
    _set(malloc, _USUAL)
    malloc.malloc_trim(0)


def _use_large_pages(malloc: Any) -> None:
    """Address space at the end of the heap, where all that is new will lie; no memory yet."""
    page = os.sysconf("SC_PAGE_SIZE")
    size = int(_LARGE * os.sysconf("SC_PHYS_PAGES")) * page
    # None where the user allows less address space.
    begin = malloc.malloc(size)
    if begin:
        first = -(-begin // page) * page
        # Fails where the system has no such pages: nothing is lost.
        malloc.madvise(first, (begin + size - first) // page * page, _MADV_HUGEPAGE)
        malloc.free(begin)


def _in_a_fork() -> None:
    """Whoever uses it, and the thread that would give memory back, are in the parent."""
    global _LOCK, _users, _lingering
    malloc = _malloc() if _users or _lingering is not None else None
    _LOCK, _users, _lingering = threading.Lock(), set(), None
    if malloc is not None:
        _set(malloc, _USUAL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_a_fork)


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
    library.malloc.argtypes, library.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    library.free.argtypes = [ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return library
