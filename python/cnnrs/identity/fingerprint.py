"""What an object computes, as a hash: the same in another process, another one when its code or its numbers change."""

from __future__ import annotations

import copyreg
import enum
import functools
import hashlib
import logging
import os
import types
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.fx
from torch import nn

from cnnrs.identity import reach, scripted

# What changes while a module is used, and not what it computes in eval mode.
_TRANSIENT = {"training", "train", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
# Which of a module's hooks have an option: by numbers that count all hooks of the process.
_MARKS = {
    "_forward_hooks_with_kwargs": "_forward_hooks",
    "_forward_hooks_always_called": "_forward_hooks",
    "_forward_pre_hooks_with_kwargs": "_forward_pre_hooks",
}
_NUMBERS = (bool, int, float, complex, str)
# What can be part of a model, a transform or a data set, by its module's first name: stores keep their keys.
_NAMED = {
    "cnnrs.classifier.heads": "cnnrs.heads",
    "cnnrs.data.feature_dataset": "cnnrs.feature_dataset",
    "cnnrs.data.folder": "cnnrs.folder",
    "cnnrs.data.image_list": "cnnrs.folder",
    "cnnrs.data.mnist": "cnnrs.mnist",
    "cnnrs.features.features": "cnnrs.features",
    "cnnrs.model.backbone": "cnnrs.backbones",
    "cnnrs.model.cut": "cnnrs.backbones",
    "cnnrs.model.weights": "cnnrs.weights",
}


class Unidentifiable(Exception):
    """Something in the object cannot be compared with what it was in another process."""


def fingerprint(value: Any) -> str:
    """A hash of everything that shapes what `value` computes: types, code of functions, attributes, tensors, globals.

    Of installed packages the version counts, not the code of every function. Files and environment variables that the
    code reads are not looked at.

    Raises:
        Unidentifiable: when part of it is a handle of some other library, or cannot be looked into.
    """
    walk = _Walk()
    try:
        walk.add(value)
        walk.follow()
    except Unidentifiable:
        raise
    except Exception as error:
        # Whatever it is, nothing can be said about it; an error here must not stop what only wanted to compare.
        raise Unidentifiable(f"something that cannot be looked into ({type(error).__name__}: {error})") from error
    return walk.digest.hexdigest()


def _module_of(value: Any) -> Any:
    return _NAMED.get(value.__module__, value.__module__)


class _Walk:
    def __init__(self) -> None:
        self.digest = hashlib.blake2b(digest_size=16)
        self.seen: dict[int, int] = {}
        # Temporary objects that are freed would hand their id to the next.
        self.alive: list[Any] = []
        # Functions that may be called, whose globals are still to be looked at.
        self.functions: dict[types.FunctionType, None] = {}
        # The method of the user's that is looked at, while nothing says that it is called.
        self.method: tuple[str, type] | None = None
        self.waiting = reach.Waiting()
        self.packages: set[str] = set()
        self.reached: dict[type, set[str]] = {}

    def text(self, *parts: object) -> None:
        for part in parts:
            data = str(part).encode("utf-8", "surrogatepass")
            self.digest.update(f"{len(data)}:".encode() + data)

    def add(self, value: Any) -> None:
        if isinstance(value, types.FunctionType):
            self._meet(value)
        elif isinstance(value, type) and self.method is None:
            self.waiting.use(value)
        elif isinstance(value, str) and self.method is None:
            # What `operator.methodcaller` and the like were given.
            self.waiting.names.add(value)
        if value is None or isinstance(value, _NUMBERS):
            self._number(value)
            return
        # Whether two equal constants are one object differs between processes, so these never count as seen.
        if not isinstance(value, (bytes, tuple, enum.Enum, types.CodeType)):
            if id(value) in self.seen:
                self.text("again", self.seen[id(value)])
                return
            self.seen[id(value)] = len(self.seen)
            self.alive.append(value)
        self._add_new(value)

    def follow(self) -> None:
        """The globals of all functions that were met, and of those that these come to."""
        done: set[types.FunctionType] = set()
        while todo := [function for function in self.functions if function not in done]:
            for function in todo:
                done.add(function)
                self.waiting.call(function)
                # Looked at already, perhaps as part of a method that nothing calls.
                for cell in map(_cell, function.__closure__ or ()):
                    if isinstance(cell, types.FunctionType):
                        self.functions.setdefault(cell)
                name = reach.package(str(function.__globals__.get("__name__", "builtins")))
                if name is None:
                    self._globals(function)
                else:
                    self.packages.add(name)
            # A name in any code may be that of a method of any object that was met.
            for function in self.waiting.called():
                self.functions.setdefault(function)
        if self.packages - {""}:
            self.text("packages", *sorted(self.packages - {""}))

    def _meet(self, function: types.FunctionType) -> None:
        if self.method is None:
            self.functions.setdefault(function)
        else:
            self.waiting.add(*self.method, function)

    # -- values ----------------------------------------------------------------------------------------------

    def _number(self, value: Any) -> None:
        self.text(type(value).__name__, repr(value))
        if value is None or type(value) in _NUMBERS or reach.is_versioned(type(value)):
            return
        if isinstance(value, enum.Enum):
            self._enum(value)
            return
        self.text(*(kind.__repr__(value) for kind in _NUMBERS if isinstance(value, kind)))
        self._own(value)

    def _enum(self, value: enum.Enum) -> None:
        self.text("enum", type(value).__qualname__, value.name)
        if not reach.is_versioned(type(value)):
            self._kind(value)
            self.add(value.value)

    def _add_new(self, value: Any) -> None:
        if isinstance(value, bytes):
            self.text("bytes", len(value))
            self.digest.update(value)
        elif isinstance(value, enum.Enum):
            self._enum(value)
        elif isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format, range, slice)):
            self.text(type(value).__name__, value)
        elif isinstance(value, os.PathLike):
            self.text("path", os.fspath(value))
        elif isinstance(value, torch.Tensor):
            self._tensor(value)
        elif isinstance(value, (np.ndarray, np.generic)):
            self._array(value)
        elif isinstance(value, (dict, list, tuple, set, frozenset)):
            self._container(value)
        elif isinstance(value, nn.Module):
            self._module(value)
        else:
            self._code_or_object(value)

    def _all(self, values: Iterable[Any]) -> None:
        for value in values:
            self.add(value)

    def _container(self, value: Any) -> None:
        # By the built-in's own functions: a subclass may show something else than it holds.
        if isinstance(value, dict):
            self.text("dict", dict.__len__(value))
            for key, item in dict.items(value):
                self.add(key)
                self.add(item)
            if isinstance(value, defaultdict):
                self.add(value.default_factory)
        elif isinstance(value, (list, tuple)):
            kind = list if isinstance(value, list) else tuple
            self.text(type(value).__name__, kind.__len__(value))  # type: ignore[arg-type]
            self._all(kind.__iter__(value))  # type: ignore[arg-type]
        else:
            self.text("set", len(value))
            plain = all(isinstance(one, (*_NUMBERS, bytes, type(None))) for one in value)
            # What other things print as may be their address.
            self._all(sorted(value, key=repr) if plain else sorted(map(fingerprint, value)))
        if type(value) not in (dict, list, tuple, set, frozenset):
            self._own(value)

    def _kind(self, value: Any) -> None:
        made = type(value) in self.waiting.made
        self.add(type(value))
        if not made:
            # This object is there; nothing says that another one is made.
            self.waiting.made.discard(type(value))

    def _own(self, value: Any) -> None:
        """What a class of the user's adds to a kind of value that is known."""
        if reach.is_versioned(type(value)):
            return
        self._kind(value)
        if state := getattr(value, "__dict__", None):
            self.add(dict(state))
        self._all(reach.slots(value))

    def _tensor(self, tensor: torch.Tensor) -> None:
        if torch.nn.parameter.is_lazy(tensor) or tensor.device.type == "meta" or tensor.layout is not torch.strided:
            state = "without a shape" if torch.nn.parameter.is_lazy(tensor) else f"with layout {tensor.layout}"
            raise Unidentifiable(f"a tensor on {tensor.device} {state}")
        self.text("tensor", tensor.dtype, tuple(tensor.shape))
        plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        if plain.is_quantized:
            if plain.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
                self._all((plain.q_scale(), plain.q_zero_point()))
            else:
                self._all((plain.q_per_channel_scales(), plain.q_per_channel_zero_points(), plain.q_per_channel_axis()))
            plain = plain.int_repr()
        self.digest.update(plain.flatten().view(torch.uint8).numpy().data)
        if type(tensor) is not torch.Tensor and not reach.is_versioned(type(tensor)):
            self._own(tensor)
        # torch.compile leaves notes of its own on parameters.
        elif notes := {name: one for name, one in tensor.__dict__.items() if not name.startswith("_")}:
            self.add(notes)

    def _array(self, value: Any) -> None:
        self.text("array", value.dtype, value.shape)
        if value.dtype.hasobject or (isinstance(value, np.ndarray) and type(value) is not np.ndarray):
            # References, or a mask beside the numbers.
            self._kind(value)
            self.add(value.__reduce__()[2] if not value.dtype.hasobject else value.tolist())
            return
        self.digest.update(np.ascontiguousarray(value).tobytes())

    # -- modules ---------------------------------------------------------------------------------------------

    def _module(self, module: nn.Module) -> None:
        if type(module).__module__.startswith("torch._dynamo"):
            # torch.compile's wrapper holds handles of this process; it computes what the module does.
            self.add(module._orig_mod)
            self._hooks(module)
            return
        self._class(type(module))
        if isinstance(module, torch.jit.ScriptModule):
            self.text(scripted.text(module.inlined_graph))
            self.add({**dict(module.named_parameters()), **dict(module.named_buffers())})
            self._all(scripted.constants(module))
            return
        if isinstance(module, torch.fx.GraphModule):
            # Its graph is full of identities; the code says the same, but not whose the functions are.
            self.text(module.code)
            self._all(
                node.target for node in module.graph.nodes if node.op == "call_function" and reach.is_own(node.target)
            )
            self._hooks(module)
            if "forward" in vars(module):
                self.add(module.forward)
        else:
            self._attributes(module)
        self.add({**module._parameters, **module._buffers})
        self.text(*module._modules)
        self._all(module._modules.values())

    def _attributes(self, module: nn.Module) -> None:
        for name, value in vars(module).items():
            if name.endswith("_hooks"):
                # Their keys count all hooks of the process.
                if isinstance(value, dict) and value:
                    self._all(value.values())
                    self.text(name)
            elif name in _MARKS and value:
                hooks = list(getattr(module, _MARKS[name]))
                self.text(name, *(hooks.index(number) for number in value if number in hooks))
            elif name not in _TRANSIENT and not (name.startswith("_") and value is None):
                self.text(name)
                self.add(value)
        self._all(reach.slots(module))

    def _hooks(self, module: nn.Module) -> None:
        for name, value in vars(module).items():
            if name.endswith("_hooks") and isinstance(value, dict) and value:
                self.text(name)
                self._all(value.values())

    # -- code ------------------------------------------------------------------------------------------------

    def _code_or_object(self, value: Any) -> None:
        if isinstance(value, functools.partial):
            self.text("partial")
            self._all((value.func, value.args, value.keywords))
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self.text("method")
            self._all((value.__func__, value.__self__))
        elif isinstance(value, types.CodeType):
            self.text("code", *value.co_names, *value.co_varnames)
            self.digest.update(value.co_code)
            self._all(value.co_consts)
        elif isinstance(value, types.ModuleType) and reach.package(value.__name__) is None:
            raise Unidentifiable(
                f"the module {value.__name__} in an attribute, so that any of its functions may be called"
            )
        elif isinstance(value, (types.BuiltinFunctionType, types.ModuleType)):
            self._builtin(value)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, torch.Generator):
            self.add(value.get_state())
        elif isinstance(value, (np.ufunc, torch._ops.OpOverload, torch._ops.OpOverloadPacket, logging.Logger)):
            self.text(type(value).__name__, value)
        elif type(value).__module__ == "typing":
            self.text("typing", repr(value))
        elif isinstance(value, torch.jit.ScriptFunction):
            self.text("scripted", scripted.text(value.inlined_graph))
            self._all(scripted.tensors(value.inlined_graph))
        else:
            self._object(value)

    def _function(self, value: types.FunctionType) -> None:
        original = getattr(value, "_torchdynamo_orig_callable", None)
        if original is not None:
            self.add(original)
            return
        self.text("function", _module_of(value), value.__qualname__)
        cells = [_cell(cell) for cell in value.__closure__ or ()]
        # `super()` has it, which makes no object.
        self.waiting.around.update(
            cell for name, cell in zip(value.__code__.co_freevars, cells, strict=True) if name == "__class__"
        )
        self._all((value.__code__, value.__defaults__, value.__kwdefaults__, cells))
        # A decorator's function has the one it wraps in its closure too.
        state = {name: one for name, one in vars(value).items() if all(one is not cell for cell in cells)}
        if state and reach.is_own(value):
            self.add(state)

    def _globals(self, function: types.FunctionType) -> None:
        for name in reach.globals_of(function.__code__):
            if name not in function.__globals__:
                # Built in, or an error when it is called.
                continue
            value = function.__globals__[name]
            if isinstance(value, types.ModuleType):
                self._imported(name, value, reach.names_of(function.__code__), ())
            else:
                self.text("global", name)
                self.add(value)
                if isinstance(value, type):
                    self.waiting.made.add(value)

    def _imported(
        self, name: str, module: types.ModuleType, names: frozenset[str], above: tuple[types.ModuleType, ...]
    ) -> None:
        """What code that has these names in it may take out of a module."""
        if reach.package(module.__name__) is not None:
            self.packages.add(reach.package(module.__name__) or "")
            if not reach.is_usual(name, module):
                self.text("global", name, module.__name__)
            return
        self.text("module", name, module.__name__)
        for inner in sorted(names & vars(module).keys()):
            value = vars(module)[inner]
            if not isinstance(value, types.ModuleType):
                self.text(inner)
                self.add(value)
            elif value not in above:
                self._imported(inner, value, names, (*above, module))

    def _builtin(self, value: Any) -> None:
        self.text("builtin", getattr(value, "__module__", None), value.__name__)
        owner = getattr(value, "__self__", None)
        if isinstance(owner, type):
            if not owner.__module__.startswith("torch"):
                self.text(owner.__module__, owner.__qualname__)
        elif owner is not None and not isinstance(owner, types.ModuleType):
            self.add(owner)

    def _class(self, kind: type) -> None:
        self.text("class", _module_of(kind), kind.__qualname__)
        for base in kind.__mro__:
            if reach.is_versioned(base):
                for name, function in reach.patches(base):
                    self.text("patched", name)
                    self.add(function)
                # Whose methods the user's class has: most have nn.Module's, which says nothing.
                if not reach.is_versioned(kind) and base not in (object, nn.Module):
                    self.text("base", _module_of(base), base.__qualname__)
                    # They may come to methods of the user's class.
                    for name, function in reach.methods(base):
                        self.waiting.add(name, kind, function)
                continue
            if kind not in self.reached:
                self.reached[kind] = reach.reached(kind)
            own = reach.is_own(base)
            if not own:
                self.packages.add(reach.package(base.__module__) or "")
            for name, member in vars(base).items():
                self._member(name, member, kind, own)

    def _member(self, name: str, member: Any, kind: type, own: bool) -> None:
        first, *others = reach.functions_of(member)
        function = isinstance(first, types.FunctionType)
        special = reach.is_pythons(name, kind)
        if not own and isinstance(member, functools.cached_property):
            return
        plain = not (name.startswith("__") if not own else special) and isinstance(first, _PLAIN)
        # Of other people's classes functions and plain numbers are enough: their versions say the rest.
        hidden = (
            not own or isinstance(first, reach.SLOTS) or (special and not reach.is_call(first)) or name == "_abc_impl"
        )
        if not function and not plain and hidden:
            return
        before, self.method = self.method, None if name in self.reached[kind] else (name, kind)
        self.text(name)
        self.add(first)
        if own:
            self._all(other for other in others if other is not None)
        self.method = before

    def _object(self, value: Any) -> None:
        kind = type(value)
        self._class(kind)
        state: Any = getattr(value, "__dict__", None)
        cached = isinstance(value, functools._lru_cache_wrapper)
        if state is not None and not hasattr(kind, "__slots__") and (cached or not reach.is_native(kind)):
            self.add(state)
            return
        try:
            reducer = copyreg.dispatch_table.get(kind)
            reduced = value.__reduce_ex__(2) if reducer is None else reducer(value)
        except Exception as error:
            raise Unidentifiable(f"a {kind.__qualname__}: {error}") from None
        if isinstance(reduced, str):
            self.text(kind.__module__, reduced)
            return
        self.add(reduced[1:3])
        if reduced[0] not in (copyreg.__newobj__, kind):  # type: ignore[attr-defined]
            self.add(reduced[0])
        # Members of containers that are none of the built-in ones.
        self._all(list(items) for items in reduced[3:5] if items is not None)
        self._all(reach.slots(value))


_PLAIN = (bool, int, float, str, bytes, tuple, list, dict)


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return "empty"
