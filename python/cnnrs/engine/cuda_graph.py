"""Training on a GPU without Python between the kernels: a whole step is recorded once as a CUDA graph, then replayed.

The first steps run eagerly. They are steps like any other, so nothing has to be undone after them: weights, running
statistics, random numbers. Losses stay on the device and are read a few steps later, while it works on.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer

from cnnrs._util.notes import note
from cnnrs.engine.losses import Loss, Totals, counts, known_loss, measured
from cnnrs.engine.optimizers import FusedStep, reached
from cnnrs.errors import NonFiniteLossError
from cnnrs.model.lowering import Lowered
from cnnrs.model.player import play

Batch = tuple[torch.Tensor, torch.Tensor]

#: Steps before a recording: cuDNN chooses its kernels, cuBLAS takes its workspace, the optimizer makes its state.
WARM_UP = 3
#: Steps between two looks at the losses; the host is at most two windows ahead of the device.
WINDOW = 8


def _record(work: Callable[[], None], stream: Any) -> Callable[[], None]:
    graph = torch.cuda.CUDAGraph()
    # Other threads, a loader's for one, may allocate meanwhile: only what this thread does must fit into a graph.
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph.replay


#: Per type of device: takes a step's work and a stream, computes nothing, returns what computes it as often as called.
RECORDERS: dict[str, Callable[[Callable[[], None], Any], Callable[[], None]]] = {"cuda": _record}


def takes(lowered: Lowered, loss_fn: Loss, optimizer: Optimizer | None, device: torch.device) -> bool:
    """Whether a step is the same kernels on the same memory every time, and none of its numbers is needed at once.

    Args:
        lowered: the model, in the mode it will run in.
        loss_fn: must be one that runs no code of the user's.
        optimizer: None for validation.
        device: of the model.
    """
    if device.type not in RECORDERS or known_loss(loss_fn) is None:
        return False
    # A cumulative average divides by the number of batches, on the host.
    if any(kind == "BatchNorm2d" and a["training"] and a["momentum"] is None for _, kind, _, a in lowered.operations):
        return False
    return optimizer is None or FusedStep.takes(optimizer, reached(lowered))


class _Recording:
    """A step over fixed memory: what it reads, where it writes, and how to run it again."""

    def __init__(self, key: Any, batch: Batch, lowered: Lowered, parameters: int, device: torch.device) -> None:
        self.key = key
        self.inputs, self.targets = (torch.empty_like(part) for part in batch)
        #: What the losses measured at the last steps.
        self.losses = torch.zeros(WINDOW, 4, dtype=torch.float64, device=device)
        #: 1 from the first loss on that is not finite.
        self.stopped = torch.zeros((), device=device)
        self.counts = torch.zeros(parameters, device=device)
        self.statistics = [
            (same, torch.cat([t.flatten() for t in same])) for same in _by_dtype(_running_statistics(lowered))
        ]
        self.stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.warm = 0
        self.failed = False
        self.replay: Callable[[], None] | None = None
        self.gradients: list[torch.Tensor | None] = []

    def fits(self, inputs: torch.Tensor, targets: torch.Tensor) -> bool:
        return _form(inputs, targets) == _form(self.inputs, self.targets)

    def keep_statistics(self) -> None:
        """Remember the running statistics, unless the flag says that the last batch must not count."""
        for tensors, kept in self.statistics:
            kept.copy_(torch.where(self.stopped.bool(), kept, torch.cat([t.flatten() for t in tensors])))

    def restore_statistics(self) -> None:
        for tensors, kept in self.statistics:
            start = 0
            for tensor in tensors:
                tensor.copy_(kept[start : start + tensor.numel()].view_as(tensor))
                start += tensor.numel()

    def whole(self, work: Callable[[], None]) -> None:
        """A step that cannot be done leaves the running statistics alone."""
        try:
            work()
        except BaseException:
            self.restore_statistics()
            raise

    def aside(self, work: Callable[[], None]) -> None:
        """Eagerly on the stream that will record: autograd and cuBLAS keep things per stream."""
        if self.stream is None:
            work()
            return
        current = torch.cuda.current_stream(self.inputs.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            work()
        current.wait_stream(self.stream)


#: By phase. A model's recordings, and the memory they work in, live as long as it does.
_RECORDINGS: WeakKeyDictionary[nn.Module, dict[str, _Recording]] = WeakKeyDictionary()


def run(
    epoch: int,
    phase: str,
    model: nn.Module,
    lowered: Lowered,
    loss_fn: Loss,
    step: FusedStep | None,
    batches: Iterator[Batch],
    autocast: Callable[[], AbstractContextManager[Any]],
    options: tuple[Any, ...],
) -> Totals:
    """One epoch; :func:`takes` must have said yes.

    Args:
        epoch: number of the epoch, for messages.
        phase: "training" or "validation", for messages.
        model: owner of the recordings.
        lowered: the model as operations, in the mode of ``phase``.
        loss_fn: one of the known losses.
        step: the optimizer; None for validation.
        batches: yields inputs (N, ...) and targets on the model's device; those of the first batch's shape and dtype
            are replayed, all others run eagerly. None in place of a batch ends the epoch.
        autocast: makes the context that the layers run in.
        options: what else the kernels depend on: other options need another recording.

    Returns:
        What has been added up.

    Raises:
        NonFiniteLossError: weights, optimizer and running statistics are those before the batch that the message names;
            up to two windows of batches after it have been read.
    """
    first = next(batches, None)
    if first is None:
        return Totals()
    kept = _recording(model, phase, first, lowered, loss_fn, step, options)
    meter = _Meter(epoch, phase, kept)

    def work(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        with torch.set_grad_enabled(step is not None), autocast():
            outputs = play(lowered, lowered.tensors, inputs)
            loss = loss_fn(outputs, targets)
        with torch.no_grad(), autocast():
            row = measured(loss_fn, loss, outputs, targets, len(inputs))
            kept.losses.copy_(torch.cat([kept.losses[1:], row.unsqueeze(0)]))
            # With weights of 0 the mean, which is differentiated, is 0 / 0.
            kept.stopped.logical_or_(torch.isfinite(row[0]).logical_not() | (row[1] == 0) & (row[3] > 0))
        if step is not None:
            step(loss, kept.stopped)
            with torch.no_grad():
                kept.keep_statistics()

    def fixed() -> None:
        work(kept.inputs, kept.targets)

    with torch.no_grad():
        kept.stopped.zero_()
        kept.keep_statistics()
    if step is not None:
        step.begin(kept.counts)
    began, replayed = False, False
    try:
        for batch in chain([first], batches):
            if batch is None:
                break
            inputs, targets = batch
            replayed = False
            if not kept.fits(inputs, targets):
                kept.whole(partial(work, inputs, targets))
            else:
                kept.inputs.copy_(inputs, non_blocking=True)
                kept.targets.copy_(targets, non_blocking=True)
                if kept.replay is None and kept.warm >= WARM_UP and not kept.failed:
                    _try_to_record(kept, fixed, step)
                if kept.replay is not None:
                    kept.replay()
                    replayed = True
                else:
                    kept.whole(lambda: kept.aside(fixed))
                    kept.warm += 1
            began = True
            meter.count(len(inputs))
        meter.close()
    except NonFiniteLossError:
        kept.restore_statistics()
        began = meter.totals.batches > 0
        # It may have been recorded over state that the optimizer never gets; replays of it may still be under way.
        if kept.stream is not None:
            torch.cuda.synchronize(kept.inputs.device)
        del _RECORDINGS[model][phase]
        raise
    finally:
        if step is not None and began:
            if replayed:
                for parameter, gradient in zip(step.parameters, kept.gradients, strict=True):
                    parameter.grad = gradient
            step.finish()
            kept.key = _key(first, lowered, loss_fn, step, options)
    return meter.totals


def _recording(
    model: nn.Module,
    phase: str,
    first: Batch,
    lowered: Lowered,
    loss_fn: Loss,
    step: FusedStep | None,
    options: tuple[Any, ...],
) -> _Recording:
    """The one of the last epoch if nothing has changed since that it depends on, else a new one."""
    mine = _RECORDINGS.setdefault(model, {})
    key = _key(first, lowered, loss_fn, step, options)
    if phase not in mine or mine[phase].key != key:
        # Its memory goes before the new one takes any; what failed once is not tried every epoch.
        old = mine.pop(phase, None)
        failed = old is not None and old.failed
        del old
        parameters = 0 if step is None else len(step.parameters)
        mine[phase] = _Recording(key, first, lowered, parameters, first[0].device)
        mine[phase].failed = failed
    return mine[phase]


def _key(
    first: Batch, lowered: Lowered, loss_fn: Loss, step: FusedStep | None, options: tuple[Any, ...]
) -> tuple[Any, ...]:
    known: Mapping[str, Any] = known_loss(loss_fn) or {}
    loss = [part.data_ptr() if isinstance(part, torch.Tensor) else part for part in known.values()]
    tensors = [(t.data_ptr(), t.stride(), t.dtype, t.requires_grad) for t in lowered.tensors]
    kernels = (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic)
    optimizer = None if step is None else step.key()
    return (_form(*first), loss, lowered.operations, tensors, kernels, optimizer, options)


def _try_to_record(kept: _Recording, fixed: Callable[[], None], step: FusedStep | None) -> None:
    outside = sys.exc_info()[1]
    try:
        kept.replay = RECORDERS[kept.inputs.device.type](fixed, kept.stream)
        kept.gradients = [] if step is None else [p.grad for p in step.parameters]
    except Exception as error:
        # CUDA's own error about the end of the recording hides what ended it.
        reason: BaseException = error
        while reason.__context__ not in (None, outside):
            reason = reason.__context__
        if not isinstance(reason, Exception):
            raise reason from None
        kept.failed = True
        line = str(reason).split("\n")[0]
        note(f"the step cannot be recorded as a CUDA graph and runs eagerly: {type(reason).__name__}: {line}")


class _Meter:
    """Adds up an epoch's losses, one window behind the device."""

    def __init__(self, epoch: int, phase: str, kept: _Recording) -> None:
        self.totals = Totals()
        self._where = f"{phase} epoch {epoch}"
        self._losses = kept.losses
        self._sizes: list[int] = []
        self._pending: tuple[torch.Tensor, Any, list[int]] | None = None

    def count(self, samples: int) -> None:
        """One more step is under way."""
        self._sizes.append(samples)
        if len(self._sizes) == WINDOW:
            self._look()

    def close(self) -> None:
        """Wait for all of them."""
        if self._sizes:
            self._look()
        self._add_pending()

    def _look(self) -> None:
        on_gpu = self._losses.device.type == "cuda"
        steps = len(self._sizes)
        rows = torch.empty(steps, 4, dtype=torch.float64, pin_memory=on_gpu)
        rows.copy_(self._losses[-steps:], non_blocking=True)
        event = None
        if on_gpu:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._losses.device))
        # The device has this window to do while the host waits for the one before.
        self._add_pending()
        self._pending, self._sizes = (rows, event, self._sizes), []

    def _add_pending(self) -> None:
        if self._pending is None:
            return
        (rows, event, sizes), self._pending = self._pending, None
        if event is not None:
            event.synchronize()
        for row, samples in zip(rows, sizes, strict=True):
            self._add(*counts(row), samples)

    def _add(self, loss: float, weight: float, correct: int | None, counted: int, samples: int) -> None:
        so_far = self.totals
        if weight == 0 and counted > 0:
            loss = math.nan
        if not math.isfinite(loss):
            last = "none" if so_far.last is None else f"{so_far.last:.4f}"
            value = "NaN" if math.isnan(loss) else loss
            raise NonFiniteLossError(
                f"loss is {value} in {self._where}, batch {so_far.batches}; the last finite loss was {last}"
            )
        both = correct is not None and so_far.correct is not None
        self.totals = Totals(
            so_far.loss + loss,
            so_far.weight + weight,
            so_far.correct + correct if both else None,  # type: ignore[operator]
            so_far.counted + counted,
            so_far.samples + samples,
            so_far.batches + 1,
            loss / weight if weight else math.nan,
        )


def _form(inputs: torch.Tensor, targets: torch.Tensor) -> tuple[Any, ...]:
    return (inputs.shape, inputs.dtype, targets.shape, targets.dtype)


def _running_statistics(lowered: Lowered) -> list[torch.Tensor]:
    """What batch norms change in training."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    indices = [
        attributes[name]
        for _, kind, _, attributes in lowered.operations
        if kind == "BatchNorm2d" and attributes["training"]
        for name in names
    ]
    return [lowered.tensors[index] for index in dict.fromkeys(indices) if index is not None]


def _by_dtype(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    groups: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())
