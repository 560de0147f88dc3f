"""Batches of images: samples go to the threads ahead of time, results come back in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import default_collate
from torch.utils.dlpack import from_dlpack

from cnnrs import _cnnrs
from cnnrs._records import Kept, Transform
from cnnrs._util.intraop import one_thread
from cnnrs.data.bad_files import note_not_scaled, note_turned
from cnnrs.data.batch import Batch
from cnnrs.data.device_decode import DeviceLoader, check_place
from cnnrs.data.iter_base import Iter, collate
from cnnrs.data.mover import Mover, can_finish
from cnnrs.data.read_options import ReadOptions
from cnnrs.data.second_opinion import Pixels, opinions
from cnnrs.data.sources import Rows, Source, Values, find_source
from cnnrs.image.lowering import lower, lower_rest, pillow13, wants_info
from cnnrs.image.on_device import steps_of
from cnnrs.image.spec import Native, kept_ops

# The random draws of the operations behind a Python step must not repeat those before it.
REST_SEED = 0x9E37_79B9_7F4A_7C15
MASK = (1 << 64) - 1
RESIZES = ("resize", "resize_shorter")


class ImagesIter(Iter):
    """One epoch. A batch is what the sampler says; ``SkippingIter`` has the other way."""

    def __init__(self, loader: Any, source: Source) -> None:
        super().__init__(loader)
        self._source = source

    def _reset(self, loader: Any, first_iter: bool = False) -> None:
        super()._reset(loader, first_iter)
        source = find_source(loader.dataset)
        if isinstance(source, str):
            raise TypeError(f"the data set changed behind an epoch of persistent workers: {source}")
        self._source = source

    def _prepare(self, loader: Any) -> None:
        source = self._source
        self._in_memory = isinstance(source, Rows)
        self._lowered = lower(source.transform, source.channels)
        self._default = self._collate_fn is default_collate and self._auto_collation
        self._whole = self._default and not self._lowered.python and self._lowered.first.finish is not None
        self._wants_info = wants_info(self._lowered)
        self._samples = len(loader.dataset)
        self._memory = loader._buffers()
        self._ahead = loader._ahead()
        self._read: ReadOptions = loader._read
        self._keyed_by_index = loader._keyed_by_index
        self._cache = None if self._in_memory else loader._cache
        self._pending: deque[Batch] = deque()
        self._position = 0
        self._exhausted = False
        # Batches whose copy to the device has begun.
        self._moving: deque[tuple[Any, Batch]] = deque()
        self._seed = self._progress.key((self._base_seed + self._epoch + loader._epoch * REST_SEED) & MASK)
        first = self._lowered.first
        if self._read.is_scaled and not (first.ops and first.ops[0]["kind"] in RESIZES):
            note_not_scaled()
        decodes = self._read.is_on_gpu and not self._in_memory
        if loader.device is not None:
            finish = first.finish if self._whole and can_finish(first) else None
            self._mover = Mover(loader.device, finish)
            first = replace(first, finish={"kind": "uint8"}) if finish is not None else first
        self._first: _cnnrs.Loader | DeviceLoader | None = self._loader(first, 0, source.rows(), keeps=True)
        if decodes:
            self._first = self._on_device(loader, self._first)
        self._rests: dict[int, tuple[Native, _cnnrs.Loader] | None] = {}

    def _loader(self, native: Native, mix: int, rows: torch.Tensor | None = None, keeps: bool = False) -> _cnnrs.Loader:
        ops = native.ops
        cache: Kept | None = None
        if keeps and self._cache is not None:
            kept = kept_ops(ops)
            cache = {"images": self._cache.open(ops[:kept], self._read), "ops": kept}
        transform: Transform = {"ops": ops, "finish": native.finish, "pillow13": pillow13()}
        seed = self._seed ^ mix
        return _cnnrs.Loader(transform, self._read.record(), seed, self._num_workers, self._memory, rows, cache)

    def _on_device(self, loader: Any, first: _cnnrs.Loader) -> DeviceLoader:
        # These attributes may be set.
        check_place("gpu", loader.device)
        if self._cache is not None or not self._default:
            what = "cache=" if self._default else "collate_fn= and batch_size=None"
            raise ValueError(f'decode="gpu" makes whole batches anew: leave out {what}, or leave decode="exact"')
        assert self._mover is not None
        return DeviceLoader(first, steps_of(self._lowered), self._read, self._num_workers, self._mover)

    def _skip(self, batches: int, samples: int) -> None:
        super()._skip(batches, samples)
        self._position = samples

    def _draw_more(self) -> None:
        super()._draw_more()
        if self._lookahead:
            self._fill()

    def _next_data(self) -> Any:
        if self._mover is None or self._mover.stream is None:
            batch = self._next_batch()
            self._count(batch)
            return self._delivered(self._collate(batch))
        if not self._moving:
            self._move()
        started, batch = self._moving.popleft()
        if isinstance(started, Exception):
            raise started
        # The next copy runs while the consumer works, if that batch is there already.
        if self._pending and self._is_ready(self._pending[0]):
            try:
                self._move()
            except StopIteration:
                pass
            except Exception as error:
                # Not this batch's: it is due at the next one.
                self._moving.append((error, batch))
            except BaseException:
                # Ctrl-C: lost is the one that was to come.
                self._moving.appendleft((started, batch))
                raise
        self._count(batch)
        return self._mover.take(started)

    def _is_ready(self, batch: Batch) -> bool:
        threads = self._first is not None and batch.ticket is not None and self._first.ready(batch.ticket)
        return threads and batch.error is None

    def _move(self) -> None:
        assert self._mover is not None
        # What is decoded on the device stays on the stream of the copies until it is handed over.
        with self._mover.aside() if isinstance(self._first, DeviceLoader) else nullcontext():
            batch = self._next_batch()
        self._moving.append((self._mover.start(self._collate(batch)), batch))

    def _count(self, batch: Batch) -> None:
        self._progress.delivered(batch.positions[-1] + 1 if batch.positions else self._progress.samples)

    def _fill(self) -> None:
        while not self._exhausted and len(self._pending) < self._ahead and self._may_ask():
            self._submit()

    def _may_ask(self) -> bool:
        """Whether the next index is there, or may be drawn now."""
        # Also when an exception has kept the look-ahead from being filled: without an index the epoch would be over.
        return bool(self._queue) or self._over or not self._lookahead or not self._pending

    def _next_batch(self) -> Batch:
        self._fill()
        if not self._pending:
            self._end()
            raise StopIteration
        return self._arrived(self._pending.popleft())

    def _end(self) -> None:
        if self._first is not None and not self._read.exif and self._first.saw_turned():
            note_turned()
        # The threads end here, also when somebody keeps the iterator.
        self._first, self._rests = None, {}
        if self._cache is not None:
            self._cache.tell(self._samples)
            self._cache = None

    def _arrived(self, batch: Batch) -> Batch:
        """The batch with its values, or what went wrong."""
        if batch.error is not None:
            self._count(batch)
            try:
                raise batch.error
            finally:
                # A local variable would tie the traceback, this frame and the threads together in a cycle.
                del batch
        if batch.asked is not None:
            return batch
        try:
            batch.values = self._values(batch)
        except BaseException:
            self._count(batch)
            raise
        return batch

    def _draw(self) -> Batch:
        index = self._asked()
        listed = [index] if not self._auto_collation else index
        indices = listed if type(listed) is list else list(listed)
        positions = indices if self._keyed_by_index else range(self._position, self._position + len(indices))
        self._position += len(indices)
        return Batch(indices, positions)

    def _submit(self) -> None:
        batch = Batch()
        try:
            batch = self._draw()
        except StopIteration:
            self._exhausted = True
            return
        except Exception as error:
            # Behind its own exception a sampler may go on, if it is not a generator. Ctrl-C does not wait.
            batch.error = error
            self._pending.append(batch)
            return
        try:
            numbers = self._source.plain(batch.indices)
            assert self._first is not None
            if numbers is None:
                batch.asked = self._ask(batch.indices)
            batch.indices = numbers or []
            if batch.indices:
                found, batch.targets = self._source.look_up(batch.indices, tensors=self._whole)
                if isinstance(self._first, DeviceLoader) or not self._in_memory:
                    batch.ticket = self._first.submit_files(batch.indices, batch.positions, found)
                else:
                    batch.ticket = self._first.submit_rows(found, batch.positions[0])
        except Exception as error:
            batch.error = error
        self._pending.append(batch)

    def _ask(self, indices: list[Any]) -> Any:
        """What the data set is called with, for indices that are no numbers of samples."""
        return indices if self._auto_collation else indices[0]

    # -- from what the threads return to what the consumer gets --------------------------------------------------------

    def _collate(self, batch: Batch) -> Any:
        if batch.asked is not None:
            with one_thread():
                return self._fetcher().fetch(batch.asked)
        target_transform = self._source.target_transform
        values, batch.values = batch.values, None
        if isinstance(values, torch.Tensor) and self._whole:
            targets = batch.targets
            if target_transform is not None:
                targets = [target_transform(target) for target in targets]
            return [values, targets if isinstance(targets, torch.Tensor) else collate(targets)]
        with one_thread():
            samples: Any = self._finish(list(values), batch)
            return self._collate_fn(samples if self._auto_collation else samples[0])

    def _values(self, batch: Batch) -> Values:
        """What the first part of the transform makes of the batch: one tensor, tensors, or PIL images."""
        if batch.ticket is None or self._first is None:
            return []
        kind, value = self._poll(self._first, batch.ticket, batch)
        if kind == "pixels":
            return [self._pil(pixels, index) for pixels, index in zip(value, batch.indices, strict=True)]
        return value if kind == "batch" and self._whole else self._wrap(value, self._lowered.first)

    def _wrap(self, tensors: Iterable[torch.Tensor], native: Native) -> list[Any]:
        if native.array:
            return [tensor.numpy() for tensor in tensors]
        if native.wraps:
            from torchvision.tv_tensors import Image

            return [Image(tensor) for tensor in tensors]
        return list(tensors)

    def _poll(self, loader: _cnnrs.Loader | DeviceLoader, ticket: int, batch: Batch) -> tuple[str, Any]:
        """("batch", one tensor), ("samples", tensors), or ("pixels", images), of the samples that are not dropped."""
        value: Any = None
        found: Any = None
        dropped: list[int] = []
        while True:
            try:
                kind, value = loader.poll(ticket)
                if kind != "failed":
                    left = batch.drop(dropped) if dropped else []
                    if kind == "samples":
                        value = [from_dlpack(sample) for sample in value]
                    elif kind == "batch" and not isinstance(value, torch.Tensor):
                        value = from_dlpack(value)
                        if dropped:
                            # Rows of dropped samples hold nothing.
                            value = value.index_select(0, torch.tensor(left, dtype=torch.int64))
                    return kind, value
                now = []
                for i, found in self._second_opinions(batch, value):
                    try:
                        if isinstance(found, Exception):
                            raise found
                        loader.retry(ticket, i, found)
                    except Exception as final:
                        if not self._may_drop(batch, i, final):
                            raise
                        now.append(i)
                if now:
                    loader.drop_samples(ticket, now)
                    dropped += now
            except BaseException:
                # Ctrl-C included: the batch is lost, as with torch, and the next one is the next one.
                loader.discard(ticket)
                raise
            finally:
                # As above: no cycle of an error, its traceback and this frame.
                value = found = None

    def _may_drop(self, batch: Batch, place: int, error: Exception) -> bool:
        return False

    def _second_opinions(
        self, batch: Batch, failed: list[tuple[int, Exception]]
    ) -> Iterable[tuple[int, Pixels | Exception]]:
        """What Pillow makes of the samples that Rust could not read, by their places in the batch."""
        if self._in_memory:
            return failed
        files = [(self._source.path(batch.indices[i]), error) for i, error in failed]
        return zip((i for i, _ in failed), opinions(files, self._read, self._num_workers), strict=True)

    def _pil(self, pixels: tuple[int, int, int, bytes], index: int) -> Any:
        from PIL import Image

        height, width, channels, data = pixels
        image = Image.frombytes("L" if channels == 1 else "RGB", (width, height), data)
        if self._wants_info:
            image.info = self._source.info(index)
        return image

    def _finish(self, values: list[Any], batch: Batch) -> list[tuple[Any, Any]]:
        """The parts of the transform that run in Python, in sample order, and what follows them."""
        lowered, target_transform = self._lowered, self._source.target_transform
        samples = []
        for value, target in zip(values, batch.targets, strict=True):
            for step in lowered.python:
                value = step(value)
            if target_transform is not None:
                target = target_transform(target)
            samples.append((value, target))
        if not lowered.rest:
            return samples
        finished = self._rest([value for value, _ in samples], batch)
        return [(value, target) for value, (_, target) in zip(finished, samples, strict=True)]

    def _rest(self, values: list[Any], batch: Batch) -> list[Any]:
        from PIL import Image

        modes = {value.mode if type(value) is Image.Image else None for value in values}
        channels = 3 if modes == {"RGB"} else 1 if modes == {"L"} else 0
        if channels and channels not in self._rests:
            native = lower_rest(self._lowered.rest, channels)
            self._rests[channels] = None if native is None else (native, self._loader(native, REST_SEED))
        known = self._rests.get(channels)
        if known is None:
            for step in self._lowered.rest:
                values = [step(value) for value in values]
            return values
        native, loader = known
        images = [(value.height, value.width, channels, value.tobytes()) for value in values]
        ticket = loader.submit_pixels(batch.indices, batch.positions, images)
        _, tensors = self._poll(loader, ticket, batch)
        return self._wrap(tensors, native)
