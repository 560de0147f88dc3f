"""A network that is called, divided: its frozen front, whose result nothing in an epoch changes, and the rest.

The front runs in the engine that computes features, the rest through PyTorch's autograd on the module's own parameters,
with native kernels where they are faster. In validation, everything is front; where all layers are trained, nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cnnrs import _cnnrs
from cnnrs._records import Attributes, Node, OpKind
from cnnrs._util.generators import Generators
from cnnrs._util.notes import note
from cnnrs._util.plain import is_plain
from cnnrs.engine import cpu_inference, kept_plans
from cnnrs.engine.kernels import Kernels
from cnnrs.engine.memory_order import MemoryOrder
from cnnrs.engine.same_bits import Sample
from cnnrs.engine.twins import without_dropout, written
from cnnrs.engine.verify import outputs_differ
from cnnrs.model import draws
from cnnrs.model.lowering import Lowered
from cnnrs.model.player import needed, play

#: Below so many operations on numbers per batch, what is saved is little, and the plain loop's bits are kept.
LEAST_FLOPS = 1 << 28
#: An epoch should take so many operations per weight. Once in it the weights are brought into the engine's order, some
#: 10 ns for each; PyTorch needs some 2.5 ps more for an operation.
_LEAST_FLOPS_PER_WEIGHT = 4000
#: From this share of the arithmetic on, native kernels have been faster than PyTorch with contiguous batches for every
#: network of torchvision that was measured (AMD, 2 threads).
_LEAST_SHARE = 0.7
_MEASURED_ON, _MEASURED_THREADS = ("AVX2", "AVX512"), 8


@dataclass(frozen=True)
class Front:
    """Where a network is divided.

    Attributes:
        whole: the network.
        front: its operations up to the value that training begins with.
        last: number of the last of them; 0: that is the batch itself.
        shape: of the samples that the front takes.
        kernels: what is behind it.
        share: of the arithmetic behind it in kernels, where that is so much that the clock need not tell.
        exact: no convolution is Winograd's.
    """

    whole: Lowered
    front: Lowered
    last: int
    shape: tuple[int, ...]
    kernels: Kernels
    share: float | None = None
    exact: bool = False

    @property
    def is_all(self) -> bool:
        """Whether nothing is left behind it."""
        return self.last == self.whole.output

    @property
    def end(self) -> str:
        """Name and kind of the last operation."""
        return f"{self.whole.names[self.last]} ({self.whole.kinds[self.last]})"


def front_of(lowered: Lowered, inputs: torch.Tensor, training: bool, batches: int, exact: bool = False) -> Front | None:
    """The front of a network for batches like ``inputs``; None where there is none that is worth its while.

    Looks only, and changes nothing.

    Args:
        lowered: the network, in the mode it will run in.
        inputs: a batch.
        training: whether what requires gradients gets them.
        batches: how many of them an epoch has, as far as is known.
        exact: whether no convolution may be Winograd's.
    """
    if not _is_batch(inputs):
        return None
    last = _last(lowered, training)
    front = _upto(lowered, last)
    flops = _flops(lowered, inputs)
    worth = _is_worth(lowered, last, flops, batches) and cpu_inference.obstacle(front, inputs) is None
    if not worth:
        last, front = 0, _upto(lowered, 0)
    kernels = Kernels(lowered, last, exact)
    # Of images of one channel both orders of memory are the same.
    is_large = inputs.shape[1] > 1 and sum(flops) >= LEAST_FLOPS
    if not worth and not (training and kernels.operations and is_large):
        return None
    share = _share(lowered, kernels, last, flops) if training else None
    return Front(lowered, front, last, tuple(inputs.shape[1:]), kernels, share, exact)


def _flops(lowered: Lowered, inputs: torch.Tensor) -> list[int]:
    """Of every operation."""
    return [flops for flops, _ in lowered.graph.costs(lowered.graph.shapes(list(inputs.shape)))]


def _share(lowered: Lowered, kernels: Kernels, last: int, flops: list[int]) -> float | None:
    """Of the arithmetic behind a front in native kernels, where these are the faster ones without being timed.

    None where the clock is to tell: PyTorch computes much of it, or convolutions in groups, which it is slow at in the
    order of memory that the kernels need; on many threads, and with other instructions, nobody has measured them.
    """
    if torch.get_num_threads() > _MEASURED_THREADS or torch.backends.cpu.get_cpu_capability() not in _MEASURED_ON:
        return None
    native = {node for group in kernels.groups.values() for node in group.nodes}
    others = (lowered.operations[node] for node in range(last + 1, len(flops)) if node not in native)
    if any(kind == "Conv2d" and attributes["groups"] > 1 for _, kind, _, attributes in others):
        return None
    share = sum(flops[node] for node in native) / max(sum(flops[last + 1 :]), 1)
    return share if share >= _LEAST_SHARE else None


def moving_statistics(lowered: Lowered, inputs: torch.Tensor, batches: int) -> str | None:
    """The batch norm that ends the front of a network in training because its statistics move, not its weights.

    None where there is none, and where the front would not be worth its while without that.
    """
    last, further = _last(lowered, True), _last(lowered, True, statistics_move=False)
    if further <= last or not _is_batch(inputs) or not _is_worth(lowered, further, _flops(lowered, inputs), batches):
        return None
    moving = (number for number, (_, kind, *_) in enumerate(lowered.operations) if kind == "BatchNorm2d")
    return next((lowered.names[number] for number in moving if last < number <= further), None)


def _is_batch(inputs: torch.Tensor) -> bool:
    return is_plain(inputs) and inputs.device.type == "cpu" and inputs.dim() == 4 and inputs.dtype is torch.float32


def _is_worth(lowered: Lowered, last: int, flops: list[int], batches: int) -> bool:
    reads = {index for numbers in lowered.graph.parameters()[: last + 1] for index in numbers}
    weights = sum(lowered.tensors[index].numel() for index in reads)
    work = sum(flops[: last + 1])
    return last > 0 and work >= LEAST_FLOPS and work * batches >= _LEAST_FLOPS_PER_WEIGHT * weights


def _last(lowered: Lowered, training: bool, statistics_move: bool = True) -> int:
    """The last node that alone, of all up to it, is read behind it, and behind which nothing is trained yet; or 0."""
    reads = lowered.graph.parameters()
    last_reader = list(range(len(lowered.operations)))
    for number, operation in enumerate(lowered.operations):
        for node in needed(operation):
            last_reader[node] = number
    best, read_until = 0, 0
    for number, (_, kind, _, attributes) in enumerate(lowered.operations):
        trained = training and any(lowered.tensors[index].requires_grad for index in reads[number])
        moves = _is_in_motion(kind, attributes) and (statistics_move or kind != "BatchNorm2d")
        if trained or moves or number > lowered.output:
            break
        if number > 0 and read_until <= number:
            best = number
        read_until = max(read_until, last_reader[number])
    return best


def _is_in_motion(kind: OpKind, attributes: Attributes) -> bool:
    """Whether it draws, or computes with the batch's own statistics."""
    moves = kind == "BatchNorm2d" and (attributes["training"] or attributes["running_mean"] is None)
    return moves or draws.is_drawn(kind, attributes)


#: Attributes that are indices of tensors.
_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "factor")


def _upto(lowered: Lowered, last: int) -> Lowered:
    """The operations up to one of them, over the tensors that they read."""
    places: dict[int, int] = {}
    operations: list[Node] = []
    for name, kind, sources, attributes in lowered.operations[: last + 1]:
        read = {key: attributes[key] for key in _TENSORS if attributes.get(key) is not None}
        own = {key: places.setdefault(index, len(places)) for key, index in read.items()}
        operations.append((name, kind, sources, {**attributes, **own}))
    tensors = [lowered.tensors[index] for index in places]
    graph = _cnnrs.Graph(operations, last, [list(tensor.shape) for tensor in tensors])
    return Lowered(graph, tensors, lowered.names[: last + 1], lowered.kinds[: last + 1], operations, last)


class Network:
    """A model for batches of one shape, its front in the frozen engine.

    Args:
        model: what is called for any other batch, and from the moment on at which something of it has changed.
        front: its parts.
        orders: whether the rest may get its values in another order of memory.
        training: whether there are gradients.
        state: what somebody may change between the batches; equal as long as nothing has.
        called_back: whether the user's code runs between the batches, which may write into weights.
        check: whether two samples also go through PyTorch.
        sample: what these have been found to come to, until the first step.

    Attributes:
        order: that of the values behind the front.
        rounds: the bits of a batch were not, or by chance only, the plain loop's.
    """

    def __init__(
        self, model: nn.Module, front: Front, *, orders: bool, training: bool, state: Callable[[], Any],
        called_back: bool, check: bool, sample: Sample | None,
    ) -> None:  # fmt: skip
        self._rest = _Rest(front, check, sample)
        part = front.last, front.exact, repr(front.whole.operations)
        allowed = orders and not front.is_all
        self.order = MemoryOrder(model, allowed, training, self._rest.on_copies, part, front.share)
        self.rounds = False
        self._model = model
        self._front = front
        self._check = check
        self._state = state
        self._plan: kept_plans.Plan | None = None
        self._is_on = True
        self._before = self._known()
        # What `.data` and NumPy write leaves no trace but the numbers.
        tensors = front.front.tensors if called_back else []
        self._copies = [(tensor, tensor.detach().clone()) for tensor in tensors]

    def __call__(self, inputs: Any) -> Any:
        try:
            return self._outputs(inputs)
        finally:
            # A step may follow, which changes the weights.
            self._rest.sample = None

    def _outputs(self, inputs: Any) -> Any:
        if not self._takes(inputs) or (features := self._features(inputs)) is None:
            return self._model(inputs)
        if self._front.is_all:
            return features
        ordered = self.order.ordered(features)
        self.rounds |= self._front.last > 0 or self.order.is_measured
        if self._rest.wrong:
            self._note(
                f"PyTorch's own kernels are used, because native ones do not do what they do: {self._rest.wrong}"
            )
            self._rest.wrong = ""
        return self._rest(ordered, self._front.whole.tensors)

    @property
    def is_unproven(self) -> bool:
        """Whether the batch under way is the first of the epoch in native kernels that is to have gradients."""
        return self._rest.before is not None

    def prove(self) -> None:
        """There are gradients of that batch."""
        self._rest.before, self._rest.proven = None, True

    def undo(self, error: Exception) -> None:
        """There are none: buffers and random numbers are as before the batch, which PyTorch is to compute again."""
        assert self._rest.before is not None
        self._rest.before.put_back()
        self._rest.before = None
        self._rest.wrong = f"backward raises {type(error).__name__} ({str(error).strip()[:200]})"
        self.order.refuse()

    def done(self) -> None:
        """The epoch is over: the next one, and validation, may have the same front."""
        if self._plan is not None:
            self._plan.give_back()
            self._plan = None

    def _takes(self, inputs: Any) -> bool:
        if not self._is_on:
            return False
        if self._known() != self._before or any(not torch.equal(now, before) for now, before in self._copies):
            self._stop()
            return False
        return (
            isinstance(inputs, torch.Tensor)
            and _is_batch(inputs)
            and tuple(inputs.shape[1:]) == self._front.shape
            and len(inputs) > 0
            and not inputs.requires_grad
            and inputs.is_contiguous()
        )

    def _known(self) -> Any:
        tensors = self._front.front.tensors
        return (
            self._state(),
            self._front.whole.state(),
            [(t.data_ptr(), t.requires_grad, 0 if t.is_inference() else t._version) for t in tensors],
        )

    def _features(self, inputs: torch.Tensor) -> torch.Tensor | None:
        """None where the model is to be called instead, from now on."""
        if self._front.last == 0:
            return inputs
        front = self._front.front
        try:
            plan = self._plan = self._plan or kept_plans.take(
                self._model, front, exact=self._front.exact, beside=not self._front.is_all
            )
            features = plan(inputs)
        except MemoryError:
            self._stop(
                "there is no memory for its frozen layers in native code, several times that of their weights: it is "
                "called itself"
            )
            return None
        # What becomes of NaN in a sum is nobody's promise.
        if self._check and plan.checked != self._front.shape and inputs[:2].isfinite().all():
            if reason := self._difference(inputs[:2], features[:2]):
                self._stop(
                    f"it is called itself, because its frozen layers in native code do not do what they do: {reason}"
                )
                return None
            plan.checked = self._front.shape
        return features

    @torch.no_grad()
    def _difference(self, inputs: torch.Tensor, features: torch.Tensor) -> str | None:
        front = self._front.front
        return outputs_differ(play(front, front.tensors, inputs), features)

    def _stop(self, reason: str = "") -> None:
        self._is_on, self._plan, self._copies = False, None, []
        if reason:
            self._note(reason)

    def _note(self, text: str) -> None:
        note(f"fit, {type(self._model).__name__}: {text}")


class _Rest:
    """What is behind a front: in ``channels_last`` with native kernels, in any other order PyTorch's.

    Attributes:
        wrong: what was found against the kernels; "": nothing.
        sample: what PyTorch makes of two samples with the weights as they are, where that is known.
        proven: there have been gradients from native kernels.
        before: until then, what the batch under way changes.
    """

    def __init__(self, front: Front, check: bool, sample: Sample | None) -> None:
        self.wrong = ""
        self._front = front
        self._check = check
        self.sample = sample if front.last == 0 else None
        self.proven = False
        self.before: _Before | None = None

    def __call__(self, features: torch.Tensor, tensors: list[torch.Tensor]) -> torch.Tensor:
        native = not features.is_contiguous() and torch.is_grad_enabled()
        self.before = _Before(self._front.whole) if native and not self.proven else None
        return self._computed(self._front.whole, features, tensors)

    def _computed(self, whole: Lowered, features: torch.Tensor, tensors: list[torch.Tensor]) -> torch.Tensor:
        if features.is_contiguous():
            return play(whole, tensors, features, start=self._front.last)
        return self._front.kernels.play(whole, tensors, features)

    def on_copies(self, features: torch.Tensor) -> torch.Tensor:
        """As the call, in ``channels_last`` and on copies of what it changes.

        Raises:
            ArithmeticError: native kernels do not do what PyTorch does.
        """
        generators, tensors = Generators(), self._copied()
        # In another order of memory the same random numbers would drop others.
        whole = without_dropout(self._front.whole)
        sample = self.sample if self.sample is not None and torch.equal(self.sample.inputs, features) else None
        outputs = self._computed(whole, features, tensors)
        if self._check and features.isfinite().all():
            # The same random numbers.
            generators.put_back()
            plain = sample.outputs if sample else self._computed(whole, features.contiguous(), self._copied()).detach()
            # Outputs only: a mean of a channel may be nothing but rounding.
            if reason := outputs_differ(plain, outputs.detach()):
                self.wrong = reason
                raise ArithmeticError(reason)
        return outputs.detach()

    def _copied(self) -> list[torch.Tensor]:
        whole = self._front.whole
        moving = written(whole)
        return [
            (tensor.detach().clone() if id(tensor) in moving else tensor.detach()).requires_grad_(tensor.requires_grad)
            for tensor in whole.tensors
        ]


class _Before:
    """What the operations of a network change in one batch, as it is now."""

    def __init__(self, whole: Lowered) -> None:
        moving = written(whole)
        self._buffers = [(tensor, tensor.detach().clone()) for tensor in whole.tensors if id(tensor) in moving]
        self._generators = Generators()

    def put_back(self) -> None:
        self._generators.put_back()
        with torch.no_grad():
            for buffer, copy in self._buffers:
                buffer.copy_(copy)
