"""The generators that code without one of its own draws from: Python's, NumPy's, PyTorch's and CUDA's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Generators:
    """Their states as they are now, for looking at them again and for putting them back."""

    def __init__(self) -> None:
        self._before = _states()

    def drawn(self) -> list[str]:
        """Whose have moved on since: of "Python", "NumPy" and "PyTorch"."""
        return [name for name, state in _states().items() if state != self._before[name]]

    def put_back(self) -> None:
        """What was drawn since will be drawn again."""
        random.setstate(self._before["Python"])
        numpy, words = self._before["NumPy"]
        np.random.set_state((*numpy[:1], np.frombuffer(words, dtype=np.uint32), *numpy[1:]))
        own, *gpus = (torch.frombuffer(bytearray(state), dtype=torch.uint8) for state in self._before["PyTorch"])
        torch.set_rng_state(own)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)


def _states() -> dict[str, Any]:
    legacy: Any = np.random.get_state(legacy=True)
    kind, words, *rest = legacy
    states = [torch.get_rng_state()]
    # Asking must not begin CUDA.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states += torch.cuda.get_rng_state_all()
    return {
        "Python": random.getstate(),
        "NumPy": ((kind, *rest), words.tobytes()),
        "PyTorch": [state.numpy().tobytes() for state in states],
    }


class Drawing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees whether an operation of this thread draws from a generator of PyTorch, whatever other threads do.

    Attributes:
        drew: whether one has.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drew: bool = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        draws = torch.Tag.nondeterministic_seeded in func.tags and not _drops_nothing(func, args, kwargs or {})
        self.drew = self.drew or bool(draws)
        return func(*args, **(kwargs or {}))


def _drops_nothing(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operator (attention in one piece) draws for dropout alone, and is asked for none."""
    names = [argument.name for argument in func._schema.arguments]
    if "dropout_p" not in names:
        return False
    place = names.index("dropout_p")
    p = args[place] if place < len(args) else kwargs.get("dropout_p", func._schema.arguments[place].default_value)
    return type(p) in (int, float) and p == 0.0
