"""The page: what was measured, for the template ``page.html``, which has the order in which somebody asks."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from torch import Tensor

from cnnrs._util.units import duration
from cnnrs.app.report.charts import curves, reliability
from cnnrs.training.history import History
from cnnrs.training.metrics import Confusion, Loss, calibration, confusion, top_losses

if TYPE_CHECKING:
    from cnnrs.classifier.run_folder import Run

# A matrix of more classes is unreadable: the most frequent confusions are listed instead.
MATRIX_CLASSES = 16
# From here on the names of the columns stand upright.
_UPRIGHT_CLASSES = 5
MISTAKES = 12
_THUMBNAIL = 260
_STAGES = {
    "scan": "listing the photos",
    "weights": "loading the network",
    "reading": "waiting for photos",
    "features": "computing features",
    "training": "training the head",
    "validation": "validating",
    "result": "final scores",
}


@dataclass(frozen=True)
class Evidence:
    """What the validation photos showed.

    Attributes:
        history: losses and accuracies of the epochs.
        best: epoch whose weights were kept, counted from 0.
        scores: (N, C) outputs before softmax, of the best epoch.
        labels: (N,) true class numbers.
        paths: N photos, None where unknown.
        classes: C names.
    """

    history: History
    best: int
    scores: Tensor
    labels: Tensor
    paths: list[str] | None
    classes: list[str]


def write_report(
    path: Path,
    facts: Mapping[str, Any],
    evidence: Evidence,
    run: Run,
    stages: Mapping[str, float],
    skipped: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the page; a failure leaves an older one as it was.

    Args:
        path: ``report.html``.
        facts: what ``model.json`` says about data, weights, command and versions.
        evidence: what the validation photos showed.
        run: the classifier.
        stages: seconds by stage.
        skipped: (path, reason) of photos that were left out.
    """
    partial = path.with_name(f"{path.name}.partial")
    # Names that are no UTF-8 are shown with escapes.
    partial.write_text(page(facts, evidence, run, stages, skipped), encoding="utf-8", errors="backslashreplace")
    os.replace(partial, path)


def page(
    facts: Mapping[str, Any],
    evidence: Evidence,
    run: Run,
    stages: Mapping[str, float],
    skipped: Sequence[tuple[str, str]] = (),
) -> str:
    """The page as text: no script, no link to anything outside."""
    found = confusion(evidence.labels, evidence.scores, evidence.classes)
    right, total = int(found.matrix.diagonal().sum()), int(found.matrix.sum())
    worst = top_losses(evidence.scores, evidence.labels, evidence.paths, evidence.classes, MISTAKES, wrong_only=True)
    probabilities = evidence.scores.float().softmax(dim=1)
    dots = calibration(probabilities, evidence.labels)
    return _template().render(
        name=Path(str(facts["data"])).name,
        facts=facts,
        run=run,
        classes=found.classes,
        accuracy=found.accuracy,
        right=right,
        total=total,
        luck=_luck(right, total),
        tiles=_tiles(facts, evidence, stages),
        loss_curves=_loss_curves(evidence),
        accuracy_curves=_accuracy_curves(evidence),
        advice=_advice(evidence),
        matrix=_matrix(found) if len(found.classes) <= MATRIX_CLASSES else None,
        upright=len(found.classes) >= _UPRIGHT_CLASSES,
        most_confused=found.most_confused(),
        per_class=_per_class(found),
        wrong=total - right,
        mistakes=[_mistake(loss) for loss in worst],
        reliability=reliability(dots),
        sure=100 * float(probabilities.max(dim=1).values.mean()),
        distance=dots.error,
        stages=_stages(stages),
        skipped=skipped,
        made=_made(facts, run),
    )


def _template() -> Template:
    pages = Environment(
        loader=PackageLoader(__package__, ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    pages.filters.update(thousands=lambda number: f"{number:,}", duration=duration)
    return pages.get_template("page.html")


def _luck(right: int, total: int) -> tuple[float, float]:
    """How far the percentage depends on which photos were held back: Wilson's interval of 95 %."""
    share, z = right / total, 1.96
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return 100 * (middle - half), 100 * (middle + half)


def _tiles(facts: Mapping[str, Any], evidence: Evidence, stages: Mapping[str, float]) -> dict[str, str]:
    return {
        "training photos": f"{facts['train_photos']:,}",
        "validation photos": f"{facts['valid_photos']:,}",
        "classes": f"{len(evidence.classes):,}",
        "best epoch": f"{evidence.best + 1} of {len(evidence.history)}",
        "time": duration(sum(stages.values())),
    }


def _loss_curves(evidence: Evidence) -> str:
    history = evidence.history
    return curves(
        "Loss per photo over the epochs", "loss per photo",
        [("training", "train", history.train_losses), ("validation", "valid", history.val_losses)],
        evidence.best, 0.0, None,
    )  # fmt: skip


def _accuracy_curves(evidence: Evidence) -> str:
    history = evidence.history
    return curves(
        "Accuracy in percent over the epochs", "accuracy, %",
        [("training", "train", history.train_accuracy), ("validation", "valid", history.val_accuracy)],
        evidence.best, 90.0, 100.0,
    )  # fmt: skip


def _advice(evidence: Evidence) -> str | None:
    """What the curves say, for those who see such curves for the first time."""
    history, best = evidence.history, evidence.best
    last = len(history) - 1
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


def _matrix(found: Confusion) -> list[tuple[str, list[tuple[int, float]]]]:
    """Class and cells of each row: how many photos, and how strong the colour is, 0 to 1."""
    rows = found.matrix.tolist()
    return [
        (name, [(count, _strength(count, sum(row))) for count in row])
        for name, row in zip(found.classes, rows, strict=True)
    ]


def _strength(count: int, total: int) -> float:
    # Few photos in a cell must still be told from none.
    return 0.08 + 0.87 * (count / total) if count else 0.0


def _per_class(found: Confusion) -> list[tuple[str, int, float | None, float | None]]:
    """Name, photos, recall and precision in percent; the hardest first where there are many."""
    recall, precision, support = found.recall, found.precision, found.support
    order = list(range(len(found.classes)))
    if len(order) > MATRIX_CLASSES:
        order.sort(key=lambda i: recall[i] if support[i] else 101)
    return [(found.classes[i], support[i], _known(recall[i]), _known(precision[i])) for i in order]


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _mistake(loss: Loss) -> dict[str, Any]:
    """A photo that was taken for another class, as the template wants it."""
    return {
        "loss": loss,
        "file": Path(loss.path).name if loss.path else f"row {loss.index}",
        "thumbnail": _thumbnail(loss.path),
    }


def _thumbnail(path: str | None) -> str | None:
    """A small JPEG in base64; None where there is no photo any more."""
    from PIL import Image

    if path is None:
        return None
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
            image.thumbnail((_THUMBNAIL, _THUMBNAIL))
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=80)
    except (OSError, ValueError):
        # Moved or deleted since its features were computed, or of a name that this locale cannot spell.
        return None
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _stages(stages: Mapping[str, float]) -> list[tuple[str, float, float]]:
    """Name, share and seconds of each stage that is worth showing."""
    total = sum(stages.values()) or 1.0
    # What is too short to be seen is one item, except for what everybody asks about.
    shown = {
        _STAGES.get(name, name): seconds for name, seconds in stages.items()
        if seconds >= 0.01 * total or name in ("reading", "features", "training")
    }  # fmt: skip
    if (rest := total - sum(shown.values())) > 0:
        shown["the rest"] = rest
    return [(name, seconds / total, seconds) for name, seconds in shown.items()]


def _made(facts: Mapping[str, Any], run: Run) -> dict[str, Any]:
    shape = run.preprocessing
    return {
        "date": str(facts["date"]).replace("T", " "),
        "photos": facts["data"],
        "network": f"{run.backbone}, head {run.head}",
        "weights": facts["weights"],
        "preprocessing": f"shorter side to {shape.resize} ({shape.interpolation}), the middle "
        f"{shape.crop} x {shape.crop}, mean {_numbers(shape.mean)}, deviation {_numbers(shape.std)}",
        "seed": facts["seed"],
        "device": facts["device"],
        **facts["versions"],
    }


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
