"""Engine ``cpu``: the training step compiled to native code, without libtorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer

from cnnrs import _cnnrs
from cnnrs._records import Clip, CpuTask, Epoch, IndexedAdamRow, IndexedSgdRow, Loss
from cnnrs.engine.losses import Totals
from cnnrs.engine.optimizers import Step, overlap, reached, state_of
from cnnrs.model.lowering import Lowered

#: All features (N, ...), their labels, the order of the rows in an epoch, where its batches end in that order.
Rows = tuple[torch.Tensor, torch.Tensor, list[int], list[int]]

#: Operations that engine ``cpu`` computes for features only.
_FEATURES_ONLY = frozenset({
    "Attention", "ChannelShuffle", "Expand", "GroupNorm", "LayerNorm", "PatchMerging", "Permute", "ResponseNorm",
    "Scale", "Shift", "Split", "Upsample", "WindowAttention", "ZeroPad2d",
})  # fmt: skip
#: Compiled plans and their threads live as long as the model.
_PLANS: WeakKeyDictionary[nn.Module, _cnnrs.CpuPlans] = WeakKeyDictionary()


def obstacles(
    lowered: Lowered,
    inputs: torch.Tensor | None = None,
    targets: torch.Tensor | None = None,
    *,
    loss: Loss | None = None,
    optimizer: Optimizer | None = None,
) -> list[str]:
    """Reasons why engine ``cpu`` cannot train or validate a lowered model; empty when it can.

    Args:
        lowered: the model in the mode it will run in.
        inputs: (N, ...) of a batch, where known: its type, device and shape count. Some obstacles show only then.
        targets: of that batch.
        loss: the loss as the engines know it, where it is known.
        optimizer: None for validation.
    """
    reasons = tensor_obstacles(lowered)
    if inputs is not None and inputs.device.type != "cpu" and not reasons:
        reasons.append(f"the inputs are on {inputs.device}")
    if inputs is not None and inputs.dtype is not torch.float32:
        reasons.append(f"the inputs are {inputs.dtype}, not torch.float32")
    if optimizer is not None:
        reasons += _optimizer_obstacles(optimizer, lowered)
    if loss is not None and (reason := _loss_obstacle(loss)):
        reasons.append(reason)
    values = None
    if targets is not None and loss is not None:
        classes = loss["kind"] in ("nll", "cross_entropy")
        values = None if classes else list(targets.shape)
        if targets.dtype is not (torch.int64 if classes else torch.float32) or (classes and targets.dim() != 1):
            reasons.append(f"the targets are {targets.dtype} of shape {tuple(targets.shape)}")
    if inputs is not None and inputs.shape[:1] == (0,):
        reasons.append("the batch is empty")
    if reasons:
        return reasons
    if inputs is None:
        return [
            f"{name} ({kind}): the cpu engine has no training kernel for it"
            for name, kind in zip(lowered.names, lowered.kinds, strict=True)
            if kind in _FEATURES_ONLY
        ]
    obstacle = _cnnrs.cpu_obstacle(lowered.graph, list(inputs.shape), values)
    return [obstacle] if obstacle else []


def _optimizer_obstacles(optimizer: Optimizer, lowered: Lowered) -> list[str]:
    rows = _Rows(optimizer, lowered)
    # Threads write all of them at once.
    if overlap([*lowered.tensors, *state_of(optimizer, rows.parameters)]):
        return ["two of its tensors share memory"]
    known = f"the optimizer {type(optimizer).__name__} is none of plain SGD, Adam and AdamW"
    return [] if rows.native else [known]


def _loss_obstacle(loss: Loss) -> str | None:
    """Options that PyTorch does not take, or that are more than numbers."""
    weight = loss["weight"] if loss["kind"] == "nll" or loss["kind"] == "cross_entropy" else None
    if weight is not None:
        plain = weight.dtype is torch.float32 and weight.dim() == 1 and weight.device.type == "cpu"
        if not plain or weight.requires_grad:
            return f"the loss's weight is {weight.dtype} of shape {tuple(weight.shape)} on {weight.device}, or trained"
    if loss["kind"] == "cross_entropy" and not 0 <= loss["label_smoothing"] <= 1:
        return f"label_smoothing must be between 0.0 and 1.0, got {loss['label_smoothing']}"
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
    phase: Literal["training", "validation"],
    model: nn.Module,
    lowered: Lowered,
    loss: Loss,
    optimizer: Optimizer | None,
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]] | Rows,
    clip: Clip | None = None,
    accumulate: int = 1,
    after: Callable[[int, float, Step | None], Any] | None = None,
    unseen: bool = False,
) -> Totals:
    """One epoch; :func:`obstacles` must have found none.

    Gradients are applied where they arise: ``parameter.grad`` is None afterwards. Dropout draws from a generator of its
    own, seeded once per epoch from ``torch``'s, so a seed gives the same masks for any number of threads.

    Args:
        epoch: number of the epoch, for messages.
        phase: "training" or "validation".
        model: owner of the compiled plans.
        lowered: the model as operations, in the mode of ``phase``.
        loss: one of those that the engines know.
        optimizer: SGD, Adam or AdamW; None for validation.
        batches: yields float32 (N, ...) inputs and int64 (N,) or float32 (N, K) targets; or rows of features.
        clip: of the gradients.
        accumulate: batches per step of the optimizer.
        after: called with number and mean loss of every batch, and the optimizer's rows; returns their new options or
            None.
        unseen: whether nobody looks at weights and optimizer before the epoch ends: steps may wait for each other.

    Returns:
        What has been added up.
    """
    plans = _PLANS.setdefault(model, _cnnrs.CpuPlans())
    task: CpuTask = {
        "loss": loss, "sgd": [], "adam": [], "clip": None, "workers": torch.get_num_threads(), "seed": 0,
        "unseen": unseen,
    }  # fmt: skip
    told: Epoch = {"number": epoch, "phase": phase, "accumulate": 1, "after": None}
    if phase == "validation" or optimizer is None:
        if after is not None:
            told["after"] = lambda batch, mean: after(batch, mean, None)
        return Totals(**_cnnrs.fit_cpu(told, lowered.graph, lowered.tensors, task, plans, batches))
    optimizer.zero_grad()
    # (The loader has drawn its order by now: who chose this engine has looked at the first batch.)
    draws = any(kind == "Dropout" and a["training"] and a["p"] > 0 for _, kind, _, a in lowered.operations)
    task["seed"] = int(torch.empty((), dtype=torch.int64, device="cpu").random_()) if draws else 0
    step = _Rows(optimizer, lowered)
    task["sgd"], task["adam"] = step.handle
    task["clip"], told["accumulate"] = clip, accumulate
    if after is not None:
        told["after"] = lambda batch, mean: after(batch, mean, step)
    try:
        return Totals(**_cnnrs.fit_cpu(told, lowered.graph, lowered.tensors, task, plans, batches))
    finally:
        step.finish_after(plans.steps)


def steps(model: nn.Module) -> int:
    """Steps of the optimizer in the last epoch of a model, also of one that an exception has ended."""
    return _PLANS.setdefault(model, _cnnrs.CpuPlans()).steps


class _Rows(Step):
    """The optimizer's rows, each after the index of its tensor in the graph."""

    def __init__(self, optimizer: Optimizer, lowered: Lowered) -> None:
        self._index = {id(tensor): i for i, tensor in enumerate(lowered.tensors)}
        super().__init__(optimizer, reached(lowered))

    def _native_handle(self) -> Any:
        sgd: list[IndexedSgdRow] = []
        adam: list[IndexedAdamRow] = []
        for group, p in self._rows:
            if type(self._optimizer) is torch.optim.SGD:
                sgd.append({"parameter": self._index[id(p)], **self._sgd_state(group, p)})
            else:
                adam.append({"parameter": self._index[id(p)], **self._adam_state(group, p)})
        return sgd, adam

    def publish(self, steps: int) -> None:
        """Show state as it is after so many steps; there are no gradients to show."""
        self.finish_after(steps)

    def finish_after(self, steps: int) -> None:
        """Leave the optimizer as ``steps`` of its own steps would have."""
        self._settle([steps > 0] * len(self._rows))
