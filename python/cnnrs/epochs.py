"""Who computes an epoch: an engine as far as it goes, the user's module for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import Any

import torch

from cnnrs import companion, cpu_engine, cuda_graph, python_engine, verify
from cnnrs._notes import note
from cnnrs.arguments import needs_closure
from cnnrs.around import unseen_by_cpu, unseen_by_libtorch
from cnnrs.batches import Stream, describe, is_plain, to_channels_last
from cnnrs.elsewhere import trained_elsewhere
from cnnrs.engines import Engine, choose, slow_on_cpu
from cnnrs.errors import UnsupportedModelError
from cnnrs.feed import Feed
from cnnrs.graph import Lowered
from cnnrs.job import Job
from cnnrs.losses import Totals, called, known_loss
from cnnrs.optimizers import FusedStep, Step, overlap, reached
from cnnrs.watch import Watch


def run(job: Job, engine: Engine, batches: Iterator[Any], rows: cpu_engine.FeatureRows | None) -> Totals:
    """One epoch.

    Args:
        job: what to do.
        engine: as for :func:`cnnrs.fit`.
        batches: yields (inputs, targets) of any form, on the model's device.
        rows: the same as features in memory, which engine ``cpu`` can read without Python; None for anything else.

    Raises:
        Exception: what the user's own module raises for a batch that an engine does not take; else the engine's.
    """
    feed = Feed(batches)
    try:
        return _run(job, engine, feed, rows)
    except Exception as error:
        batch = feed.current
        if isinstance(error, UnsupportedModelError) and batch is None:
            # That the loader fails as well is not what the user must hear of first.
            with suppress(Exception):
                batch = next(feed, None)
        elif not isinstance(error, UnsupportedModelError) and not getattr(error, "refused", False):
            raise
        elif batch is None and rows is not None:
            batch = rows.current
        if batch is not None and is_plain(batch[0], batch[1], training=False):
            job.module().ask(batch, error)
        raise


def _run(job: Job, engine: Engine, batches: Iterator[Any], rows: cpu_engine.FeatureRows | None) -> Totals:
    with job.autocast(keep=False):
        lowered = choose(job.model, _narrowed(job, engine), gradients=job.phase == "training")
    if lowered is None:
        return python_engine.run(job, batches)
    if job.optimizer is not None and not any(p.requires_grad for p in reached(lowered)):
        if engine != "auto":
            raise UnsupportedModelError(
                f"engine {engine!r} trains what the model's operations read, and nothing of that requires gradients"
            )
        return python_engine.run(job, batches)
    if rows is not None and overlap([rows.features, *lowered.tensors]):
        rows = None
    first = next(batches, None) if rows is None else rows.example()
    if rows is None and first is not None:
        batches = chain([first], batches)
    takes = _Takes(job, lowered, engine)
    if first is None or not takes(*first):
        return python_engine.run(job, batches)
    wanted = engine == "cpu" or (engine == "auto" and not slow_on_cpu(lowered))
    reasons = _obstacles(job, lowered, first) if wanted else []
    if reasons and engine == "cpu":
        raise UnsupportedModelError("\n".join(["engine 'cpu' cannot run this:", *reasons]))
    # What decides the rest is the shape of a batch.
    native = wanted and not reasons
    recorded = not native and _is_recorded(job, lowered)
    if engine == "auto" and not native and not recorded:
        return python_engine.run(job, batches)
    computes = "cpu" if native else "recorded" if recorded else "torch"
    if reason := _called_for(job, lowered, computes, first[0]):
        if engine != "auto":
            raise UnsupportedModelError(f"engine {engine!r} cannot run this model:\n{reason}")
        note(f"fit calls {type(job.model).__name__} itself, as engine='python' does: {reason}")
        return python_engine.run(job, batches)
    if native:
        return _run_cpu(job, lowered, Stream(batches, takes.natively(), lowered, job.loop.accumulate, True), rows)
    if job.channels_last:
        to_channels_last(job.model)
    stream = Stream(_outside(job, batches), takes, lowered, job.loop.accumulate, False)
    run = _run_recorded if recorded else _run_lowered
    return _and_the_rest(job, stream, run(job, lowered, stream))


def _is_recorded(job: Job, lowered: Lowered) -> bool:
    """Whether the steps are recorded once and replayed."""
    at_once = job.loop.on_batch_end is not None or job.loop.accumulate > 1
    return not at_once and cuda_graph.takes(lowered, job.loss_fn, job.optimizer, job.device)


def _outside(job: Job, batches: Iterator[Any]) -> Iterator[Any]:
    """The loader does not run in the autocast of the layers."""
    while True:
        with job.outside():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _called_for(job: Job, lowered: Lowered, engine: str, inputs: torch.Tensor) -> str | None:
    """Why the module is to be called, although it could be lowered."""
    if reason := trained_elsewhere(reached(lowered), job.optimizer, job.loss_fn, job.loop.on_batch_end is not None):
        return reason
    if not job.check:
        return None
    return verify.differs(job.model, lowered, inputs, engine=engine, optimizer=job.optimizer, amp=job.amp)


def _narrowed(job: Job, engine: Engine) -> Engine:
    """The engine, which is "python" for "auto" where nothing but calling the module will do, whatever the model.

    Raises:
        UnsupportedModelError: another engine was asked for.
    """
    reasons = unseen_by_libtorch()
    if job.scaled:
        reasons.append("it does not scale fp16 gradients: use 'bf16'")
    if job.optimizer is not None and needs_closure(job.optimizer):
        reasons.append(f"{type(job.optimizer).__name__} evaluates the model again in a closure")
    if reasons and engine in ("cpu", "torch"):
        reasons = [f"engine {engine!r} cannot run this, engine='python' can:", *reasons]
        raise UnsupportedModelError("\n".join(reasons))
    return "python" if reasons and engine == "auto" else engine


def _and_the_rest(job: Job, stream: Stream, totals: Totals) -> Totals:
    """What a compiled engine has left goes through the user's module."""
    return python_engine.run(job, stream.rest(), totals) if stream.left else totals


class _Takes:
    """Whether an engine can do a batch, asked once per form.

    Where it cannot, "auto" leaves the batch to the user's module; an engine that was asked for refuses.
    """

    def __init__(self, job: Job, lowered: Lowered, engine: Engine, native: bool = False) -> None:
        self._job = job
        self._lowered = lowered
        self._engine = engine
        self._native = native
        self._known: dict[Any, bool] = {}

    def natively(self) -> _Takes:
        """The same of engine ``cpu``."""
        return _Takes(self._job, self._lowered, self._engine, native=True)

    def __call__(self, inputs: Any, targets: Any, within: bool = False) -> bool:
        """``within``: a step of several batches has begun; only its engine can undo it, or finish it if it is "cpu"."""
        if not is_plain(inputs, targets, training=self._job.optimizer is not None):
            if self._engine == "auto" and not (within and self._native):
                return False
            engine = "cpu" if self._native else self._engine
            raise UnsupportedModelError(
                f"engine {engine!r} takes batches of two ordinary tensors, inputs and targets, got {describe(inputs)} "
                f"and {describe(targets)}: use engine='python' or 'auto'"
            )
        form = (inputs.shape, inputs.dtype, targets.shape, targets.dtype)
        if form not in self._known:
            if within:
                return self._is_checked(inputs, targets)
            self._known[form] = self._fits(inputs, targets)
        return self._known[form]

    def _is_checked(self, inputs: torch.Tensor, targets: torch.Tensor) -> bool:
        """A batch within a step: it can only be refused, which undoes the step."""
        try:
            self._lowered.graph.shapes(list(inputs.shape))
        except RuntimeError as error:
            self._job.module().ask((inputs, targets), error)
        if self._native and (reasons := _obstacles(self._job, self._lowered, (inputs, targets))):
            raise UnsupportedModelError(
                "\n".join(
                    ["engine 'cpu' has begun a step whose next batch it cannot run; engine='python' can:", *reasons]
                )
            )
        return True

    def _fits(self, inputs: torch.Tensor, targets: torch.Tensor) -> bool:
        try:
            self._lowered.graph.shapes(list(inputs.shape))
        except RuntimeError as error:
            if self._engine == "auto":
                return False
            # PyTorch's words, before anything has changed.
            self._job.module().ask((inputs, targets), error)
        if not self._native or not (reasons := _obstacles(self._job, self._lowered, (inputs, targets))):
            return True
        if self._engine == "auto":
            return False
        refused = UnsupportedModelError("\n".join(["engine 'cpu' cannot run this:", *reasons]))
        self._job.module().ask((inputs, targets), refused)
        raise refused


def _obstacles(job: Job, lowered: Lowered, batch: tuple[torch.Tensor, torch.Tensor] | None) -> list[str]:
    """Why engine ``cpu`` cannot do this, as far as can be seen without a batch or from one."""
    loss = known_loss(job.loss_fn)
    reasons = cpu_engine.supports(lowered, job.optimizer, loss, job.device) + unseen_by_cpu()
    if job.amp is not None:
        reasons.append(f"it computes in float32 only, and {'autocast' if job.around else 'amp'} asks for less")
    if job.channels_last:
        reasons.append("it computes on contiguous memory only, and memory_format asks for channels_last")
    if batch is None or reasons:
        return reasons
    inputs, targets = batch
    return cpu_engine.supports(lowered, job.optimizer, loss, job.device, inputs.dtype, tuple(inputs.shape), targets)


def _run_cpu(job: Job, lowered: Lowered, stream: Stream, rows: cpu_engine.FeatureRows | None) -> Totals:
    loss = known_loss(job.loss_fn)
    assert loss is not None
    loop = job.loop
    totals = cpu_engine.run(
        job.epoch, job.phase, job.model, lowered, loss, job.optimizer, stream if rows is None else rows,
        loop.clip, loop.accumulate, Watch(job, stream) if loop.on_batch_end is not None else None,
    )  # fmt: skip
    return _and_the_rest(job, stream, totals)


def _run_recorded(job: Job, lowered: Lowered, batches: Iterator[Any]) -> Totals:
    optimizer = job.optimizer
    step = None if optimizer is None else FusedStep(optimizer, reached(lowered), job.loop.clipper())
    return cuda_graph.run(
        job.epoch, job.phase, job.model, lowered, job.loss_fn, step, batches,
        lambda: job.autocast(keep=False), (job.amp, job.loop.clip),
    )  # fmt: skip


def _run_lowered(job: Job, lowered: Lowered, stream: Stream) -> Totals:
    loop, optimizer = job.loop, job.optimizer
    loss: Any = known_loss(job.loss_fn)
    if loss is None or loss[0] not in ("nll", "cross_entropy"):
        loss = called(job.loss_fn)
    arguments = (job.epoch, job.phase, companion.graph(lowered), lowered.tensors, loss)
    fit = companion.libtorch().fit
    step = None if optimizer is None else Step(optimizer, reached(lowered), loop.clipper(), job.outside)
    watch = None if loop.on_batch_end is None else Watch(job, stream)
    after = None if watch is None else lambda batch, mean: watch(batch, mean, step)
    # The weights change from batch to batch: none of their copies in low precision may be kept.
    with job.autocast(keep=False):
        if optimizer is None or step is None:
            return Totals(*fit(*arguments, None, stream, 1, after))
        optimizer.zero_grad()
        try:
            return Totals(*fit(*arguments, step.handle, stream, loop.accumulate, after))
        finally:
            step.finish()
