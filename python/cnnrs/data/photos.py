"""What is a photo, for ``check``, ``train`` and ``predict`` alike, and why other files were not taken."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cnnrs import _cnnrs
from cnnrs.data.scan import IMG_EXTENSIONS, scan
from cnnrs.image import plugins

# Beside torchvision's: what people save from the web.
_MORE = (".gif", ".jfif")
#: Of all photos, also of those that Pillow cannot read here.
ENDINGS = (*IMG_EXTENSIONS, *_MORE, *(ending for plugin in plugins.PLUGINS for ending in plugin.endings))
# Folders that a Mac puts into archives, with notes about the files but no files.
NOTES_FOLDER = "__MACOSX"
_SYSTEMS = {
    ".ds_store": "written by macOS", "thumbs.db": "written by Windows", "ehthumbs.db": "written by Windows",
    "desktop.ini": "written by Windows",
}  # fmt: skip
_REASONS = {
    "a camera's raw file: export it as JPEG or TIFF": ".arw .cr2 .cr3 .dng .nef .nrw .orf .pef .raf .raw .rw2 .srw",
    "a video: take pictures out of it first": ".3gp .avi .m4v .mkv .mov .mp4 .mpg .mts .webm .wmv",
    "an archive: unpack it": ".7z .bz2 .gz .rar .tar .tgz .xz .zip",
    "a format that is not taken: convert it to PNG or JPEG": ".dcm .eps .ico .j2k .jp2 .jxl .pdf .psd .svg .tga",
}
_KNOWN = {ending: reason for reason, endings in _REASONS.items() for ending in endings.split()}


class LeftOut(NamedTuple):
    """Files that are no samples.

    Attributes:
        ending: what they have in common, in lower case: ".heic"; "._*" or "thumbs.db" for what is known by its name;
            "" without an ending.
        files: how many there are.
        example: the path of the first.
        reason: why they are left out, and what to do where there is something.
    """

    ending: str
    files: int
    example: str
    reason: str

    def __str__(self) -> str:
        return f"{self.files:,} {self.ending or 'without an ending'}: {self.reason} ({self.example})"


def photo_extensions() -> tuple[str, ...]:
    """The endings of photos as the command line takes them: torchvision's, GIF, JFIF, and AVIF and HEIC where Pillow
    can read them here.

    Example:
        >>> {".jpg", ".png", ".tif", ".gif", ".jfif"} <= set(photo_extensions())
        True
    """
    return (*IMG_EXTENSIONS, *_MORE, *plugins.installed())


def scan_photos(folders: Sequence[str]) -> tuple[list[str], list[int]]:
    """The photos below folders, links followed, hidden files and folders left out, and how many each of these has."""
    samples, counts = scan(folders, range(len(folders)), photo_extensions(), True)
    return [path for path, _ in samples], counts


def left_out(root: str | os.PathLike[str], taken: Iterable[str] | None = None) -> list[LeftOut]:
    """The files below a folder that are no samples, counted by ending and reason, the most first.

    Args:
        root: where to look.
        taken: the paths of those that are samples, if it is known; otherwise every photo that is not hidden is one.

    Example:
        >>> for one in left_out("pets"): print(one)  # doctest: +SKIP
        12 .heic: HEIC, which Pillow cannot read here: pip install pillow-heif (pets/cat/IMG_0007.HEIC)
    """
    top = os.path.normpath(os.path.expanduser(root))
    samples = None if taken is None else {os.path.normpath(path) for path in taken}
    endings = photo_extensions()
    found: dict[tuple[str, str], list[str]] = {}
    # Whoever has scanned the folder has been told about loops of links.
    every, _, _ = _cnnrs.scan_folders([top], [0])
    for path, _ in every:
        if samples is not None and path in samples:
            continue
        ending, reason = _why(path, top, endings)
        if reason is None:
            if samples is None:
                continue
            reason = "in none of the class folders"
        found.setdefault((ending, reason), []).append(path)
    listed = [LeftOut(ending, len(paths), paths[0], reason) for (ending, reason), paths in found.items()]
    return sorted(listed, key=lambda one: -one.files)


def _why(path: str, top: str, endings: tuple[str, ...]) -> tuple[str, str | None]:
    """What a file is counted as, and why it is no photo; None for one that is."""
    name = os.path.basename(path)
    lower = name.lower()
    if name.startswith("._"):
        return "._*", "a Mac's notes about the file of the same name (AppleDouble)"
    if lower in _SYSTEMS:
        return lower, _SYSTEMS[lower]
    ending = os.path.splitext(lower)[1]
    if lower.endswith(endings):
        inside = os.path.relpath(path, top).split(os.sep)
        hidden = any(part.startswith(".") for part in inside)
        return ending, "hidden: its name, or that of a folder above it, begins with a dot" if hidden else None
    if plugin := plugins.by_ending(lower):
        return ending, f"{plugin.name}, which Pillow cannot read here: {plugin.install}"
    return ending, _KNOWN.get(ending, "no photo by its ending" if ending else "no photo: a name without an ending")
