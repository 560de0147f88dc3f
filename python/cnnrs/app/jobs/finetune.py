"""The second stage of a training: photos instead of stored features, and what is known of the network afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import Subset

from cnnrs.app.jobs.clock import Clock
from cnnrs.app.jobs.measure import Measured, teller
from cnnrs.app.jobs.photos import Photos
from cnnrs.classifier.finetune import RIGID, Loader, Tuned, announced, described, fine_tune
from cnnrs.classifier.last_block import Which
from cnnrs.classifier.run_folder import Run
from cnnrs.classifier.train_head import HeadOptions, loss_of, right_of, scores_of
from cnnrs.data.loader import DataLoader
from cnnrs.features.features import Features
from cnnrs.features.preconv import preconv
from cnnrs.training.history import History
from cnnrs.training.several import thresholds_of

_FEW = (
    "--finetune: so few photos all measure, in folds, and each fold would have to train the network anew; say what "
    "measures: --test 0.2, or a folder"
)


def check_head(head: str) -> None:
    """That a head can go on learning together with the network.

    Raises:
        ValueError: it cannot.
    """
    if head in RIGID:
        raise ValueError(
            f"--finetune: head {head} keeps photos that vote, and has nothing that could be trained together with the "
            "network; take linear, mlp, logistic or ridge"
        )


def check_parts(folds: bool) -> None:
    """That some photos measure and have no other say.

    Raises:
        ValueError: there are folds.
    """
    if folds:
        raise ValueError(_FEW)


@dataclass(frozen=True)
class Second:
    """What the second stage has left.

    Attributes:
        tuned: what came of it.
        rows: features of all photos by the network that is kept.
        measured: that network, measured by the photos that the first stage was measured with.
    """

    tuned: Tuned
    rows: Features
    measured: Measured


def second_stage(
    which: Which, run: Run, head: str, rows: Features, measured: Measured, photos: Photos, numbers: Sequence[int],
    options: HeadOptions, clock: Clock, say: Callable[[str], None], threads: int | None, verbose: bool,
) -> Second:  # fmt: skip
    """Fine-tune a network, and compute again what depends on it; all stays as it was where that is no better.

    Args:
        which: "last" or "all".
        run: of the first stage; its model is changed if it becomes better.
        head: path of the head in it.
        rows: features of all photos by the first stage.
        measured: the first stage.
        photos: with the transform that belongs to the network.
        numbers: of the photo of each row.
        options: of the first stage.
        clock: gets the seconds.
        say: hears of plan, epochs and outcome.
        threads: that read photos; None: all cores.
        verbose: whether bars are shown.
    """
    read = functools.partial(DataLoader, num_workers=threads, **run.read)
    # Without photos that the first stage could not read.
    images = Subset(photos.data, list(numbers))
    split, first = measured.split, measured.trained
    with clock.stage("fine-tuning"):
        tuned = fine_tune(
            run.model, head, first.kind, which, images, rows.labels, split.train, split.valid, options, read,
            lambda plan: say(announced(plan, len(split.train))), teller(say)("fine-tuning"), verbose,
        )  # fmt: skip
    say(described(tuned.facts()))
    if not tuned.kept:
        return Second(tuned, rows, measured)
    try:
        return _measured_again(run, rows, measured, tuned, images, options, clock, read, verbose)
    except BaseException:
        tuned.undo()
        raise


def _measured_again(
    run: Run, rows: Features, measured: Measured, tuned: Tuned, images: Subset[Any], options: HeadOptions, clock: Clock,
    read: Loader, verbose: bool,
) -> Second:  # fmt: skip
    split, first = measured.split, measured.trained
    with clock.stage("features"):
        body, head = run.halves()
        again = preconv(read(images, batch_size=options.batch_size), body, verbose=verbose)
    with clock.stage("result"):
        chose, labels = scores_of(head, again.features, split.valid), rows.labels[split.valid]
        trained = replace(
            first, module=head, history=_joined(first.history, tuned.history),
            best=len(first.history) + tuned.best, loss=loss_of(chose, labels),
            accuracy=100 * float(right_of(chose, labels).mean()),
        )  # fmt: skip
        limits = None if measured.thresholds is None else thresholds_of(chose, labels)
        scores = scores_of(head, again.features, measured.rows)
    return Second(tuned, again, replace(measured, trained=trained, scores=scores, thresholds=limits))


def _joined(first: History, second: History) -> History:
    """The epochs of both stages, one after the other."""
    both = History()
    for part in (first, second):
        columns = (part.train_losses, part.train_accuracy, part.val_losses, part.val_accuracy)
        for loss, accuracy, held_loss, held_accuracy in zip(*columns, strict=True):
            both.append(train=(loss, accuracy), valid=(held_loss, held_accuracy))
    return both
