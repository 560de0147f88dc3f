"""What `DataLoader` iterates with, for data sets that are not image files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    IterDataPipe,
    MapDataPipe,
    Subset,
    TensorDataset,
    default_collate,
    graph_settings,
)
from torch.utils.data._utils.pin_memory import pin_memory as pin
from torch.utils.data.dataloader import _BaseDataLoaderIter, _DatasetKind

from cnnrs.device import Mover
from cnnrs.feature_dataset import FeatureDataset
from cnnrs.resume import Progress
from cnnrs.sources import Source


class Iter(_BaseDataLoaderIter):
    """What all kinds need from torch's base, which draws `base_seed` and checks `pin_memory`."""

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self._epoch = 0
        self._progress = Progress()

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        super()._reset(loader, first_iter)
        self._epoch += 1

    def begin(self, loader: Any, progress: Progress, state: dict[str, Any] | None) -> None:
        """Starts the epoch, behind the batches that `state` has had."""
        self._progress = progress
        device = loader.device
        self._mover = None if device is None else Mover(device, None)
        if state is not None and state["generators"]:
            self._skip(state)
        self._draw_now()

    def _skip(self, state: dict[str, Any]) -> None:
        for _ in range(state["batches"]):
            try:
                self._index()
            except StopIteration:
                return

    def _draw_now(self) -> None:
        """Lets the sampler draw its order while the generators are as `state_dict` has saved them."""
        self._sampler_iter = begun(self._sampler_iter)

    def _index(self) -> Any:
        index = self._next_index()  # type: ignore[no-untyped-call]
        self._progress.batches += 1
        self._progress.samples += len(index) if self._auto_collation else 1
        return index

    def __next__(self) -> Any:
        try:
            if torch.autograd.profiler._is_profiler_enabled:
                return super().__next__()
            # torch's bookkeeping for a profiler costs as much as a batch of digits.
            data: Any = self._next_data()
        except StopIteration:
            self._progress.finished = True
            raise
        self._num_yielded += 1
        return data

    def _delivered(self, data: Any) -> Any:
        if self._mover is not None:
            return self._mover.take(self._mover.start(data))
        return pin(data, self._pin_memory_device) if self._pin_memory else data  # type: ignore[no-untyped-call]


class CalledIter(Iter):
    """torch's own way with `num_workers=0`, whatever the number of threads is."""

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        if isinstance(self._dataset, (IterDataPipe, MapDataPipe)):
            graph_settings.apply_sharding(self._dataset, self._world_size, self._rank)

    def begin(self, loader: Any, progress: Progress, state: dict[str, Any] | None) -> None:
        super().begin(loader, progress, state)
        self._dataset_fetcher = _DatasetKind.create_fetcher(  # type: ignore[no-untyped-call]
            self._dataset_kind, self._dataset, self._auto_collation, self._collate_fn, self._drop_last
        )

    def _next_data(self) -> Any:
        return self._delivered(self._dataset_fetcher.fetch(self._index()))


class RowsIter(Iter):
    """All rows of a batch in one gather, instead of row by row and a stack."""

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self._columns = columns(loader) or []
        self._base = Source(*unwrap(loader.dataset)).base

    def _next_data(self) -> Any:
        indices = self._base(self._index())
        return self._delivered([_gather(column, indices) for column in self._columns])


def begun(indices: Iterator[Any]) -> Iterator[Any]:
    """The same indices; the first is drawn now."""
    try:
        first = [index for _, index in zip(range(1), indices, strict=False)]
    except Exception as error:
        return _raising(error)
    return chain(first, indices)


def _raising(error: Exception) -> Iterator[Any]:
    # It is due where the index would be used.
    raise error
    yield


def unwrap(dataset: Any) -> tuple[Any, list[Any]]:
    """The data set below `Subset`s, and their indices from the outermost on."""
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


def collate(values: Iterable[Any]) -> Any:
    """One column of a batch as torch's default collation makes it."""
    # A tuple, as when torch has transposed its list of samples: strings come back as they are.
    column: Any = tuple(values)
    return default_collate(column)


def _gather(column: Any, indices: list[int]) -> Any:
    if isinstance(column, torch.Tensor):
        size = len(column)
        rows = torch.tensor([i + size if i < 0 else i for i in indices], dtype=torch.int64, device=column.device)
        return column.index_select(0, rows)
    if isinstance(column, np.ndarray) and column.ndim > 1 and column.dtype.kind in "fiub" and column.dtype.isnative:
        return torch.from_numpy(np.asarray(column)[indices])
    # Numbers and anything else: torch decides about the type.
    return collate([column[i] for i in indices])
