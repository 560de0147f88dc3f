"""Features that :func:`cnnrs.preconv` computed: in memory, or a folder that any NumPy user can open."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

import torch
from torch import nn

from cnnrs.features.store import FORMAT, Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Rows that are compared at a time: bounds the memory of a search, whatever the size of the store.
_CHUNK = 2048


class Neighbour(NamedTuple):
    """A row that resembles another: `similarity` is the cosine of the two, at most 1."""

    row: int
    similarity: float
    label: Any
    path: str | None


@dataclass(eq=False)
class Features:
    """Features and labels, row i belonging to the i-th image.

    Unpacks in two, as the tutorial's ``preconvfeat`` does: ``conv_feat, labels = features``.

    Attributes:
        features: (N, ...) tensor; memory-mapped (copy-on-write) when the features live in a folder.
        labels: (N,) int64 class indices, or whatever the loader gave as targets.
        paths: the image file of each row, None where the data has no files.
        classes: class names by index, None where unknown.
        folder: where the features are stored, None for features in memory.
        body: the module that computed them, None for features that were opened from a folder.
        images: where passes share images that have no file, the number of the image of each row; None otherwise.
    """

    features: torch.Tensor
    labels: torch.Tensor
    paths: list[str] | None = None
    classes: list[str] | None = None
    folder: Path | None = None
    body: nn.Module | None = field(default=None, repr=False)
    images: list[int] | None = field(default=None, repr=False)

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Features, then labels: for unpacking. Iterate over ``zip(*features)`` for rows."""
        return iter((self.features, self.labels))

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.features)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(features, label) of one row."""
        return self.features[index], self.labels[index]

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

    def split(self, fraction: float, seed: int = 0) -> tuple[Features, Features]:
        """Two parts that share no image, ``fraction`` of every class in the second (rounded to whole images).

        All passes of an image stay together. A class of two or more images is in both parts. The rows are copied.

        Args:
            fraction: between 0 and 1.
            seed: the same seed gives the same parts.

        Raises:
            ValueError: ``fraction`` is not between 0 and 1, or the labels are not one number per row.

        >>> import torch
        >>> train, valid = Features(torch.zeros(10, 2), torch.arange(10) % 2).split(0.2)
        >>> sorted(valid.labels.tolist()), len(train)
        ([0, 1], 8)
        """
        if not 0 < fraction < 1:
            raise ValueError(f"fraction must be between 0 and 1 (exclusive), got {fraction}")
        if self.labels.dim() != 1:
            raise ValueError(
                f"a stratified split needs one label per row, got labels of shape {tuple(self.labels.shape)}"
            )
        members: dict[Any, dict[int, list[int]]] = {}
        for row, (label, image) in enumerate(zip(self.labels.tolist(), self._images(), strict=True)):
            members.setdefault(label, {}).setdefault(image, []).append(row)
        generator = torch.Generator().manual_seed(seed)
        second: list[int] = []
        for label in sorted(members):
            images = list(members[label].values())
            count = round(fraction * len(images))
            if len(images) > 1:
                count = min(max(count, 1), len(images) - 1)
            order = torch.randperm(len(images), generator=generator).tolist()
            second += [row for i in order[:count] for row in images[i]]
        chosen = set(second)
        return self.take([row for row in range(len(self)) if row not in chosen]), self.take(sorted(chosen))

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

        A quick look at how good the features are, without training: ``(f.knn(5) == f.labels).float().mean()``.

        Args:
            k: how many rows vote.
            queries: (M, ...) features to classify; None: every row by the others (rows of the same image do not vote).

        Returns:
            (M,) labels.

        Raises:
            ValueError: ``k`` is below 1 or there are not so many rows (of other images).
        """
        if isinstance(queries, Features):
            queries = queries.features
        _, rows = self._search(self.features if queries is None else queries, k, leave_out=queries is None)
        votes = self.labels.to(rows.device)[rows]
        same = votes.unsqueeze(2) == votes.unsqueeze(1)
        # The earlier a row, the more similar: it breaks ties without outvoting anybody.
        order = torch.linspace(0.5, 0, k, device=rows.device)
        best = (same.sum(dim=2) + order).argmax(dim=1, keepdim=True)
        return votes.gather(1, best).squeeze(1)

    def nearest(self, image: str | os.PathLike[str] | SupportsIndex | torch.Tensor, k: int = 5) -> list[Neighbour]:
        """The ``k`` rows most similar to an image, the most similar first.

        Args:
            image: the path or the number of a row (which is then left out, with other rows of the same image), or
                (...) features.
            k: how many.

        Raises:
            KeyError: no row has this path.
            IndexError: there is no row of this number.
            ValueError: ``k`` is below 1 or there are not so many rows (of other images).
        """
        leave_out = None
        if not isinstance(image, torch.Tensor):
            row = operator.index(image) if isinstance(image, SupportsIndex) else self._row_of(os.fspath(image))
            if not -len(self) <= row < len(self):
                raise IndexError(f"there are {len(self)} rows, got {row}")
            leave_out = torch.tensor([self._images()[row]])
            image = self.features[row]
        values, rows = self._search(image.unsqueeze(0), k, leave_out)
        return [
            Neighbour(row, value, self.labels[row].tolist(), None if self.paths is None else self.paths[row])
            for value, row in zip(values[0].tolist(), rows[0].tolist(), strict=True)
        ]

    def _row_of(self, path: str) -> int:
        if self.paths is None:
            raise KeyError("these features have no paths: give the number of a row")
        absolute = os.path.abspath(path)
        for row, one in enumerate(self.paths):
            if one == path or os.path.abspath(one) == absolute:
                return row
        raise KeyError(f"no row is of {path}; the first is of {self.paths[0] if self.paths else None}")

    def _images(self) -> list[int]:
        """For every row the number of its image: passes share one."""
        if self.paths is None:
            return list(range(len(self))) if self.images is None else self.images
        numbers: dict[str, int] = {}
        return [numbers.setdefault(path, len(numbers)) for path in self.paths]

    def _search(
        self, queries: torch.Tensor, k: int, leave_out: torch.Tensor | bool | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(M, k) cosines and rows; `leave_out`: numbers of images not to be found, True: each query's own."""
        if queries.shape[1:] != self.features.shape[1:]:
            raise ValueError(
                f"features have shape {tuple(self.features.shape[1:])}, the queries {tuple(queries.shape[1:])}"
            )
        device = self.features.device
        images = torch.tensor(self._images(), device=device)
        others = len(self)
        if isinstance(leave_out, torch.Tensor):
            others -= int((images == leave_out.to(device)).sum())
        elif leave_out:
            others -= int(images.bincount().max()) if len(images) else 0
        kind = "rows" if leave_out is None else "rows of other images"
        if not 1 <= k <= others:
            raise ValueError(f"k must be between 1 and the {others} {kind} there are, got {k}")
        values, rows = [], []
        for begin in range(0, len(queries), _CHUNK):
            some = _unit(queries[begin : begin + _CHUNK].to(device))
            own = images[begin : begin + len(some)] if leave_out is True else leave_out
            best = torch.full((len(some), k), -torch.inf, device=device)
            where = torch.zeros((len(some), k), dtype=torch.int64, device=device)
            for start in range(0, len(self), _CHUNK):
                cosines = some @ _unit(self.features[start : start + _CHUNK]).T
                if isinstance(own, torch.Tensor):
                    mine = own.to(device).unsqueeze(1) == images[start : start + _CHUNK]
                    cosines.masked_fill_(mine, -torch.inf)
                numbers = torch.arange(start, start + cosines.shape[1], device=device).expand_as(cosines)
                best, order = torch.cat([best, cosines], dim=1).topk(k, dim=1)
                where = torch.cat([where, numbers], dim=1).gather(1, order)
            values.append(best)
            rows.append(where)
        return torch.cat(values), torch.cat(rows)


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


def _unit(rows: torch.Tensor) -> torch.Tensor:
    """(n, d) float32 rows of length 1."""
    return nn.functional.normalize(rows.flatten(1).float(), dim=1)


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
