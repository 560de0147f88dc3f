"""What a loader yields, as the engines of :func:`cnnrs.fit` take it."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset

from cnnrs._util import plain
from cnnrs._util.progress import progress as bar
from cnnrs.data.labels import sent
from cnnrs.data.loader import DataLoader
from cnnrs.data.mover import Mover
from cnnrs.model.lowering import Lowered
from cnnrs.model.modes import to_device

#: What data sets of dictionaries call the answer.
_TARGETS = ("labels", "label", "targets", "target", "y")


def to_channels_last(model: nn.Module) -> None:
    """Put the 4-D weights into that order of memory, in place; the numbers stay."""
    for tensor in chain(model.parameters(), model.buffers()):
        if tensor.dim() == 4:
            # As `model.to` does; what has the order already stays where it is.
            tensor.data = tensor.data.to(memory_format=torch.channels_last)


def on_device(
    loader: Iterable[Any], device: torch.device, channels_last: bool, description: str, progress: bool
) -> Iterator[tuple[Any, Any]]:
    """The loader's pairs with their tensors on the model's device, under a progress bar.

    Tensors may lie in tuples, lists and dictionaries; arrays and lists of numbers, as a whole, become tensors.

    Raises:
        TypeError: the loader does not yield pairs.
        RuntimeError: a batch is on another accelerator than the model.
    """

    def ordered(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(memory_format=torch.channels_last) if channels_last and tensor.dim() == 4 else tensor

    mover = _Mover(device) if device.type == "cuda" else None
    for batch in bar(loader, description, verbose=progress):
        inputs, targets = map(_as_tensor, _pair(batch))
        moved = mover.moved([inputs, targets]) if mover else (inputs, targets)
        yield (
            _each_tensor(moved[0], lambda tensor: ordered(to_device(tensor, device))),
            _each_tensor(moved[1], lambda tensor: to_device(tensor, device)),
        )


class _Mover:
    """Copies batches beside what the device computes, and no further ahead of it than memory should go."""

    #: Bytes that may be on their way, or there and not read yet; two batches whatever their size.
    AHEAD = 1 << 28

    def __init__(self, device: torch.device) -> None:
        self._mover = Mover(device, None)
        self._device = device
        #: Of batches that were handed over: an event behind their computation, and their bytes.
        self._queued: deque[tuple[Any, int]] = deque()
        self._bytes = 0

    def moved(self, batch: list[Any]) -> list[Any]:
        """The same with tensors of the CPU on the device; their targets stay known on the host."""
        if self._bytes:
            # Whoever asks for a batch has queued what it does with the last one.
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._queued.append((event, self._bytes))
        while len(self._queued) > 2 and sum(size for _, size in self._queued) > self.AHEAD:
            self._queued.popleft()[0].synchronize()
        found: list[torch.Tensor] = []
        _each_tensor(batch, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        here = [tensor for tensor in found if tensor.device.type == "cpu"]
        self._bytes = sum(tensor.nbytes for tensor in here)
        there = dict(zip(map(id, here), self._mover.take(self._mover.start(here)), strict=True)) if here else {}
        moved: list[Any] = _each_tensor(batch, lambda tensor: there.get(id(tensor), tensor))
        if isinstance(batch[1], torch.Tensor):
            sent(moved[1], batch[1])
        return moved


def length_of(loader: Any) -> int:
    """How many batches a loader has; 1 where only code of the user's could tell, which the plain loop does not ask."""
    known = type(loader) in (list, tuple)
    if type(loader) in (DataLoader, torch.utils.data.DataLoader):
        own = not type(loader.sampler).__module__.startswith("torch.utils.data")
        # Of an iterable data set the length is what its author says, and too much of it a warning.
        known = loader.batch_size is not None and not own and not isinstance(loader.dataset, IterableDataset)
    return max(len(loader), 1) if known else 1


def _pair(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    if isinstance(batch, Mapping):
        answers = [name for name in _TARGETS if name in batch]
        others = [name for name in batch if name not in answers]
        if len(answers) == 1 and len(others) == 1:
            return batch[others[0]], batch[answers[0]]
        raise TypeError(
            f"the loader must yield pairs (inputs, targets), got dictionaries with {', '.join(map(repr, batch))}, of "
            "which cnnrs cannot tell inputs from targets: a collate_fn can, for example "
            "lambda items: (lambda batch: (batch['pixel_values'], batch['labels']))(default_collate(items))"
        )
    hint = ": put what the loss needs into the second, (inputs, (labels, weights))" if _size(batch) > 2 else ""
    raise TypeError(f"the loader must yield pairs (inputs, targets), got {describe(batch)}{hint}")


def _as_tensor(part: Any) -> Any:
    """Arrays, numbers and lists of them as a tensor; anything else as it is."""
    if isinstance(part, (np.ndarray, np.generic, int, float, complex)) or _is_numbers(part):
        return torch.as_tensor(part)
    return part


def _each_tensor(part: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same structure with every tensor changed."""
    if isinstance(part, torch.Tensor):
        return change(part)
    if isinstance(part, tuple) and hasattr(part, "_fields"):
        return type(part)(*(_each_tensor(item, change) for item in part))
    if type(part) in (tuple, list):
        return type(part)(_each_tensor(item, change) for item in part)
    if isinstance(part, MutableMapping):
        changed = copy.copy(part)
        changed.update({key: _each_tensor(value, change) for key, value in part.items()})
        return changed
    return part


def _is_numbers(part: Any) -> bool:
    """Whether it is a list, however nested, of numbers: torch makes one tensor of it."""
    if not isinstance(part, (tuple, list)) or not part:
        return False
    return all(isinstance(item, (int, float, complex, np.number)) or _is_numbers(item) for item in part)


def samples_of(*parts: Any) -> int:
    """Length of the first tensor in the first part that has one; 1 for a tensor without dimensions."""
    found: list[torch.Tensor] = []
    for part in parts:
        _each_tensor(part, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        if found:
            return len(found[0]) if found[0].dim() else 1
    return 1


def is_plain(inputs: Any, targets: Any, training: bool) -> bool:
    """Whether the batch is two ordinary tensors, which is what the compiled engines read."""
    return all(
        isinstance(part, torch.Tensor)
        and plain.is_plain(part)
        # Nobody but autograd on the user's own module would reach what they were computed from.
        and not (training and part.requires_grad)
        for part in (inputs, targets)
    )


def describe(batch: Any) -> str:
    """Words for an error message."""
    if isinstance(batch, torch.Tensor) and batch.requires_grad:
        return f"a {type(batch).__name__} that requires gradients"
    if isinstance(batch, torch.Tensor) and not plain.is_plain(batch):
        return plain.said(batch)
    size = f" of length {len(batch)}" if isinstance(batch, (tuple, list, dict)) else ""
    return f"a {type(batch).__name__}{size}"


def _size(batch: Any) -> int:
    return len(batch) if isinstance(batch, (tuple, list)) else 0


class Stream:
    """Batches for a compiled engine, up to where engine ``python`` must go on.

    The engine gets None there, and stops.

    Args:
        batches: pairs on the model's device.
        takes: whether the engine can do this batch, and whether it is within a window.
        lowered: what the engine computes; it stops where its tensors have new memory or others of them are frozen.
        window: batches per step of the optimizer.
        whole: whether it can stop only behind a whole step.

    Attributes:
        left: whether the engine has been stopped, and :meth:`rest` is still to do.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        takes: Callable[[Any, Any, bool], bool],
        lowered: Lowered,
        window: int,
        whole: bool,
    ) -> None:
        self._batches = batches
        self._takes = takes
        self._window = window
        self._whole = whole
        self._tensors = lowered.tensors
        self._memory: list[Any] | None = None
        self._count = 0
        self._held: list[Any] = []
        self._stops = False
        self.left = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        within = self._count % self._window != 0
        may_stop = not (self._whole and within)
        if self._stops and may_stop:
            self.left = True
            return None
        inputs, targets = batch = next(self._batches)
        # A loader may train, too.
        where = self._where()
        self._memory = self._memory or where
        self._stops = self._stops or where != self._memory
        takes = self._takes(inputs, targets, within)
        if may_stop and (self._stops or not takes):
            self._held.append(batch)
            self.left = True
            return None
        self._count += 1
        return batch

    def _where(self) -> list[Any]:
        return [(tensor.data_ptr(), tensor.requires_grad) for tensor in self._tensors]

    def stop(self) -> None:
        """No more batches for this engine."""
        self._stops = True

    def rest(self) -> Iterator[Any]:
        """What it has not had."""
        return chain(self._held, self._batches)
