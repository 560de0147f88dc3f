"""Where training writes: the run folder, and the features beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnnrs.classifier.card import read_card
from cnnrs.classifier.names import CARD, PARTIAL, is_run_file


def default_out(root: Path) -> Path:
    """The run folder nobody has named: below the current folder, or beside the photos when that is among them."""
    inside = Path.cwd().is_relative_to(root.resolve())
    return (Path(os.path.relpath(root.resolve().parent)) if inside else Path()) / "runs" / root.resolve().name


def check(places_of_photos: Sequence[Path], out: Path, features: Path) -> dict[str, Any] | None:
    """That the run can be written, to a place that loses nothing and holds no photos; the card of a run there.

    Raises:
        FileExistsError: there is something else.
        PermissionError: it cannot be written to.
        ValueError: it is inside a folder of photos, and would be a class the next time.
    """
    there = _check_out(out)
    for option, place in (("--out", out), ("--features", features)):
        for photos in places_of_photos:
            if photos.is_dir() and place.resolve().is_relative_to(photos.resolve()):
                raise ValueError(
                    f"{option} {place} is inside {photos}, and would count as photos of a class the next time; "
                    "give a folder elsewhere"
                )
    return there


def _check_out(out: Path) -> dict[str, Any] | None:
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"--out {out} is a file; a folder is wanted")
    above = next(place for place in (out.absolute(), *out.absolute().parents) if place.exists())
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"--out {out}: {above} cannot be written to; give another folder")
    if not out.is_dir():
        return None
    try:
        return read_card(out)
    except (ValueError, FileNotFoundError):
        if not _was_interrupted(out):
            raise FileExistsError(
                f"--out {out} holds something else than a run; give a new folder, for example {out}-run"
            ) from None
        return None


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
