"""Stochastic depth that networks write themselves is one operation, which draws what they draw."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnrs
from cnnrs.engine import verify
from cnnrs.engine.frozen_front import front_of
from cnnrs.engine.kernels import Kernels
from cnnrs.model.lowering import lower
from cnnrs.model.operations import Unsupported
from cnnrs.model.player import play
from native_block import Inverted


def drop_connect(x: torch.Tensor, p: float) -> torch.Tensor:
    """As efficientnet_pytorch has it."""
    keep = 1 - p
    random = keep
    random += torch.rand([x.shape[0], 1, 1, 1], dtype=x.dtype, device=x.device)
    return x / keep * torch.floor(random)


def drop_path(x: torch.Tensor, p: float) -> torch.Tensor:
    """As transformers has it."""
    random = (1 - p) + torch.rand((x.size(0), 1, 1, 1), dtype=x.dtype, device=x.device)
    random.floor_()
    return x.div(1 - p) * random


class Net(Inverted):
    """Draws in front of its residual sum."""

    def __init__(self, drop: Callable[[torch.Tensor, float], torch.Tensor] = drop_connect) -> None:
        super().__init__(nn.ReLU6)
        self.drop = drop
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x))
        y = self.act1(self.norm1(self.expand(x)))
        y = self.act2(self.norm2(self.depthwise(y)))
        y = self.dropout(self.norm3(self.project(y)))
        y = self.last(x + (self.drop(y, 0.4) if self.training else y))
        return self.fc(self.act3(self.norm4(y)).mean((2, 3)))


@pytest.mark.parametrize("drop", [drop_connect, drop_path])
def test_same_bits(drop: Any) -> None:
    torch.manual_seed(0)
    model, x = Net(drop), torch.randn(16, 3, 9, 9)
    twin = copy.deepcopy(model)
    lowered = lower(twin)
    (drawn,) = [attributes for _, kind, _, attributes in lowered.operations if kind == "StochasticDepth"]
    assert drawn == {"p": 1 - 0.6, "rows": True, "keep": 0.6}
    for _ in range(2):
        torch.manual_seed(1)
        theirs = model(x)
        state = torch.get_rng_state()
        torch.manual_seed(1)
        ours = play(lowered, lowered.tensors, x)
        assert torch.equal(theirs, ours) and torch.equal(state, torch.get_rng_state())
        theirs.sum().backward()
        ours.sum().backward()
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert one.grad is not None and torch.equal(one.grad, other.grad)


def test_the_first_batch_goes_through_the_module_with_the_same_draws() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(8, 3, 9, 9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state, samples = torch.get_rng_state(), list[Any]()
    assert verify.differs(model, lower(model), x, engine="front", optimizer=optimizer, samples=samples) is None
    assert torch.equal(state, torch.get_rng_state())
    # What was drawn once says nothing about the next batch.
    assert samples == []
    # Neither does the longer way find anything.
    case = verify._Case(model, lower(model), play, True, frozenset(), None)
    assert case.verdict(x, last=True) == (True, None)
    assert torch.equal(state, torch.get_rng_state())


def test_other_draws_are_found() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(8, 3, 9, 9)
    lowered = lower(model)
    changed = next(attributes for _, kind, _, attributes in lowered.operations if kind == "StochasticDepth")
    changed["keep"] = 0.3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reason = verify.differs(model, lowered, x, engine="front", optimizer=optimizer)
    assert reason is not None and "its outputs" in reason


def test_native_kernels_draw_the_same(two_threads: None) -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(16, 3, 12, 12)
    # In another order of memory it drops others.
    model.dropout.p = 0.0
    kernels = Kernels(lower(model))
    assert kernels.operations > 6
    torch.manual_seed(3)
    theirs = model(x)
    torch.manual_seed(3)
    ours = kernels.play(lower(model), lower(model).tensors, x)
    # Sums of up to 40 products of values about 1.
    assert (theirs - ours).abs().max() < 40 * 2**-23 * theirs.abs().max()


def test_fit_follows_the_plain_loop(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnnrs.engine.frozen_front.LEAST_FLOPS", 1)
    monkeypatch.setattr("cnnrs.engine.memory_order.LEAST_PIXELS", 1)
    torch.manual_seed(0)
    model = Net()
    model.dropout.p = 0.0
    plain, batches = copy.deepcopy(model), [(torch.randn(16, 3, 12, 12), torch.arange(16) % 3) for _ in range(10)]
    sgd = torch.optim.SGD(plain.parameters(), lr=0.05)
    torch.manual_seed(4)
    for x, y in batches:
        sgd.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        sgd.step()
    state = torch.get_rng_state()
    torch.manual_seed(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    cnnrs.fit(0, model, batches, optimizer=optimizer, loss_fn=F.cross_entropy, verbose=False)
    assert torch.equal(state, torch.get_rng_state())
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        # Ten steps of 0.05 with gradients about 1: rounding grows.
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def test_dropout_of_images_is_no_difference(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnnrs.engine.frozen_front.LEAST_FLOPS", 1)
    monkeypatch.setattr("cnnrs.engine.memory_order.LEAST_PIXELS", 1)
    torch.manual_seed(0)
    model, batches = Net(), [(torch.randn(16, 3, 12, 12), torch.arange(16) % 3)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with warnings.catch_warnings():
        # That PyTorch's own kernels are used.
        warnings.simplefilter("error")
        cnnrs.fit(0, model, batches, optimizer=optimizer, loss_fn=F.cross_entropy, verbose=False)


def _rand(x: torch.Tensor, *shape: Any) -> torch.Tensor:
    return torch.rand(*shape or ([x.shape[0], 1, 1, 1],), dtype=x.dtype, device=x.device)


@pytest.mark.parametrize(
    ("drop", "reason"),
    [
        (lambda x, p: x / (1 - p) * torch.floor(p + _rand(x)), "otherwise than stochastic depth"),
        (lambda x, p: x * torch.floor(p + _rand(x)), "otherwise than stochastic depth"),
        (lambda x, p: x / p * (p + _rand(x)), "otherwise than stochastic depth"),
        (lambda x, p: x / p * torch.floor(0.1 + (p + _rand(x))), "otherwise than stochastic depth"),
        (lambda x, p: x / p * torch.floor(2.0 * _rand(x)), "otherwise than stochastic depth"),
        (lambda x, p: torch.cat([x, _rand(x)]), "otherwise than stochastic depth"),
        (lambda x, p: nn.functional.relu(_rand(x)) + x, "otherwise than stochastic depth"),
        (lambda x, p: x + 0 * (_rand(x) is None), "argument 0"),
        (lambda x, p: x / p, "divides by a number"),
        (lambda x, p: (x / p).relu(), "divides by a number"),
        (lambda x, p: x / p * torch.floor(p + _rand(x, x.shape[0], 3, 1, 1)), "makes a tensor of the batch's size"),
        (lambda x, p: x / p * torch.floor(p + _rand(x, x.shape[1], 1, 1, 1)), "random numbers itself"),
        (lambda x, p: x / p * torch.floor(p + torch.rand(x.shape[0], 1, 1, 1)), "makes a tensor of the batch's size"),
        (lambda x, p: x / p * torch.floor(p + torch.randn(x.shape[0], 1, 1, 1)), "makes a tensor of the batch's size"),
    ],
)  # fmt: skip
def test_anything_else_is_not_taken_apart(drop: Any, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        lower(Net(drop))


def twice(x: torch.Tensor, p: float) -> torch.Tensor:
    mask = torch.floor(p + _rand(x))
    return x / p * mask + x / p * mask


def from_before(x: torch.Tensor, p: float) -> torch.Tensor:
    random = p + _rand(x)
    mask = random.floor()
    return x / p * mask + random


def two_at_once(x: torch.Tensor, p: float) -> torch.Tensor:
    one, two = torch.floor(p + _rand(x)), torch.floor(p + _rand(x))
    return x / p * one + x / p * two


def with_dropout_between(x: torch.Tensor, p: float) -> torch.Tensor:
    mask = torch.floor(p + _rand(x))
    return F.dropout(x, 0.5) / p * mask


def overwritten_between(x: torch.Tensor, p: float) -> torch.Tensor:
    quotient = x / p
    x.relu_()
    return quotient * torch.floor(p + _rand(x)) + x


def as_many_as_another_has(x: torch.Tensor, p: float) -> torch.Tensor:
    mean = x.mean(0, keepdim=True)
    return x / p * torch.floor(p + _rand(x, mean.shape[0], 1, 1, 1))


def unused(x: torch.Tensor, p: float) -> torch.Tensor:
    _rand(x)
    return x


@pytest.mark.parametrize(
    "drop",
    [twice, from_before, two_at_once, with_dropout_between, overwritten_between, as_many_as_another_has, unused],
)
def test_a_draw_is_used_once_and_at_once(drop: Any) -> None:
    with pytest.raises(Unsupported, match=r"stochastic depth|divides"):
        lower(Net(drop))


def test_generators_that_are_put_back() -> None:
    def forked(x: torch.Tensor, p: float) -> torch.Tensor:
        with torch.random.fork_rng():
            return drop_connect(x, p)

    def saved(x: torch.Tensor, p: float) -> torch.Tensor:
        state = torch.default_generator.get_state()
        y = drop_connect(x, p)
        torch.default_generator.set_state(state)
        return y

    for drop, reason in ((forked, r"calls fork_rng\(\)"), (saved, r"calls .*get_state\(\)")):
        with pytest.raises(Unsupported, match=reason):
            lower(Net(drop))


def test_a_difference_that_is_found_leaves_random_numbers_alone() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 3, 9, 9)
    lowered = lower(model)
    wrong = [(n, k, i, {**a, "eps": 9.0} if k == "BatchNorm2d" else a) for n, k, i, a in lowered.operations]
    state, optimizer = torch.get_rng_state(), torch.optim.SGD(model.parameters(), lr=0.1)
    found = verify.differs(model, replace(lowered, operations=wrong), x, engine="python", optimizer=optimizer)
    assert found is not None and "first behind norm (BatchNorm2d)" in found
    assert torch.equal(state, torch.get_rng_state())


def test_a_front_ends_before_a_draw_that_keeps_all(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cnnrs.engine.frozen_front.LEAST_FLOPS", 1)
    model = Net(lambda x, _: drop_connect(x, 0.0))
    for module in (model.norm, model.norm1, model.norm2, model.norm3):
        module.eval()
    model.dropout.p = 0.0
    front = front_of(lower(model.requires_grad_(False)), torch.randn(4, 3, 9, 9), True, 1000)
    assert front is not None and front.end == "norm (BatchNorm2d)"


def test_types_are_asked_for_in_training_only() -> None:
    with pytest.raises(Unsupported, match="dtype of a tensor"):
        lower(Net().double())
    with pytest.raises(Unsupported, match="dtype of a tensor"):
        lower(Net(), gradients=False)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(Unsupported, match="dtype of a tensor"):
        lower(Net())
    assert lower(Net().eval(), gradients=False)


def test_values_that_are_no_images() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return drop_connect(self.fc(x), 0.5)

    with pytest.raises(RuntimeError, match=r"expects an input of shape \(N, C, H, W\)"):
        lower(Flat()).graph.shapes([3, 4])
