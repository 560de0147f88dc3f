"""Options that several commands share, and numbers that are checked before anything takes time."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

TRAIN_NAMES = ("train", "training")
VALID_NAMES = ("valid", "validation", "val", "test")


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


@contextlib.contextmanager
def chatter(json: bool) -> Iterator[None]:
    """While it lasts, what is printed goes to stderr when stdout belongs to a JSON document."""
    with contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext():
        yield


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
