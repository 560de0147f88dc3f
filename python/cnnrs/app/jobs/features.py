"""Features of labelled photos, computed once and kept beside the runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from cnnrs._util.progress import steps
from cnnrs._util.text import shown
from cnnrs.app.jobs.clock import Clock
from cnnrs.app.jobs.photos import Photos
from cnnrs.classifier.heads import Preprocessing
from cnnrs.data.loader import DataLoader
from cnnrs.errors import DecodeError
from cnnrs.features.features import Features
from cnnrs.features.preconv import preconv

#: Photos that go through the network together: more costs memory and saves nothing.
AT_A_TIME = 32
_AFTER_BAD = "\n  cnnrs check {} lists every such file, --fix move puts them aside; or train with --skip-bad"


def compute(
    photos: Photos, body: nn.Module, folder: Path | None, preprocessing: Preprocessing, clock: Clock,
    say: Callable[[str], None], *, root: Path, skip_bad: bool, threads: int | None = None,
    read: Mapping[str, Any] | None = None, verbose: bool = True,
) -> Features:  # fmt: skip
    """Features of all photos, in their order, without those that ``photos.skipped`` names afterwards.

    Args:
        photos: get the transform that belongs to the network.
        body: the frozen part.
        folder: where features are kept; None: in memory.
        preprocessing: what happens to a photo.
        clock: gets the seconds.
        say: hears what was computed.
        root: named in advice about bad files.
        skip_bad: whether photos that cannot be read are left out.
        threads: that read photos; None: all cores.
        read: arguments of the loader about files.
        verbose: whether bars are shown.

    Raises:
        ValueError: a photo cannot be read.
    """
    data = photos.data
    data.transform = preprocessing.transform()
    data._join_transforms()
    loader = DataLoader(
        data, batch_size=AT_A_TIME, num_workers=threads, on_error="skip" if skip_bad else "raise", **(read or {})
    )
    before = time.perf_counter()
    try:
        with steps() as found:
            features = preconv(loader, body, out=folder, verbose=verbose)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"the same command goes on from what is in {folder}") from None
    except DecodeError as error:
        raise ValueError(f"{error}{_AFTER_BAD.format(root)}") from error
    except (FileNotFoundError, PermissionError) as error:
        if error.filename not in {path for path, _ in data.samples}:
            raise
        raise ValueError(f"{error.filename}: {error.strerror}{_AFTER_BAD.format(root)}") from error
    seconds = time.perf_counter() - before
    photos.skipped += loader.errors
    for path, reason in loader.errors:
        say(f"left out {shown(reason if path in reason else f'{path}: {reason}')}")
    step = next((step for step in found if step.samples), None)
    if step is not None:
        clock.add("reading", step.waiting)
        clock.add("features", seconds - step.waiting)
        say(f"features of {len(features):,} photos in {seconds:.1f} s: {step}")
    else:
        clock.add("features", seconds)
    return features


def numbers_of(features: Features, photos: Photos) -> list[int]:
    """For every row the number of its photo: rows are in the order of the photos, some of which were left out."""
    paths = features.paths or []
    numbers, row = [], 0
    for number, (path, _) in enumerate(photos.data.samples):
        if row < len(paths) and paths[row] == path:
            numbers.append(number)
            row += 1
    assert row == len(paths), "features belong to other photos"
    return numbers
