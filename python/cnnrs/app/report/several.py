"""What the page shows of photos that may have several labels each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnnrs.app.report.evidence import Evidence
from cnnrs.app.report.headline import alarms_of_several
from cnnrs.app.report.photos import SUSPECTS, picture, write_table


@dataclass(frozen=True)
class WrongLabel:
    """A label that was not seen on a photo, or seen where it is not.

    Attributes:
        row: of the scores.
        path: the photo, None where unknown.
        name: of the class.
        is_there: whether the photo has the label.
        probability: that it has, 0 to 1.
    """

    row: int
    path: str | None
    name: str
    is_there: bool
    probability: float


def mistakes_of(evidence: Evidence) -> list[WrongLabel]:
    """All labels that are wrong, what it was surest about first."""
    assert evidence.several is not None
    probabilities, there = evidence.scores.float().sigmoid(), evidence.labels > 0
    limits = probabilities.new_tensor([one.threshold for one in evidence.several.classes])
    # How far beyond the threshold, as a share of what there is on that side.
    beyond = (probabilities - limits) / (limits * (probabilities < limits) + (1 - limits) * (probabilities >= limits))
    wrong = ((probabilities >= limits) != there).nonzero()
    order = beyond[wrong[:, 0], wrong[:, 1]].abs().argsort(descending=True, stable=True)
    return [
        WrongLabel(
            row, None if evidence.paths is None else evidence.paths[row], evidence.classes[number],
            bool(there[row, number]), float(probabilities[row, number]),
        )
        for row, number in wrong[order].tolist()
    ]  # fmt: skip


def context(evidence: Evidence) -> dict[str, Any]:
    """What ``several.html`` shows."""
    found = evidence.several
    assert found is not None
    wrong = mistakes_of(evidence)
    known = [one.samples / max(len(evidence.labels), 1) for one in found.classes if one.samples]
    return {
        "figure": found.mean_average_precision, "several": found,
        "chance": 100 * sum(known) / len(known) if known else 0.0,
        "alarms": alarms_of_several(found),
        "tiles": {"macro F1": f"{found.macro_f1:.1f} %", "all labels right": f"{found.exact:.1f} %"},
        "wrong_in_all": len(wrong), "no_maps": "",
        "mistakes": [(one, picture(one.path, evidence.read, row=one.row)) for one in wrong[:SUSPECTS]],
    }  # fmt: skip


def write_mistakes(path: Path, wrong: list[WrongLabel]) -> None:
    """All labels that are wrong, names as they are."""
    rows = (
        (one.path or f"row {one.row}", one.name, "there" if one.is_there else "not there", f"{one.probability:.6f}")
        for one in wrong
    )
    write_table(path, ("path", "label", "is", "probability"), rows)
