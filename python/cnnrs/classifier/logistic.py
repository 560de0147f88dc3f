"""Logistic regression by L-BFGS, from the strongest penalty to the one that predicts held-out rows best."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cnnrs.classifier.labelled import Targets
from cnnrs.classifier.scores import log_loss

#: Strong to weak, of rows whose squares add up to 1 on average; two a decade.
PENALTIES = tuple(10 ** (-step / 2) for step in range(1, 15))
#: Without rows to choose by.
PENALTY = 1e-3
# The path ends when so many penalties have not predicted better than those before by more than a hundredth, and where
# next to nothing is left to gain: rows that can be told apart without error predict better with ever less penalty.
_PATIENCE, _GAIN, _LEAST = 2, 0.01, 0.002
# Of more rows a share of every class is as good to choose by: the path is most of the work.
_MOST_TO_CHOOSE = 8192


@dataclass(frozen=True)
class Solution:
    """A linear head for standardised rows.

    Attributes:
        weight: (K, D) float64, K as in ``Targets.columns``.
        bias: (K,) float64.
        penalty: the one it was solved with.
        loss: mean log loss of the held-out rows; None without.
    """

    weight: Tensor
    bias: Tensor
    penalty: float
    loss: float | None


def spread(scores: Tensor, targets: Targets) -> Tensor:
    """(N, C) of (N, K) scores: of two classes that share one column, half of it each, with opposite signs."""
    return torch.cat([-scores, scores], dim=1) / 2 if scores.shape[1] == 1 and not targets.several else scores


def solve(
    rows: Tensor,
    targets: Targets,
    held: tuple[Tensor, Targets] | None,
    *,
    penalty: float | None,
    balance: bool,
    everything: tuple[Tensor, Targets] | None,
) -> Solution:
    """Minimise mean log loss plus half of ``penalty`` times the squares of the weights (the bias is free).

    Args:
        rows: (N, D) float32, standardised.
        targets: N.
        held: standardised rows, and what they are, that choose the penalty.
        penalty: None: the best of ``PENALTIES`` for ``held``.
        balance: whether all classes weigh the same.
        everything: rows that the head is solved for once more when the penalty is known; None: it stays as it is.
    """
    gram = _gram(rows)
    problem = _Problem(rows, targets, balance, gram)
    start, chosen, loss = problem.start(), PENALTY if penalty is None else penalty, None
    if held is not None and penalty is None:
        start, chosen = _choose(*_some(rows, targets), held, balance, gram)
        # What the weights are expected to be does not depend on how many rows there are: all of them need less.
        chosen *= min(_MOST_TO_CHOOSE / len(rows), 1)
    best = problem.minimise(start, chosen, exact=everything is None or penalty is not None)
    if held is not None:
        loss = _loss(best, *held, balance)
    if everything is not None:
        best = _Problem(*everything, balance, gram).minimise(best, chosen, exact=True)
    return Solution(best[:-1].T, best[-1], chosen, loss)


def _some(rows: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
    """Not too many rows to choose the penalty by, of every class its share."""
    if len(rows) <= _MOST_TO_CHOOSE:
        return rows, targets
    _, some = targets.hold_out(_MOST_TO_CHOOSE / len(rows), seed=0)
    return rows[some.to(rows.device)], targets.take(some)


def _choose(
    rows: Tensor, targets: Targets, held: tuple[Tensor, Targets], balance: bool, gram: Tensor | None
) -> tuple[Tensor, float]:
    """(D + 1, K) parameters for the penalty that predicts held-out rows best, and that penalty."""
    problem = _Problem(rows, targets, balance, gram)
    path = problem.start()
    tried: list[tuple[float, float, Tensor]] = []
    for penalty in PENALTIES:
        path = problem.minimise(path, penalty, exact=False)
        tried.append((_loss(path, *held, balance), penalty, path))
        before = min((loss for loss, _, _ in tried[:-_PATIENCE]), default=float("inf"))
        if min(loss for loss, _, _ in tried) > min((1 - _GAIN) * before, before - _LEAST):
            break
    _, penalty, best = min(tried, key=lambda each: each[0])
    return best, penalty


def _loss(parameters: Tensor, rows: Tensor, targets: Targets, balance: bool) -> float:
    scores = spread(rows @ parameters[:-1].float() + parameters[-1].float(), targets)
    return float(log_loss(scores.double().cpu(), targets, targets.weights(balance)))


def _gram(rows: Tensor) -> Tensor | None:
    """(D, D) float32, how the rows are spread, from as many of them as it takes; None where there are too few."""
    count, width = rows.shape
    if count < width:
        return None
    some = rows[:: max(count // (2 * width), 1)]
    return some.T @ some / len(some)


class _Even:
    """Parameters in which the loss is curved about equally in all directions, so that few steps are needed.

    Args:
        gram: how the rows are spread.
        curvature: mean of p (1 - p), what one row contributes at the present probabilities.
        penalty: contributes in all directions.
    """

    def __init__(self, gram: Tensor, curvature: float, penalty: float) -> None:
        # Not exact, any invertible matrix will do: float32 needs the last bit of diagonal.
        bent = gram * curvature
        bent.diagonal().add_(penalty + 1e-5 * curvature)
        self.triangle = torch.linalg.cholesky(bent).double()
        self.bias = curvature**0.5

    def enter(self, parameters: Tensor) -> Tensor:
        """(D + 1, K) parameters in these coordinates."""
        return torch.cat([self.triangle.T @ parameters[:-1], parameters[-1:] * self.bias])

    def leave(self, inside: Tensor) -> Tensor:
        """And back."""
        weight = torch.linalg.solve_triangular(self.triangle.T, inside[:-1], upper=True)
        return torch.cat([weight, inside[-1:] / self.bias])

    def slope(self, gradient: Tensor) -> Tensor:
        """The gradient in these coordinates."""
        weight = torch.linalg.solve_triangular(self.triangle, gradient[:-1], upper=False)
        return torch.cat([weight, gradient[-1:] / self.bias])


class _Problem:
    """Rows and what they are, as a function of the (D + 1, K) parameters: loss and gradient without a graph."""

    def __init__(self, rows: Tensor, targets: Targets, balance: bool, gram: Tensor | None) -> None:
        self.rows = rows
        self.gram = gram
        self.several = targets.several
        self.columns = targets.columns().to(rows.device)
        weights = targets.weights(balance)
        self.weights = (weights if targets.several else weights.unsqueeze(1)).to(rows.device)
        # Per column, as if each label were alone.
        self.total = self.weights.sum(dim=0)

    def start(self) -> Tensor:
        """No weights, and biases that say how frequent the classes are."""
        share = ((self.columns * self.weights).sum(dim=0) + 0.5) / (self.total + 1)
        bias = share.log() if self._softmax else share.logit()
        rows = torch.zeros((self.rows.shape[1], len(bias)), dtype=torch.float64, device=bias.device)
        return torch.cat([rows, bias.unsqueeze(0)])

    @property
    def _softmax(self) -> bool:
        return not self.several and self.columns.shape[1] > 1

    def minimise(self, start: Tensor, penalty: float, *, exact: bool) -> Tensor:
        """The best (D + 1, K) parameters, from others on; not ``exact``: to within about a hundredth of the loss."""
        even = None if self.gram is None else _Even(self.gram, self._curvature(start), penalty)
        inside = (start.clone() if even is None else even.enter(start)).requires_grad_()

        def closure() -> Tensor:
            given = inside.detach()
            loss, gradient = self._at(given if even is None else even.leave(given), penalty)
            inside.grad = gradient if even is None else even.slope(gradient)
            return loss

        closure()
        steepest = float(inside.grad.abs().max()) if inside.grad is not None else 0.0
        optimizer = torch.optim.LBFGS(
            [inside],
            max_iter=200 if exact else 100,
            # Scores are float32: more digits than these are noise.
            tolerance_grad=1e-6 if exact else 0.1 * steepest,
            tolerance_change=1e-8,
            history_size=20,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(closure)  # type: ignore[no-untyped-call]
        return inside.detach() if even is None else even.leave(inside.detach())

    def _curvature(self, parameters: Tensor) -> float:
        scores = (self.rows @ parameters[:-1].float()).double().add_(parameters[-1])
        sure = scores.softmax(dim=1) if self._softmax else scores.sigmoid()
        return max(float((sure * (1 - sure)).mean()), 1e-4)

    def _at(self, parameters: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
        weight, bias = parameters[:-1], parameters[-1]
        scores = (self.rows @ weight.float()).double().add_(bias)
        if self._softmax:
            logs = scores.log_softmax(dim=1)
            losses, wrong = -(logs * self.columns), logs.exp_().sub_(self.columns)
        else:
            losses = F.softplus(scores) - scores * self.columns
            wrong = scores.sigmoid_().sub_(self.columns)
        share = self.weights / self.total
        loss = (losses * share).sum() + penalty / 2 * weight.square().sum()
        wrong *= share
        slope = (self.rows.T @ wrong.float()).double().add_(weight, alpha=penalty)
        return loss, torch.cat([slope, wrong.sum(dim=0, keepdim=True)])
