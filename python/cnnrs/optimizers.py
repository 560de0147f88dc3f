"""Hand a ``torch.optim`` optimizer to the compiled loop; its parameters and state stay its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as _module

from cnnrs import _cnnrs

#: What the native rules do not do; any of these options leaves the step to the optimizer itself.
_LEFT_TO_TORCH = ("foreach", "fused", "capturable", "differentiable")


class Step:
    """One optimizer, ready for an epoch.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
        tensors: the tensors the model reads; parameters that are not among them get no gradient.
        clip: changes the gradients of the parameters it is given, in place, before they are applied.

    Attributes:
        handle: what the extension takes: a native optimizer, or (parameters, callable).
        native: whether SGD, Adam or AdamW runs in Rust.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        tensors: list[torch.Tensor],
        clip: Callable[[list[torch.Tensor]], None] | None = None,
    ) -> None:
        used = {id(tensor) for tensor in tensors}
        self._optimizer = optimizer
        self._clip = clip
        self._rows: list[tuple[dict[str, Any], torch.Tensor]] = [
            (group, p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad and id(p) in used
        ]
        self._fresh: dict[int, torch.Tensor] = {}
        self.native = _is_native(optimizer, [p for _, p in self._rows])
        self.handle: Any = self._native_handle() if self.native else (self._parameters(), self._python_step)

    def _parameters(self) -> list[torch.Tensor]:
        return [p for _, p in self._rows]

    def _clip_grads(self, grads: list[torch.Tensor | None]) -> None:
        for parameter, grad in zip(self._parameters(), grads, strict=True):
            parameter.grad = grad
        if self._clip is not None:
            self._clip(self._parameters())

    def _python_step(self, grads: list[torch.Tensor | None]) -> None:
        self._clip_grads(grads)
        self._optimizer.step()

    def _native_handle(self) -> _cnnrs.NativeOptimizer:
        clip = self._clip_grads if self._clip is not None else None
        if type(self._optimizer) is SGD:
            return _cnnrs.NativeOptimizer([self._sgd_row(*row) for row in self._rows], [], clip)
        return _cnnrs.NativeOptimizer([], [self._adam_row(*row) for row in self._rows], clip)

    def _sgd_row(self, group: dict[str, Any], p: torch.Tensor) -> Any:
        buffer = self._optimizer.state[p].get("momentum_buffer") if p in self._optimizer.state else None
        used = buffer is not None
        if group["momentum"] != 0 and buffer is None:
            buffer = self._fresh[id(p)] = torch.empty_like(p)
        momentum = buffer if group["momentum"] != 0 else None
        return (p, momentum, used, _numbers(group), group["nesterov"], group["maximize"])

    def _adam_row(self, group: dict[str, Any], p: torch.Tensor) -> Any:
        state = self._optimizer.state[p]
        if not state:
            # The same beginning as torch.optim.Adam's own lazy initialisation.
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
            if group["amsgrad"]:
                state["max_exp_avg_sq"] = torch.zeros_like(p)
        names = ["step", "exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]
        decoupled = group.get("decoupled_weight_decay", type(self._optimizer) is AdamW)
        return (p, [state[name] for name in names], _numbers(group), group["maximize"], decoupled)

    def numbers(self) -> list[tuple[float, ...]]:
        """Learning rate and the like of every native row, as the groups have them now; empty when none is native."""
        return [_numbers(group) for group, _ in self._rows] if self.native else []

    def finish(self) -> None:
        """Leave the optimizer and the gradients as its own ``step()`` would have; also after an exception."""
        if not self.native:
            return
        for parameter, grad in zip(self._parameters(), self.handle.take_gradients(), strict=False):
            parameter.grad = grad
            if grad is not None and id(parameter) in self._fresh:
                self._optimizer.state[parameter]["momentum_buffer"] = self._fresh[id(parameter)]
            # What lr_scheduler looks at to see that the optimizer has stepped.
            self._optimizer._opt_called = True  # type: ignore[attr-defined]


def _numbers(group: dict[str, Any]) -> tuple[float, ...]:
    if "betas" in group:
        return tuple(map(float, (group["lr"], *group["betas"], group["eps"], group["weight_decay"])))
    return tuple(map(float, (group["lr"], group["momentum"], group["dampening"], group["weight_decay"])))


def _is_native(optimizer: Optimizer, parameters: list[torch.Tensor]) -> bool:
    if type(optimizer) not in (SGD, Adam, AdamW) or _is_hooked(optimizer):
        return False
    for group in optimizer.param_groups:
        if any(group.get(option) for option in _LEFT_TO_TORCH):
            return False
        if any(isinstance(value, torch.Tensor) for key, value in group.items() if key != "params"):
            return False
    state = [t for p in parameters if p in optimizer.state for t in optimizer.state[p].values()]
    tensors = [t for t in [*parameters, *state] if isinstance(t, torch.Tensor)]
    return all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors)


def _is_hooked(optimizer: Optimizer) -> bool:
    step: Callable[..., Any] | None = vars(optimizer).get("step")
    # A learning-rate scheduler puts a counting wrapper there; anybody else's wrapper must be called.
    replaced = step is not None and not hasattr(step, "_wrapped_by_lr_sched")
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    everywhere = _module._global_optimizer_pre_hooks or _module._global_optimizer_post_hooks
    return bool(replaced or own or everywhere)
