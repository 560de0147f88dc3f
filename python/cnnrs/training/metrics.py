"""How good a classifier is, and where it is wrong: numbers that the report and the plots draw."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cnnrs._util.text import left, right, shown, width

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A wider table does not fit a terminal.
_SHOWN_CLASSES = 12
_TERMINAL = 100


@dataclass(frozen=True)
class Confusion:
    """Which class was taken for which; prints as a table.

    Attributes:
        matrix: (C, C) int64; ``matrix[i, j]`` samples of class i were predicted as class j.
        classes: C names.
    """

    matrix: Tensor
    classes: list[str]

    @property
    def accuracy(self) -> float:
        """Percent of all samples on the diagonal; NaN without samples."""
        total = int(self.matrix.sum())
        return 100.0 * int(self.matrix.diagonal().sum()) / total if total else math.nan

    @property
    def support(self) -> list[int]:
        """Samples of each class."""
        return [int(count) for count in self.matrix.sum(dim=1)]

    @property
    def recall(self) -> list[float]:
        """Of the samples of a class, percent that were found; NaN for a class without samples."""
        return _percent(self.matrix.diagonal(), self.matrix.sum(dim=1))

    @property
    def precision(self) -> list[float]:
        """Of the samples predicted as a class, percent that are; NaN for a class that was never predicted."""
        return _percent(self.matrix.diagonal(), self.matrix.sum(dim=0))

    @property
    def f1(self) -> list[float]:
        """Harmonic mean of recall and precision per class, percent; 0 for a class never found, NaN without samples."""
        diagonal, both = self.matrix.diagonal(), self.matrix.sum(dim=0) + self.matrix.sum(dim=1)
        return [
            100.0 * 2 * int(d) / int(b) if n else math.nan for d, b, n in zip(diagonal, both, self.support, strict=True)
        ]

    @property
    def balanced_accuracy(self) -> float:
        """Mean recall of the classes that have samples, percent; NaN without samples."""
        return _mean(self.recall)

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the classes that have samples, percent; NaN without samples."""
        return _mean(self.f1)

    @property
    def baseline(self) -> float:
        """Accuracy of always saying the most frequent class, percent; NaN without samples."""
        total = sum(self.support)
        return 100.0 * max(self.support) / total if total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of ``accuracy``: what other samples as many as these would show, 19 times in 20."""
        return wilson(int(self.matrix.diagonal().sum()), int(self.matrix.sum()))

    @property
    def missed(self) -> list[str]:
        """Classes that have samples of which none was found."""
        return [name for name, found, n in zip(self.classes, self.recall, self.support, strict=True) if n and not found]

    def most_confused(self, most: int = 10) -> list[tuple[str, str, int]]:
        """(true class, predicted class, how often), most frequent first."""
        wrong = self.matrix.clone().fill_diagonal_(0)
        order = wrong.flatten().argsort(descending=True, stable=True)[:most]
        size = len(self.classes)
        pairs = [(int(i) // size, int(i) % size) for i in order]
        return [(self.classes[i], self.classes[j], int(wrong[i, j])) for i, j in pairs if wrong[i, j]]

    def plot(self, path: Any = None) -> Figure:
        """Draw the matrix; a file's suffix says which format. Needs matplotlib."""
        from cnnrs._util.plots import plot_confusion

        return plot_confusion(self.matrix, self.classes, path)

    def __str__(self) -> str:
        if len(self.classes) > _SHOWN_CLASSES:
            lines = [f"{shown(true)} taken for {shown(taken)}: {n:,}" for true, taken, n in self.most_confused()]
            return "\n".join([f"{self.accuracy:.2f} % of {int(self.matrix.sum()):,} are right", *lines])
        names = [shown(name) for name in self.classes]
        first = max(map(width, names), default=0)
        columns = max(first, len(f"{int(self.matrix.max()):,}"), 4)
        heads = names
        if first + len(names) * (columns + 2) > _TERMINAL:
            # Long names stand at the rows only, with the numbers that stand for them.
            heads = [str(number) for number in range(len(names))]
            names = [f"{number:>2} {name}" for number, name in enumerate(names)]
            first, columns = first + 3, max(len(f"{int(self.matrix.max()):,}"), 4)
        first = max(first, 4)
        head = " " * first + "  " + "  ".join(right(name, columns) for name in heads)
        rows = [
            "  ".join([left(name, first), *(f"{int(n):,}".rjust(columns) for n in row)])
            for name, row in zip(names, self.matrix, strict=True)
        ]
        return "\n".join(["rows: true class, columns: predicted class", head, *rows])

    __repr__ = __str__


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share in percent (Wilson 1927), which stays within 0..100; NaN without samples."""
    if not total:
        return math.nan, math.nan
    share, z = right / total, 1.959964
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return 100 * max(middle - half, 0.0), 100 * min(middle + half, 1.0)


def confusion(targets: Any, predictions: Any, classes: Sequence[str] | None = None) -> Confusion:
    """Count which class was taken for which.

    Args:
        targets: (N,) true class numbers.
        predictions: (N,) predicted class numbers, or (N, C) scores, the largest of which counts.
        classes: C names; numbers without them.

    Returns:
        A :class:`Confusion`, with ``matrix``, ``precision``, ``recall``, ``plot()``.

    Raises:
        ValueError: the lengths differ, or a number has no class.

    >>> import cnnrs
    >>> cnnrs.confusion([0, 0, 1], [0, 1, 1], ["cat", "dog"])
    rows: true class, columns: predicted class
           cat   dog
    cat      1     1
    dog      0     1
    """
    true, taken = _numbers(targets), torch.as_tensor(predictions).detach().cpu()
    if taken.dim() == 2:
        scores = taken.shape[1]
        taken = taken.argmax(dim=1)
    else:
        scores = 0
    if true.shape != taken.shape:
        raise ValueError(f"every prediction needs one target: got {len(true)} targets and {len(taken)} predictions")
    largest = int(max(true.max(), taken.max())) + 1 if len(true) else 0
    names = list(classes) if classes is not None else [str(i) for i in range(max(largest, scores))]
    if largest > len(names) or (len(true) and int(min(true.min(), taken.min())) < 0):
        raise ValueError(
            f"class numbers must be in 0..{len(names) - 1} for {len(names)} classes, got up to {largest - 1}"
        )
    size = len(names)
    matrix = torch.bincount(true * size + taken.to(torch.int64), minlength=size * size).reshape(size, size)
    return Confusion(matrix, names)


@dataclass(frozen=True)
class Bin:
    """Predictions with about the same probability.

    Attributes:
        count: how many.
        confidence: mean probability of the predicted class, 0 to 1.
        accuracy: how many of them are right, 0 to 1.
    """

    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Calibration:
    """Whether "90 % sure" is right nine times in ten.

    Attributes:
        bins: from low to high probability, empty ones left out.
        error: expected calibration error in percentage points: mean distance of confidence and accuracy.
    """

    bins: list[Bin]
    error: float


def calibration(probabilities: Tensor, targets: Tensor, bins: int = 10) -> Calibration:
    """Compare predicted probabilities with how often they are right.

    Args:
        probabilities: (N, C), rows add up to 1.
        targets: (N,) class numbers.
        bins: of equal width between 0 and 1.
    """
    sure, taken = probabilities.double().max(dim=1)
    right = (taken == targets).double()
    which = (sure * bins).long().clamp(max=bins - 1)
    found = []
    for i in range(bins):
        inside = which == i
        if count := int(inside.sum()):
            found.append(Bin(count, float(sure[inside].mean()), float(right[inside].mean())))
    total = max(len(sure), 1)
    return Calibration(found, 100 * sum(b.count * abs(b.confidence - b.accuracy) for b in found) / total)


@dataclass(frozen=True)
class Loss:
    """One sample and how wrong the model is about it.

    Attributes:
        index: row of the scores.
        loss: cross entropy, minus the logarithm of the true class's probability.
        path: the image, None where unknown.
        target: true class.
        predicted: predicted class.
        probability: that the model gave the predicted class, 0 to 1.
    """

    index: int
    loss: float
    path: str | None
    target: str
    predicted: str
    probability: float


class TopLosses(Sequence[Loss]):
    """Samples with the largest losses first."""

    def __init__(self, losses: Sequence[Loss]) -> None:
        self._losses = list(losses)

    def __getitem__(self, index: Any) -> Any:
        return self._losses[index]

    def __len__(self) -> int:
        return len(self._losses)

    def __iter__(self) -> Iterator[Loss]:
        return iter(self._losses)

    def __repr__(self) -> str:
        lines = [
            f"{one.path or f'row {one.index}'}: {one.target}, predicted {one.predicted} "
            f"({100 * one.probability:.1f} %), loss {one.loss:.2f}"
            for one in self
        ]
        return "\n".join(lines) or "no samples"

    def plot(self, path: Any = None) -> Figure:
        """Draw the images in a grid; needs matplotlib, and samples with paths."""
        from cnnrs._util.plots import plot_top_losses

        return plot_top_losses(self, path)


def top_losses(
    scores: Tensor,
    targets: Any,
    paths: Sequence[str] | None = None,
    classes: Sequence[str] | None = None,
    k: int = 9,
    wrong_only: bool = False,
) -> TopLosses:
    """Find the samples a model is most wrong about.

    Args:
        scores: (N, C) outputs before softmax, or log-probabilities.
        targets: (N,) class numbers.
        paths: N image files.
        classes: C names; numbers without them.
        k: how many.
        wrong_only: leave out samples that are predicted right.

    Returns:
        At most ``k`` samples, largest loss first; ``plot()`` shows them.

    Raises:
        ValueError: the lengths differ.

    >>> import torch, cnnrs
    >>> scores = torch.tensor([[4.0, 0.0], [3.0, 0.0], [0.0, 2.0]])
    >>> cnnrs.top_losses(scores, [0, 1, 1], classes=["cat", "dog"], k=1)
    row 1: dog, predicted cat (95.3 %), loss 3.05
    """
    true = _numbers(targets)
    if len(true) != len(scores) or (paths is not None and len(paths) != len(scores)):
        given = f", {len(paths)} paths" if paths is not None else ""
        raise ValueError(
            f"scores, targets and paths belong together: got {len(scores)} scores, {len(true)} targets{given}"
        )
    logs = scores.detach().cpu().float().log_softmax(dim=1)
    losses = -logs.gather(1, true[:, None])[:, 0]
    taken = logs.argmax(dim=1)
    names = list(classes) if classes is not None else [str(i) for i in range(scores.shape[1])]
    order = losses.argsort(descending=True, stable=True)
    if wrong_only:
        order = order[taken[order] != true[order]]
    return TopLosses(
        [
            Loss(
                int(i), float(losses[i]), paths[int(i)] if paths is not None else None, names[int(true[i])],
                names[int(taken[i])], float(logs[i, taken[i]].exp()),
            )
            for i in order[:k]
        ]
    )  # fmt: skip


def _numbers(targets: Any) -> Tensor:
    return torch.as_tensor(targets).detach().cpu().to(torch.int64)


def _mean(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _percent(part: Tensor, whole: Tensor) -> list[float]:
    return [100.0 * int(p) / int(w) if int(w) else math.nan for p, w in zip(part, whole, strict=True)]
