"""What commands print: complaints on stderr, one JSON document, text that makes room for it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from cnnrs._util.json import dumps
from cnnrs._util.text import Plain, message


def complain(command: str, text: str) -> None:
    """A line of a command on stderr, and its indented ones."""
    print(f"cnnrs{' ' * bool(command)}{command}: {message(text)}", file=sys.stderr)


def print_json(value: Any) -> None:
    """One document on stdout, escaped where stdout, or UTF-8 itself, cannot carry a file's name."""
    print(dumps(value, getattr(sys.stdout, "encoding", None) or "utf-8"))


@contextlib.contextmanager
def chatter(json: bool) -> Iterator[None]:
    """While it lasts, what is printed goes to stderr when stdout belongs to a JSON document."""
    # Progress bars write to stderr itself: they need control characters.
    with contextlib.redirect_stdout(Plain(sys.stderr)) if json else contextlib.nullcontext():
        yield
