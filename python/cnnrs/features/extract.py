"""Who computes the features of a batch: the one place where an engine is chosen for `preconv`."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from itertools import chain
from typing import get_args

import torch
from torch import nn

from cnnrs import _cnnrs
from cnnrs._util.notes import note
from cnnrs.engine import companion, cpu_inference, kept_plans, verify
from cnnrs.engine.choice import Engine, Question, decide, lowered_for
from cnnrs.engine.memory_order import FrozenOrder, Order
from cnnrs.errors import UnsupportedModelError
from cnnrs.features.calibration import IMAGES, Calibration, narrow, of_one_size, quantize, refused
from cnnrs.features.pipeline import Pipeline
from cnnrs.features.precision import AUTOCAST, Precision, narrowed
from cnnrs.features.update import File, Item
from cnnrs.model import draws
from cnnrs.model.lowering import Lowered
from cnnrs.model.modes import device_of, to_device

_AUTOCAST = 'use engine="auto" or "python", which take PyTorch\'s autocast'

#: Computes the features of a batch, on the device of the model.
Network = Callable[[torch.Tensor], torch.Tensor]


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
        beside: whether PyTorch makes the batches, in this thread.
        order: in which order of memory the module gets its batches where "auto" calls it on the CPU: what earlier rows
            of the same job had; None: open, so that the clock may choose.
        calibration: what int8 layers read, and how that is found.
        may_be_native: whether bfloat16 may be engine ``cpu``'s; not where others compute rows of the same store, whose
            processors may lack the instruction.
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
        if precision == "int8" and engine in ("torch", "python"):
            raise ValueError(f'precision="int8" is computed by engine "cpu" only, got engine={engine!r}')
        self.model = model
        self.engine = engine
        self.precision = precision
        self.dtype = dtype
        self.device = device_of(model)
        self.verbose = verbose
        self.check = check
        self.lowered: Lowered | None = self._lowered()
        self.draws = "" if self.lowered is None else draws.of_graph(self.lowered)
        self.quiet = True
        self.beside = True
        self.order: Order | None = None
        self.calibration = Calibration()
        self.may_be_native = True
        # Why the module is called, once that is known.
        self._against: tuple[str, ...] = ()
        # What engine "cpu" computes with, during a call.
        self._plan: kept_plans.Plan | None = None
        if precision in AUTOCAST and (engine == "torch" or (engine == "cpu" and precision != "bf16")):
            raise ValueError(f'precision={precision!r} is autocast of the module itself: use engine="auto" or "python"')
        if precision == "bf16" and engine == "cpu" and not cpu_inference.bf16_is_fast():
            raise ValueError(f'precision="bf16" on engine "cpu" takes a processor with AVX512-BF16: {_AUTOCAST}')

    @property
    def is_bf16(self) -> bool:
        """Whether engine ``cpu`` is asked for bfloat16, and this processor has the instruction."""
        native = self.precision == "bf16" and self.engine in ("auto", "cpu") and self.device.type == "cpu"
        return native and self.may_be_native and cpu_inference.bf16_is_fast()

    @property
    def computes_in(self) -> str:
        """What the key of a store says of the precision: autocast has other numbers."""
        return f"{self.precision}, engine cpu" if self.is_bf16 else self.precision or ""

    def __call__(
        self,
        batches: Iterable[Item],
        file: File | None,
        expected: int = 0,
        chosen: Callable[[Order], object] = lambda _: None,
    ) -> torch.Tensor | None:
        """Features of all batches in memory, or None when they are in `file`.

        Args:
            batches: what the model gets.
            file: where rows go; None: into memory.
            expected: how many there will be, 0 where nobody knows.
            chosen: told the order of memory that the clock has chosen, before the first row is written.
        """
        items = iter(batches)
        first = next(items, None)
        items = items if first is None else chain([first], items)
        ahead: list[Item] = []
        if first is not None and self.precision == "int8" and self.calibration.is_in_batches:
            while sum(len(inputs) for inputs, _, _ in ahead) < IMAGES and (item := next(items, None)) is not None:
                ahead.append(item)
            items = chain(ahead, items)
        network = None if first is None else self._network(first[0], [inputs for inputs, _, _ in ahead])
        pipeline = None
        computed: Generator[Item, None, None]
        if network is None:
            # Who asks for an engine by name gets its bits, and autocast computes in what the clock was not asked about.
            ordered = None
            if self.engine == "auto" and self.precision not in AUTOCAST and not self.draws:
                ordered = self._ordering(expected, chosen)
            pipeline = Pipeline(
                self.model, self.device, self.precision, self.dtype, self.verbose, self.quiet, self.lowered, ordered
            )
            computed = pipeline.run(items)
        else:
            # As by autocast.
            dtype = self.dtype or ("bfloat16" if self.precision == "bf16" else None)
            computed = (
                (kept(network(to_device(inputs, self.device)), dtype), runs, ids) for inputs, runs, ids in items
            )
        try:
            data, shape, made = _cnnrs.extract_rows(computed, file, expected)
        finally:
            # What it has changed of the module and of torch is put back now, not when an exception is forgotten.
            computed.close()
            plan, self._plan = self._plan, None
        if plan is not None:
            plan.give_back()
        if pipeline is not None:
            self.draws = self.draws or pipeline.draws or ""
        return None if data is None else torch.from_numpy(data).view(getattr(torch, made)).reshape(shape)

    def _ordering(self, expected: int, chosen: Callable[[Order], object]) -> Callable[[torch.Tensor], FrozenOrder]:
        def ordered(inputs: torch.Tensor) -> FrozenOrder:
            order = FrozenOrder(self.model, inputs, expected, self.order)
            if self.order is None and order.chosen is not None:
                self.order = order.chosen
                chosen(order.chosen)
            return order

        return ordered

    def calibrate(self) -> None:
        """Find what int8 layers read without computing rows.

        Raises:
            UnsupportedModelError: no layer would compute in int8, or the engine cannot run the model.
        """
        first = next(iter(self.calibration.first_images()), None) if self.calibration.first_images else None
        if first is not None:
            lowered = self._fitting(first)
            self.calibration.find(cpu_inference.network(lowered, beside=self.beside), [], lowered.image)

    def _fitting(self, images: torch.Tensor) -> Lowered:
        lowered = self.lowered or self._lowered(tuple(images.shape[1:]))
        choice = decide(Question("preconv", "cpu", lowered, self._against, images))
        if choice.engine != "cpu" or lowered is None:
            raise refused(choice.reasons)
        return lowered

    def _in_int8(self, images: torch.Tensor, ahead: list[torch.Tensor]) -> Network:
        """Engine "cpu" in int8, after a look at the first images in float32."""
        lowered = self._fitting(images)
        network = cpu_inference.network(lowered, beside=self.beside)
        # Raises where its module computes something else.
        self._differs(lowered, _natively(network), images)
        ranges = self.calibration.find(network, ahead, lowered.image)
        quantize(network, ranges, images, type(self.model).__name__, self.check)
        return _natively(of_one_size(network, lowered))

    def _network(self, images: torch.Tensor, ahead: list[torch.Tensor]) -> Network | None:
        """What computes features instead of the module, where that is wanted and can run; it needs a batch to tell."""
        if self.precision == "int8":
            return self._in_int8(images, ahead)
        if self.is_bf16:
            return self._in_bf16(images)
        if self.precision == "bf16" and self.engine == "cpu":
            raise ValueError(f'precision="bf16" on engine "cpu" is for one process, on the CPU: {_AUTOCAST}')
        amp = AUTOCAST.get(self.precision or "")
        lowered = self.lowered or self._lowered(tuple(images.shape[1:]))
        choice = decide(Question("preconv", self.engine, lowered, self._against, images, amp=amp))
        if self.engine == "cpu" and choice.reasons:
            raise UnsupportedModelError("\n".join(["engine 'cpu' cannot run this model:", *choice.reasons]))
        # On an accelerator the module is called, too: its launches run ahead of the device, whoever makes them.
        if lowered is None or choice.engine == "python" or self.device.type != "cpu":
            return None
        if choice.engine == "torch":
            network = _without_gradients(lowered)
        else:
            exact = self.precision == "exact"
            self._plan = kept_plans.take(self.model, lowered, exact=exact, beside=self.beside)
            network = _natively(self._plan)
        if self._differs(lowered, network, images):
            self._against, self._plan = ("its module computes something else",), None
            return None
        return self._of_any_size(lowered, network)

    def _in_bf16(self, images: torch.Tensor) -> Network | None:
        """Engine "cpu" in bfloat16, where it can run the model; None: autocast."""
        lowered = self.lowered or self._lowered(tuple(images.shape[1:]))
        reasons: tuple[str, ...]
        if lowered is None:
            reasons = ("it has operations that engine 'cpu' does not compute (cnnrs.explain says which)",)
        else:
            reasons = decide(Question("preconv", "cpu", lowered, self._against, images)).reasons
        if lowered is not None and not reasons:
            try:
                network = self._narrowed(lowered, images)
            except UnsupportedModelError as error:
                if self.engine == "cpu":
                    raise
                reasons = (str(error),)
            else:
                if network is not None:
                    return self._of_any_size(lowered, network)
                self._against = ("its module computes something else",)
                return None
        if self.engine == "cpu":
            raise UnsupportedModelError("\n".join(["engine 'cpu' cannot run this model:", *reasons]))
        if self.verbose:
            print("\n".join(["preconv: precision='bf16' is PyTorch's autocast here, because", *reasons]))
        return None

    def _narrowed(self, lowered: Lowered, images: torch.Tensor) -> Network | None:
        """Engine "cpu" in bfloat16; None where in float32 it does not do what the module does.

        Raises:
            UnsupportedModelError: no layer would compute in bfloat16.
        """
        network = cpu_inference.network(lowered, beside=self.beside)
        if self._differs(lowered, _natively(network), images):
            return None
        narrow(network, cpu_inference.bf16_layers(lowered, list(images.shape))[0], images, self.check)
        return _natively(network)

    def _of_any_size(self, lowered: Lowered, network: Network) -> Network:
        """``network``; of a model that looks at the size of its images, another one for another size.

        Which engine a size gets depends on nothing else, so that a store that goes on has the same rows. What has been
        computed of weights is computed again where these have been written to, as a plan follows weights that move.
        """
        image, state = lowered.image, lowered.state()
        if image is None and not state:
            return network

        def called(images: torch.Tensor) -> torch.Tensor:
            amp = AUTOCAST.get(self.precision or "")
            with torch.no_grad(), torch.autocast("cpu", amp, enabled=amp is not None):
                result: torch.Tensor = self.model(images)
                return result

        def computed(images: torch.Tensor) -> torch.Tensor:
            nonlocal lowered, image, state, network
            size = tuple(images.shape[1:])
            if (image is not None and size != image) or lowered.state() != state:
                image = size
                lowered, network = self._of_size(images) or (lowered, called)
                state = lowered.state()
            return network(images)

        return computed

    def _of_size(self, images: torch.Tensor) -> tuple[Lowered, Network] | None:
        """Engine ``cpu`` for the size of these; None where the module must be called."""
        lowered = self._lowered(tuple(images.shape[1:]))
        obstacle = None if lowered is None else cpu_inference.obstacle(lowered, images)
        if obstacle is not None and self.engine == "cpu":
            raise UnsupportedModelError(f"engine 'cpu' cannot run this model:\n{obstacle}")
        if lowered is None or obstacle is not None:
            return None
        if self.is_bf16:
            try:
                made = self._narrowed(lowered, images)
            except UnsupportedModelError:
                if self.engine == "cpu":
                    raise
                return None
            return None if made is None else (lowered, made)
        exact = self.precision == "exact"
        network = _natively(cpu_inference.network(lowered, exact=exact, beside=self.beside))
        return None if self._differs(lowered, network, images) else (lowered, network)

    def _lowered(self, image: tuple[int, ...] | None = None) -> Lowered | None:
        """The model as operations, for images of any size or of this one."""
        if self.precision == "int8":
            try:
                return lowered_for(self.model, "cpu", gradients=False, image=image)
            except UnsupportedModelError as error:
                # The size of the images may be all that was missing.
                if image is None:
                    return None
                raise refused(str(error).splitlines()[1:]) from None
        try:
            return lowered_for(self.model, self.engine, gradients=False, image=image)
        except UnsupportedModelError:
            # The size of the images may be all that was missing.
            if image is None and self.engine == "cpu":
                return None
            raise

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
        if self.precision == "int8":
            raise refused([reason])
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


def _natively(native: Network) -> Network:
    """Engine ``cpu``."""
    # Lazily negated or conjugated images are no bytes to read.
    return lambda images: native(images.resolve_conj().resolve_neg())


def kept(features: torch.Tensor, dtype: str | None) -> torch.Tensor:
    """Features as they are stored: contiguous, on the CPU, of the type ``dtype`` or their own.

    Raises:
        ValueError: for types that features cannot have, and values that ``dtype`` cannot hold.
    """
    rows = narrowed(features, dtype)
    rows.check()
    return rows.tensor.to("cpu")
