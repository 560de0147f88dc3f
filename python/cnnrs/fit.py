"""One epoch of training or validation: the tutorial's ``fit`` with the loop compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import Optimizer

from cnnrs import _cnnrs, cpu_engine
from cnnrs._progress import progress
from cnnrs.engines import Engine, choose, device_of, to_device
from cnnrs.errors import UnsupportedModelError
from cnnrs.graph import Lowered
from cnnrs.optimizers import Step

Phase = Literal["training", "validation"]
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_PHASES = ("training", "validation")


def fit(
    epoch: int,
    model: nn.Module,
    loader: Iterable[Any],
    phase: Phase = "training",
    *,
    optimizer: Optimizer | None = None,
    loss_fn: Loss,
    engine: Engine = "auto",
    verbose: bool = True,
) -> tuple[float, float]:
    """Train or validate ``model`` for one pass over ``loader`` and print the tutorial's line.

    On the CPU the result has the bits of the plain PyTorch loop under the same seed: losses, weights, optimizer state,
    random numbers of dropout. The module and the optimizer stay yours: nothing is copied into objects of cnnrs.

    Args:
        epoch: number of the epoch; only messages use it.
        model: any module that maps inputs (N, ...) to outputs (N, classes); ``model.train()`` or ``model.eval()`` is
            called. Batches are moved to the device it is on.
        loader: yields (inputs, targets): float32 (N, ...) and, for classification, int64 (N,) class indices.
        phase: "training" steps the optimizer after every batch; "validation" changes nothing.
        optimizer: needed for training. SGD, Adam and AdamW on CPU float32 weights run compiled, any other is called.
        loss_fn: ``F.nll_loss``, ``F.cross_entropy`` or their modules run compiled, anything else is called as
            ``loss_fn(outputs, targets)`` and must return the mean over the batch.
        engine: "torch" runs the model's layers through libtorch without Python, "python" calls the module, "auto" picks
            one of these (see :func:`cnnrs.explain`). "cpu" runs float32 models on the CPU without libtorch: a compiled
            step, equal to PyTorch's up to rounding, with dropout from a generator of its own and no ``.grad``.
        verbose: print the line, and show a bar on terminals and in notebooks.

    Returns:
        (loss, accuracy): mean loss per sample, and per cent of samples whose largest output is the target (NaN when the
        targets are not class indices).

    Raises:
        ValueError: unknown phase or engine; empty loader; an optimizer that holds none of the model's parameters.
        TypeError: training without an optimizer; a loader that does not yield pairs.
        IndexError: a target that the model has no output for.
        NonFiniteLossError: the loss is NaN or infinite; the message names epoch and batch, the weights are untouched.
        RuntimeError: shapes or devices that do not fit, in PyTorch's words behind the layer's name.
        UnsupportedModelError: engine="torch" for a model that cannot be lowered.

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
    if phase not in _PHASES:
        raise ValueError(f"phase must be 'training' or 'validation', got {phase!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be callable, got {type(loss_fn).__name__}")
    if phase == "training":
        _check_optimizer(optimizer, model)
    device = device_of(model)
    model.train(phase == "training")
    lowered = choose(model, engine)
    batches = _batches(loader, device, f"{phase} epoch {epoch}", verbose)
    if engine == "cpu" and lowered is not None:
        total, correct, samples = _run_cpu(epoch, phase, model, lowered, loss_fn, optimizer, batches)
    elif lowered is not None:
        total, correct, samples = _run_lowered(epoch, phase, lowered, loss_fn, optimizer, batches)
    else:
        total, correct, samples = _run_module(epoch, phase, model, loss_fn, optimizer, batches)
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

    def __init__(self, optimizer: Optimizer | None, loss_fn: Loss, engine: Engine, verbose: bool) -> None:
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.engine: Engine = engine
        self.verbose = verbose

    def __call__(
        self, epoch: int, model: nn.Module, data_loader: Iterable[Any], phase: Phase = "training"
    ) -> tuple[float, float]:
        """:func:`cnnrs.fit` with the optimizer and loss given to :func:`cnnrs.compile`."""
        return fit(
            epoch, model, data_loader, phase,
            optimizer=self.optimizer, loss_fn=self.loss_fn, engine=self.engine, verbose=self.verbose,
        )  # fmt: skip

    def __repr__(self) -> str:
        name = getattr(self.loss_fn, "__name__", repr(self.loss_fn))
        return f"fit(optimizer={type(self.optimizer).__name__}, loss_fn={name}, engine={self.engine!r})"


def compile(*, optimizer: Optimizer | None = None, loss_fn: Loss, engine: Engine = "auto", verbose: bool = True) -> Fit:
    """Bind optimizer and loss, so that the tutorial's call works unchanged: ``fit(epoch, model, loader, phase)``.

    Args:
        optimizer: as for :func:`cnnrs.fit`; without one only phase "validation" works.
        loss_fn: as for :func:`cnnrs.fit`.
        engine: as for :func:`cnnrs.fit`.
        verbose: as for :func:`cnnrs.fit`.

    Returns:
        A callable ``fit(epoch, model, data_loader, phase="training") -> (loss, accuracy)``.

    >>> import torch, cnnrs
    >>> model = torch.nn.Linear(2, 2)
    >>> cnnrs.compile(optimizer=torch.optim.SGD(model.parameters()), loss_fn=torch.nn.functional.cross_entropy)
    fit(optimizer=SGD, loss_fn=cross_entropy, engine='auto')
    """
    return Fit(optimizer, loss_fn, engine, verbose)


# -- both engines --------------------------------------------------------------------------------------------


def _run_lowered(
    epoch: int, phase: Phase, lowered: Lowered, loss_fn: Loss, optimizer: Optimizer | None, batches: Iterator[Any]
) -> tuple[float, int | None, int]:
    arguments = (epoch, phase, lowered.graph, lowered.tensors, _loss(loss_fn) or loss_fn)
    if phase == "validation" or optimizer is None:
        return _cnnrs.fit_torch(*arguments, None, batches)
    optimizer.zero_grad()
    step = Step(optimizer, lowered.tensors)
    try:
        with torch.enable_grad():
            return _cnnrs.fit_torch(*arguments, step.handle, batches)
    finally:
        step.finish()


def _run_cpu(
    epoch: int, phase: Phase, model: nn.Module, lowered: Lowered, loss_fn: Loss, optimizer: Optimizer | None,
    batches: Iterator[Any],
) -> tuple[float, int | None, int]:  # fmt: skip
    loss = _loss(loss_fn)
    optimizer = optimizer if phase == "training" else None
    reasons = cpu_engine.supports(lowered, optimizer, loss, device_of(model))
    if reasons or loss is None:
        raise UnsupportedModelError("\n".join(["engine 'cpu' cannot run this:", *reasons]))
    return cpu_engine.run(epoch, phase, model, lowered, loss, optimizer, batches)


def _run_module(
    epoch: int, phase: Phase, model: nn.Module, loss_fn: Loss, optimizer: Optimizer | None, batches: Iterator[Any]
) -> tuple[float, int | None, int]:
    pending: list[torch.Tensor] = []

    def forward(inputs: torch.Tensor, targets: torch.Tensor, training: bool) -> tuple[float, int | None, int]:
        with torch.set_grad_enabled(training):
            outputs = model(inputs)
            loss = loss_fn(outputs, targets)
        pending[:] = [loss]
        with torch.no_grad():
            return _summed(loss_fn, loss, outputs, targets), _correct(outputs, targets), len(inputs)

    def step() -> None:
        assert optimizer is not None
        optimizer.zero_grad()
        with torch.enable_grad():
            pending.pop().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return _cnnrs.fit_python(epoch, phase, forward, step, batches)


def _batches(
    loader: Iterable[Any], device: torch.device, description: str, verbose: bool
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for batch in progress(loader, description, verbose=verbose):
        if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
            raise TypeError(f"the loader must yield pairs (inputs, targets), got {_describe(batch)}")
        inputs, targets = (torch.as_tensor(part) for part in batch)
        yield to_device(inputs, device), to_device(targets, device)


def _describe(batch: Any) -> str:
    size = f" of length {len(batch)}" if isinstance(batch, (tuple, list, dict)) else ""
    return f"a {type(batch).__name__}{size}"


def _check_optimizer(optimizer: Optimizer | None, model: nn.Module) -> None:
    if optimizer is None:
        raise TypeError("training needs optimizer=..., for example torch.optim.SGD(model.parameters(), lr=0.01)")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(id(p) in held for p in model.parameters()):
        raise ValueError(
            "the optimizer holds none of the model's parameters: it was made for another model, or before the layers "
            "were replaced"
        )


# -- losses --------------------------------------------------------------------------------------------------


def _loss(loss_fn: Loss) -> tuple[Any, ...] | None:
    """The loss as the engine knows it, None for any that it must call."""
    if loss_fn is F.nll_loss:
        return ("nll", None, -100)
    if loss_fn is F.cross_entropy:
        return ("cross_entropy", None, -100, 0.0)
    if not isinstance(loss_fn, nn.Module) or loss_fn._forward_hooks or loss_fn._forward_pre_hooks:
        return None
    if type(loss_fn) is nn.NLLLoss and loss_fn.reduction == "mean":
        return ("nll", loss_fn.weight, loss_fn.ignore_index)
    if type(loss_fn) is nn.CrossEntropyLoss and loss_fn.reduction == "mean":
        return ("cross_entropy", loss_fn.weight, loss_fn.ignore_index, float(loss_fn.label_smoothing))
    return None


def _summed(loss_fn: Loss, loss: torch.Tensor, outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """The samples' losses added up, as the tutorial's loop reports them; engine ``torch`` has the same rule."""
    known = _loss(loss_fn)
    if known is None or known[1] is not None:
        return loss.item() * len(outputs)
    if known[0] == "nll":
        return F.nll_loss(outputs, targets, ignore_index=known[2], reduction="sum").item()
    return F.cross_entropy(outputs, targets, ignore_index=known[2], label_smoothing=known[3], reduction="sum").item()


def _correct(outputs: torch.Tensor, targets: torch.Tensor) -> int | None:
    if outputs.dim() != 2 or targets.dim() != 1 or targets.dtype != torch.int64:
        return None
    return int((outputs.max(dim=1)[1] == targets).sum())
