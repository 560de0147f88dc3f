"""Features that :func:`cnnrs.preconv` computed: in memory, or a folder that any NumPy user can open."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex, overload

import numpy as np
import torch
from torch import nn

from cnnrs.data.parts import fractions_of, stratified
from cnnrs.data.pictures import is_picture
from cnnrs.features.resemblance import computed, most_frequent, most_similar
from cnnrs.features.store import FORMAT, Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Neighbour(NamedTuple):
    """A row that resembles another: `similarity` is the cosine of the two, at most 1."""

    row: int
    similarity: float
    label: Any
    path: str | None


@dataclass(eq=False)
class Features:
    """Features and labels, row i belonging to the i-th image.

    Unpacks in two, as the tutorial's ``preconvfeat`` does: ``conv_feat, labels = features``; ``np.asarray(features)``
    has the features only.

    Attributes:
        features: (N, ...) tensor; memory-mapped (copy-on-write) when the features live in a folder.
        labels: (N,) int64 class indices; (N, C) float32 zeros and ones where images may have several; or whatever else
            the loader gave as targets.
        paths: the image file of each row, None where the data has no files.
        classes: class names by index, None where unknown.
        folder: where the features are stored, None for features in memory.
        body: the module that computed them, None for features that were opened from a folder.
        images: where passes share images that have no file, the number of the image of each row; None otherwise.
        transform: what made the inputs of the body of a photo, None where nobody knows; it is not pickled.
        read: how files were read, as arguments of :class:`cnnrs.DataLoader`.
    """

    features: torch.Tensor
    labels: torch.Tensor
    paths: list[str] | None = None
    classes: list[str] | None = None
    folder: Path | None = None
    body: nn.Module | None = field(default=None, repr=False)
    images: list[int] | None = field(default=None, repr=False)
    transform: Callable[[Any], Any] | None = field(default=None, repr=False)
    read: dict[str, Any] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # It may be a lambda.
        return {**self.__dict__, "transform": None}

    def __copy__(self) -> Features:
        return replace(self)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Features, then labels: for unpacking. Iterate over ``zip(*features)`` for rows."""
        return iter((self.features, self.labels))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.features)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(features, label) of one row."""
        return self.features[index], self.labels[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """(N, ...) array of the features; bfloat16, which NumPy does not have, as float32."""
        rows = self.features.detach().cpu()
        return np.array((rows.float() if rows.dtype == torch.bfloat16 else rows).numpy(), dtype, copy=copy)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the rows in the plane of their two largest principal components, one colour per class.

        Args:
            path: where to write the picture; None only draws, and a notebook shows it.

        Returns:
            The matplotlib figure.
        """
        from cnnrs._util.plots import plot_features

        return plot_features(self.features, self.labels, self.classes, path)

    def __repr__(self) -> str:
        place = f", folder={str(self.folder)!r}" if self.folder else ""
        shape, dtype = tuple(self.features.shape), str(self.features.dtype).removeprefix("torch.")
        return f"Features(features={shape} {dtype}, labels={tuple(self.labels.shape)}{place})"

    def take(self, rows: Sequence[int] | torch.Tensor) -> Features:
        """Some of the rows, copied into memory: by their numbers, in the order given, or by a mask, one bool per row.

        Raises:
            IndexError: there is no such row, or the mask has another length.
            TypeError: neither integers nor bools.

        >>> import torch
        >>> features = Features(torch.arange(3.0), torch.tensor([0, 1, 1]))
        >>> features.take(features.labels == 1).features.tolist(), features.take([2, 0]).features.tolist()
        ([1.0, 2.0], [2.0, 0.0])
        """
        index = torch.as_tensor(rows).cpu()
        if index.dtype == torch.bool:
            if index.shape != (len(self),):
                raise IndexError(f"a mask for {len(self)} rows must have as many bools, got {tuple(index.shape)}")
            index = index.nonzero().squeeze(1)
        elif index.numel() == 0:
            index = index.long()
        elif index.is_floating_point() or index.is_complex():
            raise TypeError(f"rows must be integers or bools, got {str(index.dtype).removeprefix('torch.')}")
        index = index.long()
        paths = None if self.paths is None else [self.paths[i] for i in index.tolist()]
        images = None if self.images is None else [self.images[i] for i in index.tolist()]
        features, labels = self.features[index.to(self.features.device)], self.labels[index.to(self.labels.device)]
        return replace(self, features=features, labels=labels, paths=paths, folder=None, images=images)

    @overload
    def split(self, fraction: float, *, seed: int = 0) -> tuple[Features, Features]: ...

    @overload
    def split(self, fraction: float | Sequence[float], *more: float, seed: int = 0) -> tuple[Features, ...]: ...

    def split(self, fraction: float | Sequence[float], *more: float, seed: int = 0) -> tuple[Features, ...]:
        """Parts that share no image, with the same fraction of every class in each (rounded to whole images).

        All passes of an image stay together. A class with at least as many images as there are parts is in all of them.
        Where images have several labels, every label is shared out, the rarest first. The rows are copied.

        Args:
            fraction: of the second of two parts, between 0 and 1; or the fractions of all parts, which add up to 1.
            more: the other fractions: ``split(0.7, 0.15, 0.15)`` is ``split([0.7, 0.15, 0.15])``.
            seed: the same seed gives the same parts.

        Raises:
            ValueError: a fraction is not between 0 and 1, all of them do not add up to 1, or the labels are no classes.

        >>> import torch
        >>> train, valid = Features(torch.zeros(10, 2), torch.arange(10) % 2).split(0.2)
        >>> sorted(valid.labels.tolist()), len(train)
        ([0, 1], 8)
        >>> [len(part) for part in Features(torch.zeros(20, 2), torch.arange(20) % 2).split(0.5, 0.3, 0.2)]
        [10, 6, 4]
        """
        fractions, seed = fractions_of(fraction, more, seed)
        members: dict[tuple[Any, int], list[int]] = {}
        for row, key in enumerate(zip(self._classes(), self._images(), strict=True)):
            members.setdefault(key, []).append(row)
        images = list(members.values())
        parts = stratified([label for label, _ in members], fractions, seed)
        return tuple(self.take(sorted(row for i in part for row in images[i])) for part in parts)

    def _classes(self) -> list[Any]:
        """The class of every row, or the numbers of its classes."""
        if self.labels.dim() == 1:
            return self.labels.tolist()
        if not self._has_several_labels:
            raise ValueError(
                "a stratified split needs one label per row, or a 0 or 1 per class, got labels of shape "
                f"{tuple(self.labels.shape)}"
            )
        return [tuple(row.nonzero().flatten().tolist()) for row in self.labels.cpu()]

    @property
    def _has_several_labels(self) -> bool:
        """Whether the labels are a 0 or 1 per class."""
        return self.labels.dim() == 2 and bool(((self.labels == 0) | (self.labels == 1)).all())

    def to(self, device: str | torch.device) -> Features:
        """The same with features and labels on ``device``, where all of them must fit."""
        return replace(self, features=self.features.to(device), labels=self.labels.to(device))

    # -- back to images --------------------------------------------------------------------------------------

    def attach(self, head: nn.Module, body: nn.Module | None = None) -> nn.Module:
        """The whole network: its output on images is that of ``head`` on their features.

        Bit for bit where the features came from engine "python" or "torch" on the same device in batches of the same
        size, up to float rounding otherwise. The parts are shared, not copied: train the head before or after. The body
        stays in eval mode, also after ``.train()``, because the features were computed in it.

        Args:
            head: takes (N, ...) features.
            body: what computed the features; needed for features that were opened with :func:`load_features`.

        Raises:
            ValueError: there is no body.

        >>> import torch, cnnrs
        >>> images = torch.rand(4, 3, 8, 8)
        >>> features = cnnrs.preconv([(images, torch.arange(4))], torch.nn.Conv2d(3, 5, 3), engine="python")
        >>> head = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(180, 2))
        >>> torch.equal(features.attach(head)(images), head(features.features))
        True
        """
        body = body if body is not None else self.body
        if body is None:
            raise ValueError(
                "these features do not know the module that computed them: pass it, features.attach(head, vgg.features)"
            )
        for name, module in (("head", head), ("body", body)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name} must be a torch.nn.Module, got {module!r}")
        return Attached(body, head, self.features.dtype)

    # -- resemblance -----------------------------------------------------------------------------------------

    def knn(self, k: int = 5, queries: Features | torch.Tensor | None = None) -> torch.Tensor:
        """The class that most of the ``k`` most similar rows have, by cosine; ties go to the most similar.

        A quick look at how good the features are, without training: ``(f.knn(5) == f.labels).float().mean()``. Where
        images may have several labels, those that more than half of the rows have.

        Args:
            k: how many rows vote.
            queries: (M, ...) features to classify; None: every row by the others (rows of the same image do not vote).

        Returns:
            (M,) labels, or (M, C) zeros and ones.

        Raises:
            ValueError: ``k`` is below 1 or there are not so many rows (of other images), or the labels are no classes.
        """
        several = self._has_several_labels
        if self.labels.dim() != 1 and not several:
            raise ValueError(f"knn needs one label per row, got labels of shape {tuple(self.labels.shape)}")
        if isinstance(queries, Features):
            queries = queries.features
        asked = self.features if queries is None else queries
        _, rows = most_similar(self.features, self._images(), asked, k, leave_out=True if queries is None else None)
        votes = self.labels.to(rows.device)[rows]
        if several:
            return (votes.float().mean(dim=1) > 0.5).to(self.labels.dtype)
        return most_frequent(votes)

    def nearest(self, image: Any, k: int = 5, body: nn.Module | None = None) -> list[Neighbour]:
        """The ``k`` rows most similar to an image, the most similar first.

        Args:
            image: the path or the number of a row (which is then left out, with other rows of the same image); the path
                of another photo, a PIL image or an (H, W, C) uint8 array, whose features are computed; or (...)
                features, as a tensor or array.
            k: how many.
            body: what computes features of another photo; needed for features that were opened with
                :func:`load_features`: a :func:`cnnrs.backbone`, which knows the transform as well.

        Raises:
            KeyError: no row has this path, and there is no such file.
            IndexError: there is no row of this number.
            ValueError: ``k`` is below 1 or there are not so many rows (of other images); there is no body.
        """
        leave_out = None
        if isinstance(image, np.ndarray) and image.dtype != np.uint8:
            image = torch.from_numpy(image)
        if not isinstance(image, torch.Tensor):
            row = None if is_picture(image) else self._row_of(image)
            if row is None:
                image = computed(image, body if body is not None else self.body, self.transform, self.read)
                image = image.to(self.features.device, self.features.dtype)
            else:
                leave_out = torch.tensor([self._images()[row]])
                image = self.features[row]
        values, rows = most_similar(self.features, self._images(), image.unsqueeze(0), k, leave_out)
        return [
            Neighbour(row, value, self.labels[row].tolist(), None if self.paths is None else self.paths[row])
            for value, row in zip(values[0].tolist(), rows[0].tolist(), strict=True)
        ]

    def _row_of(self, image: str | os.PathLike[str] | SupportsIndex) -> int | None:
        """The number of the row that is meant, None for a photo that is not among them."""
        if isinstance(image, SupportsIndex):
            row = operator.index(image)
            if not -len(self) <= row < len(self):
                raise IndexError(f"there are {len(self)} rows, got {row}")
            return row
        path = os.fspath(image)
        absolute = os.path.abspath(path)
        for row, one in enumerate(self.paths or []):
            if one == path or os.path.abspath(one) == absolute:
                return row
        if os.path.exists(path):
            return None
        if self.paths is None:
            raise KeyError("these features have no paths: give the number of a row")
        raise KeyError(f"no row is of {path}; the first is of {self.paths[0] if self.paths else None}")

    def _images(self) -> list[int]:
        """For every row the number of its image: passes share one."""
        if self.paths is None:
            return list(range(len(self))) if self.images is None else self.images
        numbers: dict[str, int] = {}
        return [numbers.setdefault(path, len(numbers)) for path in self.paths]


class Attached(nn.Sequential):
    """A frozen body and a head, as one module from images to outputs: what :meth:`Features.attach` returns."""

    def __init__(self, body: nn.Module, head: nn.Module, dtype: torch.dtype) -> None:
        wanted = next((parameter.dtype for parameter in head.parameters()), dtype)
        made = next((parameter.dtype for parameter in body.parameters()), dtype)
        super().__init__(body, *([] if made == dtype == wanted else [_Kept(dtype, wanted)]), head)
        self.train(head.training)

    def train(self, mode: bool = True) -> Attached:
        super().train(mode)
        self[0].eval()
        return self


class _Kept(nn.Module):
    """Rounds as storing did, so that the head sees what it was trained on."""

    def __init__(self, stored: torch.dtype, wanted: torch.dtype) -> None:
        super().__init__()
        self.stored = stored
        self.wanted = wanted

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, ...) features in the head's type."""
        return x.to(self.stored).to(self.wanted)

    def extra_repr(self) -> str:
        return f"{self.stored} to {self.wanted}"


def load_features(folder: str | os.PathLike[str], *, verify: bool = True) -> Features:
    """Open features that ``cnnrs.preconv(..., out=folder)`` wrote, without the images and the model.

    Args:
        folder: the folder given as ``out``.
        verify: compare all of it with its checksums, which reads the files once.

    Returns:
        Memory-mapped :class:`Features`.

    Raises:
        FileNotFoundError: there are no complete features in the folder.
        ValueError: they were written in another format, or are damaged.
    """
    store = Store(folder)
    meta = store.meta()
    if meta is None:
        there = store.path("meta.json").exists()
        state = "its meta.json is damaged" if there else "no meta.json"
        raise FileNotFoundError(f"{store.folder} holds no complete features ({state}): call preconv to compute them")
    if meta.get("format") != FORMAT:
        raise ValueError(
            f"{store.folder} is in format {meta.get('format')}, this cnnrs reads format {FORMAT}: call preconv again"
        )
    if verify and (bad := store.damaged(meta)):
        start, count = bad[0]
        raise ValueError(
            f"{store.path('features.npy')} is damaged: {sum(size for _, size in bad)} of {meta['shape'][0]} rows do "
            f"not have their checksums, the first in rows {start} to {start + count - 1}; preconv computes them again"
        )
    labels, features = store.labels(meta), store.features(meta)
    if features is None:
        # Another process has just written new ones.
        return load_features(folder, verify=verify)
    return stored(features, labels, meta, store.folder)


def stored(
    features: torch.Tensor, labels: torch.Tensor, meta: dict[str, Any], folder: Path, body: nn.Module | None = None
) -> Features:
    """Features of a folder whose ``meta.json`` this is."""
    images = None
    if meta["paths"] is None and meta["passes"] > 1:
        # Pass by pass, each in the order of the data set.
        each = len(features) // meta["passes"]
        images = [row % each for row in range(len(features))]
    return Features(features, labels, meta["paths"], meta["classes"], folder, body, images)
