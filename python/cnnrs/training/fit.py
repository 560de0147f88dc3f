"""One epoch of training or validation: the tutorial's ``fit`` with the loop compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from cnnrs._util.progress import is_shown
from cnnrs.engine.choice import Engine
from cnnrs.engine.losses import Loss, LossName, loss_called
from cnnrs.model.around import autocast_dtype, check_gradients_are_on
from cnnrs.model.modes import device_of
from cnnrs.training import arguments, epochs
from cnnrs.training.arguments import Amp, Precision
from cnnrs.training.batches import length_of, on_device
from cnnrs.training.job import Job, Loop, Phase
from cnnrs.training.rows import FeatureRows


def fit(
    epoch: int,
    model: nn.Module,
    loader: Iterable[Any],
    phase: Phase = "training",
    *,
    optimizer: Optimizer | None = None,
    loss_fn: Loss | LossName,
    engine: Engine = "auto",
    progress: bool | None = None,
    amp: Amp | None = None,
    precision: Precision | None = None,
    memory_format: torch.memory_format | None = None,
    clip_grad_norm: float | None = None,
    clip_grad_value: float | None = None,
    accumulate: int = 1,
    on_batch_end: Callable[[int, float], object] | None = None,
    check: bool = True,
    verbose: bool = True,
) -> tuple[float, float]:
    """Train or validate ``model`` for one pass over ``loader`` and print the tutorial's line.

    The module and the optimizer stay yours: weights, running statistics and optimizer state are updated in place. How
    close the numbers are to the plain PyTorch loop under the same seed depends on the engine (``explain(model)`` says
    which one "auto" takes): on the CPU "python" and "torch" have its bits, dropout included; "cpu" equals it up to
    float rounding, draws dropout from a generator of its own (seeded by torch's) and leaves no ``.grad``. Where "auto"
    calls a large convolutional network on the CPU, native kernels compute most of it, or batches go to it in the
    faster order of memory, timed on the first eight: equal up to float rounding, which may then differ from run to
    run; not under deterministic algorithms. What is
    frozen in front of the first trained layer, in validation everything, is computed as by :func:`cnnrs.preconv`: equal
    up to float rounding, the same in every run.

    Args:
        epoch: number of the epoch; only messages use it.
        model: any module; ``model.train()`` or ``model.eval()`` is called, then ``model(inputs)`` for every batch.
        loader: yields (inputs, targets): float32 (N, ...) and, for classification, int64 (N,) class indices; or any
            other pair that model and loss take, such as tuples or dictionaries of tensors; or dictionaries of one input
            and its "labels". Tensors are moved to the device that the model is on.
        phase: "training" steps the optimizer after every batch; "validation" changes nothing.
        optimizer: needed for training. Engines "cpu" and "torch" run SGD, Adam and AdamW on CPU float32 weights
            compiled; any other is called, with a closure if it needs one (LBFGS).
        loss_fn: ``F.nll_loss``, ``F.cross_entropy`` or their modules run compiled, anything else is called as
            ``loss_fn(outputs, targets)`` and must return the mean over the batch (or the sum, if it is a module of
            reduction "sum"). Engine "cpu" also knows ``F.mse_loss`` and ``F.binary_cross_entropy_with_logits``. These
            four may be given by name: "nll_loss", "cross_entropy", "mse_loss", "binary_cross_entropy_with_logits".
        engine: "cpu" is a training step compiled to native code, for float32 on the CPU; "python" calls the module.
            "auto" takes the first that can run it; on CUDA it runs one recorded graph per step where it can. "torch"
            runs the layers through libtorch without Python, and needs the package ``cnnrs-libtorch``.
        progress: show a bar on terminals and in notebooks; None: as ``verbose``.
        amp: "bf16" or "fp16" runs the layers in ``torch.autocast``; "fp16" scales the gradients. None: an enclosing
            ``torch.autocast`` holds.
        precision: "exact" does without Winograd's convolutions in native kernels, whose rounding is a little coarser;
            it takes longer. None: as is fastest.
        memory_format: ``torch.channels_last`` converts the batches, and once the model's 4-D weights in place: the same
            numbers in another order of memory, in which they stay, as after ``model.to(memory_format=...)``.
        clip_grad_norm: largest norm of all gradients that the optimizer applies (``clip_grad_norm_``).
        clip_grad_value: largest absolute value of a gradient (``clip_grad_value_``).
        accumulate: batches per step of the optimizer; each one's loss is divided by it. The last step of an epoch takes
            the batches that are left.
        on_batch_end: called with the number of the batch and its mean loss, after the step. What it changes in model,
            loss and optimizer holds from the next batch on, as with a scheduler that steps per batch: learning rates
            and the like on any engine, after everything else the rest of the epoch runs on engine "python". What it
            raises ends the epoch.
        check: before the first epoch, some samples of the first batch also go through the module itself, on copies.
            Where outputs or gradients are not those of the operations that the engine runs, the module is called
            instead, and a note says why.
        verbose: print the line.

    Returns:
        (loss, accuracy): mean loss over the samples that count, and per cent of them whose largest output is the target
        (NaN when the targets are not class indices). Targets that are the loss's ``ignore_index`` do not count; with
        class weights the mean is the weighted one, over the whole epoch.

    Raises:
        ImportError: engine="torch" without its package.
        ValueError: unknown phase, engine, amp, precision, memory format or name of a loss; empty loader; an optimizer
            that holds none of the model's parameters; both kinds of clipping; a limit or ``accumulate`` that is not
            positive.
        TypeError: training without an optimizer, or with something else in its place; a loader that does not yield
            pairs; a loss that is no tensor.
        IndexError: a target that the model has no output for. On a GPU it is found where labels come from the CPU and
            the loss is one of ``nll_loss`` and ``cross_entropy``, before anything has read it.
        NonFiniteLossError: the loss is NaN or infinite; the message names epoch, batch and the last finite loss, and
            the weights are those before that batch. On a GPU the loader may be some batches further.
        RuntimeError: shapes or devices that do not fit, in PyTorch's words (the cause names the layer); training inside
            ``torch.no_grad()``.
        UnsupportedModelError: the engine asked for cannot run the model, or computes something else than it does.
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
    loss_fn = loss_called(loss_fn)
    if phase == "training":
        arguments.check_optimizer(optimizer, model)
        check_gradients_are_on()
    loop = Loop(
        arguments.clip(clip_grad_norm, clip_grad_value), arguments.accumulate(accumulate), on_batch_end
    )  # fmt: skip
    channels_last = arguments.is_channels_last(memory_format)
    exact = arguments.is_exact(precision)
    device, asked = device_of(model), arguments.amp_dtype(amp)
    around = autocast_dtype(device) if asked is None else None
    model.train(phase == "training")
    found = FeatureRows.of(loader)
    job = Job(
        epoch, phase, model, loss_fn, optimizer if phase == "training" else None, device, loop, channels_last,
        asked or around, scaled=asked is torch.float16, around=around is not None, check=check, exact=exact,
        orders=engine == "auto" and memory_format is None and (asked or around) is None and device.type == "cpu",
        batches=length_of(loader),
        unseen=on_batch_end is None and (found is not None or type(loader) in (list, tuple)),
    )  # fmt: skip
    shown = verbose if progress is None else progress
    rows = found if on_batch_end is None and not (shown and is_shown()) else None
    batches = on_device(loader, device, channels_last, f"{phase} epoch {epoch}", shown)
    totals = epochs.run(job, engine, batches, rows)
    if totals.samples == 0:
        raise ValueError(f"the loader yielded no samples: nothing to do in {phase} epoch {epoch}")
    loss, accuracy = totals.mean, totals.accuracy
    if verbose:
        hits, counted = ("?", totals.samples) if totals.correct is None else (totals.correct, totals.counted)
        print(f"{phase} loss is {loss:{5}.{2}} and {phase} accuracy is {hits}/{counted}{accuracy:{10}.{4}}")
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
    loss_fn: Loss | LossName,
    engine: Engine = "auto",
    progress: bool | None = None,
    amp: Amp | None = None,
    precision: Precision | None = None,
    memory_format: torch.memory_format | None = None,
    clip_grad_norm: float | None = None,
    clip_grad_value: float | None = None,
    accumulate: int = 1,
    on_batch_end: Callable[[int, float], object] | None = None,
    check: bool = True,
    verbose: bool = True,
) -> Fit:
    """Bind optimizer, loss and options, so that the tutorial's call works: ``fit(epoch, model, loader, phase)``.

    Args:
        optimizer: as for :func:`cnnrs.fit`; without one only phase "validation" works.
        loss_fn: as for :func:`cnnrs.fit`, like all that follow.
        engine: which engine runs the model.
        progress: whether there is a bar.
        amp: mixed precision.
        precision: whether convolutions may be Winograd's.
        memory_format: order of the images and weights in memory.
        clip_grad_norm: largest norm of the gradients.
        clip_grad_value: largest absolute value of a gradient.
        accumulate: batches per step.
        on_batch_end: called after every batch, in both phases.
        check: whether the first batch also goes through the module itself.
        verbose: whether the line is printed.

    Returns:
        A callable ``fit(epoch, model, data_loader, phase="training") -> (loss, accuracy)``.

    >>> import torch, cnnrs
    >>> model = torch.nn.Linear(2, 2)
    >>> cnnrs.compile(optimizer=torch.optim.SGD(model.parameters()), loss_fn="cross_entropy")
    fit(optimizer=SGD, loss_fn=cross_entropy, engine='auto')
    """
    if optimizer is not None:
        arguments.check_is_optimizer(optimizer)
    options = {
        "engine": engine, "progress": progress, "amp": amp, "precision": precision, "memory_format": memory_format,
        "clip_grad_norm": clip_grad_norm, "clip_grad_value": clip_grad_value, "accumulate": accumulate,
        "on_batch_end": on_batch_end, "check": check, "verbose": verbose,
    }  # fmt: skip
    return Fit(optimizer, loss_called(loss_fn), options)
