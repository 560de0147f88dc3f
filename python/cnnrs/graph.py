"""Lower an ``nn.Module`` with ``torch.fx`` into the plain list of operations that the engines run.

Nothing is copied: the graph names parameters by index into a list of the module's own tensors.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn

from cnnrs import _cnnrs

Attributes = dict[str, Any]


class Unsupported(Exception):
    """An operation has no counterpart in the graph; the message says which and why."""


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


# -- what makes a model more than its layers ------------------------------------------------------------------------------

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN_TENSORS = (torch.Tensor, nn.Parameter, nn.Buffer)


def _obstacles(model: nn.Module) -> list[str]:
    """Reasons why running the layers one by one would not be the same as calling the model."""
    reasons = []
    if type(model).__module__.startswith(("torch.nn.parallel", "torch._dynamo", "torch.distributed")):
        reasons.append(f"{type(model).__name__} wraps the model and does more than its forward")
    if torch.nn.modules.module._has_any_global_hook():
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


# -- layers ---------------------------------------------------------------------------------------------------------------


def _pair(value: Any, what: str) -> tuple[int, int]:
    first, second = (value, value) if isinstance(value, int) else value
    if not (isinstance(first, int) and isinstance(second, int)):
        raise Unsupported(f"{what} is {value!r}")
    return first, second


def _conv_padding(conv: nn.Conv2d) -> tuple[int, int]:
    if conv.padding == "valid":
        return 0, 0
    if conv.padding != "same":
        return _pair(conv.padding, "padding")
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if any(t % 2 for t in total):
        raise Unsupported("padding='same' with an even kernel pads one side more than the other")
    return total[0] // 2, total[1] // 2


def _conv2d(m: nn.Conv2d, tensor: Callable[[Any], int | None]) -> Attributes:
    if m.padding_mode != "zeros":
        raise Unsupported(f"padding_mode is {m.padding_mode!r}")
    return {
        "weight": tensor(m.weight), "bias": tensor(m.bias), "stride": _pair(m.stride, "stride"),
        "padding": _conv_padding(m), "dilation": _pair(m.dilation, "dilation"), "groups": m.groups,
    }  # fmt: skip


def _batch_norm(m: nn.BatchNorm2d, tensor: Callable[[Any], int | None]) -> Attributes:
    # As nn.BatchNorm2d.forward: a training layer that tracks nothing leaves its statistics alone.
    statistics = not m.training or m.track_running_stats
    return {
        "weight": tensor(m.weight), "bias": tensor(m.bias),
        "running_mean": tensor(m.running_mean) if statistics else None,
        "running_var": tensor(m.running_var) if statistics else None,
        "num_batches_tracked": tensor(m.num_batches_tracked) if m.track_running_stats else None,
        "momentum": m.momentum, "eps": m.eps, "training": m.training,
    }  # fmt: skip


def _max_pool2d(
    kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> Attributes:  # fmt: skip
    if return_indices:
        raise Unsupported("return_indices=True returns two values")
    kernel = _pair(kernel_size, "kernel_size")
    return {
        "kernel": kernel, "stride": _pair(stride or kernel, "stride"), "padding": _pair(padding, "padding"),
        "dilation": _pair(dilation, "dilation"), "ceil_mode": ceil_mode,
    }  # fmt: skip


def _avg_pool2d(
    kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False, count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Attributes:  # fmt: skip
    kernel = _pair(kernel_size, "kernel_size")
    return {
        "kernel": kernel, "stride": _pair(stride or kernel, "stride"), "padding": _pair(padding, "padding"),
        "ceil_mode": ceil_mode, "count_include_pad": count_include_pad, "divisor": divisor_override,
    }  # fmt: skip


def _adaptive(output_size: Any) -> Attributes:
    return {"output": tuple(output_size) if isinstance(output_size, (tuple, list)) else (output_size, output_size)}


def _dropout(p: float = 0.5, training: bool = True, inplace: bool = False) -> Attributes:
    return {"p": p, "training": training, "channels": False, "inplace": inplace}


def _dropout2d(p: float = 0.5, training: bool = True, inplace: bool = False) -> Attributes:
    return {"p": p, "training": training, "channels": True, "inplace": inplace}


def _softmax(dim: int | None, log: bool) -> Attributes:
    if dim is None:
        raise Unsupported("softmax without dim: PyTorch guesses it and warns")
    return {"dim": dim, "log": log}


def _gelu(approximate: str) -> Attributes:
    return {"tanh": approximate == "tanh", "inplace": False}


#: Exact layer type -> (kind, attributes of the instance). A subclass may do anything, so it is not looked up here.
_LAYERS: dict[type[nn.Module], tuple[str, Callable[[Any, Callable[[Any], int | None]], Attributes]]] = {
    nn.Conv2d: ("Conv2d", _conv2d),
    nn.BatchNorm2d: ("BatchNorm2d", _batch_norm),
    nn.Linear: ("Linear", lambda m, tensor: {"weight": tensor(m.weight), "bias": tensor(m.bias)}),
    nn.ReLU: ("ReLU", lambda m, _: {"inplace": m.inplace}),
    nn.ReLU6: ("ReLU6", lambda m, _: {"inplace": m.inplace}),
    nn.LeakyReLU: ("LeakyReLU", lambda m, _: {"negative_slope": m.negative_slope, "inplace": m.inplace}),
    nn.SiLU: ("SiLU", lambda m, _: {"inplace": m.inplace}),
    nn.GELU: ("GELU", lambda m, _: _gelu(m.approximate)),
    nn.Hardswish: ("Hardswish", lambda m, _: {"inplace": m.inplace}),
    nn.Hardsigmoid: ("Hardsigmoid", lambda m, _: {"inplace": m.inplace}),
    nn.Sigmoid: ("Sigmoid", lambda m, _: {"inplace": False}),
    nn.Tanh: ("Tanh", lambda m, _: {"inplace": False}),
    nn.MaxPool2d: (
        "MaxPool2d",
        lambda m, _: _max_pool2d(m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices),
    ),
    nn.AvgPool2d: (
        "AvgPool2d",
        lambda m, _: _avg_pool2d(
            m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
        ),
    ),
    nn.AdaptiveAvgPool2d: ("AdaptiveAvgPool2d", lambda m, _: _adaptive(m.output_size)),
    nn.Dropout: ("Dropout", lambda m, _: _dropout(m.p, m.training, m.inplace)),
    nn.Dropout2d: ("Dropout", lambda m, _: _dropout2d(m.p, m.training, m.inplace)),
    nn.Flatten: ("Flatten", lambda m, _: {"start": m.start_dim, "end": m.end_dim}),
    nn.LogSoftmax: ("Softmax", lambda m, _: _softmax(m.dim, log=True)),
    nn.Softmax: ("Softmax", lambda m, _: _softmax(m.dim, log=False)),
}

# -- functions and methods ------------------------------------------------------------------------------------------------

#: Function -> (kind, attributes of the arguments after the tensor).
_FUNCTIONS: dict[Any, tuple[str, Callable[..., Attributes]]] = {
    F.relu: ("ReLU", lambda inplace=False: {"inplace": inplace}),
    torch.relu: ("ReLU", lambda: {"inplace": False}),
    F.relu6: ("ReLU6", lambda inplace=False: {"inplace": inplace}),
    F.leaky_relu: (
        "LeakyReLU",
        lambda negative_slope=0.01, inplace=False: {"negative_slope": negative_slope, "inplace": inplace},
    ),
    F.silu: ("SiLU", lambda inplace=False: {"inplace": inplace}),
    F.gelu: ("GELU", lambda approximate="none": _gelu(approximate)),
    F.hardswish: ("Hardswish", lambda inplace=False: {"inplace": inplace}),
    F.hardsigmoid: ("Hardsigmoid", lambda inplace=False: {"inplace": inplace}),
    F.sigmoid: ("Sigmoid", lambda: {"inplace": False}),
    torch.sigmoid: ("Sigmoid", lambda: {"inplace": False}),
    F.tanh: ("Tanh", lambda: {"inplace": False}),
    torch.tanh: ("Tanh", lambda: {"inplace": False}),
    F.max_pool2d: ("MaxPool2d", _max_pool2d),
    F.avg_pool2d: ("AvgPool2d", _avg_pool2d),
    F.adaptive_avg_pool2d: ("AdaptiveAvgPool2d", _adaptive),
    F.dropout: ("Dropout", _dropout),
    F.dropout2d: ("Dropout", _dropout2d),
    F.log_softmax: ("Softmax", lambda dim=None: _softmax(dim, log=True)),
    torch.log_softmax: ("Softmax", lambda dim: _softmax(dim, log=True)),
    F.softmax: ("Softmax", lambda dim=None: _softmax(dim, log=False)),
    torch.softmax: ("Softmax", lambda dim: _softmax(dim, log=False)),
    torch.flatten: ("Flatten", lambda start_dim=0, end_dim=-1: {"start": start_dim, "end": end_dim}),
    torch.mean: ("Mean", lambda dim, keepdim=False: {"dims": _dims(dim), "keepdim": keepdim}),
}

#: Method of a tensor -> the function that does the same.
_METHODS: dict[str, Any] = {
    "relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "flatten": torch.flatten, "mean": torch.mean,
    "softmax": torch.softmax, "log_softmax": torch.log_softmax,
}  # fmt: skip
_BINARY: dict[Any, tuple[str, Attributes]] = {
    operator.add: ("Add", {"inplace": False}), torch.add: ("Add", {"inplace": False}), "add": ("Add", {"inplace": False}),
    operator.iadd: ("Add", {"inplace": True}), "add_": ("Add", {"inplace": True}),
    operator.mul: ("Mul", {}), torch.mul: ("Mul", {}), "mul": ("Mul", {}),
}  # fmt: skip


def _dims(dim: Any) -> list[int]:
    return [dim] if isinstance(dim, int) else list(dim)


# -- the walk -------------------------------------------------------------------------------------------------------------


class _Tracer(torch.fx.Tracer):
    """Stops at the layers in the table and at torch's own; walks through everything else."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in _LAYERS or super().is_leaf_module(m, module_qualified_name)


@dataclass(frozen=True)
class _Size:
    """``x.size()`` (dim None) or ``x.size(dim)`` of a node."""

    node: int
    dim: int | None


@dataclass
class _Lowering:
    """State of one walk over the traced module."""

    model: nn.Module
    nodes: list[tuple[str, str, list[int], Attributes]] = field(default_factory=lambda: [("input", "Input", [], {})])
    tensors: list[torch.Tensor] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def run(self) -> Lowered:
        if type(self.model) in _LAYERS:
            output = self._layer(type(self.model).__name__, self.model, [0])
        else:
            output = self._walk()
        if self.reasons:
            raise Unsupported("\n".join(self.reasons))
        graph = _cnnrs.Graph(self.nodes, output, [list(t.shape) for t in self.tensors])
        return Lowered(graph, self.tensors, [n[0] for n in self.nodes], [_kind(n[1], n[3]) for n in self.nodes], self.nodes)

    def _walk(self) -> int:
        traced = self._trace()
        values: dict[torch.fx.Node, int | _Size | None] = {}
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
            graph = _Tracer().trace(self.model)
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

    def _node(self, node: torch.fx.Node, values: dict[torch.fx.Node, Any]) -> int | _Size | None:
        inputs = [values[n] for n in node.all_input_nodes]
        if None in inputs:
            return None  # The reason has been given where the value is made.
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            return self._layer(str(node.target), module, [self._tensor_value(values, a) for a in node.args])
        if node.op == "get_attr":
            raise Unsupported("a parameter is used outside a layer")
        return self._call(node, values)

    def _layer(self, name: str, module: nn.Module, inputs: list[int]) -> int:
        if type(module) is nn.Identity:
            return inputs[0]
        if type(module) not in _LAYERS:
            raise Unsupported("this layer has no counterpart yet")
        kind, attributes = _LAYERS[type(module)]
        return self._append(name, kind, inputs, attributes(module, self._tensor_index))

    def _call(self, node: torch.fx.Node, values: dict[torch.fx.Node, Any]) -> int | _Size:
        target, args, kwargs = node.target, list(node.args), dict(node.kwargs)
        if target in ("size", getattr) or target is operator.getitem:
            return self._size(target, args, kwargs, values)
        if target in _BINARY and len(args) == 2 and not kwargs:
            kind, attributes = _BINARY[target]
            return self._append(node.name, kind, [self._tensor_value(values, a) for a in args], attributes)
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
            return x
        function = _METHODS.get(target) if isinstance(target, str) else target
        if function not in _FUNCTIONS:
            raise Unsupported("this function has no counterpart yet")
        kwargs = {k: v for k, v in kwargs.items() if not (k in ("_stacklevel", "dtype") and v in (3, None))}
        kind, attributes = _FUNCTIONS[function]
        try:
            return self._append(node.name, kind, [x], attributes(*args, **kwargs))
        except TypeError as error:
            raise Unsupported(f"arguments {args} {kwargs} have no counterpart: {error}") from error

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
