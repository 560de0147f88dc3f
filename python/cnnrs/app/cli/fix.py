"""``cnnrs check --fix``: files that are broken for certain are moved aside, and can be moved back."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cnnrs.classifier.names import TRASH
from cnnrs.data.check import still_broken
from cnnrs.data.photos import photo_extensions
from cnnrs.data.report import Report


def move_broken(report: Report, bad: list[str], root: Path, how: str) -> list[dict[str, str]]:
    """Move the files that are broken for certain.

    Raises:
        OSError: something could not be read: nothing has been moved, for who knows what else is wrong.
    """
    if report.unreadable:
        count = len(report.unreadable)
        more = f" and {count - 1:,} more" if count > 1 else ""
        raise OSError(
            f"nothing was moved, because what cannot be read need not be broken: {report.unreadable[0][1]}{more}\n"
            "  Mend or remove these first: permissions, the disk, links that lead nowhere"
        )
    try:
        broken = still_broken(bad)
    except OSError as error:
        raise OSError(f"nothing was moved, because a file could not be read again: {error}") from error
    place, base = aside(report, root, how)
    moved: list[dict[str, str]] = []
    for path in broken:
        # Links stay what they are: a file that is one is moved as it is, a folder's name is kept.
        target = place / root.resolve().relative_to(base) / os.path.relpath(path, root)
        try:
            moved.append({"path": path, "action": "moved", "to": _move(path, target)})
        except OSError as error:
            raise OSError(f"stopped after {len(moved):,} files, which are in {place} now: {error}") from error
    return moved


def aside(report: Report, root: Path, how: str) -> tuple[Path, Path]:
    """Where broken files go, and the folder they keep their paths below."""
    base = root.resolve()
    beside = [entry for entry in base.parent.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    # A class folder by itself: a folder beside it would be one class more.
    if not report.classes and any(_holds_photos(place) for place in beside if place.resolve() != base):
        base = base.parent
    return base.with_name(f"{base.name}{'-bad' if how == 'move' else TRASH}"), base


def _holds_photos(folder: Path) -> bool:
    endings = photo_extensions()
    try:
        return any(path.suffix.lower() in endings for path in folder.iterdir())
    except OSError:
        return False


def _move(path: str, target: Path) -> str:
    target.parent.mkdir(parents=True, exist_ok=True)
    place, number = target, 1
    while os.path.lexists(place):
        place = target.with_stem(f"{target.stem}-{number}")
        number += 1
    shutil.move(path, place)
    return str(place)
