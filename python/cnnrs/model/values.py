"""The values of a graph that is being put together: what makes them, who reads them, what they share memory with."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from cnnrs._records import Attributes, Node, OpKind
from cnnrs.model.operations import Unsupported
from cnnrs.model.owned import Owned
from cnnrs.model.shapes import Size
from cnnrs.model.sizes import Sizes
from cnnrs.model.stochastic_depth import Draws
from cnnrs.model.tracing import Memory, Recorder, Standin

COPIES = "copies permuted dimensions, which has no counterpart yet"
#: Operations whose result shares memory with their input, or may.
VIEWS: frozenset[OpKind] = frozenset({"View", "Flatten", "Permute", "Split", "ChannelShuffle"})
#: Operations that overwrite their input in engine ``torch`` too; the others get a value of their own there.
_IN_PLACE: frozenset[OpKind] = frozenset({"ReLU", "ReLU6", "SiLU", "Hardswish", "Hardsigmoid", "Dropout", "Add"})
#: Operations whose derivative needs their result.
_KEEP_THEIR_RESULT = frozenset(
    {"ReLU", "ReLU_", "ReLU6_", "LeakyReLU_", "Sigmoid", "Sigmoid_", "Tanh", "Tanh_", "Softmax"}
)
#: One of them that engine ``torch`` computes from its input instead, so that it would not notice.
_KEEP_THEIR_INPUT = frozenset({"LeakyReLU_"})


class Values:
    """What has been called so far, and what one more operation makes of it."""

    #: Of the walk, while it lasts.
    _recorder: Recorder
    _draws: Draws

    def __init__(self, model: nn.Module, gradients: bool, image: tuple[int, ...] | None) -> None:
        self.model, self.gradients, self.image = model, gradients, image
        self.nodes: list[Node] = [("input", "Input", [], {})]
        self.tensors: list[torch.Tensor] = []
        self._own = Owned(model, reshaped=not gradients)
        self._names: Counter[str] = Counter()
        #: Where a tensor is among those, by its id.
        self._places: dict[int, int] = {}
        #: Which of those have been computed of others.
        self._folded: list[int] = []
        self._sizes = Sizes(image)

    # -- sizes

    def unpacked(self, node: int, count: int) -> None:
        self._sizes.has_rank(node, count)

    def size(self, node: int, dim: int) -> int | None:
        shape = self.shape(node)
        if shape is not None:
            return shape[dim] if -len(shape) <= dim < len(shape) else None
        return self._sizes.channels(node) if dim in (1, -3) else None

    def shape(self, node: int) -> list[int | None] | None:
        return self._sizes.shape(node, self.nodes, self.tensors)

    def is_weighted(self, node: int) -> bool:
        while self.image is not None and node > 0:
            _, kind, sources, _ = self.nodes[node]
            if kind in ("Conv2d", "Linear"):
                return True
            node = sources[0]
        return False

    def _rank(self, x: Standin) -> int | None:
        shape = self.shape(self._read(x))
        return self._sizes.rank(self._read(x)) if shape is None else len(shape)

    def _is_batch(self, size: Any) -> bool:
        """Whether a size given to a view is the number of samples; what else has sizes of its own decides on -1."""
        return size == -1 or (type(size) is tuple and size[1] == 0 and self._sizes.has_batch(size[0]))

    @staticmethod
    def _view_dims(args: list[Any], kwargs: dict[str, Any]) -> list[Any]:
        shape = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args or kwargs.get("shape", [])
        dims: list[Any] = []
        for entry in shape:
            if isinstance(entry, Size) and entry.of is not None and entry.dim >= 0:
                dims.append((entry.of, entry.dim))
            elif type(entry) is int:
                dims.append(entry)
            else:
                raise Unsupported(f"shape {tuple(shape)} is computed")
        return dims

    # -- operations

    def _apply(self, name: str, kind: OpKind, inputs: list[Standin], attributes: Attributes) -> Standin:
        """One more operation. What it returns is a new tensor, its input overwritten, its input, or a view of it."""
        nodes = [self._read(x) for x in inputs]
        x, overwrites = inputs[0], attributes.get("inplace", False)
        if overwrites and self.nodes[nodes[0]][1] == "Expand":
            raise Unsupported("overwrites a parameter")
        if overwrites and self._is_part(nodes[0]):
            raise Unsupported("overwrites a part of a value, which has no counterpart yet")
        drops = kind != "Dropout" or (attributes["training"] and attributes["p"] > 0.0)
        if overwrites and drops:
            attributes["inplace"] = self._may_overwrite(kind, x.memory, attributes)
        self.nodes.append((name, kind, nodes, attributes))
        self._sizes.add(self.nodes[-1], self.tensors)
        made = len(self.nodes) - 1
        if overwrites or not drops:
            if drops:
                x.memory.overwrite(name, f"{kind}_")
                x.version = x.memory.version
            x.node = made
            return x
        if kind in VIEWS:
            return self._recorder.value(made, x.memory)
        for given in inputs:
            given.memory.read = True
        return self._recorder.value(made, Memory(kind))

    def _may_overwrite(self, kind: OpKind, memory: Memory, attributes: Attributes) -> bool:
        """Whether an operation in place is one in the graph too, or one with a value of its own that nobody can tell.

        Every reader is given the node whose value it would see. What is left is the derivative: PyTorch refuses to go
        back through what needs a value that has been overwritten. So does engine ``torch``, where the operation is in
        place there too.
        """
        if kind in _IN_PLACE and not (self.gradients and memory.made_by in _KEEP_THEIR_INPUT):
            return True
        if memory.made_by == "Input":
            raise Unsupported("overwrites the batch, which has no counterpart for this operation")
        if self.gradients and (memory.read or memory.made_by in _KEEP_THEIR_RESULT):
            raise Unsupported("overwrites a value that a derivative may need")
        if self.gradients and attributes.get("negative_slope", 0.0) < 0.0:
            raise Unsupported("has no derivative in place with a negative slope")
        return False

    def _is_part(self, node: int) -> bool:
        while (kind := self.nodes[node][1]) in VIEWS:
            if kind == "Split":
                return True
            node = self.nodes[node][2][0]
        return False

    def _read(self, x: Standin) -> int:
        if x.node is None:
            raise Unsupported(x.reason)
        if x.copied:
            raise Unsupported(COPIES)
        if x.spread is not None:
            raise Unsupported("reads a value that has been expanded")
        if x.heads is not None:
            raise Unsupported("reads the heads of an attention, which has no counterpart yet")
        self._check_version(x)
        return x.node

    def _again(self, x: Standin) -> Standin:
        """The same value as another tensor."""
        made = self._recorder.value(self._read(x), x.memory)
        made.version = x.version
        return made

    @staticmethod
    def _check_version(x: Standin) -> None:
        if x.version != x.memory.version:
            raise Unsupported(f"reads a view of a value, which {x.memory.writer} has overwritten since")

    def _tensor(self, argument: Any) -> Standin:
        if isinstance(argument, Standin):
            self._draws.refuse(argument)
            return argument
        if isinstance(argument, torch.Tensor):
            own = self._own_name(argument)
            if own is not None:
                raise Unsupported(f"parameter {own} is used outside a layer")
            raise Unsupported("a tensor that is neither parameter nor buffer is used")
        raise Unsupported(f"argument {argument!r} is not a tensor of the graph")

    def _own_name(self, argument: Any) -> str | None:
        if not isinstance(argument, torch.Tensor) or isinstance(argument, Standin):
            return None
        return self._own.name(argument)

    def _tensor_index(self, tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        if isinstance(tensor, Standin):
            raise Unsupported("a weight is computed, not a parameter or buffer")
        if self._own_name(tensor) is None and self._is_constant(tensor):
            return self._folded_index(tensor)
        tensor = self._own.of(tensor)
        index = self._places.setdefault(id(tensor), len(self.tensors))
        if index == len(self.tensors):
            self.tensors.append(tensor)
        return index

    def _is_constant(self, argument: Any) -> bool:
        """Whether it is a parameter or buffer, or what ``forward`` has computed of such and of sizes of images."""
        if self._own_name(argument) is not None:
            return True
        computed = self.image is not None and self._recorder.has_made(argument)
        return computed and argument.dtype is torch.float32 and argument.layout is torch.strided

    def _folded_index(self, tensor: torch.Tensor) -> int:
        """Of a copy: it may share memory with a parameter. Equal ones, in every block of a network, are one."""
        copy = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        for index in self._folded:
            known = self.tensors[index]
            if known.shape == copy.shape and known.device == copy.device and torch.equal(known, copy):
                return index
        self.tensors.append(copy)
        self._folded.append(len(self.tensors) - 1)
        return self._folded[-1]

    def _unique(self, name: str) -> str:
        name = name.strip("_")
        self._names[name] += 1
        count = self._names[name] - 1
        return f"{name}_{count}" if count else name
