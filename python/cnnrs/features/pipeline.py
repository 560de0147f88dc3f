"""Calls a module batch by batch, a few batches ahead of what is handed over."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from cnnrs._util.devices import is_out_of_memory
from cnnrs._util.generators import Generators
from cnnrs._util.kept_memory import kept_memory
from cnnrs._util.precision import tf32
from cnnrs._util.streams import side_stream
from cnnrs.data.mover import Mover
from cnnrs.engine.cuda_capture import RECORDERS
from cnnrs.engine.memory_order import FrozenOrder
from cnnrs.features.precision import AUTOCAST, Precision, Rows, narrowed
from cnnrs.features.recorded import Network, Recorded
from cnnrs.features.update import Item
from cnnrs.model import draws
from cnnrs.model.lowering import Lowered
from cnnrs.model.modes import to_device

#: Rows on their way to the host, and the event after which they are there; None: they are.
_Flight = tuple[Rows, Any]


class Pipeline:
    """Calls a module batch by batch: the device computes while the host reads, copies and writes.

    On CUDA two batches are on the device while the host takes a third one, bytes come and rows go on streams of their
    own, and batches as large as the first one are replayed from a recording where the module is a graph. On a CPU the
    same code runs without streams. When memory runs out, the batch is halved, and all after it.

    Args:
        model: in eval mode.
        device: where it is.
        precision: what it computes in; None: as torch is set.
        dtype: torch's name of the type to keep; None: what the model returns.
        verbose: whether to say when memory runs out.
        quiet: whether nobody else draws from the process's generators meanwhile.
        lowered: the model as a graph: it then is the same kernels for every batch. None: nobody knows.
        ordered: on the CPU, who calls the model for all batches after a look at the first one: in which order of memory
            they are. None: they stay as they are.

    Attributes:
        draws: why its rows are a draw of a random generator, "" when they are none; None before the first batch.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        precision: Precision | None = None,
        dtype: str | None = None,
        verbose: bool = True,
        quiet: bool = True,
        lowered: Lowered | None = None,
        ordered: Callable[[torch.Tensor], FrozenOrder] | None = None,
    ) -> None:
        self.model: Callable[[torch.Tensor], Any] = model
        self._module = model
        self.device = device
        self.precision = precision
        self.dtype = dtype
        self.verbose = verbose
        self.quiet = quiet
        self.draws: str | None = None
        # Images at a time, once the memory has run out.
        self.limit: int | None = None
        self._on_gpu = device.type == "cuda"
        self._mover = Mover(device)
        self._lowered = lowered
        self._network: Network = self._call
        self._ordered = None if self._on_gpu else ordered

    def run(self, batches: Iterable[Item]) -> Generator[Item, None, None]:
        """(features on the CPU, runs, ids) of every (inputs, runs, ids)."""
        flying: deque[tuple[list[_Flight], list[tuple[int, int]], list[str]]] = deque()
        with self._tuned(), self._recorded(), kept_memory(not self._on_gpu):
            for inputs, runs, ids in batches:
                if self._ordered is not None:
                    self.model, self._ordered = self._ordered(inputs), None
                flying.append((self._launch(inputs), runs, ids))
                if len(flying) > (2 if self._on_gpu else 1):
                    yield self._landed(*flying.popleft())
            while flying:
                yield self._landed(*flying.popleft())

    def _landed(self, parts: list[_Flight], runs: list[tuple[int, int]], ids: list[str]) -> Item:
        for rows, event in parts:
            if event is not None:
                event.synchronize()
            rows.check()
        return parts[0][0].tensor if len(parts) == 1 else torch.cat([rows.tensor for rows, _ in parts]), runs, ids

    def _launch(self, inputs: torch.Tensor) -> list[_Flight]:
        parts: list[_Flight] = []
        done = 0
        while done < len(inputs) or not parts:
            size = min(self.limit or len(inputs), len(inputs) - done)
            part = self._try(inputs if size == len(inputs) else inputs[done : done + size])
            # Handled here, where the exception no longer holds the tensors of the failed attempt.
            if part is None:
                self._halve(size)
            else:
                parts.append(part)
                done += size
        return parts

    def _try(self, inputs: torch.Tensor) -> _Flight | None:
        """The features on their way; None when there is not enough memory, but may be for fewer images."""
        try:
            features = self._features(self._moved(inputs))
            return self._leaving(narrowed(features, self.dtype, self.precision, copy=True))
        except Exception as error:
            if len(inputs) <= 1 or not is_out_of_memory(error):
                raise
        return None

    def _moved(self, inputs: torch.Tensor) -> torch.Tensor:
        if not self._on_gpu:
            return to_device(inputs, self.device)
        if inputs.device.type == "cpu":
            inputs = self._mover.take(self._mover.start(inputs))
        inputs = to_device(inputs, self.device)
        return inputs.contiguous(memory_format=torch.channels_last) if inputs.dim() == 4 else inputs

    def _leaving(self, rows: Rows) -> _Flight:
        if not self._on_gpu:
            return rows.on(lambda tensor: tensor.to("cpu")), None
        stream = side_stream(self.device, "rows")
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            there = rows.on(lambda tensor: _to_host(tensor, stream))
            # Who waits for it sleeps: the loader's threads need the cores.
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(stream)
        return there, event

    def _halve(self, size: int) -> None:
        self.limit = size // 2
        # A recording holds the memory of whole batches.
        self._network = self._call
        if self._on_gpu:
            torch.cuda.empty_cache()
        if self.verbose:
            print(f"preconv: {self.device} has no memory for {size} images at a time, going on with {self.limit}")

    def _features(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.draws is not None:
            return self._network(inputs)
        generators = Generators()
        output = self._network(inputs)
        self.draws = self._drawn(generators.drawn(), inputs)
        if self.draws:
            self._network = self._call
        return output

    def _call(self, inputs: torch.Tensor) -> torch.Tensor:
        autocast = AUTOCAST.get(self.precision or "")
        with torch.no_grad(), torch.autocast(self.device.type, autocast, enabled=autocast is not None):
            output = self.model(inputs)
        if not isinstance(output, torch.Tensor):
            raise TypeError(f"the model must return one tensor, got {type(output).__name__}")
        return output

    def _drawn(self, generators: list[str], inputs: torch.Tensor) -> str:
        """Why the first call's output is a draw, "" when it is none."""
        # The loader's threads may have drawn meanwhile: then only the model's own operations count.
        if not generators or not (self.quiet or draws.does_draw(self._module, inputs)):
            return ""
        return f"its forward draws from {generators[0]}'s generator"

    @contextmanager
    def _tuned(self) -> Iterator[None]:
        """TF32 and the weights for the time being."""
        if not self._on_gpu:
            yield
            return
        asked = tf32(self.precision == "tf32") if self.precision in ("exact", "tf32") else nullcontext()
        with asked, _laid_out(self._module, self._multiplied()):
            yield

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """A recording reads the weights where they are now, and takes memory."""
        lowered = self._lowered
        if lowered is not None and not draws.of_graph(lowered) and self.device.type in RECORDERS:
            self._network = Recorded(self._call, self.device)
        try:
            yield
        finally:
            self._network = self._call

    def _multiplied(self) -> dict[int, torch.dtype]:
        """What autocast would cast for every batch, by the tensor's id, and to what."""
        narrow = AUTOCAST.get(self.precision or "")
        if narrow is None or self._lowered is None:
            return {}
        multiplied: set[int | None] = set()
        others: set[int | None] = {None}
        for _, kind, _, attributes in self._lowered.operations:
            # Of all operations with weights these are the ones that autocast narrows.
            used = multiplied if kind in ("Conv2d", "Linear") else others
            used.update(attributes.get(name) for name in ("weight", "bias"))
        return {id(self._lowered.tensors[i]): narrow for i in multiplied - others if i is not None}


def _to_host(tensor: torch.Tensor, stream: Any) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    # Its memory must not go back while this stream reads it.
    tensor.record_stream(stream)
    return host


@contextmanager
def _laid_out(model: nn.Module, narrow: dict[int, torch.dtype]) -> Iterator[None]:
    """4-dimensional weights in the order tensor cores read, some in another type; the user's own come back."""
    before = [(p, p.data) for p in model.parameters() if p.dim() == 4 or id(p) in narrow]
    try:
        for parameter, data in before:
            data = data.to(narrow.get(id(parameter), data.dtype))
            parameter.data = data.contiguous(memory_format=torch.channels_last) if data.dim() == 4 else data
        yield
    finally:
        for parameter, data in before:
            parameter.data = data
