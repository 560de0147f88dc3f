"""``DataLoader``: torch's, with threads that read, decode and transform in Rust instead of worker processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import Dataset, DistributedSampler, Sampler
from torch.utils.data.dataloader import _BaseDataLoaderIter, _DatasetKind

from cnnrs import _cnnrs
from cnnrs._util.notes import note_once
from cnnrs.data import resume
from cnnrs.data.bad_files import Faults
from cnnrs.data.cache import open_cache
from cnnrs.data.device_decode import check_place
from cnnrs.data.iter_base import CalledIter
from cnnrs.data.iter_images import ImagesIter
from cnnrs.data.iter_rows import RowsIter, columns, is_rows, unwrap
from cnnrs.data.iter_skipping import SkippingIter
from cnnrs.data.read_options import ReadOptions, check_choice
from cnnrs.data.sources import Rows, find_source, reader

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_TORCHS = signature(TorchDataLoader).parameters
_T_co = TypeVar("_T_co", covariant=True)


class DataLoader(TorchDataLoader[_T_co]):
    """Batches of a data set, read, decoded and transformed by threads in Rust.

    For a data set of images a batch is [(N, C, H, W) float32, (N,) int64], in 0..1 behind ``ToTensor``, or whatever
    else the transforms make; the tensors are writable and yours. It is a drop-in for ``torch.utils.data.DataLoader``:
    same arguments, same order under the same ``torch.manual_seed``, and for deterministic transforms the same numbers,
    bit by bit.

    It reads the samples itself for ``ImageFolder`` and ``MNIST`` of cnnrs and of torchvision, ``FeatureDataset``,
    ``TensorDataset`` and any ``Subset`` of these. Others are called sample by sample in this process, as torch
    does with ``num_workers=0``. torchvision's transforms run in Rust as far as they are known; others run in Python, in
    sample order, and a warning names them. Random transforms draw from a generator seeded by torch's ``base_seed`` and
    the sample, so that the number of threads changes nothing.

    Args:
        dataset: the data set.
        batch_size: samples per batch; None returns samples.
        shuffle: whether every epoch has a new random order.
        sampler: yields indices, instead of ``shuffle``.
        batch_sampler: yields lists of indices, instead of ``batch_size``, ``shuffle``, ``sampler`` and ``drop_last``.
        num_workers: threads; None means one per core, 0 does the work inside the loop. Random numbers for the order are
            drawn when torch draws them with the same argument, and without it with torch's default, 0.
        collate_fn: makes a batch of a list of samples, instead of torch's ``default_collate``.
        pin_memory: whether batches are copied to page-locked memory, when there is an accelerator.
        drop_last: whether a last, smaller batch is left out.
        generator: the source of the random order and of ``base_seed``, instead of torch's global one.
        prefetch_factor: batches that are prepared ahead, 2 by default.
        on_error: what happens when a file cannot be read or decoded. "raise": the batch raises. "skip": the sample is
            left out, the batch filled up with the next ones, the file listed in ``errors`` and not tried again.
        truncated: what happens to files that end too early. "error", or "accept": they are read as far as they go, as
            Pillow does with ``ImageFile.LOAD_TRUNCATED_IMAGES``.
        exif: whether photos are turned upright as their EXIF data say (``PIL.ImageOps.exif_transpose``). torchvision
            does not; without it one warning tells when there are such photos.
        decode: "exact", or "scaled": a JPEG is decoded at a half, a quarter or an eighth of its width and height where
            the transform begins with a ``Resize`` to no more than that, as ``PIL.Image.draft`` does. Several times
            faster for large photos, but not torchvision's numbers. Or "gpu", with a CUDA ``device``: JPEGs are decoded,
            resized and cropped there, with torchvision and nvJPEG; others, and those that the device refuses, as ever.
            For deterministic transforms; not the CPU's numbers either.
        scale: how samples of more than 8 bits become bytes: "none", "full" or "percentile", as for
            :class:`cnnrs.ImageFolder`; None: as the data set says, which is "none" for torchvision's.
        page: which page of a file with several is taken, from 0 on; None: as the data set says.
        max_pixels: images with more pixels are errors, before memory is taken for them. Without it as in Pillow:
            178,956,970.
        max_bytes: files with more bytes are errors. Without it 1 GiB.
        cache: "ram" keeps images in memory, a folder keeps them in one file there, for later processes too: from the
            second epoch on they are not decoded again. Kept is what the transform makes of an image before its first
            random step. A file that changes is decoded again.
        cache_bytes: how much may be kept; a warning tells when it is not enough. Without it half of the free memory, or
            all but 1 GiB of what is free on the disk.
        device: where the batches are delivered, "cuda" for example. Bytes cross the bus and become numbers there, with
            the same bits as on the CPU; copies run beside the computation.
        rank, world_size: this process's share, as with a ``DistributedSampler`` of the same ``shuffle`` and
            ``drop_last`` as ``sampler``.
        timeout, worker_init_fn, multiprocessing_context, persistent_workers, pin_memory_device, in_order: accepted and
            ignored, with one note: they are about worker processes.

    Attributes:
        errors: (path, reason) of each file that ``on_error="skip"`` has left out. Clear it to have them tried again.

    Raises:
        cnnrs.DecodeError: at the batch with a file that is no image; names the file and the reason.
        FileNotFoundError: at the batch with a file that is gone.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> loader = DataLoader(TensorDataset(torch.arange(5)), batch_size=2)
        >>> [batch.tolist() for batch, in loader]
        [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self,
        dataset: Dataset[_T_co],
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
        on_error: str = "raise",
        truncated: str = "error",
        exif: bool = False,
        decode: str = "exact",
        scale: str | None = None,
        page: int | None = None,
        max_pixels: int | None = None,
        max_bytes: int | None = None,
        cache: str | os.PathLike[str] | None = None,
        cache_bytes: int | None = None,
        device: str | torch.device | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if isinstance(dataset, (str, os.PathLike)):
            raise TypeError(
                f"dataset must be a data set, got a path: cnnrs.ImageFolder({os.fspath(dataset)!r}, transform)"
            )
        check_choice("on_error", on_error, ("raise", "skip"))
        # Refuses what is none; epochs ask for ``_read``, as these attributes may be set.
        ReadOptions(truncated, exif, decode, max_pixels, max_bytes, scale or "none", page or 0)
        self.on_error = on_error
        self.truncated, self.exif, self.decode = truncated, exif, decode
        self.scale, self.page = scale, page
        self.max_pixels, self.max_bytes = max_pixels, max_bytes
        self._cache = open_cache(cache, cache_bytes)
        self.cache, self.cache_bytes = cache, cache_bytes
        self.device = None if device is None else torch.device(device)
        check_place(decode, self.device)
        # Not public: whoever rebuilds a loader gives what is public to the constructor.
        self._epoch = 0
        # ``preconv`` visits some samples only and wants the augmentation they have when all are visited in order.
        self._keyed_by_index = False
        # torch's processes, whose number decides when it draws random numbers.
        self._workers = num_workers or 0
        self._faults = Faults()
        self._progress = resume.Progress()
        self._memory: _cnnrs.Memory | None = None
        if rank is not None or world_size is not None:
            sampler = _share(dataset, rank, world_size, sampler, batch_sampler, bool(shuffle), drop_last)
            shuffle = None
        threads = _cnnrs.available_threads() if num_workers is None else num_workers
        super().__init__(
            dataset, batch_size, shuffle, sampler, batch_sampler, threads, collate_fn, pin_memory, drop_last, timeout,
            worker_init_fn, multiprocessing_context, generator, prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers, pin_memory_device=pin_memory_device, **_if_known(in_order=in_order),
        )  # fmt: skip
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

    @property
    def errors(self) -> list[tuple[str, str]]:
        """(path, reason) of each file that was left out."""
        return self._faults.errors

    @property
    def cached(self) -> dict[str, int]:
        """What the cache holds: "images", "bytes", "limit" in bytes, and "refused", the images without room."""
        return self._cache.status() if self._cache is not None else {"images": 0, "bytes": 0, "limit": 0, "refused": 0}

    def set_epoch(self, epoch: int) -> None:
        """Tells the random augmentation and the sampler (a ``DistributedSampler`` needs it) which epoch comes next."""
        self._epoch = epoch
        for owner in (*resume.samplers(self), self.dataset):
            if hasattr(owner, "set_epoch"):
                owner.set_epoch(epoch)

    def show(self, count: int = 12, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the first images of a batch with their labels, colours as in the files; needs matplotlib.

        Args:
            count: how many images, at most a batch.
            path: where to write the picture; None only draws, and a notebook shows it.

        Returns:
            The matplotlib figure.
        """
        from cnnrs._util.plots import show_batch

        return show_batch(self, count, path)

    def state_dict(self) -> dict[str, Any]:
        """Where the latest iterator stands: save it with the model, and ``load_state_dict`` goes on from there.

        Holds the state of the random generators before the epoch's order was drawn, the number of batches that were
        delivered, and ``errors``. Between two epochs it is the next one that goes on: its order is that of a run that
        was not interrupted. ``torch.save`` and ``torch.load(weights_only=True)`` take it.

        Raises:
            TypeError: for an ``IterableDataset``, which has no places to go on from.
        """
        if self._dataset_kind == _DatasetKind.Iterable:
            raise TypeError("an IterableDataset has no state_dict here: it has no places to go on from")
        return {**self._progress.state(self), "epoch": self._epoch, "errors": list(self.errors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next iterator continues the epoch of ``state``: same order, same augmentation, nothing decoded twice.

        Raises:
            ValueError: the state is that of another kind of loader; says what differs.
        """
        state = resume.current(state)
        resume.check(self, state)
        self.set_epoch(state["epoch"])
        self.errors[:] = [(path, reason) for path, reason in state["errors"]]
        self._progress = resume.Progress(dict(state))

    def __iter__(self) -> _BaseDataLoaderIter:
        progress = self._progress.next()
        if progress.resumes:
            # Of persistent workers.
            self._iterator = None
        again = self.persistent_workers and self._iterator is not None
        with progress.making(resume.generators(self), again=again):
            iterator: Any = super().__iter__()
            iterator.begin(self, progress)
        self._progress = progress
        return iterator  # type: ignore[no-any-return]

    def _get_iterator(self) -> _BaseDataLoaderIter:
        if self._dataset_kind != _DatasetKind.Map:
            return self._called("it is an IterableDataset")
        if is_rows(unwrap(self.dataset)[0]):
            return RowsIter(self) if columns(self) is not None else CalledIter(self)
        source = find_source(self.dataset)
        if isinstance(source, str):
            _note_called(self.dataset, source)
            return self._called(source)
        skips = self.on_error == "skip" and not isinstance(source, Rows)
        return SkippingIter(self, source) if skips else ImagesIter(self, source)

    def _called(self, reason: str) -> _BaseDataLoaderIter:
        names = {
            'on_error="skip"': self.on_error == "skip", "cache": self._cache is not None,
            "scale": self.scale not in (None, "none"), "page": bool(self.page), 'decode="gpu"': self.decode == "gpu",
        }  # fmt: skip
        if given := next((name for name, is_given in names.items() if is_given), None):
            raise ValueError(
                f"{given} is for data sets whose files this loader reads itself (ImageFolder, ImageList and "
                f"torchvision's); it cannot read those of {type(self.dataset).__name__}: {reason}"
            )
        return CalledIter(self)

    @property
    def _read(self) -> ReadOptions:
        its = reader(self.dataset)
        scale, page = its.scale if self.scale is None else self.scale, its.page if self.page is None else self.page
        return ReadOptions(self.truncated, self.exif, self.decode, self.max_pixels, self.max_bytes, scale, page)

    def _ahead(self) -> int:
        """Batches in flight, the one that is waited for included."""
        if self.num_workers == 0:
            return 1
        batches = self.prefetch_factor if self.prefetch_factor is not None else 2
        # Small batches: enough of them that no thread waits for the consumer.
        return max(batches + 1, -(-2 * self.num_workers // (self.batch_size or 1)))

    def _buffers(self) -> _cnnrs.Memory:
        if self._memory is None:
            # What is in flight, the batch the consumer has, and a smaller last one.
            self._memory = _cnnrs.Memory(self._ahead() + 2)
        return self._memory

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("cache", "cache_bytes") and name in self.__dict__:
            raise ValueError(f"{name} attribute should not be set after {type(self).__name__} is initialized")
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memory": None, "_iterator": None, "_progress": self._progress.next()}


def _if_known(**keywords: Any) -> dict[str, Any]:
    """Arguments that this version of torch has: ``in_order`` came with 2.6."""
    return {name: value for name, value in keywords.items() if name in _TORCHS}


def _note_ignored(**given: bool) -> None:
    names = [name for name, is_given in given.items() if is_given]
    if names:
        note_once("ignored", f"cnnrs.DataLoader uses threads, not worker processes, and ignores {', '.join(names)}")


def _note_called(dataset: object, reason: str) -> None:
    note_once(
        "called",
        f"cnnrs.DataLoader cannot read the samples of {type(dataset).__name__} itself ({reason}) and calls it "
        "sample by sample in this process, as torch does with num_workers=0",
    )


def _share(
    dataset: Dataset[Any],
    rank: int | None,
    world_size: int | None,
    sampler: Any,
    batches: Any,
    shuffle: bool,
    drop: bool,
) -> Sampler[Any]:
    if rank is None or world_size is None:
        raise ValueError(f"rank and world_size belong together, got rank={rank}, world_size={world_size}")
    if sampler is not None or batches is not None:
        raise ValueError("rank and world_size make a DistributedSampler: give them, or a sampler, not both")
    return DistributedSampler(dataset, world_size, rank, shuffle=shuffle, drop_last=drop)
