"""The frozen front of a network that is called: its first operations, whose result nothing in an epoch changes.

It runs in the engine that computes features, the rest through PyTorch's autograd on the module's own parameters. In
validation, everything is front.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from cnnrs import _cnnrs
from cnnrs._records import Node
from cnnrs._util.notes import note_once
from cnnrs._util.plain import is_plain
from cnnrs.engine import cpu_inference
from cnnrs.model.lowering import Lowered
from cnnrs.model.player import play

#: Below so many operations on numbers per batch, what is saved is little, and the plain loop's bits are kept.
LEAST_FLOPS = 1 << 28
#: An epoch should take so many operations per weight. Once in it the weights are brought into the engine's order, some
#: 10 ns for each; PyTorch needs some 2.5 ps more for an operation.
_LEAST_FLOPS_PER_WEIGHT = 4000


@dataclass(frozen=True)
class Front:
    """A network in two parts.

    Attributes:
        front: from the batch to the value that training begins with.
        rest: from there to the output; None where nothing is left.
        at: the front's last operation.
        last: its name and kind.
        shape: of the samples that the front takes.
    """

    front: Lowered
    rest: Lowered | None
    at: int
    last: str
    shape: tuple[int, ...]

    def run(self, lowered: Lowered, tensors: list[torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        """The whole network, for a comparison with the module; behind the front over other tensors than its own."""
        features = cpu_inference.network(self.front)(inputs)
        if self.rest is None:
            return features
        rest = _behind(replace(lowered, tensors=tensors), self.at)
        return play(rest, rest.tensors, features)


def front_of(lowered: Lowered, inputs: torch.Tensor, training: bool, batches: int) -> Front | None:
    """The front of a network for batches like ``inputs``; None where there is none that is worth its while.

    Looks only, and changes nothing.

    Args:
        lowered: the network, in the mode it will run in.
        inputs: a batch.
        training: whether what requires gradients gets them.
        batches: how many of them an epoch has, as far as is known.
    """
    if not is_plain(inputs) or inputs.device.type != "cpu" or inputs.dim() != 4 or inputs.dtype is not torch.float32:
        return None
    last = _last(lowered, training)
    if last == 0:
        return None
    front, rest = _upto(lowered, last), None if last == lowered.output else _behind(lowered, last)
    shapes = front.graph.shapes(list(inputs.shape))
    flops = sum(cost for cost, _ in front.graph.costs(shapes))
    weights = sum(tensor.numel() for tensor in front.tensors)
    if flops < LEAST_FLOPS or flops * batches < _LEAST_FLOPS_PER_WEIGHT * weights:
        return None
    if cpu_inference.obstacle(front, inputs) is not None:
        return None
    return Front(front, rest, last, f"{lowered.names[last]} ({lowered.kinds[last]})", tuple(inputs.shape[1:]))


def _last(lowered: Lowered, training: bool) -> int:
    """The last node that alone, of all up to it, is read behind it, and behind which nothing is trained yet; or 0."""
    reads = lowered.graph.parameters()
    last_reader = list(range(len(lowered.operations)))
    best = 0
    for number, (_, _, sources, attributes) in enumerate(lowered.operations):
        # The number of samples is that of any value.
        sizes = [dim[0] for dim in attributes.get("dims", ()) if isinstance(dim, tuple) and dim[1] != 0]
        for node in (*sources, *sizes):
            last_reader[node] = number
    open_until = 0
    for number, (_, kind, _, attributes) in enumerate(lowered.operations):
        trained = training and any(lowered.tensors[index].requires_grad for index in reads[number])
        if trained or number > lowered.output or _is_in_motion(kind, attributes):
            break
        if number > 0 and open_until <= number:
            best = number
        open_until = max(open_until, last_reader[number])
    return best


def _is_in_motion(kind: str, attributes: dict[str, Any]) -> bool:
    """Whether it draws, or computes with the batch's own statistics."""
    if kind == "Dropout":
        return bool(attributes["training"] and attributes["p"] > 0.0)
    return kind == "BatchNorm2d" and (attributes["training"] or attributes["running_mean"] is None)


def moving_statistics(lowered: Lowered) -> str | None:
    """The batch norm in front of what is trained whose statistics move although its weights are frozen, if any."""
    for number, reads in enumerate(lowered.graph.parameters()):
        if any(lowered.tensors[index].requires_grad for index in reads):
            return None
        _, kind, _, attributes = lowered.operations[number]
        if kind == "BatchNorm2d" and attributes["training"] and reads:
            return lowered.names[number]
    return None


def _upto(lowered: Lowered, last: int) -> Lowered:
    """The operations up to one of them, over the tensors that they read."""
    operations = lowered.operations[: last + 1]
    return _over_own_tensors(lowered, operations, last, list(range(last + 1)))


def _behind(lowered: Lowered, last: int) -> Lowered:
    """The operations behind one of them, whose value takes the place of the batch."""
    first: Node = ("input", "Input", [], {})
    moved = [max(node - last, 0) for node in range(len(lowered.operations))]
    operations = [first, *lowered.operations[last + 1 :]]
    return _over_own_tensors(lowered, operations, lowered.output - last, moved, last)


#: Attributes that are indices of tensors.
_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "factor")


def _over_own_tensors(
    lowered: Lowered, operations: list[Node], output: int, moved: list[int], skipped: int = 0
) -> Lowered:
    tensors: list[torch.Tensor] = []
    places: dict[int, int] = {}

    def place(index: int) -> int:
        if index not in places:
            places[index] = len(tensors)
            tensors.append(lowered.tensors[index])
        return places[index]

    made: list[Node] = []
    for name, kind, sources, attributes in operations:
        own = dict(attributes)
        for key in _TENSORS:
            if own.get(key) is not None:
                own[key] = place(own[key])
        if kind == "View":
            own["dims"] = [(moved[dim[0]], dim[1]) if isinstance(dim, tuple) else dim for dim in own["dims"]]
        made.append((name, kind, [moved[source] for source in sources], own))
    graph = _cnnrs.Graph(made, output, [list(tensor.shape) for tensor in tensors])
    start = skipped + 1
    names = [made[0][0], *lowered.names[start : start + len(made) - 1]]
    kinds = ["Input", *lowered.kinds[start : start + len(made) - 1]]
    return Lowered(graph, tensors, names, kinds, made, output)


class Network:
    """A model for batches of one shape, its front in the frozen engine.

    Args:
        model: what is called for any other batch, and from the moment on at which others of its tensors are trained.
        front: its parts.
    """

    def __init__(self, model: nn.Module, front: Front) -> None:
        self._model = model
        self._front = front
        self._trained = self._requires_grad()
        self._network: _cnnrs.CpuNetwork | None = None
        self._versions: list[Any] = []
        self._on = True

    def stop(self) -> None:
        """From now on the model is called."""
        self._on, self._network = False, None

    def takes(self, inputs: Any) -> bool:
        """Whether the front computes this batch."""
        return (
            self._on
            and isinstance(inputs, torch.Tensor)
            and is_plain(inputs)
            and inputs.dtype is torch.float32
            and inputs.device.type == "cpu"
            and tuple(inputs.shape[1:]) == self._front.shape
            and len(inputs) > 0
            and not inputs.requires_grad
            and inputs.is_contiguous()
            and self._requires_grad() == self._trained
        )

    def __call__(self, inputs: Any) -> Any:
        if not self.takes(inputs):
            return self._model(inputs)
        try:
            features = self._computed(inputs)
        except MemoryError:
            note_once(
                "no memory for a frozen front",
                f"no memory for a copy of the weights of {type(self._model).__name__} in the order of memory of the "
                "faster engine: the model is called itself",
            )
            self.stop()
            return self._model(inputs)
        rest = self._front.rest
        return features if rest is None else play(rest, rest.tensors, features)

    def _computed(self, inputs: torch.Tensor) -> torch.Tensor:
        # Somebody may load other weights meanwhile.
        tensors = self._front.front.tensors
        versions = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
        if self._network is None or versions != self._versions:
            self._network, self._versions = cpu_inference.network(self._front.front), versions
        return self._network(inputs)

    def _requires_grad(self) -> list[bool]:
        return [tensor.requires_grad for tensor in self._front.front.tensors]
