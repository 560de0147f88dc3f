"""The first batch goes through the user's own module too: what the engines compute must be what it computes.

Lowering sees the calls in ``forward``, not what happens around them. So once per model a few samples go through the
module and through its lowered operations, both on copies: outputs, buffers and the gradients of all parameters must
agree, and the module must do nothing else. The loss is called with the outputs alone, so equal outputs are enough.
Where all bits are the same a forward pass shows it (:mod:`~cnnrs.engine.same_bits`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer

from cnnrs._util.devices import is_out_of_memory
from cnnrs._util.generators import Drawing, Generators
from cnnrs._util.precision import uses_tf32
from cnnrs.engine import companion
from cnnrs.engine.same_bits import Run, Sample, same_bits
from cnnrs.engine.twins import WithoutDropout, attributes, changed, copied, draws_itself, without_dropout
from cnnrs.model.lowering import Lowered
from cnnrs.model.operations import LAYERS
from cnnrs.model.player import play

#: Per model what was checked, and what was found.
_CHECKED: WeakKeyDictionary[nn.Module, dict[Any, str | None]] = WeakKeyDictionary()
_OPERATIONS = "the operations that were found in it"


def differs(
    model: nn.Module,
    lowered: Lowered,
    inputs: torch.Tensor,
    *,
    engine: str,
    run: Run | None = None,
    optimizer: Optimizer | None = None,
    amp: torch.dtype | None = None,
    most: int = 4,
    samples: list[Sample] | None = None,
) -> str | None:
    """Why the lowered model is not the module, None where nothing speaks against it.

    It leaves no trace: module, inputs and random numbers are as before. A question that was asked before costs nothing.

    Args:
        model: in the mode it will run in.
        lowered: the same in the same mode.
        inputs: (N, ...), a batch on the device of the model; ``most`` samples are taken, all where the module insists.
        engine: who asks; each is checked for itself.
        run: its computation; None: libtorch for "torch", else :func:`~cnnrs.model.player.play`.
        optimizer: what steps the parameters: with one, gradients count.
        amp: type of the autocast that the model will run in.
        most: samples to take; batch norm needs more than one. Two of them are enough where all bits are the same.
        samples: gets what is known of the outputs, which holds until the weights change.
    """
    if len(inputs) == 0 or not inputs[:most].isfinite().all():
        return None  # What becomes of NaN in a sum is nobody's promise.
    part, training = inputs[:most], optimizer is not None
    groups = [] if optimizer is None else optimizer.param_groups
    held = frozenset(id(p) for group in groups for p in group["params"])
    tensors = *lowered.identities(), *(tensor.requires_grad for tensor in lowered.tensors)
    key = (engine, training, part.shape, part.dtype, part.device, held, amp, repr(lowered.operations), tensors)
    found = _CHECKED.setdefault(model, {})
    if key in found:
        return found[key]
    case = _Case(model, lowered, run or (_libtorch if engine == "torch" else play), training, held, amp)
    with warnings.catch_warnings():
        # The run gives the same ones.
        warnings.simplefilter("ignore")
        sample = same_bits(model, lowered, case.run, part[:2].detach(), training, case.context) if run is None else None
        if sample is not None:
            found[key] = None
            if samples is not None and not sample.is_drawn:
                samples.append(sample)
            return None
        decided, reason = case.verdict(part.detach(), last=len(part) == len(inputs))
        if not decided and len(part) < len(inputs):
            decided, reason = case.verdict(inputs.detach(), last=True)
    if decided:
        found[key] = reason
    return reason


def _libtorch(lowered: Lowered, tensors: list[torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    return companion.network(lowered)(tensors, inputs)


def outputs_differ(theirs: torch.Tensor, ours: torch.Tensor) -> str | None:
    """Why two results are not the same up to rounding, None where they are."""
    gap, size = _gap(theirs, ours), _size(theirs)
    if gap <= _tolerance(theirs, None) * size:
        return None
    return f"values of up to {size:.3g} differ by up to {gap:.3g}"


def known_difference(model: nn.Module, lowered: Lowered) -> str | None:
    """What :func:`differs` has found of a model with the same operations."""
    operations = repr(lowered.operations)
    found = _CHECKED.get(model, {})
    return next((reason for key, reason in found.items() if reason is not None and operations in key), None)


class _Unlike(Exception):
    """The module does something that its operations do not do."""


@dataclass
class _Outcome:
    """What a batch leaves behind."""

    output: torch.Tensor
    inputs: torch.Tensor
    buffers: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor | None]


@dataclass(frozen=True)
class _Case:
    """One comparison."""

    model: nn.Module
    lowered: Lowered
    run: Run
    training: bool
    held: frozenset[int]
    amp: torch.dtype | None

    def verdict(self, inputs: torch.Tensor, last: bool) -> tuple[bool, str | None]:
        """Whether these samples decide, and what speaks against the lowered model; ``last``: there are no others."""
        theirs, ours = _tried(lambda: self._of_module(inputs)), _tried(lambda: self._of_operations(inputs))
        failures = [failure for failure in (theirs, ours) if isinstance(failure, Exception)]
        if any(is_out_of_memory(failure) for failure in failures):
            return True, None
        if isinstance(theirs, _Unlike):
            return True, str(theirs)
        if len(failures) == 2:
            return False, None  # The run itself says what is wrong.
        if isinstance(theirs, Exception):
            return last, f"it raises {_described(theirs)}, {_OPERATIONS} do not"
        if isinstance(ours, Exception):
            return last, f"{_OPERATIONS} raise {_described(ours)}, it does not"
        reason = self._difference(theirs, ours)
        if reason is not None and not torch.equal(theirs.output, ours.output):
            reason += self._place(inputs)
        return True, reason

    def context(self, device: torch.device) -> Any:
        return nullcontext() if self.amp is None else torch.autocast(device.type, dtype=self.amp, cache_enabled=False)

    def _of_module(self, inputs: torch.Tensor) -> _Outcome:
        twin = _twin(self.model)
        before, generators = attributes(twin), Generators()
        x = inputs.clone(memory_format=torch.contiguous_format)
        try:
            with (
                torch.set_grad_enabled(self.training),
                WithoutDropout(),
                self.context(x.device),
                Drawing() as drawing,
            ):
                output = twin(x)
        finally:
            # Only then: a loader's threads may be drawing meanwhile.
            if drawing.drew:
                generators.put_back()
        if not isinstance(output, torch.Tensor):
            raise _Unlike(f"it returns {type(output).__name__}, not one tensor")
        if drawing.drew and not draws_itself(self.lowered):
            raise _Unlike("it draws random numbers, and not for dropout")
        if others := changed(before, attributes(twin)):
            raise _Unlike(f"its forward changes {', '.join(others)}")
        try:
            gradients = self._gradients(output, dict(twin.named_parameters()))
        except RuntimeError as error:
            if self.run is not play:
                raise  # As the engine will.
            raise _Unlike(f"its backward raises {_described(error)}") from None
        return _Outcome(output.detach(), x, dict(twin.named_buffers()), gradients)

    def _of_operations(self, inputs: torch.Tensor) -> _Outcome:
        quiet = without_dropout(self.lowered)
        # Layers write into buffers only.
        fresh = {
            id(t): t.detach().clone(memory_format=torch.contiguous_format).requires_grad_(t.requires_grad)
            for t in quiet.tensors
        }
        x, generators = inputs.clone(memory_format=torch.contiguous_format), Generators()
        try:
            with torch.set_grad_enabled(self.training), self.context(x.device):
                output = self.run(quiet, [fresh[id(t)] for t in quiet.tensors], x)
        finally:
            if draws_itself(quiet):
                generators.put_back()
        parameters = {name: fresh.get(id(p), p) for name, p in self.model.named_parameters()}
        buffers = {name: fresh.get(id(b), b) for name, b in self.model.named_buffers()}
        return _Outcome(output.detach(), x, buffers, self._gradients(output, parameters))

    def _gradients(
        self, output: torch.Tensor, parameters: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor | None]:
        """Of a fixed weighted sum of the outputs; no ``.grad`` is touched."""
        names = [name for name, p in parameters.items() if p.requires_grad]
        if not self.training or not names or not output.requires_grad:
            return dict.fromkeys(names) if self.training else {}
        weights = torch.arange(output.numel(), device=output.device).cos().to(output.dtype).view(output.shape)
        grads = torch.autograd.grad(output, [parameters[name] for name in names], weights, allow_unused=True)
        return dict(zip(names, grads, strict=True))

    def _difference(self, theirs: _Outcome, ours: _Outcome) -> str | None:
        tolerance = _tolerance(theirs.output, self.amp)
        gap, size = _gap(theirs.output, ours.output), _size(theirs.output)
        if gap > tolerance * size:
            return f"its outputs of up to {size:.3g} are not those of {_OPERATIONS}: they differ by up to {gap:.3g}"
        # Epochs may share their batches.
        if self.training and _gap(theirs.inputs, ours.inputs) > tolerance * _size(theirs.inputs):
            return f"it changes its input in place, otherwise than {_OPERATIONS}"
        for name, buffer in theirs.buffers.items():
            if name not in ours.buffers or _gap(buffer, ours.buffers[name]) > tolerance * _size(buffer):
                return f"its forward changes buffer {name}, otherwise than {_OPERATIONS}"
        return self._gradient_difference(theirs.gradients, ours.gradients, tolerance)

    def _gradient_difference(
        self, theirs: dict[str, torch.Tensor | None], ours: dict[str, torch.Tensor | None], tolerance: float
    ) -> str | None:
        held = {name for name, p in self.model.named_parameters() if id(p) in self.held}
        largest: float | None = None
        for name in theirs:
            mine, other = ours.get(name), theirs[name]
            if mine is None and other is None:
                continue
            if mine is None or other is None:
                size = _size(other if mine is None else mine)  # type: ignore[arg-type]
                if size == 0 and name not in held:
                    continue
                who = ("it", _OPERATIONS) if mine is None else (_OPERATIONS, "it")
                return f"parameter {name} gets a gradient of up to {size:.3g} from {who[0]}, none from {who[1]}"
            if (gap := _gap(mine, other)) == 0:
                continue
            if largest is None:
                largest = max(_size(grad) for grad in theirs.values() if grad is not None)
            size = _size(other)
            # Where terms cancel, as before a batch norm, rounding is that of the terms: of the other gradients.
            if gap > tolerance * (size + 0.01 * largest):
                return (
                    f"its gradient of parameter {name}, of up to {size:.3g}, is not that of {_OPERATIONS}: they differ "
                    f"by up to {gap:.3g}"
                )
        return None

    def _place(self, inputs: torch.Tensor) -> str:
        """Where the values part, by the names of the layers."""
        seen: dict[str, list[torch.Tensor]] = {}
        twin = _twin(self.model)
        for name, module in twin.named_modules():
            if type(module) in LAYERS:
                calls = seen.setdefault(name, [])
                module.register_forward_hook(lambda _m, _a, out, calls=calls: calls.append(out.detach().clone()))
        parted: list[str] = []

        def visit(number: int, value: torch.Tensor) -> None:
            calls = seen.get(self.lowered.names[number])
            if calls and not parted:
                other = calls.pop(0)
                if _gap(other, value.detach()) > _tolerance(other, self.amp) * _size(other):
                    parted.append(f"{self.lowered.names[number]} ({self.lowered.kinds[number]})")

        quiet = without_dropout(self.lowered)
        tensors, generators = [t.detach().clone() for t in quiet.tensors], Generators()
        with torch.no_grad(), self.context(inputs.device):
            try:
                with WithoutDropout():
                    twin(inputs.clone(memory_format=torch.contiguous_format))
                if draws_itself(quiet):
                    generators.put_back()
                play(quiet, tensors, inputs.clone(memory_format=torch.contiguous_format), visit)
            finally:
                if draws_itself(quiet):
                    generators.put_back()
        return f", first behind {parted[0]}" if parted else ""


# -- copies --------------------------------------------------------------------------------------------------


def _tried(work: Callable[[], _Outcome]) -> _Outcome | Exception:
    try:
        return work()
    except Exception as error:
        return error.with_traceback(None)


def _described(error: Exception) -> str:
    return f"{type(error).__name__} ({str(error).strip().splitlines()[0] if str(error).strip() else 'no message'})"


def _twin(model: nn.Module) -> nn.Module:
    try:
        return copied(model)
    except Exception as error:
        raise _Unlike(
            f"it cannot be copied, so not compared with {_OPERATIONS} ({_described(error)}); check=False does without"
        ) from None


# -- numbers -------------------------------------------------------------------------------------------------


def _tolerance(output: torch.Tensor, amp: torch.dtype | None) -> float:
    """Relative to the largest value. Sums of n terms in another order differ by about sqrt(n) eps: n up to 1 / eps."""
    if output.device.type == "cuda" and uses_tf32():
        return math.sqrt(max(torch.finfo(amp or torch.float32).eps, 2.0**-10))
    dtype = amp or (output.dtype if output.is_floating_point() else torch.float32)
    return math.sqrt(torch.finfo(dtype).eps)


def _gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference; infinite where shapes differ, or only one is a number."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return math.inf
    if torch.equal(a, b):
        return 0.0
    same = (a == b) | (a.isnan() & b.isnan())
    worst = float((a.float() if a.dtype != torch.float64 else a).sub(b).abs().masked_fill(same, 0).max())
    return math.inf if math.isnan(worst) else worst


def _size(a: torch.Tensor) -> float:
    """The largest finite absolute value."""
    if a.is_floating_point() and a.numel():
        # One pass, without memory for another tensor: heads have a hundred million weights.
        low, high = torch.aminmax(a.detach())
        if math.isfinite(largest := max(-float(low), float(high))):
            return largest
    finite = torch.where(a.isfinite(), a.detach(), 0).abs()
    return float(finite.max()) if a.numel() else 0.0
