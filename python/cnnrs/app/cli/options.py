"""Options that several commands share, checked before anything takes time."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import NoReturn

from cnnrs._util import text as words

ONE_PER_CLASS = "a folder with one folder per class (pets/cat/1.jpg, pets/dog/2.jpg)"


class Parser(argparse.ArgumentParser):
    """Repeats arguments only in printable characters."""

    def error(self, message: str) -> NoReturn:
        """As argparse, exit code 2."""
        super().error(words.message(message))


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


def named(text: str) -> str:
    """The name of a file or folder, for ``type=``; an empty one would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the name of a file or folder is wanted, got an empty one")
    if "\0" in text:
        raise argparse.ArgumentTypeError("no file or folder has a NUL byte in its name")
    return text


def place(text: str) -> Path:
    """A folder's name as a path, for ``type=``."""
    return Path(named(text))


def share_or_folder(text: str) -> float | Path:
    """A number from 0 to below 1, or else the name of a folder, for ``type=``."""
    try:
        float(text)
    except ValueError:
        return place(text)
    return between(0, 1)(text)


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
