"""Features in memory, on a device or in a mapped file, whose epochs need no Python per batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import accumulate as running_sums
from typing import Any

import numpy as np
import torch

from cnnrs._util.plain import is_plain
from cnnrs.data.iter_rows import RowsIter, columns
from cnnrs.data.loader import DataLoader
from cnnrs.data.resume import Progress


class FeatureRows:
    """A `cnnrs.DataLoader` over features that lie in one place, whose epochs need no Python per batch.

    Attributes:
        features: (N, ...) float32.
        labels: (N,) int64 or (N, K) float32, on the same device.
    """

    def __init__(self, loader: DataLoader[Any], features: torch.Tensor, labels: torch.Tensor) -> None:
        self._loader = loader
        self.features = features
        self.labels = labels
        #: The batch that an engine would not take.
        self.current: tuple[torch.Tensor, torch.Tensor] | None = None

    @staticmethod
    def of(loader: Any) -> FeatureRows | None:
        """The rows of a loader, or None where its batches must be asked for one by one."""
        if type(loader) is not DataLoader or loader.device is not None or loader.pin_memory:
            return None
        found = columns(loader)
        if found is None or len(found) != 2:
            return None
        features, labels = map(_shared, found)
        if features is None or labels is None or features.dtype is not torch.float32 or features.dim() < 2:
            return None
        classes = labels.dtype is torch.int64 and labels.dim() == 1
        values = labels.dtype is torch.float32 and labels.dim() == 2
        fits = len(features) == len(labels) and features.device == labels.device
        return FeatureRows(loader, features, labels) if fits and (classes or values) else None

    def example(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of a batch of the usual size."""
        rows = min(self._loader.batch_size or 1, len(self.features))
        return self.features[:rows], self.labels[:rows]

    def epoch(self, work: Callable[[Any], Any], done: Callable[[], int]) -> Any:
        """Draws the order of an epoch as the loader would and gives it to ``work``; ``done`` counts its batches."""
        iterator = iter(self._loader)
        assert isinstance(iterator, RowsIter)
        progress, size = iterator._progress, len(self.features)
        parts: list[list[int]] = []
        try:
            while True:
                parts.append(iterator._base(iterator._asked()))
        except StopIteration:
            pass
        order = [row + size if row < 0 else row for part in parts for row in part]
        outside = next((row for row in order if not 0 <= row < size), None)
        if outside is not None:
            raise IndexError(f"index {outside} is out of range for {size} features")
        ends = list(running_sums(map(len, parts)))
        try:
            result = work((self.features, self.labels, order, ends))
        except BaseException:
            _deliver(progress, parts[: done()])
            if done() < len(parts):
                self.current = self.features[parts[done()]], self.labels[parts[done()]]
            raise
        _deliver(progress, parts)
        progress.finish()
        return result


def _deliver(progress: Progress, parts: list[list[int]]) -> None:
    for part in parts:
        progress.delivered(progress.samples + len(part))


def _shared(column: Any) -> torch.Tensor | None:
    """A column as a contiguous tensor over the same memory, where there is one; lists and arrays are on the CPU."""
    if isinstance(column, list):
        column = np.asarray(column) if all(type(value) is int for value in column) else None
    if isinstance(column, np.ndarray) and column.dtype.isnative and column.flags.c_contiguous and column.flags.aligned:
        with warnings.catch_warnings():
            # That a mapped file is read-only does not matter: nobody writes to it.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            column = torch.from_numpy(np.asarray(column)) if column.dtype in (np.float32, np.int64) else None
    if isinstance(column, torch.Tensor) and is_plain(column) and column.is_contiguous():
        return column.detach()
    return None
