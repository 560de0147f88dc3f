"""``check``: what is wrong with a folder of images, before an epoch finds out."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Literal

from cnnrs import _cnnrs
from cnnrs.data.bad_files import is_the_process
from cnnrs.data.copies import equal, in_two_classes
from cnnrs.data.headers import Header, open_header
from cnnrs.data.photos import NOTES_FOLDER, left_out, photo_extensions, scan_photos
from cnnrs.data.report import Report
from cnnrs.image import plugins
from cnnrs.image.limits import pixel_limit
from cnnrs.image.reading import Span, span

# What each extension promises, as Pillow calls it.
FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
    ".gif": "GIF",
    ".jfif": "JPEG",
    ".avif": "AVIF",
    ".heic": "HEIF",
    ".heif": "HEIF",
    ".hif": "HEIF",
}
# The faults of bytes that were read to the end.
_BROKEN = ("broken", "truncated")
_OUT_OF = (
    "the process is out of file handles or memory, so nothing can be said about the files; "
    "raise `ulimit -n`, or use fewer threads"
)


def check(
    root: str | Path,
    *,
    num_workers: int | None = None,
    max_pixels: int | None = None,
    max_bytes: int | None = None,
    verbose: bool = True,
) -> Report:
    """Reads and decodes every image below ``root``, in threads, and reports what it met. Changes nothing.

    Args:
        root: a folder of class folders, or a folder of images.
        num_workers: threads; None means one per core.
        max_pixels: as in ``DataLoader``: more is corrupt.
        max_bytes: as in ``DataLoader``.
        verbose: whether a progress bar is shown, on a terminal or in a notebook.

    Returns:
        A report; ``print`` shows a summary, its attributes are plain lists.

    Raises:
        FileNotFoundError: there is no such folder.
        OSError: the process is out of file handles or memory, which says nothing about the files.

    Example:
        >>> report = check("cat_and_dog/train")  # doctest: +SKIP
        >>> report.corrupt  # doctest: +SKIP
        [('cat_and_dog/train/cat/7.jpg', 'cat_and_dog/train/cat/7.jpg cannot be decoded: the file is empty')]
    """
    root = os.path.expanduser(os.fspath(root))
    report = Report(root)
    every = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    # As in training: what is hidden is no class.
    folders = [name for name in every if not name.startswith(".") and name != NOTES_FOLDER]
    # Files beside class folders are no samples; without class folders they are all there is.
    places = [os.path.join(root, name) for name in folders] or [root]
    paths, counts = scan_photos(places)
    report.files = len(paths)
    report.left_out = left_out(root, paths)
    report.unreadable = _closed_folders(places)
    closed = {place for place, _ in report.unreadable}
    if folders:
        report.classes = dict(zip(folders, counts, strict=True))
        empty = [name for name, count in report.classes.items() if not count]
        report.empty_classes = [name for name in empty if os.path.join(root, name) not in closed]
    hidden = {_hidden(path, root) for path, _ in _cnnrs.scan_folders([root], [0], photo_extensions())[0]}
    hidden |= {os.path.join(root, name) for name in every if name.startswith(".")}
    report.hidden = sorted(path for path in hidden if path is not None)

    plugins.register()
    threads = _cnnrs.available_threads() if num_workers is None else num_workers
    with _bar(len(paths), verbose) as bar:
        found = _cnnrs.check_files(
            paths,
            lambda done: bar.update(done - bar.n) if bar is not None else None,
            threads,
            {"pixels": pixel_limit(max_pixels), "bytes": max_bytes},
        )
    modes: Counter[str] = Counter()
    sizes: Counter[tuple[int, int]] = Counter()
    same: dict[tuple[int, int], list[str]] = {}
    for path, (kind, width, height, size, digest, error, fault) in zip(paths, found, strict=True):
        _raise_if_ours(error, path)
        # Only what was read as a regular file is opened again: a pipe would wait for somebody to write.
        header = _header(path) if size or fault in (*_BROKEN, "limit") else None
        if fault in _BROKEN and header is not None and _pillow_decodes(path, header, max_pixels):
            report.slow.append(path)
            error, kind, (width, height) = None, header.format, header.size
        if size:
            same.setdefault((size, digest), []).append(path)
        if error is not None:
            listed = {"truncated": report.truncated, "broken": report.corrupt, "limit": report.corrupt}
            listed.get(fault or "", report.unreadable).append((path, _reason(path, error, header)))
            continue
        sizes[width, height] += 1
        if FORMATS.get(os.path.splitext(path)[1].lower()) != kind:
            report.wrong_extension.append((path, kind or "unknown"))
        if header is not None:
            modes[header.mode] += 1
            if header.unusual:
                report.unusual_modes.append((path, header.unusual))
            if header.orientation != 1:
                report.rotated.append((path, header.orientation))
            if header.pages > 1:
                report.pages.append((path, header.pages))
            if header.depth is not None and (found_span := _span(path)) is not None and found_span.loss():
                report.deep.append((path, *found_span))
    report.modes = dict(modes.most_common())
    report.sizes = dict(sizes.most_common())
    report.duplicates = [group for paths in same.values() if len(paths) > 1 for group in equal(paths)]
    if folders:
        twice = [path for group in report.duplicates for path in group]
        report.in_two_classes = in_two_classes(
            report.duplicates, {path: os.path.relpath(path, root).split(os.sep)[0] for path in twice}
        )
    return report


def still_broken(paths: Sequence[str]) -> list[str]:
    """Those of ``paths`` whose bytes were read to the end now and are no whole image to anybody: what may be put away.

    Files over the limits are not among them.

    Raises:
        OSError: one of the others cannot be read.
    """
    found = _cnnrs.check_files(paths, lambda done: None, 1, {"pixels": pixel_limit(None), "bytes": None})
    broken = []
    for path, (_, _, _, _, _, error, fault) in zip(paths, found, strict=True):
        if fault in _BROKEN:
            if _pillows_verdict(io.BytesIO(_contents(path)), path) == "broken":
                broken.append(path)
        elif error is not None and fault != "limit":
            raise error
    return broken


def _contents(path: str) -> bytes:
    with open(path, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(f"{path} is no regular file")
        return file.read()


def _closed_folders(places: Sequence[str]) -> list[tuple[str, str]]:
    """(path, reason) of the folders below that cannot be listed: the scan takes them for empty."""
    closed: list[tuple[str, str]] = []

    def note(error: OSError) -> None:
        _raise_if_ours(error, error.filename)
        closed.append((error.filename, f"{error.filename}: {error.strerror}"))

    for place in places:
        for _ in os.walk(place, onerror=note):
            pass
    return closed


def _hidden(path: str, root: str) -> str | None:
    """The topmost hidden part of a path below ``root``, as a path."""
    parts = Path(path).relative_to(root).parts
    first = next((i for i, part in enumerate(parts) if part.startswith(".")), None)
    return None if first is None else os.path.join(root, *parts[: first + 1])


def _header(path: str) -> Header | None:
    try:
        return open_header(path)
    except Exception as error:
        _raise_if_ours(error, path)
        return None


def _span(path: str) -> Span | None:
    try:
        return span(path)
    except Exception as error:
        _raise_if_ours(error, path)
        return None


def _reason(path: str, error: Exception, header: Header | None) -> str:
    """Why a file is no image: what is missing here, if that is all."""
    wanted = plugins.wanted(path) if header is None else None
    return str(error) if wanted is None else f"{path} is {wanted.name}, which Pillow cannot read here: {wanted.install}"


def _pillow_decodes(path: str, header: Header, max_pixels: int | None) -> bool:
    width, height = header.size
    return (max_pixels is None or width * height <= max_pixels) and _pillows_verdict(path, path) == "image"


def _pillows_verdict(file: str | IO[bytes], path: str) -> Literal["image", "limit", "broken"]:
    """What Pillow, which has more formats, makes of a file.

    Raises:
        OSError: the process is out of something, and Pillow would not say the truth.
    """
    from PIL import Image

    try:
        # All plug-ins: without file handles it would go on with those it has.
        Image.init()
        with Image.open(file) as image:
            image.convert("RGB")
    except Image.DecompressionBombError:
        return "limit"
    except Exception as error:
        _raise_if_ours(error, path)
        if isinstance(error, OSError) and error.errno is not None and not isinstance(file, str):
            # The bytes are here: this is about something else.
            raise
        return "broken"
    return "image"


def _raise_if_ours(error: Exception | None, path: str) -> None:
    """Whatever a plug-in raises about a damaged file is the file's; not what the process lacks."""
    if isinstance(error, ImportError) or is_the_process(error):
        raise OSError(getattr(error, "errno", errno.ENOMEM), _OUT_OF, path) from error


def _bar(total: int, verbose: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="check", unit="image", leave=False, disable=None if verbose else True)
