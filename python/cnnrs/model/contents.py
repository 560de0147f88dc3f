"""The contents of everything that a function can reach, to see what it has changed and to put that back."""

from __future__ import annotations

import collections
import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from cnnrs.identity.reach import package

#: Larger containers are watched for their length only, and no more than this many objects are looked at.
_MOST = 10_000
#: Most of what a module holds is of these types.
_WITHOUT_CONTENTS = frozenset({type(None), bool, int, float, str, torch.Tensor, nn.Parameter})
_DICTIONARIES = frozenset({dict, collections.OrderedDict})
_FOREIGN = ("torch", "numpy", "builtins", "collections", "threading", "_thread", "logging", "weakref")


class State:
    """Everything reachable from objects that a function may change: attributes, containers, buffers, generators."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Any, str, Callable[[], bool]]] = {}
        self._classes: set[type] = set()
        #: Dictionaries without entries, as most of a module's are.
        self._empty: list[tuple[dict[Any, Any], str]] = []

    def keep(self, value: Any, where: str, depth: int = 4) -> None:
        """Remember ``value``'s contents, and those of what it holds."""
        todo = [(value, where, depth)]
        while todo and len(self._kept) < _MOST * 10:
            value, where, depth = todo.pop()
            if id(value) in self._kept or depth == 0:
                continue
            if isinstance(value, nn.Module):
                todo.append((vars(value), f"attributes of {type(value).__name__}", 4))
                self._keep_class(type(value))
            elif isinstance(value, tuple):
                todo.extend((entry, where, depth - 1) for entry in value)
            elif put_back := _put_back(value):
                self._kept[id(value)] = (value, where, put_back)
                if isinstance(value, dict):
                    self._add(todo, list(value.values()), where, depth - 1)
                elif isinstance(value, (list, set, collections.deque)) and len(value) <= _MOST:
                    self._add(todo, list(value), where, depth - 1)
            elif isinstance(getattr(value, "__dict__", None), dict) and not _is_foreign(value):
                todo.append((vars(value), where, depth - 1))

    def _add(self, todo: list[tuple[Any, str, int]], entries: list[Any], where: str, depth: int) -> None:
        """What is to be remembered of what something holds; much of it is nothing."""
        for entry in entries:
            kind = type(entry)
            if kind in _DICTIONARIES and not entry:
                self._empty.append((entry, where))
            elif kind not in _WITHOUT_CONTENTS:
                todo.append((entry, where, depth))

    def keep_buffers(self, model: nn.Module) -> None:
        """Remember the numbers in the buffers."""
        for name, buffer in model.named_buffers():
            if not buffer.is_meta and not buffer.is_inference():
                self._kept[id(buffer)] = (buffer, f"buffer {name}", _put_back_tensor(buffer))

    def keep_name(self, names: dict[str, Any], name: str, where: str) -> None:
        """Remember one entry of a namespace, and what it holds."""
        value = names[name]
        if isinstance(value, types.ModuleType):
            # Installed packages keep caches, and are what they are.
            if package(value.__name__) is None:
                self.keep(vars(value), f"module {value.__name__}", 2)
        elif isinstance(value, type):
            self._keep_class(value)
        elif isinstance(value, types.FunctionType):
            self.keep(vars(value), f"function {value.__name__}")
        elif not isinstance(value, types.BuiltinFunctionType):
            self.keep(value, where)

    def changed(self) -> list[str]:
        """Whose contents are others now, one name each; they are put back."""
        filled = [(entry, where) for entry, where in self._empty if entry]
        for entry, _ in filled:
            entry.clear()
        changed = {where for _, where, put_back in self._kept.values() if put_back()}
        return sorted(changed.union(where for _, where in filled))

    def _keep_class(self, cls: type) -> None:
        for base in cls.__mro__:
            if base in self._classes or base.__module__.partition(".")[0] in _FOREIGN:
                continue
            self._classes.add(base)
            self._kept[id(base)] = (base, f"class {base.__name__}", _put_back_class(base))
            for value in vars(base).values():
                if isinstance(value, (dict, list, set)):
                    self.keep(value, f"class {base.__name__}")


def _is_foreign(value: Any) -> bool:
    callable_ = isinstance(value, (type, types.ModuleType, types.FunctionType, types.MethodType))
    return callable_ or type(value).__module__.partition(".")[0] in _FOREIGN


def _put_back(value: Any) -> Callable[[], bool] | None:
    """What puts the contents of ``value`` back, and says whether it had to; None for what has no contents."""
    if isinstance(value, dict):
        return _put_back_dict(value)
    if isinstance(value, (list, collections.deque, bytearray)):
        return _put_back_sequence(value)
    if isinstance(value, set):
        return _put_back_set(value)
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return _put_back_state(value.getstate, value.setstate)
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        drawn = bits.state
        return _put_back_state(lambda: repr(bits.state), lambda _: setattr(bits, "state", drawn))
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return _put_back_state(lambda: value.get_state().numpy().tobytes(), lambda _: value.set_state(state))
    if isinstance(value, np.ndarray) and value.size <= _MOST and not value.dtype.hasobject:
        before = value.copy()
        return _put_back_state(value.tobytes, lambda _: np.copyto(value, before))
    return None


def _put_back_dict(value: dict[Any, Any]) -> Callable[[], bool]:
    before = dict.copy(value)

    def put_back() -> bool:
        same = len(value) == len(before) and all(
            a is b and x is y for (a, x), (b, y) in zip(dict.items(value), before.items(), strict=True)
        )
        if not same:
            dict.clear(value)
            dict.update(value, before)
        return not same

    return put_back


def _put_back_sequence(value: Any) -> Callable[[], bool]:
    length = len(value)
    if length > _MOST:
        return lambda: len(value) != length
    before = list(value)

    def put_back() -> bool:
        same = len(value) == len(before) and all(a is b for a, b in zip(value, before, strict=True))
        if not same:
            value.clear()
            value.extend(before)
        return not same

    return put_back


def _put_back_set(value: set[Any]) -> Callable[[], bool]:
    before = set(value)

    def put_back() -> bool:
        same = value == before
        if not same:
            value.clear()
            value.update(before)
        return not same

    return put_back


def _put_back_state(get: Callable[[], Any], put: Callable[[Any], object]) -> Callable[[], bool]:
    before = get()

    def put_back() -> bool:
        same = bool(get() == before)
        if not same:
            put(before)
        return not same

    return put_back


def _put_back_tensor(tensor: torch.Tensor) -> Callable[[], bool]:
    before = tensor.detach().clone()

    def put_back() -> bool:
        same = torch.equal(tensor, before) or torch.allclose(tensor, before, rtol=0.0, atol=0.0, equal_nan=True)
        if not same:
            with torch.no_grad():
                tensor.copy_(before)
        return not same

    return put_back


def _put_back_class(cls: type) -> Callable[[], bool]:
    before = dict(vars(cls))

    def put_back() -> bool:
        now = dict(vars(cls))
        changed = [name for name in {*now, *before} if now.get(name, before) is not before.get(name, now)]
        for name in changed:
            if name in before:
                setattr(cls, name, before[name])
            else:
                delattr(cls, name)
        return bool(changed)

    return put_back
