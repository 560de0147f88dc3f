"""Names in lines of text: whatever a file is called, a line stays a line and a column a column."""

from __future__ import annotations

import unicodedata
from typing import Any, TextIO

# Control characters, halves of surrogate pairs (bytes of a name that are no UTF-8), line and paragraph separators.
_UNSEEN = frozenset({"Cc", "Cs", "Zl", "Zp"})


def shown(name: str) -> str:
    r"""The name with ``\n`` and the like spelled out, so that it cannot break a line or drive a terminal.

    >>> shown("holiday\n1.jpg")
    'holiday\\n1.jpg'
    """
    return "".join(_spelled(c) if unicodedata.category(c) in _UNSEEN else c for c in name)


def message(text: str) -> str:
    r"""A message of one line or more, whose names may be anything: as `shown`, but for our own line breaks.

    Ours are those before an indented line; a name that has one can only add such a line.

    >>> message("no\x1b[2J such\nfolder\n  wanted: another")
    'no\\x1b[2J such\\nfolder\n  wanted: another'
    """
    return "\n  ".join(map(shown, text.rstrip("\n").split("\n  ")))


class Plain:
    """A stream for text that only ever gets printable characters and line breaks, whatever is written.

    Attributes:
        stream: where it goes; for output that must have names as they are.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write, with control characters spelled out."""
        self.stream.write("\n".join(map(shown, text.split("\n"))))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _spelled(character: str) -> str:
    code = ord(character)
    # Python's stand-ins for bytes that are no UTF-8.
    return f"\\x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else character.encode("unicode_escape").decode()


def width(name: str) -> int:
    r"""Columns a terminal takes for the name as `shown`: two for a Chinese character, none for a combining accent.

    >>> width("cat"), width("猫"), width("\N{WOMAN}\N{ZERO WIDTH JOINER}\N{GIRL}"), width("\t.jpg")
    (3, 2, 2, 6)
    """
    # Only those who print tables wait for its own tables.
    from wcwidth import wcswidth

    # It has no width for control characters.
    return wcswidth(shown(name))


def left(text: str, columns: int) -> str:
    """The text with spaces behind it."""
    return text + " " * (columns - width(text))


def right(text: str, columns: int) -> str:
    """The text with spaces before it."""
    return " " * (columns - width(text)) + text
