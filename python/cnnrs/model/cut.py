"""The part of a network that leads to one of its layers."""

from __future__ import annotations

import difflib
import operator
from typing import Any

import torch
import torch.fx
from torch import nn

from cnnrs.model.modes import frozen
from cnnrs.model.operations import Unsupported
from cnnrs.model.surroundings import Surroundings
from cnnrs.model.tracing import calls_up_to


def cut(model: nn.Module, layer: str) -> nn.Module:
    """The part of ``model`` that leads to the output of the module ``layer``; shares its parameters.

    Raises:
        ValueError: there is no such module, or it is called more than once.
    """
    if not isinstance(layer, str):
        raise TypeError(f"layer must be the path of a module, such as 'features.29', got {layer!r}")
    # The part of a compiled module is cut out of the module itself.
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("a ScriptModule cannot be cut: give the module it was made of, or no layer")
    modules = dict(model.named_modules())
    if layer not in modules or not layer:
        close = difflib.get_close_matches(layer, modules, n=4, cutoff=0.3)
        raise ValueError(f"{type(model).__name__} has no layer {layer!r}; close to it: {', '.join(close) or 'nothing'}")
    traced = _traced(model, layer)
    return traced if traced is not None else _Until(model, layer)


def _traced(model: nn.Module, layer: str) -> nn.Module | None:
    """The calls that the layer needs, without the rest; None when ``forward`` cannot be traced to exactly one call."""
    target = model.get_submodule(layer)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return m is target or super().is_leaf_module(m, module_qualified_name)

        def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
            return _Proxy(node, self)

    with frozen(model):
        # torch.fx does not see contexts, randomness and state, and its stand-ins are no tensors.
        expected = [] if _is_of_a_library(model) else calls_up_to(model, target)
        if expected is None:
            return None
        surroundings = Surroundings(model, Unsupported)
        try:
            graph = Tracer().trace(model)
        except Exception:
            # Anything may be raised: forward ran on stand-ins for tensors.
            return None
        finally:
            surroundings.put_back()
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == layer]
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len(calls) > 1:
        raise ValueError(
            f"forward of {type(model).__name__} calls {layer} {len(calls)} times: which output is meant cannot be "
            "told; take the layer around it or behind it"
        )
    if len(calls) != 1 or len(inputs) != 1 or any(_is_lost(model, node) for node in graph.nodes):
        return None
    if _is_of_a_library(model):
        # Other networks may add tensors of different types, which ``+=`` does otherwise.
        _write_sums(model, graph)
    called = [call for node in graph.nodes if (call := _called(model, node)) is not None]
    if called[: len(expected)] != expected:
        return None
    for node in reversed(list(graph.nodes)):
        if node.op == "output":
            node.args = (calls[0],)
        elif node is calls[0]:
            break
        elif node.op != "placeholder" and not node.users:
            # Behind the layer: also checks that only look at shapes, which fx takes for needed.
            graph.erase_node(node)
    traced = torch.fx.GraphModule(model, graph)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    traced.delete_all_unused_submodules()
    return traced


class _Proxy(torch.fx.Proxy):
    """After ``x += y`` all names of ``x`` are the sum; ``torch.fx`` computes another value."""

    def _in_place(self, operation: Any, other: Any) -> torch.fx.Proxy:
        # By the name that torch.fx gives the sum.
        name = _NEW[operation].__name__
        self.node = self.tracer.create_proxy("call_function", operation, (self, other), {}, name=name).node
        return self


#: Functions of operators -> the methods that PyTorch calls for them.
_OPERATORS = {"iadd": "add", "imul": "mul", "isub": "sub", "itruediv": "div", "truediv": "div"}
_NEW: dict[Any, Any] = {}
for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul"):
    _operation = getattr(operator, _name)
    _NEW[_operation] = getattr(operator, {"iand": "and_", "ior": "or_"}.get(_name, _name[1:]))
    setattr(_Proxy, f"__{_name}__", lambda self, other, operation=_operation: self._in_place(operation, other))


def _write_sums(model: nn.Module, graph: torch.fx.Graph) -> None:
    """``x += y`` as ``x + y`` where nobody sees ``x`` afterwards: so torch.fx has it, and keys of stores."""
    for node in graph.nodes:
        if node.op == "call_function" and node.target is operator.iadd and _is_new(model, node.args[0]):
            node.target = operator.add


def _is_new(model: nn.Module, value: Any) -> bool:
    """Whether a value is a tensor of its own that only one node reads."""
    if not isinstance(value, torch.fx.Node) or len(value.users) != 1:
        return False
    if value.op == "call_module":
        return isinstance(model.get_submodule(str(value.target)), (nn.Conv2d, nn.BatchNorm2d, nn.Linear))
    if value.op != "call_function":
        return False
    # Frozen, stochastic depth returns what it is given.
    name = getattr(value.target, "__name__", "")
    return value.target in (operator.add, operator.mul) or (
        name == "stochastic_depth" and _is_new(model, value.args[0])
    )


def _is_of_a_library(model: nn.Module) -> bool:
    """Networks that torch.fx is known to trace, of which some compute with sizes: torchvision cuts its own that way."""
    return type(model).__module__.partition(".")[0] in ("torchvision", "timm")


def _called(model: nn.Module, node: torch.fx.Node) -> Any:
    """The layer, or the name of the function, that a node calls; None for what only looks at sizes."""
    if node.op == "call_module":
        return model.get_submodule(str(node.target))
    if not node.op.startswith("call") or node.target in ("size", getattr, operator.getitem):
        return None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    # A function that torch.fx keeps whole; frozen, it calls nothing.
    return None if name == "stochastic_depth" else _OPERATORS.get(name, name.strip("_"))


def _is_lost(model: nn.Module, node: torch.fx.Node) -> bool:
    """Whether an operation in place would go with the dead code, because only its input is read afterwards."""
    if node.users:
        return False
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op.startswith("call") and (name.endswith("_") or name == "setitem" or bool(node.kwargs.get("inplace")))


class _Stop(BaseException):
    """Carries the output of a layer out of ``forward``, past its own ``except Exception``."""

    def __init__(self, output: Any) -> None:
        self.output = output


class _Until(nn.Module):
    """Runs a model and stops behind one of its layers."""

    def __init__(self, model: nn.Module, layer: str) -> None:
        super().__init__()
        self.model = model
        self.layer = layer

    def forward(self, x: torch.Tensor) -> Any:
        def stop(module: nn.Module, inputs: Any, output: Any) -> None:
            raise _Stop(output)

        handle = self.model.get_submodule(self.layer).register_forward_hook(stop)
        try:
            self.model(x)
        except _Stop as stopped:
            return stopped.output
        finally:
            handle.remove()
        raise RuntimeError(f"forward of {type(self.model).__name__} does not call {self.layer}")
