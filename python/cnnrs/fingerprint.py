"""What an object computes, as a hash: the same in another process, another one when its code or its numbers change."""

from __future__ import annotations

import enum
import functools
import hashlib
import os
import types
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

# Their versions are part of a store's key, so that their code need not be looked at.
_VERSIONED = {"torch", "torchvision", "timm", "PIL", "numpy", "cnnrs", "builtins", "collections", "functools", "enum"}
# What changes while a module is used, and not what it computes in eval mode.
_TRANSIENT = {"training", "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}


class Unidentifiable(Exception):
    """Something in the object cannot be compared with what it was in another process."""


def fingerprint(value: Any) -> str:
    """A hash of everything that shapes what `value` computes: types, code of functions, attributes, tensors.

    Globals that a function reads are not followed.

    Raises:
        Unidentifiable: when part of it is a handle of some other library.
    """
    walk = _Walk()
    walk.add(value)
    return walk.digest.hexdigest()


class _Walk:
    def __init__(self) -> None:
        self.digest = hashlib.blake2b(digest_size=16)
        self.seen: dict[int, int] = {}
        # Temporary objects that are freed would hand their id to the next.
        self.alive: list[Any] = []

    def text(self, *parts: object) -> None:
        for part in parts:
            data = str(part).encode()
            self.digest.update(f"{len(data)}:".encode() + data)

    def add(self, value: Any) -> None:
        if value is None or isinstance(value, (bool, int, float, complex, str)):
            self.text(type(value).__name__, repr(value))
            return
        # Whether two equal constants are one object differs between processes, so these never count as seen.
        if not isinstance(value, (bytes, tuple, enum.Enum, types.CodeType)):
            if id(value) in self.seen:
                self.text("again", self.seen[id(value)])
                return
            self.seen[id(value)] = len(self.seen)
            self.alive.append(value)
        self._add_new(value)

    def _add_new(self, value: Any) -> None:
        if isinstance(value, bytes):
            self.text("bytes", len(value))
            self.digest.update(value)
        elif isinstance(value, enum.Enum):
            self.text("enum", type(value).__qualname__, value.name)
        elif isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format, range, slice)):
            self.text(type(value).__name__, value)
        elif isinstance(value, os.PathLike):
            self.text("path", os.fspath(value))
        elif isinstance(value, torch.Tensor):
            self._tensor(value)
        elif isinstance(value, (np.ndarray, np.generic)):
            self.text("array", value.dtype, value.shape)
            self.digest.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, dict):
            self.text("dict", len(value))
            for key, item in value.items():
                self.add(key)
                self.add(item)
        elif isinstance(value, (list, tuple)):
            self.text(type(value).__name__, len(value))
            self._all(value)
        elif isinstance(value, (set, frozenset)):
            self.text("set", len(value))
            self._all(sorted(value, key=repr))
        elif isinstance(value, nn.Module):
            self._module(value)
        else:
            self._code_or_object(value)

    def _all(self, values: Iterable[Any]) -> None:
        for value in values:
            self.add(value)

    def _tensor(self, tensor: torch.Tensor) -> None:
        if tensor.device.type == "meta" or tensor.layout is not torch.strided:
            raise Unidentifiable(f"a tensor on {tensor.device} with layout {tensor.layout}")
        self.text("tensor", tensor.dtype, tuple(tensor.shape))
        plain = tensor.detach().cpu().contiguous()
        if plain.is_quantized:
            plain = plain.int_repr()
        self.digest.update(plain.flatten().view(torch.uint8).numpy().data)

    def _module(self, module: nn.Module) -> None:
        if type(module).__module__.startswith("torch._dynamo"):
            # torch.compile's wrapper holds handles of this process; it computes what the module does.
            self.add(module._orig_mod)
            return
        self._class(type(module))
        if isinstance(module, torch.fx.GraphModule):
            # Its graph is full of identities; the code says the same.
            self.text(module.code)
        elif isinstance(module, torch.jit.ScriptModule):
            self.text(str(module.inlined_graph))
            self.add({**dict(module.named_parameters()), **dict(module.named_buffers())})
            return
        else:
            for name, value in vars(module).items():
                if name.endswith("_hooks"):
                    # Their keys count all hooks of the process.
                    self._all(value.values() if isinstance(value, dict) else ())
                elif name not in _TRANSIENT and not (name.startswith("_") and value is None):
                    self.text(name)
                    self.add(value)
        self.add({**module._parameters, **module._buffers})
        self.text(*module._modules)
        self._all(module._modules.values())

    def _code_or_object(self, value: Any) -> None:
        if isinstance(value, functools.partial):
            self.text("partial")
            self._all((value.func, value.args, value.keywords))
        elif isinstance(value, types.FunctionType):
            self.text("function", value.__module__, value.__qualname__)
            cells = [_cell(cell) for cell in value.__closure__ or ()]
            self._all((value.__code__, value.__defaults__, value.__kwdefaults__, cells))
        elif isinstance(value, types.MethodType):
            self.text("method")
            self._all((value.__func__, value.__self__))
        elif isinstance(value, types.CodeType):
            self.text("code", *value.co_names, *value.co_varnames)
            self.digest.update(value.co_code)
            self._all(value.co_consts)
        elif isinstance(value, (types.BuiltinFunctionType, types.ModuleType)):
            self.text("builtin", getattr(value, "__module__", None), value.__name__)
            if isinstance(owner := getattr(value, "__self__", None), torch.Generator):
                self.add(owner)
        elif isinstance(value, type):
            self._class(value)
        elif isinstance(value, torch.Generator):
            self.add(value.get_state())
        else:
            self._object(value)

    def _class(self, kind: type) -> None:
        self.text("class", kind.__module__, kind.__qualname__)
        for base in kind.__mro__:
            if base.__module__.partition(".")[0] in _VERSIONED:
                continue
            for name, value in vars(base).items():
                inner = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
                inner = inner.fget if isinstance(inner, property) else inner
                if isinstance(inner, types.FunctionType) or (not name.startswith("__") and _plain(inner)):
                    self.text(name)
                    self.add(inner)

    def _object(self, value: Any) -> None:
        self._class(type(value))
        state: Any = getattr(value, "__dict__", None)
        if state is None or hasattr(type(value), "__slots__"):
            try:
                state = value.__reduce_ex__(2)[1:3]
            except Exception as error:
                raise Unidentifiable(f"a {type(value).__qualname__}: {error}") from None
        self.add(state)


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return "empty"


def _plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str, bytes, tuple, list, dict))
