"""Batches of images that do without the files that fail."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from torch.utils.data import BatchSampler

from cnnrs.data.bad_files import Faults
from cnnrs.data.batch import Batch, join
from cnnrs.data.iter_images import ImagesIter
from cnnrs.data.resume import Progress, Stage


class SkippingIter(ImagesIter):
    """``on_error="skip"``: the sampler's order without the files that fail, cut into batches.

    What comes out depends on the files only, not on how far ahead the threads are: a batch that lost samples gets the
    first ones of the next, and the batch that is asked for next is made shorter by as many, so that batches arrive
    whole again after those in flight.
    """

    def begin(self, loader: Any, progress: Progress) -> None:
        super().begin(loader, progress)
        # What is left out is not known beforehand, nor how many batches are needed.
        self._lookahead = 0

    def _prepare(self, loader: Any) -> None:
        super()._prepare(loader)
        batches = loader.batch_sampler
        # A plain BatchSampler only cuts; another one's batches keep the lengths it gave them.
        self._flat: Iterator[Any] | None = _each(batches.sampler) if type(batches) is BatchSampler else None
        if self._flat is not None:
            self._sampler_iter = self._flat
        self._size = batches.batch_size if self._flat is not None else 1
        self._drops_last = self._flat is not None and batches.drop_last
        self._sizes: deque[int] = deque()
        # Samples that have arrived and wait for the rest of their batch.
        self._carry: deque[Batch] = deque()
        # Samples that are asked for or have arrived, and are not delivered.
        self._held = 0
        self._remainder: list[Any] = []
        self._faults: Faults = loader._faults
        self._faults.begin(len(loader.dataset))

    def _skip(self, batches: int, samples: int) -> None:
        if self._flat is not None:
            self._position = sum(1 for _ in zip(range(samples), self._flat, strict=False))
        else:
            self._skip_lists(batches, samples)
        # An epoch that has begun has had good samples.
        self._faults.good = batches

    def _skip_lists(self, batches: int, behind: int) -> None:
        while self._position < behind:
            try:
                index = self._next_index()  # type: ignore[no-untyped-call]
            except StopIteration:
                break
            indices = list(index) if self._auto_collation else [index]
            self._sizes.append(len(indices))
            self._position += len(indices)
            # What is left of a list whose first samples were delivered.
            self._remainder = indices[len(indices) - max(self._position - behind, 0) :]
        self._position -= len(self._remainder)
        for _ in range(min(batches, len(self._sizes))):
            self._sizes.popleft()

    def _draw(self) -> Batch:
        positions: list[int] = []
        batch = Batch([], positions)
        for index in self._indices():
            position = self._position
            self._position += 1
            if self._known_bad(index):
                continue
            batch.indices.append(index)
            positions.append(index if self._keyed_by_index else position)
            if self._flat is not None and (self._held + len(batch.indices)) % self._size == 0:
                break
        if self._flat is not None and not batch.indices:
            raise StopIteration
        self._held += len(batch.indices)
        return batch

    def _indices(self) -> Iterable[Any]:
        if self._flat is not None:
            return self._singly()
        if self._progress.stage is Stage.MADE:
            # What was skipped may leave a remainder.
            self._draw_ahead(1)
        if self._remainder:
            indices, self._remainder = self._remainder, []
            return indices
        index = self._asked()
        indices = list(index) if self._auto_collation else [index]
        self._sizes.append(len(indices))
        return indices

    def _singly(self) -> Iterator[Any]:
        while True:
            try:
                index = self._asked()
            except StopIteration:
                return
            yield index

    def _ask(self, indices: list[Any]) -> Any:
        # Where one index is several samples, or none, there is no telling which of them to leave out.
        raise TypeError(f'on_error="skip" needs the numbers of samples, got one of these: {indices!r:.200}')

    def _known_bad(self, index: Any) -> bool:
        if not self._faults.known:
            return False
        try:
            return self._source.path(self._source.base([index])[0]) in self._faults.known
        except (IndexError, TypeError):
            # Not an index: the error is due where the samples are looked up.
            return False

    def _next_batch(self) -> Batch:
        while True:
            self._fill()
            wanted = self._size if self._flat is not None else self._sizes[0] if self._sizes else 1
            if sum(len(batch.indices) for batch in self._carry) >= wanted or not self._pending:
                break
            batch = self._pending.popleft()
            asked = len(batch.indices)
            try:
                arrived = self._arrived(batch)
            except BaseException:
                self._held -= asked
                raise
            self._held -= asked - len(arrived.indices)
            self._faults.good += len(arrived.indices)
            if arrived.indices:
                self._carry.append(arrived)
        carried = sum(len(batch.indices) for batch in self._carry)
        if carried == 0 or (carried < wanted and self._drops_last):
            self._faults.end()
            self._end()
            raise StopIteration
        if self._sizes:
            self._sizes.popleft()
        return self._take(min(wanted, carried))

    def _take(self, count: int) -> Batch:
        parts = []
        self._held -= count
        while count:
            part = self._carry.popleft()
            if len(part.indices) > count:
                self._carry.appendleft(part.cut(count, len(part.indices)))
                part = part.cut(0, count)
            parts.append(part)
            count -= len(part.indices)
        return parts[0] if len(parts) == 1 else join(parts)

    def _may_drop(self, batch: Batch, place: int, error: Exception) -> bool:
        return self._faults.record(self._source.path(batch.indices[place]), error)


def _each(sampler: Iterable[Any]) -> Iterator[Any]:
    """As a ``BatchSampler`` does it: the sampler is asked for an iterator when the first index is due."""
    yield from sampler
