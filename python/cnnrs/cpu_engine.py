"""Engine ``cpu``: the training step compiled to native code, without libtorch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import accumulate as running_sums
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from cnnrs import _cnnrs
from cnnrs.graph import Lowered
from cnnrs.iterators import RowsIter, columns
from cnnrs.loader import DataLoader
from cnnrs.losses import Totals
from cnnrs.optimizers import Step, overlap, reached, state_of
from cnnrs.plain import is_plain

#: Compiled plans and their threads live as long as the model.
_PLANS: WeakKeyDictionary[nn.Module, _cnnrs.CpuPlans] = WeakKeyDictionary()


def supports(
    lowered: Lowered,
    optimizer: Optimizer | None,
    loss: tuple[Any, ...] | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    input_shape: tuple[int, ...] | None = None,
    targets: torch.Tensor | None = None,
) -> list[str]:
    """Reasons why engine ``cpu`` cannot train or validate a lowered model; empty when it can.

    Args:
        lowered: the model in the mode it will run in.
        optimizer: None for validation.
        loss: the loss as the engines know it, None for one that must be called.
        device: of the model.
        dtype: of the inputs.
        input_shape: (N, ...) of a batch, where known; some obstacles show only then.
        targets: of a batch, where known.
    """
    reasons = tensor_obstacles(lowered)
    if device.type != "cpu" and not reasons:
        reasons.append(f"the model is on {device}")
    if dtype is not torch.float32:
        reasons.append(f"the inputs are {dtype}, not torch.float32")
    if loss is None:
        reasons.append("the loss is none of nll_loss, cross_entropy, mse_loss and bce_with_logits of reduction 'mean'")
    if optimizer is not None:
        reasons += _optimizer_obstacles(optimizer, lowered)
    if loss is not None and (reason := _loss_obstacle(loss)):
        reasons.append(reason)
    values = None
    if targets is not None and loss is not None:
        classes = loss[0] in ("nll", "cross_entropy")
        values = None if classes else list(targets.shape)
        if targets.dtype is not (torch.int64 if classes else torch.float32) or (classes and targets.dim() != 1):
            reasons.append(f"the targets are {targets.dtype} of shape {tuple(targets.shape)}")
    if input_shape is not None and input_shape[:1] == (0,):
        reasons.append("the batch is empty")
    if input_shape is not None and not reasons:
        obstacle = _cnnrs.cpu_obstacle(lowered.graph, list(input_shape), values)
        reasons += [obstacle] if obstacle else []
    return reasons


def _optimizer_obstacles(optimizer: Optimizer, lowered: Lowered) -> list[str]:
    rows = _Rows(optimizer, lowered)
    # Threads write all of them at once.
    if overlap([*lowered.tensors, *state_of(optimizer, rows.parameters)]):
        return ["two of its tensors share memory"]
    known = f"the optimizer {type(optimizer).__name__} is none of plain SGD, Adam and AdamW"
    return [] if rows.native else [known]


def _loss_obstacle(loss: tuple[Any, ...]) -> str | None:
    """Options that PyTorch does not take, or that are more than numbers."""
    weight = loss[1] if len(loss) > 1 else None
    if weight is not None:
        plain = weight.dtype is torch.float32 and weight.dim() == 1 and weight.device.type == "cpu"
        if not plain or weight.requires_grad:
            return f"the loss's weight is {weight.dtype} of shape {tuple(weight.shape)} on {weight.device}, or trained"
    if len(loss) > 3 and not 0 <= loss[3] <= 1:
        return f"label_smoothing must be between 0.0 and 1.0, got {loss[3]}"
    return None


def tensor_obstacles(lowered: Lowered) -> list[str]:
    """Reasons that lie in the model's tensors: engine ``cpu`` needs contiguous float32 in CPU memory."""
    elsewhere = [tensor.device for tensor in lowered.tensors if tensor.device.type != "cpu"]
    reasons = [f"the model is on {elsewhere[0]}"] if elsewhere else []
    for tensor in lowered.tensors:
        floats = tensor.dtype is torch.float32 and tensor.is_contiguous()
        if not floats and not (tensor.dtype is torch.int64 and tensor.numel() == 1):
            reasons.append(f"a tensor of shape {tuple(tensor.shape)} is {tensor.dtype}, or not contiguous")
            break
    return reasons


def run(
    epoch: int,
    phase: str,
    model: nn.Module,
    lowered: Lowered,
    loss: tuple[Any, ...],
    optimizer: Optimizer | None,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]] | FeatureRows,
    clip: tuple[str, float] | None = None,
    accumulate: int = 1,
    after: Callable[[int, float, Step | None], Any] | None = None,
) -> Totals:
    """One epoch; :func:`supports` must have had no objection.

    Gradients are applied where they arise: ``parameter.grad`` is None afterwards. Dropout draws from a generator of its
    own, seeded once per epoch from ``torch``'s, so a seed gives the same masks for any number of threads.

    Args:
        epoch: number of the epoch, for messages.
        phase: "training" or "validation".
        model: owner of the compiled plans.
        lowered: the model as operations, in the mode of ``phase``.
        loss: ("nll", weight, ignore_index), ("cross_entropy", weight, ignore_index, label_smoothing), ("mse",) or
            ("bce_with_logits",).
        optimizer: SGD, Adam or AdamW; None for validation.
        batches: yields float32 (N, ...) inputs and int64 (N,) or float32 (N, K) targets; or rows of features.
        clip: ("norm" or "value", the largest there may be) of the gradients.
        accumulate: batches per step of the optimizer.
        after: called with number and mean loss of every batch, and the optimizer's rows; returns their new options or
            None.

    Returns:
        What has been added up.
    """
    plans = _PLANS.setdefault(model, _cnnrs.CpuPlans())
    if isinstance(batches, FeatureRows):
        totals: Totals = batches.epoch(
            lambda rows: run(epoch, phase, model, lowered, loss, optimizer, rows, clip, accumulate, after),
            lambda: plans.steps * accumulate,
        )
        return totals
    # The weights of the classes as numbers, in whatever order of memory they are.
    numbers = tuple(part.tolist() if isinstance(part, torch.Tensor) else part for part in loss)
    arguments = (epoch, phase, lowered.graph, lowered.tensors, numbers)
    workers = torch.get_num_threads()
    if phase == "validation" or optimizer is None:
        bound = None if after is None else lambda batch, mean: after(batch, mean, None)
        return Totals(*_cnnrs.fit_cpu(*arguments, [], [], None, plans, workers, 0, batches, 1, bound))
    optimizer.zero_grad()
    # (The loader has drawn its order by now: who chose this engine has looked at the first batch.)
    draws = any(kind == "Dropout" and a["training"] and a["p"] > 0 for _, kind, _, a in lowered.operations)
    seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_()) if draws else 0
    step = _Rows(optimizer, lowered)
    sgd, adam = step.handle
    bound = None if after is None else lambda batch, mean: after(batch, mean, step)
    try:
        return Totals(*_cnnrs.fit_cpu(*arguments, sgd, adam, clip, plans, workers, seed, batches, accumulate, bound))
    finally:
        step.finish_after(plans.steps)


class FeatureRows:
    """A `cnnrs.DataLoader` over features in memory or in a mapped file, whose epochs need no Python per batch.

    Attributes:
        features: (N, ...) float32.
        labels: (N,) int64 or (N, K) float32.
    """

    def __init__(self, loader: DataLoader[Any], features: torch.Tensor, labels: torch.Tensor) -> None:
        self._loader = loader
        self.features = features
        self.labels = labels
        #: The batch that an engine would not take.
        self.current: tuple[torch.Tensor, torch.Tensor] | None = None

    @staticmethod
    def of(loader: Any) -> FeatureRows | None:
        """The rows of a loader, or None where its batches must be asked for one by one."""
        if type(loader) is not DataLoader or loader.device is not None or loader.pin_memory:
            return None
        found = columns(loader)
        if found is None or len(found) != 2:
            return None
        features, labels = map(_shared, found)
        if features is None or labels is None or features.dtype is not torch.float32 or features.dim() < 2:
            return None
        classes = labels.dtype is torch.int64 and labels.dim() == 1
        values = labels.dtype is torch.float32 and labels.dim() == 2
        return FeatureRows(loader, features, labels) if len(features) == len(labels) and (classes or values) else None

    def example(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of a batch of the usual size."""
        rows = min(self._loader.batch_size or 1, len(self.features))
        return self.features[:rows], self.labels[:rows]

    def epoch(self, work: Callable[[Any], Any], done: Callable[[], int]) -> Any:
        """Draws the order of an epoch as the loader would and gives it to ``work``; ``done`` counts its batches."""
        iterator = iter(self._loader)
        assert isinstance(iterator, RowsIter)
        progress, size = iterator._progress, len(self.features)
        began = (progress.batches, progress.samples)
        parts: list[list[int]] = []
        try:
            while True:
                parts.append(iterator._base(iterator._index()))
        except StopIteration:
            pass
        order = [row + size if row < 0 else row for part in parts for row in part]
        outside = next((row for row in order if not 0 <= row < size), None)
        if outside is not None:
            raise IndexError(f"index {outside} is out of range for {size} features")
        ended = (progress.batches, progress.samples)
        progress.batches, progress.samples = began
        ends = list(running_sums(map(len, parts)))
        try:
            result = work((self.features, self.labels, order, ends))
        except BaseException:
            progress.batches += done()
            progress.samples += sum(map(len, parts[: done()]))
            if done() < len(parts):
                self.current = self.features[parts[done()]], self.labels[parts[done()]]
            raise
        progress.batches, progress.samples = ended
        progress.finished = True
        return result


def _shared(column: Any) -> torch.Tensor | None:
    """A column as a contiguous tensor over the same memory, where there is one."""
    if isinstance(column, list):
        column = np.asarray(column) if all(type(value) is int for value in column) else None
    if isinstance(column, np.ndarray) and column.dtype.isnative and column.flags.c_contiguous and column.flags.aligned:
        with warnings.catch_warnings():
            # That a mapped file is read-only does not matter: nobody writes to it.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            column = torch.from_numpy(np.asarray(column)) if column.dtype in (np.float32, np.int64) else None
    if isinstance(column, torch.Tensor) and column.device.type == "cpu" and is_plain(column) and column.is_contiguous():
        return column.detach()
    return None


class _Rows(Step):
    """The optimizer's rows, each after the index of its tensor in the graph."""

    def __init__(self, optimizer: Optimizer, lowered: Lowered) -> None:
        self._index = {id(tensor): i for i, tensor in enumerate(lowered.tensors)}
        super().__init__(optimizer, reached(lowered))

    def _native_handle(self) -> Any:
        rows = [(self._index[id(p)], self._row(group, p)) for group, p in self._rows]
        return (rows, []) if type(self._optimizer) is torch.optim.SGD else ([], rows)

    def _row(self, group: dict[str, Any], p: torch.Tensor) -> Any:
        return self._sgd_row(group, p) if type(self._optimizer) is torch.optim.SGD else self._adam_row(group, p)

    def publish(self, steps: int) -> None:
        """Show state as it is after so many steps; there are no gradients to show."""
        self.finish_after(steps)

    def finish_after(self, steps: int) -> None:
        """Leave the optimizer as ``steps`` of its own steps would have."""
        self._settle([steps > 0] * len(self._rows))
