"""A trained classifier on labelled photos that it has never seen."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from cnnrs._util.text import shown
from cnnrs.app.jobs.clock import Clock, typed
from cnnrs.app.jobs.evidence import of_scores
from cnnrs.app.jobs.judge import judge
from cnnrs.app.jobs.photos import Columns, find_labelled, name_of
from cnnrs.app.report import write_report
from cnnrs.classifier.names import EVALUATION
from cnnrs.classifier.run_folder import Run, load_run
from cnnrs.data.image_list import ImageList
from cnnrs.data.loader import DataLoader
from cnnrs.features.preconv import preconv
from cnnrs.training.metrics import Confusion
from cnnrs.training.several import SeveralLabels

Place = str | os.PathLike[str]


@dataclass(frozen=True)
class Evaluation:
    """How good a classifier is on labelled photos.

    Attributes:
        facts: the numbers, as ``cnnrs evaluate --json`` prints them.
        warnings: what has to be said beside them.
        confusion: which class was taken for which; None for several labels per photo.
        several: of several labels per photo; None otherwise.
        report: the page that was written.
    """

    facts: dict[str, Any]
    warnings: list[str]
    confusion: Confusion | None
    several: SeveralLabels | None
    report: Path | None

    def __str__(self) -> str:
        return str(self.confusion if self.confusion is not None else self.several)


def evaluate(
    run: Run | Place,
    data: Place,
    *,
    report: Place | None = None,
    path_column: str | None = None,
    label_column: str | None = None,
    separator: str | None = None,
    batch_size: int = 32,
    threads: int | None = None,
    skip_bad: bool = False,
    verbose: bool = True,
) -> Evaluation:
    """Measure a classifier on new labelled photos: ``cnnrs evaluate``.

    Args:
        run: a folder that :func:`cnnrs.train` wrote, or what :func:`cnnrs.load_run` returned.
        data: one folder per class, called as the classifier's, or a table of paths and labels (.csv). Classes may be
            missing.
        report: the page to write; None: ``evaluation-<name of data>.html`` in the run folder, none for an opened run.
        path_column: of a table; None: by the usual names.
        label_column: likewise.
        separator: what stands between the labels of a photo that has several.
        batch_size: photos at a time.
        threads: that read photos; None: all cores.
        skip_bad: leave out photos that cannot be read.
        verbose: whether bars are shown.

    Returns:
        The numbers; prints as a table of which class was taken for which.

    Raises:
        FileNotFoundError: no run, or no photos.
        ValueError: a class that the classifier does not know; a photo cannot be read.
    """
    clock = Clock()
    opened = run if isinstance(run, Run) else load_run(run)
    root = Path(data)
    columns = Columns(path_column, label_column, separator)
    with clock.stage("scan"):
        photos = _as_known(find_labelled(root, columns if columns != Columns() else None), opened, root)
    photos.transform = opened.transform
    photos._join_transforms()
    loader = DataLoader(
        photos, batch_size=batch_size, num_workers=threads, on_error="skip" if skip_bad else "raise", **opened.read
    )
    with clock.stage("features"):
        rows = preconv(loader, opened.model, verbose=verbose)
    scores = rows.features.float()
    limits = opened.facts.get("thresholds")
    verdict = judge(scores, rows.labels, opened.classes, None if limits is None else torch.tensor(limits))
    warnings = list(verdict.warnings)
    if opened.facts.get("data") == str(root.resolve()):
        warnings.append("these are the photos that it was trained on: new ones will do worse")
    facts = {
        **verdict.facts, "measured": "new photos", "measured_photos": len(rows), "untouched": True,
        "data": str(root.resolve()), "weights": opened.facts.get("weights"), "seed": opened.facts.get("seed"),
        "command": typed("cnnrs.evaluate"), "device": "cpu",
        "date": datetime.now().astimezone().isoformat(timespec="seconds"), "versions": opened.facts.get("versions", {}),
        "warnings": warnings,
    }  # fmt: skip
    page = _page(report, run, root)
    if page is not None:
        evidence = of_scores(scores, rows.labels, rows.paths, opened.classes, verdict, loader.errors)
        write_report(page, facts, evidence, opened, clock.stages)
    return Evaluation(facts, warnings, verdict.confusion, verdict.several, page)


def _names(label: Any, names: Sequence[str]) -> list[str]:
    return [names[one] for one in (label if isinstance(label, tuple) else (label,))]


def _page(report: Place | None, run: Run | Place, root: Path) -> Path | None:
    if report is not None:
        return Path(report)
    return None if isinstance(run, Run) else Path(run) / f"{EVALUATION}{name_of(root)}.html"


def _as_known(photos: ImageList, run: Run, root: Path) -> ImageList:
    """The same photos with the classifier's class numbers.

    Raises:
        ValueError: one of their classes is none of the classifier's, or they have several labels and it knows one.
    """
    classes = run.classes
    if photos.multilabel and not run.multilabel:
        raise ValueError(f"{root} has several labels per photo, the classifier was trained to name one")
    if unknown := [name for name in photos.classes if name not in classes]:
        raise ValueError(
            f"{root} has the classes {', '.join(map(shown, unknown[:5]))}, the classifier knows "
            f"{', '.join(map(shown, classes[:20]))}"
        )
    names = photos.classes
    return ImageList(
        [(path, _names(label, names) if run.multilabel else names[label]) for path, label in photos.samples],
        classes=classes,
    )
