"""Features that :func:`cnnrs.preconv` computed: in memory, or a folder that any NumPy user can open."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Version of the folder's layout; another number is not read.
FORMAT = 1


@dataclass(eq=False)
class Features:
    """Features and labels, row i belonging to the i-th image that the loader gave.

    Unpacks in two, as the tutorial's ``preconvfeat`` does: ``conv_feat, labels = features``.

    Attributes:
        features: (N, ...) tensor; memory-mapped (copy-on-write) when the features live in a folder.
        labels: (N,) int64 class indices, or whatever the loader gave as targets.
        paths: the image file of each row, None where the data has no files.
        classes: class names by index, None where unknown.
        folder: where the features are stored, None for features in memory.
    """

    features: torch.Tensor
    labels: torch.Tensor
    paths: list[str] | None = None
    classes: list[str] | None = None
    folder: Path | None = field(default=None)

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
        from cnnrs.plots import plot_features

        return plot_features(self.features, self.labels, self.classes, path)

    def __repr__(self) -> str:
        place = f", folder={str(self.folder)!r}" if self.folder else ""
        shape, dtype = tuple(self.features.shape), str(self.features.dtype).removeprefix("torch.")
        return f"Features(features={shape} {dtype}, labels={tuple(self.labels.shape)}{place})"


@dataclass(frozen=True)
class Store:
    """The folder ``features.npy``, ``labels.npy``, ``meta.json``; complete exactly when ``meta.json`` is there."""

    folder: Path

    @property
    def features_path(self) -> Path:
        """The ``.npy`` file of the features."""
        return self.folder / "features.npy"

    @property
    def _labels_path(self) -> Path:
        return self.folder / "labels.npy"

    @property
    def _meta_path(self) -> Path:
        return self.folder / "meta.json"

    def begin(self) -> None:
        """Make the folder and take back the claim that it is complete.

        Raises:
            FileExistsError: the folder holds files that are not features; nothing is touched.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        ours = {"features.npy", "features.npy.partial", "labels.npy", "meta.json", "meta.json.partial"}
        others = sorted(entry.name for entry in os.scandir(self.folder) if entry.name not in ours)
        if others:
            raise FileExistsError(f"{self.folder} holds {others[0]!r}, not a feature file: give a folder of its own")
        self._meta_path.unlink(missing_ok=True)

    def finish(self, labels: torch.Tensor, meta: dict[str, Any]) -> None:
        """Write the labels, then ``meta.json``, which makes the folder complete."""
        np.save(self._labels_path, labels.numpy())
        partial = self.folder / "meta.json.partial"
        partial.write_text(json.dumps({"format": FORMAT, **meta}, indent=1, ensure_ascii=True), encoding="utf-8")
        os.replace(partial, self._meta_path)

    def meta(self) -> dict[str, Any] | None:
        """What ``meta.json`` says, None when there is none or it is not one of ours."""
        try:
            meta = json.loads(self._meta_path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
            return None
        return meta if isinstance(meta, dict) else None

    def load(self, meta: dict[str, Any]) -> Features:
        """The stored features, memory-mapped: a row is read from disk when it is used.

        Raises:
            ValueError: the files do not have the shape that ``meta.json`` states.
        """
        # Mode "c": writable for torch, yet nothing ever reaches the file.
        features = np.load(self.features_path, mmap_mode="c")
        labels = np.load(self._labels_path)
        if list(features.shape) != meta["shape"] or len(labels) != len(features):
            raise ValueError(
                f"{self.folder}: expected features of shape {tuple(meta['shape'])} with as many labels, found "
                f"{features.shape} and {len(labels)} labels"
            )
        return Features(
            torch.from_numpy(features), torch.from_numpy(labels), meta["paths"], meta["classes"], self.folder
        )


def load_features(folder: str | os.PathLike[str]) -> Features:
    """Open features that ``cnnrs.preconv(..., out=folder)`` wrote, without the images and the model.

    Args:
        folder: the folder given as ``out``.

    Returns:
        Memory-mapped :class:`Features`.

    Raises:
        FileNotFoundError: there are no complete features in the folder.
        ValueError: they were written in another format, or the files contradict each other.
    """
    store = Store(Path(folder))
    meta = store.meta()
    if meta is None:
        raise FileNotFoundError(f"{store.folder} holds no complete features (no meta.json)")
    if meta.get("format") != FORMAT:
        raise ValueError(f"{store.folder} is in format {meta.get('format')}, this cnnrs reads format {FORMAT}")
    return store.load(meta)


def as_labels(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Targets of all batches as one tensor on the CPU."""
    return torch.cat([part.detach().cpu() for part in parts])
