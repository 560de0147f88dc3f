"""A transform as Rust reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cnnrs._records import Finish, Op

Step = Callable[[Any], Any]


@dataclass(frozen=True)
class Native:
    """Steps that Rust runs: operations on pixels, and how the pixels become numbers (None: they stay a PIL image)."""

    ops: tuple[Op, ...] = ()
    finish: Finish | None = None
    # The user's chain ends in a ``tv_tensors.Image``, or in a NumPy array.
    wraps: bool = False
    array: bool = False


@dataclass(frozen=True)
class Lowered:
    """A transform as Rust - Python - Rust.

    ``first`` runs in threads. ``python`` are the user's own objects from the first to the last that Rust does not know.
    ``rest`` runs in Rust again if those return PIL images (see ``lower_rest``), and as the user's objects otherwise.
    """

    first: Native
    python: tuple[Step, ...] = ()
    rest: tuple[Step, ...] = ()


# Operations that make the same of the same image, however often they run. What is not listed ends what can be kept.
DETERMINISTIC = {"resize", "resize_shorter", "center_crop", "crop", "pad", "grayscale"}


def kept_ops(ops: Sequence[Op]) -> int:
    """How many operations come before the first that is random."""
    return next((i for i, spec in enumerate(ops) if spec["kind"] not in DETERMINISTIC), len(ops))
