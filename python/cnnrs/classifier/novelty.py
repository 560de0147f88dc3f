"""How strange a photo is to a classifier: how far its features are from all that it was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cnnrs.classifier.labelled import as_rows
from cnnrs.classifier.neighbours import unit
from cnnrs.features.resemblance import nearest

#: So many rows are remembered unless it is said otherwise.
MOST_ROWS = 4096
# The most similar row alone may be an odd one.
_NEIGHBOUR = 5


@dataclass(frozen=True)
class Novelty:
    """Distance to the photos that were trained on, and from where on a photo is unknown.

    The distance is one minus the cosine of a photo's features and those of the fifth most similar row.

    Attributes:
        rows: (R, D) float16 of length 1.
        k: which most similar row counts, from 1.
        threshold: distance that all but one in a hundred of the validation photos keep within.
    """

    rows: Tensor
    k: int
    threshold: float

    @classmethod
    def of(
        cls,
        train_features: Any,
        valid_features: Any = None,
        quantile: float = 0.99,
        most_rows: int = MOST_ROWS,
        seed: int = 0,
    ) -> Novelty:
        """Remember rows, and measure how far others are from them.

        Args:
            train_features: (N, ...) rows as a tensor, an array or :class:`cnnrs.Features`.
            valid_features: (M, ...) rows of photos that belong to the classes and were not trained on; None: each row
                that is remembered is measured against the others.
            quantile: the share of them, 0 to 1, that is within the threshold.
            most_rows: so many rows are remembered, drawn at random.
            seed: the same seed draws the same rows.

        Raises:
            ValueError: there are too few rows, the widths differ, or a row is not finite.
        """
        if not 0 < quantile <= 1:
            raise ValueError(f"quantile must be above 0 and at most 1, got {quantile}")
        rows = as_rows(train_features, "training features")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:most_rows].sort().values
        kept = unit(rows, order, "training features").half().cpu()
        k = min(_NEIGHBOUR, len(kept))
        if valid_features is None:
            if len(kept) < 2:
                raise ValueError("one row has no others to be measured against: give valid_features")
            k = min(k, len(kept) - 1)
            own = torch.arange(len(kept))
            cosines, _ = nearest(kept, kept, k, (own, own))
            found = 1 - cosines[:, -1]
        else:
            found = cls(kept, k, 0.0).score(valid_features)
        # A photo that was measured: no more than the rest are farther.
        return cls(kept, k, float(found.quantile(quantile, interpolation="higher")))

    def score(self, features: Any) -> Tensor:
        """(M,) float32 distances of (M, ...) features, from 0; above ``threshold`` a photo is unknown.

        Raises:
            ValueError: the features have another width, or a row is not finite.
        """
        rows = as_rows(features)
        if rows.shape[1] != self.rows.shape[1]:
            raise ValueError(f"features of {self.rows.shape[1]} numbers per row are known, got {rows.shape[1]}")
        cosines, _ = nearest(unit(rows).cpu(), self.rows, self.k)
        return (1 - cosines[:, -1]).clamp(min=0)

    def state(self) -> dict[str, Tensor]:
        """What it is, as tensors, for a file."""
        return {
            "rows": self.rows,
            "k": torch.tensor(self.k),
            "threshold": torch.tensor(self.threshold, dtype=torch.float64),
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> Novelty:
        """What :meth:`state` gave.

        Raises:
            ValueError: the tensors are others.
        """
        try:
            rows, k, threshold = state["rows"], int(state["k"]), float(state["threshold"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"this is no state of a Novelty: {error}") from error
        if rows.dim() != 2 or not 1 <= k <= len(rows):
            raise ValueError(f"this is no state of a Novelty: k is {k} for rows of shape {tuple(rows.shape)}")
        return cls(rows.half(), k, threshold)
