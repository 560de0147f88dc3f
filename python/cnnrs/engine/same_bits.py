"""The quick answer to whether a module and its operations do the same: two samples forward, compared bit by bit.

The operations are PyTorch's own functions, so what is right has the module's bits, and has autograd write down the
same. Then nothing is left to ask. No weight is copied: whoever is about to write into one is stopped before. A "no"
says nothing about the model: who asks must look closer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cnnrs._util.generators import Generators
from cnnrs.engine.derivatives import same_derivatives
from cnnrs.engine.guarded import Again, Closed, Guarded, looks
from cnnrs.engine.twins import attributes, changed, copied, draws_itself, without_dropout, written
from cnnrs.model.lowering import Lowered
from cnnrs.model.player import play

#: Computes a lowered model over the tensors that take the place of its own.
Run = Callable[[Lowered, list[torch.Tensor], torch.Tensor], torch.Tensor]
#: Makes a context for a device.
Context = Callable[[torch.device], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Sample:
    """A few samples, and what module and operations alike make of them with dropout off, their weights as they are.

    Attributes:
        inputs: (N, ...).
        outputs: of these samples.
        is_drawn: they are one draw of many.
    """

    inputs: torch.Tensor
    outputs: torch.Tensor
    is_drawn: bool


def same_bits(
    model: nn.Module, lowered: Lowered, run: Run, inputs: torch.Tensor, training: bool, context: Context
) -> Sample | None:
    """What both make of these samples, where they do the same; None where that does not show. It leaves no trace.

    Args:
        model: in the mode it will run in.
        lowered: the same.
        run: computes the operations. What :func:`~cnnrs.model.player.play` would compute from the same numbers by the
            same function of PyTorch's as the module it is given.
        inputs: some samples.
        training: whether derivatives count.
        context: of type ``torch.autocast``, for a device.
    """
    # Elsewhere every comparison waits for the device.
    if inputs.device.type != "cpu" or any(not _is_shared(p) for p in model.parameters()):
        return None
    try:
        return _same_bits(model, lowered, run, inputs, training, context)
    except Exception:
        return None


def _same_bits(
    model: nn.Module, lowered: Lowered, run: Run, inputs: torch.Tensor, training: bool, context: Context
) -> Sample | None:
    # Others of the same memory: what is set on one of them stays there.
    shared = {id(p): nn.Parameter(p.data.contiguous(), p.requires_grad) for p in model.parameters()}
    if not written(lowered).isdisjoint(shared):
        return None
    twin = copied(model, shared)
    before, weights = attributes(twin), looks(list(shared.values()))
    x, generators = inputs.clone(memory_format=torch.contiguous_format), Generators()
    guarded, closed = Guarded(list(shared.values())), Closed()
    try:
        with torch.set_grad_enabled(training), closed, context(x.device), guarded:
            theirs = twin(x)
    finally:
        if guarded.drew:
            generators.put_back()
    if guarded.touched or closed.touched:
        return None
    draws = draws_itself(lowered)
    if guarded.drew != draws or type(theirs) is not torch.Tensor or changed(before, attributes(twin)):
        return None
    if looks(list(shared.values())) != weights:
        return None
    quiet = without_dropout(lowered)
    fresh = {id(t): shared[id(t)] if id(t) in shared else t.detach().clone() for t in quiet.tensors}
    y = inputs.clone(memory_format=torch.contiguous_format)
    again = Again(guarded.products) if run is play else nullcontext()
    try:
        with torch.set_grad_enabled(training), context(y.device), again:
            ours = run(quiet, [fresh[id(t)] for t in quiet.tensors], y)
    finally:
        if draws:
            generators.put_back()
    pairs = [(theirs.detach(), ours.detach()), (x, y)]
    pairs += [(b, fresh.get(id(a), a)) for a, b in zip(model.buffers(), twin.buffers(), strict=True)]
    if not all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs):
        return None
    if training and not same_derivatives(theirs, ours):
        return None
    return Sample(inputs.clone(), theirs.detach(), draws)


def _is_shared(parameter: nn.Parameter) -> bool:
    return type(parameter) is nn.Parameter and not parameter.is_inference()
