"""The files of class folders: torchvision's order, errors and endings, by threads."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from cnnrs import _cnnrs
from cnnrs._util.notes import note

IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


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
    samples, counts = scan(folders, [class_to_idx[name] for name in names], extensions, skip_hidden)
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


def scan(
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


def choose_classes(root: Any, classes: Sequence[str]) -> tuple[list[str], dict[str, int]]:
    """As ``find_classes``, of these folders only, in this order."""
    if isinstance(classes, str) or len(set(classes)) != len(classes) or not classes:
        raise ValueError(f"classes must be different names of class folders, got {classes!r}")
    there = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if missing := [name for name in classes if name not in there]:
        raise FileNotFoundError(f"{root} has no class folder {', '.join(missing)}; it has {', '.join(there) or 'none'}")
    return list(classes), {name: i for i, name in enumerate(classes)}
