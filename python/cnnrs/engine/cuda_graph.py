"""Training on a GPU without Python between the kernels: a whole step is recorded once as a CUDA graph, then replayed.

The first steps run eagerly. They are steps like any other, so nothing has to be undone after them: weights, running
statistics, random numbers. Losses stay on the device and are read a few steps later, while it works on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer

from cnnrs._util.precision import kernel_switches
from cnnrs.data.labels import on_host
from cnnrs.engine.cuda_capture import RECORDERS, generation
from cnnrs.engine.fused_step import FusedStep
from cnnrs.engine.losses import Loss, Totals, check_targets, known_loss, measured
from cnnrs.engine.meter import Meter
from cnnrs.engine.optimizers import reached
from cnnrs.engine.recording import WARM_UP, WINDOW, Parts, Recording, form
from cnnrs.errors import NonFiniteLossError
from cnnrs.model.lowering import Lowered
from cnnrs.model.player import play


def obstacle(lowered: Lowered, loss_fn: Loss, optimizer: Optimizer | None, device: torch.device) -> str | None:
    """Why a step is not the same kernels on the same memory every time, or one of its numbers is needed at once.

    Args:
        lowered: the model, in the mode it will run in.
        loss_fn: must be one that runs no code of the user's.
        optimizer: None for validation.
        device: of the model.
    """
    if device.type not in RECORDERS:
        return f"there is nothing to record on {device}"
    loss: Mapping[str, Any] | None = known_loss(loss_fn)
    if loss is None:
        return "the loss is none of the four that the engines know"
    if loss.get("weight") is not None and loss.get("label_smoothing"):
        return "PyTorch's cross entropy with class weights and label smoothing waits for the device"
    # A cumulative average divides by the number of batches, on the host.
    if any(kind == "BatchNorm2d" and a["training"] and a["momentum"] is None for _, kind, _, a in lowered.operations):
        return "a batch norm with momentum=None counts batches on the host"
    return None if optimizer is None else FusedStep.obstacle(optimizer, reached(lowered))


@dataclass(frozen=True)
class Task:
    """One epoch; :func:`obstacle` must have found none.

    Attributes:
        epoch: number of the epoch, for messages.
        phase: "training" or "validation", for messages.
        model: owner of the recordings.
        lowered: the model as operations, in the mode of ``phase``.
        loss_fn: one of the known losses.
        step: the optimizer; None for validation.
        autocast: makes the context that the layers run in.
        options: what else the kernels depend on: other options need another recording.
        accumulate: batches per step of the optimizer.
        steps: of the optimizer per launch.
        after: called with number and mean loss of every batch, and the step; returns new numbers of the step or None.
        rows: features (N, ...) and their labels (N, ...), of which batches are rows.
    """

    epoch: int
    phase: str
    model: nn.Module
    lowered: Lowered
    loss_fn: Loss
    step: FusedStep | None
    autocast: Callable[[], AbstractContextManager[Any]]
    options: tuple[Any, ...]
    accumulate: int = 1
    steps: int = 1
    after: Callable[[int, float, Any], Any] | None = None
    rows: tuple[torch.Tensor, torch.Tensor] | None = None


#: By phase. A model's recordings, and the memory they work in, live as long as it does.
_RECORDINGS: WeakKeyDictionary[nn.Module, dict[str, Recording]] = WeakKeyDictionary()


def run(task: Task, batches: Iterator[Parts | None]) -> Totals:
    """One epoch.

    Args:
        task: what to do.
        batches: yields inputs (N, ...) and targets on the model's device, or the int64 (N,) rows that a batch takes;
            those of the first batch's shape and dtype are replayed, all others run eagerly. None in place of a batch
            ends the epoch, also within a step of several batches, which is then left to whoever goes on.

    Returns:
        What has been added up.

    Raises:
        IndexError: a target that was on the host has no output; the message names the batch.
        NonFiniteLossError: weights, optimizer and running statistics are those before the step of the batch that the
            message names; up to two windows of batches after it have been read.
    """
    first = next(batches, None)
    if first is None:
        return Totals()
    kept = _recording(task, first)
    epoch = _Epoch(task, kept)
    try:
        batch: Parts | None = first
        while batch is not None:
            epoch.take(batch)
            try:
                batch = next(batches)
            except StopIteration:
                epoch.end()
                break
        else:
            epoch.hand_over()
    except BaseException as error:
        epoch.give_up()
        if isinstance(error, NonFiniteLossError):
            # It may have been recorded over state that the optimizer never gets; launches may still be under way.
            if kept.device.type == "cuda":
                torch.cuda.synchronize(kept.device)
            epoch.stepped = epoch.meter.totals.batches >= task.accumulate
            _RECORDINGS[task.model].pop(task.phase, None)
        raise
    finally:
        epoch.publish()
    return epoch.meter.totals._replace(gathered=epoch.gathered)


class _Epoch:
    """What happens to the batches of an epoch.

    Attributes:
        gathered: batches since the optimizer's last step.
        stepped: whether the optimizer's state is not its own yet.
    """

    def __init__(self, task: Task, kept: Recording) -> None:
        self.kept = kept
        self._where = f"{task.phase} epoch {task.epoch}"
        self._number = 0
        self.meter = Meter(self._where, kept.losses)
        self.gathered = 0
        self.stepped = False
        self._task = task
        #: Batches that wait for a launch.
        self._waiting: list[Parts] = []
        #: Whether the gradients are those of a launch.
        self._launched = False
        with torch.no_grad():
            kept.stopped.zero_()
            kept.keep_statistics()
        if task.step is not None:
            task.step.begin(kept.counts, kept.rates)

    def take(self, parts: Parts) -> None:
        """One more batch, now or as soon as there are enough for a launch."""
        kept = self.kept
        self._check(parts)
        self._number += 1
        if self.gathered or not kept.fits(parts) or kept.failed or kept.warm < WARM_UP:
            self._drain()
            self._eagerly(parts)
            return
        self._waiting.append(parts)
        if len(self._waiting) == len(kept.slots):
            self._launch()

    def _check(self, parts: Parts) -> None:
        """A kernel cannot refuse a target; the losses of the batches before come first, as in a plain loop."""
        targets = on_host(parts[-1])
        if targets is None:
            return
        task = self._task
        try:
            where = f"{self._where}, batch {self._number}"
            check_targets(task.loss_fn, classes_of(task.lowered, parts[0].shape), targets, where)
        except IndexError:
            self.hand_over()
            raise

    def end(self) -> None:
        """What waits, the last step of fewer batches, and the last losses."""
        self.hand_over()
        if self.gathered:
            self.kept.eagerly(self._update)
            self.gathered = 0

    def hand_over(self) -> None:
        """What waits, and the last losses."""
        self._drain()
        self.meter.close()

    def give_up(self) -> None:
        """A step that is not whole comes to nothing."""
        self.kept.restore_statistics()
        if self.gathered:
            # Its optimizer may have no state yet, over which to record.
            self.kept.warm = 0

    def publish(self) -> None:
        """Gradients and the optimizer's state as its own step leaves them."""
        step = self._task.step
        if step is None or not self.stepped:
            return
        self._show_gradients(step)
        step.publish()
        self.kept.memory = step.memory()
        self.stepped = False

    def _show_gradients(self, step: FusedStep) -> None:
        if self._launched:
            for parameter, gradient in zip(step.parameters, self.kept.gradients, strict=True):
                parameter.grad = gradient

    def _launch(self) -> None:
        kept, step, waiting = self.kept, self._task.step, self._waiting
        kept.fill(waiting)
        if kept.launch is None:
            kept.record(self._recorded, [] if step is None else step.parameters)
        if kept.launch is None:
            self._drain()
            return
        self.meter.expect(len(waiting))
        self.stepped = True
        kept.launch()
        self._launched, self._waiting = True, []
        for parts in waiting:
            self._count(parts)

    def _drain(self) -> None:
        waiting, self._waiting = self._waiting, []
        for parts in waiting:
            self._eagerly(parts)

    def _eagerly(self, parts: Parts) -> None:
        kept, begins = self.kept, self.gathered == 0
        ends = self.gathered + 1 == self._task.accumulate
        self.meter.expect(1)
        if kept.fits(parts) and kept.warm < WARM_UP:
            # On the memory that will be recorded.
            kept.fill([parts])
            kept.eagerly(lambda: self._one(kept.slots[0], begins, ends))
            kept.warm += 1
        else:
            kept.eagerly(lambda: self._one(parts, begins, ends), parts)
        self._launched = False
        self.gathered = 0 if ends else self.gathered + 1
        self._count(parts)

    def _count(self, parts: Parts) -> None:
        self.meter.count(len(parts[0]))
        after, step = self._task.after, self._task.step
        if after is None:
            return
        self.meter.close()
        totals = self.meter.totals
        assert totals.last is not None
        if step is not None:
            self.publish()
        numbers = after(totals.batches - 1, totals.last, step)
        if step is not None and numbers is not None:
            step.set_rates()
        with torch.no_grad():
            self.kept.keep_statistics()

    def _recorded(self) -> None:
        """The work of a launch."""
        accumulate = self._task.accumulate
        for number, parts in enumerate(self.kept.slots):
            self._one(parts, number % accumulate == 0, (number + 1) % accumulate == 0)

    def _one(self, parts: Parts, begins: bool, ends: bool) -> None:
        """One batch; ``begins`` and ``ends``: whether it is the first and the last of a step."""
        task, kept, step = self._task, self.kept, self._task.step
        inputs, targets = parts if task.rows is None else [column.index_select(0, parts[0]) for column in task.rows]
        tensors = task.lowered.tensors if step is None else step.leaves(task.lowered.tensors)
        with torch.set_grad_enabled(step is not None):
            with task.autocast():
                outputs = play(task.lowered, tensors, inputs)
                loss = task.loss_fn(outputs, targets)
            share = loss / task.accumulate if task.accumulate > 1 else loss
        with torch.no_grad(), task.autocast():
            row = measured(task.loss_fn, loss, outputs, targets, len(inputs))
            kept.losses.copy_(torch.cat([kept.losses[1:], row.unsqueeze(0)]))
            # With weights of 0 the mean, which is differentiated, is 0 / 0.
            kept.stopped.logical_or_(torch.isfinite(row[0]).logical_not() | (row[1] == 0) & (row[3] > 0))
        if step is not None:
            step.differentiate(share, begins)
            if ends:
                self._update()

    def _update(self) -> None:
        assert self._task.step is not None
        self._task.step.update(self.kept.stopped)
        with torch.no_grad():
            self.kept.keep_statistics()
        self.stepped = True


def steps_per_launch(batches: int, accumulate: int) -> int:
    """The most that are looked at together, so that of so many batches none is left over."""
    most = max(WINDOW // accumulate, 1)
    return next(steps for steps in range(most, 0, -1) if batches // accumulate % steps == 0)


def classes_of(lowered: Lowered, shape: Sequence[int]) -> int:
    """How many outputs per sample a model has for inputs (N, ...) of this shape."""
    outputs = lowered.graph.shapes(list(shape))[lowered.output]
    return outputs[min(1, len(outputs) - 1)]


def _recording(task: Task, first: Parts) -> Recording:
    """The one of the last epoch if nothing has changed since that it depends on, else a new one."""
    mine = _RECORDINGS.setdefault(task.model, {})
    key, memory = _key(task, first), [] if task.step is None else task.step.memory()
    if task.phase not in mine or (mine[task.phase].key, mine[task.phase].memory) != (key, memory):
        # Its memory goes before the new one takes any; what failed once is not tried every epoch.
        old = mine.pop(task.phase, None)
        failed = old is not None and old.failed
        del old
        sizes = (0, 0) if task.step is None else task.step.sizes
        mine[task.phase] = Recording(key, first, task.accumulate * task.steps, task.lowered, sizes)
        mine[task.phase].failed, mine[task.phase].memory = failed, memory
    return mine[task.phase]


def _key(task: Task, first: Parts) -> tuple[Any, ...]:
    """What a recording depends on besides the optimizer's memory, which it gets while it trains."""
    known: Mapping[str, Any] = known_loss(task.loss_fn) or {}
    loss = [part.data_ptr() if isinstance(part, torch.Tensor) else part for part in known.values()]
    tensors = [(t.data_ptr(), t.stride(), t.dtype, t.requires_grad) for t in task.lowered.tensors]
    rows = [(column.data_ptr(), column.shape, column.dtype) for column in task.rows or ()]
    kernels = (kernel_switches(), generation(first[0].device))
    step = None if task.step is None else task.step.options()
    batches = (form(first), task.accumulate, task.steps, rows)
    return (batches, loss, task.lowered.operations, tensors, kernels, step, task.options)
