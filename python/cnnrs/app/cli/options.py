"""Options that several commands share, checked before anything takes time."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from cnnrs._util import text as words


class Parser(argparse.ArgumentParser):
    """Repeats arguments only in printable characters."""

    def error(self, message: str) -> NoReturn:
        """As argparse, exit code 2."""
        super().error(words.message(message))


class Help(argparse.HelpFormatter):
    """Paragraphs are filled to the width of the terminal; blocks with indented lines stay as they are."""

    def _format_usage(
        self, usage: str | None, actions: Iterable[argparse.Action], groups: Any, prefix: str | None
    ) -> str:
        if prefix == "":
            # The beginning of the usage of commands.
            return super()._format_usage(usage, actions, groups, prefix)
        # What must be given, in one line; the options are listed below it.
        given = " ".join(_placed(action) for action in actions if not action.option_strings)
        text = f"{prefix or 'usage: '}{self._prog} [OPTIONS] {given}".rstrip()
        return textwrap.fill(text, self._width, subsequent_indent="  ") + "\n\n"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        blocks = text.strip().split("\n\n")
        return "\n\n".join(block if "\n  " in f"\n{block}" else textwrap.fill(block, width) for block in blocks)


def _placed(action: argparse.Action) -> str:
    name = str(action.metavar or action.dest)
    forms = {"+": f"{name} [{name} ...]", "?": f"[{name}]", argparse.PARSER: f"{name} ..."}
    return forms.get(str(action.nargs), name)


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``: stdout is one JSON document, everything else goes to stderr."""
    parser.add_argument("--json", action="store_true", help="print one JSON document for programs instead of text")


def add_threads(parser: argparse.ArgumentParser) -> None:
    """``--threads``."""
    parser.add_argument(
        "--threads", type=whole(0), metavar="N", help="threads that read photos (default: one per core)"
    )


def add_columns(parser: argparse.ArgumentParser) -> None:
    """``--path-column``, ``--label-column``, ``--separator``: how a table of labels is read."""
    parser.add_argument("--path-column", metavar="X", help="of a table: the photos (default: by the usual names)")
    parser.add_argument("--label-column", metavar="X", help="of a table: the labels (default: likewise)")
    parser.add_argument("--separator", metavar="TEXT", help="between the labels of a photo that has several")


def add_reading(parser: argparse.ArgumentParser) -> None:
    """``--scale``, ``--page``, ``--no-exif``: how photos are read, for :func:`reading`."""
    parser.add_argument(
        "--scale",
        choices=("none", "full", "percentile"),
        metavar="HOW",
        default="none",
        help="what becomes of 16-bit and float images: none (default) cuts off what is above 255; full takes 0 to the "
        "largest value of the type; percentile stretches each image from its 0.5th to its 99.5th percentile",
    )
    parser.add_argument(
        "--page", type=whole(0), default=0, metavar="N", help="of TIFFs and GIFs with several (default: 0, the first)"
    )
    parser.add_argument(
        "--no-exif",
        action="store_false",
        dest="exif",
        help="leave photos as the camera held them (default: turned upright as their EXIF data say)",
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


def novelty(text: str) -> str | float:
    """From which novelty on a photo is unknown, for ``type=``."""
    if text in ("auto", "off"):
        return text
    try:
        return between(0, float("inf"))(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"auto, off or a number from 0 on is wanted: {error}") from None


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
