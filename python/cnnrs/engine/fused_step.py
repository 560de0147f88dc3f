"""SGD, Adam and AdamW as a step that can be recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from cnnrs.engine.optimizers import averages, is_hooked, overlap, state_of, trained


class FusedStep:
    """SGD, Adam or AdamW through PyTorch's fused kernels, which read nothing back and obey a flag on the device.

    So a step can be recorded, and a loss that is not finite leaves the weights alone before the host knows of it.
    Learning rates are read on the device, as float32: another one needs no other recording.

    Args:
        optimizer: one that :meth:`obstacle` speaks for; its state is its own again after :meth:`publish`.
        tensors: the tensors the model reads; parameters that are not among them get no gradient.
        clip: changes the gradients of the parameters it is given, in place, before they are applied.

    Attributes:
        parameters: what is trained.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        tensors: list[torch.Tensor],
        clip: Callable[[list[torch.Tensor]], None] | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._clip = clip
        self._groups = trained(optimizer, tensors)
        self.parameters = [p for _, parameters in self._groups for p in parameters]
        self._state: dict[torch.Tensor, dict[str, torch.Tensor]] = {}
        for p in self.parameters:
            found = optimizer.state.get(p, {})
            state = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
            for name, value in state.items():
                # The kernels walk through a weight and its state together; the format may have changed in between.
                if name != "step" and value.stride() != p.stride():
                    state[name] = torch.empty_like(p).copy_(value)
            self._state[p] = state
        self._leaves: dict[int, torch.Tensor] = {}

    @staticmethod
    def obstacle(optimizer: Optimizer, tensors: list[torch.Tensor]) -> str | None:
        """Why the fused kernels do not do what the optimizer does; None where they do."""
        name = type(optimizer).__name__
        if type(optimizer) not in (SGD, Adam, AdamW):
            return f"the optimizer {name} is none of SGD, Adam and AdamW"
        if is_hooked(optimizer):
            return "the optimizer's step has hooks, or was replaced"
        for group in optimizer.param_groups:
            # On CUDA the fused SGD of some versions lets weights grow instead of decay when it maximizes.
            if group.get("differentiable") or (type(optimizer) is SGD and group["maximize"]):
                return f"no fused kernel does what {name} of these options does"
            if any(isinstance(value, torch.Tensor) for key, value in group.items() if key != "params"):
                return "a tensor is among the optimizer's options"
        parameters = [p for _, group in trained(optimizer, tensors) for p in group]
        # The kernels write many parameters at once: each must be there once, in memory of its own.
        if not parameters or not all(p.is_floating_point() for p in parameters) or overlap(parameters):
            return "the optimizer's parameters share memory, or are no numbers that train"
        return None

    def options(self) -> list[Any]:
        """What a recorded step depends on besides memory."""
        moving = ("params", "lr", "initial_lr")
        groups = [[(name, value) for name, value in group.items() if name not in moving] for group, _ in self._groups]
        return [type(self._optimizer), groups, [len(parameters) for _, parameters in self._groups]]

    def memory(self) -> list[Any]:
        """Where a recorded step reads and writes."""
        return [
            [p.data_ptr(), *(t.data_ptr() for name, t in sorted(self._state[p].items()) if name != "step")]
            for p in self.parameters
        ]

    @property
    def sizes(self) -> tuple[int, int]:
        """How many numbers :meth:`begin` needs: one per parameter, one per group."""
        return len(self.parameters), len(self._groups)

    def begin(self, counts: torch.Tensor, rates: torch.Tensor) -> None:
        """Until the end steps are counted in ``counts``, and learning rates are those in ``rates``.

        Args:
            counts: float32 (parameters,) on the device.
            rates: float32 (groups,) on the device.
        """
        self._counts, self._rates = counts, rates
        self._steps = dict(zip(self.parameters, counts.unbind(), strict=True))
        none = torch.zeros(())
        steps = [self._state[p].get("step", none) for p in self.parameters]
        # Each on its own would be waited for.
        together = len({step.device for step in steps}) == 1
        counts.copy_(torch.stack(steps if together else [step.to(counts.device) for step in steps]))
        self.set_rates()
        self._optimizer.zero_grad()

    def set_rates(self) -> None:
        """From the next step on, learning rates are what the groups say now."""
        self._rates.copy_(torch.tensor([float(group["lr"]) for group, _ in self._groups]))

    def leaves(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """What takes the place of the model's tensors for one batch: gradients go to new leaves over the same memory.

        Autograd adds up a leaf's gradients on the stream where the leaf was first differentiated, as long as anybody
        holds something that was computed from it: on another one than the step's, that would end a recording.
        """
        self._leaves = {id(p): p.detach().requires_grad_() for p in self.parameters}
        return [self._leaves.get(id(tensor), tensor.detach()) for tensor in tensors]

    def differentiate(self, loss: torch.Tensor, begins: bool) -> None:
        """Gradients of ``loss`` of the last :meth:`leaves`; ``begins``: instead of being added to those so far."""
        if begins:
            self._optimizer.zero_grad()
        for p in self.parameters:
            self._leaves[id(p)].grad = p.grad
        torch.autograd.backward(loss, inputs=list(self._leaves.values()))
        for p in self.parameters:
            p.grad = self._leaves[id(p)].grad
        self._leaves = {}

    def update(self, stopped: torch.Tensor) -> None:
        """Step, unless ``stopped``, float32 () on the device, is 1."""
        if self._clip is not None:
            self._clip(self.parameters)
        with torch.no_grad():
            for (group, parameters), rate in zip(self._groups, self._rates.unbind(), strict=True):
                moved = [p for p in parameters if p.grad is not None]
                if type(self._optimizer) is SGD:
                    # The kernel takes parameters that all have a buffer, or all begin one.
                    begun = {p for p in moved if "momentum_buffer" in self._state[p]}
                    self._sgd(group, rate, [p for p in moved if p in begun], stopped)
                    self._sgd(group, rate, [p for p in moved if p not in begun], stopped)
                else:
                    self._adam(group, rate, moved, stopped)

    def _sgd(self, group: dict[str, Any], rate: Any, parameters: list[torch.Tensor], stopped: torch.Tensor) -> None:
        # In the types of older torches `lr` is a float only; a tensor is taken as well.
        buffers: list[Any] = [self._state[p].get("momentum_buffer") for p in parameters]
        sgd(
            parameters, _gradients(parameters), buffers, foreach=False, fused=True, found_inf=stopped,
            weight_decay=group["weight_decay"], momentum=group["momentum"], lr=rate,
            dampening=group["dampening"], nesterov=group["nesterov"], maximize=False,
        )  # fmt: skip
        if group["momentum"] != 0:
            for p, buffer in zip(parameters, buffers, strict=True):
                self._state[p]["momentum_buffer"] = buffer

    def _adam(
        self, group: dict[str, Any], rate: torch.Tensor, parameters: list[torch.Tensor], stopped: torch.Tensor
    ) -> None:
        names = averages(group)
        for p in parameters:
            for name in names:
                if name not in self._state[p]:
                    self._state[p][name] = torch.zeros_like(p)
        exp_avgs, exp_avg_sqs, *tops = ([self._state[p][name] for p in parameters] for name in names)
        decoupled = group.get("decoupled_weight_decay", type(self._optimizer) is AdamW)
        (adamw if decoupled else adam)(
            parameters, _gradients(parameters), exp_avgs, exp_avg_sqs, tops[0] if tops else [],
            [self._steps[p] for p in parameters], foreach=False, fused=True, found_inf=stopped,
            amsgrad=group["amsgrad"], beta1=group["betas"][0], beta2=group["betas"][1], lr=rate,
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=group["maximize"],
        )  # fmt: skip

    def numbers(self) -> list[tuple[float, ...]]:
        """What may change without another recording."""
        return [(group["lr"],) for group, _ in self._groups]

    def held(self) -> list[Any]:
        """Identity of all that the step has of the optimizer's, beside :meth:`numbers`."""
        groups = self._optimizer.param_groups
        parameters = [(id(p), p.requires_grad) for group in groups for p in group["params"]]
        state = [(id(t), t.data_ptr()) for t in state_of(self._optimizer, self.parameters)]
        kinds = [isinstance(group["lr"], torch.Tensor) for group in groups]
        return [parameters, state, kinds, self.options(), is_hooked(self._optimizer)]

    def publish(self, steps: int = 0) -> None:
        """Leave the optimizer as its own ``step()`` would have; waits for the device. ``steps`` are counted there."""
        counts = dict(zip(self.parameters, self._counts.tolist(), strict=True))
        for group, parameters in self._groups:
            for p in parameters:
                state = self._state[p]
                if "exp_avg" in state:
                    on_device = group.get("capturable") or group.get("fused")
                    step = state.setdefault("step", torch.zeros((), device=p.device if on_device else "cpu"))
                    step.fill_(counts[p])
                if state:
                    self._optimizer.state[p].update(state)
        # What lr_scheduler looks at to see that the optimizer has stepped.
        self._optimizer._opt_called = True  # type: ignore[attr-defined]


def _gradients(parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
