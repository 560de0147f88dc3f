"""Files that cannot be read, and what a ``DataLoader`` makes of them."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cnnrs._util.notes import note, note_once
from cnnrs.data.read_options import ReadOptions
from cnnrs.errors import CnnrsError, DecodeError

# So many files in a row from the start, and not one good: the folder is wrong, not the files.
CEILING = 256
# The process is out of something; the file is not to blame.
NOT_THE_FILES = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR}


def is_the_process(error: Exception | None) -> bool:
    """Whether the process is out of memory, file handles or the like: no word about the file that was to be read."""
    return isinstance(error, MemoryError) or getattr(error, "errno", 0) in NOT_THE_FILES


class Faults:
    """The files that one ``DataLoader`` skips.

    Attributes:
        errors: (path, reason) of each, in the order they were met. Remove an entry to have its file tried again.
        known: the paths of ``errors``, as they were when the epoch began.
        good: samples of this epoch that are well.
        others: samples that are well and not part of this epoch: it may then consist of bad ones.
        passing: the paths whose bytes could not be had: another time they may.
    """

    def __init__(self) -> None:
        self.errors: list[tuple[str, str]] = []
        self.known: set[str] = set()
        self.good = 0
        self.others = 0
        self.passing: set[str] = set()
        self._failed = 0
        self._samples = 0
        self._told = False

    def begin(self, samples: int) -> None:
        """An epoch of ``samples`` samples begins."""
        self.known = {path for path, _ in self.errors}
        self.good = 0
        self._failed = 0
        self._samples = samples

    def record(self, path: str, error: Exception) -> bool:
        """Whether a file that failed may be skipped.

        Raises:
            DecodeError: all files so far have failed and there were many.
        """
        if not isinstance(error, (DecodeError, OSError, CnnrsError)) or is_the_process(error):
            return False
        reason = str(error)
        # Without a number it is Pillow's word about the contents.
        if isinstance(error, OSError) and error.errno is not None:
            self.passing.add(path)
        else:
            self.passing.discard(path)
        if path not in self.known:
            # The same file twice in an epoch (a sampler with replacement) is one entry.
            self.known.add(path)
            self.errors.append((path, reason))
        self._failed += 1
        if not self._told:
            self._told = True
            note(f'cnnrs.DataLoader skips files that fail (on_error="skip"); loader.errors lists them. {reason}')
        if self.good + self.others == 0 and self._failed >= CEILING:
            raise DecodeError(self._nothing(f"the first {self._failed} files"))
        return True

    def end(self) -> None:
        """The epoch is over.

        Raises:
            DecodeError: it had samples and none of them was good.
        """
        if self.good + self.others == 0 and self._samples and self.errors:
            raise DecodeError(self._nothing(f"all {len(self.errors)} files"))

    def _nothing(self, what: str) -> str:
        first = "; ".join(reason for _, reason in self.errors[:3])
        return f"{what} failed, there is nothing to go on with: {first}. Is this the right folder, may it be read?"


def check_limits(path: str, read: ReadOptions, error: Exception) -> None:
    """Raises ``error`` for a file over the limits: Pillow, asked next, would only mind its own."""
    from PIL import Image

    if read.max_bytes is not None and os.path.getsize(path) > read.max_bytes:
        raise error
    if read.max_pixels is None:
        return
    try:
        with Image.open(path) as image:
            pixels = image.width * image.height
    except Exception as pillows:
        if is_the_process(pillows):
            raise
        raise error from pillows
    if pixels > read.max_pixels:
        raise error


def note_turned() -> None:
    """One warning per process about photos that lie on their side."""
    note_once(
        "turned",
        "some images have an EXIF orientation and are not turned upright, as in torchvision; "
        "DataLoader(..., exif=True) turns them, cnnrs.check(folder).rotated lists them",
    )


def note_not_scaled() -> None:
    """One warning per process about an option without effect."""
    note_once(
        "scaled",
        'decode="scaled" has an effect only where the transform begins with a Resize; images are decoded whole',
    )


_truncated = threading.Lock()


@contextmanager
def accepting_truncated(accept: bool) -> Iterator[None]:
    """Inside, Pillow reads files that end too early, as far as they go, if ``accept``."""
    if not accept:
        yield
        return
    from PIL import ImageFile

    flag: Any = ImageFile
    with _truncated:
        before = flag.LOAD_TRUNCATED_IMAGES
        flag.LOAD_TRUNCATED_IMAGES = True
        try:
            yield
        finally:
            flag.LOAD_TRUNCATED_IMAGES = before
