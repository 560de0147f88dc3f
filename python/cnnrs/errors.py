"""Exceptions of cnnrs; each is also the type a PyTorch user already catches."""

from __future__ import annotations

from PIL import UnidentifiedImageError


class CnnrsError(Exception):
    """Base of all exceptions that only cnnrs raises."""


class DecodeError(CnnrsError, UnidentifiedImageError):
    """The bytes of a file are not an image that can be decoded; an ``OSError``, as Pillow's errors about files are."""


class NonFiniteLossError(CnnrsError, FloatingPointError):
    """The loss became NaN or infinite; the weights are those before the batch that the message names."""


class UnsupportedModelError(CnnrsError, ValueError):
    """A model was to run on an engine that cannot run it; :func:`cnnrs.explain` gives the reasons."""
