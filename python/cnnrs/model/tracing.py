"""Record what ``forward`` asks of its argument: the calls in order, on a stand-in that is a real ``torch.Tensor``.

``torch.fx`` records on objects that are no tensors: ``isinstance`` is false, ``+=`` makes a new value. Here the
argument is a tensor without numbers, of a subclass whose every use PyTorch hands over, attributes and operations in
place included; uses of other tensors are handed over by a mode.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cnnrs.model.heads import Heads
from cnnrs.model.operations import Unsupported
from cnnrs.model.rotation import Mixed
from cnnrs.model.shapes import Shape, Size, Sizes
from cnnrs.model.surroundings import Contexts, Surroundings, unwatched

_BLANK = torch.empty((), device="meta")
#: One module class is patched while a model is traced.
_LOCK = threading.RLock()


class Memory:
    """What a tensor and its views share.

    Attributes:
        version: how often it has been overwritten.
        writer: the last operation that overwrote it.
        made_by: the kind of operation that made, or last overwrote, the value.
        read: an operation has read the value; it may keep it for its derivative.
    """

    def __init__(self, made_by: str) -> None:
        self.version = 0
        self.writer = ""
        self.made_by = made_by
        self.read = False

    def overwrite(self, writer: str, kind: str) -> None:
        """A new value in place of the old one."""
        self.version += 1
        self.writer, self.made_by, self.read = writer, kind, False


class Standin(torch.Tensor):
    """A value of the graph while it is traced.

    Attributes:
        node: the node that makes the value; None when the reason why there is none has been given.
        memory: what it shares with its views.
        version: that of the memory which this node stands for.
        copied: it is the node's value in another order of memory, which only some operations behind it may see.
        spread: the sizes to which the node's value has been expanded.
        heads: what has become of the node's value on its way to an attention, or from one; None: it is that value.
        reason: where there is no node, why, if that is to be said only where somebody reads the value.
    """

    recorder: Recorder
    node: int | None
    memory: Memory
    version: int
    copied = False
    spread: list[int | None] | None = None
    heads: Heads | Mixed | None = None
    reason = ""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return torch.Tensor

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Reached where the mode is off, in scripted functions for example.
        found = next(value for value in values((args, kwargs or {})) if isinstance(value, Standin))
        return found.recorder.call(func, args, kwargs or {})


def values(tree: Any) -> Iterator[Any]:
    """The leaves of nested tuples, lists and dicts."""
    if type(tree) in (tuple, list, Sizes):
        for entry in tree:
            yield from values(entry)
    elif type(tree) is dict:
        yield from values(list(tree.values()))
    else:
        yield tree


class Lowering(Protocol):
    """Who turns calls into operations."""

    def call(self, target: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function (or, by name, a method) of at least one stand-in."""

    def sized(self, target: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A function that makes a tensor of the batch's size, of no stand-in."""

    def layer(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """A module that is not walked through."""

    def is_layer(self, module: nn.Module) -> bool:
        """Whether it is not walked through."""

    def unpacked(self, node: int, count: int) -> None:
        """``forward`` goes on only where the value of a node has so many dimensions."""

    def size(self, node: int, dim: int) -> int | None:
        """A size of the value of a node, whatever the batch; None where that is not known."""

    def shape(self, node: int) -> list[int | None] | None:
        """All sizes, None for those that the batch decides; None where samples may have any size."""

    def is_weighted(self, node: int) -> bool:
        """Whether a value, of samples of a known size, comes from a layer that takes its weights' type only."""


class _Unknowing:
    """Who asks nothing of sizes."""

    def unpacked(self, node: int, count: int) -> None:
        """Nobody wants to know."""

    def size(self, node: int, dim: int) -> int | None:
        """Not known."""
        return None

    def shape(self, node: int) -> list[int | None] | None:
        """Not known."""
        return None

    def is_weighted(self, node: int) -> bool:
        """Not known."""
        return False


#: Arguments that run nobody's code when they are read.
_SILENT = frozenset({
    Standin, Size, Shape, torch.Tensor, nn.Parameter, torch.Size, torch.dtype, torch.device, torch.memory_format,
    bool, int, float, str, type(None), type(Ellipsis),
})  # fmt: skip
#: Methods and functions through which a value leaves a tensor for Python.
_LEAVES = frozenset({
    "item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__complex__", "__index__",
    "__contains__", "__iter__", "__reversed__", "__format__", "__repr__", "__dlpack__", "equal", "allclose",
    "is_nonzero", "data_ptr", "storage", "untyped_storage", "_typed_storage",
})  # fmt: skip
#: Questions that have one answer for every batch, which the stand-in does not know.
_QUESTIONS = frozenset({
    "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset", "is_contiguous", "type",
    "is_floating_point", "is_complex", "is_signed", "is_pinned", "is_inference", "get_device", "is_same_size",
    "__len__", "result_type", "can_cast", "retain_grad", "register_hook",
})  # fmt: skip


#: The arguments of ``nn.MultiheadAttention``, in order.
MULTIHEAD = (
    "query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal",
)  # fmt: skip


class Reached(BaseException):
    """What is looked for has been called."""


class Recorder(TorchFunctionMode):
    """Runs ``model`` on a stand-in and hands its calls to ``lowering``.

    Args:
        model: the module.
        lowering: gets the calls.
        gradients: whether the results will be differentiated: contexts and functions that only matter then are
            looked at.

    Attributes:
        reasons: why the calls are not all there is to ``model``.
    """

    def __init__(self, model: nn.Module, lowering: Lowering, gradients: bool) -> None:
        super().__init__()
        self.model = model
        self.lowering = lowering
        self.gradients = gradients
        self.reasons: list[str] = []
        #: Tensors that have been computed without the argument, by id, and those of which they have been.
        self._computed: dict[int, torch.Tensor] = {}
        self.sources: dict[int, torch.Tensor] = {}
        #: Whether all tensors of the model are of one type, once somebody has asked.
        self._alike: bool | None = None

    def run(self) -> Any:
        """What ``model`` returns; anything it raises has become a reason."""
        with _LOCK, ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.gradients))
            self.contexts = Contexts(self.gradients)
            stack.enter_context(self._layers())
            if self.gradients:
                stack.enter_context(self._backward_of_its_own())
            if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
                # A compiled function inside would be compiled for the stand-in. (Before torch 2.6 it is.)
                stack.enter_context(torch.compiler.set_stance("fail_on_recompile"))
            argument = self.value(0, Memory("Input"))
            self.surroundings = Surroundings(self.model, self.stop)
            try:
                with self.surroundings.watching(), self:
                    return self.model(argument)
            except Reached:
                return None
            except Exception as error:
                # Anything may be raised: forward ran on stand-ins for tensors.
                if not self.reasons:
                    self.refuse(f"forward cannot be traced: {type(error).__name__}: {error}")
                return None
            finally:
                if changed := self.contexts.changed():
                    self.refuse(f"forward leaves the {changed} changed")
                    self.contexts.restore()
                for reason in self.surroundings.put_back():
                    self.refuse(reason)
                # A circle, in which the model would wait for the garbage collector.
                del self.surroundings

    def refuse(self, reason: str) -> None:
        """One more reason, which holds whatever ``forward`` does with exceptions."""
        if reason not in self.reasons:
            self.reasons.append(reason)

    def stop(self, reason: str) -> Unsupported:
        """The exception to raise where ``forward`` cannot go on."""
        self.refuse(reason)
        return Unsupported(reason)

    def value(self, node: int | None, memory: Memory) -> Standin:
        """A new tensor object."""
        made: Standin = _BLANK.as_subclass(Standin)
        made.recorder, made.node, made.memory, made.version = self, node, memory, memory.version
        return made

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.call(func, args, kwargs or {})

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One use of tensors."""
        name = getattr(func, "__name__", str(func))
        with torch._C.DisableTorchFunction():
            given = list(values((args, kwargs)))
            found = [value for value in given if isinstance(value, (Standin, Size, Shape))]
            if not found:
                return self._elsewhere(func, name, args, kwargs)
            # What the user's own numbers and sequences do when they are read is seen.
            own = all(type(value) in _SILENT for value in given)
            with unwatched() if own else nullcontext():
                return self._call(func, name, found, args, kwargs)

    def _call(self, func: Any, name: str, found: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not any(isinstance(value, Standin) for value in found):
            return self.lowering.sized(func, name, args, kwargs)
        self._check_contexts()
        if name != "mul" and any(isinstance(value, Standin) and value.spread is not None for value in found):
            raise self.stop(f"forward calls {name}() of a value that has been expanded")
        if name == "__get__":
            return self._attribute(func.__self__.__name__, args[0])
        if name == "__set__":
            raise self.stop(f"forward sets {func.__self__.__name__} of a tensor")
        if name == "size" and isinstance(args[0], Standin):
            return self._size(args[0], *args[1:], **kwargs)
        if name == "__bool__" or name in _LEAVES:
            raise self.stop(f"forward reads the value of a tensor ({name}), by which it may decide")
        if name in ("dim", "ndimension") and isinstance(args[0], Standin):
            shape = self._shape(args[0])
            if shape is not None:
                return len(shape)
        if name in _QUESTIONS:
            raise self.stop(f"forward asks for {name}() of a tensor, which the graph does not keep")
        target = name if getattr(torch.Tensor, name, None) is func else func
        return self.lowering.call(target, name, args, kwargs)

    def _elsewhere(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A use of tensors that do not depend on the argument: computed, unless it changes or reads them."""
        plain = name.split(".")[0]
        overwrites = plain.endswith("_") and not plain.startswith("__") and plain != "_"
        # An operator called by itself (`torch.ops`) says so in its schema.
        overwrites |= bool(getattr(getattr(func, "_schema", None), "is_mutable", False)) or name == "backward"
        if overwrites or name in ("__set__", "__setitem__", "__delitem__") or kwargs.get("out") is not None:
            own = any(isinstance(value, torch.Tensor) for value in values((args, kwargs)))
            if own:
                raise self.stop(f"forward changes a tensor in place ({name}), once per call")
        if name in _LEAVES and any(isinstance(value, torch.Tensor) for value in args):
            raise self.stop(f"forward reads the value of a tensor ({name}), which may be another one at the next batch")
        result = func(*args, **kwargs)
        self.made(result, args, kwargs)
        return result

    def made(self, result: Any, *of: Any) -> None:
        """Tensors that have been computed of others, none of which depends on the argument."""
        tensors = [value for value in values(result) if isinstance(value, torch.Tensor)]
        for value in values(of) if tensors else ():
            if isinstance(value, torch.Tensor) and id(value) not in self._computed:
                self.sources[id(value)] = value
        self._computed |= {id(tensor): tensor for tensor in tensors}

    def has_made(self, value: Any) -> bool:
        """Whether that is such a tensor."""
        return id(value) in self._computed

    def _attribute(self, name: str, x: Standin) -> Any:
        if name == "shape":
            return self._size(x)
        if name == "ndim" and (shape := self._shape(x)) is not None:
            return len(shape)
        if name in ("dtype", "device") and self._is_float32(x):
            return torch.float32 if name == "dtype" else torch.device("cpu")
        raise self.stop(f"forward asks for the {name} of a tensor, which the graph does not keep")

    def _shape(self, x: Standin) -> list[int | None] | None:
        if x.heads is not None:
            return x.heads.sizes
        return None if x.node is None else self.lowering.shape(x.node)

    def _is_float32(self, x: Standin) -> bool:
        """Whether every value of a training is: no operation of the graph makes another type of float32 weights.

        A batch of another type they do not take. Without gradients there may be no weights in front of a value.
        """
        if self._alike is None:
            tensors = [*self.model.parameters(), *self.model.buffers()]
            held = [tensor for tensor in tensors if tensor.is_floating_point()]
            alike = all(tensor.dtype is torch.float32 and tensor.device.type == "cpu" for tensor in held)
            self._alike = bool(held) and alike
        known = self.gradients or (x.node is not None and self.lowering.is_weighted(x.node))
        return known and self._alike and not torch.is_autocast_enabled("cpu")

    def _size(self, x: Standin, dim: int | None = None) -> Any:
        shape = self._shape(x)
        if shape is None:
            return Shape(self, x.node) if dim is None else self.size(x.node, dim)
        # Of heads it is the batch's, wherever that dimension is now.
        sizes = [
            Size(self, x.node, at if x.heads is None else 0) if size is None else size for at, size in enumerate(shape)
        ]
        return Sizes.of(self, sizes) if dim is None else sizes[dim]

    def size(self, node: int | None, dim: int) -> Size | int:
        """One size of a value: a number where every batch has the same."""
        known = None if node is None else self.lowering.size(node, dim)
        return Size(self, node, dim) if known is None else known

    def unpacked(self, node: int | None, count: int) -> None:
        """``forward`` goes on only where a value has so many dimensions."""
        if node is not None:
            self.lowering.unpacked(node, count)

    def _check_contexts(self) -> None:
        if changed := self.contexts.changed():
            raise self.stop(f"forward runs a part with another {changed} than the rest")

    @contextmanager
    def _layers(self) -> Iterator[None]:
        """Calls of layers are recorded as one operation each."""
        before = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            given = (*args, *kwargs.values())
            if type(module) is nn.MultiheadAttention:
                given = _in_order(args, kwargs)
            if not any(isinstance(value, Standin) and value.recorder is self for value in given):
                return before(module, *args, **kwargs)
            if not self.lowering.is_layer(module):
                return before(module, *args, **kwargs)
            with torch._C.DisableTorchFunction(), unwatched():
                self._check_contexts()
                return self.lowering.layer(module, given)

        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = before  # type: ignore[method-assign]

    @contextmanager
    def _backward_of_its_own(self) -> Iterator[None]:
        """Refuses functions with a backward of their own: only their forward would be seen."""
        function: Any = torch.autograd.Function
        before = vars(function)["apply"]

        def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
            if any(isinstance(argument, Standin) for argument in args):
                raise self.stop(f"{cls.__name__} is an autograd.Function, whose backward has no counterpart")
            return before.__get__(None, cls)(*args, **kwargs)

        function.apply = classmethod(apply)
        try:
            yield
        finally:
            function.apply = before


def _in_order(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """All arguments of a call of ``nn.MultiheadAttention``, the defaults of its ``forward`` included."""
    defaults = dict(zip(MULTIHEAD[3:], (None, True, None, True, False), strict=True))
    named = {**defaults, **dict(zip(MULTIHEAD, args, strict=False)), **kwargs}
    return tuple(named.get(name) for name in MULTIHEAD)


class _Anything(_Unknowing):
    """Goes along with all calls, up to that of one module, and writes them down."""

    def __init__(self, model: nn.Module, until: nn.Module) -> None:
        self.until = until
        self.recorder = Recorder(model, self, gradients=False)
        self.called: list[Any] = []

    def call(self, target: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.called.append(name.strip("_"))
        return self.recorder.value(0, Memory(name))

    def sized(self, target: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise self.recorder.stop(f"{name}() makes a tensor of the batch's size")

    def layer(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        self.called.append(module)
        if module is self.until:
            raise Reached
        return self.recorder.value(0, Memory(""))

    def is_layer(self, module: nn.Module) -> bool:
        own = type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)
        return module is self.until or own


def calls_up_to(model: nn.Module, until: nn.Module) -> list[Any] | None:
    """The functions, by name, and layers that ``model`` calls up to its module ``until``.

    Args:
        model: the frozen module.
        until: one of its submodules.

    Returns:
        None where they may not be the same for every batch.
    """
    looking = _Anything(model, until)
    looking.recorder.run()
    return None if looking.recorder.reasons else looking.called


#: Layers and networks whose forward does nothing but compute and, in training, draw.
_PURE = frozenset({"torch", "torchvision", "timm"})


class _Pure(_Unknowing):
    """Goes along with all calls of code that is nobody's library, and stops at those that see how tensors lie."""

    def __init__(self, model: nn.Module) -> None:
        self.recorder = Recorder(model, self, gradients=True)

    def call(self, target: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name.startswith(("as_strided", "set_")):
            raise self.recorder.stop(f"forward calls {name}(), which sees the order of memory")
        return self.recorder.value(0, Memory(name))

    def sized(self, target: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # As many samples in any order of memory; what is drawn is put back.
        return self.recorder.value(0, Memory(name))

    def layer(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        return self.recorder.value(0, Memory(""))

    def is_layer(self, module: nn.Module) -> bool:
        return all(type(part).__module__.partition(".")[0] in _PURE for part in module.modules())


def impurities(model: nn.Module) -> list[str]:
    """Why calling ``model`` once more, or with a batch that lies otherwise in memory, might be noticed."""
    looking = _Pure(model)
    if not looking.is_layer(model):
        looking.recorder.run()
    return looking.recorder.reasons
