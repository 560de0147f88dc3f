"""Engine ``python``: the user's module, loss and optimizer are called, batch by batch, as a plain loop would."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.optim import Optimizer

from cnnrs import _cnnrs
from cnnrs._records import Epoch
from cnnrs._util.kept_memory import kept_memory
from cnnrs.data.labels import on_host
from cnnrs.engine import kept_plans
from cnnrs.engine.frozen_front import Front, Network
from cnnrs.engine.fused_update import fused
from cnnrs.engine.losses import Totals, call, check_targets, counts, measured
from cnnrs.engine.memory_order import MemoryOrder
from cnnrs.engine.same_bits import Sample
from cnnrs.training.arguments import needs_closure
from cnnrs.training.batches import describe, samples_of, to_channels_last
from cnnrs.training.buffers import Buffers
from cnnrs.training.job import Job
from cnnrs.training.watch import modules_as_they_are

#: Scales of fp16 gradients go on from epoch to epoch.
_SCALERS: WeakKeyDictionary[Optimizer, torch.amp.GradScaler] = WeakKeyDictionary()


def run(
    job: Job, batches: Iterator[Any], before: Totals | None = None, front: Front | None = None,
    sample: Sample | None = None,
) -> Totals:  # fmt: skip
    """One epoch, or what is left of it.

    Args:
        job: what to do.
        batches: yields (inputs, targets) of any form; the model is called with the inputs as they are.
        before: what another engine has done of this epoch.
        front: what is not computed by calling the model.
        sample: what is known of the model's outputs.
    """
    if job.channels_last:
        to_channels_last(job.model)
    engine = _Engine(job, before or Totals(), front, sample)

    def after(batch: int, mean: float) -> None:
        job.call_user(batch, mean)

    try:
        called = None if job.loop.on_batch_end is None else after
        epoch: Epoch = {
            "number": job.epoch, "phase": job.phase, "accumulate": job.loop.accumulate, "after": called,
        }  # fmt: skip
        with keeping(job):
            totals = Totals(**_cnnrs.fit_python(epoch, engine, batches, None if before is None else before.by_name()))
        engine.done()
        return totals
    except BaseException:
        engine.kept.put_back()
        raise


def keeping(job: Job) -> AbstractContextManager[None]:
    """Inside, steps use again what was freed, where they take large blocks; giving them back costs milliseconds."""
    return kept_memory(job.device.type == "cpu" and sum(p.numel() for p in job.model.parameters()) >= 1 << 19)


class _Engine:
    """The steps of the loop; ``before``: what was done of the epoch; ``front``: not called but computed.

    Attributes:
        kept: the buffers as they were before the step under way.
    """

    def __init__(self, job: Job, before: Totals, front: Front | None, sample: Sample | None) -> None:
        self.kept = Buffers(job.model)
        self._job = job
        #: The next gradients start a new sum.
        self._begins = before.gathered == 0
        self._batch = before.batches
        self._clip = job.loop.clipper()
        training = job.optimizer is not None
        if training:
            kept_plans.drop(job.model, None if front is None or front.last == 0 else front.front)
        self._network: Network | None = None
        if front is None:
            self._order = MemoryOrder(job.model, job.orders, training)
        else:
            self._network = Network(
                job.model, front, orders=job.orders, training=training, check=job.check,
                state=lambda: None if job.unseen else modules_as_they_are(job.model),
                called_back=job.loop.on_batch_end is not None, sample=sample,
            )  # fmt: skip
            self._order = self._network.order
        #: The loss of the batch under way, and that batch.
        self._pending: list[tuple[torch.Tensor, Any, Any]] = []
        self._scaler: torch.amp.GradScaler | None = None
        #: What an optimizer with a closure evaluates again: the batches since its last step, and their losses.
        self._window: list[tuple[Any, Any]] | None = None
        self._losses: list[torch.Tensor] = []
        if job.optimizer is not None:
            if job.scaled:
                self._scaler = _SCALERS.setdefault(job.optimizer, torch.amp.GradScaler(job.device.type))
            self._window = [] if needs_closure(job.optimizer) else None

    def forward(self, inputs: Any, targets: Any, training: bool) -> tuple[float, float, int | None, int, int]:
        """Outputs and loss of one batch; returns what to count of it."""
        self.kept.keep()
        if training and self._begins:
            assert self._job.optimizer is not None
            # As in the plain loop: old gradients are not in memory beside the new activations.
            self._job.optimizer.zero_grad()
            self._begins = False
        if self._network is None:
            inputs = self._order.ordered(inputs)
        with self._order.timing():
            outputs, loss = self._evaluate(inputs, targets, training)
        self._pending[:] = [(loss, inputs, targets)]
        self._batch += 1
        if self._window is not None:
            self._window.append((inputs, targets))
        with torch.no_grad(), self._job.autocast(keep=False):
            samples = samples_of(inputs, targets, outputs)
            return (*counts(measured(self._job.loss_fn, loss, outputs, targets, samples)), samples)

    def _evaluate(self, inputs: Any, targets: Any, training: bool) -> tuple[Any, torch.Tensor]:
        job = self._job
        if job.around:
            # It would keep the weights as they were at the first batch.
            torch.clear_autocast_cache()
        with torch.set_grad_enabled(training), job.autocast(keep=True):
            try:
                outputs = (self._network or job.model)(inputs)
            except TypeError as error:
                _explain_call(job.model, inputs, error)
                raise
            self._check(outputs, targets)
            return outputs, call(job.loss_fn, outputs, targets)

    def _check(self, outputs: Any, targets: Any) -> None:
        host = on_host(targets)
        if host is not None and isinstance(outputs, torch.Tensor) and outputs.dim():
            where = f"{self._job.phase} epoch {self._job.epoch}, batch {self._batch}"
            check_targets(self._job.loss_fn, outputs.shape[min(1, outputs.dim() - 1)], host, where)

    def done(self) -> None:
        """The epoch is over."""
        if self._network is not None:
            self._network.done()

    def backward(self) -> None:
        """Gradients of that loss, added to those since the last step."""
        with self._order.timing():
            self._differentiate_or_again(*self._pending.pop())
        self._order.done()

    def _differentiate_or_again(self, loss: torch.Tensor, inputs: Any, targets: Any) -> None:
        """With the first gradients of native kernels it shows whether they can be had; else PyTorch computes them."""
        network = self._network
        if network is None or not network.is_unproven:
            self._differentiate(loss)
            return
        # A loss may have parameters of its own, whose gradients come first.
        leaves = {*self._job.model.parameters(), *_leaves(loss)}
        before = [(leaf, None if leaf.grad is None else leaf.grad.clone()) for leaf in leaves]
        try:
            self._differentiate(loss)
        except Exception as error:
            for leaf, gradient in before:
                leaf.grad = gradient
            network.undo(error)
            self._differentiate(self._evaluate(inputs, targets, training=True)[1])
        else:
            network.prove()

    def _differentiate(self, loss: torch.Tensor) -> None:
        with torch.enable_grad():
            if self._job.loop.accumulate > 1:
                loss = loss / self._job.loop.accumulate
            if self._window is not None:
                self._losses.append(loss.detach())
            (loss if self._scaler is None else self._scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """One step of the optimizer."""
        optimizer, scaler = self._job.optimizer, self._scaler
        assert optimizer is not None
        self._clip_gradients()
        closure: dict[str, Any] = {} if self._window is None else {"closure": self._closure(self._window)}
        if scaler is None:
            # Rounding is PyTorch's own wherever all else of an epoch is.
            rounds = self._network is not None and self._network.rounds
            with fused(optimizer) if rounds and not closure else nullcontext():
                optimizer.step(**closure)
        else:
            # Refuses closures, but only by name: their gradients would not be unscaled.
            scaler.step(optimizer, **closure)
            scaler.update()
        self._window = None if self._window is None else []
        self._losses = []
        self._begins = True
        self.kept.accept()

    def _clip_gradients(self) -> None:
        if self._clip is None:
            return
        optimizer = self._job.optimizer
        assert optimizer is not None
        if self._scaler is not None:
            self._scaler.unscale_(optimizer)
        # Each once, as model.parameters() gives them.
        self._clip(list({id(p): p for group in optimizer.param_groups for p in group["params"]}.values()))

    def _closure(self, window: list[tuple[Any, Any]]) -> Callable[[], torch.Tensor]:
        """Evaluates the batches of a step; at its first call that has just been done."""
        optimizer = self._job.optimizer
        assert optimizer is not None
        fresh = True

        def closure() -> torch.Tensor:
            nonlocal fresh
            if not fresh:
                self._losses = []
                optimizer.zero_grad()
                for inputs, targets in window:
                    self._differentiate(self._evaluate(inputs, targets, training=True)[1])
                self._clip_gradients()
            fresh = False
            return torch.stack(self._losses).sum() if len(self._losses) > 1 else self._losses[0]

        return closure


def _leaves(loss: torch.Tensor) -> set[torch.Tensor]:
    """What a backward pass writes gradients into."""
    left: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    found: set[torch.Tensor] = set()
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(leaf)
        left.extend(following for following, _ in node.next_functions)
    return found


def _explain_call(model: torch.nn.Module, inputs: Any, error: TypeError) -> None:
    """Raises a clearer error where ``forward`` cannot be called with one argument."""
    try:
        inspect.signature(model.forward).bind(inputs)
    except TypeError as reason:
        raise TypeError(
            f"{type(model).__name__}.forward(): {reason}. fit calls model(inputs) with the first part of what the "
            f"loader yields, here {describe(inputs)}: wrap the model in one whose forward(inputs) passes them on"
        ) from error
    except ValueError:
        return
