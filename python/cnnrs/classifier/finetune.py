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
        seconds: that all of it would take.
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
        kept: whether the network is the fine-tuned one; otherwise it is that of the first stage, bit for bit.
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
    loss, accuracy = found
    # Several labels per photo have no accuracy.
    return {"loss": round(loss, 6), "accuracy": None if math.isnan(accuracy) else round(accuracy, 4)}


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
    """
    start = time.perf_counter()
    if labels.dim() == 1:
        # A class that nobody can have learnt says nothing about what to choose.
        valid = valid[torch.isin(labels[valid], labels[train])]
    model.to(options.device)
    block = thaw(model, head, which)
    before = {name: parameter.detach().clone() for name, parameter in _trained(model)}
    kept = False
    try:
        order, loss_fn = balanced(labels[train], options)
        learn = load(Subset(photos, train.tolist()), batch_size=options.batch_size, **order)
        look = load(Subset(photos, valid.tolist()), batch_size=options.batch_size)
        least, most = _EPOCHS
        epochs = min(max(math.ceil(_STEPS / len(learn)), least), most, options.epochs or most)
        rate = rate_of(kind, options)
        rates = (_BODY_RATE * rate, _HEAD_RATE * rate)
        common: dict[str, Any] = {"loss_fn": loss_fn, "verbose": False}
        since = time.perf_counter()
        first = fit(0, model, look, "validation", progress=progress, **common)
        looking = time.perf_counter() - since
        each = _step_seconds(model, learn, **common)
        numbers, every = (sum(map(Tensor.numel, part)) for part in (before.values(), model.parameters()))
        seconds = epochs * (len(learn) * each + looking)
        plan = Plan(which, block, numbers, every, epochs, len(learn), rates, first, seconds)
        announce(plan)
        torch.manual_seed(options.seed)
        tuned = _descend(model, head, plan, learn, look, tell, {**common, "progress": progress})
        kept = tuned.kept
    finally:
        if not kept:
            _put(model, before)
        # Whoever gets the network may train it.
        unfreeze(model).eval().cpu()
    return replace(tuned, seconds=time.perf_counter() - start, undo=functools.partial(_put, model, before))


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


@torch.no_grad()
def _put(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in values:
            parameter.copy_(values[name])


def _step_seconds(model: nn.Module, learn: DataLoader[Any], **common: Any) -> float:
    """How long a step takes on these photos: real ones are made, by an optimizer that moves nothing."""
    ends = [time.perf_counter()]
    still = torch.optim.AdamW([parameter for _, parameter in _trained(model)], lr=0.0)
    some = itertools.islice(learn, _TIMED)
    fit(0, model, some, optimizer=still, on_batch_end=lambda *_: ends.append(time.perf_counter()), **common)
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    return statistics.median(seconds[1:] or seconds)


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
    history, best = History(), 0
    least, state = plan.before[0], None
    for epoch in range(plan.epochs):
        try:
            trained = fit(epoch, model, learn, optimizer=optimizer, on_batch_end=lambda *_: schedule.step(), **common)
            checked = fit(epoch, model, look, "validation", **common)
        except NonFiniteLossError as error:
            return Tuned(plan, False, f"given up: {error}", history, best)
        history.append(train=trained, valid=checked)
        if tell is not None:
            tell(epoch, plan.epochs, trained, checked)
        if checked[0] < history.val_losses[best]:
            best = epoch
        if checked[0] < least - _LEAST_GAIN:
            least, state = checked[0], {name: parameter.detach().clone() for name, parameter in _trained(model)}
    if state is None:
        return Tuned(plan, False, "", history, best)
    _put(model, state)
    return Tuned(plan, True, "", history, best)


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
    said = f"fine-tuned {_layers(facts['which'], facts['block'], facts['trained'], facts['parameters'])}"
    if facts["stopped"]:
        return f"{said}: {facts['stopped']}; the first stage is kept"
    before, after = facts["before"], facts["after"]
    body, head = facts["rates"]
    right = ""
    if before["accuracy"] is not None:
        right = f"; {before['accuracy']:.2f} % right before, {after['accuracy']:.2f} % after"
    return (
        f"{said}, learning rates {body:g} and {head:g} for the head, epoch {facts['epoch']} of {facts['epochs']}. The "
        f"photos that choose: loss {before['loss']:.4f} before, {after['loss']:.4f} after{right}"
        f"{'' if facts['kept'] else '. The loss is no smaller: the first stage is kept'}"
    )


def _layers(which: str, block: str, trained: int, parameters: int) -> str:
    what = "the whole network" if which == "all" else f"{block} and all behind it"
    return f"{what} ({trained / 1e6:.2g} of {parameters / 1e6:.2g} million weights)"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"
