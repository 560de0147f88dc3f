"""Labelled photos for training or measuring: folders, tables, which part each belongs to and what stays together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cnnrs._util.text import shown
from cnnrs.app.layout import ONE_PER_CLASS, Parts, UnclearLayout, class_folders, find_parts, need_folder
from cnnrs.data.folder import ImageFolder
from cnnrs.data.image_list import ImageList
from cnnrs.data.photos import photo_extensions

Part = Literal["train", "valid", "test"]
Say = Callable[[str], None]
#: Endings of tables of labels.
TABLES = (".csv", ".tsv", ".txt")


@dataclass
class Photos:
    """Labelled photos.

    Attributes:
        data: all of them, without a transform.
        parts: what folders say each is for; None: yet to be dealt.
        groups: what each belongs together with, by any name; None: nobody has said.
        skipped: (path, reason) of those that could not be read.
    """

    data: ImageList
    parts: list[Part | None]
    groups: list[str] | None = None
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        """Names by class number."""
        return list(self.data.classes)


@dataclass(frozen=True)
class Columns:
    """How a table of labels is read; None: by the usual names."""

    path: str | None = None
    label: str | None = None
    separator: str | None = None


def find_photos(
    root: Path,
    valid: float | Path | None,
    test: float | Path | None,
    say: Say,
    columns: Columns | None = None,
    groups: str | None = None,
    add_classes: Sequence[Path] = (),
) -> Photos:
    """All photos of a folder or a table, with the parts that are there.

    Args:
        root: one folder per class, folders of these for the parts, or a table.
        valid: a share, or the folder to choose with.
        test: a share, or the folder to measure with.
        say: hears which folder is taken for what.
        columns: of a table.
        groups: a column of the table, or a regular expression: photos whose paths below ``root`` match it alike (in
            its first group, where it has one) stay together.
        add_classes: folders of photos that are one more class each.

    Raises:
        FileNotFoundError: there is no such folder, or no photos.
        ValueError: the layout is unclear, or there are too few classes or photos.
    """
    if _is_table(root, columns):
        data = _table(root, columns, groups)
        found = Photos(data, [None] * len(data), data.extra)
    else:
        found = _in_folders(_parts(root, valid, test), say)
        if groups is not None:
            found.groups = _matches(groups, root, [path for path, _ in found.data.samples])
    for folder in add_classes:
        _add_class(found, folder)
    _check_enough(root, found)
    return found


def name_of(root: Path) -> str:
    """What runs, features and pages about these photos are called."""
    return root.resolve().name if root.is_dir() else root.stem


def find_labelled(root: Path, columns: Columns | None = None) -> ImageList:
    """Labelled photos of a table, or of a folder with one folder per class, whatever else lies beside it.

    Raises:
        FileNotFoundError: there is no such folder or file, or no photos.
    """
    return _table(root, columns, None) if _is_table(root, columns) else _folder(root)


def _is_table(root: Path, columns: Columns | None) -> bool:
    if root.is_file() and root.suffix.lower() in TABLES:
        return True
    need_folder(root, f"{ONE_PER_CLASS}, or a table ({TABLES[0]}),")
    if columns is not None:
        raise ValueError(f"{root} is a folder: columns and separators are for tables ({', '.join(TABLES)})")
    return False


def _table(root: Path, columns: Columns | None, groups: str | None) -> ImageList:
    chosen = columns or Columns()
    return ImageList.from_csv(
        root, path_column=chosen.path, label_column=chosen.label, separator=chosen.separator, extra_column=groups
    )


def _in_folders(folders: Parts, say: Say) -> Photos:
    train, valid, test = folders
    held = [(place, use) for place, use in ((valid, "choosing"), (test, "measuring")) if place is not None]
    if len(held) == 1:
        # One folder measures: it says more about a share of the others than they about it.
        held = [(held[0][0], "measuring")]
    if held:
        uses = ", ".join(f"{use} with {shown(str(place))}" for place, use in held)
        say(f"training on {shown(str(train))}, {uses}")
    first = _folder(train)
    samples, parts = list(first.samples), ["train" if held else None] * len(first)
    for place, use in held:
        other = _folder(place)
        if unknown := sorted(set(other.classes) - set(first.classes)):
            raise ValueError(
                f"{train} has the classes {', '.join(first.classes)}, {place} has {', '.join(unknown)} beside"
            )
        samples += [(path, first.class_to_idx[other.classes[number]]) for path, number in other.samples]
        parts += ["valid" if use == "choosing" else "test"] * len(other)
    return Photos(ImageList(samples, classes=first.classes), parts)  # type: ignore[arg-type]


def _folder(folder: Path) -> ImageFolder:
    classes = [place.name for place in class_folders(folder)]
    try:
        if not classes:
            raise FileNotFoundError(f"Couldn't find any class folder in {folder}.")
        return ImageFolder(folder, classes=classes, skip_hidden=True, extensions=photo_extensions())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder}: {error}\n  {ONE_PER_CLASS} is wanted") from error


def _parts(root: Path, valid: float | Path | None, test: float | Path | None) -> Parts:
    said = [place if isinstance(place, Path) else None for place in (valid, test)]
    for place in said:
        if place is not None:
            need_folder(place, ONE_PER_CLASS)
    if any(said):
        return Parts(root, *said)
    try:
        return find_parts(root, alike_are_classes=valid is not None or test is not None) or Parts(root)
    except UnclearLayout as error:
        known = ", or give --valid 0.2 if they are all classes" if error.alike else ""
        raise UnclearLayout(
            f"{error}\n  Call the two train and valid, or say it: cnnrs train {root}/A --valid {root}/B{known}"
        ) from error


def _add_class(photos: Photos, folder: Path) -> None:
    """One more class, called as its folder; to be dealt, whatever the others are."""
    name = folder.resolve().name
    if name in photos.classes:
        raise ValueError(f"{folder}: there is a class {name} already; put its photos there, or rename the folder")
    if photos.data.multilabel:
        raise ValueError(f"{folder}: a class can be added to photos with one label each; add a column to the table")
    more = ImageFolder.flat(folder, skip_hidden=True)
    number = len(photos.classes)
    samples = [*photos.data.samples, *((path, number) for path, _ in more.samples)]
    photos.data = ImageList(samples, classes=[*photos.classes, name])
    photos.parts += [None] * len(more)
    if photos.groups is not None:
        photos.groups += [path for path, _ in more.samples]


def _matches(pattern: str, root: Path, paths: Sequence[str]) -> list[str]:
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--groups {pattern}: no regular expression ({error}), and {root} is no table") from error
    found = []
    for path in paths:
        below = Path(path).relative_to(root).as_posix() if Path(path).is_relative_to(root) else path
        match = wanted.search(below)
        if match is None:
            raise ValueError(f"--groups {pattern}: nothing in {below} matches")
        found.append(match.group(1 if wanted.groups else 0) or path)
    return found


def _check_enough(root: Path, photos: Photos) -> None:
    classes = photos.classes
    if photos.data.multilabel:
        if len(photos.data) < 2:
            raise ValueError(f"{root}: {len(photos.data)} photos are too few to train on some and measure on others")
        return
    if len(classes) < 2:
        inner = root / classes[0]
        hint = f"; or are the classes in {inner}?" if inner.is_dir() and class_folders(inner) else ""
        raise ValueError(
            f"{root} has one class folder only ({classes[0]}); a classifier needs two or more to tell apart{hint}"
        )
    learn = {
        label for (_, label), part in zip(photos.data.samples, photos.parts, strict=True) if part in ("train", None)
    }
    if lost := [name for number, name in enumerate(classes) if number not in learn]:
        raise ValueError(f"{root}: the classes {', '.join(map(shown, lost[:5]))} have no photos to train on")
    counted = Counter(label for _, label in photos.data.samples)
    if min(counted[number] for number in range(len(classes))) < 2:
        raise ValueError(
            f"{root}: {len(photos.data)} photos are too few to train on some and measure on others: every class needs "
            "two or more"
        )
