"""Hand a ``torch.optim`` optimizer to the compiled loop; its parameters and state stay its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as _module

from cnnrs._records import AdamRow, AdamState, SgdRow, SgdState
from cnnrs._util.plain import is_plain
from cnnrs.engine.companion import libtorch
from cnnrs.model.lowering import Lowered

#: What the native rules do not do; any of these options leaves the step to the optimizer itself.
_LEFT_TO_TORCH = ("foreach", "fused", "capturable", "differentiable")


class Step:
    """One optimizer, ready for an epoch. Making one changes nothing; asking for its handle takes memory.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
        tensors: the tensors that the loss depends on; parameters that are not among them get no gradient.
        clip: changes the gradients of the parameters it is given, in place, before they are applied.
        outside: the context in which an optimizer steps, and gradients are clipped.

    Attributes:
        native: whether SGD, Adam or AdamW runs in Rust.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        tensors: list[torch.Tensor],
        clip: Callable[[list[torch.Tensor]], None] | None = None,
        outside: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._optimizer = optimizer
        self._clip = clip
        self._outside = outside
        rows = [(group, p) for group, parameters in trained(optimizer, tensors) for p in parameters]
        #: Each parameter once; an optimizer that holds one twice steps by itself.
        self._rows = list({id(p): (group, p) for group, p in reversed(rows)}.values())[::-1]
        #: State that the optimizer does not have before its first step.
        self._fresh: dict[int, dict[str, torch.Tensor]] = {}
        self.native = len(self._rows) == len(rows) and _is_native(optimizer, self._rows)

    @cached_property
    def handle(self) -> Any:
        """What the extension takes: a native optimizer, or (parameters, callable)."""
        return self._native_handle() if self.native else (self.parameters, self._python_step)

    @property
    def parameters(self) -> list[torch.Tensor]:
        """What is trained, each once."""
        return [p for _, p in self._rows]

    def _clip_grads(self, grads: list[torch.Tensor | None]) -> None:
        self._show(grads)
        if self._clip is not None:
            with self._outside():
                self._clip(self.parameters)

    def _show(self, grads: list[torch.Tensor | None]) -> None:
        for parameter, grad in zip(self.parameters, grads, strict=False):
            parameter.grad = grad

    def _python_step(self, grads: list[torch.Tensor | None], step: bool) -> None:
        if not step:
            self._show(grads)
            return
        self._clip_grads(grads)
        with self._outside():
            self._optimizer.step()

    def _native_handle(self) -> Any:
        clip = self._clip_grads if self._clip is not None else None
        native = libtorch().NativeOptimizer
        if type(self._optimizer) is SGD:
            sgd: list[SgdRow] = [{"parameter": p, **self._sgd_state(group, p)} for group, p in self._rows]
            return native(sgd, [], clip)
        adam: list[AdamRow] = [{"parameter": p, **self._adam_state(group, p)} for group, p in self._rows]
        return native([], adam, clip)

    def _sgd_state(self, group: dict[str, Any], p: torch.Tensor) -> SgdState:
        buffer = self._optimizer.state.get(p, {}).get("momentum_buffer")
        used = buffer is not None
        if group["momentum"] != 0 and buffer is None:
            buffer = torch.zeros_like(p)
            self._fresh[id(p)] = {"momentum_buffer": buffer}
        lr, momentum, dampening, weight_decay = _numbers(group)
        return {
            "momentum_buffer": buffer if group["momentum"] != 0 else None, "used": used,
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": group["nesterov"], "maximize": group["maximize"],
        }  # fmt: skip

    def _adam_state(self, group: dict[str, Any], p: torch.Tensor) -> AdamState:
        state = self._optimizer.state.get(p)
        if not state:
            # The same beginning as torch.optim.Adam's own lazy initialisation.
            state = {"step": torch.tensor(0.0)} | {name: torch.zeros_like(p) for name in averages(group)}
            self._fresh[id(p)] = state
        decoupled = group.get("decoupled_weight_decay", type(self._optimizer) is AdamW)
        lr, beta1, beta2, eps, weight_decay = _numbers(group)
        return {
            "step": state["step"], "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"],
            "max_exp_avg_sq": state["max_exp_avg_sq"] if group["amsgrad"] else None,
            "lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay,
            "maximize": group["maximize"], "decoupled": decoupled,
        }  # fmt: skip

    def numbers(self) -> list[tuple[float, ...]]:
        """Learning rate and the like of every native row, as the groups have them now; empty when none is native."""
        return [_numbers(group) for group, _ in self._rows] if self.native else []

    def held(self) -> list[Any]:
        """Identity of all that the compiled step has of the optimizer's, beside :meth:`numbers`."""
        groups = self._optimizer.param_groups
        parameters = [(id(p), p.requires_grad) for group in groups for p in group["params"]]
        options = [{name: value for name, value in group.items() if isinstance(value, bool)} for group in groups]
        if not self.native:
            return [parameters]
        buffered = [group.get("momentum", 0) != 0 for group in groups]
        state = [(id(t), t.data_ptr()) for t in state_of(self._optimizer, self.parameters)]
        return [parameters, options, buffered, state, is_hooked(self._optimizer)]

    def publish(self, steps: int) -> None:
        """Show gradients and state as they are after so many steps, for who looks at them between two batches."""
        self.finish()

    def finish(self) -> None:
        """Leave the optimizer and the gradients as its own ``step()`` would have; also after an exception."""
        if self.native:
            self._show(self.handle.gradients())
            self._settle(self.handle.updated())

    def _settle(self, updated: list[bool]) -> None:
        """State exists from the first update on; from then on it is the user's, who may load another."""
        for (_, p), moved in zip(self._rows, updated, strict=True):
            if moved:
                # What lr_scheduler looks at to see that the optimizer has stepped.
                self._optimizer._opt_called = True  # type: ignore[attr-defined]
                if id(p) in self._fresh:
                    # Once: from then on the state is the user's, who may have loaded another.
                    self._optimizer.state[p].update(self._fresh.pop(id(p)))


def trained(optimizer: Optimizer, tensors: list[torch.Tensor]) -> list[tuple[dict[str, Any], list[torch.Tensor]]]:
    """The groups, each with its parameters that get a gradient."""
    used = {id(tensor) for tensor in tensors}
    return [
        (group, [p for p in group["params"] if p.requires_grad and id(p) in used]) for group in optimizer.param_groups
    ]


def reached(lowered: Lowered) -> list[torch.Tensor]:
    """The parameters that a lowered model's output depends on: backward gives gradients to these."""
    return [lowered.tensors[index] for index in lowered.graph.reached()]


def overlap(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether two of these tensors share memory; a tensor that is given twice does, one without memory does not."""
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size())
        for tensor in tensors
        if tensor.numel() and is_plain(tensor) and tensor.device.type != "meta"
    )
    return any(later < end for (_, end), (later, _) in pairwise(spans))


def averages(group: dict[str, Any]) -> list[str]:
    """What Adam keeps of a parameter beside its steps."""
    return ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * bool(group["amsgrad"])


def _options(group: dict[str, Any]) -> tuple[Any, ...]:
    if "betas" in group:
        return (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
    return (group["lr"], group["momentum"], group["dampening"], group["weight_decay"])


def _numbers(group: dict[str, Any]) -> tuple[float, ...]:
    return tuple(map(float, _options(group)))


def _is_native(optimizer: Optimizer, rows: list[tuple[dict[str, Any], torch.Tensor]]) -> bool:
    if type(optimizer) not in (SGD, Adam, AdamW) or is_hooked(optimizer):
        return False
    for group in optimizer.param_groups:
        if any(group.get(option) for option in _LEFT_TO_TORCH):
            return False
        # Anything else than a number is torch's to understand, or to refuse.
        if not all(isinstance(number, (int, float)) for number in _options(group)):
            return False
        if any(isinstance(value, torch.Tensor) for key, value in group.items() if key != "params"):
            return False
    # Adam counts its steps in the default type.
    if type(optimizer) is not SGD and torch.get_default_dtype() is not torch.float32:
        return False
    state = [_state(optimizer, group, p) for group, p in rows]
    if None in state:
        return False
    tensors = [p for _, p in rows] + [tensor for found in state for tensor in found or []]
    plain = (is_plain(t) and t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors)
    return all(plain) and not overlap(tensors)


def state_of(optimizer: Optimizer, parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors that an optimizer keeps for parameters."""
    # What only looks like an optimizer need not show its state.
    state = getattr(optimizer, "state", {})
    found = [state.get(p, {}).values() for p in parameters]
    return [value for values in found for value in values if isinstance(value, torch.Tensor)]


def _state(optimizer: Optimizer, group: dict[str, Any], p: torch.Tensor) -> list[torch.Tensor] | None:
    """What is kept for one parameter; empty before its first step, None where it is not what a step leaves."""
    state = optimizer.state.get(p, {})
    if type(optimizer) is SGD:
        names = ["momentum_buffer"] if state.get("momentum_buffer") is not None else []
    else:
        names = ["step", *averages(group)] if state else []
    tensors = [state.get(name) for name in names]
    for name, tensor in zip(names, tensors, strict=True):
        if not isinstance(tensor, torch.Tensor) or tensor.shape != (() if name == "step" else p.shape):
            return None
    return tensors


def is_hooked(optimizer: Optimizer) -> bool:
    """Whether its step does more than its class's."""
    step: Callable[..., Any] | None = vars(optimizer).get("step")
    # A learning-rate scheduler puts a counting wrapper there; anybody else's wrapper must be called.
    replaced = step is not None and not hasattr(step, "_wrapped_by_lr_sched")
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    everywhere = _module._global_optimizer_pre_hooks or _module._global_optimizer_post_hooks
    return bool(replaced or own or everywhere)
