"""Engine ``cpu``: the training step compiled to native code, without libtorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer

from cnnrs import _cnnrs
from cnnrs.graph import Lowered
from cnnrs.optimizers import Step

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
    if optimizer is not None and not _Rows(optimizer, lowered.tensors).native:
        reasons.append(f"the optimizer {type(optimizer).__name__} is none of plain SGD, Adam and AdamW")
    values = None
    if targets is not None and loss is not None:
        classes = loss[0] in ("nll", "cross_entropy")
        values = None if classes else list(targets.shape)
        if targets.dtype is not (torch.int64 if classes else torch.float32) or (classes and targets.dim() != 1):
            reasons.append(f"the targets are {targets.dtype} of shape {tuple(targets.shape)}")
    if input_shape is not None and not reasons:
        obstacle = _cnnrs.cpu_obstacle(lowered.graph, list(input_shape), values)
        reasons += [obstacle] if obstacle else []
    return reasons


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
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]],
    clip: tuple[str, float] | None = None,
    accumulate: int = 1,
    after: Callable[[int, float, Step | None], Any] | None = None,
) -> tuple[float, int | None, int]:
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
        batches: yields float32 (N, ...) inputs and int64 (N,) or float32 (N, K) targets.
        clip: ("norm" or "value", the largest there may be) of the gradients.
        accumulate: batches per step of the optimizer.
        after: called with number and mean loss of every batch, and the optimizer's rows; returns their new options or
            None.

    Returns:
        (sum of losses, correct predictions, samples).
    """
    plans = _PLANS.setdefault(model, _cnnrs.CpuPlans())
    arguments = (epoch, phase, lowered.graph, [t.detach() for t in lowered.tensors], loss)
    if phase == "validation" or optimizer is None:
        bound = None if after is None else lambda batch, mean: after(batch, mean, None)
        return _cnnrs.fit_cpu(*arguments, [], [], None, plans, 0, batches, 1, bound)
    optimizer.zero_grad()
    draws = any(kind == "Dropout" and a["training"] and a["p"] > 0 for _, kind, _, a in lowered.operations)
    seed = int(torch.empty((), dtype=torch.int64).random_()) if draws else 0
    step = _Rows(optimizer, lowered.tensors)
    sgd, adam = step.handle
    bound = None if after is None else lambda batch, mean: after(batch, mean, step)
    try:
        return _cnnrs.fit_cpu(*arguments, sgd, adam, clip, plans, seed, batches, accumulate, bound)
    finally:
        step.finish_after(plans.steps)


class _Rows(Step):
    """The optimizer's rows, each after the index of its tensor in the graph."""

    def __init__(self, optimizer: Optimizer, tensors: list[torch.Tensor]) -> None:
        self._index = {id(tensor): i for i, tensor in enumerate(tensors)}
        super().__init__(optimizer, tensors)

    def _native_handle(self) -> Any:
        rows = [(self._index[id(p)], self._row(group, p)) for group, p in self._rows]
        return (rows, []) if type(self._optimizer) is torch.optim.SGD else ([], rows)

    def _row(self, group: dict[str, Any], p: torch.Tensor) -> Any:
        return self._sgd_row(group, p) if type(self._optimizer) is torch.optim.SGD else self._adam_row(group, p)

    def finish_after(self, steps: int) -> None:
        """Leave the optimizer as ``steps`` of its own steps would have."""
        if steps == 0:
            return
        for _, p in self._rows:
            if id(p) in self._fresh:
                self._optimizer.state[p]["momentum_buffer"] = self._fresh[id(p)]
        # What lr_scheduler looks at to see that the optimizer has stepped.
        self._optimizer._opt_called = True  # type: ignore[attr-defined]
