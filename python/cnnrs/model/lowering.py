"""Lower an ``nn.Module`` into the plain list of operations that the engines run.

Nothing is copied: the graph names parameters by index into a list of the module's own tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from cnnrs import _cnnrs
from cnnrs._records import Attributes, Node, OpKind
from cnnrs._util import plain
from cnnrs.model import shuffle
from cnnrs.model.around import global_hooks
from cnnrs.model.images import Images
from cnnrs.model.operations import BINARY, FUNCTIONS, INPLACE, LAYERS, METHODS, WEIGHTED, Unsupported
from cnnrs.model.stochastic_depth import Draws, is_stochastic_depth
from cnnrs.model.tracing import Memory, Recorder, Standin, values
from cnnrs.model.values import COPIES
from cnnrs.model.windows import Windowed, is_windowed


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
        folded: which of the tensors are no parameters or buffers, but computed of them as they were.
        sources: what these have been computed of, and parameters of which others are another shape.
    """

    graph: _cnnrs.Graph
    tensors: list[torch.Tensor]
    names: list[str]
    kinds: list[str]
    operations: list[Node]
    output: int
    image: tuple[int, ...] | None = None
    folded: frozenset[int] = frozenset()
    sources: tuple[torch.Tensor, ...] = ()

    def identities(self) -> list[Any]:
        """What tells these tensors from others: the objects; of folded ones, which are new each time, the numbers."""
        return [
            (tuple(tensor.shape), _digest(tensor)) if index in self.folded else (id(tensor), tensor.data_ptr())
            for index, tensor in enumerate(self.tensors)
        ]

    def state(self) -> list[Any]:
        """Equal as long as what other tensors than parameters and buffers were made of is not written to, or moved.

        What `.data` and NumPy write leaves no trace here.
        """
        dense = [tensor for tensor in self.sources if tensor.layout is torch.strided]
        return [(tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for tensor in dense]


def _digest(tensor: torch.Tensor) -> bytes:
    return blake2b(tensor.cpu().numpy().tobytes(), digest_size=16).digest()


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


class _Lowering(Windowed, Images):
    """One walk."""

    def __init__(self, model: nn.Module, gradients: bool, image: tuple[int, ...] | None) -> None:
        super().__init__(model, gradients, image)
        self._recorder = Recorder(model, self, gradients)
        self._draws = Draws(self._recorder, self.nodes)
        self._layers = {module: name for name, module in reversed(list(model.named_modules()))}
        #: Steps of channel shuffles, which are one operation each.
        self._joined: set[int] = set()

    def run(self) -> Lowered:
        try:
            return self._run()
        finally:
            # A circle, in which the model would wait for the garbage collector.
            del self._recorder, self._draws
            self._responses = None

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
        sources = (*self._own.reshaped, *(self._recorder.sources.values() if self._folded else ()))
        return Lowered(
            graph, self.tensors, names, kinds, self.nodes, node, self.image, frozenset(self._folded), sources
        )

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
        """Stops at the layers in the table, at torch's own and at those with windows; walks through everything else."""
        if type(module) in LAYERS or is_stochastic_depth(module) or (self.image is not None and is_windowed(module)):
            return True
        return type(module).__module__.startswith(("torch.nn", "torch.ao.nn")) and not isinstance(module, nn.Sequential)

    def layer(self, module: nn.Module, args: tuple[Any, ...]) -> Standin:
        kind = type(module).__name__
        name = self._layers.get(module)
        if name is None:
            raise self._recorder.stop(f"a {kind} is called that is no submodule of the model")
        result = self._attempt(f"{name or 'the model'} ({kind})", lambda: self._layer(name or kind, module, args))
        return result if result is not None else self._nothing()

    def _layer(self, name: str, module: nn.Module, args: tuple[Any, ...]) -> Any:
        if type(module) is nn.MultiheadAttention and self.image is not None:
            return self._multihead(name, module, args)
        if type(module) in (nn.TransformerEncoderLayer, nn.TransformerEncoder) and self.image is not None:
            return self._encoder(name, module, args)
        if self.image is not None and is_windowed(module):
            return self._windowed(name, module, args)
        if is_stochastic_depth(module):
            if module.training and getattr(module, "p", 1.0) > 0.0:
                drops: Attributes = {"p": module.p, "rows": module.mode == "row", "keep": None}
                return self._apply(name, "StochasticDepth", [self._tensor(args[0])], drops)
            return self._tensor(args[0])
        if type(module) in (nn.GroupNorm, nn.Upsample) and self.image is not None and len(args) == 1:
            return self._of_image(name, module, self._tensor(args[0]))
        if type(module) is nn.Conv1d and self.image is not None and len(args) == 1:
            return self._conv1d(name, module, self._tensor(args[0]))
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
        if isinstance(module, nn.Linear) and (folded := self._of_constant(name, x, module)) is not None:
            return folded
        made = self._apply(name, kind, [x], self._described(attributes, module, self._tensor_index))
        if kind == "BatchNorm2d" and made.node is not None:
            # The layer, not the function, refuses everything else.
            self._sizes.has_rank(made.node, 4)
        return made

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
        normed = self._normed(name, args, kwargs)
        if normed is not None:
            return normed
        nothing = [value for value in values((args, kwargs)) if isinstance(value, Standin) and value.node is None]
        if nothing:
            raise Unsupported(nothing[0].reason)
        if target in WEIGHTED:
            return self._weighted(target, name, args, kwargs)
        if target in BINARY and len(args) == 2 and not kwargs:
            kind, attributes = BINARY[target]
            args = self._narrow(args) if kind == "Mul" else args
            numbered = self._numbered(kind, args, attributes["inplace"])
            if numbered is not None:
                return numbered
            own = [self._is_constant(a) for a in args]
            if kind == "Mul" and any(own) and not attributes["inplace"]:
                return self._scale(name, args, first=own[0])
            if kind == "Add" and any(own) and not attributes["inplace"] and self.image is not None:
                return self._shift(name, args, first=own[0])
            return self._apply(self._unique(name), kind, [self._tensor(a) for a in args], dict(attributes))
        if target in (torch.sub, "sub") and len(args) == 2 and not kwargs and self.image is not None:
            return self._difference(args)
        if target in (F.group_norm, F.interpolate) and args and self.image is not None:
            make = self._group_norm if target is F.group_norm else self._upsampled
            made: Standin = self._described(make, self._unique(name), self._tensor(args[0]), *args[1:], **kwargs)
            return made
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
            dim, channels = self._divided_dim(x)
            sizes = self._described(_chunks if name == "chunk" else _parts, dim, channels, *args, **kwargs)
            one: list[Attributes] = [{"dim": dim, "sizes": sizes, "part": part} for part in range(len(sizes))]
            return tuple(self._apply(self._unique(name), "Split", [x], part) for part in one)
        if target == "__getitem__" and self.image is not None and len(args) == 1:
            return self._item(x, args[0])
        if target == "expand_as" and len(args) == 1 and self.image is not None:
            return self._spread(x, args[0])
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
            raise Unsupported(COPIES)
        return made

    def _divided_dim(self, x: Standin) -> tuple[int, int]:
        """The dimension of the channels, of images or of tokens (N, T, C), and how many they are."""
        shape = self.shape(self._read(x))
        if shape is not None and len(shape) == 3 and shape[2] is not None:
            return 2, shape[2]
        channels = shape[1] if shape is not None and len(shape) == 4 else self._sizes.channels(self._read(x))
        if channels is None:
            raise Unsupported("divides a value whose number of channels is not known for every batch")
        return 1, channels

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
                if not self._is_constant(argument):
                    raise Unsupported("a weight is computed, not a parameter or buffer")
                if (own := self._own_name(argument)) is not None:
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


def _chunks(own: int, channels: int, chunks: int, dim: int = 0) -> list[int]:
    """The sizes of the parts that ``torch.chunk`` makes of channels."""
    if type(chunks) is not int or chunks < 1:
        raise Unsupported(f"divides into {chunks!r} parts")
    return _parts(own, channels, -(-channels // chunks), dim)


def _parts(
    own: int, channels: int, split_size_or_sections: Any = None, dim: int = 0, split_size: Any = None
) -> list[int]:
    """Those that ``torch.split`` makes, whose argument has another name as a method; ``own``: of the channels."""
    if dim not in ((1, -3) if own == 1 else (2, -1)):
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
