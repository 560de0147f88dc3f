"""Losses as the engines know them, and what an epoch reports of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def known_loss(loss_fn: Loss) -> tuple[Any, ...] | None:
    """The loss as the engine knows it, None for any that it must call."""
    if loss_fn is F.nll_loss:
        return ("nll", None, -100)
    if loss_fn is F.cross_entropy:
        return ("cross_entropy", None, -100, 0.0)
    if loss_fn is F.mse_loss:
        return ("mse",)
    if loss_fn is F.binary_cross_entropy_with_logits:
        return ("bce_with_logits",)
    if not isinstance(loss_fn, nn.Module) or loss_fn._forward_hooks or loss_fn._forward_pre_hooks:
        return None
    if type(loss_fn) is nn.NLLLoss and loss_fn.reduction == "mean":
        return ("nll", loss_fn.weight, loss_fn.ignore_index)
    if type(loss_fn) is nn.CrossEntropyLoss and loss_fn.reduction == "mean":
        return ("cross_entropy", loss_fn.weight, loss_fn.ignore_index, float(loss_fn.label_smoothing))
    if type(loss_fn) is nn.MSELoss and loss_fn.reduction == "mean":
        return ("mse",)
    if type(loss_fn) is nn.BCEWithLogitsLoss and loss_fn.reduction == "mean":
        return ("bce_with_logits",) if loss_fn.weight is None and loss_fn.pos_weight is None else None
    return None


def summed(loss_fn: Loss, loss: torch.Tensor, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float64 (): the samples' losses added up, as the tutorial's loop reports them and engine ``torch`` does."""
    known = known_loss(loss_fn)
    if known is None or len(known) == 1 or known[1] is not None:
        return loss.detach().double() * len(outputs)
    if known[0] == "nll":
        total = F.nll_loss(outputs, targets, ignore_index=known[2], reduction="sum")
    else:
        total = F.cross_entropy(outputs, targets, ignore_index=known[2], label_smoothing=known[3], reduction="sum")
    return total.double()


def count_correct(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor | None:
    """int64 (): samples whose largest output is the target; None where targets are not class indices."""
    if outputs.dim() != 2 or targets.dim() != 1 or targets.dtype != torch.int64:
        return None
    return (outputs.max(dim=1)[1] == targets).sum()
