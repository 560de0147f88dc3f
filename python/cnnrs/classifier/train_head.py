"""A head on stored features: by gradient descent until validation no longer improves, or in closed form."""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset, WeightedRandomSampler

from cnnrs.classifier.names import CLOSED
from cnnrs.classifier.probe import Probe
from cnnrs.data.feature_dataset import FeatureDataset
from cnnrs.data.loader import DataLoader
from cnnrs.training.checkpoint import EarlyStopping
from cnnrs.training.fit import compile
from cnnrs.training.history import History

Balance = Literal["none", "loss", "sampler"]
#: From this many samples in the largest class per sample in the smallest on, ``balance="auto"`` weighs the classes.
UNBALANCED = 3.0
# Where nobody says how many epochs there are: so many at most, and so many without an improvement are waited for.
_MOST_EPOCHS, _PATIENCE = 100, 10
# An epoch of fewer steps says little, and costs more than they do: small sets are gone through several times in one.
_LEAST_STEPS = 20
# An improvement of the validation loss that is worth waiting for.
_LEAST_GAIN = 1e-4


@dataclass(frozen=True)
class HeadOptions:
    """How heads are trained, beside their kind.

    Attributes:
        classes: C, how many there are.
        epochs: passes over the rows, at most; None: until validation no longer improves, at most 100 epochs, each of
            one pass, or of as many as it takes for 20 steps.
        batch_size: rows per step.
        lr: learning rate; None: 0.001, 0.0001 for "classifier", whose layers were trained before.
        balance: "loss" weighs every class by one over its share, "sampler" draws every class as often, "none" neither.
        seed: of the order of rows, of dropout and of new weights.
        device: where heads are trained by descent.
    """

    classes: int
    epochs: int | None = None
    batch_size: int = 32
    lr: float | None = None
    balance: Balance = "none"
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


@dataclass(frozen=True)
class Trained:
    """A head that was trained.

    Attributes:
        kind: one of ``names.HEADS``.
        module: in eval mode, on the CPU: (N, ...) features to (N, C) scores.
        history: of descent; empty otherwise.
        best: the epoch whose weights were kept, counted from 0.
        stopped: why training ended, in words.
        strength: the penalty, or the number of neighbours, of a head in closed form.
        loss: on the validation rows: mean cross entropy, of several labels the mean binary one.
        accuracy: on the validation rows, percent; of several labels percent of all decisions.
        seconds: that training took.
    """

    kind: str
    module: nn.Module
    history: History
    best: int
    stopped: str
    strength: float | None = None
    loss: float = math.nan
    accuracy: float = math.nan
    seconds: float = 0.0


Tell = Callable[[int, int, tuple[float, float], tuple[float, float] | None], None]


def train_head(
    kind: str, make: Callable[[], nn.Module], data: FeatureDataset, train: Tensor, valid: Tensor, options: HeadOptions,
    tell: Tell | None = None, most: int | None = None, strength: float | None = None,
) -> Trained:  # fmt: skip
    """Train on some rows, choose by others.

    Args:
        kind: "linear", "mlp", "classifier" (by descent), "logistic", "ridge", "knn" (closed form).
        make: a new head with its first weights; for descent.
        data: (N, ...) features, memory-mapped as well, and (N,) class numbers or (N, C) 0/1.
        train: row numbers.
        valid: row numbers; they choose the epoch, the penalty and the temperature. None left: all epochs are made.
        options: see there.
        tell: called after every epoch with its number, how many there may be, and (loss, accuracy) of both parts.
        most: another limit for the epochs.
        strength: the penalty, or the number of neighbours, where it was chosen before.
    """
    before = time.perf_counter()
    if data.labels.dim() == 1:
        # A class that nobody can have learnt says nothing about what to choose.
        valid = valid[torch.isin(data.labels[valid], data.labels[train])]
    if kind in CLOSED:
        # Of several labels each row has one vote per label: there is nothing to weigh.
        weigh = options.balance != "none" and not (kind == "knn" and data.labels.dim() == 2)
        probe = Probe(kind, balance=weigh, seed=options.seed)
        if strength is not None:
            probe.set_params(**({"k": int(strength)} if kind == "knn" else {"penalty": strength}))
        rows, held = ((data.features[part], data.labels[part]) for part in (train, valid))
        known = range(options.classes) if data.labels.dim() == 1 else None
        module = probe.fit(*rows, valid=held if len(valid) else None, classes=known).module()
        chosen = probe.k_ if kind == "knn" else probe.penalty_
        done = Trained(kind, module, History(), 0, "computed in closed form", chosen)
    else:
        done = _descend(kind, make, data, train, valid, options, tell, most or options.epochs or _MOST_EPOCHS)
    module = done.module.eval().cpu()
    done = replace(done, module=module)
    if len(valid):
        scores, labels = scores_of(module, data.features, valid), data.labels[valid]
        done = replace(done, loss=loss_of(scores, labels), accuracy=100 * float(right_of(scores, labels).mean()))
    return replace(done, seconds=time.perf_counter() - before)


def _descend(
    kind: str, make: Callable[[], nn.Module], data: FeatureDataset, train: Tensor, valid: Tensor, options: HeadOptions,
    tell: Tell | None, most: int,
) -> Trained:  # fmt: skip
    torch.manual_seed(options.seed)
    head = make().to(options.device)
    passes = 1 if options.epochs else math.ceil(_LEAST_STEPS * options.batch_size / len(train))
    order, loss_fn = balanced(data.labels[passes * train.tolist()], options)
    learn = DataLoader(Subset(data, passes * train.tolist()), batch_size=options.batch_size, **order)
    look = DataLoader(Subset(data, valid.tolist()), batch_size=256) if len(valid) else None
    optimizer = torch.optim.AdamW(head.parameters(), lr=rate_of(kind, options))
    fit = compile(optimizer=optimizer, loss_fn=loss_fn, verbose=False)
    stop = EarlyStopping(_PATIENCE, _LEAST_GAIN)
    history, best, state = History(), 0, copy.deepcopy(head.state_dict())
    stopped = f"all {most:,} epochs were made"
    for epoch in range(most):
        trained = fit(epoch, head, learn, "training")
        checked = fit(epoch, head, look, "validation") if look is not None else None
        history.append(train=trained, valid=checked)
        if tell is not None:
            tell(epoch, most, trained, checked)
        if epoch == 0 or checked is None or checked[0] < history.val_losses[best]:
            best, state = epoch, copy.deepcopy(head.state_dict())
        if checked is not None and stop(checked[0]):
            stopped = f"the validation loss had not improved for {stop.patience:,} epochs"
            break
    head.load_state_dict(state)
    return Trained(kind, head, history, best, stopped)


def rate_of(kind: str, options: HeadOptions) -> float:
    """The learning rate of a head's first training."""
    return options.lr or (1e-4 if kind == "classifier" else 1e-3)


def balanced(labels: Tensor, options: HeadOptions) -> tuple[dict[str, Any], Callable[..., Tensor]]:
    """What gives rare classes their weight: arguments of a loader over rows of these labels, and the loss."""
    weight = class_weights(labels, options.classes) if options.balance != "none" else None
    if options.balance == "sampler" and weight is not None:
        return {"sampler": _sampler(labels, weight)}, _loss(labels, None)
    return {"shuffle": True}, _loss(labels, None if weight is None else weight.to(options.device))


def _loss(labels: Tensor, weight: Tensor | None) -> Callable[..., Tensor]:
    if labels.dim() == 2:
        return functools.partial(F.binary_cross_entropy_with_logits, pos_weight=weight)
    return functools.partial(F.cross_entropy, weight=weight) if weight is not None else F.cross_entropy


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """(C,) float32: N / (C x rows of the class), as scikit-learn's "balanced"; of several labels, absent per present.

    A class without rows has the weight 1.
    """
    if labels.dim() == 2:
        present = labels.float().sum(dim=0)
        return torch.where(present > 0, (len(labels) - present) / present.clamp(min=1), 1.0)
    counts = labels.bincount(minlength=classes).float()
    return torch.where(counts > 0, len(labels) / ((counts > 0).sum() * counts.clamp(min=1)), 1.0)


def _sampler(labels: Tensor, weights: Tensor) -> WeightedRandomSampler:
    each: Any = (labels * weights).sum(dim=1).clamp(min=1) if labels.dim() == 2 else weights[labels]
    return WeightedRandomSampler(each, len(labels))


def imbalance(labels: Tensor) -> float:
    """Rows of the most frequent class per row of the rarest that has any."""
    counts = labels.sum(dim=0) if labels.dim() == 2 else labels.bincount()
    counts = counts[counts > 0]
    return float(counts.max() / counts.min()) if len(counts) else 1.0


def loss_of(scores: Tensor, labels: Tensor) -> float:
    """Mean cross entropy of (N, C) scores; of (N, C) 0/1 labels the mean binary one."""
    if labels.dim() == 2:
        return float(F.binary_cross_entropy_with_logits(scores, labels.to(scores.dtype)))
    return float(F.cross_entropy(scores, labels))


def right_of(scores: Tensor, labels: Tensor) -> Tensor:
    """(N,) 1.0 where the largest score is the label's; of several labels the share of right decisions."""
    if labels.dim() == 2:
        return ((scores > 0) == (labels > 0)).float().mean(dim=1)
    return (scores.argmax(dim=1) == labels).float()


@torch.no_grad()
def scores_of(head: nn.Module, features: Tensor, rows: Tensor) -> Tensor:
    """(len(rows), C) float32 scores on the CPU of some rows of (N, ...) features."""
    some = [head(features[part].float()).float().cpu() for part in torch.split(rows, 256)]
    return torch.cat(some) if some else torch.zeros(0)
