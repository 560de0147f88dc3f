"""``cnnrs check``: what is wrong with the photos of a folder."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import cnnrs
from cnnrs._util.text import right, shown
from cnnrs._util.text import width as columns_of
from cnnrs.app.cli.fix import aside, move_broken
from cnnrs.app.cli.options import need_folder
from cnnrs.app.cli.output import print_json
from cnnrs.app.layout import UnclearLayout, find_halves
from cnnrs.data.check import Report

_BAR = 30


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
    fixed = move_broken(report, bad, root, options.fix) if options.fix else []
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
        place, base = aside(report, Path(report.root), options.fix)
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
