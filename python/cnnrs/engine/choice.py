"""Who computes a model, and why no faster engine does: decided here for `fit`, `preconv`, `explain` and `summary`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.optim import Optimizer

from cnnrs import _cnnrs
from cnnrs.engine import cpu_inference, cpu_training, cuda_graph
from cnnrs.engine.companion import libtorch
from cnnrs.engine.frozen_front import Front, front_of
from cnnrs.engine.losses import known_loss
from cnnrs.errors import UnsupportedModelError
from cnnrs.model.lowering import Lowered, lower
from cnnrs.model.operations import Unsupported

#: What can be asked for.
Engine = Literal["auto", "cpu", "torch", "python"]


@dataclass(frozen=True)
class Question:
    """What is to be computed, as far as it is known.

    Attributes:
        purpose: "fit", or "preconv" of a frozen model.
        engine: what was asked for.
        lowered: the model as operations, in the mode it will run in; None where it has none.
        reasons: why only calling the module itself will do, whatever the engines can do; usually none.
        inputs: a batch, of which type, shape and device count; None while there is none.
        targets: of that batch.
        loss_fn: None: one that the engines know.
        optimizer: None: validation, or one that they know.
        amp: what the layers compute in, None for what they are.
        around: whether an enclosing ``torch.autocast`` asks for that.
        channels_last: whether that order of memory is asked for.
        looked_at: whether somebody looks at gradients that are not applied yet.
        surroundings: modes of torch that only its own kernels obey.
        training: whether there will be gradients.
        batches: how many an epoch has; many, where nobody has said.
        exact: whether no convolution may be Winograd's.
    """

    purpose: Literal["fit", "preconv"]
    engine: Engine
    lowered: Lowered | None
    reasons: tuple[str, ...] = ()
    inputs: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    loss_fn: Callable[..., Any] | None = None
    optimizer: Optimizer | None = None
    amp: torch.dtype | None = None
    around: bool = False
    channels_last: bool = False
    looked_at: bool = False
    surroundings: tuple[str, ...] = ()
    training: bool = True
    batches: int = 100
    exact: bool = False


@dataclass(frozen=True)
class Choice:
    """The answer.

    Attributes:
        engine: "cpu", "torch", "python", or "recorded": the module's step as a CUDA graph.
        reasons: why it is not "cpu"; empty where it is, or where another was asked for.
        front: with "python": what the engine of features computes of it; None: nothing.
    """

    engine: Literal["cpu", "recorded", "torch", "python"]
    reasons: tuple[str, ...] = ()
    front: Front | None = None


def decide(question: Question) -> Choice:
    """Who computes what is asked; looks only at the question, and changes nothing.

    The answer differs from the engine that was asked for where that cannot do it: whoever asked then refuses.
    """
    lowered = question.lowered
    if question.engine == "python" or lowered is None or question.reasons:
        return Choice("python", question.reasons)
    reasons: tuple[str, ...] = ()
    if question.engine != "torch":
        reasons = _against_cpu(question, lowered)
        if not reasons:
            return Choice("cpu")
        if question.engine == "cpu":
            return Choice("python", reasons)
    if question.purpose == "fit" and _is_recorded(question, lowered):
        return Choice("recorded", reasons)
    if question.engine == "torch":
        return Choice("torch", reasons)
    return Choice("python", reasons, _front(question, lowered))


def _against_cpu(question: Question, lowered: Lowered) -> tuple[str, ...]:
    inputs, auto = question.inputs, question.engine == "auto"
    if question.purpose == "preconv":
        elsewhere = next((t.device for t in lowered.tensors if t.device.type != "cpu"), None)
        if auto and elsewhere is not None:
            return (f"the model is on {elsewhere}: the module itself is called, ahead of the device",)
        if auto and question.amp is not None:
            return (f"it computes in float32 only, not in {question.amp}",)
        obstacle = None if inputs is None else cpu_inference.obstacle(lowered, inputs)
        return () if obstacle is None else (obstacle,)
    loss = None if question.loss_fn is None else known_loss(question.loss_fn)
    reasons = cpu_training.obstacles(lowered, inputs, question.targets, loss=loss, optimizer=question.optimizer)
    if question.loss_fn is not None and loss is None:
        reasons.append("the loss is none of nll_loss, cross_entropy, mse_loss and bce_with_logits of reduction 'mean'")
    reasons += question.surroundings
    if question.amp is not None:
        reasons.append(f"it computes in float32 only, and {'autocast' if question.around else 'amp'} asks for less")
    if question.channels_last:
        reasons.append("it computes on contiguous memory only, and memory_format asks for channels_last")
    return tuple(reasons or (slow_on_cpu(lowered) if auto else []))


def _front(question: Question, lowered: Lowered) -> Front | None:
    """The part of a called network that has the numbers of features, where rounding may be another."""
    own_kernels = question.surroundings or question.channels_last or question.amp is not None
    if question.purpose != "fit" or question.inputs is None or own_kernels:
        return None
    return front_of(lowered, question.inputs, question.training, question.batches, question.exact)


def _is_recorded(question: Question, lowered: Lowered) -> bool:
    """Whether whole steps are recorded once and replayed."""
    if question.inputs is None or question.loss_fn is None or question.looked_at:
        return False
    return cuda_graph.obstacle(lowered, question.loss_fn, question.optimizer, question.inputs.device) is None


def slow_on_cpu(lowered: Lowered) -> list[str]:
    """Operations that PyTorch trains at least as fast as engine ``cpu``, where they are most of a model's work.

    Convolutions with a max-pool behind them, and linear layers, have kernels of their own in engine ``cpu``: several
    times as fast. All others become matrix products, in which PyTorch is as good. Where these hold more than half of
    the convolutions' weights, "auto" takes ``python``.
    """
    return [
        f"{lowered.names[node]} (Conv2d): no faster kernel than PyTorch's (not 3x3 or 5x5, stride 1, then a max-pool)"
        for node in _cnnrs.cpu_slow(lowered.graph)
    ]


def lowered_for(
    model: nn.Module, engine: Engine, gradients: bool = True, image: Sequence[int] | None = None
) -> Lowered | None:
    """The lowered model for engines ``torch`` and ``cpu``, or None where only the module will do.

    Args:
        model: the module, in the mode it will run in.
        engine: as for :func:`cnnrs.fit`; "auto" never takes "torch".
        gradients: whether its results will be differentiated.
        image: the shape of the samples, without the batch, for networks that look at it; only without gradients.

    Raises:
        UnsupportedModelError: engine is "torch" or "cpu" and the model cannot be lowered; the message says why.
        ImportError: engine is "torch", and its package is not installed.
        ValueError: engine is not one of the four.
        TypeError: model is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if engine not in get_args(Engine):
        raise ValueError(f"engine must be one of {', '.join(map(repr, get_args(Engine)))}, got {engine!r}")
    if engine == "python":
        return None
    if engine == "torch":
        libtorch()
    try:
        return lower(model, gradients, image)
    except Unsupported as reasons:
        if engine != "auto":
            raise UnsupportedModelError(f"engine {engine!r} cannot run this model:\n{reasons}") from None
        return None
