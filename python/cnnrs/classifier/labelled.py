"""Features and labels in any form, as the heads that are solved for take them: rows of numbers, numbers of classes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnnrs.features.features import Features

#: Rows that are read at a time: bounds the memory beside the result, whatever the dtype and wherever they are stored.
CHUNK = 1024


def as_rows(features: Any, what: str = "features") -> Tensor:
    """(N, D) rows of (N, ...) features in any form, not copied where they need not be.

    Args:
        features: :class:`cnnrs.Features`, a tensor, an array (also memory-mapped) or nested lists; real numbers.
        what: their name in messages.

    Raises:
        ValueError: there are no rows of numbers.
        TypeError: they are no real numbers.
    """
    if isinstance(features, Features):
        features = features.features
    if not isinstance(features, Tensor):
        array = np.asarray(features)
        if array.dtype.kind not in "fiub":
            raise TypeError(f"{what} must be real numbers, got {type(features).__name__} of dtype {array.dtype}")
        if not array.dtype.isnative or min(array.strides, default=0) < 0:
            # Torch has neither.
            array = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
        with warnings.catch_warnings():
            # An array that is mapped for reading only: nothing here writes.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            features = torch.from_numpy(array)
    if features.is_complex():
        raise TypeError(f"{what} must be real numbers, got {features.dtype}")
    if features.dim() < 2 or not features[:1].numel():
        raise ValueError(
            f"{what} must be (N, ...) with at least one row of at least one number, got shape {tuple(features.shape)}"
        )
    rows: Tensor = features.detach().flatten(1)
    return rows


def chunks(rows: Tensor, order: Tensor | None = None, what: str = "features") -> Iterator[tuple[int, Tensor]]:
    """(first, (n, D) float32) of (N, D) rows, all of them or those of ``order``; to be read only.

    Raises:
        ValueError: a row holds NaN or infinity.
    """
    for start in range(0, len(rows) if order is None else len(order), CHUNK):
        where: Any = slice(start, start + CHUNK) if order is None else order[start : start + CHUNK].to(rows.device)
        part = rows[where].float()
        if not part.sum(dtype=torch.float64).isfinite():
            bad = int(part.isfinite().all(dim=1).logical_not().nonzero()[0])
            row = start + bad if order is None else int(order[start + bad])
            raise ValueError(
                f"row {row} of the {what} holds NaN, infinity or a number beyond float32: leave it out, "
                "or see what the network makes of that image"
            )
        yield start, part


@dataclass(frozen=True)
class Standard:
    """Rows around zero whose squares add up to 1 on average: penalties mean the same for any features.

    Attributes:
        rows: (N, D) float32.
        mean: (D,) float64, what was subtracted.
        scale: what the differences were divided by; 1 where all rows are the same.
    """

    rows: Tensor
    mean: Tensor
    scale: float

    @classmethod
    def of(cls, rows: Tensor, order: Tensor | None = None) -> Standard:
        """Copy (N, D) rows, in the given order, and standardise the copy."""
        count = len(rows) if order is None else len(order)
        out = torch.empty((count, rows.shape[1]), device=rows.device)
        total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
        for start, part in chunks(rows, order):
            out[start : start + len(part)] = part
            total += part.sum(dim=0, dtype=torch.float64)
        # As float32, so that what is subtracted is what the finished layer adds again.
        mean = (total / count).float()
        squares = 0.0
        for start in range(0, count, CHUNK):
            squares += float(out[start : start + CHUNK].sub_(mean).double().square_().sum())
        scale = (squares / count) ** 0.5 or 1.0
        return cls(out.div_(scale), mean.double(), scale)

    def like(self, rows: Tensor, what: str) -> Tensor:
        """Other (N, D) rows with the same numbers subtracted and divided by."""
        if rows.shape[1] != self.rows.shape[1]:
            raise ValueError(f"the features have {self.rows.shape[1]} numbers per row, the {what} {rows.shape[1]}")
        out = torch.empty((len(rows), rows.shape[1]), device=self.rows.device)
        for start, part in chunks(rows, what=what):
            out[start : start + len(part)] = (part.to(out.device) - self.mean.float()).div_(self.scale)
        return out


@dataclass(frozen=True)
class Targets:
    """What N rows are.

    Attributes:
        classes: (C,) labels by number; with several labels per row 0 to C-1.
        values: (N,) int64 class numbers; with several labels per row (N, C) float64, 1 where the label is there.
    """

    classes: np.ndarray
    values: Tensor

    @classmethod
    def of(cls, labels: Any, count: int, classes: Any = None, what: str = "features") -> Targets:
        """Read labels.

        Args:
            labels: (N,) integers or strings, or (N, C) zeros and ones.
            count: N, the number of rows they belong to.
            classes: all labels that there can be; None: those that occur.
            what: the name of the rows in messages.

        Raises:
            ValueError: the lengths differ, the labels are no classes, or none of ``classes``.
        """
        array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
        if array.ndim not in (1, 2):
            raise ValueError(
                f"labels must be (N,), or (N, C) zeros and ones where a row can have several, got shape {array.shape}"
            )
        if len(array) != count:
            raise ValueError(
                f"every row needs one label: got {count:,} rows of {what} and labels of shape {array.shape}"
            )
        if array.ndim == 2:
            if array.dtype.kind not in "fiub" or not array.shape[1] or not ((array == 0) | (array == 1)).all():
                raise ValueError("labels of shape (N, C) must be zeros and ones: 1 where row n has label c")
            return cls(np.arange(array.shape[1]), torch.from_numpy(array.astype(np.float64)))
        if array.dtype.kind == "f" and not (np.isfinite(array) & (array == np.floor(array))).all():
            wrong = array[~(np.isfinite(array) & (array == np.floor(array)))][0]
            raise ValueError(f"labels must be integers or strings, got {wrong}")
        try:
            found, numbers = np.unique(array, return_inverse=True)
            every = found if classes is None else np.unique(np.asarray(classes))
            where = np.searchsorted(every, found).clip(max=len(every) - 1)
        except TypeError as error:
            raise ValueError(f"labels must all be integers or all be strings: {error}") from error
        if (unknown := found[every[where] != found]).size:
            raise ValueError(f"the labels of the {what} have {unknown[0]!r}, which is none of the classes {every}")
        return cls(every, torch.from_numpy(where[numbers.reshape(-1)].astype(np.int64)))

    def like(self, labels: Any, count: int) -> Targets:
        """Labels of rows that were held out, by the numbers of these classes.

        Raises:
            ValueError: the lengths differ, or there are labels that no row has which is trained on.
        """
        others = Targets.of(labels, count, None if self.several else self.classes, "validation features")
        if others.several != self.several or len(others.classes) != len(self.classes):
            wanted = f"({count}, {len(self.classes)})" if self.several else f"({count},)"
            raise ValueError(f"the validation labels must be {wanted} as the others, got {tuple(others.values.shape)}")
        return others

    @property
    def several(self) -> bool:
        """Whether a row can have any number of labels."""
        return self.values.dim() == 2

    def __len__(self) -> int:
        return len(self.values)

    def take(self, rows: Tensor | slice) -> Targets:
        """Those of some rows."""
        return Targets(self.classes, self.values[rows])

    def columns(self) -> Tensor:
        """What is solved for, (N, K) float64 zeros and ones: one column per class, only the second's of two."""
        if self.several:
            return self.values
        one_hot = torch.nn.functional.one_hot(self.values, len(self.classes)).double()
        return one_hot[:, 1:] if len(self.classes) == 2 else one_hot

    def weights(self, balance: bool) -> Tensor:
        """(N,) float64, with several labels (N, C): ones, or such that all classes weigh the same.

        As scikit-learn's "balanced": N over the number of classes and the rows of the class.
        """
        if not balance:
            return torch.ones(self.values.shape, dtype=torch.float64)
        if not self.several:
            counts = self.values.bincount(minlength=len(self.classes)).double()
            return (len(self) / ((counts > 0).sum() * counts))[self.values]
        there = self.values.mean(dim=0)
        # A label that all rows have, or none, is one class.
        sides = 1.0 + ((there > 0) & (there < 1)).double()
        return 1 / (sides * torch.where(self.values == 1, there, 1 - there))

    def hold_out(self, fraction: float, seed: int, features: Any = None) -> tuple[Tensor, Tensor]:
        """Numbers of the rows that are trained on and of those that are not: ``fraction`` of every class, rounded.

        A class with a single row is trained on. Rows of one image stay together where ``features`` tell images apart.
        """
        known = isinstance(features, Features)
        paths, images = (features.paths, features.images) if known else (None, None)
        train, held = Features(torch.arange(len(self)), self.values, paths, images=images).split(fraction, seed)
        return train.features, held.features
