"""Lower an ``nn.Module`` with ``torch.fx`` into the plain list of operations that the engines run.

Nothing is copied: the graph names parameters by index into a list of the module's own tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch import nn

from cnnrs import _cnnrs
from cnnrs.operations import BINARY, FUNCTIONS, LAYERS, METHODS, WEIGHTED, Attributes, Unsupported


@dataclass
class Lowered:
    """A module as a graph over its own tensors.

    Attributes:
        graph: the operations.
        tensors: parameters and buffers that the operations name by index, shared with the module.
        names: one qualified name per node; node 0 is the input.
        kinds: the PyTorch class that does the same as each node.
        operations: (name, kind, inputs, attributes) of each node, as given to the graph.
    """

    graph: _cnnrs.Graph
    tensors: list[torch.Tensor]
    names: list[str]
    kinds: list[str]
    operations: list[tuple[str, str, list[int], Attributes]]


def lower(model: nn.Module) -> Lowered:
    """Lower ``model`` in its present mode (dropout and batch norm read each layer's ``training`` flag).

    Args:
        model: any module whose ``forward`` takes one tensor.

    Returns:
        The graph and the tensors it reads.

    Raises:
        Unsupported: with one reason per line when the module does anything that the graph cannot say.
    """
    reasons = _obstacles(model)
    if reasons:
        raise Unsupported("\n".join(reasons))
    return _Lowering(model).run()


# -- what makes a model more than its layers -----------------------------------------------------------------

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN_TENSORS = (torch.Tensor, nn.Parameter, nn.Buffer)


def _obstacles(model: nn.Module) -> list[str]:
    """Reasons why running the layers one by one would not be the same as calling the model."""
    reasons = []
    if type(model).__module__.startswith(("torch.nn.parallel", "torch._dynamo", "torch.distributed")):
        reasons.append(f"{type(model).__name__} wraps the model and does more than its forward")
    if torch.nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
        reasons.append("a global module hook is registered")
    for name, module in model.named_modules():
        where = f"{name or 'the model'} ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            reasons.append(f"{where} is TorchScript")
        if any(getattr(module, hooks, None) for hooks in _HOOKS):
            reasons.append(f"{where} has hooks")
        if "forward" in vars(module):
            reasons.append(f"{where} has a forward of its own, set on the instance")
        if torch.nn.utils.parametrize.is_parametrized(module):
            reasons.append(f"{where} has parametrized tensors")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if type(tensor) not in _PLAIN_TENSORS or tensor.layout is not torch.strided:
            reasons.append(f"{name} is a {type(tensor).__name__} with layout {tensor.layout}")
        if getattr(tensor, "_backward_hooks", None) or getattr(tensor, "_post_accumulate_grad_hooks", None):
            reasons.append(f"parameter {name} has gradient hooks")
    return reasons


# -- the walk ------------------------------------------------------------------------------------------------


class _Tracer(torch.fx.Tracer):
    """Stops at the layers in the table and at torch's own; walks through everything else."""

    def __init__(self) -> None:
        super().__init__(param_shapes_constant=True)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in LAYERS or super().is_leaf_module(m, module_qualified_name)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, torch.fx.Proxy]) -> Any:
        # Otherwise a forward that updates a buffer in place would do so while it is traced.
        for name, buffer in self.root.named_buffers():
            if buffer is attr_val:
                if name not in parameter_proxy_cache:
                    parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
                return parameter_proxy_cache[name]
        return super().getattr(attr, attr_val, parameter_proxy_cache)


@contextmanager
def _backward_of_its_own(refused: bool) -> Iterator[None]:
    """Refuses functions with a backward of their own while ``forward`` is traced: only their forward would be seen."""
    if not refused:
        yield
        return
    before = vars(torch.autograd.Function)["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(argument, torch.fx.Proxy) for argument in args):
            raise Unsupported(f"{cls.__name__} is an autograd.Function, whose backward has no counterpart")
        return before.__get__(None, cls)(*args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = before  # type: ignore[method-assign]


@dataclass(frozen=True)
class _Size:
    """``x.size()`` (dim None) or ``x.size(dim)`` of a node."""

    node: int
    dim: int | None


@dataclass(frozen=True, eq=False)
class _Own:
    """A parameter or buffer, by its qualified name."""

    name: str
    tensor: torch.Tensor


@dataclass
class _Lowering:
    """State of one walk over the traced module."""

    model: nn.Module
    nodes: list[tuple[str, str, list[int], Attributes]] = field(default_factory=lambda: [("input", "Input", [], {})])
    tensors: list[torch.Tensor] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def run(self) -> Lowered:
        alone = type(self.model) in LAYERS
        output = self._layer(type(self.model).__name__, self.model, [0]) if alone else self._walk()
        if self.reasons:
            raise Unsupported("\n".join(self.reasons))
        graph = _cnnrs.Graph(self.nodes, output, [list(t.shape) for t in self.tensors])
        kinds = [_kind(kind, attributes) for _, kind, _, attributes in self.nodes]
        return Lowered(graph, self.tensors, [node[0] for node in self.nodes], kinds, self.nodes)

    def _walk(self) -> int:
        traced = self._trace()
        values: dict[torch.fx.Node, int | _Size | _Own | None] = {}
        placeholders = [node for node in traced.nodes if node.op == "placeholder"]
        if len(placeholders) != 1:
            raise Unsupported(f"forward takes {len(placeholders)} arguments: {', '.join(p.name for p in placeholders)}")
        output: Any = None
        for node in traced.nodes:
            if node.op == "placeholder":
                values[node] = 0
            elif node.op == "output":
                output = node.args[0]
            else:
                try:
                    values[node] = self._node(node, values)
                except Unsupported as reason:
                    self.reasons.append(f"{self._where(node)}: {reason}")
                    values[node] = None
        result = values.get(output) if isinstance(output, torch.fx.Node) else None
        if not isinstance(result, int) and not self.reasons:
            self.reasons.append("forward does not return one tensor")
        return result if isinstance(result, int) else 0

    def _trace(self) -> torch.fx.Graph:
        """The calls of ``forward``; modules that change while it runs are put back and refused."""
        before = [(module, dict(vars(module))) for module in self.model.modules()]
        try:
            with _backward_of_its_own(refused=any(module.training for module in self.model.modules())):
                graph = _Tracer().trace(self.model)
        except Unsupported:
            raise
        except Exception as error:
            # Anything may be raised: forward ran on stand-ins for tensors.
            raise Unsupported(f"forward cannot be traced: {type(error).__name__}: {error}") from error
        finally:
            changed = []
            for module, old in before:
                now = vars(module)
                if now.keys() != old.keys() or any(now[key] is not value for key, value in old.items()):
                    now.clear()
                    now.update(old)
                    changed.append(type(module).__name__)
        if changed:
            raise Unsupported(f"forward changes attributes of {', '.join(changed)}")
        return graph

    def _where(self, node: torch.fx.Node) -> str:
        if node.op == "call_module":
            return f"{node.target} ({type(self.model.get_submodule(str(node.target))).__name__})"
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        return f"{name}()"

    def _node(self, node: torch.fx.Node, values: dict[torch.fx.Node, Any]) -> int | _Size | _Own | None:
        inputs = [values[n] for n in node.all_input_nodes]
        if None in inputs:
            return None  # The reason has been given where the value is made.
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            return self._layer(str(node.target), module, [self._tensor_value(values, a) for a in node.args])
        if node.op == "get_attr":
            return self._own(str(node.target))
        return self._call(node, values)

    def _layer(self, name: str, module: nn.Module, inputs: list[int]) -> int:
        if type(module) is nn.Identity:
            return inputs[0]
        if type(module) not in LAYERS:
            raise Unsupported("this layer has no counterpart yet")
        kind, attributes = LAYERS[type(module)]
        return self._append(name, kind, inputs, attributes(module, self._tensor_index))

    def _own(self, name: str) -> _Own:
        tensor = operator.attrgetter(name)(self.model)
        if not any(tensor is own for own in (*self.model.parameters(), *self.model.buffers())):
            raise Unsupported("a tensor that is neither parameter nor buffer is used")
        return _Own(name, tensor)

    def _call(self, node: torch.fx.Node, values: dict[torch.fx.Node, Any]) -> int | _Size:
        target: Any = node.target
        args: list[Any] = list(node.args)
        kwargs: dict[str, Any] = dict(node.kwargs)
        if target in ("size", getattr) or target is operator.getitem:
            return self._size(target, args, kwargs, values)
        if target in WEIGHTED:
            return self._weighted(node, values)
        if target in BINARY and len(args) == 2 and not kwargs:
            own = [values.get(a) if isinstance(a, torch.fx.Node) else None for a in args]
            if BINARY[target][0] == "Mul" and isinstance(own[0], _Own) != isinstance(own[1], _Own):
                return self._scale(node, own)
            operands = [self._tensor_value(values, a) for a in args]
            return self._append(node.name, BINARY[target][0], operands, BINARY[target][1])
        if target in (torch.cat, torch.concat):
            parts = args[0] if args else kwargs.pop("tensors")
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            return self._append(node.name, "Cat", [self._tensor_value(values, a) for a in parts], {"dim": dim})
        x = self._tensor_value(values, args.pop(0) if args else kwargs.pop("input", None))
        if target in ("view", "reshape", torch.reshape):
            return self._append(node.name, "View", [x], {"dims": self._view_dims(args, kwargs, values)})
        if getattr(target, "__name__", "") == "stochastic_depth":
            return self._stochastic_depth(x, *args, **kwargs)
        if target == "contiguous" and not args and not kwargs:
            if any(kind == "Permute" for _, kind, _, _ in self.nodes):
                raise Unsupported("copies permuted dimensions, which has no counterpart yet")
            return x
        function = METHODS.get(target) if isinstance(target, str) else target
        if function not in FUNCTIONS:
            raise Unsupported("this function has no counterpart yet")
        kwargs = {k: v for k, v in kwargs.items() if not (k in ("_stacklevel", "dtype") and v in (3, None))}
        kind, attributes = FUNCTIONS[function]
        return self._try(node.name, kind, x, lambda: attributes(*args, **kwargs))

    def _weighted(self, node: torch.fx.Node, values: dict[torch.fx.Node, Any]) -> int:
        """A function whose weights are the module's own; it is named after the module that holds them."""
        args, kwargs = list(node.args), dict(node.kwargs)
        x = self._tensor_value(values, args.pop(0) if args else kwargs.pop("input", None))
        holders: list[str] = []

        def own(argument: Any) -> Any:
            if not isinstance(argument, torch.fx.Node):
                return argument
            value = values[argument]
            if not isinstance(value, _Own):
                raise Unsupported(f"{argument} is computed, not a parameter or buffer")
            holders.append(value.name.rpartition(".")[0])
            return value.tensor

        given, named = [own(a) for a in args], {key: own(a) for key, a in kwargs.items()}
        name = (holders[0] if holders else "") or node.name
        kind, attributes = WEIGHTED[node.target]
        return self._try(name, kind, x, lambda: attributes(self._tensor_index, *given, **named))

    def _scale(self, node: torch.fx.Node, operands: list[Any]) -> int:
        first = isinstance(operands[0], _Own)
        x, own = reversed(operands) if first else operands
        if not isinstance(x, int):
            raise Unsupported("only a tensor of the graph can be multiplied by a parameter")
        name = own.name.rpartition(".")[0] or node.name
        return self._append(name, "Scale", [x], {"factor": self._tensor_index(own.tensor), "first": first})

    def _try(self, name: str, kind: str, x: int, attributes: Callable[[], Attributes]) -> int:
        try:
            return self._append(name, kind, [x], attributes())
        except TypeError as error:
            raise Unsupported(f"its arguments have no counterpart: {error}") from error

    @staticmethod
    def _stochastic_depth(x: int, p: float, mode: str, training: bool = True) -> int:
        if training and p > 0.0:
            raise Unsupported("stochastic depth in training mode has no counterpart yet")
        return x

    def _size(self, target: Any, args: list[Any], kwargs: dict[str, Any], values: dict[torch.fx.Node, Any]) -> _Size:
        value = values[args[0]]
        if target == "size" and isinstance(value, int):
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            return _Size(value, dim)
        if target is getattr and args[1] == "shape" and isinstance(value, int):
            return _Size(value, None)
        if target is operator.getitem and isinstance(value, _Size) and value.dim is None and isinstance(args[1], int):
            return _Size(value.node, args[1])
        raise Unsupported("reads something of a tensor that the graph does not keep")

    @staticmethod
    def _view_dims(args: list[Any], kwargs: dict[str, Any], values: dict[torch.fx.Node, Any]) -> list[Any]:
        shape = args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args or kwargs.get("shape", [])
        dims: list[Any] = []
        for entry in shape:
            size = values.get(entry) if isinstance(entry, torch.fx.Node) else None
            if isinstance(size, _Size) and size.dim is not None and size.dim >= 0:
                dims.append((size.node, size.dim))
            elif isinstance(entry, int):
                dims.append(entry)
            else:
                raise Unsupported(f"shape {tuple(shape)} is computed")
        return dims

    @staticmethod
    def _tensor_value(values: dict[torch.fx.Node, Any], argument: Any) -> int:
        value = values.get(argument) if isinstance(argument, torch.fx.Node) else None
        if isinstance(value, _Own):
            raise Unsupported(f"parameter {value.name} is used outside a layer")
        if not isinstance(value, int):
            raise Unsupported(f"argument {argument!r} is not a tensor of the graph")
        return value

    def _tensor_index(self, tensor: torch.Tensor | None) -> int | None:
        if tensor is None:
            return None
        for index, known in enumerate(self.tensors):
            if known is tensor:
                return index
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def _append(self, name: str, kind: str, inputs: Iterable[int], attributes: Attributes) -> int:
        self.nodes.append((name, kind, list(inputs), attributes))
        return len(self.nodes) - 1


def _kind(kind: str, attributes: Attributes) -> str:
    if kind == "Dropout" and attributes["channels"]:
        return "Dropout2d"
    if kind == "Softmax" and attributes["log"]:
        return "LogSoftmax"
    return kind
