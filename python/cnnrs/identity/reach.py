"""What Python code reaches by name: whose it is, the globals it reads, the methods that `forward` can come to."""

from __future__ import annotations

import dis
import enum
import functools
import importlib.metadata
import os
import site
import sys
import sysconfig
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

# Their versions are part of a store's key, so that their code need not be looked at.
VERSIONED = {"torch", "torchvision", "timm", "PIL", "numpy", "cnnrs", "builtins", "collections", "functools", "enum"}
# Called when an object is made, copied or printed, not while it computes: what it leaves in the object is looked at.
_LIFE = {
    "__init__", "__new__", "__del__", "__repr__", "__str__", "__format__", "__dir__", "__getstate__", "__setstate__",
    "__reduce__", "__reduce_ex__", "__copy__", "__deepcopy__", "__init_subclass__", "__class_getitem__", "__set_name__",
}  # fmt: skip
# What Python and its library keep in a class under such names; all others are the user's.
_PYTHONS = {
    "__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__slots__", "__hash__", "__annotations__",
    "__annotate__", "__annotate_func__", "__annotations_cache__", "__conditional_annotations__", "__firstlineno__",
    "__static_attributes__", "__orig_bases__", "__parameters__", "__type_params__", "__classcell__", "__match_args__",
    "__abstractmethods__", "__dataclass_fields__", "__dataclass_params__", "__protocol_attrs__", "__constants__",
    "__non_callable_proto_members__", "__required_keys__", "__optional_keys__", "__total__", "__test__",
}  # fmt: skip
SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType)
# Names under which everybody imports these modules.
_USUAL = {("F", "torch.nn.functional"), ("nn", "torch.nn"), ("np", "numpy")}


def is_versioned(kind: Any) -> bool:
    """Whether a class or function is one whose version is part of the key."""
    return str(getattr(kind, "__module__", "")).partition(".")[0] in VERSIONED


@functools.cache
def package(module: str) -> str | None:
    """The package and its version, of a module that was installed; "" for Python's own and those of the key.

    None for code that is the user's own: a script, a notebook, a package that is worked on.
    """
    root = module.partition(".")[0]
    if root in VERSIONED or (root in sys.stdlib_module_names and root != "__main__"):
        return ""
    found = sys.modules.get(root)
    places = [getattr(found, "__file__", None) or "", *(getattr(found, "__path__", None) or ())]
    if not any(place.startswith(os.path.join(folder, "")) for place in places for folder in _installed()):
        return None
    try:
        return f"{root} {importlib.metadata.version(root)}"
    except importlib.metadata.PackageNotFoundError:
        version = getattr(found, "__version__", None)
        # Without a version its code is all that says what it is.
        return f"{root} {version}" if isinstance(version, str) else None


def _installed() -> list[str]:
    """Folders of installed packages: of this environment, of the system below it, and of the user."""
    folders = [sysconfig.get_paths()[name] for name in ("purelib", "platlib")]
    return [*folders, *site.getsitepackages(), site.getusersitepackages()]


def is_own(kind: Any) -> bool:
    """Whether a class or function is the user's own code."""
    if isinstance(kind, types.BuiltinFunctionType):
        return False
    return package(str(getattr(kind, "__module__", None) or "__main__")) is None


def is_usual(name: str, module: types.ModuleType) -> bool:
    """Whether everybody calls this module so: then the name alone says which it is."""
    return name == module.__name__ or (name, module.__name__) in _USUAL


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """The code of a function and of those inside."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from codes(constant)


@functools.lru_cache(4096)
def globals_of(code: types.CodeType) -> tuple[str, ...]:
    """Names that the code looks up in its module, in the order it does so."""
    found = {
        str(step.argval): None
        for one in codes(code)
        for step in dis.get_instructions(one)
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    return tuple(found)


@functools.lru_cache(4096)
def names_of(code: types.CodeType) -> frozenset[str]:
    """Every name in the code: attributes, globals, and strings, which `getattr` may be given."""
    parts = list(codes(code))
    strings = (text for one in parts for text in one.co_consts if isinstance(text, str))
    return frozenset([*(name for one in parts for name in one.co_names), *strings])


def functions_of(member: Any) -> list[Any]:
    """What is behind a member of a class: the functions of a property or a static method, or the member itself."""
    if isinstance(member, property):
        return [member.fget, member.fset, member.fdel]
    if isinstance(member, (staticmethod, classmethod)):
        return [member.__func__]
    return [member.func] if isinstance(member, functools.cached_property) else [member]


def slots(value: Any) -> list[tuple[str, Any]]:
    """What an object keeps in slots of the user's classes."""
    members = ((name, member, base) for base in type(value).__mro__ for name, member in vars(base).items())
    return [
        (name, getattr(value, name, None))
        for name, member, base in members
        if isinstance(member, types.MemberDescriptorType) and is_own(base)
    ]


def patches(base: type) -> list[tuple[str, types.FunctionType]]:
    """Functions of the user's that were put into a module class of torch's or torchvision's."""
    members = vars(base).items() if issubclass(base, nn.Module) else ()
    functions = [(name, member) for name, member in members if isinstance(member, types.FunctionType)]
    return [(name, one) for name, one in functions if package(str(one.__globals__.get("__name__", "builtins"))) is None]


def is_native(kind: type) -> bool:
    """Whether objects hold something that only C code sees, below their `__dict__`."""
    makers = (vars(base).get("__new__") for base in kind.__mro__ if base is not object)
    return any(isinstance(maker, types.BuiltinFunctionType) for maker in makers)


def is_pythons(name: str, kind: type) -> bool:
    """Whether a class has a member of this name from Python, or from what makes classes, and not from the user."""
    if name.startswith("__"):
        return name in _PYTHONS or name.startswith(("__pydantic_", "__attrs_"))
    return name.startswith("_") and name.endswith("_") and issubclass(kind, enum.Enum)


def is_call(value: Any) -> bool:
    """Whether a member may be what Python calls for an operator."""
    return callable(value) and not isinstance(value, type)


def methods(kind: type) -> list[tuple[str, types.FunctionType]]:
    """The functions of a class, by name."""
    found = ((name, function) for name, member in vars(kind).items() for function in functions_of(member))
    return [(name, function) for name, function in found if isinstance(function, types.FunctionType)]


class Waiting:
    """Methods of objects and classes that were met, until a name or a class in the code that runs says: called.

    Attributes:
        names: every name in functions that are called.
        made: classes of which such functions may make objects.
        around: classes around functions, which these know only by `super()`.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.made: set[type] = set()
        self.around: set[Any] = set()
        self._by_any_name = False
        self._functions: dict[tuple[str, type, types.FunctionType], None] = {}

    def add(self, name: str, kind: type, function: types.FunctionType) -> None:
        """A function that is called when the method `name` of `kind` is."""
        self._functions.setdefault((name, kind, function))

    def use(self, kind: type) -> None:
        """A class that code which is called can take from somewhere."""
        if kind not in self.around:
            self.made.add(kind)

    def call(self, function: types.FunctionType) -> None:
        """A function that is called."""
        self.names |= names_of(function.__code__)
        # By a name that is made while it runs, it may come to all of them.
        self._by_any_name |= is_own(function) and "getattr" in globals_of(function.__code__)

    def called(self) -> list[types.FunctionType]:
        """The functions that are called by now, no longer kept here."""
        found = [one for one in self._functions if self._is_called(*one[:2])]
        for one in found:
            del self._functions[one]
        return [function for _, _, function in found]

    def _is_called(self, name: str, kind: type) -> bool:
        if name in ("__init__", "__new__"):
            return kind in self.made
        return name in self.names or (self._by_any_name and name not in _LIFE)


def reached(kind: type) -> set[str]:
    """Names of the members that `forward`, `__call__` and operators can come to, by any name in their code."""
    members: dict[str, list[types.FunctionType]] = {}
    names = {"forward", "__call__"}
    for base in kind.__mro__:
        if base in (object, nn.Module):
            continue
        for name, member in vars(base).items():
            members.setdefault(name, []).extend(f for f in functions_of(member) if isinstance(f, types.FunctionType))
            if is_own(base) and name.startswith("__") and name not in _LIFE:
                names.add(name)
    todo = [name for name in names if name in members]
    while todo:
        for function in members[todo.pop()]:
            if is_own(function) and "getattr" in globals_of(function.__code__):
                # By a name that is made while it runs, it may come to all of them.
                return set(members)
            new = (names_of(function.__code__) & members.keys()) - names
            names |= new
            todo += new
    return names
