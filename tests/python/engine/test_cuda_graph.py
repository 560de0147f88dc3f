"""A recorded step against the plain loop: the same bits, whatever happens around it.

On the CPU a recorder stands in for ``torch.cuda.graph``: recording computes nothing, replaying calls the step again on
the memory it was recorded over. On a GPU, where there is one, the same tests record CUDA graphs.
"""

from __future__ import annotations

import copy
import gc
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_

import cnnrs
import tutorial
from cnnrs.engine import cuda_capture, cuda_graph
from cnnrs.engine.recording import WARM_UP
from recorded import FULL, SIZES, Net, Recorder, adam, assert_same, batches, fit, random_state, sgd, twins

#: Under "torch" steps are recorded too, but it needs its package even so.
both = pytest.mark.parametrize("engine", ["auto", "torch"])


def groups(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    first, *rest = list(parameters)
    return torch.optim.SGD([{"params": [first], "lr": 0.1}, {"params": rest, "momentum": 0.9}], lr=0.01, **options)


# Recorded steps are those of PyTorch's fused kernels: the oracle is the plain loop with fused=True.
OPTIMIZERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.05}),
    "SGD, all options": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    "nesterov": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True}),
    "groups": (groups, {}),
    "Adam": (torch.optim.Adam, {"lr": 1e-2}),
    "Adam, all options": (torch.optim.Adam, {"lr": 1e-2, "amsgrad": True, "maximize": True, "weight_decay": 0.1}),
    "AdamW": (torch.optim.AdamW, {"lr": 1e-2, "betas": (0.8, 0.9)}),
}


@both
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_recorded_epochs_have_the_plain_loops_bits(
    engine: str, name: str, fused: Any, device: str, recorder: Recorder
) -> None:
    make, options = OPTIMIZERS[name]
    theirs, their_optimizer, ours, our_optimizer = twins(
        device, recorder, lambda p: make(p, fused=True, **options), lambda p: make(p, fused=fused, **options)
    )
    data = batches(device)
    for epoch in range(2):
        results = []
        for run in (
            lambda phase: tutorial.fit(theirs, data, phase, their_optimizer, F.nll_loss),
            lambda phase, epoch=epoch: fit(ours, our_optimizer, data, phase, epoch=epoch, engine=engine),
        ):
            torch.manual_seed(epoch)
            results.append(([run(phase) for phase in ("training", "validation")], random_state(device)))
        (expected, their_random), (got, our_random) = results
        assert got == expected
        assert torch.equal(our_random, their_random), "other random numbers were drawn"
        assert_same(ours, our_optimizer, theirs, their_optimizer)
        for optimizer in (their_optimizer, our_optimizer):
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
    # Either phase was recorded once, after its warm-up; another learning rate needs nothing new.
    full = len(SIZES) - 1
    assert recorder.recorded == 2
    assert recorder.replayed == 2 * (2 * full - WARM_UP)
    places = {state["step"].device.type for state in our_optimizer.state.values() if "step" in state}
    assert places <= {device if fused else "cpu"}


def test_the_default_optimizer_differs_by_rounding_only(device: str, recorder: Recorder) -> None:
    theirs, their_adam, ours, our_adam = twins(device, recorder, lambda p: torch.optim.Adam(p, lr=1e-3, eps=1e-3))
    data = batches(device)
    torch.manual_seed(0)
    expected = tutorial.fit(theirs, data, "training", their_adam, F.nll_loss)
    torch.manual_seed(0)
    got = fit(ours, our_adam, data)
    assert recorder.replayed > 0
    # 20 steps of some 1e-7 each, in a loss of about 1.6.
    assert got[0] == pytest.approx(expected[0], rel=1e-5) and got[1] == expected[1]
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5)


def test_clipping_and_a_loss_that_is_a_module(device: str, recorder: Recorder) -> None:
    theirs, their_sgd, ours, our_sgd = twins(device, recorder, sgd)
    data = batches(device)
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    torch.manual_seed(0)
    theirs.train()
    for x, y in data:
        their_sgd.zero_grad()
        loss_fn(theirs(x), y).backward()
        clip_grad_norm_(theirs.parameters(), 0.1)
        their_sgd.step()
    torch.manual_seed(0)
    fit(ours, our_sgd, data, loss_fn=loss_fn, clip_grad_norm=0.1)
    assert recorder.replayed > 0
    assert_same(ours, our_sgd, theirs, their_sgd)


@both
def test_frozen_layers_and_parameters_of_nobody(engine: str, device: str, recorder: Recorder) -> None:
    torch.manual_seed(2)
    theirs = Net().to(device)
    theirs.conv1.requires_grad_(False)
    ours = copy.deepcopy(theirs)

    def head(model: Any) -> Any:
        return torch.optim.SGD([*model.fc2.parameters(), *model.conv1.parameters()], lr=0.1, momentum=0.9, fused=True)

    recorder.watch(ours, ours.fc2)
    their_sgd, our_sgd = head(theirs), head(ours)
    data = batches(device)
    torch.manual_seed(0)
    tutorial.fit(theirs, data, "training", their_sgd, F.nll_loss)
    torch.manual_seed(0)
    fit(ours, our_sgd, data, engine=engine)
    assert recorder.replayed > 0
    assert tutorial.same(ours.state_dict(), theirs.state_dict())
    assert tutorial.same(our_sgd.state_dict(), their_sgd.state_dict())
    # What nobody optimizes gets no gradient.
    assert ours.conv1.weight.grad is None and ours.fc1.weight.grad is None


@both
@pytest.mark.parametrize("bad", [0, 2, 7, 12, len(SIZES) - 1])
@pytest.mark.parametrize("make", [sgd, adam])
def test_a_loss_that_is_not_finite_changes_nothing(
    engine: str, make: Any, bad: int, device: str, recorder: Recorder
) -> None:
    theirs, their_optimizer, ours, our_optimizer = twins(device, recorder, make)
    data = batches(device)
    broken = [(x.clone(), y) for x, y in data]
    broken[bad][0][0, 0, 0, 0] = math.nan
    torch.manual_seed(0)
    tutorial.fit(theirs, data[:bad], "training", their_optimizer, F.nll_loss) if bad else theirs.train()
    torch.manual_seed(0)
    last = "none" if bad == 0 else r"\d\.\d{4}"
    expected = rf"^loss is NaN in training epoch 4, batch {bad}; the last finite loss was {last}$"
    with pytest.raises(cnnrs.NonFiniteLossError, match=expected):
        fit(ours, our_optimizer, broken, epoch=4, engine=engine)
    assert tutorial.same(ours.state_dict(), theirs.state_dict())
    assert tutorial.same(our_optimizer.state_dict(), their_optimizer.state_dict())
    # And it goes on from there.
    for seed in (1, 2):
        torch.manual_seed(seed)
        wanted = tutorial.fit(theirs, data, "training", their_optimizer, F.nll_loss)
        torch.manual_seed(seed)
        assert fit(ours, our_optimizer, data, engine=engine) == wanted
    assert_same(ours, our_optimizer, theirs, their_optimizer)


def test_a_recording_that_fails_is_noted_once_and_loses_nothing(
    device: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, their_adam, ours, our_adam = twins(device, recorder, adam)

    def fails(work: Callable[[], None], stream: Any) -> Callable[[], None]:
        try:
            raise RuntimeError("an operation that waits\nC++ stack")
        finally:
            # As CUDA does about the end of a recording that went wrong.
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setitem(cuda_capture.RECORDERS, device, fails)
    data = batches(device)

    def fit_after_ctrl_c() -> tuple[float, float]:
        # What the caller handles meanwhile is not why the recording failed.
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            return fit(ours, our_adam, data)

    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        for epoch in range(2):
            torch.manual_seed(epoch)
            expected = tutorial.fit(theirs, data, "training", their_adam, F.nll_loss)
            torch.manual_seed(epoch)
            assert fit_after_ctrl_c() == expected
            assert_same(ours, our_adam, theirs, their_adam)
            for group in (*their_adam.param_groups, *our_adam.param_groups):
                group["lr"] *= 0.5
    texts = [str(one.message) for one in notes if "CUDA graph" in str(one.message)]
    assert texts == [
        "the step cannot be recorded as a CUDA graph and runs eagerly: RuntimeError: an operation that waits"
    ]


def test_ctrl_c_while_recording_is_ctrl_c(device: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, model, optimizer = twins(device, recorder, sgd)

    def interrupted(work: Callable[[], None], stream: Any) -> Callable[[], None]:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setitem(cuda_capture.RECORDERS, device, interrupted)
    with pytest.raises(KeyboardInterrupt):
        fit(model, optimizer, batches(device))


@pytest.mark.parametrize("after", [1, 3, 11])
def test_ctrl_c_between_batches_leaves_whole_steps(after: int, device: str, recorder: Recorder) -> None:
    theirs, their_adam, ours, our_adam = twins(device, recorder, adam)
    data = batches(device)

    def interrupted() -> Iterator[Any]:
        yield from data[:after]
        raise KeyboardInterrupt

    for seed in range(2):
        torch.manual_seed(seed)
        tutorial.fit(theirs, data[:after], "training", their_adam, F.nll_loss)
        torch.manual_seed(seed)
        with pytest.raises(KeyboardInterrupt):
            fit(ours, our_adam, interrupted())
        assert_same(ours, our_adam, theirs, their_adam)


def data_moves(model: nn.Module, optimizer: Any) -> None:
    model.fc1.weight.data = model.fc1.weight.data * 2  # type: ignore[union-attr, operator]


def buffer_moves(model: nn.Module, optimizer: Any) -> None:
    model.norm.running_mean = torch.ones_like(model.norm.running_mean)  # type: ignore[union-attr, arg-type]


def state_is_loaded(model: nn.Module, optimizer: Any) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def option_changes(model: nn.Module, optimizer: Any) -> None:
    optimizer.param_groups[0]["weight_decay"] = 0.1


def rate_changes(model: nn.Module, optimizer: Any) -> None:
    optimizer.param_groups[0]["lr"] *= 0.5


def layer_changes(model: nn.Module, optimizer: Any) -> None:
    model.drop.p = 0.6  # type: ignore[assignment, union-attr]


def layer_is_frozen(model: nn.Module, optimizer: Any) -> None:
    model.fc1.requires_grad_(False)  # type: ignore[union-attr]


def weights_are_loaded(model: nn.Module, optimizer: Any) -> None:
    model.load_state_dict({name: t + 1 for name, t in model.state_dict().items()})


def nothing(model: nn.Module, optimizer: Any) -> None:
    pass


@pytest.mark.parametrize("change, recordings", [
    (nothing, 1), (weights_are_loaded, 1), (data_moves, 2), (buffer_moves, 2), (state_is_loaded, 2),
    (rate_changes, 1), (option_changes, 2), (layer_changes, 2), (layer_is_frozen, 2),
])  # fmt: skip
def test_what_changes_between_epochs_takes_effect(
    change: Callable[..., None], recordings: int, device: str, recorder: Recorder
) -> None:
    theirs, their_sgd, ours, our_sgd = twins(device, recorder, sgd)
    data = batches(device)
    for seed in range(2):
        torch.manual_seed(seed)
        expected = tutorial.fit(theirs, data, "training", their_sgd, F.nll_loss)
        torch.manual_seed(seed)
        assert fit(ours, our_sgd, data) == expected
        if seed == 0:
            change(theirs, their_sgd)
            change(ours, our_sgd)
            recorder.watch(ours)
    assert tutorial.same(ours.state_dict(), theirs.state_dict())
    assert tutorial.same(our_sgd.state_dict(), their_sgd.state_dict())
    assert recorder.recorded == recordings


def test_other_shapes_run_eagerly_and_another_first_shape_is_recorded_anew(device: str, recorder: Recorder) -> None:
    theirs, their_sgd, ours, our_sgd = twins(device, recorder, sgd)
    for sizes, recorded in (((4, 6, 4, 6, 4, 4, 6, 4), 1), ((6, 4, 6, 6, 6, 6), 2), ((6, 6), 2)):
        data = batches(device, sizes)
        torch.manual_seed(0)
        expected = tutorial.fit(theirs, data, "training", their_sgd, F.nll_loss)
        torch.manual_seed(0)
        assert fit(ours, our_sgd, data) == expected
        assert recorder.recorded == recorded
    assert_same(ours, our_sgd, theirs, their_sgd)


def test_warm_up_goes_on_in_the_next_epoch(device: str, recorder: Recorder) -> None:
    theirs, their_adam, ours, our_adam = twins(device, recorder, adam)
    data = batches(device, (FULL, FULL))
    for seed in range(3):
        torch.manual_seed(seed)
        expected = tutorial.fit(theirs, data, "training", their_adam, F.nll_loss)
        torch.manual_seed(seed)
        assert fit(ours, our_adam, data) == expected
    assert_same(ours, our_adam, theirs, their_adam)


class Cumulative(Net):
    """Its batch norm divides by the number of batches, which the host must know."""

    def __init__(self) -> None:
        super().__init__()
        self.norm.momentum = None


CANNOT: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "a callback within a step": (sgd, {"on_batch_end": lambda batch, loss: None, "accumulate": 2}),
    "weights and smoothing": (sgd, {"loss_fn": nn.CrossEntropyLoss(torch.ones(5), label_smoothing=0.1)}),
    "a loss of one's own": (sgd, {"loss_fn": lambda output, target: F.nll_loss(output, target)}),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, lr=1e-3), {}),
    "a tensor for a learning rate": (lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01)), {}),
    "SGD that maximizes": (lambda p: torch.optim.SGD(p, lr=0.01, maximize=True), {}),
    "fp16": (sgd, {"amp": "fp16", "engine": "auto"}),
    "the module itself": (sgd, {"engine": "python"}),
}


@both
@pytest.mark.parametrize("name", CANNOT)
def test_what_is_not_recorded_trains_all_the_same(engine: str, name: str, device: str, recorder: Recorder) -> None:
    make, options = CANNOT[name]
    _, _, model, optimizer = twins(device, recorder, make)
    before = copy.deepcopy(model.state_dict())
    fit(model, optimizer, batches(device), **({"engine": engine} | options))
    assert recorder.recorded == 0
    assert not torch.equal(model.state_dict()["fc2.weight"], before["fc2.weight"])


def test_a_cumulative_batch_norm_and_a_hooked_optimizer_are_not_recorded(device: str, recorder: Recorder) -> None:
    model = Cumulative().to(device)
    fit(model, sgd(model.parameters()), batches(device))
    model = Net().to(device)
    hooked = sgd(model.parameters())
    steps: list[int] = []
    hooked.register_step_post_hook(lambda *_: steps.append(1))
    fit(model, hooked, batches(device))
    assert recorder.recorded == 0 and len(steps) == len(SIZES)


@both
def test_low_precision_is_recorded(engine: str, device: str, recorder: Recorder) -> None:
    theirs, their_sgd, ours, our_sgd = twins(device, recorder, sgd)
    data = batches(device)
    torch.manual_seed(0)
    expected = fit(theirs, their_sgd, data, amp="bf16", engine="python")
    assert recorder.recorded == 0
    torch.manual_seed(0)
    assert fit(ours, our_sgd, data, amp="bf16", engine=engine) == expected
    assert recorder.replayed > 0
    assert_same(ours, our_sgd, theirs, their_sgd)


def test_channels_last_may_come_between_epochs(device: str, recorder: Recorder) -> None:
    theirs, their_sgd, ours, our_sgd = twins(device, recorder, sgd)
    data = batches(device)
    torch.manual_seed(0)
    tutorial.fit(theirs, data, "training", their_sgd, F.nll_loss)
    torch.manual_seed(0)
    fit(ours, our_sgd, data)
    theirs.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for state in their_sgd.state.values():
        if state["momentum_buffer"].dim() == 4:
            state["momentum_buffer"] = state["momentum_buffer"].to(memory_format=torch.channels_last)
    theirs_data = [(x.to(memory_format=torch.channels_last), y) for x, y in data]
    torch.manual_seed(1)
    expected = tutorial.fit(theirs, theirs_data, "training", their_sgd, F.nll_loss)
    torch.manual_seed(1)
    assert fit(ours, our_sgd, data, memory_format=torch.channels_last) == expected
    assert recorder.recorded == 2
    assert_same(ours, our_sgd, theirs, their_sgd)
    assert ours.conv2.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr, operator]


def test_an_error_in_the_model_is_the_models(device: str, recorder: Recorder) -> None:
    _, _, model, optimizer = twins(device, recorder, sgd)
    with pytest.raises(RuntimeError, match=r"to have 1 channels, but got 3 channels"):
        fit(model, optimizer, [(torch.randn(4, 3, 10, 10), torch.zeros(4, dtype=torch.int64))])
    with pytest.raises(ValueError, match="the loader yielded no samples"):
        fit(model, optimizer, [])


@pytest.mark.gpu
def test_recordings_die_with_their_model() -> None:
    model = Net().cuda()
    fit(model, sgd(model.parameters()), batches("cuda"))
    assert cuda_graph._RECORDINGS[model]["training"].launch is not None
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
