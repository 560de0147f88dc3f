"""Which data sets a ``DataLoader`` reads by itself, and how it finds their samples."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from cnnrs._util.plain import is_plain
from cnnrs.data.image_list import ImageList, hot
from cnnrs.data.mnist import MNIST
from cnnrs.image.reading import Reader

# A whole batch, or one value per sample.
Values = Any
# Tensors of other integers are masks where a tensor is indexed.
SIGNED = (torch.int8, torch.int16, torch.int32, torch.int64)


class Source:
    """A data set below any number of ``Subset`` levels."""

    channels = 3

    def __init__(self, dataset: Any, subsets: list[Any]) -> None:
        self.dataset = dataset
        self.subsets = subsets

    @property
    def transform(self) -> Callable[[Any], Any] | None:
        """The data set's, as it is now."""
        transform: Callable[[Any], Any] | None = self.dataset.transform
        return transform

    @property
    def target_transform(self) -> Callable[[Any], Any] | None:
        """The data set's, as it is now."""
        transform: Callable[[Any], Any] | None = self.dataset.target_transform
        return transform

    def base(self, indices: Any) -> list[int]:
        """Indices of the outermost data set as indices of the innermost.

        Raises:
            TypeError: one of them is not the number of a sample.
        """
        indices = list(indices)
        found = self.plain(indices)
        if found is None:
            raise TypeError(f"an index must be the number of a sample, got one of these: {indices!r:.200}")
        return found

    def plain(self, indices: list[Any]) -> list[int] | None:
        """As ``base``, or None when not every index is the number of a sample: slices, lists, masks and the like."""
        found = _numbers(indices)
        for subset in self.subsets:
            if found is None:
                return None
            found = _numbers([subset[i] for i in found])
        return found

    def rows(self) -> torch.Tensor | None:
        """(N, H, W) uint8 images that are in memory."""
        return None

    def look_up(self, indices: list[int], *, tensors: bool) -> tuple[list[Any], Any]:
        """(what the threads read for each sample of a batch, the targets).

        Targets are an int64 tensor if ``tensors`` and that is cheaper, and a list otherwise.
        """
        raise NotImplementedError

    def info(self, index: int) -> dict[Any, Any]:
        """Pillow's ``Image.info``, where a user's function looks for EXIF."""
        return {}

    def path(self, index: int) -> str:
        """The file of a sample."""
        raise NotImplementedError


class Files(Source):
    """``ImageFolder`` and ``ImageList``: (path, class number), or class numbers, in ``samples``."""

    def look_up(self, indices: list[int], *, tensors: bool) -> tuple[list[Any], Any]:
        """(paths, class numbers, or a tensor of zeros and ones each)."""
        # Looked up now and not at the start: ``samples`` may have been edited, and a copy of a large list costs memory.
        samples = self.dataset.samples
        chosen = [samples[i] for i in indices]
        targets = [target for _, target in chosen]
        if isinstance(self.dataset, ImageList) and self.dataset.multilabel:
            targets = list(hot(targets, len(self.dataset.classes)))
        return [path for path, _ in chosen], targets

    def path(self, index: int) -> str:
        """The file of a sample."""
        path: str = os.fspath(self.dataset.samples[index][0])
        return path

    def info(self, index: int) -> dict[Any, Any]:
        """What Pillow reads from the file's header."""
        from PIL import Image

        with Image.open(self.dataset.samples[index][0]) as image:
            return {key: value for key, value in image.info.items() if key != "transparency"}


class Rows(Source):
    """``MNIST`` and its kin: (N, H, W) uint8 ``data`` and N ``targets``."""

    channels = 1

    def rows(self) -> torch.Tensor | None:
        images: torch.Tensor = self.dataset.data.contiguous()
        return images

    def look_up(self, indices: list[int], *, tensors: bool) -> tuple[list[Any], Any]:
        """(numbers of rows from 0 on, targets)."""
        # Not ``len``: torch's is a Python function, and this one runs for every few digits.
        size = self.dataset.data.shape[0]
        least = min(indices)
        if not -size <= least <= max(indices) < size:
            raise IndexError(f"an index of this batch is out of range for {size} images: {indices}")
        rows = indices if least >= 0 else [i + size if i < 0 else i for i in indices]
        return rows, self._targets(indices, tensors)

    def _targets(self, indices: list[int], tensors: bool) -> Any:
        targets = self.dataset.targets
        plain = type(targets) is torch.Tensor and targets.dtype == torch.int64 and targets.device.type == "cpu"
        if tensors and plain and self.target_transform is None:
            # Several times faster than indexing the tensor, for the few rows of a batch.
            return torch.from_numpy(targets.numpy().take(indices))
        return [int(targets[i]) for i in indices]


def _numbers(indices: list[Any]) -> list[int] | None:
    if set(map(type, indices)) <= {int}:
        return indices
    found = [_number(index) for index in indices]
    return None if None in found else found  # type: ignore[return-value]


def _number(index: Any) -> int | None:
    # Not ``operator.index``: a bool is a number for lists and a mask for tensors.
    if type(index) is int or isinstance(index, np.integer):
        return int(index)
    is_number = isinstance(index, torch.Tensor) and index.dim() == 0 and index.dtype in SIGNED
    return int(index) if is_number else None


def find_source(dataset: Any) -> Source | str:
    """How to read a map-style data set, or why that is not possible."""
    subsets = []
    while type(dataset) is Subset:
        subsets.append(dataset.indices)
        dataset = dataset.dataset
    kind = type(dataset)
    if hasattr(dataset, "__getitems__"):
        return "it has __getitems__"
    folders = _torchvision("torchvision.datasets.folder")
    digits = _torchvision("torchvision.datasets.mnist")
    found: Any = dataset
    if isinstance(dataset, (ImageList, getattr(folders, "DatasetFolder", ImageList))):
        ours = isinstance(dataset, ImageList)
        if kind.__getitem__ is not (ImageList if ours else folders.DatasetFolder).__getitem__:
            return "it has its own __getitem__"
        if type(found.loader) is Reader:
            return Files(dataset, subsets)
        if folders is None or found.loader not in (folders.default_loader, folders.pil_loader):
            return "it has its own loader"
        if sys.modules["torchvision"].get_image_backend() != "PIL":
            return "torchvision's image backend is not PIL"
        return Files(dataset, subsets)
    if isinstance(dataset, (MNIST, getattr(digits, "MNIST", MNIST))):
        originals = {MNIST.__getitem__, getattr(digits, "MNIST", MNIST).__getitem__}
        if kind.__getitem__ not in originals:
            return "it has its own __getitem__"
        data = found.data
        if type(data) is not torch.Tensor or data.dtype != torch.uint8 or data.dim() != 3 or data.device.type != "cpu":
            return "its data is not an (N, H, W) uint8 tensor in CPU memory"
        if not is_plain(data) or not data.is_contiguous():
            return "its data is not contiguous, or no ordinary tensor"
        return Rows(dataset, subsets)
    return "it is not a known kind"


def reader(dataset: Any) -> Reader:
    """How the data set below any number of ``Subset`` levels wants its files read."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    found = getattr(dataset, "loader", None)
    return found if type(found) is Reader else Reader()


def _torchvision(module: str) -> Any:
    """A module of torchvision, if anything has imported it: a data set of it cannot exist otherwise."""
    return sys.modules.get(module)
