"""From a folder of photos to a classifier, without writing code."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import cnnrs
from cnnrs._util.text import Plain
from cnnrs.app.cli.commands import parser
from cnnrs.app.cli.output import complain

# What a user can act on; anything else is a mistake of ours and keeps its traceback.
_EXPECTED = (OSError, ValueError, ImportError, cnnrs.CnnrsError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    if arguments is None:
        _open_closed_streams()
        _use_utf8()
    _print_any_name()
    top = parser()
    command = ""
    try:
        try:
            options = top.parse_args(arguments)
        except SystemExit:
            # After --help: a reader that is gone must show here, not when the interpreter shuts down.
            sys.stdout.flush()
            raise
        if options.command is None:
            top.print_help()
            return 2
        command = options.command
        run: Callable[[argparse.Namespace], int] = import_module(f"{__name__}.{command}").run
        with warnings.catch_warnings(), contextlib.redirect_stdout(Plain(sys.stdout)):
            _tame(command)
            code = run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as stop:
        # The line of the terminal's ^C ends first.
        print(file=sys.stderr)
        complain(command, f"stopped{''.join(f'; {hint}' for hint in stop.args)}")
        return 130
    except BrokenPipeError:
        # `cnnrs ... | head` has seen enough.
        _write_no_more()
        return 141
    except _EXPECTED as error:
        if os.environ.get("CNNRS_TRACEBACK"):
            raise
        complain(command, _words(error))
        try:
            sys.stdout.flush()
        except OSError:
            # A full disk, for example.
            _write_no_more()
        return 2


def _words(error: Exception) -> str:
    """The message; the system's own with the file in front, as other commands have it."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}"
    return str(error)


def _write_no_more() -> None:
    """What is still buffered must not complain again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_closed_streams() -> None:
    """`cnnrs ... >&-`: the number of a closed stream would go to the next file, and that get what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            place = os.open(os.devnull, os.O_RDWR)
            if place != number:
                os.dup2(place, number)
            stream = os.fdopen(number, "w" if number else "r", encoding="utf-8", closefd=False)
            setattr(sys, name, stream)


def _use_utf8() -> None:
    """Start again where Python would read file names in another encoding than Rust does, which takes them as UTF-8."""
    if sys.getfilesystemencoding() == "utf-8" or not sys.executable:
        return
    os.environ["PYTHONUTF8"] = "1"
    os.environ.setdefault("PYTHONIOENCODING", sys.stdout.encoding)
    os.execv(sys.executable, [sys.executable, "-m", "cnnrs", *sys.argv[1:]])


def _print_any_name() -> None:
    """Files may be called anything: a name that the terminal's encoding does not have must not end a command."""
    streams: tuple[Any, Any] = (sys.stdout, sys.stderr)
    for stream in streams:
        if hasattr(stream, "reconfigure"):
            utf8 = (stream.encoding or "").lower().replace("-", "") == "utf8"
            stream.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")


def _tame(command: str) -> None:
    """Warnings are one line each; those that say what the command says itself are left out."""
    warnings.filterwarnings("ignore", r"cnnrs\.DataLoader skips files")
    warnings.filterwarnings("ignore", r"dropout2d: Received a 2-D input")

    def show(message: Warning | str, *_: object, **__: object) -> None:
        complain(command, f"note: {message}")

    warnings.showwarning = show
