"""``cnnrs check``: what is wrong with the photos of a folder."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cnnrs
from cnnrs._util.text import right, shown
from cnnrs._util.text import width as columns_of
from cnnrs.app.cli.fix import aside, move_broken
from cnnrs.app.cli.output import print_json
from cnnrs.app.layout import UnclearLayout, class_folders, find_parts, need_folder
from cnnrs.data.copies import in_two_classes
from cnnrs.data.photos import photo_extensions, scan_photos
from cnnrs.data.report import Report

_BAR = 30


def run(options: argparse.Namespace) -> int:
    """Check; returns the exit code."""
    root = Path(options.folder)
    need_folder(root, "a folder of photos")
    report = cnnrs.check(root, num_workers=options.threads)
    parts = _parts(root)
    if parts:
        report.classes = {f"{part.name}/{name}": count for part in parts for name, count in _counts(part).items()}
        report.empty_classes = [name for name, count in report.classes.items() if not count]
        places = {path: name for part in parts for path, name in _classes(part, report.duplicates)}
        report.in_two_classes = in_two_classes(report.duplicates, places)
    leaks = [group for group in report.duplicates if _spans(group, parts)]
    bad = [path for path, _ in (*report.corrupt, *report.truncated)]
    fixed = move_broken(report, bad, root, options.fix) if options.fix else []
    if options.json:
        print_json({**_plain(report), "in_train_and_valid": leaks, "fixed": fixed})
    else:
        _show(report, fixed, options)
        if leaks:
            names = " and ".join(shown(part.name) for part in parts)
            count = f"{len(leaks):,} photos are" if len(leaks) > 1 else "1 photo is"
            example = shown(leaks[0][0])
            where = "both" if len(parts) == 2 else "more than one of"
            print(f"\n{count} in {where} {names}, for example {example}: the accuracy will look better than it is")
    return 0 if report.files and len(fixed) == len(bad) + len(report.unreadable) else 1


def _parts(root: Path) -> list[Path]:
    """The folders for training, choosing and measuring, if there is more than one."""
    try:
        found = [part for part in find_parts(root) or () if part is not None]
    except (UnclearLayout, OSError):
        # Training minds; what can be said about the photos is said.
        return []
    return found if len(found) > 1 else []


def _show(report: Report, fixed: list[dict[str, str]], options: argparse.Namespace) -> None:
    if not report.files:
        print(
            f"{shown(report.root)}: no photos here; expected one folder per class, with {', '.join(photo_extensions())}"
        )
        for one in report.left_out:
            print(f"  left out: {shown(str(one))}")
        return
    print(report.text(sys.maxsize) if options.all else report)
    if report.classes:
        print("\n  photos per class")
        _bars(report.classes)
    if report.sizes:
        print("\n  shorter side in pixels")
        _bars(_sides(report.sizes))
    if fixed:
        place, base = aside(report, Path(report.root), options.fix)
        files = f"{len(fixed):,} file{'s' if len(fixed) > 1 else ''}"
        print(f"\n{files} moved to {shown(str(place))}; nothing is deleted")
        print(f"  undo: cp -rn {shown(shlex.quote(f'{place}/.'))} {shown(shlex.quote(f'{base}/'))}")
    elif report.corrupt or report.truncated:
        print("\nnext: look at them, then `cnnrs check ... --fix move` puts them aside; or train with --skip-bad")
    if options.fix and (left := len(report.corrupt) + len(report.truncated) - len(fixed)):
        print(f"\n{left:,} stay: over the limits, or no longer broken when read again")


def _counts(part: Path) -> dict[str, int]:
    folders = class_folders(part)
    _, counts = scan_photos([str(folder) for folder in folders])
    return {folder.name: count for folder, count in zip(folders, counts, strict=True)}


def _classes(part: Path, groups: list[list[str]]) -> Iterable[tuple[str, str]]:
    """The class of each of these files that lies in this part."""
    for path in (path for group in groups for path in group):
        if Path(path).is_relative_to(part):
            yield path, Path(path).relative_to(part).parts[0]


def _spans(group: list[str], parts: list[Path]) -> bool:
    """Whether copies of one photo are in more than one part."""
    return sum(any(Path(path).is_relative_to(part) for path in group) for part in parts) > 1


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
    plain["left_out"] = [one._asdict() for one in report.left_out]
    return {**plain, "ok": report.ok, "imbalance": report.imbalance, "small_classes": report.small_classes}
