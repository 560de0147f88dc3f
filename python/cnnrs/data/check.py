"""``check``: what is wrong with a folder of images, before an epoch finds out."""

from __future__ import annotations

import errno
import filecmp
import io
import os
import stat
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from cnnrs import _cnnrs
from cnnrs._util.text import shown
from cnnrs.data.bad_files import is_the_process
from cnnrs.data.folder import IMG_EXTENSIONS
from cnnrs.image.limits import pixel_limit

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
}
# The faults of bytes that were read to the end.
_BROKEN = ("broken", "truncated")
_OUT_OF = (
    "the process is out of file handles or memory, so nothing can be said about the files; "
    "raise `ulimit -n`, or use fewer threads"
)
# How many entries of a list ``repr`` shows.
SHOWN = 3


@dataclass
class Report:
    """What ``check`` found: plain lists of paths, in the order of the scan.

    Attributes:
        root: the folder.
        files: how many image files there are.
        classes: class folder -> number of images; {} in a flat folder.
        corrupt: (path, reason) of files that are no image, are damaged, or are over the limits.
        truncated: (path, reason) of files that end too early; ``truncated="accept"`` reads them.
        unreadable: (path, reason) of files and folders that vanished, may not be read, or that the disk does not give,
            and of pipes, sockets and devices.
        wrong_extension: (path, format) of files whose name promises another format; they load all the same.
        modes: Pillow's mode -> number of images.
        unusual_modes: (path, mode) of images that are neither RGB nor gray (L); they are converted to RGB.
        sizes: (width, height) -> number of images.
        rotated: (path, orientation) of images with an EXIF orientation other than 1; torchvision does not turn them.
        duplicates: lists of files with equal contents.
        empty_classes: class folders without an image.
        hidden: folders and files that begin with a dot.
        slow: files that only Pillow can decode; they load, one at a time.
    """

    root: str
    files: int = 0
    classes: dict[str, int] = field(default_factory=dict)
    corrupt: list[tuple[str, str]] = field(default_factory=list)
    truncated: list[tuple[str, str]] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    wrong_extension: list[tuple[str, str]] = field(default_factory=list)
    modes: dict[str, int] = field(default_factory=dict)
    unusual_modes: list[tuple[str, str]] = field(default_factory=list)
    sizes: dict[tuple[int, int], int] = field(default_factory=dict)
    rotated: list[tuple[str, int]] = field(default_factory=list)
    duplicates: list[list[str]] = field(default_factory=list)
    empty_classes: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every file loads."""
        return not (self.corrupt or self.truncated or self.unreadable)

    @property
    def imbalance(self) -> float:
        """Images of the largest class per image of the smallest that has any; 1.0 for equal classes."""
        counts = [count for count in self.classes.values() if count]
        return max(counts) / min(counts) if counts else 1.0

    def __repr__(self) -> str:
        return self.text()

    def text(self, most: int = SHOWN) -> str:
        """The report as ``print`` shows it, with at most ``most`` findings of each kind."""
        bad = len(self.corrupt) + len(self.truncated) + len(self.unreadable)
        lines = [
            f"{shown(self.root)}: {self.files:,} images, {f'{bad:,} cannot be loaded' if bad else 'all can be loaded'}"
        ]
        if self.classes:
            counts = ", ".join(f"{shown(name)} {count:,}" for name, count in list(self.classes.items())[:8])
            more = f" and {len(self.classes) - 8} more" if len(self.classes) > 8 else ""
            lines.append(f"  classes: {counts}{more} (largest : smallest = {self.imbalance:.1f})")
        if self.sizes:
            areas = sorted(self.sizes, key=lambda size: size[0] * size[1])
            (w, h), (wide, high) = areas[0], areas[-1]
            lines.append(f"  sizes: {len(areas):,} different, {w} x {h} to {wide} x {high}")
        if self.modes:
            lines.append("  modes: " + ", ".join(f"{mode} {count:,}" for mode, count in self.modes.items()))
        for name, found in (
            ("corrupt", [reason for _, reason in self.corrupt]),
            ("truncated", [reason for _, reason in self.truncated]),
            ("unreadable", [reason for _, reason in self.unreadable]),
            ("wrong extension", [f"{path} is {kind}" for path, kind in self.wrong_extension]),
            ("unusual modes", [f"{path} is {mode}" for path, mode in self.unusual_modes]),
            ("rotated by EXIF", [f"{path} ({orientation})" for path, orientation in self.rotated]),
            ("duplicates", [" = ".join(paths) for paths in self.duplicates]),
            ("empty classes", self.empty_classes),
            ("hidden", self.hidden),
            ("decoded by Pillow only", self.slow),
        ):
            if found:
                more = f"; {len(found) - most:,} more" if len(found) > most else ""
                lines.append(f"  {name} ({len(found):,}): {'; '.join(map(shown, found[:most]))}{more}")
        return "\n".join(lines)


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
    folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    # Files beside class folders are no samples; without class folders they are all there is.
    places = [os.path.join(root, name) for name in folders] or [root]
    extensions = [*IMG_EXTENSIONS, ".gif"]
    samples, counts, _ = _cnnrs.scan_folders(places, range(len(places)), extensions)
    paths = [path for path, _ in samples]
    report.files = len(paths)
    report.unreadable = _closed_folders(places)
    closed = {place for place, _ in report.unreadable}
    if folders:
        report.classes = {name: count or 0 for name, count in zip(folders, counts, strict=True)}
        empty = [name for name, count in report.classes.items() if not count]
        report.empty_classes = [name for name in empty if os.path.join(root, name) not in closed]
    hidden = {_hidden(path, root) for path in [*paths, *places]} - {None}
    report.hidden = sorted(path for path in hidden if path is not None)

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
            error, kind, (width, height) = None, header[0], header[2]
        if size:
            same.setdefault((size, digest), []).append(path)
        if error is not None:
            listed = {"truncated": report.truncated, "broken": report.corrupt, "limit": report.corrupt}
            listed.get(fault or "", report.unreadable).append((path, str(error)))
            continue
        sizes[width, height] += 1
        if FORMATS.get(os.path.splitext(path)[1].lower()) != kind:
            report.wrong_extension.append((path, kind or "unknown"))
        if header is not None:
            _, mode, _, orientation = header
            modes[mode] += 1
            if mode not in ("RGB", "L"):
                report.unusual_modes.append((path, mode))
            if orientation != 1:
                report.rotated.append((path, orientation))
    report.modes = dict(modes.most_common())
    report.sizes = dict(sizes.most_common())
    report.duplicates = [group for paths in same.values() if len(paths) > 1 for group in _equal(paths)]
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


_Header = tuple[str, str, tuple[int, int], int]


def _header(path: str) -> _Header | None:
    """(format, mode, (width, height), EXIF orientation) from the file's header, if Pillow understands it."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            orientation = image.getexif().get(0x0112, 1)
            known = isinstance(orientation, int) and 1 <= orientation <= 8
            return image.format or "unknown", image.mode, image.size, orientation if known else 1
    except Exception as error:
        _raise_if_ours(error, path)
        return None


def _pillow_decodes(path: str, header: _Header, max_pixels: int | None) -> bool:
    width, height = header[2]
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


def _equal(paths: Sequence[str]) -> Iterable[list[str]]:
    """Groups of files that are equal byte by byte, not only by their hash."""
    groups: list[list[str]] = []
    for path in paths:
        for group in groups:
            if filecmp.cmp(group[0], path, shallow=False):
                group.append(path)
                break
        else:
            groups.append([path])
    return [group for group in groups if len(group) > 1]


def _bar(total: int, verbose: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="check", unit="image", leave=False, disable=None if verbose else True)
