"""Options that several commands share, and numbers that are checked before anything takes time."""

from __future__ import annotations

import argparse
import contextlib
import json as jsonlib
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TRAIN_NAMES = ("train", "training")
ONE_PER_CLASS = "a folder with one folder per class (pets/cat/1.jpg, pets/dog/2.jpg)"
VALID_NAMES = ("valid", "validation", "val", "test")


class Help(argparse.HelpFormatter):
    """Paragraphs are filled to the width of the terminal; blocks with indented lines stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        blocks = text.strip().split("\n\n")
        return "\n\n".join(block if "\n  " in f"\n{block}" else textwrap.fill(block, width) for block in blocks)


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``: stdout is one JSON document, everything else goes to stderr."""
    parser.add_argument("--json", action="store_true", help="print one JSON document for programs instead of text")


def add_threads(parser: argparse.ArgumentParser) -> None:
    """``--threads``."""
    parser.add_argument(
        "--threads", type=whole(0), metavar="N", help="threads that read photos (default: one per core)"
    )


def whole(least: int) -> type[int]:
    """A whole number of at least ``least``, for ``type=``."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {number}")
        return number

    return convert  # type: ignore[return-value]


def positive(text: str) -> float:
    """A finite number above 0, for ``type=``."""
    number = between(0, float("inf"))(text)
    if number == 0:
        raise argparse.ArgumentTypeError("must be above 0, got 0")
    return number


def between(low: float, high: float) -> type[float]:
    """A number above ``low`` and below ``high``, ``low`` itself allowed, for ``type=``."""

    def convert(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not low <= number < high:
            raise argparse.ArgumentTypeError(f"must be from {low:g} to below {high:g}, got {text}")
        return number

    return convert  # type: ignore[return-value]


def print_json(value: Any) -> None:
    """One document on stdout, in plain characters where stdout, or UTF-8 itself, cannot carry a file's name."""
    text = jsonlib.dumps(value, indent=1, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = jsonlib.dumps(value, indent=1)
    print(text)


@contextlib.contextmanager
def chatter(json: bool) -> Iterator[None]:
    """While it lasts, what is printed goes to stderr when stdout belongs to a JSON document."""
    with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
        yield


def need_folder(path: Path, wanted: str) -> None:
    """That there is a folder; ``wanted`` says what should be in it.

    Raises:
        FileNotFoundError: there is nothing of that name.
        NotADirectoryError: it is a file.
    """
    if path.is_dir():
        return
    if path.exists():
        raise NotADirectoryError(f"{path}: is a file; {wanted} is wanted")
    raise FileNotFoundError(f"{path}: there is no such folder; {wanted} is wanted")


def find_halves(root: Path) -> tuple[Path, Path] | None:
    """The folders with training and validation photos inside ``root``; None where it has not both."""
    train = next((root / name for name in TRAIN_NAMES if (root / name).is_dir()), None)
    valid = next((root / name for name in VALID_NAMES if (root / name).is_dir()), None)
    return None if train is None or valid is None else (train, valid)


def size(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
