"""A folder of class folders as a data set: torchvision's ``ImageFolder``, scanned by threads."""

from __future__ import annotations

import copy
import errno
import gc
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from typing_extensions import Self

from cnnrs import _cnnrs
from cnnrs._util.notes import note

IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class VisionDataset(Dataset[tuple[Any, Any]]):
    """What torchvision's ``VisionDataset`` keeps and prints, without importing torchvision before it is needed."""

    _repr_indent = 4

    def __init__(
        self,
        root: str | Path | None,
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
    ) -> None:
        self.root: Any = os.path.expanduser(root) if isinstance(root, str) else root
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
        """Lines for ``repr``, below the root."""
        return ""


def find_classes(directory: str | Path, skip_hidden: bool = False) -> tuple[list[str], dict[str, int]]:
    """The sorted names of the folders in ``directory``, and the class number of each."""
    classes = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())
    if skip_hidden:
        classes = [name for name in classes if not name.startswith(".")]
    elif hidden := [name for name in classes if name.startswith(".")]:
        names = ", ".join(hidden)
        note(
            f"{names} in {directory}: hidden, but {'a class' if len(hidden) == 1 else 'classes'} as in torchvision; "
            "skip_hidden=True leaves hidden folders and files out"
        )
    if not classes:
        raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
    return classes, {name: i for i, name in enumerate(classes)}


def make_dataset(
    directory: str | Path,
    class_to_idx: dict[str, int] | None = None,
    extensions: str | tuple[str, ...] | None = None,
    is_valid_file: Callable[[str], bool] | None = None,
    allow_empty: bool = False,
    skip_hidden: bool = False,
) -> list[tuple[str, int]]:
    """(path, class number) of every valid file, in torchvision's order: classes, then folders, then files by name."""
    directory = os.path.expanduser(directory)
    if class_to_idx is None:
        _, class_to_idx = find_classes(directory, skip_hidden)
    elif not class_to_idx:
        raise ValueError("'class_to_index' must have at least one entry to collect any samples.")
    if (extensions is None) == (is_valid_file is None):
        raise ValueError("Both extensions and is_valid_file cannot be None or not None at the same time")

    names = sorted(class_to_idx)
    folders = [os.path.join(directory, name) for name in names]
    samples, counts = _scan(folders, [class_to_idx[name] for name in names], extensions, skip_hidden)
    if is_valid_file is not None:
        found = iter(samples)
        classes = [[one for one in islice(found, count) if is_valid_file(one[0])] for count in counts]
        samples = [one for members in classes for one in members]
        counts = [len(members) for members in classes]
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if empty and not allow_empty:
        message = f"Found no valid file for the classes {', '.join(empty)}. "
        if extensions is not None:
            known = extensions if isinstance(extensions, str) else ", ".join(extensions)
            message += f"Supported extensions are: {known}"
        raise FileNotFoundError(message)
    return samples


def _scan(
    folders: Sequence[str], numbers: Sequence[int], extensions: str | tuple[str, ...] | None, skip_hidden: bool
) -> tuple[list[tuple[str, int]], list[int]]:
    """(path, number) of the files below ``folders``, and how many each of these has; tells about loops of links."""
    endings = [extensions] if isinstance(extensions, str) else None if extensions is None else list(extensions)
    collects = gc.isenabled()
    # A collection looks at all the new tuples again and again, a fifth of the time, and finds nothing.
    gc.disable()
    try:
        samples, counts, loops = _cnnrs.scan_folders(folders, numbers, endings, skip_hidden)
    finally:
        if collects:
            gc.enable()
    if loops:
        more = f" and {len(loops) - 1} more" if len(loops) > 1 else ""
        note(
            f"{os.fspath(loops[0])}{more}: a link to a folder that it lies in, not followed (torchvision would list "
            "the same files up to 40 times)"
        )
    return samples, [count or 0 for count in counts]


class ImageList(VisionDataset):
    """Images anywhere, by their paths: what a CSV file or a search found.

    A sample is (image, label): a PIL image in mode RGB, or what ``transform`` makes of it, and an int. A
    ``cnnrs.DataLoader`` reads the files itself, in threads.

    Args:
        samples: (path, label) pairs, or paths alone (label -1). Labels are ints, or class names: these are sorted and
            numbered.
        transform: called with the PIL image (torchvision's transforms, v1 or v2, or any function).
        target_transform: called with the label.
        loader: called with the path instead of opening it as a PIL image in mode RGB.

    Attributes:
        classes: the sorted class names, [] when labels are ints.
        class_to_idx: class name -> class number.
        samples: (path, label) of every sample; ``imgs`` is the same list.
        targets: the label of every sample.

    Raises:
        TypeError: a sample is neither a path nor (path, label).

    Example:
        >>> dataset = ImageList([("a.jpg", "cat"), ("b.jpg", "dog"), ("c.jpg", "cat")])
        >>> dataset.samples
        [('a.jpg', 0), ('b.jpg', 1), ('c.jpg', 0)]
    """

    extensions: tuple[str, ...] | None = None

    def __init__(
        self,
        samples: Iterable[str | os.PathLike[str] | tuple[str | os.PathLike[str], int | str]],
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
        loader: Callable[[str], Any] | None = None,
    ) -> None:
        super().__init__(None, transform, target_transform)
        pairs = [_pair(sample) for sample in samples]
        names = sorted({label for _, label in pairs if isinstance(label, str)})
        if names and not all(isinstance(label, str) for _, label in pairs):
            raise TypeError(f"labels are either class names or ints, got both: {names[0]!r} and an int")
        numbers = {name: i for i, name in enumerate(names)}
        self._keep([(path, numbers[label] if isinstance(label, str) else label) for path, label in pairs], loader)
        self.classes = names
        self.class_to_idx = numbers

    def _keep(self, samples: list[tuple[str, int]], loader: Callable[[str], Any] | None) -> None:
        if loader is None:
            from torchvision.datasets.folder import default_loader

            loader = default_loader
        self.loader: Callable[[str], Any] = loader
        self.samples = samples
        self.targets = [target for _, target in samples]
        self.imgs = self.samples

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
        """Two data sets that share no sample, ``fraction`` of every class in the second (rounded to whole samples).

        Both keep all classes and the order of the samples. A class of two or more samples is in both halves.

        Args:
            fraction: between 0 and 1.
            seed: the same seed gives the same halves.
            transforms: the transform of the first and of the second half; without it both keep this data set's.

        Raises:
            ValueError: ``fraction`` is not between 0 and 1.
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


class ImageFolder(ImageList):
    """Images in one folder per class: ``root/dog/xxx.png``, ``root/cat/nsdf3.png``, also in folders below those.

    A sample is (image, class number): a PIL image in mode RGB, or what ``transform`` makes of it, and an int. All
    attributes, the order of the samples and the errors are those of ``torchvision.datasets.ImageFolder``; a
    ``cnnrs.DataLoader`` reads the files itself, in threads, and returns the same numbers.

    Args:
        root: the folder that holds the class folders.
        transform: called with the PIL image (torchvision's transforms, v1 or v2, or any function).
        target_transform: called with the class number.
        loader: called with the path instead of opening it as a PIL image in mode RGB.
        is_valid_file: called with a path, decides whether it is a sample, instead of the extension.
        allow_empty: whether a class folder may have no sample.
        classes: only these class folders, numbered in this order; all of them, sorted, without it.
        skip_hidden: whether folders and files are left out whose names begin with a dot (``.ipynb_checkpoints``, the
            ``._photo.jpg`` of a Mac). Without it they count, as in torchvision; hidden class folders are warned about.

    A link to a folder that it lies in is not followed, with a warning: torchvision lists the same files 40 times over,
    and with two such links in one folder does not come to an end.

    Attributes:
        classes: the sorted class names.
        class_to_idx: class name -> class number.
        samples: (path, class number) of every sample; ``imgs`` is the same list.
        targets: the class number of every sample.

    Raises:
        FileNotFoundError: ``root`` does not exist, has no class folder, or a class folder has no image.

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
        *,
        classes: Sequence[str] | None = None,
        skip_hidden: bool = False,
    ) -> None:
        VisionDataset.__init__(self, root, transform, target_transform)
        self.skip_hidden = skip_hidden
        if classes is None:
            found, class_to_idx = self.find_classes(self.root)
        else:
            found, class_to_idx = _chosen(self.root, classes)
        extensions = IMG_EXTENSIONS if is_valid_file is None else None
        samples = self.make_dataset(
            self.root,
            class_to_idx=class_to_idx,
            extensions=extensions,
            is_valid_file=is_valid_file,
            allow_empty=allow_empty,
            # A subclass that has torchvision's signature goes on working.
            **({"skip_hidden": True} if skip_hidden else {}),
        )
        self._keep(samples, loader)
        self.extensions = extensions
        self.classes = found
        self.class_to_idx = class_to_idx

    @classmethod
    def flat(
        cls,
        root: str | Path,
        transform: Callable[..., Any] | None = None,
        loader: Callable[[str], Any] | None = None,
        is_valid_file: Callable[[str], bool] | None = None,
        *,
        skip_hidden: bool = False,
    ) -> ImageList:
        """The images below ``root`` without classes, label -1: a folder of photos to be classified.

        Raises:
            FileNotFoundError: ``root`` does not exist or has no image below it.
        """
        root = os.path.expanduser(root)
        if not os.path.isdir(root):
            raise FileNotFoundError(errno.ENOENT, "there is no such folder", root)
        extensions = IMG_EXTENSIONS if is_valid_file is None else None
        samples, _ = _scan([os.fspath(root)], [-1], extensions, skip_hidden)
        if is_valid_file is not None:
            samples = [sample for sample in samples if is_valid_file(sample[0])]
        if not samples:
            raise FileNotFoundError(f"Found no valid file in {root}. Supported extensions: {', '.join(IMG_EXTENSIONS)}")
        images = ImageList(samples, transform, loader=loader)
        images.root = root
        return images

    @staticmethod
    def make_dataset(
        directory: str | Path,
        class_to_idx: dict[str, int],
        extensions: tuple[str, ...] | None = None,
        is_valid_file: Callable[[str], bool] | None = None,
        allow_empty: bool = False,
        skip_hidden: bool = False,
    ) -> list[tuple[str, int]]:
        """The samples below ``directory``; override it to find them elsewhere."""
        if class_to_idx is None:
            raise ValueError("The class_to_idx parameter cannot be None.")
        return make_dataset(directory, class_to_idx, extensions, is_valid_file, allow_empty, skip_hidden)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """The class names and numbers; override it to use some of the folders only, or other numbers."""
        return find_classes(directory, self.skip_hidden)


def _pair(sample: Any) -> tuple[str, int | str]:
    if isinstance(sample, (str, os.PathLike)):
        return os.fspath(sample), -1
    if isinstance(sample, (tuple, list)) and len(sample) == 2 and isinstance(sample[0], (str, os.PathLike)):
        path, label = sample
        return os.fspath(path), label if isinstance(label, str) else operator.index(label)
    raise TypeError(f"a sample is a path or (path, label), got {sample!r}")


def _chosen(root: Any, classes: Sequence[str]) -> tuple[list[str], dict[str, int]]:
    if isinstance(classes, str) or len(set(classes)) != len(classes) or not classes:
        raise ValueError(f"classes must be different names of class folders, got {classes!r}")
    there = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if missing := [name for name in classes if name not in there]:
        raise FileNotFoundError(f"{root} has no class folder {', '.join(missing)}; it has {', '.join(there) or 'none'}")
    return list(classes), {name: i for i, name in enumerate(classes)}
