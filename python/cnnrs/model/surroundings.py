"""What surrounds the calls that ``forward`` makes: contexts, random numbers, state of its own, the world outside.

Looking at a model runs ``forward``. What it changes is put back, and a ``forward`` that changes or depends on anything
but its argument and its layers is not taken apart: its result is not the same for every batch.
"""

from __future__ import annotations

import builtins
import dis
import gc
import io
import os
import random
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cnnrs._util.generators import Generators
from cnnrs._util.precision import precisions
from cnnrs.model.contents import State

# -- contexts ------------------------------------------------------------------------------------------------


def _saved_tensors_hooks() -> Any:
    hooks: Any = torch._C._autograd
    if not hooks._saved_tensors_hooks_is_enabled():
        return "disabled"
    if hasattr(hooks, "_top_saved_tensors_default_hooks"):
        return hooks._top_saved_tensors_default_hooks(True)
    # Before torch 2.6 nothing says which they are; to disable them is refused where there are any.
    try:
        hooks._saved_tensors_hooks_disable("")
    except RuntimeError:
        return "there are some"
    finally:
        hooks._saved_tensors_hooks_enable()
    return None


def _stream() -> Any:
    return torch.cuda.current_stream() if _has_cuda() else None


def _has_cuda() -> bool:
    """Whether this process uses CUDA; asking does not begin it."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


_OF_GRADIENTS: dict[str, Callable[[], Any]] = {
    "grad mode": torch.is_grad_enabled,
    "inference mode": torch.is_inference_mode_enabled,
    "hooks of saved tensors": _saved_tensors_hooks,
    "anomaly mode": torch.is_anomaly_enabled,
}
_OF_NUMBERS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: [
        (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)
        for kind in ("cpu", "cuda")
    ],
    "default dtype": torch.get_default_dtype,
    "choice of deterministic algorithms": torch.are_deterministic_algorithms_enabled,
    "precision of float32": precisions,
    "choice of oneDNN": torch._C._get_mkldnn_enabled,
    "choice of cuDNN": lambda: (
        torch._C._get_cudnn_enabled(), torch._C._get_cudnn_benchmark(), torch._C._get_cudnn_deterministic(),
    ),
    "number of threads": torch.get_num_threads,
    "torch dispatch mode": torch._C._len_torch_dispatch_stack,
    "CUDA stream": _stream,
}  # fmt: skip


class Contexts:
    """The contexts that are open now.

    Args:
        gradients: those that matter only where results are differentiated count too.
    """

    def __init__(self, gradients: bool) -> None:
        self._asked = {**_OF_NUMBERS, **(_OF_GRADIENTS if gradients else {})}
        self._before = {name: ask() for name, ask in self._asked.items()}
        self._grad, self._dtype = torch.is_grad_enabled(), torch.get_default_dtype()
        self._threads = torch.get_num_threads()

    def changed(self) -> str | None:
        """The first that is another now."""
        for name, ask in self._asked.items():
            if ask() != self._before[name]:
                return name
        return None

    def restore(self) -> None:
        """Those that can be set without a context."""
        torch.set_grad_enabled(self._grad)
        torch.set_default_dtype(self._dtype)
        torch.set_num_threads(self._threads)


# -- the world outside ---------------------------------------------------------------------------------------

_LIBRARY = (sysconfig.get_paths()["stdlib"], "<frozen")
_SITE = (sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"])
_OURS = (
    *(os.path.dirname(os.path.abspath(path)) + os.sep for path in (__file__, torch.__file__)),
    "<frozen importlib",
)
#: Where generators are saved, set and put back: what is drawn in between leaves no trace.
_GENERATORS = torch.random.__file__
_CLOCKS_AND_SYSTEM = frozenset({"time", "posix", "nt", "_io", "_socket", "_datetime", "datetime"})
_STORES = frozenset(dis.opmap[name] for name in ("STORE_GLOBAL", "DELETE_GLOBAL"))
_STORE_DEREF = dis.opmap["STORE_DEREF"]


def _is_outside(function: Any) -> bool:
    """Whether what a built-in function returns depends on more than its arguments, or whether it writes somewhere."""
    if function in (builtins.print, builtins.input, builtins.open):
        return True
    owner = getattr(function, "__self__", None)
    if isinstance(owner, (random.Random, torch.Generator, io.IOBase)):
        return True
    if isinstance(owner, type) and owner.__module__ == "datetime":
        return function.__name__ in ("now", "utcnow", "today")
    module = owner.__name__ if isinstance(owner, types.ModuleType) else getattr(function, "__module__", None)
    return module in _CLOCKS_AND_SYSTEM and getattr(function, "__name__", "") != "fspath"


class Watch:
    """Sees the functions that ``forward`` calls, before they run.

    Args:
        state: gets what they name, globals and variables of enclosing functions.
        stop: makes the exception for what may not run.
    """

    def __init__(self, state: State, stop: Callable[[str], Exception]) -> None:
        self._state = state
        self._stop = stop
        self._ours: dict[types.CodeType, bool] = {}
        self._known: set[types.CodeType] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Not where a profiler is at work: there is one place for both."""
        if sys.getprofile() is not None:
            yield
            return
        # What the garbage collector calls is not forward's.
        collects = gc.isenabled()
        gc.disable()
        sys.setprofile(self._event)
        try:
            yield
        finally:
            sys.setprofile(None)
            if collects:
                gc.enable()

    def _event(self, frame: types.FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        ours = self._ours.get(code)
        if ours is None:
            if code.co_filename == _GENERATORS and event == "call":
                raise self._stop(f"forward calls {code.co_name}(), on which random numbers depend")
            ours = self._ours[code] = code.co_filename.startswith(_OURS)
        if ours:
            return
        if event == "c_call":
            if _is_outside(argument):
                name = getattr(argument, "__qualname__", str(argument))
                raise self._stop(f"forward calls {name}(), whose result or effect is not the graph's")
        elif event == "call" and code not in self._known:
            self._known.add(code)
            if not code.co_filename.startswith(_LIBRARY) or code.co_filename.startswith(_SITE):
                self._enter(frame, code)

    def _enter(self, frame: types.FrameType, code: types.CodeType) -> None:
        operations = set(code.co_code[::2])
        name = getattr(code, "co_qualname", code.co_name)
        if operations & _STORES:
            raise self._stop(f"forward calls {name}(), which sets global variables")
        enclosing = set(code.co_freevars)
        if enclosing and _STORE_DEREF in operations:
            for instruction in dis.get_instructions(code):
                if instruction.opcode == _STORE_DEREF and instruction.argval in enclosing:
                    raise self._stop(
                        f"forward calls {name}(), which sets {instruction.argval} of an enclosing function"
                    )
        for name in code.co_names:
            if name in frame.f_globals:
                self._state.keep_name(frame.f_globals, name, f"global {name}")
        if enclosing:
            held = frame.f_locals
            # Of Python 3.13 on the keys are a list.
            for name in enclosing.intersection(held):
                self._state.keep_name(held, name, f"variable {name} of an enclosing function")


class unwatched:
    """A context in which only our own code runs: who looks at every call need not look."""

    def __enter__(self) -> None:
        before: Any = sys.getprofile()
        # Nobody else's.
        self._before = before if isinstance(getattr(before, "__self__", None), Watch) else None
        if self._before is not None:
            sys.setprofile(None)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            sys.setprofile(self._before)


class Surroundings:
    """What must be as before when a model has been looked at."""

    def __init__(self, model: nn.Module, stop: Callable[[str], Exception]) -> None:
        self._generators = Generators()
        self._state = State()
        self._state.keep(model, type(model).__name__)
        self._state.keep_buffers(model)
        self._watch = Watch(self._state, stop)

    def watching(self) -> Any:
        """A context in which ``forward`` may run."""
        return self._watch.watching()

    def put_back(self) -> list[str]:
        """What ``forward`` has changed, in words; it is as before now."""
        reasons = []
        if drawn := self._generators.drawn():
            self._generators.put_back()
            whose = " and ".join(f"{name}'s" for name in drawn)
            reasons.append(f"forward draws {whose} random numbers itself")
        if changed := self._state.changed():
            reasons.append(f"forward changes {', '.join(changed)}")
        return reasons
