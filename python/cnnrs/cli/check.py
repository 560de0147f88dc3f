"""Read every photo of a folder and say what is wrong with it, before training finds out.

Finds files that are damaged, cut off, empty or unreadable, names that promise another format, unusual colour modes,
photos that EXIF wants turned, duplicates by content, empty and hidden class folders; and shows sizes and class balance.
Nothing is changed unless --fix is given.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import cnnrs
from cnnrs._text import right, shown
from cnnrs._text import width as columns_of
from cnnrs.check import Report
from cnnrs.cli.options import add_json, add_threads, find_halves, need_folder, print_json

EPILOG = """\
examples:
  cnnrs check pets
  cnnrs check pets --fix move        files that cannot be read go to pets-bad/
  cnnrs check pets --json | jq .corrupt

exit codes: 0 every file can be read (or --fix has dealt with the others), 1 some cannot or there are none,
2 it could not be done
"""
_BAR = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``cnnrs check``."""
    parser.add_argument("folder", metavar="DIR", help="one folder per class, or a folder of photos")
    parser.add_argument(
        "--fix",
        choices=["move", "delete"],
        help="move files that cannot be read to DIR-bad, or delete them; other findings are only reported",
    )
    parser.add_argument("--all", action="store_true", help="list every finding, not the first few of each kind")
    add_threads(parser)
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Check; returns the exit code."""
    root = Path(options.folder)
    need_folder(root, "a folder of photos")
    report = cnnrs.check(root, num_workers=options.threads)
    halves = find_halves(root)
    if halves is not None:
        report.classes = {f"{half.name}/{name}": count for half in halves for name, count in _counts(half).items()}
        report.empty_classes = [name for name, count in report.classes.items() if not count]
    leaks = [] if halves is None else [group for group in report.duplicates if _spans(group, halves)]
    found = [path for path, _ in (*report.corrupt, *report.truncated, *report.unreadable)]
    # A folder that may not be opened is nothing to move or delete.
    bad = [path for path in found if not os.path.isdir(path)]
    fixed = [_fix(Path(path), root, options.fix) for path in bad] if options.fix else []
    if options.json:
        print_json({**_plain(report), "in_train_and_valid": leaks, "fixed": fixed})
    else:
        _show(report, bad, fixed, options)
        if leaks:
            names = " and ".join(half.name for half in halves or ())
            count = f"{len(leaks):,} photos are" if len(leaks) > 1 else "1 photo is"
            print(f"\n{count} in both {names}, for example {leaks[0][0]}: the accuracy will look better than it is")
    return 0 if report.files and len(fixed) == len(found) else 1


def _show(report: Report, bad: list[str], fixed: list[dict[str, str]], options: argparse.Namespace) -> None:
    if not report.files:
        print(
            f"{report.root}: no photos here; expected one folder per class, with .jpg, .png, .webp, .bmp, .tif or .gif"
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
        target = f"moved to {_bad_folder(Path(report.root))}" if options.fix == "move" else "deleted"
        print(f"\n{len(fixed):,} file{'s' if len(fixed) > 1 else ''} {target}")
    elif bad:
        print("\nnext: look at them, then `cnnrs check ... --fix move` or `--fix delete`; or train with --skip-bad")


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


def _bad_folder(root: Path) -> Path:
    resolved = root.resolve()
    return resolved.with_name(f"{resolved.name}-bad")


def _fix(path: Path, root: Path, how: str) -> dict[str, str]:
    if how == "delete":
        path.unlink(missing_ok=True)
        return {"path": str(path), "action": "deleted"}
    # Beside the folder, never inside: there it would become a class.
    target = _bad_folder(root) / os.path.relpath(path, root)
    target.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while target.exists():
        target = target.with_stem(f"{target.stem}-{number}")
        number += 1
    shutil.move(path, target)
    return {"path": str(path), "action": "moved", "to": str(target)}
