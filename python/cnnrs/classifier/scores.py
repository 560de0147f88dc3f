"""How good scores are as probabilities, and what makes probabilities of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnrs.classifier.labelled import Targets


def log_loss(scores: Tensor, targets: Targets, weights: Tensor) -> Tensor:
    """Mean of minus the logarithm of the probability that each row's class (each label) was given.

    Args:
        scores: (N, C) float64, of which softmax, or with several labels per row sigmoid, makes probabilities.
        targets: N rows.
        weights: their weights, as ``targets.weights`` gives them.

    Returns:
        A float64 number that can be differentiated.
    """
    if targets.several:
        losses = F.binary_cross_entropy_with_logits(scores, targets.values, reduction="none")
    else:
        losses = F.cross_entropy(scores, targets.values, reduction="none")
    return (losses * weights).sum() / weights.sum()


def sharpness(scores: Tensor, targets: Targets, weights: Tensor) -> tuple[float, float]:
    """The factor that makes probabilities of scores (one over a temperature), and the loss with it.

    It has the least loss on targets that are not quite certain (Platt's): rows that are all right would
    otherwise want to be infinitely sure of themselves.

    Args:
        scores: (N, C) float64, larger for what is more probable.
        targets: N rows that the scores were not made from.
        weights: their weights.
    """
    size = float(scores.abs().mean()) or 1.0
    scaled = scores / size
    doubt = 1 / (len(targets) + 2)
    exponent = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([exponent], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        sharp = scaled * exponent.clamp(-12, 12).exp()
        # Uncertain: each other answer has its share of the doubt.
        if targets.several:
            other = F.binary_cross_entropy_with_logits(sharp, 1 - targets.values, reduction="none")
        else:
            other = -F.log_softmax(sharp, dim=1).mean(dim=1)
        uncertain = (other * weights).sum() / weights.sum()
        loss = (1 - doubt) * log_loss(sharp, targets, weights) + doubt * uncertain
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    factor = float(exponent.detach().clamp(-12, 12).exp()) / size
    return factor, float(log_loss(scores * factor, targets, weights))
