"""Models that differ in one thing: `PAIRS[name](which)` makes one of the two, the same each time it is called."""

from __future__ import annotations

import collections
import enum
import functools
import math
import operator
import re
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

PAIRS: dict[str, Callable[[int], Any]] = {}
SCALE: Any = 1.0
TABLE: Any = [1.0]
OPTIONS = types.SimpleNamespace(factor=1.0)


def pair(function: Callable[[int], Any]) -> Callable[[int], Any]:
    PAIRS[function.__name__] = function
    return function


def of_class(**members: Any) -> nn.Module:
    """A module whose class has these members."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.value(x) if callable(self.value) else x * self.value

    return type("Made", (nn.Module,), {"__module__": __name__, "forward": forward, **members})()


class Holds(nn.Module):
    """Has one attribute and uses it."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: torch.Tensor) -> Any:
        return self.value(x) if callable(self.value) else x * self.value


# -- attributes of classes ---------------------------------------------------------------------------------------------

for name, values in {
    "class_tensor": (torch.ones(3), torch.zeros(3)),
    "class_array": (np.ones(3), np.zeros(3)),
    "class_builtin": (torch.relu, torch.sigmoid),
    "class_static_builtin": (staticmethod(math.sin), staticmethod(math.cos)),
    "class_partial": (functools.partial(F.leaky_relu, negative_slope=0.1), functools.partial(F.leaky_relu)),
    "class_module": (nn.ReLU(), nn.Sigmoid()),
    "class_class": (nn.ReLU, nn.Sigmoid),
    "class_none": (None, 1),
    "class_pattern": (re.compile("a"), re.compile("b")),
    "class_set": ({1, 2}, {1, 3}),
    "class_dtype": (torch.float32, torch.float64),
    "class_method_of_another": (Holds(1.0).forward, Holds(2.0).forward),
    "class_lambda": (lambda self, x: x + 1, lambda self, x: x + 2),
    "class_itemgetter": (operator.itemgetter(1), operator.itemgetter(2)),
    "class_namespace": (types.SimpleNamespace(a=1), types.SimpleNamespace(a=2)),
}.items():
    PAIRS[name] = lambda which, values=values: of_class(value=values[which])  # type: ignore[misc]


@pair
def class_partialmethod(which: int) -> Any:
    def scaled(self: Any, x: torch.Tensor, by: float) -> torch.Tensor:
        return x * by

    return of_class(value=functools.partialmethod(scaled, by=float(which)))


@pair
def class_property_getter(which: int) -> Any:
    return of_class(value=property((lambda self: 1.0, lambda self: 2.0)[which]))


@pair
def class_property_setter(which: int) -> Any:
    def plus(self: Any, value: float) -> None:
        self.__dict__["kept"] = value + 1

    def minus(self: Any, value: float) -> None:
        self.__dict__["kept"] = value - 1

    return of_class(value=property(lambda self: 1.0, (plus, minus)[which]))


@pair
def class_cached_property(which: int) -> Any:
    made = functools.cached_property((lambda self: 1.0, lambda self: 2.0)[which])
    made.__set_name__(None, "value")  # type: ignore[arg-type]
    return of_class(value=made)


@pair
def class_callable_dunder(which: int) -> Any:
    return of_class(value=1.0, __matmul__=functools.partial(torch.mul, other=which))


@pair
def class_dunder(which: int) -> Any:
    return of_class(value=1.0, __scale__=which)


@pair
def class_sunder(which: int) -> Any:
    return of_class(value=1.0, _scale_=torch.tensor(which))


@pair
def class_inherits_from_another(which: int) -> Any:
    return type("Act", ((nn.ReLU, nn.Sigmoid)[which],), {"__module__": __name__})()


@pair
def class_of_torch_patched(which: int) -> Any:
    made = type("Own", (nn.Identity,), {"__module__": "torch.nn.modules.own"})
    made.forward = (lambda self, x: x + 1, lambda self, x: x + 2)[which]  # type: ignore[attr-defined]
    return made()


# -- attributes of objects ---------------------------------------------------------------------------------------------


class Kind(enum.Enum):
    A = 1
    B = 2


class Level(int):
    def __repr__(self) -> str:
        return "Level"


class Config(dict):  # type: ignore[type-arg]
    factor = 1.0


class Loud(list):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(())


class Point(NamedTuple):
    x: float


class Slots:
    __slots__ = ("factor",)

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __reduce__(self) -> Any:
        return Slots, (0.0,)


class SlotModule(nn.Module):
    __slots__ = ("factor",)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class Seeded(np.random.RandomState):
    pass


def config(factor: float) -> Config:
    made = Config()
    made.factor = factor
    return made


def enum_of(value: int) -> Any:
    return enum.Enum("Mode", {"A": value}, module=__name__).A  # type: ignore[attr-defined]


def int_enum_of(value: int) -> Any:
    class Size(enum.IntEnum):
        A = 1

        def times(self, x: torch.Tensor) -> torch.Tensor:
            return x

    def twice(self: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    if value:
        Size.times = twice  # type: ignore[method-assign]
    return Size.A


def tagged(value: float) -> torch.Tensor:
    tensor = torch.zeros(2)
    tensor.factor = value  # type: ignore[attr-defined]
    return tensor


def quantized(scale: float) -> torch.Tensor:
    return torch.quantize_per_tensor(torch.tensor([scale, 2 * scale]), scale, 0, torch.qint8)


for name, make in {
    "bound_method": lambda which: Holds((1.0, 2.0)[which]).forward,
    "bound_builtin": lambda which: {1: which}.get,
    "enum_member": lambda which: (Kind.A, Kind.B)[which],
    "enum_value": enum_of,
    "enum_code": int_enum_of,
    "int_subclass": lambda which: Level(which),
    "dict_subclass": lambda which: config(float(which)),
    "list_subclass": lambda which: Loud([which]),
    "named_tuple": lambda which: Point(float(which)),
    "ordered": lambda which: collections.OrderedDict(sorted({"a": 1, "b": 2}.items(), reverse=bool(which))),
    "deque": lambda which: collections.deque([which]),
    "default_factory": lambda which: collections.defaultdict((int, float)[which]),
    "slots": lambda which: Slots(float(which)),
    "c_state": lambda which: Seeded(which),
    "ufunc": lambda which: (np.sin, np.sinh)[which],
    "object_array": lambda which: np.array([{"a": which}], dtype=object),
    "masked_array": lambda which: np.ma.masked_array([1, 2], mask=[0, which]),
    "tensor_attribute": lambda which: tagged(float(which)),
    "quantized_scale": lambda which: quantized((0.5, 0.25)[which]),
    "generator": lambda which: torch.Generator().manual_seed(which),
    "set_of_tuples": lambda which: {(1, which), (2, 3)},
    "overload": lambda which: (torch.ops.aten.sin.default, torch.ops.aten.cos.default)[which],
    "class_method_of_type": lambda which: (dict.fromkeys, collections.Counter.fromkeys)[which],
    "function_attribute": lambda which: with_attribute(which),
    "scripted_function": lambda which: (torch.jit.script(doubled), torch.jit.script(tripled))[which],
}.items():
    PAIRS[name] = lambda which, make=make: Holds(make(which))  # type: ignore[misc]


def with_attribute(which: int) -> Any:
    def scaled(x: torch.Tensor) -> torch.Tensor:
        return x * scaled.by  # type: ignore[attr-defined,no-any-return]

    scaled.by = which  # type: ignore[attr-defined]
    return scaled


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def tripled(x: torch.Tensor) -> torch.Tensor:
    return x * 3


@pair
def slots_of_a_module(which: int) -> Any:
    made = SlotModule()
    made.factor = float(which)
    return made


@pair
def own_forward(which: int) -> Any:
    made = nn.Identity()
    made.forward = (doubled, tripled)[which]  # type: ignore[method-assign,assignment]
    return made


@pair
def closure(which: int) -> Any:
    return Holds(lambda x: x * which)


@pair
def default_argument(which: int) -> Any:
    return Holds(lambda x, by=which: x * by)


@pair
def keyword_default(which: int) -> Any:
    return Holds(lambda x, *, by=which: x * by)


# -- parts of modules --------------------------------------------------------------------------------------------------


@pair
def order_of_a_module_dict(which: int) -> Any:
    layers = {"a": nn.ReLU(), "b": nn.Sigmoid()}
    return nn.ModuleDict(dict(sorted(layers.items(), reverse=bool(which))))


@pair
def parametrization(which: int) -> Any:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", Holds((1.0, 2.0)[which]))
    return layer


@pair
def buffer_that_is_not_saved(which: int) -> Any:
    made = Holds(1.0)
    made.register_buffer("shift", torch.tensor(float(which)), persistent=False)
    return made


@pair
def hook(which: int) -> Any:
    made = Holds(1.0)
    made.register_forward_hook(
        (lambda module, inputs, output: output + 1, lambda module, inputs, output: output)[which]
    )
    return made


@pair
def hook_before_or_after(which: int) -> Any:
    def change(module: nn.Module, inputs: Any, *_: Any) -> Any:
        return inputs

    made = Holds(1.0)
    (made.register_forward_pre_hook, made.register_forward_hook)[which](change)
    return made


@pair
def hook_with_kwargs(which: int) -> Any:
    made = Holds(1.0)
    made.register_forward_hook(lambda *_: None, with_kwargs=bool(which))
    return made


@pair
def hook_of_a_graph(which: int) -> Any:
    made = torch.fx.symbolic_trace(nn.ReLU())
    if which:
        made.register_forward_hook(lambda module, inputs, output: output + 1)
    return made


@pair
def function_in_a_graph(which: int) -> Any:
    graph = torch.fx.Graph()
    function = types.FunctionType((doubled, tripled)[which].__code__, globals(), "scaled")
    graph.output(graph.call_function(function, (graph.placeholder("x"),)))
    return torch.fx.GraphModule(nn.Module(), graph)


@pair
def frozen_script(which: int) -> Any:
    torch.manual_seed(which)
    return torch.jit.freeze(torch.jit.script(nn.Linear(2, 2).eval()))


class Scale(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


@pair
def attribute_of_a_script(which: int) -> Any:
    return torch.jit.script(nn.Sequential(Scale((1.0, 2.0)[which])))


# -- what code reads ---------------------------------------------------------------------------------------------------


class ReadsGlobals(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scaled(x) * TABLE[0] * OPTIONS.factor

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return helper(x)


def helper(x: torch.Tensor) -> torch.Tensor:
    return x * SCALE


def reads(kind: type[nn.Module] = ReadsGlobals, scale: Any = 1.0, table: float = 1.0, factor: float = 1.0) -> nn.Module:
    """A module that reads these globals."""
    globals().update(SCALE=scale, TABLE=[table])
    OPTIONS.factor = factor
    return kind()


PAIRS["global_number_below_two_functions"] = lambda which: reads(scale=float(which))
PAIRS["global_tensor"] = lambda which: reads(scale=torch.full((2,), float(which)))
PAIRS["global_list"] = lambda which: reads(table=float(which))
PAIRS["global_object"] = lambda which: reads(factor=float(which))


@pair
def global_module_of_torch(which: int) -> Any:
    space = {"ops": (torch, torch.nn.functional)[which], "__name__": __name__}
    code = (lambda x: ops.relu(x)).__code__  # type: ignore[name-defined]  # noqa: F821
    return Holds(types.FunctionType(code, space, "used"))


@pair
def function_of_an_own_module(which: int) -> Any:
    own = sys.modules.setdefault("pairs_own", types.ModuleType("pairs_own"))
    own.scaled = (doubled, tripled)[which]  # type: ignore[attr-defined]
    code = (lambda x: pairs_own.scaled(x)).__code__  # type: ignore[name-defined]  # noqa: F821
    return Holds(types.FunctionType(code, {"pairs_own": own, "__name__": __name__}, "used"))


@pair
def own_module_in_an_attribute(which: int) -> Any:
    own = types.ModuleType("pairs_own")
    own.scaled = (doubled, tripled)[which]  # type: ignore[attr-defined]
    return Holds(own)


class ByName(nn.Module):
    """Comes to its methods by names made while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = "a"

    def forward(self, x: torch.Tensor) -> Any:
        return getattr(self, "_" + self.kind)(x)

    def _a(self, x: torch.Tensor) -> torch.Tensor:
        return x * SCALE


@pair
def method_found_by_name(which: int) -> Any:
    return reads(ByName, scale=float(which))


class Helper:
    def run(self, x: torch.Tensor) -> torch.Tensor:
        return x * SCALE

    @property
    def factor(self) -> Any:
        return SCALE

    @staticmethod
    def static(x: torch.Tensor) -> torch.Tensor:
        return x * SCALE


class Reader:
    """Reads a global when it is made."""

    def __init__(self) -> None:
        self.factor = SCALE


class Extracts(nn.Module):
    def extract(self, x: torch.Tensor) -> torch.Tensor:
        return x * SCALE

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


OBJECT = Helper()
CALLER = operator.methodcaller("run", torch.ones(1))


class HasHelper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.helper = Helper()
        self.sub = Extracts()


class OfAHelper(HasHelper):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.helper.run(x)


class OfASubmodule(HasHelper):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.sub.extract(x)


class OfAClass(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Helper.static(x)


class OfAnObjectMadeThere(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Helper().run(x)


class OfAGlobalObject(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return OBJECT.run(x)


class OfAProperty(HasHelper):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.helper.factor


class OfTheMaking(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * Reader().factor


class ByAnyName(HasHelper):
    def forward(self, x: torch.Tensor) -> Any:
        return getattr(self.helper, "r" + "un"[:2])(x)


class ByCaller(HasHelper):
    def forward(self, x: torch.Tensor) -> Any:
        return CALLER(self.helper)


for kind in (
    OfAHelper, OfASubmodule, OfAClass, OfAnObjectMadeThere, OfAGlobalObject, OfAProperty, OfTheMaking, ByAnyName,
    ByCaller,
):  # fmt: skip
    PAIRS[f"global_of_methods_{kind.__name__}"] = lambda which, kind=kind: reads(kind, scale=float(which))  # type: ignore[misc]
