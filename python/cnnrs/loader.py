"""`DataLoader`: torch's, with threads that read, decode and transform in Rust instead of worker processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import (
    Dataset,
    IterDataPipe,
    MapDataPipe,
    Sampler,
    Subset,
    TensorDataset,
    default_collate,
    graph_settings,
)
from torch.utils.data._utils.pin_memory import pin_memory as pin
from torch.utils.data.dataloader import _BaseDataLoaderIter, _DatasetKind
from torch.utils.dlpack import from_dlpack

from cnnrs import _cnnrs
from cnnrs.errors import DecodeError
from cnnrs.feature_dataset import FeatureDataset
from cnnrs.sources import Rows, Source, Values, find_source
from cnnrs.transforms import Native, lower, lower_rest, note, pillow13, wants_info

# The random draws of the operations behind a Python step must not repeat those before it.
REST_SEED = 0x9E37_79B9_7F4A_7C15


class DataLoader(TorchDataLoader[Any]):
    """Batches of a data set, read, decoded and transformed by threads in Rust.

    A drop-in for `torch.utils.data.DataLoader`: same arguments, same order under the same `torch.manual_seed`, and for
    deterministic transforms the same numbers, bit by bit. For a data set of images a batch is
    [(N, C, H, W) float32, (N,) int64]; the tensors are writable and yours.

    It reads the samples itself for `ImageFolder` and `MNIST` of cnnrs and of torchvision, `FeatureDataset`,
    `TensorDataset` and `Subset`s of these. Any other data set is called sample by sample in this process, as torch does
    with `num_workers=0`. torchvision's transforms run in Rust as far as they are known; others run in Python, in sample
    order, and a warning names them. Random transforms draw from a generator seeded by torch's `base_seed` and the
    sample, so that the number of threads changes nothing.

    Args:
        dataset: The data set.
        batch_size: Samples per batch; None returns samples.
        shuffle: Whether every epoch has a new random order.
        sampler: Yields indices, instead of `shuffle`.
        batch_sampler: Yields lists of indices, instead of `batch_size`, `shuffle`, `sampler` and `drop_last`.
        num_workers: Threads; None means one per core, 0 does the work inside the loop.
        collate_fn: Makes a batch of a list of samples, instead of torch's `default_collate`.
        pin_memory: Whether batches are copied to page-locked memory, when there is an accelerator.
        drop_last: Whether a last, smaller batch is left out.
        generator: The source of the random order and of `base_seed`, instead of torch's global one.
        prefetch_factor: Batches that are prepared ahead, 2 by default.
        timeout, worker_init_fn, multiprocessing_context, persistent_workers, pin_memory_device, in_order: Accepted and
            ignored, with one note: they are about worker processes.

    Raises:
        cnnrs.DecodeError: At the batch with a file that is no image; names the file and the reason.
        FileNotFoundError: At the batch with a file that is gone.

    Example:
        >>> loader = DataLoader(TensorDataset(torch.arange(5)), batch_size=2)
        >>> [batch.tolist() for batch, in loader]
        [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        sampler: Sampler[Any] | Iterable[Any] | None = None,
        batch_sampler: Sampler[list[Any]] | Iterable[list[Any]] | None = None,
        num_workers: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        drop_last: bool = False,
        timeout: float = 0,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        generator: torch.Generator | None = None,
        *,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
        in_order: bool = True,
    ) -> None:
        super().__init__(
            dataset,
            batch_size,
            shuffle,
            sampler,
            batch_sampler,
            _cnnrs.available_threads() if num_workers is None else num_workers,
            collate_fn,
            pin_memory,
            drop_last,
            timeout,
            worker_init_fn,
            multiprocessing_context,
            generator,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
            pin_memory_device=pin_memory_device,
            in_order=in_order,
        )
        self._memory: _cnnrs.Memory | None = None
        _note_ignored(
            timeout=timeout != 0,
            worker_init_fn=worker_init_fn is not None,
            multiprocessing_context=multiprocessing_context is not None,
            persistent_workers=persistent_workers,
            pin_memory_device=bool(pin_memory_device),
            in_order=not in_order,
        )

    def check_worker_number_rationality(self) -> None:
        """Torch's advice on the number of worker processes; threads need none."""

    def _get_iterator(self) -> _BaseDataLoaderIter:
        if self._dataset_kind != _DatasetKind.Map:
            return _CalledIter(self)
        if _is_rows(_unwrap(self.dataset)[0]):
            return _RowsIter(self) if _columns(self) is not None else _CalledIter(self)
        source = find_source(self.dataset)
        if isinstance(source, str):
            _note_called(self.dataset, source)
            return _CalledIter(self)
        return _ThreadsIter(self)

    def _ahead(self) -> int:
        """Batches in flight, the one that is waited for included."""
        if self.num_workers == 0:
            return 1
        batches = self.prefetch_factor if self.prefetch_factor is not None else 2
        # Small batches: enough of them that no thread waits for the consumer.
        return max(batches + 1, -(-2 * self.num_workers // (self.batch_size or 1)))

    def _kept(self) -> _cnnrs.Memory:
        if self._memory is None:
            # What is in flight, the batch the consumer has, and a smaller last one.
            self._memory = _cnnrs.Memory(self._ahead() + 2)
        return self._memory

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory": None, "_iterator": None}


_noted: set[str] = set()


def _note_ignored(**given: bool) -> None:
    names = [name for name, is_given in given.items() if is_given]
    if names and "ignored" not in _noted:
        _noted.add("ignored")
        note(f"cnnrs.DataLoader uses threads, not worker processes, and ignores {', '.join(names)}")


def _note_called(dataset: object, reason: str) -> None:
    if "called" not in _noted:
        _noted.add("called")
        note(
            f"cnnrs.DataLoader cannot read the samples of {type(dataset).__name__} itself ({reason}) and calls it "
            "sample by sample in this process, as torch does with num_workers=0"
        )


class _Iter(_BaseDataLoaderIter):
    """What all three kinds need from torch's base, which draws `base_seed` and checks `pin_memory`."""

    def _index(self) -> Any:
        return self._next_index()  # type: ignore[no-untyped-call]

    def __next__(self) -> Any:
        if torch.autograd.profiler._is_profiler_enabled:
            return super().__next__()
        # torch's bookkeeping for a profiler costs as much as a batch of digits.
        data: Any = self._next_data()
        self._num_yielded += 1
        return data

    def _pinned(self, data: Any) -> Any:
        return pin(data, self._pin_memory_device) if self._pin_memory else data  # type: ignore[no-untyped-call]


class _CalledIter(_Iter):
    """torch's own way with `num_workers=0`, whatever the number of threads is."""

    def __init__(self, loader: DataLoader) -> None:
        super().__init__(loader)
        if isinstance(self._dataset, (IterDataPipe, MapDataPipe)):
            graph_settings.apply_sharding(self._dataset, self._world_size, self._rank)
        self._make_fetcher()

    def _make_fetcher(self) -> None:
        self._dataset_fetcher = _DatasetKind.create_fetcher(  # type: ignore[no-untyped-call]
            self._dataset_kind, self._dataset, self._auto_collation, self._collate_fn, self._drop_last
        )

    def _reset(self, loader: DataLoader, first_iter: bool = False) -> None:
        super()._reset(loader, first_iter)
        self._make_fetcher()

    def _next_data(self) -> Any:
        data = self._dataset_fetcher.fetch(self._index())
        return self._pinned(data)


# -- rows of tensors and arrays ----------------------------------------------------------------------------------------


class _RowsIter(_Iter):
    """All rows of a batch in one gather, instead of row by row and a stack."""

    def __init__(self, loader: DataLoader) -> None:
        super().__init__(loader)
        self._columns = _columns(loader) or []
        self._base = Source(*_unwrap(loader.dataset)).base

    def _next_data(self) -> Any:
        indices = self._base(self._index())
        data = [_gather(column, indices) for column in self._columns]
        return self._pinned(data)


def _unwrap(dataset: Any) -> tuple[Any, list[Any]]:
    subsets = []
    while type(dataset) is Subset:
        subsets.append(dataset.indices)
        dataset = dataset.dataset
    return dataset, subsets


def _is_rows(dataset: Any) -> bool:
    ours = isinstance(dataset, FeatureDataset) and type(dataset).__getitem__ is FeatureDataset.__getitem__
    return ours or type(dataset) is TensorDataset


def _columns(loader: DataLoader) -> list[Any] | None:
    """The columns of a data set of rows, when gathering them gives what the default collation gives."""
    if loader.collate_fn is not default_collate or not loader._auto_collation:
        return None
    dataset, _ = _unwrap(loader.dataset)
    if not _is_rows(dataset):
        return None
    is_tensors = type(dataset) is TensorDataset
    columns: Sequence[Any] = dataset.tensors if is_tensors else (dataset.features, dataset.labels)
    plain = (type(c) is torch.Tensor and c.layout is torch.strided and c.dim() > 0 for c in columns)
    rows = (isinstance(c, (np.ndarray, list)) for c in columns)
    return list(columns) if all(a or b for a, b in zip(plain, rows, strict=True)) else None


def _collate(values: Iterable[Any]) -> Any:
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
    return _collate([column[i] for i in indices])


# -- images ------------------------------------------------------------------------------------------------------------


@dataclass
class _Batch:
    """A batch on its way."""

    indices: list[int]
    position: int
    targets: Any = field(default_factory=list)
    # What the sampler or the look-up of the samples raised: it is due when the batches before it are delivered.
    error: BaseException | None = None


class _ThreadsIter(_Iter):
    """Batches of images: samples go to the threads ahead of time, results come back in order."""

    def __init__(self, loader: DataLoader) -> None:
        super().__init__(loader)
        self._epoch = 0
        self._begin(loader)

    def _reset(self, loader: DataLoader, first_iter: bool = False) -> None:
        super()._reset(loader, first_iter)
        self._epoch += 1
        self._begin(loader)

    def _begin(self, loader: DataLoader) -> None:
        source = find_source(loader.dataset)
        if isinstance(source, str):
            raise TypeError(f"the data set changed during the epoch: {source}")
        self._source = source
        self._lowered = lower(source.transform, source.channels)
        self._default = self._collate_fn is default_collate and self._auto_collation
        self._whole = self._default and not self._lowered.python and self._lowered.first.finish is not None
        self._wants_info = wants_info(self._lowered)
        self._memory = loader._kept()
        self._ahead = loader._ahead()
        self._first: _cnnrs.Loader | None = self._loader(self._lowered.first, 0, source.rows())
        self._rests: dict[int, tuple[Native, _cnnrs.Loader] | None] = {}
        self._pending: deque[_Batch] = deque()
        self._position = 0
        self._exhausted = False

    def _loader(self, native: Native, mix: int, rows: Any = None) -> _cnnrs.Loader:
        seed = (int(self._base_seed) + self._epoch) ^ mix
        ops = list(native.ops)
        return _cnnrs.Loader(ops, native.finish, pillow13(), seed, self._num_workers, self._memory, rows)

    def _next_data(self) -> Any:
        while not self._exhausted and len(self._pending) < self._ahead:
            self._submit()
        if not self._pending:
            # The threads end here, also when somebody keeps the iterator.
            self._first, self._rests = None, {}
            raise StopIteration
        batch = self._pending.popleft()
        if batch.error is not None:
            try:
                raise batch.error
            finally:
                # A local variable would tie the traceback, this frame and the threads together in a cycle.
                del batch
        data = self._collate(batch)
        return self._pinned(data)

    def _submit(self) -> None:
        batch = _Batch([], self._position)
        try:
            index = self._index()
        except StopIteration:
            self._exhausted = True
            return
        except BaseException as error:
            self._exhausted = True
            batch.error = error
            self._pending.append(batch)
            return
        try:
            batch.indices = self._source.base(index if self._auto_collation else [index])
            assert self._first is not None
            batch.targets = self._source.submit(self._first, batch.indices, batch.position, tensors=self._whole)
        except Exception as error:
            batch.error = error
        self._position += len(batch.indices)
        self._pending.append(batch)

    def _collate(self, batch: _Batch) -> Any:
        values = self._values(batch)
        target_transform = self._source.target_transform
        if isinstance(values, torch.Tensor) and self._whole:
            targets = batch.targets
            if target_transform is not None:
                targets = [target_transform(target) for target in targets]
            return [values, targets if isinstance(targets, torch.Tensor) else _collate(targets)]
        samples: Any = self._finish(list(values), batch)
        return self._collate_fn(samples if self._auto_collation else samples[0])

    def _values(self, batch: _Batch) -> Values:
        """What the first part of the transform makes of the batch: one tensor, tensors, or PIL images."""
        if not batch.indices or self._first is None:
            return []
        kind, value = self._poll(self._first, batch)
        if kind == "batch":
            images = from_dlpack(value)
            return images if self._whole else self._wrap(images.unbind(0), self._lowered.first)
        if kind == "samples":
            tensors = [from_dlpack(sample) for sample in value]
            return self._wrap(tensors, self._lowered.first)
        return [self._pil(pixels, batch.indices[i]) for i, pixels in enumerate(value)]

    def _wrap(self, tensors: Iterable[torch.Tensor], native: Native) -> list[Any]:
        if native.wraps:
            from torchvision.tv_tensors import Image

            return [Image(tensor) for tensor in tensors]
        return list(tensors)

    def _poll(self, loader: _cnnrs.Loader, batch: _Batch) -> tuple[str, Any]:
        value: Any = None
        error: Any = None
        while True:
            try:
                kind, value = loader.poll()
                if kind != "failed":
                    return kind, value
                for i, error in value:
                    loader.retry(i, self._second_opinion(batch.indices[i], error))
            except BaseException:
                # Ctrl-C included: the batch is lost, as with torch, and the next one is the next one.
                loader.discard()
                raise
            finally:
                # As above: no cycle of an error, its traceback and this frame.
                value = error = None

    def _second_opinion(self, index: int, error: Any) -> tuple[int, int, int, bytes]:
        """The pixels of a file that Rust cannot decode, when Pillow can: it knows more formats and has plug-ins."""
        try:
            if not isinstance(error, DecodeError) or isinstance(self._source, Rows):
                raise error
            try:
                image = self._source.load(index)
            except Exception as pillows:
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

    def _finish(self, values: list[Any], batch: _Batch) -> list[tuple[Any, Any]]:
        """The parts of the transform that run in Python, in sample order, and what follows them."""
        lowered, target_transform = self._lowered, self._source.target_transform
        targets = batch.targets
        samples = []
        for value, target in zip(values, targets, strict=True):
            for step in lowered.python:
                value = step(value)
            if target_transform is not None:
                target = target_transform(target)
            samples.append((value, target))
        if not lowered.rest:
            return samples
        finished = self._rest([value for value, _ in samples], batch)
        return [(value, target) for value, (_, target) in zip(finished, samples, strict=True)]

    def _rest(self, values: list[Any], batch: _Batch) -> list[Any]:
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
        loader.submit_pixels(batch.indices, batch.position, images)
        kind, value = self._poll(loader, batch)
        tensors = from_dlpack(value).unbind(0) if kind == "batch" else [from_dlpack(one) for one in value]
        return self._wrap(tensors, native)
