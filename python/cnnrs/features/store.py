"""The folder that holds features, safe at every moment: `features.npy`, `labels.npy`, `meta.json`.

While features are computed they are in `features.npy.partial`, and `features.journal` says which rows of it are safely
on disk. `meta.json.pending` is written last; from then on the new files count, and whoever comes next finishes the
renaming.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cnnrs import _cnnrs
from cnnrs._util.notes import note
from cnnrs.features.npy import Layout, layout_of, read

if sys.platform != "win32":
    import fcntl

#: Version of the folder's layout; another number is not read.
FORMAT = 2

_NAMES = ("features.npy", "labels.npy", "meta.json")
_WORKING = (
    "features.npy.partial",
    "labels.npy.partial",
    "meta.json.partial",
    "meta.json.pending",
    "features.journal",
    "features.journal.pending",
    "features.npy.previous",
    "features.journal.previous",
)
_SHARED = re.compile(r"features\.journal\.\d+")
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EINVAL}


def is_ours(name: str) -> bool:
    """Whether a file of this name belongs to a folder of features."""
    return name in (*_NAMES, *_WORKING) or _SHARED.fullmatch(name) is not None


@dataclass(frozen=True)
class Journal:
    """What a journal says: its header, (first row, rows, checksum, identities of the rows) of what is safe, and
    where the records begin.
    """

    header: dict[str, Any]
    runs: list[tuple[int, int, int, list[str]]]
    begin: int


class Store:
    """One folder of features.

    Args:
        folder: made when something is written.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._verified: tuple[Any, list[tuple[int, int]]] = (None, [])

    def path(self, name: str) -> Path:
        """A file of the folder."""
        return self.folder / name

    # -- reading ---------------------------------------------------------------------------------------------

    def meta(self) -> dict[str, Any] | None:
        """What `meta.json` says; None when there is none, or it is damaged."""
        try:
            return _parsed(read(self.path("meta.json")))
        except FileNotFoundError:
            return None

    def layout(self, meta: dict[str, Any]) -> Layout:
        """The layout that `meta` states."""
        return Layout(tuple(meta["shape"]), meta["dtype"])

    def is_whole(self, meta: dict[str, Any]) -> bool:
        """Whether all of `features.npy` is what was written."""
        return layout_of(self.path("features.npy")) == self.layout(meta) and not self.damaged(meta)

    def damaged(self, meta: dict[str, Any]) -> list[tuple[int, int]]:
        """(first row, rows) of the blocks of `features.npy` that are not what was written, whatever its header says."""
        layout = self.layout(meta)
        blocks = layout.blocks()
        path = self.path("features.npy")
        try:
            if not path.is_file():
                return blocks
            status = path.stat()
            # One reading per call is enough: a store may be large.
            state = meta["checksum"], status.st_ino, status.st_size, status.st_mtime_ns
            if self._verified[0] == state:
                return self._verified[1]
            found = _cnnrs.row_checksums(path, layout.row_bytes, blocks)
        except FileNotFoundError:
            return blocks
        expected = meta["checksums"]["features"]
        if len(expected) != len(blocks):
            return blocks
        bad = [block for block, crc, wanted in zip(blocks, found, expected, strict=True) if crc != wanted]
        self._verified = state, bad
        return bad

    def labels(self, meta: dict[str, Any]) -> torch.Tensor:
        """The stored labels.

        Raises:
            ValueError: the file is not what was written.
        """
        path = self.path("labels.npy")
        try:
            data = read(path)
        except FileNotFoundError:
            raise ValueError(f"{path} is missing: call preconv again") from None
        if zlib.crc32(data) != meta["checksums"]["labels"]:
            raise ValueError(f"{path} is damaged: its checksum is not the one in meta.json; call preconv again")
        return torch.from_numpy(np.load(io.BytesIO(data)))

    def features(self, meta: dict[str, Any]) -> torch.Tensor | None:
        """The stored features, memory-mapped: a row is read when it is used. None if `meta` is out of date.

        Raises:
            ValueError: the header or the size of the file are not those of these rows.
        """
        path, layout = self.path("features.npy"), self.layout(meta)
        right = layout_of(path) == layout and path.stat().st_size >= layout.file_bytes
        mapped = layout.mapped(path) if right else None
        # A commit takes meta.json away before it replaces the rows: these are its rows if it is still there.
        if (self.meta() or {}).get("checksum") != meta["checksum"]:
            return None
        if mapped is None:
            state = "damaged: its header or its size is not what meta.json says" if path.exists() else "missing"
            raise ValueError(f"{path} is {state}; call preconv again")
        return mapped

    def partial_layout(self, name: str = "features.npy.partial") -> Layout | None:
        """The layout of a file in the making, None when there is none that can be read."""
        return layout_of(self.path(name))

    def journal(self, name: str = "features.journal") -> Journal | None:
        """What is safe of a file in the making, None when nothing is. A torn last record is cut off."""
        try:
            data = read(self.path(name))
        except FileNotFoundError:
            return None
        text, runs, (begin, end) = _cnnrs.parse_journal(data)
        if end < len(data):
            os.truncate(self.path(name), end)
        header = None if text is None else json.loads(text)
        if header is None or header.get("format") != FORMAT:
            return None
        return Journal(header, runs, begin)

    # -- writing ---------------------------------------------------------------------------------------------

    @contextmanager
    def locked(self, verbose: bool) -> Iterator[None]:
        """The folder, made when needed, for this process alone; waits for another one and says so.

        Raises:
            FileExistsError: the folder holds files that are not features; nothing is touched.
            PermissionError: the folder cannot be written.
        """
        with _explained(self.folder):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise type(error)(error.errno, "out= names a folder, but here is a file", str(self.folder)) from None
            self._refuse_others()
            handle = _opened(self.folder)
        try:
            self._wait(handle, verbose)
            with _explained(self.folder):
                self._recover()
                yield
        finally:
            if handle is not None:
                os.close(handle)

    def _wait(self, handle: int | None, verbose: bool) -> None:
        told = False
        while True:
            try:
                _lock(handle)
                return
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    note(f"{self.folder} is on a file system without locks: let only one process write there")
                    return
                if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EINTR):
                    raise
            if verbose and not told:
                print(f"{self.folder}: another process is writing features there, waiting for it", flush=True)
                told = True
            time.sleep(0.05)

    def _refuse_others(self) -> None:
        entries = sorted(os.scandir(self.folder), key=lambda entry: entry.name)
        others = [entry.name for entry in entries if not is_ours(entry.name)]
        if others:
            raise FileExistsError(f"{self.folder} holds {others[0]!r}, not a feature file: give a folder of its own")
        for entry in entries:
            if not entry.is_file():
                raise FileExistsError(f"{entry.path} is no file, but features are kept under this name: remove it")

    def start(self, header: dict[str, Any]) -> None:
        """Begin new features; those in the making, if any, become `previous`."""
        if self.partial_layout() is not None and self.journal() is not None:
            os.replace(self.path("features.npy.partial"), self.path("features.npy.previous"))
            os.replace(self.path("features.journal"), self.path("features.journal.previous"))
        self.drop_rows()
        self._write_header("features.journal", {"format": FORMAT, **header})

    def drop_rows(self) -> None:
        """Forget the rows in the making, not what the journal plans."""
        self._unlink("features.npy.partial")

    def _write_header(self, name: str, header: dict[str, Any]) -> None:
        self._write(name, _cnnrs.journal_line(json.dumps(header)))

    def note(self, more: dict[str, Any]) -> None:
        """Add to what the journal says the rows are of. The records stay; nobody may be writing them."""
        journal = self.journal()
        if journal is None:
            return
        records = read(self.path("features.journal"))[journal.begin :]
        header = _cnnrs.journal_line(json.dumps({**journal.header, **more}))
        self._write("features.journal.pending", header + records)
        os.replace(self.path("features.journal.pending"), self.path("features.journal"))
        self._sync()

    def shared_journal(self, rank: int) -> Path:
        """The journal of one of several processes that fill the same file."""
        if rank == 0:
            return self.path("features.journal")
        own = self.path(f"features.journal.{rank}")
        journal = self.journal()
        if not own.exists() and journal is not None:
            self._write_header(own.name, journal.header)
        return own

    def absorb(self) -> None:
        """Put what other processes have recorded into the journal."""
        journal = self.journal()
        for path in sorted(self.folder.glob("features.journal.[0-9]*")):
            other = self.journal(path.name)
            if journal is not None and other is not None and other.header == journal.header:
                with open(self.path("features.journal"), "ab") as file:
                    file.write(path.read_bytes()[other.begin :])
                    file.flush()
                    os.fsync(file.fileno())
            path.unlink()

    def discard(self) -> None:
        """Forget what is in the making."""
        self._unlink(
            "features.journal", "features.npy.partial", "features.journal.previous", "features.npy.previous",
            "features.journal.pending",
        )  # fmt: skip

    def commit(self, layout: Layout, labels: torch.Tensor, meta: dict[str, Any]) -> None:
        """Make the new rows (or the ones that are there, if none are in the making), labels and meta the store's."""
        rows = self.path("features.npy.partial")
        rows = rows if rows.exists() else self.path("features.npy")
        crcs = _cnnrs.row_checksums(rows, layout.row_bytes, layout.blocks())
        # Not straight into the file: NumPy's error for a full disk does not say that it is full.
        file = io.BytesIO()
        np.save(file, labels.numpy())
        self._write("labels.npy.partial", file.getvalue())
        checksums = {"features": crcs, "labels": zlib.crc32(file.getvalue())}
        meta = {"format": FORMAT, "shape": list(layout.shape), "dtype": layout.dtype, **meta, "checksums": checksums}
        meta["checksum"] = _meta_checksum(meta)
        self._write("meta.json.partial", json.dumps(meta, separators=(",", ":")).encode())
        os.replace(self.path("meta.json.partial"), self.path("meta.json.pending"))
        self._sync()
        self._recover()

    def _recover(self) -> None:
        """Finish a commit that was interrupted."""
        if not self.path("meta.json.pending").exists():
            return
        if (_parsed(read(self.path("meta.json.pending"))) or {}).get("format") != FORMAT:
            # Damaged: nobody knows which rows it spoke of. Those in the making have their journal.
            self._unlink("meta.json.pending")
            return
        self._unlink("meta.json")
        for name in ("features.npy", "labels.npy"):
            with suppress(FileNotFoundError):
                os.replace(self.path(f"{name}.partial"), self.path(name))
        self._sync()
        os.replace(self.path("meta.json.pending"), self.path("meta.json"))
        self.discard()
        self._sync()

    def _write(self, name: str, data: bytes) -> None:
        path = self.path(name)
        try:
            with open(path, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            # Writing, unlike opening, does not say to which file.
            raise OSError(error.errno, error.strerror, str(path)) from error
        self._sync()

    def _unlink(self, *names: str) -> None:
        for name in names:
            self.path(name).unlink(missing_ok=True)

    def _sync(self) -> None:
        handle = _opened(self.folder)
        if handle is None:
            return
        try:
            os.fsync(handle)
        except OSError as error:
            # Some network file systems do not flush folders.
            if error.errno not in _NO_LOCKS:
                raise
        finally:
            os.close(handle)


def _opened(folder: Path) -> int | None:
    """The folder itself, to lock it and to flush its names. None on Windows, which opens no folders."""
    return None if sys.platform == "win32" else os.open(folder, os.O_RDONLY)


def _lock(handle: int | None) -> None:
    if sys.platform == "win32":
        raise OSError(errno.ENOLCK, "this system does not lock folders")
    elif handle is not None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Says what to do when the folder cannot be written."""
    try:
        yield
    except OSError as error:
        place = folder if error.filename is None else Path(os.fsdecode(error.filename))
        ours = place.is_relative_to(folder) or folder.is_relative_to(place)
        # A photo that may not be read says so itself.
        if not ours or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        text = f"{error.strerror}: features cannot be written to {folder}; give out= a folder that can be written"
        raise PermissionError(error.errno, text, error.filename) from error


def _parsed(data: bytes) -> dict[str, Any] | None:
    """What a `meta.json` says, None when it is damaged."""
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError):
        return None
    if not isinstance(meta, dict):
        return None
    return None if meta.get("format") == FORMAT and meta.get("checksum") != _meta_checksum(meta) else meta


def _meta_checksum(meta: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps({key: value for key, value in meta.items() if key != "checksum"}).encode())


def good_rows(path: Path, layout: Layout, runs: Sequence[tuple[int, int, int, list[str]]]) -> dict[int, str]:
    """Row -> identity of the journal's rows that are in the file as they were written."""
    within = [run for run in runs if run[0] + run[1] <= layout.shape[0]]
    found = _cnnrs.row_checksums(path, layout.row_bytes, [(start, count) for start, count, _, _ in within])
    good: dict[int, str] = {}
    for (start, _, crc, ids), now in zip(within, found, strict=True):
        if crc == now:
            good.update(enumerate(ids, start))
    return good
