"""One epoch of training or validation: the tutorial's ``fit`` with the loop compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer

from cnnrs import _cnnrs, cpu_engine, cuda_graph
from cnnrs._progress import is_shown
from cnnrs.batches import on_device, to_channels_last
from cnnrs.engines import Engine, choose, device_of, slow_on_cpu
from cnnrs.errors import UnsupportedModelError
from cnnrs.graph import Lowered
from cnnrs.losses import Loss, count_correct, known_loss, summed
from cnnrs.optimizers import FusedStep, Step

Phase = Literal["training", "validation"]
Amp = Literal["bf16", "fp16"]
Totals = tuple[float, int | None, int]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

#: Scales of fp16 gradients go on from epoch to epoch.
_SCALERS: WeakKeyDictionary[Optimizer, torch.amp.GradScaler] = WeakKeyDictionary()


def fit(
    epoch: int,
    model: nn.Module,
    loader: Iterable[Any],
    phase: Phase = "training",
    *,
    optimizer: Optimizer | None = None,
    loss_fn: Loss,
    engine: Engine = "auto",
    progress: bool | None = None,
    amp: Amp | None = None,
    memory_format: torch.memory_format | None = None,
    clip_grad_norm: float | None = None,
    clip_grad_value: float | None = None,
    accumulate: int = 1,
    on_batch_end: Callable[[int, float], object] | None = None,
    verbose: bool = True,
) -> tuple[float, float]:
    """Train or validate ``model`` for one pass over ``loader`` and print the tutorial's line.

    The module and the optimizer stay yours: weights, running statistics and optimizer state are updated in place. How
    close the numbers are to the plain PyTorch loop under the same seed depends on the engine (``explain(model)`` says
    which one "auto" takes): on the CPU "torch" and "python" have its bits, dropout included; "cpu" equals it up to
    float rounding, draws dropout from a generator of its own (seeded by torch's) and leaves no ``.grad``.

    Args:
        epoch: number of the epoch; only messages use it.
        model: any module that maps inputs (N, ...) to outputs (N, classes); ``model.train()`` or ``model.eval()`` is
            called. Batches are moved to the device it is on.
        loader: yields (inputs, targets): float32 (N, ...) and, for classification, int64 (N,) class indices.
        phase: "training" steps the optimizer after every batch; "validation" changes nothing.
        optimizer: needed for training. SGD, Adam and AdamW on CPU float32 weights run compiled, any other is called.
        loss_fn: ``F.nll_loss``, ``F.cross_entropy`` or their modules run compiled, anything else is called as
            ``loss_fn(outputs, targets)`` and must return the mean over the batch. Engine "cpu" also knows
            ``F.mse_loss`` and ``F.binary_cross_entropy_with_logits``.
        engine: "cpu" is a training step compiled to native code, for float32 on the CPU; "torch" runs the model's
            layers through libtorch without Python, on CUDA as one graph per step where it can; "python" calls the
            module. "auto" takes the fastest that can run it.
        progress: show a bar on terminals and in notebooks; None: as ``verbose``.
        amp: "bf16" or "fp16" runs the layers in ``torch.autocast``; "fp16" scales the gradients.
        memory_format: ``torch.channels_last`` converts the batches, and once the model's 4-D weights in place: the same
            numbers in another order of memory, in which they stay, as after ``model.to(memory_format=...)``.
        clip_grad_norm: largest norm of all gradients that the optimizer applies (``clip_grad_norm_``).
        clip_grad_value: largest absolute value of a gradient (``clip_grad_value_``).
        accumulate: batches per step of the optimizer; each one's loss is divided by it. The last step of an epoch takes
            the batches that are left.
        on_batch_end: called with the number of the batch and its mean loss, after the step. What it changes in
            ``optimizer.param_groups`` holds from the next batch on, as with a scheduler that steps per batch. What it
            raises ends the epoch.
        verbose: print the line.

    Returns:
        (loss, accuracy): mean loss per sample, and per cent of samples whose largest output is the target (NaN when the
        targets are not class indices).

    Raises:
        ValueError: unknown phase, engine, amp or memory format; empty loader; an optimizer that holds none of the
            model's parameters; both kinds of clipping; a limit or ``accumulate`` that is not positive.
        TypeError: training without an optimizer; a loader that does not yield pairs.
        IndexError: a target that the model has no output for.
        NonFiniteLossError: the loss is NaN or infinite; the message names epoch, batch and the last finite loss, and
            the weights are those before that batch. On a GPU the loader may be some batches further.
        RuntimeError: shapes or devices that do not fit, in PyTorch's words behind the layer's name.
        UnsupportedModelError: the engine asked for cannot run the model.
        KeyboardInterrupt: Ctrl-C; weights and optimizer are those after the last whole step.

    >>> import torch, cnnrs
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(2, 2)
    >>> batches = [(torch.eye(2), torch.arange(2))] * 50
    >>> sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    >>> loss, accuracy = cnnrs.fit(0, model, batches, optimizer=sgd, loss_fn=torch.nn.functional.cross_entropy,
    ...                            verbose=False)
    >>> loss < 0.5 and accuracy > 90
    True
    """
    if phase not in get_args(Phase):
        raise ValueError(f"phase must be 'training' or 'validation', got {phase!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
    if phase == "training":
        _check_optimizer(optimizer, model)
    loop = _Loop(_clip(clip_grad_norm, clip_grad_value), _positive(accumulate), on_batch_end, _dtype(amp))
    channels_last = _is_channels_last(memory_format)
    model.train(phase == "training")
    job = _Job(epoch, phase, model, loss_fn, optimizer if phase == "training" else None, device_of(model), loop,
               channels_last)  # fmt: skip
    shown = verbose if progress is None else progress
    rows = cpu_engine.FeatureRows.of(loader) if on_batch_end is None and not (shown and is_shown()) else None
    batches = on_device(loader, job.device, channels_last, f"{phase} epoch {epoch}", shown)
    total, correct, samples = _run(job, engine, batches, rows)
    if samples == 0:
        raise ValueError(f"the loader yielded no samples: nothing to do in {phase} epoch {epoch}")
    loss = total / samples
    accuracy = 100.0 * correct / samples if correct is not None else float("nan")
    if verbose:
        hits = correct if correct is not None else "?"
        print(f"{phase} loss is {loss:{5}.{2}} and {phase} accuracy is {hits}/{samples}{accuracy:{10}.{4}}")
    return loss, accuracy


class Fit:
    """The tutorial's four-argument ``fit``; made by :func:`cnnrs.compile`."""

    def __init__(self, optimizer: Optimizer | None, loss_fn: Loss, options: dict[str, Any]) -> None:
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.options = options

    def __call__(
        self, epoch: int, model: nn.Module, data_loader: Iterable[Any], phase: Phase = "training"
    ) -> tuple[float, float]:
        """:func:`cnnrs.fit` with what was given to :func:`cnnrs.compile`."""
        return fit(epoch, model, data_loader, phase, optimizer=self.optimizer, loss_fn=self.loss_fn, **self.options)

    def __repr__(self) -> str:
        name = getattr(self.loss_fn, "__name__", repr(self.loss_fn))
        return f"fit(optimizer={type(self.optimizer).__name__}, loss_fn={name}, engine={self.options['engine']!r})"


def compile(
    *,
    optimizer: Optimizer | None = None,
    loss_fn: Loss,
    engine: Engine = "auto",
    progress: bool | None = None,
    amp: Amp | None = None,
    memory_format: torch.memory_format | None = None,
    clip_grad_norm: float | None = None,
    clip_grad_value: float | None = None,
    accumulate: int = 1,
    on_batch_end: Callable[[int, float], object] | None = None,
    verbose: bool = True,
) -> Fit:
    """Bind optimizer, loss and options, so that the tutorial's call works: ``fit(epoch, model, loader, phase)``.

    Args:
        optimizer: as for :func:`cnnrs.fit`; without one only phase "validation" works.
        loss_fn: as for :func:`cnnrs.fit`, like all that follow.
        engine: which engine runs the model.
        progress: whether there is a bar.
        amp: mixed precision.
        memory_format: order of the images and weights in memory.
        clip_grad_norm: largest norm of the gradients.
        clip_grad_value: largest absolute value of a gradient.
        accumulate: batches per step.
        on_batch_end: called after every batch, in both phases.
        verbose: whether the line is printed.

    Returns:
        A callable ``fit(epoch, model, data_loader, phase="training") -> (loss, accuracy)``.

    >>> import torch, cnnrs
    >>> model = torch.nn.Linear(2, 2)
    >>> cnnrs.compile(optimizer=torch.optim.SGD(model.parameters()), loss_fn=torch.nn.functional.cross_entropy)
    fit(optimizer=SGD, loss_fn=cross_entropy, engine='auto')
    """
    options = {
        "engine": engine, "progress": progress, "amp": amp, "memory_format": memory_format,
        "clip_grad_norm": clip_grad_norm, "clip_grad_value": clip_grad_value, "accumulate": accumulate,
        "on_batch_end": on_batch_end, "verbose": verbose,
    }  # fmt: skip
    return Fit(optimizer, loss_fn, options)


# -- the engines ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Loop:
    """What happens between the gradients and the next batch."""

    clip: tuple[str, float] | None
    accumulate: int
    on_batch_end: Callable[[int, float], object] | None
    amp: torch.dtype | None

    def after(self, batch: int, mean: float, step: Step | None) -> list[tuple[float, ...]] | None:
        """Calls the user; returns the optimizer's new numbers if it has changed them."""
        assert self.on_batch_end is not None
        before = step.numbers() if step is not None else []
        self.on_batch_end(batch, mean)
        now = step.numbers() if step is not None else []
        return now if now != before else None

    def clipper(self) -> Callable[[list[torch.Tensor]], None] | None:
        """PyTorch's own clipping of the gradients of some parameters."""
        if self.clip is None:
            return None
        kind, most = self.clip

        def clip(parameters: list[torch.Tensor]) -> None:
            if kind == "norm":
                clip_grad_norm_(parameters, most)
            else:
                clip_grad_value_(parameters, most)

        return clip


@dataclass(frozen=True)
class _Job:
    """One epoch; ``optimizer`` is None in validation."""

    epoch: int
    phase: Phase
    model: nn.Module
    loss_fn: Loss
    optimizer: Optimizer | None
    device: torch.device
    loop: _Loop
    channels_last: bool

    def autocast(self, keep: bool) -> AbstractContextManager[Any]:
        """``keep``: remember the weights in low precision until the block ends."""
        if self.loop.amp is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.loop.amp, cache_enabled=keep)


def _run(job: _Job, engine: Engine, batches: Iterator[Any], rows: cpu_engine.FeatureRows | None) -> Totals:
    lowered = choose(job.model, engine)
    if lowered is not None and job.loop.amp is torch.float16:
        if engine != "auto":
            raise UnsupportedModelError(
                f"engine {engine!r} does not scale fp16 gradients: use engine='python' or 'bf16'"
            )
        lowered = None
    if lowered is None:
        return _run_module(job, batches)
    if engine == "cpu":
        reasons = _obstacles(job, lowered, None)
        if reasons:
            raise UnsupportedModelError("\n".join(["engine 'cpu' cannot run this:", *reasons]))
        return _run_cpu(job, lowered, batches if rows is None else rows)
    if engine == "auto" and not slow_on_cpu(lowered) and not _obstacles(job, lowered, None):
        # What decides the rest is the shape of a batch.
        if rows is not None:
            if not _obstacles(job, lowered, rows.example()):
                return _run_cpu(job, lowered, rows)
        elif (first := next(batches, None)) is not None:
            batches = chain([first], batches)
            if not _obstacles(job, lowered, first):
                return _run_cpu(job, lowered, batches)
    return _run_lowered(job, lowered, batches)


def _obstacles(job: _Job, lowered: Lowered, batch: tuple[torch.Tensor, torch.Tensor] | None) -> list[str]:
    """Why engine ``cpu`` cannot do this, as far as can be seen without a batch or from one."""
    loss = known_loss(job.loss_fn)
    reasons = cpu_engine.supports(lowered, job.optimizer, loss, job.device)
    if job.loop.amp is not None:
        reasons.append("it computes in float32 only, and amp asks for less")
    if job.channels_last:
        reasons.append("it computes on contiguous memory only, and memory_format asks for channels_last")
    if batch is None or reasons:
        return reasons
    inputs, targets = batch
    return cpu_engine.supports(lowered, job.optimizer, loss, job.device, inputs.dtype, tuple(inputs.shape), targets)


def _run_cpu(job: _Job, lowered: Lowered, batches: Iterator[Any] | cpu_engine.FeatureRows) -> Totals:
    loss = known_loss(job.loss_fn)
    assert loss is not None
    loop = job.loop
    return cpu_engine.run(
        job.epoch, job.phase, job.model, lowered, loss, job.optimizer, batches,
        loop.clip, loop.accumulate, loop.after if loop.on_batch_end is not None else None,
    )  # fmt: skip


def _run_recorded(job: _Job, lowered: Lowered, batches: Iterator[Any]) -> Totals:
    loop, optimizer = job.loop, job.optimizer
    step = None if optimizer is None else FusedStep(optimizer, lowered.tensors, loop.clipper())
    return cuda_graph.run(
        job.epoch, job.phase, job.model, lowered, job.loss_fn, step, batches,
        lambda: job.autocast(keep=False), (loop.amp, loop.clip),
    )  # fmt: skip


def _run_lowered(job: _Job, lowered: Lowered, batches: Iterator[Any]) -> Totals:
    if job.channels_last:
        to_channels_last(job.model)
    at_once = job.loop.on_batch_end is not None or job.loop.accumulate > 1
    if not at_once and cuda_graph.takes(lowered, job.loss_fn, job.optimizer, job.device):
        return _run_recorded(job, lowered, batches)
    loss: Any = known_loss(job.loss_fn)
    if loss is None or loss[0] not in ("nll", "cross_entropy"):
        loss = job.loss_fn
    arguments = (job.epoch, job.phase, lowered.graph, lowered.tensors, loss)
    loop, optimizer = job.loop, job.optimizer
    step = None if optimizer is None else Step(optimizer, lowered.tensors, loop.clipper())
    after = None if loop.on_batch_end is None else lambda batch, mean: loop.after(batch, mean, step)
    # The weights change from batch to batch: none of their copies in low precision may be kept.
    with job.autocast(keep=False):
        if optimizer is None or step is None:
            return _cnnrs.fit_torch(*arguments, None, batches, 1, after)
        optimizer.zero_grad()
        try:
            with torch.enable_grad():
                return _cnnrs.fit_torch(*arguments, step.handle, batches, loop.accumulate, after)
        finally:
            step.finish()


def _run_module(job: _Job, batches: Iterator[Any]) -> Totals:
    if job.channels_last:
        to_channels_last(job.model)
    loop, optimizer, loss_fn = job.loop, job.optimizer, job.loss_fn
    pending: list[torch.Tensor] = []
    scaler = None
    if optimizer is not None and loop.amp is torch.float16:
        scaler = _SCALERS.setdefault(optimizer, torch.amp.GradScaler(job.device.type))
    held = [p for group in optimizer.param_groups for p in group["params"]] if optimizer is not None else []
    clip = loop.clipper()
    begins = True

    def forward(inputs: torch.Tensor, targets: torch.Tensor, training: bool) -> tuple[float, int | None, int]:
        with torch.set_grad_enabled(training), job.autocast(keep=True):
            outputs = job.model(inputs)
            loss = loss_fn(outputs, targets)
        pending[:] = [loss]
        with torch.no_grad(), job.autocast(keep=False):
            correct = count_correct(outputs, targets)
            total = summed(loss_fn, loss, outputs, targets).item()
            return total, None if correct is None else int(correct), len(inputs)

    def backward() -> None:
        nonlocal begins
        assert optimizer is not None
        if begins:
            optimizer.zero_grad()
            begins = False
        loss = pending.pop()
        with torch.enable_grad():
            if loop.accumulate > 1:
                loss = loss / loop.accumulate
            (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]

    def update() -> None:
        nonlocal begins
        assert optimizer is not None
        if clip is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            clip(held)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        begins = True

    after = None if loop.on_batch_end is None else lambda batch, mean: loop.after(batch, mean, None)
    return _cnnrs.fit_python(job.epoch, job.phase, forward, backward, update, batches, loop.accumulate, after)


def _clip(norm: float | None, value: float | None) -> tuple[str, float] | None:
    if norm is not None and value is not None:
        raise ValueError("clip_grad_norm and clip_grad_value exclude each other: give one of them")
    for name, limit in (("clip_grad_norm", norm), ("clip_grad_value", value)):
        if limit is not None and not limit > 0:
            raise ValueError(f"{name} must be positive, got {limit}")
    if norm is not None:
        return ("norm", float(norm))
    return None if value is None else ("value", float(value))


def _positive(accumulate: int) -> int:
    if accumulate < 1:
        raise ValueError(f"accumulate is a number of batches, at least 1, got {accumulate}")
    return accumulate


def _dtype(amp: Amp | None) -> torch.dtype | None:
    if amp is not None and amp not in _DTYPES:
        raise ValueError(f"amp must be None, 'bf16' or 'fp16', got {amp!r}")
    return None if amp is None else _DTYPES[amp]


def _is_channels_last(memory_format: torch.memory_format | None) -> bool:
    if memory_format not in (None, torch.channels_last):
        raise ValueError(f"memory_format must be None or torch.channels_last, got {memory_format!r}")
    return memory_format is not None


def _check_optimizer(optimizer: Optimizer | None, model: nn.Module) -> None:
    if optimizer is None:
        raise TypeError("training needs optimizer=..., for example torch.optim.SGD(model.parameters(), lr=0.01)")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters()):
        raise ValueError(
            "the optimizer holds none of the model's parameters: it was made for another model, or before the layers "
            "were replaced"
        )
