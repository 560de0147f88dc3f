"""Operations in place and what else sees their memory: as PyTorch, on every engine, or the user's module runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnrs
from cnnrs.model.lowering import lower
from cnnrs.model.operations import Unsupported


class Net(nn.Module):
    """A convolution, anything, and a linear layer."""

    def __init__(self, between: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.between = between
        self.conv, self.other = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.leaky, self.relu, self.silu = nn.LeakyReLU(0.2, inplace=True), nn.ReLU(inplace=True), nn.SiLU(inplace=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.between(self, x).mean((2, 3)))


def summed_in_place(self: Any, x: torch.Tensor) -> torch.Tensor:
    h = self.conv(x)
    out = h
    out += self.other(self.conv(x).sigmoid())
    return F.relu(h) + out


def leaky_before_a_reader(self: Any, x: torch.Tensor) -> torch.Tensor:
    h = self.conv(x)
    return self.leaky(h) + h


def view_before(self: Any, x: torch.Tensor) -> torch.Tensor:
    h = self.conv(x)
    flat = h.flatten(2)
    self.relu(h)
    return flat.view(flat.size(0), 4, 5, 5) + h


def view_written(self: Any, x: torch.Tensor) -> torch.Tensor:
    h = self.conv(x)
    flat = h.view(h.size(0), 4, -1)
    flat.relu_()
    return self.other(h)


def through_identity(self: Any, x: torch.Tensor) -> torch.Tensor:
    h = self.conv(x)
    same = F.dropout(nn.functional.dropout(h, 0.5, training=False), 0.0)
    same += self.other(h.tanh())
    return self.relu(h) + same


def product(self: Any, x: torch.Tensor) -> torch.Tensor:
    h = self.conv(x)
    out = h
    out *= self.other(self.conv(x).tanh())
    return out + h


def twice(self: Any, x: torch.Tensor) -> torch.Tensor:
    h = self.silu(self.conv(x))
    return F.relu6(F.hardswish(h, inplace=True), inplace=True) + h


def method_in_place(self: Any, x: torch.Tensor) -> torch.Tensor:
    h = self.conv(x)
    h.tanh_()
    return self.other(h)


def the_batch(self: Any, x: torch.Tensor) -> torch.Tensor:
    F.relu(x, inplace=True)
    return self.conv(x)


def the_batch_leaky(self: Any, x: torch.Tensor) -> torch.Tensor:
    self.leaky(x)
    return self.conv(x)


FORWARDS = [summed_in_place, leaky_before_a_reader, view_before, view_written, through_identity, product, twice,
            method_in_place, the_batch, the_batch_leaky]  # fmt: skip


def batches(count: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(4, 2, 5, 5), torch.randint(3, (4,))) for _ in range(count)]


def trained(model: nn.Module, data: list[Any], engine: str | None) -> dict[str, torch.Tensor]:
    """State after two epochs; engine None is the plain loop. The batches are part of it: forward may overwrite them."""
    model, data = copy.deepcopy(model), copy.deepcopy(data)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(2)
    for epoch in range(2):
        if engine is not None:
            cnnrs.fit(epoch, model, data, optimizer=sgd, loss_fn=F.cross_entropy, engine=engine, verbose=False)  # type: ignore[arg-type]
            continue
        model.train()
        for inputs, targets in data:
            sgd.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            sgd.step()
    return {**model.state_dict(), **{f"batch {i}": inputs for i, (inputs, _) in enumerate(data)}}


@pytest.mark.parametrize("engine", ["auto", "torch", "cpu"])
@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_in_place_trains_as_the_plain_loop(forward: Any, engine: str) -> None:
    torch.manual_seed(0)
    model, data = Net(forward), batches()
    expected = trained(model, data, None)
    try:
        found = trained(model, data, engine)
    except (cnnrs.UnsupportedModelError, ValueError) as refused:
        assert engine != "auto" and "overwr" in str(refused), refused
        return
    for name, tensor in expected.items():
        # Engine cpu adds in another order: a few roundings of values of size one, over four steps.
        tolerance = 0.0 if engine == "torch" else 1e-5
        torch.testing.assert_close(found[name], tensor, rtol=0.0, atol=tolerance, msg=name)


@pytest.mark.parametrize("engine", ["auto", "torch", "cpu"])
@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_in_place_gives_the_features_of_the_module(forward: Any, engine: Any) -> None:
    torch.manual_seed(0)
    model = Net(forward).eval()
    data = batches()
    with torch.no_grad():
        expected = torch.cat([model(inputs.clone()) for inputs, _ in data])
    given = copy.deepcopy(data)
    try:
        features, _ = cnnrs.preconv(given, model, engine=engine)
    except cnnrs.UnsupportedModelError as refused:
        assert engine != "auto" and "overwr" in str(refused), refused
        return
    # Values of size one, a few hundred terms.
    torch.testing.assert_close(features, expected, rtol=0.0, atol=1e-5)
    overwritten = not torch.equal(given[0][0], data[0][0])
    assert overwritten == (forward in (the_batch, the_batch_leaky))


def test_what_can_be_said_is_lowered() -> None:
    for forward in (summed_in_place, product, twice, method_in_place, the_batch, through_identity):
        assert lower(Net(forward)).operations, forward
    leaky = lower(Net(lambda self, x: self.leaky(self.conv(x))))
    assert leaky.kinds[:3] == ["Input", "Conv2d", "LeakyReLU"] and not leaky.operations[2][3]["inplace"]
    # The sum is what both names read.
    kinds, nodes = lower(Net(summed_in_place)).kinds, lower(Net(summed_in_place)).operations
    assert [nodes[i][1] for i in nodes[-3][2]] == ["ReLU", "Add"] and kinds[-3] == "Add"


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (view_before, r"reads a view of a value, which relu has overwritten since"),
        (view_written, r"reads a view of a value, which relu has overwritten since"),
        (the_batch_leaky, r"leaky \(LeakyReLU\): overwrites the batch"),
        (lambda self, x: self.leaky(self.conv(x).sigmoid()), "overwrites a value that a derivative may need"),
        (
            lambda self, x: F.leaky_relu(self.conv(x), -0.1, inplace=True),
            "a negative slope cannot be undone",
        ),
    ],
)
def test_what_cannot_be_said_is_refused(forward: Any, reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        lower(Net(forward))
    assert cnnrs.explain(Net(forward)).engine == "python"


@pytest.mark.parametrize("engine", ["auto", "torch", "cpu"])
@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.relu(self.conv(x).sigmoid()),
        lambda self, x: self.relu(F.relu(self.conv(x))),
        lambda self, x: self.leaky(F.leaky_relu(self.conv(x), 0.2, inplace=True)) + 0 * self.other(self.conv(x)),
        lambda self, x: self.silu(F.leaky_relu_(self.conv(x), 0.2)).relu_(),
        lambda self, x: self.other(h := self.conv(x)) + self.relu(h),
    ],
)
def test_what_pytorch_refuses_to_go_back_through_is_refused(forward: Any, engine: str) -> None:
    torch.manual_seed(0)
    model, data = Net(forward), batches(1)
    try:
        expected = trained(model, data, None)
    except RuntimeError as refused:
        assert "modified by an inplace operation" in str(refused)
        with pytest.raises(
            (RuntimeError, ValueError, cnnrs.UnsupportedModelError), match=r"inplace operation|overwrites"
        ):
            trained(model, data, engine)
        return
    try:
        found = trained(model, data, engine)
    except (cnnrs.UnsupportedModelError, ValueError) as refused:
        assert engine != "auto", refused
        return
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0.0, atol=1e-5)


ACTIVATIONS: dict[str, nn.Module] = {
    "relu": nn.ReLU(), "relu6": nn.ReLU6(), "leaky": nn.LeakyReLU(0.2), "leaky in place": nn.LeakyReLU(0.2, True),
    "negative": nn.LeakyReLU(-0.3), "silu": nn.SiLU(), "gelu": nn.GELU(), "gelu tanh": nn.GELU("tanh"),
    "hardswish": nn.Hardswish(), "hardsigmoid": nn.Hardsigmoid(), "sigmoid": nn.Sigmoid(), "tanh": nn.Tanh(),
}  # fmt: skip


class Shifted(nn.Module):
    """The gradient of ``weight`` is the activation's slope at the inputs."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.line, self.activation = nn.Linear(1, 1), activation
        nn.init.constant_(self.line.weight, 1.0)
        nn.init.zeros_(self.line.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.line(x))


@pytest.mark.parametrize("engine", ["torch", "cpu"])
@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("at", [0.0, 3.0, -3.0, 6.0, -6.0])
def test_slopes_at_kinks_are_pytorchs(name: str, at: float, engine: Any) -> None:
    if name == "hardswish" and abs(at) == 3 and torch.__version__.startswith("2.4."):
        pytest.skip("torch 2.4 has another slope there than its successors")
    data = [(torch.full((2, 1), at), torch.full((2, 1), -1.0))]
    plain = Shifted(ACTIVATIONS[name])
    F.mse_loss(plain(data[0][0]), data[0][1]).backward()
    model = Shifted(ACTIVATIONS[name])
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    cnnrs.fit(0, model, copy.deepcopy(data), optimizer=sgd, loss_fn=F.mse_loss, engine=engine, verbose=False)
    slope = -model.line.bias.detach()
    # One rounding of numbers below 16; engine torch has the bits.
    tolerance = 0.0 if engine == "torch" else 2e-6
    torch.testing.assert_close(slope, plain.line.bias.grad, rtol=0.0, atol=tolerance, msg=f"{slope}")
