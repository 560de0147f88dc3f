"""What ``DataLoader`` iterates with, for data sets that are not image files."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable, Sized
from typing import Any

import torch
from torch.utils.data import (
    IterDataPipe,
    MapDataPipe,
    default_collate,
    graph_settings,
)
from torch.utils.data._utils.pin_memory import pin_memory as pin
from torch.utils.data.dataloader import _BaseDataLoaderIter, _DatasetKind

from cnnrs._util.intraop import one_thread
from cnnrs._util.notes import note
from cnnrs.data.mover import Mover
from cnnrs.data.resume import Progress, Stage


class Iter(_BaseDataLoaderIter):
    """What all kinds need from torch's base, which draws ``base_seed`` and checks ``pin_memory``.

    Indices are drawn when torch draws them, because the generators may have other users. Without workers (also when
    nothing is said of them): the first at the first batch. With ``num_workers=n``: for ``n * prefetch_factor`` batches
    at ``iter()``, and for one more behind every batch.
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

    def following(self) -> tuple[int, int]:
        """Base seed and number of this iterator's next epoch."""
        return int(self._base_seed), self._epoch + 1

    def begin(self, loader: Any, progress: Progress) -> None:
        """Starts the epoch, behind the batches that ``progress`` has had."""
        self._progress = progress
        if progress.rewinds():
            self._sampler_iter = iter(self._index_sampler)
        self._base_seed, self._epoch = progress.made(int(self._base_seed), self._epoch)
        self._over = False
        # (index, None), or (None, what the sampler raised), of batches that nobody has asked for.
        self._queue: deque[tuple[Any, Exception | None]] = deque()
        self._mover = None if loader.device is None else Mover(loader.device)
        self._prepare(loader)
        self._lookahead = loader._workers * max(loader.prefetch_factor or 0, 1)
        self._draw_ahead(self._lookahead)

    def _prepare(self, loader: Any) -> None:
        """What an epoch of this kind needs, before an index is drawn."""

    def _skip(self, batches: int, samples: int) -> None:
        """Asks the sampler for what was delivered in the epoch that goes on."""
        for _ in range(batches):
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
        progress = self._progress
        if progress.stage is not Stage.MADE:
            return self._next_index()  # type: ignore[no-untyped-call]
        with progress.drawing():
            if progress.resumes:
                self._skip(progress.batches, progress.samples)
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
        count = len(index) if self._auto_collation and isinstance(index, Sized) else 1
        self._progress.delivered(self._progress.samples + count)
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
            self._progress.finish()
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
    """The data set is called in this process, as with ``num_workers=0``; with workers on one thread, as by a worker."""

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        if isinstance(self._dataset, (IterDataPipe, MapDataPipe)):
            graph_settings.apply_sharding(self._dataset, self._world_size, self._rank)

    def _prepare(self, loader: Any) -> None:
        self._single = loader._workers > 0
        self._dataset_fetcher = self._fetcher()

    def _next_data(self) -> Any:
        index = self._index()
        with one_thread(self._single):
            data = self._dataset_fetcher.fetch(index)
        return self._delivered(data)


def collate(values: Iterable[Any]) -> Any:
    """One column of a batch as torch's default collation makes it."""
    # A tuple, as when torch has transposed its list of samples: strings come back as they are.
    column: Any = tuple(values)
    return default_collate(column)
