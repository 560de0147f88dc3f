"""Photos copied into one folder per class, for ``cnnrs predict --sort-into``."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path

from cnnrs.classifier.predictions import Prediction

# Whatever a class is called, its folder is inside the one that was given.
_NOT_IN_NAMES = str.maketrans(dict.fromkeys("/\\\0", "_"))


class SortedCopies:
    """Copies photos below a folder, and never overwrites anything.

    Args:
        root: made when needed.
        classes: their names.
        multilabel: whether a photo goes to all its labels, or to "none".

    Attributes:
        renamed: (photo, copy) where another photo had the name already.
    """

    def __init__(self, root: Path, classes: Sequence[str], multilabel: bool = False) -> None:
        self.root = root
        self.multilabel = multilabel
        self.renamed: list[tuple[str, str]] = []
        self._folders: dict[str, str] = {}
        # Of classes whose folders would have one name, the one that is called so has it.
        for name in sorted(classes, key=lambda name: folder_of(name) != name):
            self._folders[name] = _unlike(folder_of(name), self._folders.values())
        self._unknown, self._none = (_unlike(word, self._folders.values()) for word in ("unknown", "none"))

    @staticmethod
    def check(root: Path, photos: Iterable[str]) -> None:
        """That copies would not be taken for photos the next time.

        Raises:
            NotADirectoryError: it is a file.
            ValueError: it is inside a folder of photos.
        """
        if root.exists() and not root.is_dir():
            raise NotADirectoryError(f"--sort-into {root}: is a file; a folder is wanted")
        for folder in photos:
            if os.path.isdir(folder) and root.resolve().is_relative_to(Path(folder).resolve()):
                raise ValueError(
                    f"--sort-into {root} is inside {folder}: the next time the copies would be photos there; give a "
                    "folder elsewhere"
                )

    def add(self, one: Prediction) -> list[str]:
        """Copy a photo to where it belongs; returns the copies.

        Raises:
            OSError: it cannot be read, or not be written.
        """
        if one.unknown:
            folders = [self._unknown]
        elif self.multilabel:
            folders = [self._folders[name] for name in one.labels] or [self._none]
        else:
            folders = [self._folders[one.label]]
        return [self._copy(one.path, self.root / folder) for folder in folders]

    def _copy(self, photo: str, folder: Path) -> str:
        folder.mkdir(parents=True, exist_ok=True)
        stem, ending = os.path.splitext(os.path.basename(photo))
        for number in count(1):
            place = folder / (f"{stem}{ending}" if number == 1 else f"{stem}-{number}{ending}")
            try:
                # Nobody else's file, even one that has come this moment.
                open(place, "xb").close()
            except FileExistsError:
                if place.is_file() and filecmp.cmp(photo, place, shallow=False):
                    # From the last time.
                    return str(place)
                continue
            try:
                shutil.copy2(photo, place)
            except BaseException:
                place.unlink()
                raise
            if number > 1:
                self.renamed.append((photo, str(place)))
            return str(place)
        raise AssertionError


def folder_of(name: str) -> str:
    """The name of a class as that of a folder.

    >>> folder_of("cat"), folder_of("AC/DC"), folder_of("..")
    ('cat', 'AC_DC', '_..')
    """
    plain = name.translate(_NOT_IN_NAMES)
    return f"_{plain}" if plain in ("", ".", "..") else plain


def _unlike(word: str, taken: Iterable[str]) -> str:
    """The word, with a number where another folder is called so."""
    names = set(taken)
    return next(name for i in count(1) if (name := word if i == 1 else f"{word}-{i}") not in names)
