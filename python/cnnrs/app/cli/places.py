"""Where `cnnrs train` reads and writes: photos and their parts, the run folder, the features."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cnnrs
from cnnrs._util.text import shown
from cnnrs.app.cli.options import ONE_PER_CLASS, need_folder
from cnnrs.app.layout import Halves, UnclearLayout, class_folders, find_halves
from cnnrs.classifier.card import CARD, PARTIAL, is_run_file, read_card

_SHARE = 0.2


@dataclass
class Photos:
    """The photos of both halves."""

    train: Any
    valid: Any
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def classes(self) -> list[str]:
        """Names by class number."""
        return list(self.train.classes)


# -- the run folder and the features -------------------------------------------------------------------------


def default_out(root: Path) -> Path:
    """The run folder nobody has named: below the current folder, or beside the photos when that is among them."""
    inside = Path.cwd().is_relative_to(root.resolve())
    return (Path(os.path.relpath(root.resolve().parent)) if inside else Path()) / "runs" / root.resolve().name


def check(root: Path, valid: float | Path | None, out: Path, features: Path) -> None:
    """That the run can be written, to a place that loses nothing and holds no photos.

    Raises:
        FileExistsError: there is something else.
        PermissionError: it cannot be written to.
        ValueError: it is inside a folder of photos, and would be a class the next time.
    """
    _check_out(out)
    for option, place in (("--out", out), ("--features", features)):
        for photos in (root, *([valid] if isinstance(valid, Path) else [])):
            if photos.is_dir() and place.resolve().is_relative_to(photos.resolve()):
                raise ValueError(
                    f"{option} {place} is inside {photos}, and would count as photos of a class the next time; "
                    "give a folder elsewhere"
                )


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out {out} is a file; a folder is wanted")
    above = next(place for place in (out.absolute(), *out.absolute().parents) if place.exists())
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {out}: {above} cannot be written to; give another folder")
    if not out.is_dir():
        return
    try:
        card: dict[str, Any] | None = read_card(out)
    except (ValueError, FileNotFoundError):
        card = None
    if card is None and not _was_interrupted(out):
        raise FileExistsError(f"--out {out} holds something else than a run; give a new folder, for example {out}-run")
    if card is not None:
        made = f"{str(card.get('date', '?'))[:16]} ({card.get('accuracy', '?')} %)"
        print(shown(f"{out}: replaces the {card['backbone']} of {made}"))


def _was_interrupted(out: Path) -> bool:
    """Whether these are what a run leaves behind that was stopped while it was written, and nobody else's."""
    names = os.listdir(out)
    if not all(map(is_run_file, names)):
        return False
    # Weights, reports and tables of other programs have the same names; a run's last file is its card.
    begun = all(name.endswith(PARTIAL) for name in names) or f"{CARD}{PARTIAL}" in names
    return begun or (CARD in names and _is_no_other_card(out))


def _is_no_other_card(out: Path) -> bool:
    """Whether a `model.json` that cannot be read is a damaged one of ours: other programs use that name as well."""
    try:
        card = json.loads((out / CARD).read_bytes())
    except FileNotFoundError:
        return True
    except (ValueError, RecursionError):
        # Cut short, or nothing but zeros, after a crash of the machine.
        return True
    return isinstance(card, dict) and "backbone" in card and "format" in card


# -- the photos ----------------------------------------------------------------------------------------------


def find_photos(root: Path, valid: float | Path | None, seed: int, say: Callable[[str], None]) -> Photos:
    """Both halves: folders that are there, or a share of each class held back.

    Raises:
        FileNotFoundError: there is no such folder, or no photos.
        ValueError: the layout is unclear, or there are too few classes or photos.
    """
    need_folder(root, ONE_PER_CLASS)
    halves = _halves(root, valid)
    share = valid if isinstance(valid, float) else _SHARE
    train = root if halves is None else halves.train
    if halves is not None and halves.valid is not None:
        spared = f", not with a share of {valid:g}" if isinstance(valid, float) else ""
        say(f"training on {shown(str(halves.train))}, measuring with {shown(str(halves.valid))}{spared}")
        found = _photos(halves.train), _photos(halves.valid)
        if found[0].classes != found[1].classes:
            raise ValueError(f"{train} has the classes {found[0].classes}, {halves.valid} has {found[1].classes}")
    else:
        if share == 0:
            raise ValueError(
                "--valid 0 leaves no photos to measure with; give a share such as 0.2, or a folder of photos"
            )
        if halves is not None:
            say(f"training on {shown(str(train))}, of which a share of {share:g} is held back to measure with")
        found = _photos(train).split(share, seed=seed)
    classes = found[0].classes
    if len(classes) < 2:
        inner = train / classes[0]
        hint = f"; or are the classes in {inner}?" if class_folders(inner) else ""
        raise ValueError(
            f"{train} has one class folder only ({classes[0]}); a classifier needs two or more to tell apart{hint}"
        )
    if not all(map(len, found)):
        raise ValueError(
            f"{train}: {sum(map(len, found))} photos are too few to train on some and measure on others: every class "
            "needs two or more"
        )
    return Photos(*found)


def _halves(root: Path, valid: float | Path | None) -> Halves | None:
    if isinstance(valid, Path):
        need_folder(valid, ONE_PER_CLASS)
        return Halves(root, valid)
    try:
        return find_halves(root, alike_are_classes=valid is not None)
    except UnclearLayout as error:
        known = ", or give --valid 0.2 if they are all classes" if error.alike else ""
        raise UnclearLayout(
            f"{error}\n  Call the two train and valid, or say it: cnnrs train {root}/A --valid {root}/B{known}"
        ) from error


def _photos(folder: Path) -> cnnrs.ImageFolder:
    classes = [place.name for place in class_folders(folder)]
    try:
        if not classes:
            raise FileNotFoundError(f"Couldn't find any class folder in {folder}.")
        return cnnrs.ImageFolder(folder, classes=classes, skip_hidden=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder}: {error}\n  {ONE_PER_CLASS} is wanted") from error
