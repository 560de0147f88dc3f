"""The photos of a report: small pictures of mistakes, of suspects, of pairs, and of what is right."""

from __future__ import annotations

import base64
import csv
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnnrs.app.report.evidence import Evidence, Neighbour, Twins
from cnnrs.classifier.names import PARTIAL
from cnnrs.data.read_options import ReadOptions
from cnnrs.training.metrics import Loss, top_losses

MISTAKES = 12
SUSPECTS = 24
PAIRS = 12
#: Photos that are right, of each class and in all.
RIGHT_OF_CLASS, RIGHT = 4, 40
_LARGE, _SMALL = 260, 120
_NEIGHBOURS = 3


@dataclass(frozen=True)
class Picture:
    """A photo as the page shows it.

    Attributes:
        path: the file, or the row where it is not known.
        file: its name.
        data: a small JPEG in base64; None where there is no photo any more.
    """

    path: str
    file: str
    data: str | None


def picture(path: str | None, read: Mapping[str, Any], side: int = _LARGE, row: int = 0) -> Picture:
    """A photo, read as a loader with the arguments ``read`` does it, at most ``side`` pixels high and wide."""
    if path is None:
        return Picture(f"row {row}", f"row {row}", None)
    return Picture(path, Path(path).name, _thumbnail(path, read, side))


def mistakes_of(evidence: Evidence) -> list[Loss]:
    """What was taken for another class, what it was surest about first."""
    scores, labels = evidence.scores, evidence.labels
    wrong = top_losses(scores, labels, evidence.paths, evidence.classes, len(scores), wrong_only=True)
    return sorted(wrong, key=lambda one: -one.probability)


def right_ones(evidence: Evidence) -> dict[str, list[int]]:
    """Rows that are right by class, a few of each, from the surest to the least sure."""
    probabilities, taken = evidence.scores.float().softmax(dim=1).max(dim=1)
    number = len(evidence.classes)
    each = min(RIGHT_OF_CLASS, max(1, RIGHT // number))
    found = {}
    for label, name in enumerate(evidence.classes[:RIGHT]):
        good = ((evidence.labels == label) & (taken == label)).nonzero().squeeze(1)
        rows: list[int] = good[probabilities[good].argsort(descending=True, stable=True)].tolist()
        last = max(min(each, len(rows)) - 1, 1)
        if rows:
            found[name] = [rows[i * (len(rows) - 1) // last] for i in range(min(each, len(rows)))]
    return found


def looked_at(evidence: Evidence, worst: Sequence[Loss]) -> list[tuple[str, int]]:
    """(path, class number) of the photos for which the page says what the network looks at."""
    if evidence.paths is None:
        return []
    numbers = {name: number for number, name in enumerate(evidence.classes)}
    wanted = [(one.path, numbers[one.predicted]) for one in worst[:MISTAKES] if one.path is not None]
    for name, rows in right_ones(evidence).items():
        wanted += [(evidence.paths[row], numbers[name]) for row in rows]
    return wanted


def mistakes(evidence: Evidence, worst: Sequence[Loss], maps: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """The first ones with their photos, what speaks for the wrong class, and what they look like in training."""
    return [
        {
            "loss": one, "picture": picture(one.path, evidence.read, row=one.index),
            "map": _inline(maps.get(one.path or "")),
            "neighbours": _neighbours(evidence.neighbours.get(one.index, ()), evidence.read),
        }
        for one in worst[:MISTAKES]
    ]  # fmt: skip


def right(evidence: Evidence, maps: Mapping[str, bytes]) -> list[tuple[str, list[tuple[Picture, str]]]]:
    """Class, and its photos that are right with what speaks for it."""
    paths = evidence.paths
    if paths is None or not maps:
        return []
    listed = []
    for name, rows in right_ones(evidence).items():
        shown = [(Picture(paths[r], Path(paths[r]).name, None), _inline(maps.get(paths[r]))) for r in rows]
        listed.append((name, [(one, data) for one, data in shown if data is not None]))
    return [(name, shown) for name, shown in listed if shown]


def suspects(evidence: Evidence) -> list[tuple[Any, Picture]]:
    """The most suspicious labels with their photos."""
    return [(one, picture(one.path, evidence.read, row=one.row)) for one in evidence.suspects[:SUSPECTS]]


def pairs(evidence: Evidence) -> list[tuple[Twins, Picture, Picture]]:
    """Pairs that are nearly the same: those of two classes, then those of two parts, then the most similar."""

    def harm(one: Twins) -> tuple[bool, bool, float]:
        return one.labels[0] == one.labels[1], not apart(one), -one.similarity

    worst = sorted(evidence.twins, key=harm)[:PAIRS]
    shown = [[picture(path, evidence.read, _SMALL) for path in one.paths] for one in worst]
    return [(one, first, second) for one, (first, second) in zip(worst, shown, strict=True)]


def apart(one: Twins) -> bool:
    """Whether the two are in different parts of the data."""
    return one.parts is not None and one.parts[0] != one.parts[1]


def _neighbours(found: Sequence[Neighbour], read: Mapping[str, Any]) -> list[tuple[Neighbour, Picture]]:
    return [(one, picture(one.path, read, _SMALL)) for one in found[:_NEIGHBOURS]]


def _inline(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode("ascii")


def _thumbnail(path: str, read: Mapping[str, Any], side: int) -> str | None:
    from PIL import ImageOps

    options = ReadOptions(**read)
    try:
        image = options.reader(path)
        if options.exif:
            image = ImageOps.exif_transpose(image)
        image.thumbnail((side, side))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=80)
    except (OSError, ValueError):
        # Moved or deleted since its features were computed, or of a name that this locale cannot spell.
        return None
    return _inline(buffer.getvalue())


# -- tables for spreadsheets ---------------------------------------------------------------------------------


def write_mistakes(path: Path, worst: Sequence[Loss]) -> None:
    """All photos that were taken for another class, names as they are."""
    rows = (
        (one.path or f"row {one.index}", one.target, one.predicted, f"{one.probability:.6f}", f"{one.loss:.6g}")
        for one in worst
    )
    write_table(path, ("path", "label", "predicted", "probability", "loss"), rows)


def write_suspects(path: Path, evidence: Evidence) -> None:
    """All labels that may be wrong, names as they are."""
    rows = (
        (one.path or f"row {one.row}", one.given, one.proposed, f"{one.probability:.6f}", f"{one.agreement:.4f}")
        for one in evidence.suspects
    )
    write_table(path, ("path", "label", "proposed", "probability_of_label", "agreement"), rows)


def write_table(path: Path, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A CSV file with names as they are, whole or not at all."""

    def fill(partial: Path) -> None:
        with open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(head)
            writer.writerows(rows)

    replaced(path, fill)


def replaced(path: Path, fill: Callable[[Path], None]) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f"{path.name}{PARTIAL}")
    try:
        fill(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
