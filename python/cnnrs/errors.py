"""Exceptions of cnnrs; each is also the type a PyTorch user already catches."""

from __future__ import annotations

from typing import Literal

from PIL import UnidentifiedImageError

#: Why bytes cannot be decoded: "unknown" is no format that is known, "unsupported" one that is not read in this way.
DecodeKind = Literal["unknown", "unsupported", "truncated", "damaged", "too_large"]


class CnnrsError(Exception):
    """Base of all exceptions that only cnnrs raises."""


class DecodeError(CnnrsError, UnidentifiedImageError):
    """The bytes of a file are not an image that can be decoded; an ``OSError``, as Pillow's errors about files are.

    Attributes:
        kind: why; None where it is about more than one file.
    """

    kind: DecodeKind | None = None


class NonFiniteLossError(CnnrsError, FloatingPointError):
    """The loss became NaN or infinite; the weights are those before the batch that the message names."""


class UnsupportedModelError(CnnrsError, ValueError):
    """A model was to run on an engine that cannot run it; :func:`cnnrs.explain` gives the reasons."""
