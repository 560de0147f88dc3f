"""Plans of engine ``cpu`` that outlive a call, so that the next one of the same network begins at once.

A plan holds weights as the engine wants them. It counts only while everything it was made of is the same: the
operations with all their settings, the tensors themselves, and their numbers, bit by bit, because ``.data`` and NumPy
leave no other trace. Nobody else has it meanwhile: a second call at the same time makes one of its own.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import nn

from cnnrs import _cnnrs
from cnnrs.engine import cpu_inference
from cnnrs.model.lowering import Lowered

#: Plans that are kept at a time, in all: each may take several times the memory of its weights. Two are the frozen
#: front of a network that is trained, and all of it, which is validated in between.
MOST = 2


@dataclass(eq=False)
class Plan:
    """A plan for whoever has taken it.

    Attributes:
        network: computes; it keeps the tensors alive, so that nothing else gets their numbers in ``key``.
        key: what can be compared without looking at numbers.
        owner: the layer with the network's first weights: there is no network when it is gone. None: never kept.
        output: the operation with which it ends.
        checked: the shape of samples of which some have come out as by PyTorch; None: of none yet.
    """

    network: _cnnrs.CpuNetwork
    key: Any
    owner: ref[nn.Module] | None
    output: int
    checked: tuple[int, ...] | None = None

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Features of a batch. What is kept of other networks must not be why there is no memory for this one."""
        try:
            return self.network(images)
        except MemoryError:
            if not _KEPT:
                raise
            _KEPT.clear()
            return self.network(images)

    def give_back(self) -> None:
        """Keep it for the next call. Not behind an exception, and not where it does not do what the module does."""
        if self.owner is not None:
            # Another call at the same time may have kept one.
            _removed(_at(self), self.output)
            _KEPT.append(self)


#: The newest last. Its methods are one step each, for threads and after a fork: no lock that somebody else could hold.
_KEPT: deque[Plan] = deque(maxlen=MOST)


def take(model: nn.Module, lowered: Lowered, *, exact: bool = False, beside: bool = False) -> Plan:
    """A plan of ``lowered``: the one that was kept, if it is that of ``model`` as it is, else a new one.

    Args:
        model: whose operations these are; when its layers are gone, so is the plan.
        lowered: frozen; engine ``cpu`` can compute it.
        exact: no Winograd convolution.
        beside: on PyTorch's threads, as :func:`~cnnrs.engine.cpu_inference.network` says.
    """
    owner, key = _owner(model, lowered), _key(lowered, exact, beside)
    for plan in _removed(owner, lowered.output):
        # One at a time: what is not up to date frees its memory first.
        if plan.key == key and plan.network.is_current():
            return plan
    made = cpu_inference.network(lowered, exact=exact, beside=beside)
    return Plan(made, key, None if owner is None else ref(owner, _forget), lowered.output)


def drop(model: nn.Module, front: Lowered | None = None) -> None:
    """Free what is kept of a model whose weights are about to change, but for those of its ``front``."""
    stays = None if front is None else front.output
    for plan in list(_KEPT):
        if plan.output != stays and any(module is _at(plan) for module in model.modules()):
            _is_removed(plan)


def _key(lowered: Lowered, exact: bool, beside: bool) -> Any:
    pointers = [0 if i in lowered.folded else t.data_ptr() for i, t in enumerate(lowered.tensors)]
    tensors = [(tuple(t.shape), t.stride(), t.dtype) for t in lowered.tensors]
    own = lowered.identities(), pointers, tensors
    return repr(lowered.operations), lowered.image, own, exact, beside, torch.get_num_threads()


def _owner(model: nn.Module, lowered: Lowered) -> nn.Module | None:
    """The layer that holds the first of the tensors; None where no plan may be kept.

    The engine has copies of tensors that are not contiguous: what is written into those does not show in the copies.
    """
    if not lowered.tensors or not all(tensor.is_contiguous() for tensor in lowered.tensors):
        return None
    first = next((tensor for index, tensor in enumerate(lowered.tensors) if index not in lowered.folded), None)
    for module in model.modules():
        if any(tensor is first for tensor in (*module._parameters.values(), *module._buffers.values())):
            return module
    return None


def _removed(owner: nn.Module | None, output: int) -> list[Plan]:
    """What was kept of a network up to an operation, and no longer is."""
    found = [plan for plan in list(_KEPT) if owner is not None and _at(plan) is owner and plan.output == output]
    return [plan for plan in found if _is_removed(plan)]


def _at(plan: Plan) -> nn.Module | None:
    return None if plan.owner is None else plan.owner()


def _is_removed(plan: Plan) -> bool:
    """Whether it was this call that has taken it out."""
    try:
        _KEPT.remove(plan)
    except ValueError:
        return False
    return True


def _forget(owner: ref[nn.Module]) -> None:
    for plan in list(_KEPT):
        if plan.owner is owner:
            _is_removed(plan)
