"""What a frozen model computes in, and the type that its rows are kept in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

Precision = Literal["exact", "tf32", "bf16", "fp16", "int8"]

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_COMPUTED = (
    'a feature is infinite or NaN: in float16 numbers above 65504 overflow, compute in bfloat16 (precision="bf16"); '
    "unless the images or the weights hold such values themselves"
)
_KEPT = 'a feature is larger than float16 can hold (65504): use dtype="bfloat16" or "float32"'
_TYPES = ("float16", "bfloat16", "float32", "float64")


def type_name(dtype: str | torch.dtype | np.dtype[Any] | type | None) -> str | None:
    """Torch's name of a type that features can have.

    Raises:
        ValueError: it is none of them.
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, (str, torch.dtype)) else np.dtype(dtype).name
    if name not in _TYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, _TYPES))}, got {dtype!r}")
    return name


@dataclass(frozen=True)
class Rows:
    """Features as they are stored.

    Attributes:
        tensor: (N, ...), contiguous.
        fine: one bool on the same device: whether no value was more than float16 can hold; None where none can be.
        complaint: what is said otherwise.
    """

    tensor: torch.Tensor
    fine: torch.Tensor | None = None
    complaint: str = ""

    def on(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Rows:
        """The same elsewhere."""
        return Rows(move(self.tensor), None if self.fine is None else move(self.fine), self.complaint)

    def check(self) -> None:
        """Looks at ``fine``.

        Raises:
            ValueError: it is not.
        """
        if self.fine is not None and not bool(self.fine):
            raise ValueError(self.complaint)


def narrowed(features: torch.Tensor, dtype: str | None, precision: Precision | None = None, copy: bool = False) -> Rows:
    """Features as they are stored: contiguous, of the type ``dtype`` or their own.

    Args:
        features: (N, ...) on any device.
        dtype: torch's name; None: their own.
        precision: what the model has computed in.
        copy: whether they must be in memory of their own: the model may return the same buffer for the next batch.

    Raises:
        ValueError: for types that features cannot have.
    """
    found = str(features.dtype).removeprefix("torch.")
    if found not in _TYPES:
        raise ValueError(f"features must be {', '.join(_TYPES[:-1])} or {_TYPES[-1]}, got {found}")
    kept = features.detach().to(getattr(torch, dtype or found), copy=copy).contiguous()
    if precision == "fp16" or found == "float16":
        # What has overflowed inside of the model may be NaN by now.
        return Rows(kept, kept.isfinite().all(), _COMPUTED)
    return Rows(kept, kept.isinf().any().logical_not(), _KEPT) if dtype == "float16" else Rows(kept)
