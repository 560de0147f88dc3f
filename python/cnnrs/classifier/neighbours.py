"""The most similar rows by cosine, and the head that lets them vote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cnnrs.classifier.labelled import Targets, chunks
from cnnrs.classifier.scores import sharpness
from cnnrs.features.resemblance import nearest

#: Numbers of neighbours that are tried.
NUMBERS = (1, 3, 5, 9, 15, 25, 49)
#: Without rows to choose by.
NUMBER = 5
# So many held-out rows are enough to choose one of seven numbers.
_MOST_HELD = 2048


def unit(rows: Tensor, order: Tensor | None = None, what: str = "features") -> Tensor:
    """(N, D) float32 copy of rows, in the given order, of length 1; zeros stay zeros."""
    count = len(rows) if order is None else len(order)
    out = torch.empty((count, rows.shape[1]), device=rows.device)
    for start, part in chunks(rows, order, what):
        out[start : start + len(part)] = nn.functional.normalize(part, dim=1)
    return out


class Neighbours(nn.Module):
    """Scores by the votes of the ``k`` most similar rows, whose labels and weights it holds; nothing is trained.

    The softmax of the scores (sigmoid where a row can have several labels) is a share of the votes, sharpened by how
    right such shares were on rows that were held out. With as many votes, the class of the most similar row wins.

    Args:
        rows: N, how many rows vote.
        width: D, numbers per row.
        classes: C.
        k: neighbours that are asked, at most N.
        several: whether a row can have several labels.
        dtype: of the rows: float32, or float16 for half the room.

    Buffers:
        rows: (N, D), of length 1.
        votes: (N, C) float32, what each row says: its weight at its class; with several labels negative against one.
        sharpness: () float32.
    """

    rows: Tensor
    votes: Tensor
    sharpness: Tensor

    def __init__(
        self, rows: int, width: int, classes: int, k: int, several: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.k = k
        self.several = several
        self.register_buffer("rows", torch.zeros((rows, width), dtype=dtype))
        self.register_buffer("votes", torch.zeros((rows, classes)))
        self.register_buffer("sharpness", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """(M, D) features to (M, C) scores."""
        _, places = nearest(nn.functional.normalize(x.float(), dim=1), self.rows, self.k)
        return count(self.votes[places], self.several) * self.sharpness

    def shape(self) -> dict[str, Any]:
        """The arguments that make one whose state this one's is, as plain values."""
        rows, width = self.rows.shape
        dtype = str(self.rows.dtype).removeprefix("torch.")
        return {
            "rows": rows, "width": width, "classes": self.votes.shape[1], "k": self.k, "several": self.several,
            "dtype": dtype,
        }  # fmt: skip

    @classmethod
    def of(cls, shape: Mapping[str, Any]) -> Neighbours:
        """An empty one of such a :meth:`shape`."""
        return cls(**{**shape, "dtype": torch.float16 if shape["dtype"] == "float16" else torch.float32})

    def extra_repr(self) -> str:
        return f"{len(self.rows)} rows, width={self.rows.shape[1]}, classes={self.votes.shape[1]}, k={self.k}"


def count(votes: Tensor, several: bool) -> Tensor:
    """(M, C) logarithms of what (M, k, C) votes add up to, most similar first; of several labels, for less against.

    One vote more for every answer keeps them finite.
    """
    total = votes.clamp(min=0).sum(dim=1)
    if several:
        return (total + 1).log() - (total - votes.sum(dim=1) + 1).log()
    # The earlier a vote, the more similar its row: this breaks ties without outvoting anybody.
    order = torch.linspace(0.5, 0, votes.shape[1], device=votes.device)[:, None]
    return (total + (votes * order).amax(dim=1) + 1).log()


def solve(
    rows: Tensor,
    targets: Targets,
    held: tuple[Tensor, Targets] | None,
    *,
    k: int | None,
    balance: bool,
    everything: tuple[Tensor, Targets] | None,
    dtype: torch.dtype,
) -> tuple[Neighbours, float | None]:
    """Choose ``k`` and the sharpness of the votes.

    Args:
        rows: (N, D) float32 of length 1.
        targets: N.
        held: rows of length 1, and what they are, to choose by.
        k: None: the best of ``NUMBERS`` for ``held``.
        balance: whether a row of a frequent class has less than one vote.
        everything: rows that vote in the end; None: ``rows``.
        dtype: that the head keeps rows in.

    Returns:
        The head, and the mean log loss of the held-out rows; None without.

    Raises:
        ValueError: there are fewer than ``k`` rows.
    """
    if k is not None and not 1 <= k <= len(rows):
        raise ValueError(f"k must be between 1 and the {len(rows):,} rows that vote, got {k}")
    sharp, loss = 1.0, None
    if held is None:
        k = min(NUMBER, len(rows)) if k is None else k
    else:
        seen, known = held
        if len(seen) > _MOST_HELD:
            # Evenly: they are in no order that would matter.
            some = torch.linspace(0, len(seen) - 1, _MOST_HELD).long()
            seen, known = seen[some.to(seen.device)], known.take(some)
        numbers = [k] if k is not None else [n for n in NUMBERS if n <= len(rows)]
        _, places = nearest(seen, rows, max(numbers))
        votes = cast(targets, balance)[places.cpu()]
        weights = known.weights(balance)
        tried = []
        for n in numbers:
            factor, one = sharpness(count(votes[:, :n], targets.several).double(), known, weights)
            tried.append((one, n, factor))
        loss, k, sharp = min(tried)
    if everything is not None:
        rows, targets = everything
    head = Neighbours(len(rows), rows.shape[1], len(targets.classes), k, targets.several, dtype)
    head.rows.copy_(rows)
    head.votes.copy_(cast(targets, balance))
    head.sharpness.fill_(sharp)
    return head.eval(), loss


def cast(targets: Targets, balance: bool) -> Tensor:
    """(N, C) float32 votes: a row's weight for its class; with several labels for those it has, against others."""
    if targets.several:
        return ((2 * targets.values - 1) * targets.weights(balance)).float()
    one_hot = nn.functional.one_hot(targets.values, len(targets.classes))
    return (one_hot * targets.weights(balance).unsqueeze(1)).float()
