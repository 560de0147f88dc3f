"""Where rows of features come from: which images a loader has, what identifies each, and batches of some of them."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from cnnrs._util.regular import opened
from cnnrs.data.bad_files import Faults
from cnnrs.data.image_list import ImageList
from cnnrs.data.loader import DataLoader
from cnnrs.data.sources import Files, Rows, find_source
from cnnrs.identity.fingerprint import Unidentifiable, fingerprint
from cnnrs.image.lowering import lower
from cnnrs.image.reading import Reader
from cnnrs.image.spec import kept_ops

# Bytes of a hash of an image's contents: 2**48 images before two are likely to share one.
_ID_BYTES = 12
_BLOCK_BYTES = 1 << 20

# (bytes, time that its contents changed, time that anything about it changed, number) of a file, times in nanoseconds.
Stat = tuple[int, int, int, int]


@dataclass(frozen=True)
class Batch:
    """Images on their way to the model.

    Attributes:
        inputs: (N, ...) images.
        targets: (N, ...) labels.
        samples: which sample of the data each is, in order; None where the data does not say.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    samples: list[int] | None


class Data:
    """A loader, or any iterable of (inputs, targets), as far as it can be looked into.

    Attributes:
        files: the image file of each sample, None where there are none.
        classes: class names by index, None where unknown.
        device: where the model is: loaders of cnnrs that name none deliver there, so that bytes cross the bus.
    """

    def __init__(self, data: Iterable[Any]) -> None:
        self.data = data
        self.device = torch.device("cpu")
        self.files: list[str] | None = None
        self.classes: list[str] | None = None
        self._dataset: Any = None
        self._chain: list[Sequence[int]] = []
        if isinstance(data, torch.utils.data.DataLoader):
            dataset: Any = data.dataset
            while type(dataset) is Subset:
                self._chain.append(dataset.indices)
                dataset = dataset.dataset
            self._dataset = dataset
            self.classes = getattr(dataset, "classes", None)
            samples = getattr(dataset, "samples", None)
            if isinstance(samples, list) and samples and isinstance(samples[0], tuple):
                self.files = [os.fspath(samples[self.below(i)][0]) for i in range(len(data.dataset))]  # type: ignore[arg-type]

    @property
    def transform(self) -> Any:
        """The data set's."""
        return getattr(self._dataset, "transform", None)

    @property
    def read(self) -> dict[str, Any]:
        """How the loader reads files, as arguments of one."""
        if not isinstance(self.data, DataLoader):
            return {}
        read = self.data._read
        return {**read.shaping, "device": "cuda"} if read.is_on_gpu else read.shaping

    @property
    def expected(self) -> int:
        """Number of rows of one pass, 0 when unknown."""
        sampler = self.data.sampler if isinstance(self.data, torch.utils.data.DataLoader) else None
        return len(sampler) if isinstance(sampler, Sized) else 0

    def below(self, sample: int) -> int:
        """The index in the innermost data set, below the `Subset`s."""
        for indices in self._chain:
            sample = indices[sample]
        return sample

    # -- what identifies the images --------------------------------------------------------------------------

    @cached_property
    def unidentified(self) -> str:
        """Why it cannot be told whether these are the same images another time; "" when it can."""
        if not self._is_listed():
            return "only loaders over image folders, MNIST and tensors can be compared"
        loader: Any = self.data
        if loader.drop_last or not self._visits_each_once(loader):
            return "its sampler may leave images out or repeat them"
        if loader.collate_fn is not default_collate:
            return "it has a collate_fn of its own"
        try:
            _ = self.recipe
        except Unidentifiable as what:
            return f"its transform holds {what}"
        return ""

    def _is_listed(self) -> bool:
        return type(self.data) in (torch.utils.data.DataLoader, DataLoader) and (
            self._is_files or self._images is not None
        )

    @cached_property
    def _is_files(self) -> bool:
        """Whether sample i is the file `samples[i]` and nothing else."""
        from torchvision.datasets import DatasetFolder

        known = {ImageList.__getitem__, DatasetFolder.__getitem__}
        folder = isinstance(self._dataset, (ImageList, DatasetFolder))
        return folder and type(self._dataset).__getitem__ in known and self.files is not None

    @property
    def _images(self) -> torch.Tensor | None:
        """Images that are in memory, one per sample of the innermost data set."""
        if type(self._dataset) is TensorDataset and len(self._dataset.tensors) == 2:
            return self._dataset.tensors[0]
        source = find_source(self._dataset) if isinstance(self.data, torch.utils.data.DataLoader) else ""
        return source.dataset.data if isinstance(source, Rows) else None

    @staticmethod
    def _visits_each_once(loader: Any) -> bool:
        sampler, batches = loader.sampler, loader.batch_sampler
        whole = type(sampler) in (SequentialSampler, DistributedSampler) or (
            type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(loader.dataset)
        )
        return whole and type(batches) is BatchSampler and batches.sampler is sampler

    @cached_property
    def recipe(self) -> str:
        """A hash of everything that shapes an image besides its contents.

        Raises:
            Unidentifiable: part of the transform cannot be compared.
        """
        loader: Any = self.data
        parts: list[Any] = [self.transform]
        if self._is_files:
            import torchvision

            reads = self._dataset.loader
            if type(reads) is Reader and reads == Reader():
                # Pixels are the same: one HEIC among many files leaves the others theirs.
                reads = torchvision.datasets.folder.default_loader
            parts += [reads, torchvision.get_image_backend()]
            if isinstance(loader, DataLoader):
                parts += loader._read.shaping.values()
        return fingerprint(parts)

    @property
    def is_random(self) -> bool:
        """Whether the transform has steps that may draw random numbers."""
        lowered = lower(self.transform, 3) if self._is_files or self.transform is not None else None
        if lowered is None:
            return False
        ops = lowered.first.ops
        return bool(lowered.python or lowered.rest) or kept_ops(ops) < len(ops)

    @property
    def has_threads(self) -> bool:
        """Whether the loader's own threads make the next batches while the model computes."""
        return isinstance(self.data, DataLoader)

    @property
    def runs_python(self) -> bool:
        """Whether threads of the loader may run Python code while the model computes."""
        if not isinstance(self.data, DataLoader):
            return False
        if not self._is_listed():
            return True
        lowered = lower(self.transform, 3) if self.transform is not None else None
        return lowered is not None and bool(lowered.python or lowered.rest)

    @property
    def has_order(self) -> bool:
        """Whether there are samples with numbers, of which `batches` gives the first."""
        listed = type(self.data) in (torch.utils.data.DataLoader, DataLoader)
        return listed and not isinstance(self._dataset, IterableDataset) and isinstance(self._dataset, Sized)

    def __len__(self) -> int:
        return len(self.data.dataset)  # type: ignore[attr-defined]

    def stats(self) -> list[Stat] | None:
        """The state of every file, now; None for images in memory."""
        if not self._is_files or self.files is None:
            return None
        return [_stat_or_none(path) for path in self.files]

    def stat(self, sample: int) -> Stat | None:
        """The state of one file, now; None for images in memory."""
        return _stat(self.files[sample]) if self._is_files and self.files is not None else None

    def identity(self, sample: int) -> str:
        """A hash of the contents of one image."""
        digest = hashlib.blake2b(digest_size=_ID_BYTES)
        if self._is_files and self.files is not None:
            with opened(self.files[sample]) as file:
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
        else:
            images = self._images
            assert images is not None
            image = images[self.below(sample)]
            digest.update(image.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def labels(self, samples: Sequence[int]) -> torch.Tensor:
        """The targets of samples, as the loader's batches have them."""
        inner = [self.below(i) for i in samples]
        if type(self._dataset) is TensorDataset:
            return self._dataset.tensors[1][inner].detach().cpu()
        if self._is_files:
            _, targets = Files(self._dataset, []).look_up(inner, tensors=False)
        else:
            targets = [int(self._dataset.targets[i]) for i in inner]
        change = self._dataset.target_transform
        collated = default_collate([change(target) for target in targets] if change is not None else targets)
        if not isinstance(collated, torch.Tensor):
            raise TypeError(f"targets must be numbers or tensors, got {type(targets[0]).__name__}")
        return collated.detach().cpu()

    # -- files that are left out -----------------------------------------------------------------------------

    @property
    def faults(self) -> Faults | None:
        """What the loader leaves out; None when it leaves nothing out."""
        loader = self.data
        return loader._faults if isinstance(loader, DataLoader) and loader.on_error == "skip" else None

    @property
    def limits(self) -> list[int | None]:
        """Above how many pixels and bytes the loader takes no image."""
        return list(self.data._read.limits) if isinstance(self.data, DataLoader) else [None, None]

    def forget_faults(self) -> None:
        """Have the loader try again what it has left out so far."""
        if self.faults is not None:
            self.faults.errors.clear()

    def leave_out(self, faults: dict[str, str], passing: set[str]) -> None:
        """Have the loader leave out files, and list them, as if it had met them; those of `passing` for now."""
        if self.faults is not None:
            known = {path for path, _ in self.faults.errors}
            self.faults.errors.extend((path, reason) for path, reason in faults.items() if path not in known)
            self.faults.passing |= passing

    def may_pass(self, path: str) -> bool:
        """Whether the reason why a file is left out may be gone another time although the file is the same."""
        return self.faults is not None and path in self.faults.passing

    # -- batches ---------------------------------------------------------------------------------------------

    def stream(self) -> Iterator[Batch]:
        """Everything, in the loader's own order."""
        data: Any = self.data
        listed = type(data) in (torch.utils.data.DataLoader, DataLoader) and not isinstance(
            data.dataset, IterableDataset
        )
        if not listed or data.batch_sampler is None:
            for pair in data:
                yield _batch(pair, None)
            return
        recorder = _Recorder(data.batch_sampler)
        loader = self._clone(recorder)
        follow = _Follower(self, loader, recorder.seen)
        for pair in loader:
            batch = _batch(pair, None)
            yield _batch(pair, follow.next(len(batch.inputs)))

    def batches(
        self, samples: Sequence[Sequence[int]], seed: int = 0, epoch: int = 0, others: int = 0
    ) -> Iterator[Batch]:
        """These batches of samples; augmentation is keyed by seed, epoch and sample, whichever others are asked for.

        Args:
            samples: of each batch.
            seed: of the augmentation.
            epoch: the number of the pass.
            others: rows that come from elsewhere: with some, it is no error that all of these files fail.
        """
        loader = self._clone(samples)
        loader.generator = torch.Generator().manual_seed(seed)
        if isinstance(loader, DataLoader):
            loader._epoch = epoch
            loader._keyed_by_index = True
            loader._faults.others = others
        follow = _Follower(self, loader, [i for batch in samples for i in batch])
        try:
            for pair in loader:
                batch = _batch(pair, None)
                yield _batch(pair, follow.next(len(batch.inputs)))
        finally:
            # The user's loader has the same list of faults.
            if isinstance(loader, DataLoader):
                loader._faults.others = 0

    def _clone(self, batches: Any) -> Any:
        """The same loader over other batches of the same samples."""
        loader: Any = self.data
        clone = copy.copy(loader)
        # Not by assignment, which torch forbids: the loader's other attributes do not depend on these.
        vars(clone).update(batch_sampler=batches, sampler=None, batch_size=None, _iterator=None)
        if isinstance(clone, DataLoader):
            # Threads are busy with whole batches: the order within a batch is what counts them.
            vars(clone)["batch_size"] = loader.batch_size
            if clone.device is None and self.device.type == "cuda":
                clone.device = self.device
        return clone


class _Recorder(BatchSampler):
    """Passes a loader's batches of indices on and remembers them."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.seen: list[int] = []

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.inner:
            self.seen.extend(batch)
            yield batch

    def __len__(self) -> int:
        return len(self.inner)


class _Follower:
    """Which samples a batch holds, although the loader leaves out files that fail."""

    def __init__(self, data: Data, loader: Any, asked: list[int]) -> None:
        self._files = data.files
        self._faults = loader._faults if getattr(loader, "on_error", "raise") == "skip" else None
        self._asked = asked
        self._place = 0

    def next(self, count: int) -> list[int]:
        if self._faults is None or self._files is None:
            self._place += count
            return self._asked[self._place - count : self._place]
        found: list[int] = []
        while len(found) < count:
            sample = self._asked[self._place]
            self._place += 1
            if self._files[sample] not in self._faults.known:
                found.append(sample)
        return found


def _batch(pair: Any, samples: list[int] | None) -> Batch:
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
        raise TypeError(f"data must yield pairs (inputs, targets), got a {type(pair).__name__}")
    inputs, targets = torch.as_tensor(pair[0]), torch.as_tensor(pair[1]).detach()
    if inputs.dim() == 0 or targets.dim() == 0 or len(inputs) != len(targets):
        raise ValueError(
            f"a batch has one target per input, got inputs of shape {tuple(inputs.shape)} and targets of shape "
            f"{tuple(targets.shape)}"
        )
    return Batch(inputs, targets, samples)


def _stat(path: str) -> Stat:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def elsewhere(stat: Stat) -> tuple[int, int]:
    """The part of a file's state that a copy on another machine has too."""
    return stat[:2]


def _stat_or_none(path: str) -> Stat:
    """Of a file that is gone, what no file has: the loader meets it and says so, or skips it."""
    try:
        return _stat(path)
    except OSError:
        return -1, -1, -1, -1


def unchanged(path: str, before: Stat) -> bool:
    """Whether a file is what it was when `before` was taken."""
    try:
        return _stat(path) == before
    except OSError:
        return False
