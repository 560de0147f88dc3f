"""What a classifier says about photos, in files and in memory, and that as a table."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TextIO

import torch
from torch import Tensor, nn

from cnnrs.classifier.novelty import Novelty
from cnnrs.data.image_list import ImageList
from cnnrs.data.loader import DataLoader
from cnnrs.data.photos import photo_extensions, scan_photos
from cnnrs.data.pictures import is_picture, pictures
from cnnrs.errors import DecodeError
from cnnrs.features.preconv import preconv
from cnnrs.image.reading import Reader

if TYPE_CHECKING:
    import pandas

#: From which novelty on a photo is unknown: the run's own threshold, another one, or none.
Unknown = float | Literal["auto", "off"]

# Whose features are in memory at a time: 25,088 numbers each, in the worst case.
_CHUNK = 4096


@dataclass(frozen=True)
class Prediction:
    """What a classifier says about one photo.

    Attributes:
        path: the file; "image 3" for the fourth image of a call that was no file.
        classes: names, most probable first: as many as were asked for, and all labels of a photo that may have several.
        probabilities: theirs, 0 to 1; those of all classes add up to 1, unless a photo may have several labels.
        novelty: how strange the photo is, 0 for one that the classifier was trained on; None where the run does not
            know what it was trained on.
        unknown: whether it is stranger than photos of the classes are.
        labels: the classes that are on it: the most probable one, or those of several that are probable enough.
    """

    path: str
    classes: list[str]
    probabilities: list[float]
    novelty: float | None = None
    unknown: bool = False
    labels: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.classes[0]

    @property
    def probability(self) -> float:
        """Its probability, 0 to 1."""
        return self.probabilities[0]


class Predictions(NamedTuple):
    """What :meth:`Run.predict` returns. It unpacks in two: ``predictions, unreadable = run.predict(photos)``.

    Attributes:
        predictions: of every photo that could be read, in the order given.
        unreadable: (path, reason) of the others.

    >>> found = Predictions([Prediction("a.jpg", ["cat"], [0.75])], [])
    >>> found
    1 prediction, 0 unreadable files
    >>> for one in found.predictions:
    ...     print(one.path, one.label, one.probability)
    a.jpg cat 0.75
    """

    predictions: list[Prediction]
    unreadable: list[tuple[str, str]]

    def rows(self) -> tuple[list[str], Iterator[list[Any]]]:
        """Names of columns and rows of a table: path, class, probability; with several classes per photo their rank.

        Where the run knows what it was trained on, also novelty and unknown.
        """
        ranked = any(len(one.classes) > 1 for one in self.predictions)
        novel = any(one.novelty is not None for one in self.predictions)
        names = ["path", *(["rank"] * ranked), "class", "probability", *(["novelty", "unknown"] if novel else [])]
        return names, (
            [one.path, *([rank] * ranked), name, p, *([one.novelty, one.unknown] if novel else [])]
            for one in self.predictions
            for rank, (name, p) in enumerate(zip(one.classes, one.probabilities, strict=True), 1)
        )

    def to_csv(self, file: str | os.PathLike[str] | TextIO) -> None:
        """Write the predictions as a table, the one that ``cnnrs predict --csv`` prints.

        Args:
            file: where to, or an open text file.
        """
        if isinstance(file, (str, os.PathLike)):
            # Names that are no UTF-8 come back as the bytes they are.
            with open(file, "w", newline="", encoding="utf-8", errors="surrogateescape") as opened:
                self.to_csv(opened)
            return
        names, rows = self.rows()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for row in rows:
            writer.writerow([f"{cell:.6f}" if isinstance(cell, float) else cell for cell in row])

    def to_pandas(self) -> pandas.DataFrame:
        """The predictions as a data frame with the columns of :meth:`to_csv`.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas", name="pandas") from error
        names, rows = self.rows()
        return pandas.DataFrame(list(rows), columns=names)

    def __repr__(self) -> str:
        good, bad = len(self.predictions), len(self.unreadable)
        return f"{good:,} prediction{'s' * (good != 1)}, {bad:,} unreadable file{'s' * (bad != 1)}"


@dataclass
class Predictor:
    """A network that says what is on photos.

    Attributes:
        transform: makes (3, H, W) tensors of pictures.
        body: (N, 3, H, W) float32 to features.
        head: features to (N, C) scores.
        classes: C names.
        thresholds: (C,) probabilities from which on one of several labels is on a photo; None: classes exclude each
            other, and scores are probabilities together (softmax), not one by one (sigmoid).
        novelty: what knows strange features from those that were trained on.
        read: how files are read, as arguments of :class:`cnnrs.DataLoader`.
    """

    transform: Any
    body: nn.Module
    head: nn.Module
    classes: list[str]
    thresholds: Tensor | None = None
    novelty: Novelty | None = None
    read: dict[str, Any] = field(default_factory=dict)

    def __call__(
        self, given: Any, top_k: int, unknown: Unknown, batch_size: int, num_workers: int | None, verbose: bool
    ) -> Predictions:
        """Predict; see :meth:`Run.predict`."""
        most = self._threshold(unknown)
        items = list(_items(given, self.read))
        names = [one if isinstance(one, str) else f"image {i}" for i, one in enumerate(items)]
        found: dict[int, Prediction] = {}
        errors: dict[str, str] = {}
        for is_file in (True, False):
            places = [i for i, one in enumerate(items) if isinstance(one, str) is is_file]
            for start in range(0, len(places), _CHUNK):
                some = places[start : start + _CHUNK]
                if is_file:
                    features, failed = self._of_files([items[i] for i in some], batch_size, num_workers, verbose)
                    errors |= failed
                    some = [i for i in some if items[i] not in failed]
                else:
                    features = self._of_pictures([items[i] for i in some], batch_size, verbose)
                found |= zip(some, self._predictions([names[i] for i in some], features, top_k, most), strict=True)
        unreadable = [(path, errors[path]) for path in dict.fromkeys(names) if path in errors]
        return Predictions([found[i] for i in sorted(found)], unreadable)

    def _threshold(self, unknown: Unknown) -> float:
        if unknown == "off" or (unknown == "auto" and self.novelty is None):
            return float("inf")
        if unknown == "auto":
            assert self.novelty is not None
            return self.novelty.threshold
        if isinstance(unknown, str):
            raise ValueError(f'unknown must be "auto", "off" or a novelty, got {unknown!r}')
        if self.novelty is None:
            raise ValueError(
                f"unknown={unknown:g}, but this run does not know what it was trained on: it is of an earlier cnnrs; "
                "train again"
            )
        return float(unknown)

    def _of_files(
        self, files: list[str], batch_size: int, num_workers: int | None, verbose: bool
    ) -> tuple[Tensor | None, dict[str, str]]:
        """Features of those that can be read, and why others cannot."""
        loader = DataLoader(
            ImageList(files, self.transform), batch_size, num_workers=num_workers, on_error="skip", **self.read
        )
        try:
            features = preconv(loader, self.body, verbose=verbose).features
        except (DecodeError, OSError, ValueError):
            if len({path for path, _ in loader.errors}) < len(set(files)):
                raise
            features = None
        return features, dict(loader.errors)

    def _of_pictures(self, images: list[Any], batch_size: int, verbose: bool) -> Tensor:
        batches = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
        inputs = (torch.stack([self.transform(image) for image in batch]) for batch in batches)
        return preconv(((batch, torch.zeros(len(batch))) for batch in inputs), self.body, verbose=verbose).features

    @torch.no_grad()
    def _predictions(self, names: list[str], features: Tensor | None, top_k: int, most: float) -> list[Prediction]:
        if features is None:
            return []
        scores = torch.cat([self.head(rows) for rows in features.split(256)]).float()  # type: ignore[no-untyped-call]
        likely = scores.softmax(dim=1) if self.thresholds is None else scores.sigmoid()
        strange = [None] * len(names) if self.novelty is None else self.novelty.score(features).tolist()
        found = []
        for name, novelty, values, order in zip(names, strange, *likely.sort(descending=True), strict=True):
            ranked = [self.classes[i] for i in order.tolist()]
            there = ranked[:1]
            if self.thresholds is not None:
                enough = (values >= self.thresholds[order]).tolist()
                there = [label for label, is_there in zip(ranked, enough, strict=True) if is_there]
            # All labels that a photo has are shown, if it may have several.
            k = max(top_k, *(ranked.index(label) + 1 for label in there), 1)
            is_unknown = novelty is not None and novelty > most
            found.append(Prediction(name, ranked[:k], values[:k].tolist(), novelty, is_unknown, there))
        return found


def _items(given: Any, read: Mapping[str, Any]) -> Iterator[Any]:
    """Paths of files, and pictures, of whatever may be given to :meth:`Run.predict`."""
    if isinstance(given, (str, bytes, os.PathLike)):
        path = os.fsdecode(given)
        yield from _below(path) if os.path.isdir(path) else [path]
    elif is_picture(given):
        yield from pictures(given, **{name: read[name] for name in ("exif", "scale") if name in read})
    elif isinstance(given, ImageList):
        _check_reading(given, read)
        yield from (path for path, _ in given.samples)
    elif isinstance(given, Iterable) and not isinstance(given, dict):
        for one in given:
            if not isinstance(one, (str, bytes, os.PathLike)) and not is_picture(one):
                raise TypeError(f"{_WANTED}, got a {type(one).__name__} among them")
            yield from _items(one, read)
    else:
        raise TypeError(f"{_WANTED}, got a {type(given).__name__}")


def _check_reading(data: ImageList, read: Mapping[str, Any]) -> None:
    """That a data set does not ask for other pixels than the run was trained on; one that says nothing does not.

    Raises:
        ValueError: it does.
    """
    from torchvision.datasets.folder import default_loader, pil_loader

    its, wanted = data.loader, Reader(read.get("scale", "none"), read.get("page", 0))
    if its not in (default_loader, pil_loader, Reader(), wanted):
        how = f"scale={its.scale!r}, page={its.page}" if isinstance(its, Reader) else "a loader of its own"
        raise ValueError(
            f"this data set reads photos with {how}, the run with scale={wanted.scale!r}, page={wanted.page}: give a "
            "data set that reads like the run, or pictures"
        )


def _below(folder: str) -> list[str]:
    """The photos below a folder in a stable order, without hidden ones."""
    found, _ = scan_photos([folder])
    if not found:
        raise FileNotFoundError(f"{folder}: no photos in this folder ({', '.join(photo_extensions())})")
    return found


_WANTED = "photos are wanted: paths of files or folders, PIL images, arrays or tensors, one or several"
