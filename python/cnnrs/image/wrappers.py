"""Objects of the user that only apply other transforms, as the presets of torchvision's training references do."""

from __future__ import annotations

from types import CodeType, FunctionType
from typing import Any

import torch


class _Templates:
    """What such a ``__call__`` or ``forward`` does, by whatever names; compared as the interpreter's instructions."""

    steps: Any

    def whole(self, image):  # type: ignore[no-untyped-def]
        return self.steps(image)

    def named(self, image):  # type: ignore[no-untyped-def]
        image = self.steps(image)
        return image

    def other(self, image):  # type: ignore[no-untyped-def]
        result = self.steps(image)
        return result

    def each(self, image):  # type: ignore[no-untyped-def]
        for step in self.steps:
            image = step(image)
        return image


def _shape(code: CodeType) -> tuple[Any, ...]:
    counts = code.co_argcount, code.co_kwonlyargcount, code.co_nlocals, len(code.co_names), code.co_flags & 0x0C
    return code.co_code, counts, code.co_freevars, code.co_cellvars


_ONE = {_shape(one.__code__) for one in (_Templates.whole, _Templates.named, _Templates.other)}
_EACH = _shape(_Templates.each.__code__)


def wrapped(step: Any) -> list[Any] | None:
    """The transforms that ``step`` applies one after the other and does nothing else, or None."""
    kind = type(step)
    if isinstance(step, torch.nn.Module):
        hooked = step._forward_hooks or step._forward_pre_hooks or "forward" in step.__dict__
        plain = kind.__call__ is torch.nn.Module.__call__ and kind.__getattr__ is torch.nn.Module.__getattr__
        function, held = (None if hooked or not plain else kind.forward), {**step.__dict__, **step._modules}
    else:
        called = next((vars(base)["__call__"] for base in kind.__mro__ if "__call__" in vars(base)), None)
        function, held = (None if hasattr(kind, "__getattr__") else called), getattr(step, "__dict__", {})
    if not isinstance(function, FunctionType) or kind.__getattribute__ is not _getattribute(kind):
        return None
    code = function.__code__
    name = code.co_names[0] if code.co_names else ""
    # An attribute of the object itself, and not a method or a property, which may do anything.
    if name not in held or hasattr(kind, name):
        return None
    inner = held[name]
    if _shape(code) in _ONE:
        return [inner] if callable(inner) else None
    is_list = isinstance(inner, (list, tuple, torch.nn.ModuleList, torch.nn.Sequential))
    return list(inner) if _shape(code) == _EACH and is_list else None


def _getattribute(kind: type) -> Any:
    return torch.nn.Module.__getattribute__ if issubclass(kind, torch.nn.Module) else object.__getattribute__
