"""Plans of engine `cpu` are kept for the next call, which must never get one of other weights, settings or layers."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnrs
from cnnrs.engine import cpu_inference, frozen_front, kept_plans

pytestmark = pytest.mark.usefixtures("two_threads")


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, stride=2), nn.Flatten(),
        nn.Linear(8 * 5 * 5, 4),
    )  # fmt: skip


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The plans that are made anew."""
    kept_plans._KEPT.clear()
    found: list[Any] = []
    original = cpu_inference.network

    def network(*args: Any, **kwargs: Any) -> Any:
        found.append(original(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(cpu_inference, "network", network)
    yield found
    kept_plans._KEPT.clear()


def batches(*sizes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(3)
    return [(torch.randn(n, 3, 12, 12), torch.arange(n) % 4) for n in sizes or (6, 6, 3)]


def features(model: nn.Module, data: Any = None, **options: Any) -> torch.Tensor:
    return cnnrs.preconv(data or batches(), model, verbose=False, **options).features


def afresh(model: nn.Module, data: Any = None, **options: Any) -> torch.Tensor:
    """Of a copy, of which nothing is kept."""
    return features(copy.deepcopy(model), data, **options)


def test_the_second_call_has_the_plan_of_the_first(made: list[Any]) -> None:
    model = net()
    first = features(model)
    assert len(made) == 1 and torch.equal(features(model), first) and len(made) == 1
    assert torch.equal(first, afresh(model)) and len(made) == 2


@pytest.mark.parametrize("sizes", [(1,), (5, 2), (40,), (6, 6, 3)])
def test_bits_do_not_depend_on_what_the_plan_was_made_for(sizes: tuple[int, ...], made: list[Any]) -> None:
    model = net()
    features(model, batches(32))
    assert torch.equal(features(model, batches(*sizes)), afresh(model, batches(*sizes)))
    assert len(made) == 2


def in_place(model: Any) -> None:
    with torch.no_grad():
        model[3].weight.mul_(2.0)


def one_bit(model: Any) -> None:
    model[0].weight.detach().numpy().view(np.uint32)[7, 1, 1, 1] ^= 1 << 22


def data(model: Any) -> None:
    model[0].weight.data.copy_(model[0].weight.data * 2)


def data_assigned(model: Any) -> None:
    model[0].weight.data = model[0].weight.data * 2


def swapped(model: Any) -> None:
    """Two numbers in each other's place."""
    row = model[5].weight.detach().numpy()[0]
    row[[0, 40]] = row[[40, 0]]


def parameter(model: Any) -> None:
    model[5].weight = nn.Parameter(model[5].weight.detach() * 2)


def statistics(model: Any) -> None:
    model[1].running_mean.detach().numpy()[3] += 1.0


def setting(model: Any) -> None:
    model[1].eps = 0.5


def layer(model: Any) -> None:
    model[2] = nn.Hardswish()


CHANGES = [in_place, one_bit, data, data_assigned, swapped, parameter, statistics, setting, layer]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(change: Callable[[Any], None], made: list[Any]) -> None:
    model = net()
    before = features(model)
    change(model)
    found = features(model)
    assert torch.equal(found, afresh(model)) and not torch.equal(found, before)
    # And its own plan is kept from now on, in the place of the other one.
    count = len(made)
    assert torch.equal(features(model), found) and len(made) == count
    owners = [kept_plans._at(plan) for plan in kept_plans._KEPT]
    assert owners.count(model[0]) == 1


@pytest.mark.parametrize("change", [in_place, data, one_bit])
def test_weights_that_are_copied_are_not_kept(change: Callable[[Any], None], made: list[Any]) -> None:
    """The engine has contiguous copies of them, in which a change would not show."""
    model = net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    features(model)
    change(model) if change is not one_bit else in_place(model)
    assert torch.equal(features(model), afresh(model)) and len(made) == 3


def test_another_question_has_another_plan(made: list[Any]) -> None:
    model = net()
    features(model)
    assert torch.equal(features(model, precision="exact"), afresh(model, precision="exact"))
    count = len(made)
    torch.set_num_threads(1)
    features(model, precision="exact")
    assert len(made) == count + 1


def test_a_part_up_to_a_layer_shares_the_plan(made: list[Any]) -> None:
    model = net()
    first = features(model, layer="3")
    assert torch.equal(features(model, layer="3"), first) and len(made) == 1
    assert not torch.equal(features(model, layer="2"), first) and len(made) == 2


def test_plans_go_with_their_networks(made: list[Any]) -> None:
    models = [net(seed) for seed in range(3)]
    for model in models:
        features(model)
    assert [kept_plans._at(plan) for plan in kept_plans._KEPT] == [models[1][0], models[2][0]]
    del model, models[2]
    gc.collect()
    assert [kept_plans._at(plan) for plan in kept_plans._KEPT] == [models[1][0]]
    models.clear()
    gc.collect()
    assert not kept_plans._KEPT


def test_a_network_is_not_held_by_the_call(made: list[Any]) -> None:
    """No circle, in which network and plan would wait for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        model = net()
        features(model)
        del model
        assert not kept_plans._KEPT
    finally:
        gc.enable()


def test_what_is_kept_makes_room(made: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = net(0), net(1)
    features(first)

    class Narrow:
        """There is memory for one plan."""

        def __init__(self, network: Any) -> None:
            self._network = network

        def __call__(self, images: torch.Tensor) -> torch.Tensor:
            if any(kept_plans._at(plan) is first[0] for plan in kept_plans._KEPT):
                raise MemoryError("no memory for 1 GiB of weights and activations")
            return self._network(images)

        def is_current(self) -> bool:
            return bool(self._network.is_current())

    original = cpu_inference.network
    monkeypatch.setattr(cpu_inference, "network", lambda *args, **named: Narrow(original(*args, **named)))
    found = features(second)
    assert [kept_plans._at(plan) for plan in kept_plans._KEPT] == [second[0]]
    monkeypatch.undo()
    assert torch.equal(found, afresh(second))


def test_of_two_calls_at_once_one_plan_is_kept(made: list[Any]) -> None:
    model, other = net(0), net(1)
    features(other)

    def nested() -> Iterator[Any]:
        yield batches()[0]
        features(model)

    features(model, nested())
    assert [kept_plans._at(plan) for plan in kept_plans._KEPT] == [other[0], model[0]]


def test_behind_an_exception_nothing_is_kept(made: list[Any]) -> None:
    def stopping() -> Iterator[Any]:
        yield from batches()
        raise KeyboardInterrupt

    model = net()
    with pytest.raises(KeyboardInterrupt):
        features(model, stopping())
    assert not kept_plans._KEPT and len(made) == 1


def test_a_plan_that_does_something_else_is_not_kept(made: list[Any]) -> None:
    class Doubled(nn.Sequential):
        """Tells what looks at it from what runs it."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made = super().forward(x)
            return made * 2 if type(x) is torch.Tensor else made

    model = Doubled(*net())
    with pytest.warns(UserWarning, match="preconv calls Doubled itself"):
        features(model)
    assert made and not kept_plans._KEPT


def test_two_threads_have_a_plan_each(made: list[Any]) -> None:
    # Made once: both threads would draw it from the one generator.
    model, given = net(), batches(*[6] * 20)
    expected = features(model, given)
    meet = threading.Barrier(2, timeout=60)
    found: list[Any] = [None, None]

    def run(which: int) -> None:
        def waiting() -> Iterator[Any]:
            for number, batch in enumerate(given):
                if number in (1, 19):
                    meet.wait()
                yield batch

        found[which] = features(model, waiting())

    threads = [threading.Thread(target=run, args=(which,)) for which in (0, 1)]
    with torch.no_grad():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(one, expected) for one in found)
    # One of them had the kept one.
    assert len(made) == 2


# -- fit ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small networks are worth their while."""
    monkeypatch.setattr(frozen_front, "LEAST_FLOPS", 1)
    monkeypatch.setattr(frozen_front, "_LEAST_FLOPS_PER_WEIGHT", 0)


def validated(model: nn.Module) -> Any:
    return cnnrs.fit(0, model, batches(), "validation", loss_fn=F.cross_entropy, verbose=False)


def trained(model: nn.Module) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    cnnrs.fit(0, model, batches(), optimizer=optimizer, loss_fn=F.cross_entropy, verbose=False)


def test_validation_has_the_plan_of_the_last_one(made: list[Any], small: None) -> None:
    model = net()
    first = validated(model)
    assert len(made) == 1 and validated(model) == first and len(made) == 1
    data(model)
    assert validated(model) == validated(copy.deepcopy(model)) != first


def test_training_frees_what_it_makes_stale(made: list[Any], small: None) -> None:
    model = net()
    validated(model)
    trained(model)
    assert not any(kept_plans._at(plan) is model[0] for plan in kept_plans._KEPT)
    assert validated(model) == validated(copy.deepcopy(model))


def test_pytorchs_threads_are_used_between_its_operations(
    made: list[Any], small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    original = cpu_inference.network
    monkeypatch.setattr(
        cpu_inference, "network", lambda *a, **named: asked.append(named.get("beside", False)) or original(*a, **named)
    )
    # Of batches that PyTorch makes, and of a loader with threads of its own.
    features(net())
    features(net(), cnnrs.DataLoader(torch.utils.data.TensorDataset(*batches(8)[0]), batch_size=4))
    assert asked == [True, False]
    # In front of what is trained, and of a network of which nothing is left to PyTorch.
    model = cnnrs.freeze(net(), statistics=True)
    cnnrs.unfreeze(model[5])
    trained(model.train())
    validated(net())
    assert asked[2:] == [True, False]


def test_epochs_share_their_frozen_front(made: list[Any], small: None) -> None:
    model = cnnrs.freeze(net(), statistics=True)
    cnnrs.unfreeze(model[5])
    trained(model.train())
    count = len(made)
    assert count
    # Validation has all of it in between, and never the same again.
    for _ in range(2):
        validated(model)
        count = len(made)
        trained(model.train())
        assert len(made) == count


def test_a_plan_is_compared_with_pytorch_once(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[tuple[int, ...]] = []
    original = frozen_front.play

    def spy(lowered: Any, tensors: Any, inputs: torch.Tensor, **options: Any) -> torch.Tensor:
        played.append(tuple(inputs.shape))
        return original(lowered, tensors, inputs, **options)

    monkeypatch.setattr(frozen_front, "play", spy)
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    model, shape = nn.Sequential(*net()[:3], *pooled), batches()[0][0].shape[1:]
    validated(model)
    assert played == [(2, *shape)]
    validated(model)
    assert len(played) == 1
    # Other weights, and images of another size.
    data(model)
    validated(model)
    assert len(played) == 2
    larger = [(torch.randn(3, shape[0], shape[1] + 4, shape[2] + 3), torch.arange(3))]
    cnnrs.fit(0, model, larger, "validation", loss_fn=F.cross_entropy, verbose=False)
    assert len(played) == 3


def test_numbers_that_are_none_are_no_comparison(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[int] = []
    original = frozen_front.play

    def spy(*given: Any, **options: Any) -> torch.Tensor:
        played.append(len(given[2]))
        return original(*given, **options)

    monkeypatch.setattr(frozen_front, "play", spy)
    model, (inputs, targets) = net(), batches()[0]

    several = [(torch.full_like(inputs, torch.inf), targets), (inputs, targets), (inputs, targets)]
    with pytest.raises(cnnrs.NonFiniteLossError):
        cnnrs.fit(0, model, several[:1], "validation", loss_fn=F.cross_entropy, verbose=False)
    assert not played
    cnnrs.fit(0, model, several[1:], "validation", loss_fn=F.cross_entropy, verbose=False)
    assert played == [2]
