"""The second stage: a network whose head is trained goes on learning from photos, its last block or all of it."""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from cnnrs._util.units import about
from cnnrs.classifier.last_block import Which, is_in, thaw
from cnnrs.classifier.train_head import HeadOptions, Tell, balanced, rate_of
from cnnrs.data.loader import DataLoader
from cnnrs.errors import NonFiniteLossError
from cnnrs.layers import unfreeze
from cnnrs.training.fit import fit
from cnnrs.training.history import History

#: Heads without anything that a gradient could change.
RIGID = ("knn",)

# A pass costs minutes where one of the first stage costs a second: as few as it takes for so many steps, within limits.
_STEPS, _EPOCHS = 200, (3, 10)
# Less than this between two losses is rounding: a tie.
_LEAST_GAIN = 1e-4
# The head has arrived where its own rate leads; a tenth of it goes on without throwing that away, and a tenth of that
# is for layers whose features a million photos have formed (lower rates for lower layers: Howard and Ruder, "Universal
# Language Model Fine-tuning", 2018; why the head comes first: Kumar et al., "Fine-Tuning can Distort Pretrained
# Features", 2022). With ten times as much for the last block of efficientnet_lite0, on 280 digits and on 425 cats and
# dogs, the loss on the photos that choose went up and down from epoch to epoch: the least of such is chance, mostly.
_HEAD_RATE, _BODY_RATE = 0.1, 0.01
# Both rise over this share of all steps, because the optimizer's averages are empty at first, and fall to nothing over
# the rest, as in the first of the two. So all epochs are made: the last, small steps are what the others were for.
_WARM = 0.1
# What a card says where the second stage was killed, stopped, or met an error.
_UNFINISHED = "interrupted"
# Steps that are timed; the first sets PyTorch's kernels up and does not count.
_TIMED = 4

Loader = Callable[..., DataLoader[Any]]


@dataclass(frozen=True)
class Plan:
    """What the second stage is going to do.

    Attributes:
        which: "last" or "all".
        block: path of the last block.
        trained: numbers that are trained, the head's among them.
        parameters: numbers of the whole network.
        epochs: passes over the photos.
        steps: of each.
        rates: largest learning rate of the network's layers, and of the head.
        before: (loss, accuracy) of the first stage on the photos that choose.
        seconds: that all of it would take, the features of all photos that are computed again afterwards included.

    Where a loss is not finite before anything has learnt, the last two are NaN.
    """

    which: Which
    block: str
    trained: int
    parameters: int
    epochs: int
    steps: int
    rates: tuple[float, float]
    before: tuple[float, float]
    seconds: float


@dataclass(frozen=True)
class Tuned:
    """What came of the second stage.

    Attributes:
        plan: what it was going to do.
        kept: whether the network is the fine-tuned one, as it was after the epoch ``best``; otherwise it is that of the
            first stage, bit for bit.
        why: why training ended before all epochs were made, in words; "" where they were.
        history: of its epochs.
        best: the epoch with the least loss on the photos that choose, from 0.
        seconds: that it took.
        undo: makes it the network of the first stage again.
    """

    plan: Plan
    kept: bool
    why: str
    history: History = field(default_factory=History)
    best: int = 0
    seconds: float = 0.0
    undo: Callable[[], None] = lambda: None

    def facts(self) -> dict[str, Any]:
        """For the card."""
        plan, history = self.plan, self.history
        after = (history.val_losses[self.best], history.val_accuracy[self.best]) if len(history) else None
        return {
            "which": plan.which, "block": plan.block, "trained": plan.trained, "parameters": plan.parameters,
            "rates": list(plan.rates), "steps": plan.steps, "epochs": len(history),
            "epoch": self.best + 1 if len(history) else None, "kept": self.kept, "stopped": self.why,
            "before": _figures(plan.before), "after": None if after is None else _figures(after),
            "seconds": round(self.seconds, 1),
        }  # fmt: skip


def _figures(found: Sequence[float]) -> dict[str, float | None]:
    # Several labels per photo have no accuracy.
    loss, accuracy = (value if math.isfinite(value) else None for value in found)
    return {
        "loss": None if loss is None else round(loss, 6), "accuracy": None if accuracy is None else round(accuracy, 4)
    }  # fmt: skip


def unfinished(which: Which) -> dict[str, Any]:
    """For the card of a first stage whose second has not come to its end."""
    return {"which": which, "kept": False, "stopped": _UNFINISHED}


def is_unfinished(card: Mapping[str, Any]) -> bool:
    """Whether a card is of such a run."""
    facts = card.get("finetune")
    return isinstance(facts, Mapping) and facts.get("stopped") == _UNFINISHED


def fine_tune(
    model: nn.Module, head: str, kind: str, which: Which, photos: Dataset[Any], labels: Tensor, train: Tensor,
    valid: Tensor, options: HeadOptions, load: Loader, announce: Callable[[Plan], None], tell: Tell | None = None,
    progress: bool = False,
) -> Tuned:  # fmt: skip
    """Train a network on photos, choose the epoch by others, and keep the better of what was and what came of it.

    Args:
        model: photos to scores, with a trained head; changed if it becomes better. Whatever ends this early, an
            exception or Ctrl-C, leaves it as it was.
        head: path of the head in it.
        kind: of the head, one of ``names.HEADS`` but not of ``RIGID``.
        which: "last": the last block, what is behind it, and the head; "all": everything.
        photos: (image, label) by number, as ``labels``.
        labels: (N,) class numbers or (N, C) 0/1.
        train: numbers of the photos that train.
        valid: numbers of those that choose.
        options: as for the first stage; its ``epochs`` limits these too.
        load: makes a loader of a data set, with ``batch_size`` and order.
        announce: hears the plan before training begins.
        tell: called after every epoch, as that of ``train_head``.
        progress: whether bars are shown.

    Raises:
        ValueError: nothing could choose, or there is nothing beside the head.
    """
    start = time.perf_counter()
    if labels.dim() == 1:
        # A class that nobody can have learnt says nothing about what to choose.
        valid = valid[torch.isin(labels[valid], labels[train])]
        if not len(valid):
            raise ValueError(
                "--finetune: all photos that choose are of classes without photos that train, so that nothing can say "
                "which stage is better; give others with --valid"
            )
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    before: dict[str, Tensor] = {}
    kept = False
    try:
        model.to(options.device)
        block = thaw(model, head, which)
        before = _values(model)
        order, loss_fn = balanced(labels[train], options)
        learn = load(Subset(photos, train.tolist()), batch_size=options.batch_size, **order)
        look = load(Subset(photos, valid.tolist()), batch_size=options.batch_size)
        common: dict[str, Any] = {"loss_fn": loss_fn, "verbose": False}
        plan = _plan(model, which, block, len(learn), rate_of(kind, options), options.epochs)
        try:
            clock = _Ticks()
            first = fit(0, model, look, "validation", progress=progress, on_batch_end=clock, **common)
            photo = clock.per_photo(len(valid), options.batch_size)
            each = _step_seconds(model, learn, before, **common)
        except NonFiniteLossError as error:
            tuned = Tuned(plan, False, f"given up before anything has learnt: {error}")
        else:
            seconds = plan.epochs * (len(learn) * each + len(valid) * photo) + len(labels) * photo
            plan = replace(plan, before=first, seconds=seconds)
            announce(plan)
            torch.manual_seed(options.seed)
            tuned = _descend(model, head, plan, learn, look, tell, {**common, "progress": progress})
        kept = tuned.kept
    finally:
        if not kept:
            _put(model, before)
        # Whoever gets the network may train it, as far as those did who made it.
        unfreeze(model).eval().cpu()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(required[name]).grad = None
    return replace(tuned, seconds=time.perf_counter() - start, undo=functools.partial(_put, model, before))


def _plan(model: nn.Module, which: Which, block: str, steps: int, rate: float, limit: int | None) -> Plan:
    """What will be done; what it costs and what there is to beat is not known yet."""
    least, most = _EPOCHS
    epochs = min(max(math.ceil(_STEPS / steps), least), most, limit or most)
    learns, every = (sum(map(Tensor.numel, part)) for part in ((one for _, one in _trained(model)), model.parameters()))
    rates = (_BODY_RATE * rate, _HEAD_RATE * rate)
    return Plan(which, block, learns, every, epochs, steps, rates, (math.nan, math.nan), math.nan)


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what learns, where they take no memory of a GPU."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in _trained(model)}


@torch.no_grad()
def _put(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in values:
            parameter.copy_(values[name])


class _Ticks:
    """Called at the end of every batch; of these the first sets PyTorch's kernels up, and does not count."""

    def __init__(self) -> None:
        self.ends = [time.perf_counter()]

    def __call__(self, *_: object) -> None:
        self.ends.append(time.perf_counter())

    def per_batch(self) -> float:
        found = [after - before for before, after in itertools.pairwise(self.ends)]
        return statistics.median(found[1:] or found)

    def per_photo(self, photos: int, batch_size: int) -> float:
        """Neither the first batch, with its setting up, nor a rest of few photos is to make it look dear."""
        start, first, *_, end = [*self.ends, self.ends[-1]]
        rest = (end - first) / (photos - batch_size) if photos > batch_size else math.inf
        return min((end - start) / photos, rest)


def _step_seconds(model: nn.Module, learn: DataLoader[Any], before: Mapping[str, Tensor], **common: Any) -> float:
    """How long a step takes on these photos: real ones are made, by an optimizer that moves nothing."""
    still = torch.optim.AdamW([parameter for _, parameter in _trained(model)], lr=0.0)
    clock = _Ticks()
    try:
        fit(0, model, itertools.islice(learn, _TIMED), optimizer=still, on_batch_end=clock, **common)
    finally:
        # Where a gradient is not finite, not even nothing times it is nothing.
        _put(model, before)
    return clock.per_batch()


def _descend(
    model: nn.Module, head: str, plan: Plan, learn: DataLoader[Any], look: DataLoader[Any], tell: Tell | None,
    common: dict[str, Any],
) -> Tuned:  # fmt: skip
    parts = [[one for name, one in _trained(model) if is_in(name, head) == is_head] for is_head in (False, True)]
    groups = [{"params": part, "lr": rate} for part, rate in zip(parts, plan.rates, strict=True)]
    optimizer = torch.optim.AdamW(groups)
    every = plan.epochs * plan.steps
    warm = max(1, round(_WARM * every))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (every - step) / max(1, every - warm))
    )
    history, best, state, why = History(), 0, dict[str, Tensor](), ""
    for epoch in range(plan.epochs):
        try:
            trained = fit(epoch, model, learn, optimizer=optimizer, on_batch_end=lambda *_: schedule.step(), **common)
            checked = fit(epoch, model, look, "validation", **common)
        except NonFiniteLossError as error:
            why = f"given up: {error}"
            break
        history.append(train=trained, valid=checked)
        if not state or checked[0] < history.val_losses[best]:
            best, state = epoch, _values(model)
        if tell is not None:
            tell(epoch, plan.epochs, trained, checked)
    kept = bool(state) and history.val_losses[best] < plan.before[0] - _LEAST_GAIN
    if kept:
        _put(model, state)
    return Tuned(plan, kept, why, history, best)


# -- in words ------------------------------------------------------------------------------------------------


def announced(plan: Plan, photos: int) -> str:
    """What the second stage takes, before it begins."""
    return (
        f"fine-tuning {_layers(plan.which, plan.block, plan.trained, plan.parameters)} on {photos:,} photos: "
        f"{_many(plan.epochs, 'epoch')} of {_many(plan.steps, 'step')}, about {about(plan.seconds)}; Ctrl-C keeps the "
        "first stage"
    )


def described(facts: Mapping[str, Any]) -> str:
    """What came of it, in a sentence or two, from what the card says."""
    if is_unfinished({"finetune": facts}):
        return "Fine-tuning was interrupted before its end: this is the first stage"
    said = f"fine-tuned {_layers(facts['which'], facts['block'], facts['trained'], facts['parameters'])}"
    before, after = facts["before"], facts["after"]
    if after is None:
        return f"{said}: {facts['stopped']}; the first stage is kept"
    body, head = facts["rates"]
    right = ""
    if before["accuracy"] is not None:
        right = f"; {before['accuracy']:.2f} % right before, {after['accuracy']:.2f} % after"
    stopped = f", {facts['stopped']}" if facts["stopped"] else ""
    return (
        f"{said}, learning rates {body:g} and {head:g} for the head, best epoch {facts['epoch']} of "
        f"{facts['epochs']}{stopped}. The photos that choose: loss {before['loss']:.4f} before, {after['loss']:.4f} "
        f"after{right}"
        f"{'' if facts['kept'] else f'. That is not smaller by more than {_LEAST_GAIN:g}: the first stage is kept'}"
    )


def _layers(which: str, block: str, trained: int, parameters: int) -> str:
    what = "the whole network" if which == "all" else f"{block} and all behind it"
    if parameters < 1e6:
        return f"{what} ({trained:,} of {parameters:,} weights)"
    return f"{what} ({trained / 1e6:.2g} of {parameters / 1e6:.2g} million weights)"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"
