"""The page: what was measured, for the templates, which have the order in which somebody asks."""

from __future__ import annotations

import functools
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from cnnrs._util.units import duration
from cnnrs.app.report import headline, photos, several
from cnnrs.app.report.activation import NoMap, activation_maps
from cnnrs.app.report.charts import curves, rates, reliability
from cnnrs.app.report.evidence import ClassRow, Curve, Evidence
from cnnrs.classifier.finetune import described
from cnnrs.classifier.names import MISTAKES, REPORT, SUSPECTS
from cnnrs.training.metrics import Confusion, Loss, calibration, confusion

if TYPE_CHECKING:
    from cnnrs.classifier.run_folder import Run

# A matrix of more classes is unreadable: the most frequent confusions are listed instead.
MATRIX_CLASSES = 16
# From here on the names of the columns stand upright.
_UPRIGHT_CLASSES = 5
# More lines cannot be told apart.
_CURVES = 6
# Rows of a table that somebody may read; files hold all.
_ROWS = 500
_STAGES = {
    "scan": "listing the photos",
    "weights": "loading the network",
    "reading": "waiting for photos",
    "features": "computing features",
    "training": "training the head",
    "validation": "validating",
    "result": "final scores",
}


def write_report(
    path: Path,
    facts: Mapping[str, Any],
    evidence: Evidence,
    run: Run,
    stages: Mapping[str, float],
) -> None:
    """Write the page, and beside it the tables of mistakes and of suspect labels; a failure leaves older ones.

    Args:
        path: of the page, in the folder of the run.
        facts: what ``model.json`` says about data, weights, command and versions.
        evidence: what was measured.
        run: the classifier.
        stages: seconds by stage.
    """
    fill = functools.partial(_write, page(facts, evidence, run, stages, path))
    if evidence.several is None:
        photos.write_mistakes(mistakes_path(path), photos.mistakes_of(evidence))
    else:
        several.write_mistakes(mistakes_path(path), several.mistakes_of(evidence))
    if evidence.suspects:
        photos.write_suspects(path.with_name(SUSPECTS), evidence)
    # Names that are no UTF-8 are shown with escapes.
    photos.replaced(path, fill)


def mistakes_path(page: Path) -> Path:
    """The table beside a page: ``mistakes.csv`` beside the report of a run."""
    return page.with_name(MISTAKES if page.name == REPORT else f"{page.stem}-{MISTAKES}")


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def page(facts: Mapping[str, Any], evidence: Evidence, run: Run, stages: Mapping[str, float], path: Path) -> str:
    """The page as text: no script, no link to anything outside."""
    evidence = replace(evidence, read=run.read)
    folder = str(path.parent.resolve())
    with_cnnrs, _, without = run.recipe(folder, _example(evidence)).partition("\n\n# without cnnrs\n")
    own = _one_label(evidence, run) if evidence.several is None else several.context(evidence)
    template = _template("page.html" if evidence.several is None else "several.html")
    return template.render(
        name=Path(str(facts["data"])).name,
        facts=facts,
        run=run,
        evidence=evidence,
        tiles={**_parts(facts, evidence), **own.pop("tiles"), **_effort(evidence, stages)},
        total=len(evidence.labels),
        loss_curves=_loss_curves(evidence),
        accuracy_curves=_accuracy_curves(evidence),
        # Of two stages, whose rates fall to nothing in the end, the curves do not say what more epochs would.
        advice=None if (facts.get("finetune") or {}).get("kept") else headline.advice(evidence),
        mistakes_file=mistakes_path(path).name,
        **_threshold_curves(evidence),
        finetuned=None if facts.get("finetune") is None else described(facts["finetune"]),
        stages=_stages(stages),
        made=_made(facts, run),
        command=shlex.join(["cnnrs", "predict", folder, _example(evidence)]),
        with_cnnrs=with_cnnrs,
        without_cnnrs=without,
        **own,
    )


def _one_label(evidence: Evidence, run: Run) -> dict[str, Any]:
    """What ``page.html`` shows of classes that exclude each other."""
    found = confusion(evidence.labels, evidence.scores, evidence.classes)
    probabilities = evidence.scores.float().softmax(dim=1)
    dots = calibration(probabilities, evidence.labels)
    worst = photos.mistakes_of(evidence)
    maps, no_maps = _maps(evidence, run, worst)
    return {
        "figure": found.accuracy, "accuracy": found.accuracy, "right": int(found.matrix.diagonal().sum()),
        "interval": found.interval, "baseline": headline.baseline_of(found), "alarms": headline.alarms(found),
        "tiles": {
            "balanced accuracy": f"{found.balanced_accuracy:.1f} %", "macro F1": f"{found.macro_f1:.1f} %",
        },
        "classes": found.classes, "matrix": _matrix(found) if len(found.classes) <= MATRIX_CLASSES else None,
        "upright": len(found.classes) >= _UPRIGHT_CLASSES, "most_confused": found.most_confused(),
        "per_class": _per_class(headline.rows_of(found)), "wrong": worst[:_ROWS], "wrong_in_all": len(worst),
        "mistakes": photos.mistakes(evidence, worst, maps), "right_ones": photos.right(evidence, maps),
        "no_maps": no_maps, "suspects": photos.suspects(evidence), "suspects_file": SUSPECTS,
        "twins": photos.pairs(evidence), "twins_apart": sum(photos.apart(one) for one in evidence.twins),
        "reliability": reliability(dots),
        "sure": 100 * float(probabilities.max(dim=1).values.mean()), "distance": dots.error,
    }  # fmt: skip


def _template(name: str) -> Template:
    pages = Environment(
        loader=PackageLoader(__package__, ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    pages.filters.update(thousands=lambda number: f"{number:,}", duration=duration)
    pages.tests["finite"] = lambda value: value is not None and math.isfinite(value)
    return pages.get_template(name)


def _maps(evidence: Evidence, run: Run, worst: Sequence[Loss]) -> tuple[dict[str, bytes], str]:
    """What the network looks at, by path; or why that is not known."""
    wanted = photos.looked_at(evidence, worst)
    if not wanted:
        return {}, "the files of the photos are not known"
    try:
        maps = activation_maps(run, wanted)
    except NoMap as reason:
        return {}, str(reason)
    except Exception as error:
        # Networks are of all kinds: no picture of what one looks at must cost the report.
        return {}, f"{type(error).__name__}: {error}"
    return maps, "" if maps else "none of the photos could be read in time"


def _example(evidence: Evidence) -> str:
    return str(Path(evidence.paths[0]).resolve()) if evidence.paths else "photo.jpg"


def _parts(facts: Mapping[str, Any], evidence: Evidence) -> dict[str, str]:
    parts = evidence.parts or {"training": facts.get("train_photos", 0), "validation": facts.get("valid_photos", 0)}
    tiles = {f"{name} photos": f"{count:,}" for name, count in parts.items() if count}
    return {**tiles, "classes": f"{len(evidence.classes):,}"}


def _effort(evidence: Evidence, stages: Mapping[str, float]) -> dict[str, str]:
    best = {"best epoch": f"{evidence.best + 1} of {len(evidence.history)}"} if len(evidence.history) else {}
    return {**best, "time": duration(sum(stages.values()))}


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


def _per_class(rows: Sequence[ClassRow]) -> list[ClassRow]:
    """The hardest first where there are many."""
    if len(rows) <= MATRIX_CLASSES:
        return list(rows)
    return sorted(rows, key=lambda row: row.recall if row.photos else 101)


def _threshold_curves(evidence: Evidence) -> dict[str, Any]:
    """ROC and precision over recall, of the hardest classes where there are many."""

    def hardest(given: Sequence[Curve]) -> list[Curve]:
        return sorted(given, key=lambda curve: curve.area)[:_CURVES] if len(given) > _CURVES else list(given)

    roc, precision = hardest(evidence.roc), hardest(evidence.precision_recall)
    labels = evidence.labels
    hot = labels > 0 if labels.dim() == 2 else torch.nn.functional.one_hot(labels, len(evidence.classes))
    share_of = dict(zip(evidence.classes, hot.double().mean(dim=0).tolist(), strict=True))
    shares = [share_of.get(curve.name, 0.0) for curve in precision]
    guess = sum(shares) / len(shares) if shares else 0.0
    return {
        "roc": roc, "precision_recall": precision, "curves_in_all": len(evidence.roc) or len(evidence.precision_recall),
        "roc_chart": rates(
            "ROC: how many photos of a class are found, over how many others are taken for it",
            "others taken for it, %", "of the class found, %", roc, (0.0, 1.0),
        ),
        "precision_chart": rates(
            "Precision over recall", "of the class found, %", "rightly given, %", precision, (guess, guess)
        ),
    }  # fmt: skip


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
