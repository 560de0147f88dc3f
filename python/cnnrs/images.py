"""Batches of images: samples go to the threads ahead of time, results come back in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils.data import default_collate
from torch.utils.dlpack import from_dlpack

from cnnrs import _cnnrs
from cnnrs._intraop import one_thread
from cnnrs.cache import kept_ops
from cnnrs.device import Mover, can_finish, finish_on
from cnnrs.errors import DecodeError
from cnnrs.faults import accepting_truncated, check_limits, is_the_process, note_not_scaled, note_turned
from cnnrs.iterators import Iter, collate
from cnnrs.limits import pixel_limit
from cnnrs.resume import Progress
from cnnrs.sources import Rows, Values, find_source
from cnnrs.transforms import Native, lower, lower_rest, pillow13, wants_info

# The random draws of the operations behind a Python step must not repeat those before it.
REST_SEED = 0x9E37_79B9_7F4A_7C15
MASK = (1 << 64) - 1
RESIZES = ("resize", "resize_shorter")


@dataclass
class Batch:
    """A batch on its way."""

    indices: list[int] = field(default_factory=list)
    # Places in the sampler's order.
    positions: Sequence[int] = ()
    targets: Any = field(default_factory=list)
    # One tensor, or one value per sample, once they are there.
    values: Any = None
    # Indices that are no numbers of samples: the data set is called with them.
    asked: Any = None
    # What the sampler or the look-up of the samples raised: it is due when the batches before it are delivered.
    error: Exception | None = None
    # By which the threads' loader knows it; None when they have nothing to do.
    ticket: int | None = None


class ImagesIter(Iter):
    """One epoch. A batch is what the sampler says; `cnnrs.skipping` has the other way."""

    def begin(self, loader: Any, progress: Progress, state: dict[str, Any] | None) -> None:
        source = find_source(loader.dataset)
        if isinstance(source, str):
            raise TypeError(f"the data set changed during the epoch: {source}")
        self._source = source
        self._lowered = lower(source.transform, source.channels)
        self._default = self._collate_fn is default_collate and self._auto_collation
        self._whole = self._default and not self._lowered.python and self._lowered.first.finish is not None
        self._wants_info = wants_info(self._lowered)
        self._samples = len(loader.dataset)
        self._memory = loader._kept()
        self._ahead = loader._ahead()
        self._limits = (loader.max_pixels, loader.max_bytes)
        self._truncated, self._exif, self._scaled = loader.truncated, loader.exif, loader.decode == "scaled"
        self._keyed_by_index = loader._keyed_by_index
        self._cache = None if isinstance(source, Rows) else loader._cache
        self._pending: deque[Batch] = deque()
        self._position = 0
        self._exhausted = False
        # Batches whose copy to the device has begun.
        self._moving: deque[tuple[Any, Batch]] = deque()
        super().begin(loader, progress, state)
        resumed = None if state is None else state["seed"]
        seed = int(self._base_seed) + self._epoch + loader._epoch * REST_SEED
        self._seed = progress.seed = seed & MASK if resumed is None else resumed
        first = self._lowered.first
        if self._scaled and not (first.ops and first.ops[0][0] in RESIZES):
            note_not_scaled()
        if loader.device is not None:
            on_device = self._whole and can_finish(first)
            finish = finish_on(loader.device, first.finish) if on_device and first.finish is not None else None
            self._mover = Mover(loader.device, finish)
            first = replace(first, finish=("uint8",)) if finish is not None else first
        self._first: _cnnrs.Loader | None = self._loader(first, 0, source.rows(), keeps=True)
        self._rests: dict[int, tuple[Native, _cnnrs.Loader] | None] = {}

    def _loader(self, native: Native, mix: int, rows: torch.Tensor | None = None, keeps: bool = False) -> _cnnrs.Loader:
        ops = list(native.ops)
        cache, kept = None, 0
        if keeps and self._cache is not None:
            kept = kept_ops(ops)
            cache = self._cache.open(ops[:kept])
        seed = self._seed ^ mix
        return _cnnrs.Loader(
            ops,
            native.finish,
            pillow13(),
            seed,
            self._num_workers,
            self._memory,
            rows,
            (pixel_limit(self._limits[0]), self._limits[1]),
            cache,
            kept,
            self._exif,
            self._truncated == "accept",
            self._scaled,
        )

    def _skip(self, state: dict[str, Any]) -> None:
        super()._skip(state)
        self._position = state["samples"]

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
        self._count(batch)
        return self._mover.take(started)

    def _is_ready(self, batch: Batch) -> bool:
        threads = self._first is not None and batch.ticket is not None and self._first.ready(batch.ticket)
        return threads and batch.error is None

    def _move(self) -> None:
        assert self._mover is not None
        batch = self._next_batch()
        self._moving.append((self._mover.start(self._collate(batch)), batch))

    def _count(self, batch: Batch) -> None:
        self._progress.batches += 1
        if batch.positions:
            self._progress.samples = batch.positions[-1] + 1

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
        if self._first is not None and not self._exif and self._first.saw_turned():
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
                asked = self._source.submit(self._first, batch.indices, batch.positions, tensors=self._whole)
                batch.ticket, batch.targets = asked
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
        count = len(batch.indices)
        kind, value = self._poll(self._first, batch.ticket, batch)
        if kind == "batch":
            images = from_dlpack(value)
            if len(batch.indices) < count:
                # Rows of dropped samples hold nothing.
                images = images.index_select(0, self._left)
            return images if self._whole else self._wrap(images.unbind(0), self._lowered.first)
        if kind == "samples":
            tensors = [from_dlpack(sample) for sample in value]
            return self._wrap(tensors, self._lowered.first)
        return [self._pil(pixels, batch.indices[i]) for i, pixels in enumerate(value)]

    def _wrap(self, tensors: Iterable[torch.Tensor], native: Native) -> list[Any]:
        if native.array:
            return [tensor.numpy() for tensor in tensors]
        if native.wraps:
            from torchvision.tv_tensors import Image

            return [Image(tensor) for tensor in tensors]
        return list(tensors)

    def _poll(self, loader: _cnnrs.Loader, ticket: int, batch: Batch) -> tuple[str, Any]:
        value: Any = None
        error: Any = None
        dropped: list[int] = []
        while True:
            try:
                kind, value = loader.poll(ticket)
                if kind != "failed":
                    self._drop(batch, dropped)
                    return kind, value
                now = []
                for i, error in value:
                    try:
                        loader.retry(ticket, i, self._second_opinion(batch.indices[i], error))
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
                value = error = None

    def _may_drop(self, batch: Batch, place: int, error: Exception) -> bool:
        return False

    def _drop(self, batch: Batch, places: list[int]) -> None:
        if not places:
            return
        gone = set(places)
        left = [i for i in range(len(batch.indices)) if i not in gone]
        self._left = torch.tensor(left, dtype=torch.int64)
        batch.indices = [batch.indices[i] for i in left]
        batch.positions = [batch.positions[i] for i in left]
        batch.targets = [batch.targets[i] for i in left]

    def _second_opinion(self, index: int, error: Any) -> tuple[int, int, int, bytes]:
        """The pixels of a file that Rust cannot decode, when Pillow can: it knows more formats and has plug-ins."""
        try:
            if not isinstance(error, DecodeError) or isinstance(self._source, Rows):
                raise error
            check_limits(self._source.path(index), *self._limits, error)
            try:
                with accepting_truncated(self._truncated == "accept"):
                    image = self._source.load(index)
                if self._exif:
                    from PIL import ImageOps

                    image = ImageOps.exif_transpose(image)
            except Exception as pillows:
                if is_the_process(pillows):
                    raise
                raise error from pillows
            return image.height, image.width, 3, image.tobytes()
        finally:
            error = None

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
        kind, value = self._poll(loader, ticket, batch)
        tensors = from_dlpack(value).unbind(0) if kind == "batch" else [from_dlpack(one) for one in value]
        return self._wrap(tensors, native)
