"""What `DataLoader` iterates with, for data sets that are not image files."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Sequence, Sized
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

from cnnrs import resume
from cnnrs._intraop import one_thread
from cnnrs._notes import note
from cnnrs.device import Mover
from cnnrs.feature_dataset import FeatureDataset
from cnnrs.resume import Progress
from cnnrs.sources import Source

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


class Iter(_BaseDataLoaderIter):
    """What all kinds need from torch's base, which draws `base_seed` and checks `pin_memory`.

    Indices are drawn when torch draws them, because the generators may have other users. Without workers (also when
    nothing is said of them): the first at the first batch. With `num_workers=n`: for `n * prefetch_factor` batches at
    `iter()`, and for one more behind every batch.
    """

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        self._epoch = 0
        self._progress = Progress()
        self._lock, self._pid = threading.RLock(), os.getpid()
        if loader._workers:
            # As torch's workers: the sampler is asked for a second iterator, and that one counts.
            super()._reset(loader, True)

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        super()._reset(loader, first_iter)
        self._epoch += 1

    def begin(self, loader: Any, progress: Progress, state: dict[str, Any] | None) -> None:
        """Starts the epoch, behind the batches that `state` has had."""
        self._progress = progress
        self._mover = None if loader.device is None else Mover(loader.device, None)
        self._owners = resume.generators(loader)
        self._state = state
        if state is not None:
            progress.drawn, progress.batches, progress.samples = state["drawn"], state["batches"], state["samples"]
            if state["base_seed"] is not None:
                self._base_seed, self._epoch = state["base_seed"], state["rounds"]
        progress.base_seed, progress.rounds = int(self._base_seed), self._epoch
        self._begun = False
        self._over = False
        # (index, None), or (None, what the sampler raised), of batches that nobody has asked for.
        self._queue: deque[tuple[Any, Exception | None]] = deque()
        self._lookahead = loader._workers * max(loader.prefetch_factor or 0, 1)
        self._draw_ahead(self._lookahead)

    def _skip(self, state: dict[str, Any]) -> None:
        for _ in range(state["batches"]):
            try:
                self._next_index()  # type: ignore[no-untyped-call]
            except StopIteration:
                return

    def _draw_ahead(self, count: int) -> None:
        for _ in range(0 if self._over else count):
            try:
                self._queue.append((self._draw_one(), None))
            except StopIteration:
                self._over = True
                return
            except Exception as error:
                self._over = True
                self._queue.append((None, error))
                return

    def _draw_one(self) -> Any:
        if self._begun:
            return self._next_index()  # type: ignore[no-untyped-call]
        self._begun = True
        with resume.drawing(self._owners, self._progress, self._state):
            if self._state is not None:
                self._skip(self._state)
            return self._next_index()  # type: ignore[no-untyped-call]

    def _asked(self) -> Any:
        """The sampler's next."""
        if not self._queue:
            return self._draw_one()
        index, error = self._queue.popleft()
        if error is not None:
            try:
                raise error
            finally:
                # A local variable would tie the traceback and this frame together in a cycle.
                del error
        return index

    def _index(self) -> Any:
        """The sampler's next, which counts as delivered."""
        index = self._asked()
        self._progress.batches += 1
        self._progress.samples += len(index) if self._auto_collation and isinstance(index, Sized) else 1
        return index

    def __next__(self) -> Any:
        if self._pid != os.getpid():
            # The thread that held the lock may not exist in a forked child.
            self._lock, self._pid = threading.RLock(), os.getpid()
        # Several threads may share an iterator: each batch goes to one of them, whole.
        with self._lock:
            return self._one()

    def _one(self) -> Any:
        try:
            # torch's bookkeeping for a profiler costs as much as a batch of digits.
            if torch.autograd.profiler._is_profiler_enabled:
                with torch.autograd.profiler.record_function(self._profile_name):
                    data = self._next_data()
            else:
                data = self._next_data()
        except StopIteration:
            self._progress.finished = True
            raise
        except BaseException:
            # Ctrl-C included: its batch is lost, and the look-ahead is as long as before.
            self._draw_more()
            raise
        self._draw_more()
        self._num_yielded += 1
        self._check_length()
        return data

    def _next_data(self) -> Any:
        raise NotImplementedError

    def _draw_more(self) -> None:
        if self._lookahead:
            self._draw_ahead(1)

    def _check_length(self) -> None:
        promised = self._IterableDataset_len_called
        if self._dataset_kind == _DatasetKind.Iterable and promised is not None and self._num_yielded > promised:
            # torch's words: filters that users have set keep working.
            note(
                f"Length of IterableDataset {self._dataset} was reported to be {promised}"
                f"(when accessing len(dataloader)), but {self._num_yielded} samples have been fetched. "
            )

    def _delivered(self, data: Any) -> Any:
        if self._mover is not None:
            return self._mover.take(self._mover.start(data))
        return pin(data, self._pin_memory_device) if self._pin_memory else data  # type: ignore[no-untyped-call]

    def _fetcher(self) -> Any:
        """Torch's own, which calls the data set."""
        return _DatasetKind.create_fetcher(  # type: ignore[no-untyped-call]
            self._dataset_kind, self._dataset, self._auto_collation, self._collate_fn, self._drop_last
        )


class CalledIter(Iter):
    """The data set is called in this process, as with `num_workers=0`; with workers on one thread, as by a worker."""

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        if isinstance(self._dataset, (IterDataPipe, MapDataPipe)):
            graph_settings.apply_sharding(self._dataset, self._world_size, self._rank)

    def begin(self, loader: Any, progress: Progress, state: dict[str, Any] | None) -> None:
        super().begin(loader, progress, state)
        self._single = loader._workers > 0
        self._dataset_fetcher = self._fetcher()

    def _next_data(self) -> Any:
        index = self._index()
        with one_thread(self._single):
            data = self._dataset_fetcher.fetch(index)
        return self._delivered(data)


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
        return self._delivered([_gather(column, rows) for column in self._columns])


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
    if isinstance(column, torch.Tensor) and column.dtype in GATHERED:
        size = len(column)
        rows = torch.tensor([i + size if i < 0 else i for i in indices], dtype=torch.int64, device=column.device)
        return column.index_select(0, rows)
    if isinstance(column, np.ndarray) and column.ndim > 1 and column.dtype.kind in "fiub" and column.dtype.isnative:
        return torch.from_numpy(np.asarray(column)[indices])
    # Numbers and anything else: torch decides about the type.
    return collate([column[i] for i in indices])
