"""What is said first: how good it is, how certain that is, compared with what, and what is alarming."""

from __future__ import annotations

import math

from cnnrs._util.text import shown
from cnnrs.app.report.evidence import ClassRow, Evidence
from cnnrs.training.metrics import Confusion, wilson
from cnnrs.training.several import SeveralLabels

# Names in one sentence.
_MOST_NAMES = 4


def baseline_of(found: Confusion) -> tuple[str, float]:
    """The most frequent class, and how much always naming it gets right, in percent."""
    support = found.support
    return found.classes[max(range(len(support)), key=support.__getitem__)], found.baseline


def rows_of(found: Confusion) -> list[ClassRow]:
    """The classes in numbers."""
    right, support, taken = found.matrix.diagonal().tolist(), found.support, found.matrix.sum(dim=0).tolist()
    return [
        ClassRow(
            name, support[i], found.recall[i], found.precision[i], wilson(right[i], support[i]),
            wilson(right[i], taken[i]),
        )
        for i, name in enumerate(found.classes)
    ]  # fmt: skip


def alarms(found: Confusion) -> list[str]:
    """Sentences for a result that must not be taken for a good one."""
    said = []
    name, share = baseline_of(found)
    low, _ = found.interval
    if found.accuracy <= share:
        said.append(
            f"No better than always saying {shown(name)}, which is right for {share:.1f} %: nothing was learned."
        )
    elif low <= share:
        said.append(
            f"May be no better than always saying {shown(name)}, which is right for {share:.1f} %: with so few photos "
            "the two cannot be told apart."
        )
    missed = [shown(name) for name in found.missed]
    if missed:
        names = ", ".join(missed[:_MOST_NAMES]) + (", ..." if len(missed) > _MOST_NAMES else "")
        many = f"{len(missed)} classes are" if len(missed) > 1 else "A class is"
        said.append(f"{many} missed: not one photo of {names} is recognised.")
    return said


def alarms_of_several(found: SeveralLabels) -> list[str]:
    """The same of several labels per photo."""
    return [f"{shown(one.name)} was found on none of the {one.samples:,} photos that have it." for one in found.missed]


def advice(evidence: Evidence) -> str | None:
    """What the curves say, for those who see such curves for the first time."""
    history, best = evidence.history, evidence.best
    last = len(history) - 1
    if last < 0 or math.isnan(history.val_losses[last]):
        return None
    rising = history.val_losses[last] > 1.1 * min(history.val_losses) and last > best
    gap = history.train_accuracy[last] - history.val_accuracy[last]
    if rising:
        return (
            "The validation loss has begun to rise: more epochs would learn the training photos by heart. "
            "More photos, or a simpler head, would help."
        )
    if gap > 5:
        return (
            f"The training photos are recognised {gap:.0f} points better than the validation photos: "
            "more photos would help."
        )
    if best == last and history.val_accuracy[last] > history.val_accuracy[last // 2]:
        return "The last epoch was the best: more epochs may still improve it."
    return None
