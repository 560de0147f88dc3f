"""A training step over fixed memory: what it reads, where it writes, and how to run it again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from cnnrs._util.notes import note
from cnnrs.engine.cuda_capture import RECORDERS, Launch, stream_of, why
from cnnrs.model.lowering import Lowered

#: What a batch arrives as: inputs and targets, or the rows of features that it takes.
Parts = tuple[torch.Tensor, ...]

#: Batches before a recording: cuDNN chooses its kernels, cuBLAS takes its workspace, the optimizer makes its state.
WARM_UP = 3
#: Steps between two looks at the losses; the host is at most two windows ahead of the device.
WINDOW = 8


class Recording:
    """The memory of a step, and its launch once it has one.

    Args:
        key: what it depends on besides the optimizer's memory.
        parts: a batch of the form that is recorded.
        batches: how many one launch takes.
        lowered: whose running statistics move.
        sizes: how many parameters and groups the optimizer has; zeros without one.
    """

    def __init__(self, key: Any, parts: Parts, batches: int, lowered: Lowered, sizes: tuple[int, int]) -> None:
        self.key = key
        #: Of the optimizer.
        self.memory: list[Any] = []
        self.device = parts[0].device
        self.slots = [tuple(map(torch.empty_like, parts)) for _ in range(batches)]
        new = partial(torch.zeros, device=self.device)
        #: What the losses measured at the last batches.
        self.losses = new(-(-WINDOW // batches) * batches, 4, dtype=torch.float64)
        #: 1 from the first loss on that is not finite.
        self.stopped = new(())
        self.counts, self.rates = map(new, sizes)
        self.statistics = [
            (same, torch.cat([t.flatten() for t in same])) for same in _by_dtype(_running_statistics(lowered))
        ]
        self.warm = 0
        self.failed = False
        self.launch: Launch | None = None
        self.gradients: list[torch.Tensor | None] = []

    def fits(self, parts: Parts) -> bool:
        """Whether a batch has the form that is recorded."""
        return form(parts) == form(self.slots[0])

    def fill(self, batches: Sequence[Parts]) -> None:
        """Put batches where the step reads them."""
        for slot, parts in zip(self.slots, batches, strict=False):
            for fixed, part in zip(slot, parts, strict=True):
                fixed.copy_(part, non_blocking=True)

    def record(self, work: Callable[[], None], parameters: list[torch.Tensor]) -> None:
        """Record what ``work`` does to the slots. Where that cannot be, a note says why, and nothing has changed."""
        outside = sys.exc_info()[1]
        before = [p.grad for p in parameters]
        try:
            launch = RECORDERS[self.device.type](work, stream_of(self.device))
            self.gradients = [p.grad for p in parameters]
            self.launch = launch
        except Exception as error:
            said = why(error, outside)
            self.failed = True
            note(f"the step cannot be recorded as a CUDA graph and runs eagerly: {said}")
        finally:
            # Gradients that were recorded are there after a launch.
            for parameter, gradient in zip(parameters, before, strict=True):
                parameter.grad = gradient

    def eagerly(self, work: Callable[[], None], parts: Parts = ()) -> None:
        """On the stream that records; work that cannot be done leaves the running statistics alone.

        ``parts``: what it reads besides the memory of the recording, which may go back as soon as the host is through.
        """
        stream = stream_of(self.device)
        try:
            if stream is None:
                work()
                return
            current = torch.cuda.current_stream(self.device)
            stream.wait_stream(current)
            for part in parts:
                part.record_stream(stream)
            try:
                with torch.cuda.stream(stream):
                    work()
            finally:
                current.wait_stream(stream)
        except BaseException:
            self.restore_statistics()
            raise

    def keep_statistics(self) -> None:
        """Remember the running statistics, unless the flag says that the last batch must not count."""
        for tensors, kept in self.statistics:
            kept.copy_(torch.where(self.stopped.bool(), kept, torch.cat([t.flatten() for t in tensors])))

    def restore_statistics(self) -> None:
        """As they were when they were kept."""
        with torch.no_grad():
            for tensors, kept in self.statistics:
                start = 0
                for tensor in tensors:
                    tensor.copy_(kept[start : start + tensor.numel()].view_as(tensor))
                    start += tensor.numel()


def form(parts: Parts) -> tuple[Any, ...]:
    """What a recording depends on of a batch."""
    return tuple((part.shape, part.dtype) for part in parts)


def _running_statistics(lowered: Lowered) -> list[torch.Tensor]:
    """What batch norms change in training."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    indices = [
        attributes[name]
        for _, kind, _, attributes in lowered.operations
        if kind == "BatchNorm2d" and attributes["training"]
        for name in names
    ]
    return [lowered.tensors[index] for index in dict.fromkeys(indices) if index is not None]


def _by_dtype(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    groups: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return list(groups.values())
