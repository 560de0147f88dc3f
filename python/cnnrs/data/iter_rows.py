"""Batches that are rows of arrays: one gather instead of row by row and a stack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset, TensorDataset, default_collate

from cnnrs.data.feature_dataset import FeatureDataset, index_on
from cnnrs.data.iter_base import Iter, collate
from cnnrs.data.sources import Source

# What torch can gather rows of; it indexes one by one, and stacks, more types than these.
GATHERED = {
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
}


class RowsIter(Iter):
    """All rows of a batch in one gather, instead of row by row and a stack."""

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self._columns = columns(loader) or []
        self._size = len(self._columns[0]) if self._columns else 0
        source = Source(*unwrap(loader.dataset))
        self._base, self._plain = source.base, source.plain

    def _next_data(self) -> Any:
        index = self._index()
        indices = index if type(index) is list else list(index)
        rows = self._plain(indices)
        if not rows or not -self._size <= min(rows) <= max(rows) < self._size:
            # Slices, masks and whatever else the data set understands, or its own error.
            return self._delivered(self._fetcher().fetch(indices))
        index = _Index([i + self._size if i < 0 else i for i in rows])
        return self._delivered([_gather(column, index) for column in self._columns])


def unwrap(dataset: Any) -> tuple[Any, list[Any]]:
    """The data set below every ``Subset``, and their indices from the outermost on."""
    subsets = []
    while type(dataset) is Subset:
        subsets.append(dataset.indices)
        dataset = dataset.dataset
    return dataset, subsets


def is_rows(dataset: Any) -> bool:
    """Whether the samples of a data set are rows of arrays."""
    ours = isinstance(dataset, FeatureDataset) and type(dataset).__getitem__ is FeatureDataset.__getitem__
    return ours or type(dataset) is TensorDataset


def columns(loader: Any) -> list[Any] | None:
    """The columns of a data set of rows, when gathering them gives what the default collation gives."""
    if loader.collate_fn is not default_collate or not loader._auto_collation:
        return None
    dataset, _ = unwrap(loader.dataset)
    if not is_rows(dataset):
        return None
    is_tensors = type(dataset) is TensorDataset
    found: Sequence[Any] = dataset.tensors if is_tensors else (dataset.features, dataset.labels)
    plain = (type(c) is torch.Tensor and c.layout is torch.strided and c.dim() > 0 for c in found)
    rows = (isinstance(c, (np.ndarray, list)) for c in found)
    return list(found) if all(a or b for a, b in zip(plain, rows, strict=True)) else None


class _Index:
    """The rows of a batch, wherever a column is: made once, and copied without waiting for the device."""

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows
        self._tensors: dict[torch.device, torch.Tensor] = {}

    def on(self, device: torch.device) -> torch.Tensor:
        if device not in self._tensors:
            self._tensors[device] = index_on(torch.tensor(self.rows, dtype=torch.int64), device)
        return self._tensors[device]


def _gather(column: Any, index: _Index) -> Any:
    if isinstance(column, torch.Tensor) and column.dtype in GATHERED:
        return column.index_select(0, index.on(column.device))
    if isinstance(column, np.ndarray) and column.ndim > 1 and column.dtype.kind in "fiub" and column.dtype.isnative:
        return torch.from_numpy(np.asarray(column)[index.rows])
    # Numbers and anything else: torch decides about the type.
    return collate([column[i] for i in index.rows])
