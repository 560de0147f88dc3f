"""Who computes the features of a batch: the one place where an engine is chosen for `preconv`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from cnnrs import _cnnrs
from cnnrs._util.generators import Generators
from cnnrs._util.notes import note
from cnnrs.engine import companion, cpu_inference, verify
from cnnrs.engine.choice import Engine, Question, decide, lowered_for
from cnnrs.errors import UnsupportedModelError
from cnnrs.features.update import File, Item
from cnnrs.model import draws
from cnnrs.model.lowering import Lowered
from cnnrs.model.modes import device_of, to_device

Precision = Literal["exact", "tf32", "bf16", "fp16"]
#: Computes the features of a batch, on the device of the model.
Network = Callable[[torch.Tensor], torch.Tensor]

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_TYPES = ("float16", "bfloat16", "float32", "float64")


class Extractor:
    """A frozen model that turns batches into rows.

    Args:
        model: in eval mode.
        engine: as for :func:`cnnrs.preconv`.
        precision: what the model computes in; None: as torch is set.
        dtype: torch's name of the type to keep, None: what the model returns.
        verbose: whether to say when memory runs out.
        check: whether the first batch also goes through the model itself.

    Attributes:
        device: where the model is.
        lowered: the model as a graph, None when it cannot be lowered or the module is to be called.
        draws: why its rows are a draw of a random generator, "" while nothing says so.
        quiet: whether nobody else draws from the process's generators while the model computes.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: Engine = "auto",
        precision: Precision | None = None,
        dtype: str | None = None,
        verbose: bool = True,
        check: bool = True,
    ) -> None:
        if precision is not None and precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(map(repr, get_args(Precision)))}, got {precision!r}")
        self.model = model
        self.engine = engine
        self.precision = precision
        self.dtype = dtype
        self.device = device_of(model)
        self.verbose = verbose
        self.check = check
        self.lowered: Lowered | None = lowered_for(model, engine, gradients=False)
        self.draws = "" if self.lowered is None else draws.of_graph(self.lowered)
        self.quiet = True
        # Why the module is called, once that is known.
        self._against: tuple[str, ...] = ()
        if precision in _AUTOCAST and engine in ("torch", "cpu"):
            raise ValueError(f'precision={precision!r} is autocast of the module itself: use engine="auto" or "python"')

    def __call__(self, batches: Iterable[Item], file: File | None, expected: int = 0) -> torch.Tensor | None:
        """Features of all batches in memory, or None when they are in `file`."""
        items = iter(batches)
        first = next(items, None)
        items = items if first is None else chain([first], items)
        network = None if first is None else self._network(first[0])
        pipeline = None
        computed: Generator[Item, None, None]
        if network is None:
            pipeline = Pipeline(self.model, self.device, self.precision, self.dtype, self.verbose, self.quiet)
            computed = pipeline.run(items)
        else:
            computed = ((network(to_device(inputs, self.device)), runs, ids) for inputs, runs, ids in items)
        rows = ((kept(features, self.dtype), runs, ids) for features, runs, ids in computed)
        try:
            data, shape, made = _cnnrs.extract_rows(rows, file, expected)
        finally:
            # What it has changed of the module and of torch is put back now, not when an exception is forgotten.
            computed.close()
        if pipeline is not None:
            self.draws = self.draws or pipeline.draws or ""
        return None if data is None else torch.from_numpy(data).view(getattr(torch, made)).reshape(shape)

    def _network(self, images: torch.Tensor) -> Network | None:
        """What computes features instead of the module, where that is wanted and can run; it needs a batch to tell."""
        amp = _AUTOCAST.get(self.precision or "")
        choice = decide(Question("preconv", self.engine, self.lowered, self._against, images, amp=amp))
        if self.engine == "cpu" and choice.reasons:
            raise UnsupportedModelError("\n".join(["engine 'cpu' cannot run this model:", *choice.reasons]))
        # On an accelerator the module is called, too: its launches run ahead of the device, whoever makes them.
        if self.lowered is None or choice.engine == "python" or self.device.type != "cpu":
            return None
        if choice.engine == "torch":
            network = _without_gradients(self.lowered)
        else:
            network = _natively(self.lowered, exact=self.precision == "exact")
        if self._differs(self.lowered, network, images):
            self._against = ("its module computes something else",)
            return None
        return network

    def _differs(self, lowered: Lowered, network: Network, images: torch.Tensor) -> bool:
        """Whether the module must be called after all; a few images show it."""
        if not self.check:
            return False
        name = "torch" if self.engine == "torch" else "cpu"
        # Engine "cpu" refuses dropout that is on, which others must be asked to leave out.
        run = None if name == "torch" else lambda _lowered, _tensors, inputs: network(inputs)
        reason = verify.differs(self.model, lowered, to_device(images, self.device), engine=name, run=run, most=2)
        if reason is None:
            return False
        if self.engine != "auto":
            raise UnsupportedModelError(f"engine {self.engine!r} cannot run this model:\n{reason}")
        note(f"preconv calls {type(self.model).__name__} itself, as engine='python' does: {reason}")
        return True


def _without_gradients(lowered: Lowered) -> Network:
    """Engine ``torch``."""
    forward = companion.network(lowered)

    def network(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return forward(lowered.tensors, images)

    return network


def _natively(lowered: Lowered, exact: bool) -> Network:
    """Engine ``cpu``."""
    native = cpu_inference.network(lowered, exact=exact)
    # Lazily negated or conjugated images are no bytes to read.
    return lambda images: native(images.resolve_conj().resolve_neg())


def kept(features: torch.Tensor, dtype: str | None) -> torch.Tensor:
    """Features as they are stored: contiguous, on the CPU, of the type ``dtype`` or their own.

    Raises:
        ValueError: for types that features cannot have, and values that ``dtype`` cannot hold.
    """
    found = str(features.dtype).removeprefix("torch.")
    if found not in _TYPES:
        raise ValueError(f"features must be {', '.join(_TYPES[:-1])} or {_TYPES[-1]}, got {found}")
    converted = features.detach().to(getattr(torch, dtype or found))
    if dtype == "float16" and found != dtype and bool(converted.isinf().any()):
        raise ValueError('a feature is larger than float16 can hold (65504): use dtype="bfloat16" or "float32"')
    return converted.to("cpu").contiguous()


def type_name(dtype: str | torch.dtype | np.dtype[Any] | type | None) -> str | None:
    """Torch's name of a type that features can have.

    Raises:
        ValueError: it is none of them.
    """
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, (str, torch.dtype)) else np.dtype(dtype).name
    if name not in _TYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, _TYPES))}, got {dtype!r}")
    return name


class Pipeline:
    """Calls a module batch by batch, with one batch in flight: the device computes while the host copies and writes.

    On a CPU the same code runs without streams. When memory runs out, the batch is halved, and all after it.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        precision: Precision | None = None,
        dtype: str | None = None,
        verbose: bool = True,
        quiet: bool = True,
    ) -> None:
        self.model = model
        self.device = device
        self.quiet = quiet
        # Set by the first call of the model.
        self.draws: str | None = None
        self.precision = precision
        self.dtype = None if dtype is None else getattr(torch, dtype)
        self.verbose = verbose
        # Images at a time, once the memory has run out.
        self.limit: int | None = None

    def run(self, batches: Iterable[Item]) -> Generator[Item, None, None]:
        """(features on the CPU, runs, ids) of every (inputs, runs, ids)."""
        flying: deque[tuple[torch.Tensor, Any, Item]] = deque()
        with _tuned(self.model, self.device, self.precision):
            for item in batches:
                flying.append((*self._launch(item[0]), item))
                if len(flying) > 1:
                    yield _landed(*flying.popleft())
            while flying:
                yield _landed(*flying.popleft())

    def _launch(self, inputs: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """The features on their way to the CPU, and the event after which they are there."""
        features = self._forward(inputs)
        if self.device.type != "cuda":
            # A copy in any case: the model may return the same buffer for the next batch, before this one is used.
            return features.to("cpu", copy=True), None
        host = torch.empty(features.shape, dtype=features.dtype, pin_memory=True)
        host.copy_(features, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return host, event

    def _forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda" and inputs.device.type == "cpu":
            inputs = inputs.pin_memory()
        parts: list[torch.Tensor] = []
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
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _try(self, inputs: torch.Tensor) -> torch.Tensor | None:
        """The features; None when there is not enough memory, but may be for fewer images."""
        try:
            return self._call(to_device(inputs, self.device))
        except torch.OutOfMemoryError:
            if len(inputs) <= 1:
                raise
        return None

    def _drawn(self, generators: list[str], inputs: torch.Tensor) -> str:
        """Why the first call's output is a draw, "" when it is none."""
        # The loader's threads may have drawn meanwhile: then only the model's own operations count.
        if not generators or not (self.quiet or draws.does_draw(self.model, inputs)):
            return ""
        return f"its forward draws from {generators[0]}'s generator"

    def _halve(self, size: int) -> None:
        self.limit = size // 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.verbose:
            print(f"preconv: {self.device} has no memory for {size} images at a time, going on with {self.limit}")

    def _call(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cuda" and inputs.dim() == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        autocast = _AUTOCAST.get(self.precision or "")
        generators = Generators() if self.draws is None else None
        with torch.no_grad(), torch.autocast(self.device.type, autocast, enabled=autocast is not None):
            output = self.model(inputs)
        if generators is not None:
            self.draws = self._drawn(generators.drawn(), inputs)
        if not isinstance(output, torch.Tensor):
            raise TypeError(f"the model must return one tensor, got {type(output).__name__}")
        # On a device: fewer bytes cross the bus. Overflow of float16 is looked for where the rows are kept.
        narrow = self.device.type != "cpu" and self.dtype is not None and self.dtype != torch.float16
        return output.to(self.dtype) if narrow else output


def _landed(features: torch.Tensor, event: Any, item: Item) -> Item:
    if event is not None:
        event.synchronize()
    return features, item[1], item[2]


@contextmanager
def _tuned(model: nn.Module, device: torch.device, precision: Precision | None) -> Iterator[None]:
    """TF32, cuDNN's search and memory formats for the time being."""
    if device.type != "cuda":
        yield
        return
    with _tf32(precision), _channels_last(model):
        yield


@contextmanager
def _tf32(precision: Precision | None) -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    try:
        if precision in ("exact", "tf32"):
            matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
        # Every batch but the last has the same shape.
        cudnn.benchmark = True
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


@contextmanager
def _channels_last(model: nn.Module) -> Iterator[None]:
    """4-dimensional weights in the order tensor cores read; the user's own storage comes back afterwards."""
    before = [(parameter, parameter.data) for parameter in model.parameters() if parameter.dim() == 4]
    try:
        for parameter, data in before:
            parameter.data = data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for parameter, data in before:
            parameter.data = data
