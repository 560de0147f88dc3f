"""Images anywhere as a data set, by their paths: one label for each, or several."""

from __future__ import annotations

import copy
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import Self

from cnnrs.data import tables
from cnnrs.data.parts import fractions_of, stratified
from cnnrs.image.plugins import HEIF
from cnnrs.image.reading import Reader

#: A class number, a class name, or several of either.
Label = int | str | Iterable[int | str]


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


class ImageList(VisionDataset):
    """Images anywhere, by their paths: what a CSV file or a search found.

    A sample is (image, label): a PIL image in mode RGB, or what ``transform`` makes of it, and an int; where photos may
    have several labels, a (C,) float32 tensor of zeros and ones. A ``cnnrs.DataLoader`` reads the files itself, in
    threads. :meth:`from_csv` and :meth:`from_frame` make one of a table.

    Args:
        samples: (path, label) pairs, or paths alone (label -1). Labels are class names, which are sorted and numbered,
            or ints; or lists of these, also empty ones, for photos with several labels.
        transform: called with the PIL image (torchvision's transforms, v1 or v2, or any function).
        target_transform: called with the label.
        loader: called with the path instead of opening it as a PIL image in mode RGB.
        classes: the class names in the order of their numbers, instead of sorted.
        scale: as for :class:`ImageFolder`.
        page: as for :class:`ImageFolder`.

    Attributes:
        classes: the class names by number, [] when labels are ints.
        class_to_idx: class name -> class number.
        samples: (path, class number) of every sample, or (path, class numbers); ``imgs`` is the same list.
        targets: the class number of every sample; with several labels an (N, C) float32 tensor of zeros and ones.
        multilabel: whether photos may have several labels.
        extra: what a table says of every sample in ``extra_column``; None without.

    Raises:
        TypeError: a sample is neither a path nor (path, label); labels of different kinds; a fraction as a label.
        ValueError: a label is not among ``classes``.

    Example:
        >>> dataset = ImageList([("a.jpg", "cat"), ("b.jpg", "dog"), ("c.jpg", "cat")])
        >>> dataset.samples
        [('a.jpg', 0), ('b.jpg', 1), ('c.jpg', 0)]
        >>> ImageList([("a.jpg", ["cat", "night"]), ("b.jpg", [])]).targets
        tensor([[1., 1.],
                [0., 0.]])
    """

    extensions: tuple[str, ...] | None = None
    multilabel = False
    extra: list[str] | None = None

    def __init__(
        self,
        samples: Iterable[str | os.PathLike[str] | tuple[str | os.PathLike[str], Label]],
        transform: Callable[..., Any] | None = None,
        target_transform: Callable[..., Any] | None = None,
        loader: Callable[[str], Any] | None = None,
        *,
        classes: Sequence[str] | None = None,
        scale: str = "none",
        page: int = 0,
    ) -> None:
        super().__init__(None, transform, target_transform)
        pairs = [_pair(sample) for sample in _listed(samples)]
        self.multilabel = any(isinstance(label, tuple) for _, label in pairs)
        if self.multilabel and not all(isinstance(label, tuple) for _, label in pairs):
            raise TypeError("where photos have several labels, every label is a list, also of one or none")
        labels = [one for _, label in pairs for one in (label if isinstance(label, tuple) else (label,))]
        names = {label for label in labels if isinstance(label, str)}
        if names and not all(isinstance(label, str) for label in labels):
            raise TypeError(f"labels are either class names or ints, got both: {min(names)!r} and an int")
        if self.multilabel and labels and not names and classes is None:
            raise TypeError("several labels of a photo are class names; or numbers, and classes= names them")
        self.classes: list[str] = sorted(names) if classes is None else list(classes)
        self.class_to_idx = {name: i for i, name in enumerate(self.classes)}
        # Without a label is -1; among several there are none.
        known = {*self.class_to_idx, *range(0 if self.multilabel else -1, len(self.classes))}
        if (names or classes is not None) and (lost := [label for label in labels if label not in known]):
            raise ValueError(f"label {lost[0]!r} is not among classes={self.classes}")
        self._keep([(path, self._number(label)) for path, label in pairs], loader, Reader(scale, page))

    def _number(self, label: Any) -> Any:
        if isinstance(label, tuple):
            return tuple(sorted({self._number(one) for one in label}))
        return self.class_to_idx[label] if isinstance(label, str) else label

    @staticmethod
    def from_csv(
        file: str | os.PathLike[str],
        transform: Callable[..., Any] | None = None,
        *,
        path_column: str | None = None,
        label_column: str | Sequence[str] | None = None,
        separator: str | None = None,
        extra_column: str | None = None,
        root: str | os.PathLike[str] | None = None,
        target_transform: Callable[..., Any] | None = None,
        loader: Callable[[str], Any] | None = None,
    ) -> ImageList:
        """The photos that a CSV file lists: UTF-8, the first line names the columns.

        Args:
            file: separated by commas, semicolons or tabs.
            transform: as for :class:`ImageList`.
            path_column: of the photos. Without it the one with a usual name (path, file, filename, image, ...), or the
                only one with names of photos. Relative paths begin at ``root``, or else at the folder of ``file``.
            label_column: of the class names. Without it the one with a usual name (label, class, category, species,
                target, ...), or the only one left. A list names columns of 0 and 1, one per class: several labels.
            separator: what stands between the labels of a cell, ``"|"`` for example: several labels, or none.
            extra_column: whose cells become ``extra``: a camera, a patient, a day.
            root: the folder that relative paths begin at; photos that are not there are looked for from the folder of
                ``file``.
            target_transform: as for :class:`ImageList`.
            loader: as for :class:`ImageList`.

        Returns:
            The data set, equal rows once. Its classes are sorted, those that are whole numbers by size; those of
            columns are in the order of the list.

        Raises:
            FileNotFoundError: the file or some of the photos are not there; says how many, and which is the first.
            ValueError: no table, unclear columns, a photo without a label or in two rows with different ones, or labels
                that are measurements (fractions, or nearly as many numbers as photos): cnnrs tells classes apart, it
                fits no regression targets.

        Example:
            >>> data = ImageList.from_csv("birds.csv", transform, label_column="species")  # doctest: +SKIP
            >>> data = ImageList.from_csv("scenes.csv", label_column=["beach", "sunset", "sea"])  # doctest: +SKIP
        """
        found = tables.photos_of(tables.read_csv(file), path_column, label_column, separator, extra_column, root)
        return _of(found, transform, target_transform, loader)

    @staticmethod
    def from_frame(
        frame: Any,
        transform: Callable[..., Any] | None = None,
        *,
        path_column: str | None = None,
        label_column: str | Sequence[str] | None = None,
        separator: str | None = None,
        extra_column: str | None = None,
        root: str | os.PathLike[str] | None = None,
        target_transform: Callable[..., Any] | None = None,
        loader: Callable[[str], Any] | None = None,
    ) -> ImageList:
        """The photos that a data frame of pandas or polars lists.

        As :meth:`from_csv`; relative paths begin at ``root``, or else at the current folder.
        """
        found = tables.photos_of(tables.of_frame(frame), path_column, label_column, separator, extra_column, root)
        return _of(found, transform, target_transform, loader)

    def _keep(self, samples: list[tuple[str, Any]], loader: Callable[[str], Any] | None, reader: Reader) -> None:
        if loader is not None and reader != Reader():
            raise ValueError("loader reads files by itself: give it, or scale and page, not both")
        if loader is None and (reader != Reader() or any(path.lower().endswith(HEIF.endings) for path, _ in samples)):
            loader = reader
        if loader is None:
            from torchvision.datasets.folder import default_loader

            loader = default_loader
        self.loader: Callable[[str], Any] = loader
        self._hold(samples)

    def _hold(self, samples: list[tuple[str, Any]]) -> None:
        self.samples = self.imgs = samples
        labels = [label for _, label in samples]
        self.targets: Any = hot(labels, len(self.classes)) if self.multilabel else labels

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        path, target = self.samples[index]
        sample = self.loader(path)
        if self.transform is not None:
            sample = self.transform(sample)
        if self.multilabel:
            (target,) = hot([target], len(self.classes))
        if self.target_transform is not None:
            target = self.target_transform(target)
        return sample, target

    def __len__(self) -> int:
        return len(self.samples)

    @overload
    def split(
        self,
        fraction: float,
        *,
        seed: int = 0,
        transforms: Sequence[Callable[..., Any] | None] | None = None,
    ) -> tuple[Self, Self]: ...

    @overload
    def split(
        self,
        fraction: float | Sequence[float],
        *more: float,
        seed: int = 0,
        transforms: Sequence[Callable[..., Any] | None] | None = None,
    ) -> tuple[Self, ...]: ...

    def split(
        self,
        fraction: float | Sequence[float],
        *more: float,
        seed: int = 0,
        transforms: Sequence[Callable[..., Any] | None] | None = None,
    ) -> tuple[Self, ...]:
        """Data sets that share no sample, with the same fraction of every class in each (rounded to whole samples).

        All keep all classes and the order of the samples. A class with at least as many samples as there are parts is
        in all of them. Where photos have several labels, every label is shared out, the rarest first. Samples of one
        path stay together.

        Args:
            fraction: of the second of two parts, between 0 and 1; or the fractions of all parts, which add up to 1.
            more: the other fractions: ``split(0.7, 0.15, 0.15)`` is ``split([0.7, 0.15, 0.15])``.
            seed: the same seed gives the same parts.
            transforms: the transform of every part; without it all keep this data set's.

        Raises:
            ValueError: a fraction is not between 0 and 1, or all of them do not add up to 1.
        """
        fractions, seed = fractions_of(fraction, more, seed)
        parts = []
        paths, labels = [path for path, _ in self.samples], [label for _, label in self.samples]
        for rows in stratified(labels, fractions, seed, paths):
            part = copy.copy(self)
            part._hold([self.samples[i] for i in rows])
            part.extra = None if self.extra is None else [self.extra[i] for i in rows]
            parts.append(part)
        if transforms is not None:
            for part, transform in zip(parts, transforms, strict=True):
                part.transform = transform
                part._join_transforms()
        return tuple(parts)


def hot(labels: Sequence[tuple[int, ...]], classes: int) -> Tensor:
    """(N, C) float32: 1 for the classes of each sample, 0 elsewhere.

    >>> hot([(0, 2), ()], 3).tolist()
    [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """
    made = torch.zeros(len(labels), classes, dtype=torch.float32)
    rows = [row for row, numbers in enumerate(labels) for _ in numbers]
    made[rows, [number for numbers in labels for number in numbers]] = 1
    return made


def _of(
    found: tables.Labelled,
    transform: Callable[..., Any] | None,
    target_transform: Callable[..., Any] | None,
    loader: Callable[[str], Any] | None,
) -> ImageList:
    pairs: Iterable[tuple[str, Label]] = zip(found.paths, found.labels, strict=True)
    images = ImageList(pairs, transform, target_transform, loader, classes=found.classes)
    images.extra = found.extra
    return images


def _listed(samples: Any) -> Iterable[Any]:
    """The samples, unless it is something else that can be iterated over."""
    if isinstance(samples, (str, os.PathLike)):
        path = os.fspath(samples)
        if path.casefold().endswith((".csv", ".tsv", ".txt")):
            better = f"ImageList.from_csv({path!r})"
        elif os.path.isdir(path):
            better = f"ImageFolder({path!r}) for one folder per class, ImageFolder.flat({path!r}) for photos without"
        else:
            better = f"ImageList([{path!r}])"
        raise TypeError(f"samples is a list of paths or (path, label) pairs, got a path: {better}")
    if hasattr(samples, "columns"):
        raise TypeError("samples is a list of paths or (path, label) pairs, got a data frame: ImageList.from_frame(it)")
    return samples.items() if isinstance(samples, Mapping) else samples


def _pair(sample: Any) -> tuple[str, Any]:
    if isinstance(sample, (str, os.PathLike)):
        return os.fspath(sample), -1
    if isinstance(sample, (tuple, list)) and len(sample) == 2 and isinstance(sample[0], (str, os.PathLike)):
        path, label = sample
        several = isinstance(label, (tuple, list, set, frozenset))
        return os.fspath(path), tuple(map(_label, label)) if several else _label(label)
    raise TypeError(f"a sample is a path or (path, label), got {sample!r}")


def _label(label: Any) -> int | str:
    if isinstance(label, str):
        return label
    try:
        return operator.index(label)
    except TypeError:
        raise TypeError(
            f"a label is a class, its name or its number, got {label!r}; cnnrs tells classes apart, it fits no "
            "regression targets"
        ) from None
