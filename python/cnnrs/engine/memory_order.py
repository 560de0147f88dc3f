"""The order of memory in which a called network gets its batches on the CPU: as they are, or ``channels_last``.

Which is faster depends on layers, sizes and processor (depthwise convolutions are twice as fast in one, others a tenth
faster in either), so the first training batches are timed in both. Only the batch is converted: PyTorch's convolutions
hand its order on, and weights, gradients and the optimizer's state stay as the user has made them.

A frozen network is timed before its first batch counts, so that all rows of features are of one order, and it is a copy
with weights in that order, too, that gets ``channels_last``: what PyTorch does to weights per call is then saved.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn

from cnnrs._util.generators import Drawing, Generators
from cnnrs._util.notes import note
from cnnrs._util.plain import is_plain
from cnnrs.model.lowering import obstacles
from cnnrs.model.tracing import impurities, values

#: Below so many numbers in the weights of convolutions, or pixels in a batch, a step is short: nothing is to be gained,
#: and the plain loop's bits are kept.
LEAST_WEIGHTS, LEAST_PIXELS = 1 << 19, 1 << 12
#: Batches timed in each order; one more of each goes first, in which PyTorch sets its kernels up.
TIMED = 3
#: A smaller gain is not worth other bits than the plain loop's.
_LEAST_GAIN = 1.03

#: In which order of memory a frozen network gets all batches of one job.
Order = Literal["contiguous", "channels_last"]
#: What a trial is about that times a frozen network; others have a part of a network that is trained, or None.
_FROZEN = "frozen"
#: Images of the first batch with which it is timed, and how many times as many there must be as all trials take.
_SAMPLES, _LEAST_JOB = 8, 8

#: By model: what is known about batches of a form.
_MEASURED: WeakKeyDictionary[nn.Module, dict[Any, _Trial]] = WeakKeyDictionary()


def obstacle(model: nn.Module, measured: bool = True) -> str | None:
    """Why batches stay in the order they have, whatever they are; None where both orders may be tried.

    Looks at the model only, and changes nothing. A network that sees its tensors' strides must not be given others.

    Args:
        model: in the mode it will run in.
        measured: whether the clock is to choose; what it has chosen before holds in any case.
    """
    if not _is_large(model):
        return "its convolutions are few, small or not on the CPU"
    if not all(module.weight.is_contiguous() for module in _convolutions(model)):
        return "its weights are in an order of their own"
    if measured and (reason := _asked_for()):
        return reason
    reasons = obstacles(model) or impurities(model)
    return reasons[0] if reasons else None


def _asked_for() -> str | None:
    """What the user has said against another order, for whatever computes."""
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic algorithms are asked for, and which order is faster is measured"
    return None


def _convolutions(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


def _is_large(model: nn.Module) -> bool:
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    return on_cpu and sum(module.weight.numel() for module in _convolutions(model)) >= LEAST_WEIGHTS


def said(model: nn.Module) -> str | None:
    """One line for `explain`; None for networks that are too small to ask."""
    newest_first = [item for item in reversed(_MEASURED.get(model, {}).items()) if item[0][2] != _FROZEN]
    is_called = not newest_first or newest_first[0][0][2] is None
    if is_called and not _is_large(model):
        return None
    if reason := obstacle(model) if is_called else _asked_for():
        return f"order of memory: that of the batches, because {reason}"
    for (shape, _, part), trial in newest_first:
        other = "channels_last" if part is None else "channels_last with native kernels"
        if found := _found(shape, trial, other, "run" if part is None else "run, or not alike,"):
            return found
    return (
        f"order of memory: the faster one for large batches, timed on the first {2 * TIMED + 2} of training; with "
        "engine='python' that of the batches"
    )


def said_of_frozen(model: nn.Module) -> str | None:
    """The same for a network that is called for its features, in eval mode."""
    if not _is_large(model):
        return None
    if reason := obstacle(model):
        return f"order of memory: that of the batches, because {reason}"
    for (shape, _, part), trial in reversed(_MEASURED.get(model, {}).items()):
        if part == _FROZEN and (found := _found(shape, trial, "channels_last", "run")):
            return found
    return (
        f"order of memory: the faster one where there are {2 * (TIMED + 1) * _LEAST_JOB} times as many images as are "
        f"timed, {_SAMPLES} at most of the first batch; with engine='python' that of the batches"
    )


def _found(shape: tuple[int, ...], trial: _Trial, other: str, how: str) -> str | None:
    """What a trial says; None while it is not over."""
    if trial.fails:
        return f"order of memory: that of the batches, because the model does not {how} in {other}"
    if trial.share is not None:
        return f"order of memory: {other}, which are {100 * trial.share:.0f} % of the arithmetic; not timed"
    if not trial.is_over:
        return None
    plain, last = (1e3 * min(trial.seconds[order][1:]) for order in (False, True))
    chosen = other if trial.last else "that of the batches"
    sizes = " x ".join(map(str, (trial.size, *shape)))
    return f"order of memory: {chosen}; {sizes} take {last:.3g} ms in {other}, {plain:.3g} ms contiguous"


@dataclass
class _Trial:
    """Batches of one form.

    Attributes:
        size: samples of the batches that are timed; others follow what is found.
        fails: the model cannot have the other order.
        share: of the arithmetic in kernels that make the other one the faster without being timed.
        seconds: of the batches so far, by whether they were in channels_last.
    """

    size: int
    fails: bool
    share: float | None = None
    seconds: dict[bool, list[float]] = field(default_factory=lambda: {False: [], True: []})

    @property
    def is_over(self) -> bool:
        return self.fails or self.share is not None or min(map(len, self.seconds.values())) > TIMED

    @property
    def last(self) -> bool:
        """Whether the next batch is to be in channels_last."""
        if self.fails or self.share is not None:
            return not self.fails
        plain, last = self.seconds[False], self.seconds[True]
        if not self.is_over:
            # In turn, so that a busy moment hits both alike.
            return len(plain) > len(last)
        # What else the machine does makes a step longer, never shorter.
        return min(plain[1:]) > _LEAST_GAIN * min(last[1:])


class MemoryOrder:
    """Puts the batches of an epoch into the faster order.

    Args:
        model: on the CPU, in the mode it will run in.
        allowed: whether this epoch may have another order than its batches; asked once, with :func:`obstacle`.
        training: whether batches are timed; validation follows what is known.
        rest: the part of the model that gets them, on copies of what it changes; None: the model gets them. Of what it
            consists of nothing sees strides.
        share: of the arithmetic in kernels that are the faster ones by all experience, so that no batch is timed: all
            have the same bits in every run, and none needs what PyTorch's contiguous steps need of memory.
        part: what ``rest`` computes, equal where that is the same; what else is known is about another network.
    """

    def __init__(
        self, model: nn.Module, allowed: bool, training: bool, rest: Callable[[torch.Tensor], Any] | None = None,
        part: Hashable = None, share: float | None = None,
    ) -> None:  # fmt: skip
        self._model = model
        self._rest = rest
        self._part = part
        self._share = share
        self._training = training
        may = allowed and (obstacle(model) if rest is None else _asked_for()) is None
        self._known: dict[Any, _Trial] | None = _MEASURED.setdefault(model, {}) if may else None
        self._timed: tuple[_Trial, bool] | None = None
        self._trial: _Trial | None = None
        self._seconds = 0.0

    def ordered(self, inputs: Any) -> Any:
        """The same numbers; the batch itself stays as it is."""
        self._timed, self._trial, self._seconds = None, None, 0.0
        if self._known is None or not _may_change(inputs):
            return inputs
        form = (tuple(inputs.shape[1:]), torch.get_num_threads(), self._part)
        trial = self._known.get(form)
        if trial is None:
            enough = inputs[:, 0] if self._rest is None else inputs
            if not self._training or enough.numel() < LEAST_PIXELS:
                return inputs
            trial = self._known[form] = _Trial(len(inputs), not _runs(self._rest or self._model, inputs), self._share)
        if not trial.is_over:
            if not self._training or len(inputs) != trial.size:
                return inputs
            self._timed = trial, trial.last
        self._trial = trial
        return inputs.contiguous(memory_format=torch.channels_last) if trial.last else inputs

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Around what is computed for a batch: forward, and in a second piece backward.

        By this thread's own clock, on which neither a loader's threads nor other processes are.
        """
        start = time.thread_time()
        yield
        self._seconds += time.thread_time() - start

    @property
    def is_measured(self) -> bool:
        """Whether it is up to the clock in which order the batch under way is."""
        return self._trial is not None and not self._trial.fails

    def refuse(self) -> None:
        """No batch like the one under way has the other order, from now on."""
        if self._trial is not None:
            self._trial.fails, self._timed = True, None

    def done(self) -> None:
        """Forward and backward have been."""
        if self._timed is not None:
            trial, last = self._timed
            trial.seconds[last].append(self._seconds)
            self._timed = None


class FrozenOrder:
    """In which order of memory a network that is called for its features gets the batches of one job, all of them.

    Args:
        model: in eval mode; it stays as it is.
        inputs: the first batch.
        images: how many there are in all, 0 where nobody knows.
        known: what was chosen when the first rows of the same job were computed; None: the clock may choose.

    Attributes:
        chosen: None where neither the clock nor ``known`` has had a say: that of the batches.
    """

    def __init__(self, model: nn.Module, inputs: Any, images: int, known: Order | None = None) -> None:
        self.chosen = known
        self._model = model
        self._twin: nn.Module | None = None
        if known == "contiguous" or not _may_change(inputs):
            return
        if known is None and (not _is_worth(inputs, images) or obstacle(model)):
            return
        trial = _trial_of_frozen(model, inputs[:_SAMPLES])
        # What another job has found out does not hold for rows that are there: this one asks again.
        if known is None and trial.fails:
            return
        try:
            may = known is None or obstacle(model, measured=False) is None
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                twin = _twin(model, inputs) if may else None
                if twin is not None and known is None:
                    self.chosen = "channels_last" if _faster(trial, model, twin, inputs[:_SAMPLES]) else "contiguous"
        except Exception:
            # It cannot be copied, or there is no memory for it: what is wrong with the model itself its own call says.
            twin = None
        trial.fails = twin is None
        self._twin = twin if self.chosen == "channels_last" else None
        if known and self._twin is None:
            note(
                "the rows in this store were computed in channels_last, in which the model no longer runs: those that "
                "are new have the order of the batches, and other last bits"
            )

    def __call__(self, inputs: Any) -> Any:
        """What the model makes of a batch, equal up to float rounding."""
        if self._twin is None or not _may_change(inputs):
            return self._model(inputs)
        return self._twin(inputs.contiguous(memory_format=torch.channels_last))


def _is_worth(inputs: torch.Tensor, images: int) -> bool:
    """Whether the trial is short beside the job, and no batch is."""
    some = inputs[:_SAMPLES]
    return some[:, 0].numel() >= LEAST_PIXELS and images >= _LEAST_JOB * 2 * (TIMED + 1) * len(some)


def _twin(model: nn.Module, inputs: torch.Tensor) -> nn.Module | None:
    """A copy with the model's numbers of now, as a plan of native code has; None where the other order would show."""
    twin = _in_channels_last(model)
    if not _runs(twin, inputs, frozen=True):
        return None
    # What a call moves in the buffers, each call more would move on.
    kept = all(torch.equal(*both) for both in zip(model.buffers(), twin.buffers(), strict=True))
    return twin if kept else None


def _in_channels_last(model: nn.Module) -> nn.Module:
    """A copy whose convolutions' weights are in that order; it shares all other parameters."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    for weight in (module.weight for module in _convolutions(model)):
        last = weight.detach().contiguous(memory_format=torch.channels_last)
        memo[id(weight)] = nn.Parameter(last, requires_grad=False)
    return copy.deepcopy(model, memo)


def _trial_of_frozen(model: nn.Module, inputs: torch.Tensor) -> _Trial:
    """One per model and form of the batch."""
    form = (tuple(inputs.shape[1:]), torch.get_num_threads(), _FROZEN)
    return _MEASURED.setdefault(model, {}).setdefault(form, _Trial(len(inputs), False))


def _faster(trial: _Trial, model: nn.Module, twin: nn.Module, inputs: torch.Tensor) -> bool:
    """Whether the copy in ``channels_last`` is; measured once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while not trial.is_over:
            last = trial.last
            trial.seconds[last].append(_seconds(twin if last else model, inputs, last))
    return trial.last


def _seconds(model: nn.Module, inputs: torch.Tensor, last: bool) -> float:
    """Of one batch, its conversion included."""
    start = time.thread_time()
    model(inputs.contiguous(memory_format=torch.channels_last) if last else inputs)
    return time.thread_time() - start


def _may_change(inputs: Any) -> bool:
    """Whether it is a batch of images in the usual order: any other is the user's choice."""
    return (
        isinstance(inputs, torch.Tensor)
        and is_plain(inputs)
        and inputs.dim() == 4
        and inputs.dtype is torch.float32
        and not inputs.requires_grad
        and inputs.is_contiguous()
        and not inputs.is_contiguous(memory_format=torch.channels_last)
    )


def _runs(model: Callable[[torch.Tensor], Any], inputs: torch.Tensor, frozen: bool = False) -> bool:
    """Whether two samples in channels_last go through, and nobody can tell: on a copy that shares the parameters.

    ``view`` behind a convolution raises there; outputs of four dimensions would have other strides, which the loss may
    ask for; what overwrites its batch would overwrite ours.

    Args:
        model: what is called; of a module a copy.
        inputs: a batch.
        frozen: it is called for its features, on a copy already. Their strides nobody sees, but one call more would be
            another draw of what draws.
    """
    x = inputs[:2].contiguous(memory_format=torch.channels_last)
    version, generators = x._version, Generators()
    drawing = Drawing()
    with warnings.catch_warnings():
        # The run gives the same ones.
        warnings.simplefilter("ignore")
        try:
            if isinstance(model, nn.Module) and not frozen:
                model = copy.deepcopy(model, {id(p): p for p in model.parameters()})
            with drawing:
                outputs = model(x)
        except Exception:
            return False
        finally:
            if drawing.drew:
                generators.put_back()
    if x._version != version or (frozen and drawing.drew):
        return False
    return all(isinstance(t, torch.Tensor) and (frozen or t.is_contiguous()) for t in values(outputs))
