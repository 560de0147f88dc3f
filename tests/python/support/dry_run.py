"""Work that leaves no trace in memory, as under ``torch.cuda.graph``: what it did to tensors from outside is undone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class DryRun(TorchDispatchMode):
    """Computes, and remembers what tensors that were there before held.

    Args:
        fails: raises, called with the number of operations so far, before every operation.

    Attributes:
        operations: name of each, and the addresses of its tensors that were there before.
    """

    def __init__(self, fails: Callable[[int], None] = lambda number: None) -> None:
        super().__init__()
        self.operations: list[tuple[str, list[int]]] = []
        self._fails = fails
        self._outside: dict[int, tuple[Any, Any]] = {}
        self._inside: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._fails(len(self.operations))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.numel()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in given}
        for address, storage in storages.items():
            if address not in self._inside and address not in self._outside:
                self._outside[address] = (storage, storage.clone())
        addresses = [t.data_ptr() for t in given if t.untyped_storage().data_ptr() in self._outside]
        self.operations.append((str(func), addresses))
        results = func(*args, **(kwargs or {}))
        for t in tree_leaves(results):
            if isinstance(t, torch.Tensor) and (address := t.untyped_storage().data_ptr()) not in storages:
                self._inside.add(address)
        return results

    def __call__(self, work: Callable[[], None]) -> None:
        """What ``work`` leaves is what it changes in Python."""
        drawn = torch.get_rng_state()
        try:
            with self:
                work()
        finally:
            torch.set_rng_state(drawn)
            for storage, before in self._outside.values():
                storage.copy_(before)
