"""Ridge regression on plus and minus one, in closed form: one factorisation for all penalties and any labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cnnrs.classifier.labelled import CHUNK, Targets
from cnnrs.classifier.logistic import PENALTIES, PENALTY, Solution, spread
from cnnrs.classifier.scores import sharpness


@dataclass(frozen=True)
class _Side:
    """Weighted rows around their mean, by the inner products of the smaller side.

    Attributes:
        gram: (D, D) float64, or where there are fewer rows than numbers in them, (N, N).
        mean: (D,) float64.
        wide: where there are fewer rows, those that were multiplied, (N, D) float32.
    """

    gram: Tensor
    mean: Tensor
    wide: Tensor | None

    @classmethod
    def of(cls, rows: Tensor, weights: Tensor) -> _Side:
        total = weights.sum()
        mean = _slopes(rows, weights.unsqueeze(1)).squeeze(1) / total
        if len(rows) < rows.shape[1]:
            wide = (rows - mean.float()) * weights.sqrt().float().unsqueeze(1)
            return cls(_products(wide), mean, wide)
        return cls(_products(rows.T, weights) - total * mean.outer(mean), mean, None)


@dataclass(frozen=True)
class Factor:
    """Rows in the basis in which ridge regression is a division, whatever the penalty and whatever the labels.

    Attributes:
        rows: (N, D) float32 that were factorised.
        weights: (N,) float64.
        mean: (D,) float64, their weighted mean.
        basis: (D, R) float32, R at most the smaller of N and D.
        spectrum: (R,) float64, positive.
    """

    rows: Tensor
    weights: Tensor
    mean: Tensor
    basis: Tensor
    spectrum: Tensor

    @classmethod
    def of(cls, rows: Tensor, weights: Tensor) -> Factor:
        """Factorise (N, D) float32 rows of (N,) float64 weights."""
        side = _Side.of(rows, weights)
        spectrum, vectors = torch.linalg.eigh(side.gram)
        # What is below is rounding: directions in which the rows do not differ.
        kept = spectrum > spectrum[-1].clamp(min=0) * 1e-7
        spectrum, basis = spectrum[kept], vectors[:, kept].float()
        if side.wide is not None:
            basis = side.wide.T @ (basis / spectrum.sqrt().float())
        return cls(rows, weights, side.mean, basis, spectrum)

    def project(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What `solve` needs of (N, K) float64 targets: (R, K) that the rows can tell, and their (K,) mean."""
        share = self.weights.unsqueeze(1)
        mean = (targets * share).sum(dim=0) / share.sum()
        # The residuals add up to zero: the rows need not be centred.
        return (self.basis.T @ _slopes(self.rows, (targets - mean) * share).float()).double(), mean

    def shrink(self, projected: Tensor, penalty: float) -> Tensor:
        """(R, K) weights in this basis."""
        return projected / (self.spectrum + penalty * self.weights.sum()).unsqueeze(1)

    def solve(self, targets: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
        """(K, D) weights and (K,) biases with the least mean square error plus ``penalty`` times their squares."""
        projected, mean = self.project(targets)
        weight = (self.basis @ self.shrink(projected, penalty).float()).double()
        return weight.T, mean - self.mean @ weight


def solve(
    rows: Tensor,
    targets: Targets,
    held: tuple[Tensor, Targets] | None,
    *,
    penalty: float | None,
    balance: bool,
    everything: tuple[Tensor, Targets] | None,
) -> Solution:
    """Minimise the mean square error plus ``penalty`` times the squares of the weights (the bias is free).

    Args:
        rows: (N, D) float32, standardised.
        targets: N, of which plus and minus one are made.
        held: standardised rows, and what they are, that choose the penalty and how sure scores are.
        penalty: None: the best of ``PENALTIES`` for ``held``.
        balance: whether all classes weigh the same.
        everything: rows that the head is solved for once more when the penalty is known; None: it stays as it is.

    Returns:
        The weights, multiplied by what makes probabilities of their scores.
    """
    seen, known = (rows, targets) if held is None else held
    wanted: tuple[float, ...] = PENALTIES if held is not None else (PENALTY,)
    if penalty is not None:
        wanted = (penalty,)
    parts = []
    for weights, signs in _parts(targets, balance, rows.device):
        factor = Factor.of(rows, weights)
        projected, mean = factor.project(signs)
        # All penalties look at the held-out rows from where they were factorised.
        inside = seen @ factor.basis - factor.mean.float() @ factor.basis
        scores = [(inside @ factor.shrink(projected, one).float()).double() + mean for one in wanted]
        parts.append(torch.stack(scores).cpu())
    tried = []
    for one, scores in zip(wanted, torch.cat(parts, dim=2), strict=True):
        sharp, loss = sharpness(spread(scores, known), known, known.weights(balance))
        tried.append((loss, one, sharp))
    loss, chosen, sharp = min(tried)
    final_rows, final_targets = (rows, targets) if everything is None else everything
    solved = [
        _direct(final_rows, weights, signs, chosen)
        for weights, signs in _parts(final_targets, balance, final_rows.device)
    ]
    weight, bias = (torch.cat(values) * sharp for values in zip(*solved, strict=True))
    return Solution(weight, bias, chosen, None if held is None else loss)


def _parts(targets: Targets, balance: bool, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """(N,) weights of rows and the (N, K) plus and minus ones that have them."""
    weights, signs = targets.weights(balance).to(device), 2 * targets.columns().to(device) - 1
    if not targets.several:
        yield weights, signs
    elif not balance:
        yield weights[:, 0], signs
    else:
        yield from zip(weights.T, signs.T.unsqueeze(2), strict=True)


def _direct(rows: Tensor, weights: Tensor, targets: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """What `Factor.solve` returns, for one penalty: without the spectrum it is a fraction of the work."""
    side = _Side.of(rows, weights)
    side.gram.diagonal().add_(penalty * weights.sum())
    triangle, failed = torch.linalg.cholesky_ex(side.gram)
    if failed:
        # Less penalty than rounding has taken away where rows do not differ; the spectrum leaves those directions out.
        return Factor.of(rows, weights).solve(targets, penalty)
    share = weights.unsqueeze(1)
    mean = (targets * share).sum(dim=0) / share.sum()
    residual = (targets - mean) * share
    if side.wide is None:
        weight = torch.cholesky_solve(_slopes(rows, residual), triangle)
    else:
        weight = _slopes(side.wide, torch.cholesky_solve(residual / share.sqrt(), triangle))
    return weight.T, mean - side.mean @ weight


def _slopes(rows: Tensor, values: Tensor) -> Tensor:
    """(D, K) float64 of (N, D) float32 and (N, K) float64: what each number of a row adds up to."""
    total = torch.zeros((rows.shape[1], values.shape[1]), dtype=torch.float64, device=rows.device)
    for start in range(0, len(rows), CHUNK):
        total += rows[start : start + CHUNK].T @ values[start : start + CHUNK].float()
    return total


def _products(sides: Tensor, weights: Tensor | None = None) -> Tensor:
    """(n, n) float64 inner products of (n, m) float32: sums of float32 products over a part of m at a time."""
    total = torch.zeros((len(sides), len(sides)), dtype=torch.float64, device=sides.device)
    for start in range(0, sides.shape[1], CHUNK):
        part = sides[:, start : start + CHUNK]
        other = part if weights is None else part * weights[start : start + CHUNK].float()
        total += other @ part.T
    return total
