"""Features that were computed once, as a data set and as a generator of batches: the tutorial's last chapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset


class FeatureDataset(Dataset[tuple[Any, Any]]):
    """Rows of features and their labels: the tutorial's ``My_dataset``.

    Item ``i`` is ``(features[i], labels[i])``, whatever the two are: (N, ...) tensors, (N, ...) arrays (also
    memory-mapped), or lists of length N. A ``cnnrs.DataLoader`` gathers the rows of a batch in one step.

    Args:
        features: (N, ...) tensor or array of any dtype, or a list of N rows.
        labels: (N, ...) tensor or array, or a list of N labels.

    Raises:
        ValueError: there are not as many labels as features.

    Example:
        >>> dataset = FeatureDataset(torch.arange(6.0).view(3, 2), torch.tensor([0, 1, 0]))
        >>> dataset[1]
        (tensor([2., 3.]), tensor(1))
    """

    def __init__(self, features: Any, labels: Any) -> None:
        if len(features) != len(labels):
            raise ValueError(
                f"every row of features needs one label: got {len(features)} features and {len(labels)} labels"
            )
        self.features = features
        self.labels = labels

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.features[index], self.labels[index]

    def __len__(self) -> int:
        return len(self.features)


def data_gen(conv_feat: Any, labels: Any, batch_size: int = 64, shuffle: bool = True) -> Iterator[tuple[Any, Any]]:
    """Batches of features and labels, as in the tutorial: ``(conv_feat[rows], labels[rows])``.

    The last batch may be smaller. The order comes from numpy's global generator (``np.random.seed``), as in the
    tutorial.

    Args:
        conv_feat: (N, ...) array or tensor; the batches are of the same type.
        labels: N labels; the batches are arrays, or tensors when ``labels`` is a tensor.
        batch_size: rows per batch.
        shuffle: whether the rows come in a random order.

    Raises:
        ValueError: there are not as many labels as features, or ``batch_size`` is not positive.

    Example:
        >>> [labels.tolist() for _, labels in data_gen(np.zeros((5, 2)), [0, 1, 2, 3, 4], 2, shuffle=False)]
        [[0, 1], [2, 3], [4]]
    """
    if len(conv_feat) != len(labels):
        raise ValueError(f"every row of features needs one label: got {len(conv_feat)} features, {len(labels)} labels")
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    if not isinstance(conv_feat, torch.Tensor):
        conv_feat = np.asanyarray(conv_feat)
    if not isinstance(labels, torch.Tensor):
        labels = np.array(labels)
    return _batches(conv_feat, labels, batch_size, shuffle)


def _batches(conv_feat: Any, labels: Any, batch_size: int, shuffle: bool) -> Iterator[tuple[Any, Any]]:
    # One permutation for all, rows gathered batch by batch: the tutorial's ``conv_feat[index]`` copies everything.
    order = np.random.permutation(len(conv_feat)) if shuffle else None
    for start in range(0, len(conv_feat), batch_size):
        if order is None:
            rows: Any = slice(start, start + batch_size)
            yield conv_feat[rows], labels[rows]
        else:
            rows = order[start : start + batch_size]
            yield _take(conv_feat, rows), _take(labels, rows)


def _take(data: Any, rows: Any) -> Any:
    return data[index_on(torch.from_numpy(rows), data.device)] if isinstance(data, torch.Tensor) else data[rows]


def index_on(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """(N,) int64 numbers of rows, from the CPU to where the rows are."""
    # A copy out of pageable memory waits until the device has done all that is queued before it.
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows.to(device)
