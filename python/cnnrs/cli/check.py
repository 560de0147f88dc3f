"""Read every photo of a folder and say what is wrong with it, before training finds out.

Finds files that are damaged, cut off, empty or unreadable, names that promise another format, unusual colour modes,
photos that EXIF wants turned, duplicates by content, empty and hidden class folders; and shows sizes and class balance.
Nothing is changed unless --fix is given.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import cnnrs
from cnnrs._text import right, shown
from cnnrs._text import width as columns_of
from cnnrs.check import Report, still_broken
from cnnrs.cli.options import add_json, add_threads, named, need_folder, print_json
from cnnrs.layout import PHOTOS, TRASH, UnclearLayout, find_halves

EPILOG = """\
examples:
  cnnrs check pets
  cnnrs check pets --fix move        broken files go to pets-bad/
  cnnrs check pets --json | jq .corrupt

exit codes: 0 every file can be read (or --fix has dealt with the others), 1 some cannot or there are none,
2 it could not be done, as --fix where something cannot be read: nothing is moved
"""
_BAR = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``cnnrs check``."""
    parser.add_argument("folder", type=named, metavar="DIR", help="one folder per class, or a folder of photos")
    parser.add_argument(
        "--fix",
        choices=["move", "delete"],
        help="put files that were read and found broken into DIR-bad (move) or "
        f"DIR{TRASH} (delete), to look at or to remove yourself; other findings are only reported",
    )
    parser.add_argument("--all", action="store_true", help="list every finding, not the first few of each kind")
    add_threads(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Check; returns the exit code."""
    root = Path(options.folder)
    need_folder(root, "a folder of photos")
    report = cnnrs.check(root, num_workers=options.threads)
    halves = _halves(root)
    if halves is not None:
        report.classes = {f"{half.name}/{name}": count for half in halves for name, count in _counts(half).items()}
        report.empty_classes = [name for name, count in report.classes.items() if not count]
    leaks = [] if halves is None else [group for group in report.duplicates if _spans(group, halves)]
    bad = [path for path, _ in (*report.corrupt, *report.truncated)]
    fixed = _fix(report, bad, root, options.fix) if options.fix else []
    if options.json:
        print_json({**_plain(report), "in_train_and_valid": leaks, "fixed": fixed})
    else:
        _show(report, fixed, options)
        if leaks:
            names = " and ".join(shown(half.name) for half in halves or ())
            count = f"{len(leaks):,} photos are" if len(leaks) > 1 else "1 photo is"
            example = shown(leaks[0][0])
            print(f"\n{count} in both {names}, for example {example}: the accuracy will look better than it is")
    return 0 if report.files and len(fixed) == len(bad) + len(report.unreadable) else 1


def _halves(root: Path) -> tuple[Path, Path] | None:
    try:
        halves = find_halves(root)
    except (UnclearLayout, OSError):
        # Training minds; what can be said about the photos is said.
        return None
    return None if halves is None or halves.valid is None else (halves.train, halves.valid)


def _show(report: Report, fixed: list[dict[str, str]], options: argparse.Namespace) -> None:
    if not report.files:
        print(
            f"{shown(report.root)}: no photos here; expected one folder per class, with .jpg, .png, .webp, .bmp, .tif "
            "or .gif"
        )
        return
    print(report.text(sys.maxsize) if options.all else report)
    if report.classes:
        print("\n  photos per class")
        _bars(report.classes)
    if report.sizes:
        print("\n  shorter side in pixels")
        _bars(_sides(report.sizes))
    if fixed:
        place, base = _aside(report, Path(report.root), options.fix)
        files = f"{len(fixed):,} file{'s' if len(fixed) > 1 else ''}"
        print(f"\n{files} moved to {shown(str(place))}; nothing is deleted")
        print(f"  undo: cp -rn {shown(shlex.quote(f'{place}/.'))} {shown(shlex.quote(f'{base}/'))}")
    elif report.corrupt or report.truncated:
        print("\nnext: look at them, then `cnnrs check ... --fix move` puts them aside; or train with --skip-bad")
    if options.fix and (left := len(report.corrupt) + len(report.truncated) - len(fixed)):
        print(f"\n{left:,} stay: over the limits, or no longer broken when read again")


def _counts(half: Path) -> dict[str, int]:
    folder = cnnrs.ImageFolder(half, allow_empty=True)
    counted = Counter(folder.targets)
    return {name: counted[number] for name, number in folder.class_to_idx.items()}


def _spans(group: list[str], halves: tuple[Path, Path]) -> bool:
    """Whether copies of one photo are in both halves."""
    return all(any(Path(path).is_relative_to(half) for path in group) for half in halves)


def _bars(counts: dict[str, int], most: int = 12) -> None:
    listed = [(shown(name), count) for name, count in list(counts.items())[:most]]
    largest, columns = max(counts.values(), default=0), max((columns_of(name) for name, _ in listed), default=0)
    for name, count in listed:
        bar = "#" * round(_BAR * count / largest) if largest else ""
        print(f"  {right(name, columns)}  {count:>7,}  {bar}".rstrip())
    if len(counts) > most:
        print(f"  ... and {len(counts) - most:,} more")


def _sides(sizes: dict[tuple[int, int], int]) -> dict[str, int]:
    """How many photos have a shorter side in each power-of-two range."""
    found: Counter[int] = Counter()
    for (width, height), count in sizes.items():
        found[max(min(width, height), 1).bit_length() - 1] += count
    return {f"{2**power}-{2 ** (power + 1) - 1}": found[power] for power in range(min(found), max(found) + 1)}


def _plain(report: Report) -> dict[str, Any]:
    plain = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    plain["sizes"] = [{"width": w, "height": h, "count": n} for (w, h), n in report.sizes.items()]
    return {**plain, "ok": report.ok, "imbalance": report.imbalance}


# -- what --fix moves ----------------------------------------------------------------------------------------


def _fix(report: Report, bad: list[str], root: Path, how: str) -> list[dict[str, str]]:
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
    place, base = _aside(report, root, how)
    moved: list[dict[str, str]] = []
    for path in broken:
        # Links stay what they are: a file that is one is moved as it is, a folder's name is kept.
        target = place / root.resolve().relative_to(base) / os.path.relpath(path, root)
        try:
            moved.append({"path": path, "action": "moved", "to": _move(path, target)})
        except OSError as error:
            raise OSError(f"stopped after {len(moved):,} files, which are in {place} now: {error}") from error
    return moved


def _aside(report: Report, root: Path, how: str) -> tuple[Path, Path]:
    """Where broken files go, and the folder they keep their paths below."""
    base = root.resolve()
    beside = [entry for entry in base.parent.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    # A class folder by itself: a folder beside it would be one class more.
    if not report.classes and any(_holds_photos(place) for place in beside if place.resolve() != base):
        base = base.parent
    return base.with_name(f"{base.name}{'-bad' if how == 'move' else TRASH}"), base


def _holds_photos(folder: Path) -> bool:
    try:
        return any(path.suffix.lower() in PHOTOS for path in folder.iterdir())
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
