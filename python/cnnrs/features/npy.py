"""The `.npy` file of a store's rows. It has one form of header only, so that every byte of it can be compared."""

from __future__ import annotations

import errno
import math
import os
import re
from dataclasses import dataclass

import numpy as np
import torch

from cnnrs._util.regular import opened

#: Bytes before the first row, as the extension writes them.
HEADER = 256

_BLOCK_BYTES = 4 << 20
# NumPy has no bfloat16: its bits are stored as uint16, which features never are.
_DESCR = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "float64": "<f8"}
_NAMES = {descr: name for name, descr in _DESCR.items()}
_TEXT = re.compile(rb"\{'descr': '(<[fu][248])', 'fortran_order': False, 'shape': \(([0-9, ]+)\), \} *\n")


@dataclass(frozen=True)
class Layout:
    """Rows as a `.npy` file has them: `shape` is (N, ...), `dtype` torch's name."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.shape[1:]) * getattr(torch, self.dtype).itemsize  # type: ignore[no-any-return]

    @property
    def file_bytes(self) -> int:
        """Bytes of the whole file."""
        return HEADER + self.shape[0] * self.row_bytes

    def blocks(self) -> list[tuple[int, int]]:
        """(first row, rows) of the parts that have a checksum each."""
        rows = max(1, _BLOCK_BYTES // max(self.row_bytes, 1))
        return [(start, min(rows, self.shape[0] - start)) for start in range(0, self.shape[0], rows)]

    def header(self) -> bytes:
        """The only header that a file of these rows may have."""
        text = f"{{'descr': '{_DESCR[self.dtype]}', 'fortran_order': False, 'shape': {self.shape}, }}"
        start = b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little")
        return (start + text.encode()).ljust(HEADER - 1) + b"\n"

    def mapped(self, path: str | os.PathLike[str]) -> torch.Tensor:
        """The rows of a file of this layout, read when they are used; what is written to them never reaches it."""
        kind = np.dtype(_DESCR[self.dtype])
        rows = torch.from_numpy(np.memmap(path, kind, mode="c", offset=HEADER, shape=self.shape))
        return rows.view(torch.bfloat16) if self.dtype == "bfloat16" else rows


def layout_of(path: str | os.PathLike[str]) -> Layout | None:
    """What the header of a file says; None when there is no file, or its header is not one that we write."""
    try:
        data = read(path, HEADER)
    except FileNotFoundError:
        return None
    match = _TEXT.fullmatch(data[10:])
    if match is None or match[1].decode() not in _NAMES:
        return None
    try:
        shape = tuple(int(size) for size in match[2].removesuffix(b",").split(b","))
    except ValueError:
        return None
    layout = Layout(shape, _NAMES[match[1].decode()])
    return layout if layout.header() == data else None


def read(path: str | os.PathLike[str], most: int = -1) -> bytes:
    """The first `most` bytes of a file.

    Raises:
        FileNotFoundError: there is no regular file of this name; a pipe would be waited for without end.
    """
    try:
        with opened(path) as file:
            return file.read(most)
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.EINVAL, errno.ENXIO, errno.EISDIR):
            raise
        raise FileNotFoundError(error.errno, error.strerror, error.filename) from None
