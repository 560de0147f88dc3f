"""Batches on another device: bytes cross the bus, and become numbers there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from cnnrs._records import Finish as FinishSpec
from cnnrs._util.streams import side_stream
from cnnrs.data.labels import sent
from cnnrs.image.spec import Native

Finish = Callable[[torch.Tensor], torch.Tensor]


def can_finish(native: Native) -> bool:
    """Whether the last step of ``native``, from bytes to numbers, can be taken on the device."""
    erases = bool(native.ops) and native.ops[-1]["kind"] == "erase"
    return native.finish is not None and native.finish["kind"] in ("float", "normalize", "table") and not erases


def finish_on(device: torch.device, spec: FinishSpec) -> Finish:
    """The last step of a transform on ``device``, (N, C, H, W) uint8 to float32, with the bits it has on the CPU."""
    if spec["kind"] == "table":
        values = torch.frombuffer(bytearray(spec["values"]), dtype=torch.float32).view(-1).to(device)
        first = torch.arange(0, values.numel(), 256, device=device).view(-1, 1, 1)
        return lambda images: values[images.to(torch.int64) + first]
    # Divisors are tensors on the device: CUDA multiplies by the reciprocal of a number, which rounds differently.
    full = torch.full((), 255.0, device=device)
    if spec["kind"] != "normalize":
        return lambda images: images.to(torch.float32).div_(full)
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)
        for values in (spec["mean"], spec["std"])
    )
    return lambda images: images.to(torch.float32).div_(full).sub_(mean).div_(std)


class Mover:
    """Copies batches to a device, on CUDA beside the computation that the consumer has queued.

    ``start`` begins a copy, ``take`` hands it over: the consumer's stream then waits for it, the host does not.

    Args:
        device: where to.
        finish: what is left of the transform, for the images of a batch that are bytes; None: nothing.
    """

    def __init__(self, device: torch.device, finish: FinishSpec | None = None) -> None:
        self.device = device
        self.stream: Any = None
        if device.type == "cuda":
            self.stream = side_stream(device, "copies")
            # "cuda" is another device when another one is current.
            self.device = self.stream.device
        with self.aside():
            # On the stream that reads its constants.
            self._finish = None if finish is None else finish_on(self.device, finish)
        # Page-locked sources of copies that may not be over.
        self._sources: deque[tuple[Any, list[torch.Tensor]]] = deque()

    def start(self, data: Any) -> tuple[Any, Any]:
        """(what ``data`` becomes on the device, the event after which it is there)."""
        if self.stream is None:
            return self._move(data, []), None
        sources: list[torch.Tensor] = []
        with self.aside():
            moved = self._move(data, sources)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self.stream)
        self._sources.append((event, sources))
        while self._sources and self._sources[0][0].query():
            self._sources.popleft()
        return moved, event

    def take(self, started: tuple[Any, Any]) -> Any:
        """The batch for the consumer's stream."""
        moved, event = started
        if event is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(event)
            # Its memory came from the other stream's pool and must not go back while this one reads it.
            for tensor in _tensors(moved):
                tensor.record_stream(current)
        return moved

    def aside(self) -> AbstractContextManager[Any]:
        """Inside, the current stream is that of the copies."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _move(self, data: Any, sources: list[torch.Tensor]) -> Any:
        if isinstance(data, torch.Tensor):
            return self._copy(data, sources)
        if isinstance(data, list) and data and self._finish is not None and _is_bytes(data[0]):
            images = self._finish(self._copy(data[0], sources))
            return [images, *(self._move(part, sources) for part in data[1:])]
        if isinstance(data, dict):
            return type(data)({key: self._move(part, sources) for key, part in data.items()})
        if isinstance(data, tuple) and hasattr(data, "_fields"):
            return type(data)(*(self._move(part, sources) for part in data))
        if isinstance(data, (list, tuple)):
            return type(data)(self._move(part, sources) for part in data)
        return data.to(self.device) if hasattr(data, "to") else data

    def _copy(self, tensor: torch.Tensor, sources: list[torch.Tensor]) -> torch.Tensor:
        if self.stream is None:
            return tensor.to(self.device)
        source = tensor if tensor.is_cuda or tensor.is_pinned() else tensor.pin_memory()
        sources.append(source)
        moved = source.to(self.device, non_blocking=True)
        if tensor.dim() == 1 and not tensor.is_cuda:
            sent(moved, tensor)
        return moved


def _is_bytes(data: Any) -> bool:
    return isinstance(data, torch.Tensor) and data.dtype == torch.uint8


def _tensors(data: Any) -> list[torch.Tensor]:
    if isinstance(data, torch.Tensor):
        return [data] if data.is_cuda else []
    if isinstance(data, dict):
        data = list(data.values())
    return [tensor for part in data for tensor in _tensors(part)] if isinstance(data, (list, tuple)) else []
