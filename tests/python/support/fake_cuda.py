"""CUDA devices that are none, for code that is written against ``torch.cuda``.

Tensors stay in the CPU's memory and everything is computed at once, but ``FakeCuda`` remembers which of them count as
on "cuda:0" or "cuda:1" and which are page-locked, and judges the order as CUDA would: torch's own race sanitizer is
told which stream reads and writes what, and who waits for whom. The host counts as one more stream: what it launches
comes after what it did before, and what it reads must have landed.

    with FakeCuda() as cuda:
        x = torch.ones(3, device="cuda:1")
        ...
    assert cuda.waits == []  # for what the host waited

Raised at the operation that is wrong:
    Race: two accesses that nothing puts in order, or memory that goes back while another stream uses it.
    HostWait: the host would wait while a graph is recorded.

Not modelled: streams of the autograd engine's own, kernels (they are the CPU's), how long anything takes.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves, tree_map

from cnnrs._util import streams
from cnnrs.engine import choice
from cnnrs.model.lowering import lower
from fake_cuda_order import HOST, Memory, Order, Race, place
from fake_cuda_tensors import CPU, Functions, Operations, accesses
from host_waits import INDEXED, HostWait, why

__all__ = ["CUDAGraph", "Event", "FakeCuda", "HostWait", "Race", "Stream"]


class Stream:
    """Stands in for ``torch.cuda.Stream``."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device = _now().resolve("cuda" if device is None else device)
        self.cuda_stream = self.stream_id = _now().new_stream()
        _now().streams[self.cuda_stream] = self.device

    def wait_stream(self, other: Stream) -> None:
        _now().order(self.cuda_stream, other.cuda_stream)

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return self.record_event().query()

    def is_capturing(self) -> bool:
        return _now().recording is not None and torch.cuda.current_stream(self.device) == self

    def synchronize(self) -> None:
        _now().wait_for_streams([self.cuda_stream], "Stream.synchronize")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.cuda_stream == self.cuda_stream

    def __hash__(self) -> int:
        return self.cuda_stream


class Event:
    """Stands in for ``torch.cuda.Event``."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, **_: Any) -> None:
        self.key = next(_now().numbers)
        self.blocking = blocking
        self.device: torch.device | None = None
        _now().syncs.create_event(self.key)

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or torch.cuda.current_stream()
        if self.device not in (None, stream.device):
            raise RuntimeError(f"Event device {self.device} does not match recording stream's device {stream.device}.")
        self.device = stream.device
        _now().syncs.record_state(self.key, stream.cuda_stream)

    def wait(self, stream: Stream | None = None) -> None:
        _now().syncs.stream_wait_for_event((stream or torch.cuda.current_stream()).cuda_stream, self.key)

    def query(self) -> bool:
        """Whether it must be over: as late as can be."""
        known = _now().syncs.current_sync_states[HOST]
        then = _now().syncs.recorded_sync_states[self.key]
        return all(known.get(stream, 0) >= number for stream, number in then.items())

    def synchronize(self) -> None:
        _now().waits.append(f"Event.synchronize at {place(traceback.extract_stack())}")
        _now().syncs.stream_wait_for_event(HOST, self.key)


class CUDAGraph:
    """Stands in for ``torch.cuda.CUDAGraph``: replays the operations that were recorded, over the same memory."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.steps: list[tuple[Any, Any, Any, Any]] = []
        self.reads: set[int] = set()
        self.writes: set[int] = set()
        self.device = CPU

    def replay(self) -> None:
        _now().replay(self)

    def reset(self) -> None:
        self.steps.clear()

    def pool(self) -> int:
        return id(self)


class FakeCuda(Order):
    """Inside, ``torch.cuda`` has devices.

    Args:
        devices: how many.

    Attributes:
        waits: what the host has waited for, each with its place in the code.
    """

    def __init__(self, devices: int = 2) -> None:
        super().__init__()
        self.devices = [torch.device("cuda", i) for i in range(devices)]
        self.waits: list[str] = []
        self.streams: dict[int, torch.device] = {}
        #: Where a function makes its tensors, whatever they are made of.
        self.placing: torch.device | None = None
        self.recording: CUDAGraph | None = None
        self._fresh: list[torch.Tensor] = []
        self._undo: dict[int, tuple[Any, Any]] = {}
        self._device = self.devices[0]

    def __enter__(self) -> FakeCuda:
        global _active
        assert _active is None
        _active = self
        self._default = [Stream(device) for device in self.devices]
        self.names.update((stream.cuda_stream, f"stream 0 of {stream.device}") for stream in self._default)
        self._current = list(self._default)
        self._stack = ExitStack()
        for name, value in self._names().items():
            self._stack.enter_context(mock.patch.object(torch.cuda, name, value))
        if hasattr(torch, "accelerator"):
            current = mock.patch.object(
                torch.accelerator, "current_stream", lambda device=None: self._current_on(device)
            )
            self._stack.enter_context(current)
        real = torch.autocast
        as_cpu = {"cuda": "cpu"}
        self._stack.enter_context(
            mock.patch.object(torch, "autocast", lambda device, *a, **k: real(as_cpu.get(device, device), *a, **k))
        )
        self._stack.enter_context(mock.patch.dict(streams._STREAMS, clear=True))
        self._stack.enter_context(mock.patch.object(choice, "lower", self._lower))
        # Its arguments are parsed before anybody is asked.
        self._stack.enter_context(mock.patch.object(torch.Tensor, "record_stream", _record_stream))
        self._modes = [Operations(self), Functions(self)]
        for mode in self._modes:
            self._stack.enter_context(mode)
        return self

    def __exit__(self, *error: Any) -> None:
        global _active
        self._stack.close()
        _active = None

    def _lower(self, *args: Any, **kwargs: Any) -> Any:
        """A network is looked into, which modes of torch forbid."""
        for mode in reversed(self._modes):
            mode.__exit__(None, None, None)
        try:
            return lower(*args, **kwargs)
        finally:
            for mode in self._modes:
                mode.__enter__()

    # -- torch.cuda --------------------------------------------------------------------------------------------------

    def _names(self) -> dict[str, Any]:
        state = torch.get_rng_state
        return {
            "is_available": lambda: True, "is_initialized": lambda: True, "init": lambda: None,
            "_lazy_init": lambda: None, "device_count": lambda: len(self.devices),
            "current_device": lambda: self._device.index, "set_device": self._set_device, "device": self._on_device,
            "Stream": Stream, "Event": Event, "CUDAGraph": CUDAGraph, "graph": self._graph,
            "current_stream": self._current_on,
            "default_stream": lambda device=None: self._default[self.resolve(device).index],
            "set_stream": self._set_stream, "stream": self._on_stream, "synchronize": self._synchronize,
            "graph_pool_handle": lambda: (0, 0), "default_generators": (torch.default_generator,) * len(self.devices),
            "is_current_stream_capturing": lambda: self.recording is not None,
            "empty_cache": lambda: None, "is_bf16_supported": lambda *a, **k: True,
            "get_device_capability": lambda device=None: (9, 0), "mem_get_info": lambda device=None: (1 << 34, 1 << 35),
            "get_device_name": lambda device=None: "fake",
            "get_rng_state": lambda device=None: state(), "get_rng_state_all": lambda: [state()],
            "set_rng_state": lambda new, device=None: torch.set_rng_state(new),
            "set_rng_state_all": lambda new: torch.set_rng_state(new[0]),
        }  # fmt: skip

    def resolve(self, device: Any) -> torch.device:
        """A device with its number."""
        if device is None:
            return self._device
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if device.type != "cuda" or device.index is not None:
            if device.type == "cuda" and device not in self.devices:
                raise RuntimeError("CUDA error: invalid device ordinal")
            return device
        return self._device

    def _current_on(self, device: Any = None) -> Stream:
        return self._current[self.resolve(device).index]

    def _set_device(self, device: Any) -> None:
        self._device = self.resolve(device)

    def _set_stream(self, stream: Stream) -> None:
        self._device = stream.device
        self._current[stream.device.index] = stream

    @contextmanager
    def _on_device(self, device: Any) -> Iterator[None]:
        before = self._device
        self._set_device(device)
        try:
            yield
        finally:
            self._device = before

    @contextmanager
    def _on_stream(self, stream: Stream | None) -> Iterator[None]:
        if stream is None:
            yield
            return
        device, before = self._device, self._current[stream.device.index]
        self._set_stream(stream)
        try:
            yield
        finally:
            self._current[stream.device.index] = before
            self._device = device

    def _synchronize(self, device: Any = None) -> None:
        streams = [number for number, place in self.streams.items() if place == self.resolve(device)]
        self.wait_for_streams(streams, "torch.cuda.synchronize")

    # -- who comes after whom ----------------------------------------------------------------------------------------

    def wait_for_streams(self, streams: list[int], what: str) -> None:
        """The host does."""
        where = f"{what} at {place(traceback.extract_stack())}"
        if self.recording is not None:
            raise HostWait(f"the host waits while a graph is recorded: {where}")
        self.waits.append(where)
        for stream in streams:
            self.order(HOST, stream)

    # -- memory and operations ---------------------------------------------------------------------------------------

    def place(self, tensor: torch.Tensor) -> torch.device:
        found = self.memory(tensor)
        return tensor.device if found is None else found.device

    def register(self, tensor: torch.Tensor, device: torch.device, pinned: bool = False) -> Memory:
        stream = HOST if device == CPU else self._current[device.index].cuda_stream
        return self.allocate(tensor, device, stream, pinned)

    def launch(self, stream: int, what: str, reads: set[int], writes: set[int]) -> None:
        if stream == HOST or self.recording is None:
            super().launch(stream, what, reads, writes)
            return
        if stream != torch.cuda.current_stream(self.recording.device).cuda_stream:
            raise HostWait(f"{what} runs on another stream than the one that is recorded")
        self.recording.reads |= reads
        self.recording.writes |= writes

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.sweep()
        name = func._schema.name
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        homes = [self.memory(tensor) for tensor in tensors]
        places = {CPU if home is None else home.device for home in homes}
        devices = places - {CPU}
        target = next(iter(devices), CPU) if self.placing is None else self.placing
        if name == "aten::copy_" and len(places) > 1:
            return self._copied(func, args, kwargs)
        if not devices and target == CPU and not any(homes):
            return func(*args, **kwargs)
        self._check_places(name, tensors, devices)
        reads, writes = accesses(func, args, kwargs)
        before = {tensor.untyped_storage()._cdata for tensor in tensors}
        if self.recording is not None and target != CPU:
            self._remember(writes)
        outputs = func(*args, **kwargs)
        made = [
            out
            for out in tree_leaves(outputs)
            if isinstance(out, torch.Tensor) and out.untyped_storage()._cdata not in before
        ]
        device = next(iter(devices)) if devices else target
        for out in made:
            if self.memory(out) is None and target != CPU:
                self.register(out, target).private = self.recording is not None
                if self.recording is not None:
                    self._fresh.append(out.detach())
        stream = HOST if device == CPU else self._current[device.index].cuda_stream
        allocates_only = name in ("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty")
        self.launch(stream, name, self._keys(reads), self._keys(writes + ([] if allocates_only else made)))
        if device != CPU:
            if self.recording is not None:
                self._record(func, args, kwargs, outputs)
            indices = [t for t in tensors if self.place(t) == CPU and t.dim() > 0] if name in INDEXED else []
            if reason := why(func, args, kwargs) or ("an index that is on the host" if indices else ""):
                self.wait_for_streams([stream], f"{reason} ({name})")
        return outputs

    def _copied(self, func: Any, args: Any, kwargs: Any) -> Any:
        """From host to device, back, or between devices."""
        to, source = args[:2]
        non_blocking = bool(kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        there, here = (self.memory(one) or self.register(one, CPU) for one in (to, source))
        if self.recording is not None:
            self._remember([to])
        outputs = func(*args, **kwargs)
        gpus = [one for one in (here, there) if one.device != CPU]
        streams = [self._current[one.device.index].cuda_stream for one in gpus]
        if len(gpus) == 2:
            self.order(streams[0], streams[1])
        self.launch(streams[0], f"copy {here.device} -> {there.device}", {here.key}, {there.key})
        if len(gpus) == 2:
            self.order(streams[1], streams[0])
        elif not non_blocking or not any(one.pinned for one in (here, there)):
            self.wait_for_streams(streams, f"a copy {here.device} -> {there.device}")
        if self.recording is not None:
            self._record(func, args, kwargs, outputs)
        return outputs

    def _check_places(self, name: str, tensors: list[torch.Tensor], devices: set[torch.device]) -> None:
        # A number on the CPU is an argument of the kernel; indices may be on the CPU.
        others = {self.place(t) for t in tensors if t.dim() > 0 and name not in INDEXED}
        if len(devices) > 1 or (devices and len(others) > 1):
            found = ", ".join(sorted(map(str, devices | others)))
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {found} in {name}")

    def _keys(self, tensors: list[torch.Tensor]) -> set[int]:
        return {home.key for home in map(self.memory, tensors) if home is not None}

    # -- graphs ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _graph(self, graph: CUDAGraph, pool: Any = None, stream: Stream | None = None, **_: Any) -> Iterator[None]:
        self._synchronize()
        with self._on_stream(stream or Stream()):
            graph.device = self._device
            self.recording = graph
            try:
                yield
            finally:
                self.recording = None
                # Recording computes nothing.
                with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
                    for tensor in self._fresh:
                        if tensor.is_floating_point():
                            tensor.fill_(math.nan)
                    for storage, content in self._undo.values():
                        storage.copy_(content)
                self._fresh.clear()
                self._undo.clear()

    def _remember(self, written: list[torch.Tensor]) -> None:
        for tensor in written:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._undo:
                self._undo[storage._cdata] = storage, storage.clone()

    def _record(self, func: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        assert self.recording is not None
        # The memory counts, whatever the user's tensors point to later.
        fixed = tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, (args, kwargs, outputs))
        self.recording.steps.append((func, *fixed))

    def replay(self, graph: CUDAGraph) -> None:
        stream = self._current[graph.device.index].cuda_stream
        self.launch(stream, "a graph", graph.reads, graph.writes)
        with torch.no_grad(), torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
            for func, args, kwargs, outputs in graph.steps:
                news = tree_leaves(func(*args, **kwargs))
                for out, new in zip(tree_leaves(outputs), news, strict=True):
                    if isinstance(out, torch.Tensor) and out.data_ptr() != new.data_ptr():
                        out.copy_(new)


def _record_stream(tensor: torch.Tensor, stream: Stream) -> None:
    memory = _now().memory(tensor)
    assert memory is not None and memory.device != CPU, "record_stream of a tensor that is on the host"
    memory.lent.add(stream.cuda_stream)


_active: FakeCuda | None = None


def _now() -> FakeCuda:
    assert _active is not None, "outside of FakeCuda"
    return _active
