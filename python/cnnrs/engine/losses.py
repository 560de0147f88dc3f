"""Losses as the engines know them, and what an epoch reports of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import nn

from cnnrs._records import EpochTotals
from cnnrs._records import Loss as KnownLoss
from cnnrs._util.plain import is_plain
from cnnrs.model.around import global_hooks

Loss = Callable[..., torch.Tensor]
#: Those that the engines know, by the names that they have in ``torch.nn.functional``.
LossName = Literal["cross_entropy", "nll_loss", "mse_loss", "binary_cross_entropy_with_logits"]


class Totals(NamedTuple):
    """What an epoch has added up so far.

    Attributes:
        loss: sum of the losses of what counts, each times its class's weight.
        weight: sum of those weights, which the mean divides by.
        correct: samples whose largest output is the target; None where targets are not class indices.
        counted: samples that count for that.
        samples: all samples.
        batches: how many.
        last: mean loss of the last batch.
        gathered: batches since the optimizer's last step.
    """

    loss: float = 0.0
    weight: float = 0.0
    correct: int | None = 0
    counted: int = 0
    samples: int = 0
    batches: int = 0
    last: float | None = None
    gathered: int = 0

    @property
    def mean(self) -> float:
        """Mean loss over what counts; NaN where nothing does."""
        return self.loss / self.weight if self.weight else float("nan")

    @property
    def accuracy(self) -> float:
        """Per cent; NaN where there is none."""
        return 100.0 * self.correct / self.counted if self.correct is not None and self.counted else float("nan")

    def by_name(self) -> EpochTotals:
        """As the extension reads it."""
        return cast(EpochTotals, self._asdict())


class ClassLoss(NamedTuple):
    """``nll_loss`` or ``cross_entropy`` with its options."""

    name: Literal["nll", "cross_entropy"]
    weight: torch.Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    reduction: str = "mean"


_FUNCTIONS: dict[Any, Literal["nll", "cross_entropy"]] = {F.nll_loss: "nll", F.cross_entropy: "cross_entropy"}
_CLASSES: dict[type, Literal["nll", "cross_entropy"]] = {nn.NLLLoss: "nll", nn.CrossEntropyLoss: "cross_entropy"}


def loss_called(loss_fn: Any) -> Loss:
    """The loss itself, of a name too.

    Raises:
        ValueError: there is no loss of this name.
        TypeError: it is no function.
    """
    if isinstance(loss_fn, str):
        if loss_fn not in get_args(LossName):
            names = ", ".join(map(repr, get_args(LossName)))
            raise ValueError(f"loss_fn must be one of {names}, or a function of outputs and targets, got {loss_fn!r}")
        return cast(Loss, getattr(F, loss_fn))
    if isinstance(loss_fn, type) and issubclass(loss_fn, nn.Module):
        raise TypeError(f"loss_fn must be a loss, got the class {loss_fn.__name__}: make one, {loss_fn.__name__}()")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
    return cast(Loss, loss_fn)


def _class_loss(loss_fn: Loss) -> ClassLoss | None:
    """The loss if it is one of the two, as function, partial function or module; None for any other."""
    if isinstance(loss_fn, functools.partial):
        options = loss_fn.keywords
        known = loss_fn.func in _FUNCTIONS and not loss_fn.args and options.keys() <= set(ClassLoss._fields[1:])
        return ClassLoss(_FUNCTIONS[loss_fn.func], **options) if known else None
    if isinstance(loss_fn, nn.Module):
        module: Any = loss_fn
        if type(module) not in _CLASSES or not _is_plain(module):
            return None
        smoothing = float(getattr(module, "label_smoothing", 0.0))
        return ClassLoss(_CLASSES[type(module)], module.weight, module.ignore_index, smoothing, module.reduction)
    return ClassLoss(_FUNCTIONS[loss_fn]) if any(loss_fn is function for function in _FUNCTIONS) else None


def _is_plain(module: nn.Module) -> bool:
    """Whether calling it is its class's forward and nothing else."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module) and not global_hooks()


def known_loss(loss_fn: Loss) -> KnownLoss | None:
    """The loss as the engines know it, None for any that they must call."""
    classes = _class_loss(loss_fn)
    if classes is not None:
        weighed = classes.weight is None or is_plain(classes.weight)
        if classes.reduction != "mean" or not weighed:
            return None
        name, weight, ignore_index, smoothing, _ = classes
        if name == "nll":
            return {"kind": name, "weight": weight, "ignore_index": ignore_index}
        return {"kind": name, "weight": weight, "ignore_index": ignore_index, "label_smoothing": smoothing}
    if loss_fn is F.mse_loss:
        return {"kind": "mse"}
    if loss_fn is F.binary_cross_entropy_with_logits:
        return {"kind": "bce_with_logits"}
    if isinstance(loss_fn, nn.Module) and _is_plain(loss_fn) and _reduction(loss_fn) == "mean":
        if type(loss_fn) is nn.MSELoss:
            return {"kind": "mse"}
        if type(loss_fn) is nn.BCEWithLogitsLoss and loss_fn.weight is None and loss_fn.pos_weight is None:
            return {"kind": "bce_with_logits"}
    return None


def _reduction(loss_fn: Loss) -> str:
    found = loss_fn.keywords.get("reduction") if isinstance(loss_fn, functools.partial) else None
    if isinstance(loss_fn, nn.modules.loss._Loss):
        found = loss_fn.reduction
    return found if isinstance(found, str) else "mean"


def call(loss_fn: Loss, outputs: Any, targets: Any) -> torch.Tensor:
    """The loss of a batch.

    Raises:
        TypeError: it is no tensor.
        RuntimeError: it is more than one number.
    """
    loss = loss_fn(outputs, targets)
    if not isinstance(loss, torch.Tensor):
        raise TypeError(
            f"loss_fn must return a tensor with the mean loss of the batch, got {type(loss).__name__}: without a "
            "tensor there is nothing to differentiate"
        )
    if loss.numel() != 1:
        raise RuntimeError(
            f"grad can be implicitly created only for scalar outputs: loss_fn returned shape {tuple(loss.shape)}, and "
            "one number per batch is needed, such as the mean (reduction='mean')"
        )
    return loss


def measured(loss_fn: Loss, loss: torch.Tensor, outputs: Any, targets: Any, samples: int) -> torch.Tensor:
    """float64 (4,) on the loss's device: loss, weight, correct or -1, and counted of :class:`Totals` for a batch.

    What any other loss than ``nll_loss`` and ``cross_entropy`` returns is taken to be the mean per sample, or their sum
    where its ``reduction`` says so.
    """
    number = functools.partial(torch.full, (), dtype=torch.float64, device=loss.device)
    value = loss.detach().reshape(()).double()
    classes = _class_loss(loss_fn)
    if classes is None:
        total, weight = value if _reduction(loss_fn) == "sum" else value * samples, number(float(samples))
        hits, counted = _hits(outputs, targets, None)
    else:
        total = value if classes.reduction == "sum" else _sum(classes, outputs, targets)
        counts = None
        if not targets.is_floating_point():
            # Bytes are classes too.
            targets = targets.long()
            counts = targets != classes.ignore_index
        weight = number(targets.numel() / outputs.shape[min(1, outputs.dim() - 1)])
        if counts is not None:
            weight = counts.sum(dtype=torch.float64) if classes.weight is None else _weight(classes, targets, counts)
        hits, counted = _hits(outputs, targets, counts)
    parts = [total, weight, number(-1.0) if hits is None else hits, number(0.0) if counted is None else counted]
    return torch.stack([part.to(loss.device, torch.float64) for part in parts])


def _sum(loss: ClassLoss, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    # In the outputs' own precision, as the tutorial's loop and engine `torch` add it up.
    weight, ignored = loss.weight, loss.ignore_index
    if loss.name == "nll":
        return F.nll_loss(outputs, targets, weight, ignore_index=ignored, reduction="sum").double()
    return F.cross_entropy(
        outputs, targets, weight, ignore_index=ignored, reduction="sum", label_smoothing=loss.label_smoothing
    ).double()


def _weight(loss: ClassLoss, targets: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    assert loss.weight is not None
    weights = loss.weight.detach().double().index_select(0, (targets * counts).flatten())
    return (weights * counts.flatten()).sum()


def _hits(outputs: Any, targets: Any, counts: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Correct predictions among what counts, and how many count; None where targets are not class indices."""
    scores = outputs
    if not isinstance(outputs, torch.Tensor):
        # As torchvision's and transformers' outputs name their scores.
        scores = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if not isinstance(scores, torch.Tensor) or not isinstance(targets, torch.Tensor):
        return None, None
    fits = scores.dim() == 2 and targets.dim() == 1 and len(scores) == len(targets)
    if not fits or targets.dtype is not torch.int64 or scores.device != targets.device:
        return None, None
    hits = scores.max(dim=1)[1] == targets
    if counts is None:
        return hits.sum(), torch.full((), len(targets), device=targets.device)
    return (hits & counts).sum(), counts.sum()


def check_targets(loss_fn: Loss, classes: int, targets: torch.Tensor, where: str) -> None:
    """Raises what PyTorch raises on a CPU; on a GPU a target out of bounds ends the process's use of it.

    Args:
        loss_fn: any; only ``nll_loss`` and ``cross_entropy`` are known to read targets as indices.
        classes: outputs of the model per sample.
        targets: best on the host: where they are is waited for.
        where: what the message calls them.

    Raises:
        IndexError: a target, other than the loss's ``ignore_index``, has no output.
    """
    loss = _class_loss(loss_fn)
    if loss is None or targets.is_floating_point() or not targets.numel():
        return
    low, high = map(int, torch.aminmax(targets))
    if low >= 0 and high < classes:
        return
    targets = targets.long()
    wrong = targets[(targets != loss.ignore_index) & ((targets < 0) | (targets >= classes))]
    if wrong.numel():
        raise IndexError(
            f"Target {int(wrong[0])} is out of bounds: the model has {classes} outputs, so classes are "
            f"0..={classes - 1} ({where})"
        )


def counts(row: torch.Tensor) -> tuple[float, float, int | None, int]:
    """What :func:`measured` has found, read back: loss, weight, correct or None, counted."""
    loss, weight, correct, counted = row.tolist()
    return loss, weight, None if correct < 0 else int(correct), int(counted)


def called(loss_fn: Loss) -> Callable[[torch.Tensor, torch.Tensor, int], Any]:
    """A loss that an engine does not know, as it calls it: returns the loss and what to count of it."""

    def call_and_measure(outputs: torch.Tensor, targets: torch.Tensor, samples: int) -> Any:
        loss = call(loss_fn, outputs, targets)
        with torch.no_grad():
            return loss, counts(measured(loss_fn, loss, outputs, targets, samples))

    return call_and_measure
