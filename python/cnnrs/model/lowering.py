"""Lower an ``nn.Module`` into the plain list of operations that the engines run.

Nothing is copied: the graph names parameters by index into a list of the module's own tensors.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from cnnrs import _cnnrs
from cnnrs._records import Attributes, Node, OpKind
from cnnrs._util import plain
from cnnrs.model import attention, shuffle, tokens
from cnnrs.model.around import global_hooks
from cnnrs.model.operations import BINARY, FUNCTIONS, INPLACE, LAYERS, METHODS, WEIGHTED, Unsupported, _linear
from cnnrs.model.sizes import Sizes
from cnnrs.model.stochastic_depth import Draws, is_stochastic_depth
from cnnrs.model.tracing import MULTIHEAD, Memory, Recorder, Size, Standin, values


@dataclass
class Lowered:
    """A module as a graph over its own tensors.

    Attributes:
        graph: the operations.
        tensors: parameters and buffers that the operations name by index, shared with the module.
        names: one qualified name per node; node 0 is the input.
        kinds: the PyTorch class that does the same as each node.
        operations: (name, kind, inputs, attributes) of each node, as given to the graph.
        output: the node whose value is the model's.
        image: the shape of the samples, without the batch, for which alone the operations are the model's; None: any.
    """

    graph: _cnnrs.Graph
    tensors: list[torch.Tensor]
    names: list[str]
    kinds: list[str]
    operations: list[Node]
    output: int
    image: tuple[int, ...] | None = None


def lower(model: nn.Module, gradients: bool = True, image: Sequence[int] | None = None) -> Lowered:
    """Lower ``model`` in its present mode (dropout and batch norm read each layer's ``training`` flag).

    Args:
        model: any module whose ``forward`` takes one tensor. It is as before afterwards, and so are the generators of
            random numbers and everything else that ``forward`` can reach.
        gradients: whether the result will be differentiated. Where not, it does not matter what ``forward`` does to
            gradients.
        image: the shape of the samples that it will get, without the batch, for networks that look at it; only without
            gradients.

    Returns:
        The graph and the tensors it reads.

    Raises:
        Unsupported: with one reason per line when the module does anything that the graph cannot say.
    """
    reasons = obstacles(model)
    if reasons:
        raise Unsupported("\n".join(reasons))
    return _Lowering(model, gradients, None if gradients or image is None else tuple(image)).run()


# -- what makes a model more than its layers -----------------------------------------------------------------

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def obstacles(model: nn.Module) -> list[str]:
    """Reasons why running the layers one by one would not be the same as calling the model."""
    reasons = []
    if type(model).__module__.startswith(("torch.nn.parallel", "torch._dynamo", "torch.distributed")):
        reasons.append(f"{type(model).__name__} wraps the model and does more than its forward")
    if global_hooks():
        reasons.append("a global module hook is registered")
    modes = _get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    if any(not isinstance(mode, DeviceContext) for mode in modes) or torch._C._len_torch_dispatch_stack():
        reasons.append("a mode that intercepts PyTorch's operations is on")
    for name, module in model.named_modules():
        where = f"{name or 'the model'} ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            reasons.append(f"{where} is TorchScript")
        if any(getattr(module, hooks, None) for hooks in _HOOKS):
            reasons.append(f"{where} has hooks")
        if "forward" in vars(module):
            reasons.append(f"{where} has a forward of its own, set on the instance")
        if getattr(module, "_compiled_call_impl", None) is not None:
            reasons.append(f"{where} has been compiled")
        if torch.nn.utils.parametrize.is_parametrized(module):
            reasons.append(f"{where} has parametrized tensors")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not plain.is_plain(tensor):
            reasons.append(f"{name} is {plain.said(tensor)}")
        if getattr(tensor, "_backward_hooks", None) or getattr(tensor, "_post_accumulate_grad_hooks", None):
            reasons.append(f"parameter {name} has gradient hooks")
    return reasons


# -- the walk ------------------------------------------------------------------------------------------------


@dataclass
class _Lowering:
    """State of one walk: what has been called so far."""

    model: nn.Module
    gradients: bool
    image: tuple[int, ...] | None = None
    nodes: list[Node] = field(default_factory=lambda: [("input", "Input", [], {})])
    tensors: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._recorder = Recorder(self.model, self, self.gradients)
        self._draws = Draws(self._recorder, self.nodes)
        self._layers = {module: name for name, module in reversed(list(self.model.named_modules()))}
        own = [*self.model.named_parameters(), *self.model.named_buffers()]
        self._own = {id(tensor): (name, tensor) for name, tensor in own}
        self._names: Counter[str] = Counter()
        #: Where a tensor is among those, by its id.
        self._places: dict[int, int] = {}
        self._sizes = Sizes(self.image)
        #: Steps of channel shuffles, which are one operation each.
        self._joined: set[int] = set()

    def run(self) -> Lowered:
        try:
            return self._run()
        finally:
            # A circle, in which the model would wait for the garbage collector.
            del self._recorder, self._draws

    def _run(self) -> Lowered:
        output = self._recorder.run()
        reasons = self._recorder.reasons
        node = None
        self._attempt("forward", self._draws.check)
        if isinstance(output, Standin):
            node = self._attempt("forward returns", lambda: self._read(self._tensor(output)))
        if node is None and not reasons:
            reasons.append("forward does not return one tensor")
        if node is None or reasons:
            raise Unsupported("\n".join(reasons))
        self.nodes, node = shuffle.without(self.nodes, node, self._joined)
        try:
            graph = _cnnrs.Graph(self.nodes, node, [list(t.shape) for t in self.tensors])
        except (TypeError, ValueError, OverflowError) as error:
            raise Unsupported(f"an argument makes no sense: {error}") from error
        kinds = [_kind(kind, attributes) for _, kind, _, attributes in self.nodes]
        names = [node[0] for node in self.nodes]
        return Lowered(graph, self.tensors, names, kinds, self.nodes, node, self.image)

    def _attempt(self, where: str, make: Callable[[], Any]) -> Any:
        """What ``make`` returns; None, with the reason kept, where there is no counterpart."""
        try:
            return make()
        except Unsupported as reason:
            if str(reason):
                self._recorder.refuse(f"{where}: {reason}")
            return None

    def _nothing(self) -> Standin:
        """Goes on behind what has no counterpart, for further reasons."""
        return self._recorder.value(None, Memory(""))

    # -- layers

    def is_layer(self, module: nn.Module) -> bool:
        """Stops at the layers in the table and at torch's own; walks through everything else."""
        if type(module) in LAYERS or is_stochastic_depth(module):
            return True
        return type(module).__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(module, nn.Sequential)

    def unpacked(self, node: int, count: int) -> None:
        self._sizes.has_rank(node, count)

    def size(self, node: int, dim: int) -> int | None:
        shape = self.shape(node)
        if shape is not None:
            return shape[dim] if -len(shape) <= dim < len(shape) else None
        return self._sizes.channels(node) if dim in (1, -3) else None

    def shape(self, node: int) -> list[int | None] | None:
        return self._sizes.shape(node, self.nodes, self.tensors)

    def layer(self, module: nn.Module, args: tuple[Any, ...]) -> Standin:
        kind = type(module).__name__
        name = self._layers.get(module)
        if name is None:
            raise self._recorder.stop(f"a {kind} is called that is no submodule of the model")
        result = self._attempt(f"{name or 'the model'} ({kind})", lambda: self._layer(name or kind, module, args))
        return result if result is not None else self._nothing()

    def _layer(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if type(module) is nn.MultiheadAttention and self.image is not None:
            return self._multihead(name, module, args), None
        if is_stochastic_depth(module):
            if module.training and getattr(module, "p", 1.0) > 0.0:
                drops: Attributes = {"p": module.p, "rows": module.mode == "row", "keep": None}
                return self._apply(name, "StochasticDepth", [self._tensor(args[0])], drops)
            return self._tensor(args[0])
        if type(module) not in LAYERS and type(module) is not nn.Identity:
            raise Unsupported("this layer has no counterpart yet")
        if len(args) != 1:
            raise Unsupported(f"is called with {len(args)} arguments")
        x = self._tensor(args[0])
        if type(module) is nn.Identity:
            return x
        kind, attributes = LAYERS[type(module)]
        if x.heads is not None and isinstance(module, nn.Dropout) and not (module.training and module.p > 0.0):
            return x
        made = self._apply(name, kind, [x], self._described(attributes, module, self._tensor_index))
        if kind == "BatchNorm2d" and made.node is not None:
            # The layer, not the function, refuses everything else.
            self._sizes.has_rank(made.node, 4)
        return made

    def _multihead(self, name: str, module: nn.MultiheadAttention, args: tuple[Any, ...]) -> Standin:
        attention.check_layer(module, dict(zip(MULTIHEAD, args, strict=True)))
        x = self._tensor(args[0])
        if len(self.shape(self._read(x)) or ()) != 3:
            raise Unsupported("is called with something else than tokens (N, T, C)")
        weights = _linear(self._tensor_index, module.in_proj_weight, module.in_proj_bias)
        x = self._apply(f"{name}.in_proj", "Linear", [x], weights)
        # Of the channels that there are: the layer does not read its `head_dim` either.
        scale = 1.0 / math.sqrt(module.embed_dim // module.num_heads)
        x = self._apply(name, "Attention", [x], {"heads": module.num_heads, "scale": scale})
        out = module.out_proj
        return self._apply(f"{name}.out_proj", "Linear", [x], _linear(self._tensor_index, out.weight, out.bias))

    # -- functions

    def call(self, target: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = self._attempt(f"{name}()", lambda: self._call(target, name, list(args), dict(kwargs)))
        return result if result is not None else self._nothing()

    def sized(self, target: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Standin:
        if name == "expand" and self.image is not None and not kwargs:
            expanded = self._attempt("expand()", lambda: self._expanded(args))
            return expanded if expanded is not None else self._nothing()
        drawn = self._draws.drawn(target, args, kwargs)
        if drawn is None:
            raise self._recorder.stop(f"{name}() makes a tensor of the batch's size")
        return drawn

    def _call(self, target: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if any(isinstance(value, Standin) and value.heads is not None for value in values((args, kwargs))):
            return self._of_heads(target, name, args, kwargs)
        dropped = self._draws.call(name, args, kwargs)
        if isinstance(dropped, Standin):
            return dropped
        if dropped is not None:
            x, keep = dropped
            return self._apply(
                self._unique("drop"), "StochasticDepth", [x], {"p": 1.0 - keep, "rows": True, "keep": keep}
            )
        if any(isinstance(value, Standin) and value.node is None for value in values((args, kwargs))):
            raise Unsupported  # The reason has been given where the value is made.
        if target in WEIGHTED:
            return self._weighted(target, name, args, kwargs)
        if target in BINARY and len(args) == 2 and not kwargs:
            kind, attributes = BINARY[target]
            own = [self._own_name(a) is not None for a in args]
            if kind == "Mul" and any(own) and not attributes["inplace"]:
                return self._scale(name, args, first=own[0])
            if kind == "Add" and any(own) and not attributes["inplace"] and self.image is not None:
                return self._shift(name, args, first=own[0])
            return self._apply(self._unique(name), kind, [self._tensor(a) for a in args], dict(attributes))
        if target in (torch.cat, torch.concat):
            parts = args[0] if args else kwargs.pop("tensors")
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            return self._apply(self._unique(name), "Cat", [self._tensor(a) for a in parts], {"dim": dim})
        x = self._tensor(args.pop(0) if args else kwargs.pop("input", None))
        if target in ("view", "reshape", torch.reshape):
            return self._view(name, x, self._view_dims(args, kwargs))
        if target == "contiguous" and not args and not kwargs:
            return self._contiguous(x)
        if target in ("chunk", torch.chunk, "split", torch.split):
            sizes = self._described(_chunks if name == "chunk" else _parts, self._channels_of(x), *args, **kwargs)
            one: list[Attributes] = [{"dim": 1, "sizes": sizes, "part": part} for part in range(len(sizes))]
            return tuple(self._apply(self._unique(name), "Split", [x], part) for part in one)
        if target == "__getitem__" and self.image is not None and len(args) == 1:
            return self._item(x, args[0])
        if target in ("transpose", torch.transpose):
            order = self._described(_swapped, self._rank(x), *args, **kwargs)
            return self._apply(self._unique(name), "Permute", [x], {"dims": order})
        inplace = INPLACE.get(name)
        function = inplace or (METHODS.get(target) if isinstance(target, str) else target)
        if function not in FUNCTIONS:
            raise Unsupported("this function has no counterpart yet")
        kwargs = {k: v for k, v in kwargs.items() if not (k in ("_stacklevel", "dtype") and v in (3, None))}
        kind, describe = FUNCTIONS[function]
        attributes = self._described(describe, *args, **kwargs)
        if inplace is not None:
            attributes["inplace"] = True
        return self._apply(self._unique(name), kind, [x], attributes)

    def _view(self, name: str, x: Standin, dims: list[Any]) -> Standin:
        node = x.node
        groups = None if node is None else self._shuffled(node)
        if node is not None and groups is not None and shuffle.puts_together(self.nodes, node, dims):
            self._check_version(x)
            self._joined |= {node, *self.nodes[node][2]}
            source = self._recorder.value(shuffle.source(self.nodes, node), x.memory)
            return self._apply(self._unique("channel_shuffle"), "ChannelShuffle", [source], {"groups": groups})
        # Sizes first: they tell what the batch's are.
        heads = None if self.image is None or x.node is None else self._divided(x, dims)
        if heads is not None:
            return self._heads(x, (self._read(x), heads))
        return self._apply(self._unique(name), "View", [x], {"dims": dims})

    def _rank(self, x: Standin) -> int | None:
        shape = self.shape(self._read(x))
        return self._sizes.rank(self._read(x)) if shape is None else len(shape)

    # -- tokens

    def _is_batch(self, size: Any) -> bool:
        """Whether a size given to a view is the number of samples; what else has sizes of its own decides on -1."""
        return size == -1 or (type(size) is tuple and size[1] == 0 and self._sizes.has_batch(size[0]))

    def _expanded(self, args: tuple[Any, ...]) -> Standin:
        """A parameter (1, T, C), once per sample."""
        tensor, *given = args
        sizes = given[0] if len(given) == 1 and isinstance(given[0], (tuple, list)) else given
        own = self._own_name(tensor)
        if own is None or not tokens.is_sequence(tensor, sizes):
            raise Unsupported("repeats something else than a parameter or buffer (1, T, C) per sample")
        batch = sizes[0]
        self.shape(len(self.nodes) - 1)  # It tells what the batch's sizes are.
        if not isinstance(batch, Size) or batch.of is None or not self._is_batch((batch.of, batch.dim)):
            raise Unsupported("repeats a parameter otherwise than per sample")
        x = self._recorder.value(batch.of, Memory("Expand"))
        return self._apply(own, "Expand", [x], {"tensor": self._tensor_index(tensor)})

    def _shift(self, name: str, operands: list[Any], first: bool) -> Standin:
        x, summand = reversed(operands) if first else operands
        if not isinstance(x, Standin):
            raise Unsupported("only a tensor of the graph can be added to a parameter")
        return self._apply(str(self._own_name(summand)), "Shift", [x], {"summand": self._tensor_index(summand)})

    def _item(self, x: Standin, index: Any) -> Standin:
        """``x[:, i]`` and ``x[:, i:j]`` of tokens."""
        sizes, part, one = tokens.taken(self.shape(self._read(x)), index)
        some = self._apply(self._unique("tokens"), "Split", [x], {"dim": 1, "sizes": sizes, "part": part})
        return self._apply(self._unique("token"), "Flatten", [some], {"start": 1, "end": -1}) if one else some

    # -- heads of an attention

    def _divided(self, x: Standin, dims: list[Any]) -> attention.Heads | None:
        shape = self.shape(self._read(x))
        return None if shape is None or not dims or not self._is_batch(dims[0]) else attention.divided(shape, dims)

    def _heads(self, x: Standin, value: attention.Value) -> Standin:
        """A value that is on its way to an attention, or from one."""
        made = self._recorder.value(value[0], x.memory)
        made.version, made.heads = x.version, value[1]
        return made

    def _of_heads(self, target: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        given = [value for value in values((args, kwargs)) if isinstance(value, Standin) and value.heads is not None]
        for x in given:
            self._check_version(x)
        if name in ("reshape", "view"):
            dims = self._view_dims(args[1:], kwargs)
            if not dims or not self._is_batch(dims[0]):
                raise Unsupported("puts heads together to another shape")
            args, kwargs = [args[0], [-1 if dims.count(-1) == 0 else dims[0], *dims[1:]]], {}

        def of(argument: Any) -> attention.Value | None:
            if not isinstance(argument, Standin) or argument.heads is None or argument.node is None:
                return None
            return argument.node, argument.heads

        made = attention.step(target, name, args, kwargs, of)
        if isinstance(made, attention.Attention):
            read = [self._recorder.value(node, Memory("")) for node in made.nodes]
            arguments = {"heads": made.heads, "scale": made.scale}
            x = self._apply(self._unique("attention"), "Attention", read, arguments)
            return self._heads(x, (self._read(x), made.result))
        if type(made) is int:
            x = self._recorder.value(made, given[0].memory)
            x.version = given[0].version
            return x
        if len(made) == 2 and type(made[0]) is int:
            return self._heads(given[0], made)
        return tuple(self._heads(given[0], one) for one in made)

    def _shuffled(self, node: int) -> int | None:
        """The groups of a channel shuffle that has come so far, None for any other value."""
        if self.nodes[node][1] != "Permute":
            return None
        before = shuffle.source(self.nodes, node) if self.nodes[self.nodes[node][2][0]][1] == "View" else 0
        return shuffle.groups_behind(self.nodes, node, self._sizes.channels(before))

    def _contiguous(self, x: Standin) -> Standin:
        node = self._read(x)
        made = self._recorder.value(node, x.memory)
        made.copied = self._shuffled(node) is not None
        permuted = (number for number, (_, kind, *_) in enumerate(self.nodes) if kind == "Permute")
        if not made.copied and any(number not in self._joined for number in permuted):
            raise Unsupported(_COPIES)
        return made

    def _channels_of(self, x: Standin) -> int:
        channels = self._sizes.channels(self._read(x))
        if channels is None:
            raise Unsupported("divides a value whose number of channels is not known for every batch")
        return channels

    @staticmethod
    def _described(describe: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return describe(*args, **kwargs)
        except TypeError as error:
            raise Unsupported(f"its arguments have no counterpart: {error}") from error

    def _weighted(self, target: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Standin:
        """A function whose weights are the module's own; it is named after the module that holds them."""
        x = self._tensor(args.pop(0) if args else kwargs.pop("input", None))
        holders: list[str] = []
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, torch.Tensor):
                own = self._own_name(argument)
                if own is None:
                    raise Unsupported("a weight is computed, not a parameter or buffer")
                holders.append(own.rpartition(".")[0])
        kind, describe = WEIGHTED[target]
        attributes = self._described(describe, self._tensor_index, *args, **kwargs)
        return self._apply((holders[0] if holders else "") or self._unique(name), kind, [x], attributes)

    def _scale(self, name: str, operands: list[Any], first: bool) -> Standin:
        x, factor = reversed(operands) if first else operands
        if not isinstance(x, Standin):
            raise Unsupported("only a tensor of the graph can be multiplied by a parameter")
        unique = self._unique(name)
        name = str(self._own_name(factor)).rpartition(".")[0] or unique
        return self._apply(name, "Scale", [x], {"factor": self._tensor_index(factor), "first": first})

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

    # -- values

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
            raise Unsupported  # The reason has been given where the value is made.
        if x.copied:
            raise Unsupported(_COPIES)
        if x.heads is not None:
            raise Unsupported("reads the heads of an attention, which has no counterpart yet")
        self._check_version(x)
        return x.node

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
        name, _ = self._own.get(id(argument), (None, None))
        return name

    def _tensor_index(self, tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        if isinstance(tensor, Standin):
            raise Unsupported("a weight is computed, not a parameter or buffer")
        index = self._places.setdefault(id(tensor), len(self.tensors))
        if index == len(self.tensors):
            self.tensors.append(tensor)
        return index

    def _unique(self, name: str) -> str:
        name = name.strip("_")
        self._names[name] += 1
        count = self._names[name] - 1
        return f"{name}_{count}" if count else name


_COPIES = "copies permuted dimensions, which has no counterpart yet"
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


def _chunks(channels: int, chunks: int, dim: int = 0) -> list[int]:
    """The sizes of the parts that ``torch.chunk`` makes of channels."""
    if type(chunks) is not int or chunks < 1:
        raise Unsupported(f"divides into {chunks!r} parts")
    return _parts(channels, -(-channels // chunks), dim)


def _parts(channels: int, split_size_or_sections: Any = None, dim: int = 0, split_size: Any = None) -> list[int]:
    """Those that ``torch.split`` makes, whose argument has another name as a method."""
    if dim not in (1, -3):
        raise Unsupported("divides another dimension than the channels")
    each = split_size if split_size_or_sections is None else split_size_or_sections
    if type(each) is int and each > 0:
        return [min(each, channels - first) for first in range(0, channels, each)]
    sizes = list(each) if isinstance(each, (tuple, list)) else []
    if any(type(size) is not int or size < 1 for size in sizes) or sum(sizes) != channels:
        raise Unsupported(f"divides {channels} channels into {each!r}")
    return sizes


def _swapped(rank: int | None, dim0: int, dim1: int) -> list[int]:
    """The order of the dimensions after two of them have changed places."""
    if rank is None or not all(-rank <= dim < rank for dim in (dim0, dim1)):
        raise Unsupported("swaps dimensions of a value that may have any number of them")
    order = list(range(rank))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return order


def _kind(kind: OpKind, attributes: Attributes) -> str:
    if kind == "Dropout" and attributes["channels"]:
        return "Dropout2d"
    if kind == "Softmax" and attributes["log"]:
        return "LogSoftmax"
    return kind
