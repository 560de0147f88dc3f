"""The threads with which torch computes one operation."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch


def library() -> str:
    """The one through which they are found."""
    return str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")


@contextmanager
def one_thread(wanted: bool = True) -> Iterator[None]:
    """Inside, operations that this thread starts run on it alone, as in torch's worker processes.

    Other threads are not concerned. Steps on single images are too small to be shared, and torch's threads would wait
    for each other while cnnrs's have the cores. `torch.set_num_threads` is not used: new threads of the process would
    take its number over for good.
    """
    setter = _setter() if wanted else None
    threads = torch.get_num_threads() if setter is not None else 1
    if setter is None or threads == 1:
        yield
        return
    setter(1)
    try:
        yield
    finally:
        # Unless the user's code has set another number.
        if torch.get_num_threads() == 1:
            setter(threads)


@lru_cache(maxsize=1)
def _setter() -> Any:
    """OpenMP's own setting of the calling thread, in the library that torch is linked with; None without one."""
    try:
        setter = ctypes.CDLL(torch._C.__file__).omp_set_num_threads
    except (AttributeError, OSError):
        return None
    threads = torch.get_num_threads()
    setter(threads + 1)
    found = torch.get_num_threads() == threads + 1
    setter(threads)
    return setter if found else None
