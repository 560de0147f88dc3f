"""The second stage of a training: photos instead of stored features, and what is known of the network afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import Subset

from cnnrs._util.devices import is_out_of_memory
from cnnrs.app.jobs import deal
from cnnrs.app.jobs.clock import Clock
from cnnrs.app.jobs.features import AT_A_TIME
from cnnrs.app.jobs.measure import Measured, in_folds, teller
from cnnrs.app.jobs.photos import Part, Photos
from cnnrs.classifier.finetune import RIGID, Loader, Tuned, announced, described, fine_tune, is_unfinished
from cnnrs.classifier.last_block import Which
from cnnrs.classifier.run_folder import Run
from cnnrs.classifier.train_head import HeadOptions, scores_of
from cnnrs.data.loader import DataLoader
from cnnrs.features.features import Features
from cnnrs.features.preconv import preconv
from cnnrs.training.history import History
from cnnrs.training.several import thresholds_of

# What a run leaves out of memory while it computes the features again, and takes away afterwards.
_AGAIN = "fine-tuned-"


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


def check_parts(
    parts: Sequence[Part | None], groups: Sequence[int | str], paths: Sequence[str], test: float | Path | None
) -> None:
    """That some photos measure and have no other say.

    Args:
        parts: of each photo, where folders say it.
        groups: of each photo, by any name; "" is a group of its own.
        paths: of the photos.
        test: share or folder of the photos that measure.

    Raises:
        ValueError: they are so few that all measure, in folds.
    """
    known = [path if group == "" else group for group, path in zip(groups, paths, strict=True)]
    if in_folds(parts, known, test):
        raise ValueError(
            f"--finetune: {len(parts):,} photos in {len(set(known)):,} groups are few ({deal.FEW:,} and "
            f"{deal.FEW_GROUPS:,} at least): all of them would measure, in folds, and each fold would have to train "
            "the network anew; say what measures: --test 0.2, or a folder"
        )


def is_left_over(card: Mapping[str, Any], root: Path, backbone: str, head: str) -> bool:
    """Whether a run is the first stage of just such a training, whose second was interrupted."""
    same = (card.get("data"), card.get("backbone")) == (str(root.resolve()), backbone)
    return same and head in (card.get("head"), "auto") and is_unfinished(card)


def advice(error: BaseException) -> str:
    """What helps, where that is known."""
    return "; a smaller --batch-size takes less memory" if is_out_of_memory(error) else ""


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


@contextmanager
def second_stage(
    which: Which, run: Run, head: str, rows: Features, measured: Measured, photos: Photos, numbers: Sequence[int],
    options: HeadOptions, clock: Clock, say: Callable[[str], None], features: Path, threads: int | None, verbose: bool,
) -> Iterator[Second]:  # fmt: skip
    """Fine-tune a network, and compute again what depends on it; all stays as it was where that is no better.

    What the block does with it belongs to the stage: where an exception or Ctrl-C ends the block, the network is that
    of the first stage again.

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
        features: folder in which the features of the fine-tuned network lie while the block runs.
        threads: that read photos; None: all cores.
        verbose: whether bars are shown.
    """
    read: Loader = functools.partial(DataLoader, num_workers=threads, **run.read)
    # Without photos that the first stage could not read.
    images = Subset(photos.data, list(numbers))
    split, first = measured.split, measured.trained
    with clock.stage("fine-tuning"):
        tuned = fine_tune(
            run.model, head, first.kind, which, images, rows.labels, split.train, split.valid, options, read,
            lambda plan: say(announced(plan, len(split.train))), teller(say)("fine-tuning"), verbose,
        )  # fmt: skip
    try:
        say(described(tuned.facts()))
        if not tuned.kept:
            yield Second(tuned, rows, measured)
            return
        features.mkdir(parents=True, exist_ok=True)
        # Windows keeps files that are mapped.
        with TemporaryDirectory(prefix=_AGAIN, dir=features, ignore_cleanup_errors=True) as folder:
            with clock.stage("features"):
                again = _features(run, read(images, batch_size=AT_A_TIME), options.device, Path(folder), verbose)
            with clock.stage("result"):
                second = _measured_again(run, again, measured, tuned)
            yield Second(tuned, again, second)
    except BaseException:
        tuned.undo()
        raise


def _features(run: Run, loader: DataLoader[Any], device: torch.device, folder: Path, verbose: bool) -> Features:
    """As those of the first stage: where the network was trained, and not in memory."""
    body, _ = run.halves()
    run.model.to(device)
    try:
        return preconv(loader, body, out=folder / "all", verbose=verbose)
    finally:
        run.model.cpu()


def _measured_again(run: Run, rows: Features, measured: Measured, tuned: Tuned) -> Measured:
    first, chose = measured.trained, measured.split.valid
    _, head = run.halves()
    trained = replace(
        first, module=head, history=_joined(first.history, tuned.history), best=len(first.history) + tuned.best
    )
    limits = measured.thresholds
    if limits is not None:
        limits = thresholds_of(scores_of(head, rows.features, chose), rows.labels[chose])
    return replace(measured, trained=trained, scores=scores_of(head, rows.features, measured.rows), thresholds=limits)


def _joined(first: History, second: History) -> History:
    """The epochs of both stages, one after the other."""
    both = History()
    for part in (first, second):
        columns = (part.train_losses, part.train_accuracy, part.val_losses, part.val_accuracy)
        for loss, accuracy, held_loss, held_accuracy in zip(*columns, strict=True):
            both.append(train=(loss, accuracy), valid=(held_loss, held_accuracy))
    return both
