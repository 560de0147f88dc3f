"""Who computes an epoch: an engine as far as it goes, the user's module for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any

import torch

from cnnrs._records import Epoch
from cnnrs._util.notes import note
from cnnrs.engine import companion, cpu_training, cuda_graph, kept_plans, verify
from cnnrs.engine.choice import Engine, Question, decide, lowered_for
from cnnrs.engine.fused_step import FusedStep
from cnnrs.engine.losses import Totals, called, check_targets, known_loss
from cnnrs.engine.optimizers import Step, overlap, reached
from cnnrs.engine.same_bits import Sample
from cnnrs.errors import UnsupportedModelError
from cnnrs.model.around import unseen_by_cpu, unseen_by_libtorch
from cnnrs.model.lowering import Lowered
from cnnrs.training import python_engine
from cnnrs.training.arguments import needs_closure
from cnnrs.training.batches import Stream, describe, is_plain, to_channels_last
from cnnrs.training.elsewhere import trained_elsewhere
from cnnrs.training.feed import Feed
from cnnrs.training.job import Job
from cnnrs.training.rows import FeatureRows
from cnnrs.training.watch import Watch


def run(job: Job, engine: Engine, batches: Iterator[Any], rows: FeatureRows | None) -> Totals:
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


def _run(job: Job, engine: Engine, batches: Iterator[Any], rows: FeatureRows | None) -> Totals:
    question = _question(job, engine)
    lowered = question.lowered
    if lowered is None or question.reasons:
        if question.reasons and engine != "auto":
            reasons = "\n".join([f"engine {engine!r} cannot run this, engine='python' can:", *question.reasons])
            raise UnsupportedModelError(reasons)
        return python_engine.run(job, batches)
    if job.optimizer is not None and not any(p.requires_grad for p in reached(lowered)):
        if engine != "auto":
            raise UnsupportedModelError(
                f"engine {engine!r} trains what the model's operations read, and nothing of that requires gradients"
            )
        return python_engine.run(job, batches)
    # Rows are read where they lie, in the order of memory that they have.
    if rows is not None and (
        rows.features.device != job.device or job.channels_last or overlap([rows.features, *lowered.tensors])
    ):
        rows = None
    first = next(batches, None) if rows is None else rows.example()
    if rows is None and first is not None:
        batches = chain([first], batches)
    takes = _Takes(job, question, lowered)
    if first is None or not takes(*first):
        return python_engine.run(job, batches)
    # What decides the rest is the form of a batch.
    choice = decide(_about(question, *first))
    if engine == "cpu" and choice.reasons:
        raise UnsupportedModelError("\n".join(["engine 'cpu' cannot run this:", *choice.reasons]))
    if choice.engine == "python":
        front, samples = choice.front, list[Sample]()
        # What the check frees the steps take.
        with python_engine.keeping(job):
            if front is not None and job.check and (reason := _differs(job, lowered, "front", first[0], samples)):
                front = None
                _note_called(job, reason)
            return python_engine.run(job, batches, front=front, sample=next(iter(samples), None))
    if reason := _called_for(job, lowered, choice.engine, first[0]):
        if engine != "auto":
            raise UnsupportedModelError(f"engine {engine!r} cannot run this model:\n{reason}")
        _note_called(job, reason)
        return python_engine.run(job, batches)
    if choice.engine == "cpu":
        native = takes.natively(*first)
        return _run_cpu(job, lowered, Stream(batches, native, lowered, job.loop.accumulate, True), rows)
    if job.channels_last:
        to_channels_last(job.model)
    if choice.engine == "recorded" and rows is not None:
        return _run_recorded_rows(job, lowered, rows)
    stream = Stream(_outside(job, batches), takes, lowered, job.loop.accumulate, False)
    run = _run_recorded if choice.engine == "recorded" else _run_lowered
    return _and_the_rest(job, stream, run(job, lowered, stream))


def _question(job: Job, engine: Engine) -> Question:
    """What is known before there is a batch."""
    # An engine that there is not is refused by `lowered_for`, whatever is on.
    reasons = _only_the_module(job) if engine in ("auto", "cpu", "torch") else ()
    lowered = None
    if not reasons:
        with job.autocast(keep=False):
            lowered = lowered_for(job.model, engine, gradients=job.phase == "training")
    return Question(
        "fit", engine, lowered, reasons, loss_fn=job.loss_fn, optimizer=job.optimizer, amp=job.amp, around=job.around,
        channels_last=job.channels_last, training=job.optimizer is not None, batches=job.batches, exact=job.exact,
        looked_at=job.optimizer is not None and job.loop.on_batch_end is not None and job.loop.accumulate > 1,
    )  # fmt: skip


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
    return _differs(job, lowered, engine, inputs) if job.check else None


def _note_called(job: Job, reason: str) -> None:
    note(f"fit calls {type(job.model).__name__} itself, as engine='python' does: {reason}")


def _differs(
    job: Job, lowered: Lowered, engine: str, inputs: torch.Tensor, samples: list[Sample] | None = None
) -> str | None:
    return verify.differs(
        job.model, lowered, inputs, engine=engine, optimizer=job.optimizer, amp=job.amp, samples=samples
    )


def _only_the_module(job: Job) -> tuple[str, ...]:
    """Why nothing but calling the module will do, whatever the model."""
    reasons = unseen_by_libtorch()
    if job.scaled:
        reasons.append("it does not scale fp16 gradients: use 'bf16'")
    if job.optimizer is not None and needs_closure(job.optimizer):
        reasons.append(f"{type(job.optimizer).__name__} evaluates the model again in a closure")
    return tuple(reasons)


def _and_the_rest(job: Job, stream: Stream, totals: Totals) -> Totals:
    """What a compiled engine has left goes through the user's module."""
    return python_engine.run(job, stream.rest(), totals) if stream.left else totals


class _Takes:
    """Whether an engine can do a batch, asked once per form.

    Where it cannot, "auto" leaves the batch to the user's module; an engine that was asked for refuses.
    """

    def __init__(self, job: Job, question: Question, lowered: Lowered, native: bool = False) -> None:
        self._job = job
        self._question = question
        self._lowered = lowered
        self._engine = question.engine
        self._native = native
        self._known: dict[Any, bool] = {}

    def natively(self, inputs: torch.Tensor, targets: torch.Tensor) -> _Takes:
        """The same of engine ``cpu``, which takes a batch like this one."""
        takes = _Takes(self._job, self._question, self._lowered, native=True)
        takes._known[_form(inputs, targets)] = True
        return takes

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
        form = _form(inputs, targets)
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
        if self._native and (reasons := self._against_cpu(inputs, targets)):
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
        if not self._native or not (reasons := self._against_cpu(inputs, targets)):
            return True
        if self._engine == "auto":
            return False
        refused = UnsupportedModelError("\n".join(["engine 'cpu' cannot run this:", *reasons]))
        self._job.module().ask((inputs, targets), refused)
        raise refused

    def _against_cpu(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[str, ...]:
        return decide(_about(self._question, inputs, targets)).reasons


def _about(question: Question, inputs: torch.Tensor, targets: torch.Tensor) -> Question:
    """The question about this batch: drawing it may have switched modes on."""
    return replace(question, inputs=inputs, targets=targets, surroundings=tuple(unseen_by_cpu()))


def _form(inputs: torch.Tensor, targets: torch.Tensor) -> Any:
    """What an engine's answer depends on."""
    return (inputs.shape, inputs.dtype, targets.shape, targets.dtype)


def _run_cpu(job: Job, lowered: Lowered, stream: Stream, rows: FeatureRows | None) -> Totals:
    loss = known_loss(job.loss_fn)
    assert loss is not None
    loop = job.loop
    if job.optimizer is not None:
        kept_plans.drop(job.model)

    def run(batches: Iterator[Any] | cpu_training.Rows) -> Totals:
        return cpu_training.run(
            job.epoch, job.phase, job.model, lowered, loss, job.optimizer, batches,
            loop.clip, loop.accumulate, Watch(job, stream) if loop.on_batch_end is not None else None,
            unseen=job.unseen,
        )  # fmt: skip

    if rows is not None:
        totals: Totals = rows.epoch(run, lambda: cpu_training.steps(job.model) * loop.accumulate)
        return totals
    return _and_the_rest(job, stream, run(stream))


def _run_recorded(job: Job, lowered: Lowered, stream: Stream) -> Totals:
    watch = None if job.loop.on_batch_end is None else Watch(job, stream)
    return cuda_graph.run(_recorded(job, lowered, watch), stream)


def _run_recorded_rows(job: Job, lowered: Lowered, rows: FeatureRows) -> Totals:
    """Rows of features that lie on the device: they are gathered there, several steps per launch."""
    task, handed = _recorded(job, lowered, None), 0

    def run(found: cpu_training.Rows) -> Totals:
        features, labels, order, ends = found
        index = torch.tensor(order, dtype=torch.int64, device=features.device)
        parts = [index[begin:end] for begin, end in pairwise([0, *ends])]
        classes = cuda_graph.classes_of(lowered, features.shape)

        def check(rows: torch.Tensor, where: str) -> None:
            check_targets(job.loss_fn, classes, labels.index_select(0, rows), f"{job.phase} epoch {job.epoch}{where}")

        try:
            check(index, "")
        except IndexError:
            for number, part in enumerate(parts):
                check(part, f", batch {number}")

        def batches() -> Iterator[tuple[torch.Tensor]]:
            nonlocal handed
            for part in parts:
                handed += 1
                yield (part,)

        sizes = list(map(len, parts))
        steps = cuda_graph.steps_per_launch(sizes.count(max(sizes, default=0)), task.accumulate)
        return cuda_graph.run(replace(task, rows=(features, labels), steps=steps), batches())

    totals: Totals = rows.epoch(run, lambda: handed)
    return totals


def _recorded(job: Job, lowered: Lowered, watch: Watch | None) -> cuda_graph.Task:
    optimizer, loop = job.optimizer, job.loop
    return cuda_graph.Task(
        job.epoch, job.phase, job.model, lowered, job.loss_fn,
        None if optimizer is None else FusedStep(optimizer, reached(lowered), loop.clipper()),
        lambda: job.autocast(keep=False), (job.amp, loop.clip),
        accumulate=1 if optimizer is None else loop.accumulate, after=watch,
    )  # fmt: skip


def _run_lowered(job: Job, lowered: Lowered, stream: Stream) -> Totals:
    loop, optimizer = job.loop, job.optimizer
    loss: Any = known_loss(job.loss_fn)
    if loss is None or loss["kind"] not in ("nll", "cross_entropy"):
        loss = called(job.loss_fn)
    graph, tensors = companion.graph(lowered), lowered.tensors
    fit = companion.libtorch().fit
    step = None if optimizer is None else Step(optimizer, reached(lowered), loop.clipper(), job.outside)
    watch = None if loop.on_batch_end is None else Watch(job, stream)
    after = None if watch is None else lambda batch, mean: watch(batch, mean, step)
    epoch: Epoch = {"number": job.epoch, "phase": job.phase, "accumulate": 1, "after": after}
    # The weights change from batch to batch: none of their copies in low precision may be kept.
    with job.autocast(keep=False):
        if optimizer is None or step is None:
            return Totals(**fit(epoch, graph, tensors, loss, None, stream))
        epoch["accumulate"] = loop.accumulate
        optimizer.zero_grad()
        try:
            return Totals(**fit(epoch, graph, tensors, loss, step.handle, stream))
        finally:
            step.finish()
