"""Cats and dogs for the notebooks: your own photos, or Oxford-IIIT Pet from the network."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cnnrs.app.layout import find_parts
from cnnrs.data.folder import ImageFolder
from cnnrs.data.image_list import ImageList

Transform = Callable[..., Any] | None


def cats_and_dogs(
    photos: str | os.PathLike[str] | None = None,
    train_transform: Transform = None,
    valid_transform: Transform = None,
    *,
    per_class: int | None = None,
    root: str | os.PathLike[str] = "data",
) -> tuple[ImageList, ImageList]:
    """Training and validation photos.

    Args:
        photos: a folder with one folder per class, or with ``train`` and ``valid`` that have them (a fifth of the
            photos is held back otherwise). None downloads Oxford-IIIT Pet (800 MB, 7,349 photos) into ``root``, once.
        train_transform: of the training photos.
        valid_transform: of the validation photos.
        per_class: at most so many training photos of each class, for a first look; and a third as many for validation.
        root: where downloads are kept.

    Returns:
        Two data sets with the same ``classes``.

    Raises:
        FileNotFoundError: there is no such folder, or nothing can be downloaded; the message says what to do.
    """
    if photos is None:
        train, valid = _oxford(Path(root))
    else:
        train, valid = _own(Path(photos))
    if per_class is not None:
        train, valid = _some(train, per_class), _some(valid, max(per_class // 3, 1))
    return _with(train, train_transform), _with(valid, valid_transform)


def _own(folder: Path) -> tuple[ImageList, ImageList]:
    if not folder.is_dir():
        raise FileNotFoundError(f"PHOTOS = {str(folder)!r}: there is no such folder; one folder per class is wanted")
    parts = find_parts(folder)
    if parts is None or parts.held_out is None:
        return ImageFolder(folder if parts is None else parts.train).split(0.2, seed=0)
    return ImageFolder(parts.train), ImageFolder(parts.held_out)


def _oxford(root: Path) -> tuple[ImageList, ImageList]:
    from torchvision.datasets import OxfordIIITPet

    halves = []
    for split in ("trainval", "test"):
        try:
            pets = OxfordIIITPet(str(root), split=split, target_types="binary-category", download=True)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"Oxford-IIIT Pet is not in {root} and cannot be downloaded ({error}).\n"
                "Set PHOTOS to a folder with one folder per class, for example PHOTOS = 'cat_and_dog'"
            ) from error
        names = ("cat", "dog")
        halves.append(
            ImageList([(path, names[label]) for path, label in zip(pets._images, pets._bin_labels, strict=True)])
        )
    return halves[0], halves[1]


def _some(dataset: ImageList, per_class: int) -> ImageList:
    kept: dict[int, list[tuple[str, int]]] = {}
    for path, label in dataset.samples:
        mine = kept.setdefault(label, [])
        if len(mine) < per_class:
            mine.append((path, label))
    return ImageList([(path, dataset.classes[label]) for label in sorted(kept) for path, _ in kept[label]])


def _with(dataset: ImageList, transform: Transform) -> ImageList:
    dataset.transform = transform
    return dataset
