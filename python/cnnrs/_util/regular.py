"""Opening files of which nobody knows yet that they are files."""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO

# Each is on some systems only: without the last Windows would change the ends of lines.
_FLAGS = sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))


def opened(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file, open for reading.

    Raises:
        OSError: it is none, or cannot be opened; a pipe would be waited for without end.
    """
    number = os.open(path, os.O_RDONLY | _FLAGS)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return open(number, "rb")
