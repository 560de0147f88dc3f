"""Exceptions of cnnrs; each is also the type a PyTorch user already catches."""

from __future__ import annotations


class CnnrsError(Exception):
    """Base of all exceptions that only cnnrs raises."""


class DecodeError(CnnrsError, OSError):
    """The bytes of a file are not an image that can be decoded (``PIL.UnidentifiedImageError`` is an OSError too)."""


class NonFiniteLossError(CnnrsError, FloatingPointError):
    """The loss became NaN or infinite; the weights are those before the batch that the message names."""


class UnsupportedModelError(CnnrsError, ValueError):
    """A model was to run on an engine that cannot run it; :func:`cnnrs.explain` gives the reasons."""
