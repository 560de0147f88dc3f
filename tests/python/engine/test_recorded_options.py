"""Recorded steps of several batches, with somebody who looks on, and over features that lie on the device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset

import cnnrs
import tutorial
import which_engine
from cnnrs.data import labels
from cnnrs.engine import cuda_graph
from recorded import FULL, SIZES, Data, Recorder, adam, assert_same, batches, fit, rounded, sgd, twins

After = Callable[[int, nn.Module, Any], None]


def plain(
    model: nn.Module, optimizer: Any, data: Any, accumulate: int = 1, after: After | None = None, loss_fn: Any = None
) -> list[float]:
    """The loop of PyTorch's documentation; gradients are those of the last step when it ends."""
    model.train()
    optimizer.zero_grad()
    losses, begins = [], False
    for i, (x, y) in enumerate(data):
        if begins:
            optimizer.zero_grad()
        loss = (loss_fn or F.nll_loss)(model(x), y)
        losses.append(loss.item())
        (loss / accumulate).backward()
        begins = (i + 1) % accumulate == 0 or i + 1 == len(data)
        if begins:
            optimizer.step()
        if after is not None:
            after(i, model, optimizer)
    return losses


# -- several batches per step --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"clip_grad_norm": 0.05}], ids=str)
@pytest.mark.parametrize("accumulate", [2, 3, 8, 11])
@pytest.mark.parametrize("make", [sgd, adam])
def test_accumulated_steps_have_the_plain_loops_bits(
    make: Any, accumulate: int, options: dict[str, Any], device: str, recorder: Recorder
) -> None:
    theirs, their_optimizer, ours, our_optimizer = twins(device, recorder, make)
    data = batches(device)
    for seed in range(2):
        torch.manual_seed(seed)
        if options:
            clipped = copy.copy(their_optimizer)
            clipped.step = lambda: (  # type: ignore[method-assign]
                nn.utils.clip_grad_norm_(theirs.parameters(), 0.05), their_optimizer.step()
            )  # fmt: skip
            plain(theirs, clipped, data, accumulate)
        else:
            plain(theirs, their_optimizer, data, accumulate)
        torch.manual_seed(seed)
        fit(ours, our_optimizer, data, accumulate=accumulate, **options)
        assert_same(ours, our_optimizer, theirs, their_optimizer)
    full = len(SIZES) - 1
    # The batches of the warm-up are whole steps; what is left at the end, with the shorter batch, is one more.
    warm = -(-3 // accumulate) * accumulate
    assert recorder.recorded == 1
    assert recorder.replayed == (full - warm) // accumulate + full // accumulate


def test_a_shorter_batch_within_a_step(device: str, recorder: Recorder) -> None:
    theirs, their_sgd, ours, our_sgd = twins(device, recorder, sgd)
    data = batches(device, (8, 8, 8, 8, 8, 3, 8, 8, 8, 8, 8, 8, 8, 5, 8, 8, 8))
    torch.manual_seed(0)
    plain(theirs, their_sgd, data, 2)
    torch.manual_seed(0)
    fit(ours, our_sgd, data, accumulate=2)
    assert_same(ours, our_sgd, theirs, their_sgd)
    assert recorder.replayed == 4


@pytest.mark.parametrize("bad", [1, 6, 9])
def test_a_loss_that_is_not_finite_leaves_whole_steps(bad: int, device: str, recorder: Recorder) -> None:
    theirs, their_adam, ours, our_adam = twins(device, recorder, adam)
    data = batches(device)
    broken = [(x.clone(), y) for x, y in data]
    broken[bad][0][0, 0, 0, 0] = torch.nan
    whole = bad // 2 * 2
    torch.manual_seed(0)
    theirs.train()
    if whole:
        plain(theirs, their_adam, data[:whole], 2)
    torch.manual_seed(0)
    with pytest.raises(cnnrs.NonFiniteLossError, match=rf"^loss is NaN in training epoch 0, batch {bad};"):
        fit(ours, our_adam, broken, accumulate=2)
    assert tutorial.same(ours.state_dict(), theirs.state_dict())
    assert tutorial.same(our_adam.state_dict()["state"], their_adam.state_dict()["state"])


@pytest.mark.parametrize("after", [1, 2, 5, 9, 12])
def test_a_loader_that_fails_leaves_whole_steps(after: int, device: str, recorder: Recorder) -> None:
    theirs, their_sgd, ours, our_sgd = twins(device, recorder, sgd)
    data = batches(device)

    def fails() -> Iterator[Any]:
        yield from data[:after]
        raise KeyboardInterrupt

    for seed in range(2):
        torch.manual_seed(seed)
        theirs.train()
        if after >= 2:
            plain(theirs, their_sgd, data[: after // 2 * 2], 2)
        torch.manual_seed(seed)
        with pytest.raises(KeyboardInterrupt):
            fit(ours, our_sgd, fails(), accumulate=2)
        assert tutorial.same(ours.state_dict(), theirs.state_dict())
        assert tutorial.same(our_sgd.state_dict()["state"], their_sgd.state_dict()["state"])
    # Nothing of a step that was never taken is recorded.
    torch.manual_seed(3)
    plain(theirs, their_sgd, data, 2)
    torch.manual_seed(3)
    fit(ours, our_sgd, data, accumulate=2)
    assert_same(ours, our_sgd, theirs, their_sgd)


def test_another_engine_goes_on_within_a_step(device: str, recorder: Recorder) -> None:
    theirs, their_sgd, ours, our_sgd = twins(device, recorder, sgd)
    data = batches(device, (FULL,) * 11)
    strange = [*data[:7], (torch.nn.Parameter(data[7][0]), data[7][1]), *data[8:]]
    torch.manual_seed(0)
    plain(theirs, their_sgd, data, 2)
    torch.manual_seed(0)
    with which_engine.watched() as engines:
        fit(ours, our_sgd, strange, accumulate=2)
    assert engines == ["recorded", "python"] and recorder.replayed == 1
    assert_same(ours, our_sgd, theirs, their_sgd)


# -- somebody looks on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sgd, adam])
def test_a_callback_sees_what_a_plain_loop_has_there(make: Any, device: str, recorder: Recorder) -> None:
    theirs, their_optimizer, ours, our_optimizer = twins(device, recorder, make)
    data = batches(device)
    seen: dict[str, list[Any]] = {"theirs": [], "ours": []}

    def look(name: str, model: nn.Module, optimizer: Any, batch: int) -> None:
        gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        state = copy.deepcopy(optimizer.state_dict()["state"])
        seen[name].append((copy.deepcopy(model.state_dict()), gradients, state))
        for group in optimizer.param_groups:
            # A scheduler.
            rate = 0.05 * 0.9**batch
            group["lr"].fill_(rate) if isinstance(group["lr"], torch.Tensor) else group.update(lr=rate)

    means: list[float] = []
    for seed in range(2):
        torch.manual_seed(seed)
        losses = plain(theirs, their_optimizer, data, after=lambda i, m, o: look("theirs", m, o, i))
        torch.manual_seed(seed)
        means.clear()
        fit(ours, our_optimizer, data, on_batch_end=lambda batch, mean: (
            means.append(mean), look("ours", ours, our_optimizer, batch)
        ))  # fmt: skip
        assert means == pytest.approx(losses, rel=1e-6)
    assert len(seen["ours"]) == 2 * len(SIZES)
    for number, (got, wanted) in enumerate(zip(seen["ours"], seen["theirs"], strict=True)):
        assert tutorial.same(list(got), list(wanted)), number
    assert_same(ours, our_optimizer, theirs, their_optimizer)
    # Another learning rate for every batch needs no other recording.
    assert recorder.recorded == 1 and recorder.replayed == 2 * (len(SIZES) - 1) - 3


def validates(model: nn.Module, optimizer: Any, data: Data) -> None:
    fit(model, optimizer, data[:2], "validation")
    model.train()


def more_momentum(model: nn.Module, optimizer: Any, data: Data) -> None:
    optimizer.param_groups[0]["momentum"] = 0.5


def loads_state(model: nn.Module, optimizer: Any, data: Data) -> None:
    state = copy.deepcopy(optimizer.state_dict())
    for of in state["state"].values():
        of["momentum_buffer"] *= 0.5
    optimizer.load_state_dict(state)


def freezes(model: nn.Module, optimizer: Any, data: Data) -> None:
    model.fc1.requires_grad_(False)  # type: ignore[union-attr]


def changes_statistics(model: nn.Module, optimizer: Any, data: Data) -> None:
    model.norm.running_mean.add_(1.0)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("change, engines", [
    (validates, 1), (changes_statistics, 1), (more_momentum, 2), (loads_state, 2), (freezes, 2),
])  # fmt: skip
def test_what_a_callback_changes_holds_from_the_next_batch_on(
    change: Callable[[nn.Module, Any, Data], None], engines: int, device: str, recorder: Recorder
) -> None:
    theirs, their_sgd, ours, our_sgd = twins(device, recorder, sgd)
    data = batches(device)

    def then(model: nn.Module, optimizer: Any, batch: int) -> None:
        if batch == 9:
            change(model, optimizer, data)

    torch.manual_seed(0)
    plain(theirs, their_sgd, data, after=lambda i, m, o: then(m, o, i))
    torch.manual_seed(0)
    with which_engine.watched() as ran:
        fit(ours, our_sgd, data, on_batch_end=lambda batch, mean: then(ours, our_sgd, batch))
    assert [one for one in ran if one != "recorded"] == ["python"] * (engines - 1)
    assert tutorial.same(ours.state_dict(), theirs.state_dict())
    assert tutorial.same(our_sgd.state_dict()["state"], their_sgd.state_dict()["state"])
    assert recorder.replayed > 0


def test_what_a_callback_raises_ends_the_epoch_behind_its_batch(device: str, recorder: Recorder) -> None:
    theirs, their_adam, ours, our_adam = twins(device, recorder, adam)
    data = batches(device)

    def fails(batch: int, mean: float) -> None:
        if batch == 6:
            raise ZeroDivisionError

    torch.manual_seed(0)
    plain(theirs, their_adam, data[:7])
    torch.manual_seed(0)
    with pytest.raises(ZeroDivisionError):
        fit(ours, our_adam, data, on_batch_end=fails)
    assert recorder.replayed == 4
    assert_same(ours, our_adam, theirs, their_adam)


# -- features that lie on the device ------------------------------------------------------------------------------


def rows(device: str, samples: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(samples, 6, 2, 2, generator=generator)
    return features.to(device), torch.randint(3, (samples,), generator=generator).to(device)


def head() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(24, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


@pytest.mark.parametrize("samples, accumulate, launches", [
    (50, 1, (1, 2)), (48, 1, (1, 2)), (52, 1, (10, 13)), (24, 1, (0, 1)), (44, 2, (3, 5)), (16, 1, (0, 1)),
])  # fmt: skip
def test_rows_are_gathered_within_the_step(
    samples: int, accumulate: int, launches: tuple[int, int], device: str, recorder: Recorder
) -> None:
    features, labels_ = rows(device, samples)
    theirs, ours = head().to(device), head().to(device)
    recorder.watch(ours)
    their_adam, our_adam = rounded(adam(theirs.parameters())), adam(ours.parameters())
    dataset = cnnrs.FeatureDataset(features, labels_)
    replayed = []
    for seed in range(2):
        torch.manual_seed(seed)
        loader = DataLoader(dataset, batch_size=4, shuffle=True)
        plain(theirs, their_adam, list(loader), accumulate, loss_fn=F.cross_entropy)
        torch.manual_seed(seed)
        loader = cnnrs.DataLoader(dataset, batch_size=4, shuffle=True)
        before = recorder.replayed
        fit(ours, our_adam, loader, loss_fn="cross_entropy", accumulate=accumulate)
        replayed.append(recorder.replayed - before)
        assert_same(ours, our_adam, theirs, their_adam)
    assert recorder.recorded == 1 and tuple(replayed) == launches


def test_as_many_steps_per_launch_as_leave_none_over() -> None:
    chosen = {batches: cuda_graph.steps_per_launch(batches, 1) for batches in (0, 1, 6, 8, 12, 13, 14, 781)}
    assert chosen == {0: 8, 1: 1, 6: 6, 8: 8, 12: 6, 13: 1, 14: 7, 781: 1}
    assert [cuda_graph.steps_per_launch(40, accumulate) for accumulate in (2, 3, 8, 16)] == [4, 1, 1, 1]


def test_part_of_the_rows_validation_and_where_the_loader_is(device: str, recorder: Recorder) -> None:
    features, labels_ = rows(device)
    model = head().to(device)
    recorder.parameters = list
    part = Subset(cnnrs.FeatureDataset(features, labels_), list(range(45, 3, -1)))
    loader = cnnrs.DataLoader(part, batch_size=4)
    with which_engine.watched() as engines:
        for _ in range(2):
            loss, accuracy = fit(model, None, loader, "validation", loss_fn=F.cross_entropy)
    assert engines == ["recorded"] * 2 and recorder.replayed == 1 + 2
    with torch.no_grad():
        outputs = model.eval()(features[4:46])
    assert loss == pytest.approx(F.cross_entropy(outputs, labels_[4:46]).item(), rel=1e-6)
    assert accuracy == pytest.approx(100 * (outputs.argmax(1) == labels_[4:46]).float().mean().item())
    # An epoch that ends early has handed out what was asked for.
    broken = features.clone()
    broken[20] = torch.nan
    loader = cnnrs.DataLoader(cnnrs.FeatureDataset(broken, labels_), batch_size=4)
    with pytest.raises(cnnrs.NonFiniteLossError, match="batch 5"):
        fit(model, None, loader, "validation", loss_fn=F.cross_entropy)
    assert 5 * 4 <= loader.state_dict()["samples"] <= 50


# -- targets that the model has no output for -----------------------------------------------------------------


def sent(data: Data) -> Data:
    """As if the targets had come from the host."""
    moved = [(x, y.clone()) for x, y in data]
    for (_, there), (_, here) in zip(moved, data, strict=True):
        labels.sent(there, here)
    return moved


@pytest.mark.parametrize("engine", ["auto", "python"])
@pytest.mark.parametrize("bad", [0, 2, 9, 19])
@pytest.mark.parametrize("value", [5, -1, 1 << 40])
def test_a_target_out_of_bounds_is_found_before_it_is_used(
    value: int, bad: int, engine: str, device: str, recorder: Recorder
) -> None:
    theirs, their_sgd, ours, our_sgd = twins(device, recorder, sgd)
    data = batches(device)
    torch.manual_seed(0)
    plain(theirs, their_sgd, data[:bad])
    data[bad][1][-1] = value
    torch.manual_seed(0)
    expected = (
        rf"^Target {value} is out of bounds: the model has 5 outputs, so classes are 0\.\.=4 \(training epoch 3, "
    )
    with pytest.raises(IndexError, match=rf"{expected}batch {bad}\)$"):
        fit(ours, our_sgd, sent(data), epoch=3, engine=engine)
    if bad or engine == "auto":
        assert tutorial.same(ours.state_dict(), theirs.state_dict())
        assert tutorial.same(our_sgd.state_dict()["state"], their_sgd.state_dict()["state"])


def test_what_is_ignored_may_be_any_number(device: str, recorder: Recorder) -> None:
    _, _, model, optimizer = twins(device, recorder, sgd)
    data = batches(device, (FULL,) * 6)
    for _, y in data:
        y[0] = -100
    fit(model, optimizer, sent(data))
    assert recorder.replayed > 0
    with pytest.raises(IndexError, match="Target -100"):
        fit(model, optimizer, sent(data), loss_fn=nn.NLLLoss(ignore_index=7))


def test_the_losses_of_batches_before_come_first(device: str, recorder: Recorder) -> None:
    _, _, model, optimizer = twins(device, recorder, sgd)
    data = batches(device)
    data[8][0].fill_(torch.nan)
    data[10][1][0] = 9
    with pytest.raises(cnnrs.NonFiniteLossError, match="batch 8"):
        fit(model, optimizer, sent(data))


def test_rows_are_checked_where_they_lie(device: str, recorder: Recorder) -> None:
    features, labels_ = rows(device)
    labels_[9] = 3
    model = head().to(device)
    before = copy.deepcopy(model.state_dict())
    recorder.watch(model)
    loader = cnnrs.DataLoader(cnnrs.FeatureDataset(features, labels_), batch_size=4)
    with pytest.raises(IndexError, match=r"^Target 3 .* has 3 outputs.* \(training epoch 0, batch 2\)$"):
        fit(model, sgd(model.parameters()), loader, loss_fn=F.cross_entropy)
    assert tutorial.same(model.state_dict(), before)
