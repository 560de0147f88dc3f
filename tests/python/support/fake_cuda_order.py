"""Who reads and writes what, on which stream, and what puts it in order: told to torch's own race sanitizer.

The host counts as one more stream: what it launches comes after what it did before.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch.cuda._sanitizer import EventHandler
from torch.multiprocessing.reductions import StorageWeakRef

HOST = 1 << 40
_SUPPORT = Path(__file__).parent
_OURS = (str(Path(torch.__file__).parent), str(_SUPPORT / "fake_cuda"), str(_SUPPORT / "host_waits"))


class Race(AssertionError):
    """Two accesses to the same memory that nothing puts in order."""


@dataclass
class Memory:
    """One allocation."""

    alive: StorageWeakRef
    key: int
    device: torch.device
    #: Whose pool it came from.
    stream: int
    pinned: bool = False
    #: The streams of `record_stream`.
    lent: set[int] = field(default_factory=set)
    #: Of a graph's own pool, which serves nobody else.
    private: bool = False


class Order:
    """The accesses so far.

    Attributes:
        launches: (operation, stream) of everything that ran on a device.
        names: of streams, for messages.
    """

    def __init__(self) -> None:
        self.launches: list[tuple[str, int]] = []
        self.names = {HOST: "the host"}
        self.numbers = count(1000)
        self._handler = EventHandler()
        self.syncs = self._handler.syncs
        self.syncs.create_stream(HOST)
        self._memories: dict[int, Memory] = {}

    def new_stream(self) -> int:
        number = next(self.numbers)
        self.syncs.create_stream(number)
        self.names[number] = f"stream {number}"
        return number

    def order(self, later: int, earlier: int) -> None:
        """What comes next on the one stream comes after what is on the other."""
        states = self.syncs.current_sync_states
        self.syncs._state_wait_for_other(states[later], states[earlier])

    def launch(self, stream: int, what: str, reads: set[int], writes: set[int]) -> None:
        """An operation on memory of these keys.

        Raises:
            Race: nothing makes it wait for what it must wait for.
        """
        if stream != HOST:
            self.order(stream, HOST)
            self.launches.append((what, stream))
        names: dict[int, list[str]] = {key: [] for key in reads | writes}
        errors: Any = self._handler._handle_kernel_launch(stream, reads - writes, writes, set(), what, names)
        if errors:
            now, before = errors[0].current_access, errors[0].previous_access
            raise Race(
                f"{now.operator} is {now.type} memory at {place(now.stack_trace)} on {self.names[now.stream]}, and "
                f"nothing makes it wait for {before.operator}, {before.type} it at {place(before.stack_trace)} on "
                f"{self.names[before.stream]}"
            )

    def memory(self, tensor: torch.Tensor) -> Memory | None:
        """None: the host's, which no device has seen."""
        try:
            return self._memories.get(tensor.untyped_storage()._cdata)
        except (NotImplementedError, RuntimeError):
            return None

    def allocate(self, tensor: torch.Tensor, device: torch.device, stream: int, pinned: bool = False) -> Memory:
        storage = tensor.untyped_storage()
        made = Memory(StorageWeakRef(storage), next(self.numbers), device, stream, pinned)
        self._memories[storage._cdata] = made
        self._handler._handle_memory_allocation(made.key)
        return made

    def sweep(self) -> None:
        """What nobody holds any more has gone back to its stream's pool.

        Raises:
            Race: another stream may still use it, which neither `record_stream` nor an order of the two tells.
        """
        for address in [at for at, memory in self._memories.items() if memory.alive.expired()]:
            memory = self._memories.pop(address)
            info = self._handler.tensors_accessed.accesses[memory.key]
            self._handler._handle_memory_deallocation(memory.key)
            # Page-locked memory waits by itself for the copies that use it.
            if memory.stream == HOST or memory.private:
                continue
            self.order(memory.stream, HOST)
            for access in [*info.reads, *([info.write] if info.write else [])]:
                known = self.syncs.is_ordered_after(memory.stream, access.seq_num, access.stream)
                if not known and access.stream not in memory.lent:
                    raise Race(
                        f"memory of {self.names[memory.stream]} went back while {access.operator} may still be "
                        f"{access.type} it at {place(access.stack_trace)} on {self.names[access.stream]}"
                    )


def place(stack: traceback.StackSummary) -> str:
    """Where the code that is tested is."""
    for frame in reversed(stack):
        if not frame.filename.startswith(_OURS) and not frame.filename.endswith("contextlib.py"):
            return f"{Path(frame.filename).name}:{frame.lineno} ({frame.name})"
    return "?"
