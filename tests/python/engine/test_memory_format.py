"""`fit(..., memory_format=torch.channels_last)`: the plain loop's bits, images and weights in that order of memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnrs
import tutorial
import which_engine

LAST: Any = torch.channels_last
pytestmark = [pytest.mark.filterwarnings("ignore:dropout2d:UserWarning"), pytest.mark.usefixtures("two_threads")]


def network() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1), nn.SiLU(),
        nn.Flatten(), nn.Linear(144, 5),
    )  # fmt: skip


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(3)
    return [(torch.randn(n, 3, 12, 12), torch.randint(5, (n,))) for n in (8, 8, 8, 3)]


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), lambda p: torch.optim.AdamW(p, lr=1e-2),
])  # fmt: skip
@pytest.mark.parametrize("engine", ["torch", "python", "auto"])
def test_channels_last_has_the_plain_loops_bits(engine: Any, make: Any) -> None:
    theirs, their_optimizer, ours, our_optimizer = tutorial.twins(network(), make)
    theirs.to(memory_format=LAST)
    data = batches()
    converted = [(x.to(memory_format=LAST), y) for x, y in data]
    fit = cnnrs.compile(
        optimizer=our_optimizer, loss_fn=F.cross_entropy, engine=engine, memory_format=LAST, verbose=False
    )
    for epoch in range(2):
        for phase in ("training", "validation"):
            expected = tutorial.fit(theirs, converted, phase, their_optimizer, F.cross_entropy)
            assert fit(epoch, ours, data, phase) == expected  # type: ignore[arg-type]
    assert tutorial.same(ours.state_dict(), theirs.state_dict())
    assert tutorial.same(our_optimizer.state_dict(), their_optimizer.state_dict())
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert p.stride() == q.stride()
    assert data[0][0].is_contiguous(), "the loader's batch was changed"


def test_weights_keep_their_numbers_and_identity_and_may_go_back() -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())
    cnnrs.fit(0, model, batches(), "validation", loss_fn=F.cross_entropy, memory_format=LAST, verbose=False)
    assert tutorial.same(model.state_dict(), before)
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    assert model[0].weight.is_contiguous(memory_format=LAST) and not model[0].weight.is_contiguous()
    # As long as they stay so, "auto" does not take engine "cpu", and says why.
    assert "not contiguous" in str(cnnrs.explain(model))
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    assert cnnrs.explain(model).engine == cnnrs.explain(network()).engine


def test_engine_cpu_refuses_and_changes_nothing() -> None:
    model = network()
    with pytest.raises(cnnrs.UnsupportedModelError, match="memory_format asks for channels_last"):
        cnnrs.fit(
            0, model, batches(), "validation", loss_fn=F.cross_entropy, engine="cpu", memory_format=LAST, verbose=False
        )
    assert model[0].weight.is_contiguous()


def test_other_formats_are_refused() -> None:
    with pytest.raises(ValueError, match=r"memory_format must be None or torch.channels_last, got torch.preserve_form"):
        cnnrs.fit(
            0, network(), batches(), "validation", loss_fn=F.cross_entropy, memory_format=torch.preserve_format,
            verbose=False,
        )  # fmt: skip


class Viewing(cnnrs.models.SimpleCNN):
    """With the tutorial's `view`, which asks for the usual order of memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv3(self.conv2(self.conv1(x)))
        return self.fc(x.view(x.size(0), -1))


@pytest.mark.parametrize("engine", ["played", "torch"])
def test_the_tutorials_view_works_where_operations_are_run(engine: Any) -> None:
    model = Viewing()
    data = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))]
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    options: Any = {"optimizer": sgd, "loss_fn": F.cross_entropy, "memory_format": LAST, "verbose": False}
    if engine == "torch":
        loss, _ = cnnrs.fit(0, model, data, engine="torch", **options)
    else:
        with which_engine.played():
            loss, _ = cnnrs.fit(0, model, data, **options)
    # Ten classes, weights as they were initialised.
    assert loss == pytest.approx(2.3, abs=0.3)
    for called in ("auto", "python"):
        with pytest.raises(RuntimeError, match=r"Use \.reshape"):
            cnnrs.fit(0, model, data, engine=called, **options)
