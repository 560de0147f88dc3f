"""A folder of class folders as a data set: torchvision's `ImageFolder`, scanned by threads."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from typing_extensions import Self

from cnnrs import _cnnrs

IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class VisionDataset(Dataset[tuple[Any, Any]]):
    """What torchvision's `VisionDataset` keeps and prints, without importing torchvision before it is needed."""

    _repr_indent = 4

    def __init__(
        self,
        root: str | Path,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
    ) -> None:
        self.root = os.path.expanduser(root) if isinstance(root, str) else root
        self.transform = transform
        self.target_transform = target_transform
        self.transforms: Any = None
        self._join_transforms()

    def _join_transforms(self) -> None:
        if self.transform is None and self.target_transform is None:
            self.transforms = None
            return
        from torchvision.datasets.vision import StandardTransform

        self.transforms = StandardTransform(self.transform, self.target_transform)

    def __len__(self) -> int:
        raise NotImplementedError

    def __repr__(self) -> str:
        body = [f"Number of datapoints: {len(self)}"]
        if self.root is not None:
            body.append(f"Root location: {self.root}")
        body += self.extra_repr().splitlines()
        if self.transforms is not None:
            body.append(repr(self.transforms))
        return "\n".join([f"Dataset {type(self).__name__}", *(" " * self._repr_indent + line for line in body)])

    def extra_repr(self) -> str:
        """Lines for `repr`, below the root."""
        return ""


def find_classes(directory: str | Path) -> tuple[list[str], dict[str, int]]:
    """The sorted names of the folders in `directory`, and the class number of each."""
    classes = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())
    if not classes:
        raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
    return classes, {name: i for i, name in enumerate(classes)}


def make_dataset(
    directory: str | Path,
    class_to_idx: dict[str, int] | None = None,
    extensions: str | tuple[str, ...] | None = None,
    is_valid_file: Callable[[str], bool] | None = None,
    allow_empty: bool = False,
) -> list[tuple[str, int]]:
    """(path, class number) of every valid file, in torchvision's order: classes, then folders, then files by name."""
    directory = os.path.expanduser(directory)
    if class_to_idx is None:
        _, class_to_idx = find_classes(directory)
    elif not class_to_idx:
        raise ValueError("'class_to_index' must have at least one entry to collect any samples.")
    if (extensions is None) == (is_valid_file is None):
        raise ValueError("Both extensions and is_valid_file cannot be None or not None at the same time")

    names = sorted(class_to_idx)
    endings = [extensions] if isinstance(extensions, str) else None if extensions is None else list(extensions)
    found = _cnnrs.scan_folders([os.path.join(directory, name) for name in names], endings)
    samples: list[tuple[str, int]] = []
    empty = []
    for name, paths in zip(names, found, strict=True):
        files = paths or []
        if is_valid_file is not None:
            files = [path for path in files if is_valid_file(path)]
        if not files:
            empty.append(name)
        number = class_to_idx[name]
        samples += [(path, number) for path in files]
    if empty and not allow_empty:
        message = f"Found no valid file for the classes {', '.join(empty)}. "
        if extensions is not None:
            known = extensions if isinstance(extensions, str) else ", ".join(extensions)
            message += f"Supported extensions are: {known}"
        raise FileNotFoundError(message)
    return samples


class ImageFolder(VisionDataset):
    """Images in one folder per class: `root/dog/xxx.png`, `root/cat/nsdf3.png`, also in folders below those.

    A sample is (image, class number): a PIL image in mode RGB, or what `transform` makes of it, and an int. All
    attributes, the order of the samples and the errors are those of `torchvision.datasets.ImageFolder`; a
    `cnnrs.DataLoader` reads the files itself, in threads, and returns the same numbers.

    Args:
        root: The folder that holds the class folders.
        transform: Called with the PIL image (torchvision's transforms, v1 or v2, or any function).
        target_transform: Called with the class number.
        loader: Called with the path instead of opening it as a PIL image in mode RGB.
        is_valid_file: Called with a path, decides whether it is a sample, instead of the extension.
        allow_empty: Whether a class folder may have no sample.

    Attributes:
        classes: The sorted class names.
        class_to_idx: Class name -> class number.
        samples: (path, class number) of every sample; `imgs` is the same list.
        targets: The class number of every sample.

    Raises:
        FileNotFoundError: When `root` does not exist, has no class folder, or a class folder has no image.

    Example:
        >>> dataset = ImageFolder("cat_and_dog/train", transform)  # doctest: +SKIP
        >>> train, valid = dataset.split(0.2, transforms=(train_transform, valid_transform))  # doctest: +SKIP
    """

    def __init__(
        self,
        root: str | Path,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
        loader: Callable[[str], Any] | None = None,
        is_valid_file: Callable[[str], bool] | None = None,
        allow_empty: bool = False,
    ) -> None:
        super().__init__(root, transform, target_transform)
        classes, class_to_idx = self.find_classes(self.root)
        extensions = IMG_EXTENSIONS if is_valid_file is None else None
        samples = self.make_dataset(
            self.root,
            class_to_idx=class_to_idx,
            extensions=extensions,
            is_valid_file=is_valid_file,
            allow_empty=allow_empty,
        )
        if loader is None:
            from torchvision.datasets.folder import default_loader

            loader = default_loader
        self.loader: Callable[[str], Any] = loader
        self.extensions = extensions
        self.classes = classes
        self.class_to_idx = class_to_idx
        self.samples = samples
        self.targets = [target for _, target in samples]
        self.imgs = self.samples

    @staticmethod
    def make_dataset(
        directory: str | Path,
        class_to_idx: dict[str, int],
        extensions: tuple[str, ...] | None = None,
        is_valid_file: Callable[[str], bool] | None = None,
        allow_empty: bool = False,
    ) -> list[tuple[str, int]]:
        """The samples below `directory`; override it to find them elsewhere."""
        if class_to_idx is None:
            raise ValueError("The class_to_idx parameter cannot be None.")
        return make_dataset(directory, class_to_idx, extensions, is_valid_file, allow_empty)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """The class names and numbers; override it to use some of the folders only, or other numbers."""
        return find_classes(directory)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        path, target = self.samples[index]
        sample = self.loader(path)
        if self.transform is not None:
            sample = self.transform(sample)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return sample, target

    def __len__(self) -> int:
        return len(self.samples)

    def split(
        self,
        fraction: float,
        seed: int = 0,
        transforms: tuple[Callable[..., Any] | None, Callable[..., Any] | None] | None = None,
    ) -> tuple[Self, Self]:
        """Two data sets that share no sample, `fraction` of every class in the second (rounded to whole samples).

        Both keep all classes and the order of the samples. A class of two or more samples is in both halves.

        Args:
            fraction: Between 0 and 1.
            seed: The same seed gives the same halves.
            transforms: The transform of the first and of the second half; without it both keep this data set's.

        Raises:
            ValueError: When `fraction` is not between 0 and 1.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"fraction must be between 0 and 1 (exclusive), got {fraction}")
        by_class: dict[int, list[int]] = {}
        for i, (_, target) in enumerate(self.samples):
            by_class.setdefault(target, []).append(i)
        generator = torch.Generator().manual_seed(seed)
        second: set[int] = set()
        for target in sorted(by_class):
            members = by_class[target]
            take = round(fraction * len(members))
            if len(members) > 1:
                take = min(max(take, 1), len(members) - 1)
            order = torch.randperm(len(members), generator=generator).tolist()
            second.update(members[i] for i in order[:take])
        halves = self._part(lambda i: i not in second), self._part(lambda i: i in second)
        if transforms is not None:
            for half, transform in zip(halves, transforms, strict=True):
                half.transform = transform
                half._join_transforms()
        return halves

    def _part(self, belongs: Callable[[int], bool]) -> Self:
        part = copy.copy(self)
        part.samples = part.imgs = [sample for i, sample in enumerate(self.samples) if belongs(i)]
        part.targets = [target for _, target in part.samples]
        return part
