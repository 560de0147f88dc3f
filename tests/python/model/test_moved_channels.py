"""Channels that are divided, joined and shuffled, as ShuffleNet does: what is lowered, refused and computed."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import cnnrs
import which_engine
from cnnrs.engine import cpu_inference
from cnnrs.engine.same_bits import same_bits
from cnnrs.engine.verify import differs
from cnnrs.model.lowering import lower
from cnnrs.model.operations import Unsupported
from cnnrs.model.player import play

SHUFFLENETS = ["shufflenet_v2_x0_5", "shufflenet_v2_x1_0"]


class Behind(nn.Module):
    """A function of what a layer makes that has 12 channels whatever the batch, and leaves its input as it is."""

    def __init__(self, function: Callable[[torch.Tensor], Any], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(12, eps=0.0) if layer is None else layer
        self.function = function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self.norm(x))


def shuffled(x: torch.Tensor, groups: int = 3) -> torch.Tensor:
    n, c, h, w = x.size()
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def asks_for_one_size(x: torch.Tensor) -> torch.Tensor:
    each = x.shape[1] // 4
    x = x.view(-1, 4, each, x.size(2), x.size(3)).transpose(2, 1)
    return x.reshape(x.size(0), -1, x.size(3), x.size(4))


def again(x: torch.Tensor) -> torch.Tensor:
    a, b = torch.chunk(shuffled(x), 2, dim=1)
    c, d, e = b.split([1, 2, 3], 1)  # type: ignore[no-untyped-call]
    return shuffled(torch.cat([e, a, c, d], 1), 4).relu()


def sizes_of_images(x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    return torch.channel_shuffle(x, c // 6).view(n, c // 2, 2, h, w).flatten(1, 2)


MOVED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "shuffle": shuffled,
    "chunk": lambda x: x.chunk(5, 1)[1],
    "chunks": lambda x: torch.cat(x.chunk(2, dim=1)[::-1], 1),
    "split": lambda x: torch.cat(torch.split(x, 5, dim=-3)[1:], 1),
    "sections": lambda x: torch.split(x, [2, 3, 7], 1)[2],
    "both": again,
    "function": sizes_of_images,
    "layer": nn.ChannelShuffle(2),
}


@pytest.mark.parametrize("name", MOVED)
def test_numbers_that_only_move_are_the_same(name: str) -> None:
    function = MOVED[name]
    model: nn.Module = Behind(function)
    if name == "layer":
        model = nn.Sequential(nn.BatchNorm2d(12, eps=0.0), nn.ChannelShuffle(2))
    model.eval()
    x = torch.randn(3, 12, 5, 7)
    lowered = lower(model)
    with torch.no_grad():
        expected = model(x.clone())
        assert torch.equal(play(lowered, lowered.tensors, x.clone()), expected)
    assert cnnrs.summary(model, x.shape).layers[-1].output_shape == tuple(expected.shape)
    if name != "function":
        assert torch.equal(torch.from_numpy(run(model, x)), expected)


def run(model: nn.Module, x: torch.Tensor) -> Any:
    """What engine cpu computes."""
    batches = [(x, torch.zeros(len(x), dtype=torch.int64))]
    return cnnrs.preconv(batches, model, engine="cpu", verbose=False).features.numpy()


def test_a_shuffle_is_one_operation() -> None:
    model = Behind(again).eval()
    kinds = ["ChannelShuffle", "Split", "Split", "Split", "Split", "Split", "Cat", "ChannelShuffle", "ReLU"]
    assert lower(model).kinds == ["Input", "BatchNorm2d", *kinds]


def test_a_shuffle_as_part_of_something_else_stays() -> None:
    def twice(x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.size()
        swapped = x.view(n, 3, 4, h, w).transpose(1, 2)
        return swapped.contiguous().view(n, c, h, w) + swapped.flatten(1, 2)

    model, x = Behind(twice).eval(), torch.randn(2, 12, 3, 3)
    lowered = lower(model)
    assert lowered.kinds == ["Input", "BatchNorm2d", "View", "Permute", "ChannelShuffle", "Flatten", "Add"]
    assert torch.equal(play(lowered, lowered.tensors, x), model(x))


def half(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, x.size(1) // 2)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        # An unbatched image has its height there.
        (Behind(half, nn.Conv2d(12, 12, 1)), "forward computes with the size of a tensor"),
        (Behind(half, nn.Identity()), "forward computes with the size of a tensor"),
        (Behind(lambda x: x.view(x.size(0) // 2, -1)), "forward computes with the size of a tensor"),
        (Behind(lambda x: x.view(x.size(2) * 2, -1)), "forward computes with the size of a tensor"),
        (Behind(lambda x: half(x.permute(0, 3, 1, 2))), "forward computes with the size of a tensor"),
        (Behind(lambda x: x.chunk(2, 0)[0]), r"chunk\(\): divides another dimension than the channels"),
        (Behind(lambda x: x.chunk(2)[0]), r"chunk\(\): divides another dimension than the channels"),
        (Behind(lambda x: torch.split(x, [5, 5], 1)[0]), r"split\(\): divides 12 channels into \[5, 5\]"),
        (Behind(lambda x: x.chunk(2, 1)[0], nn.Identity()), "whose number of channels is not known for every batch"),
        (Behind(lambda x: x.chunk(2, 1)[0].relu_()), r"relu_\(\): overwrites a part of a value"),
        (Behind(lambda x: shuffled(x).transpose(1, 2).contiguous()), "copies permuted dimensions"),
        (Behind(lambda x: x.view(x.size(0), 3, 4, 5, 7).transpose(1, 2).contiguous()), "copies permuted dimensions"),
        (Behind(lambda x: x.transpose(1, 2), nn.Identity()), "swaps dimensions of a value that may have any number"),
    ],
)
def test_what_depends_on_the_batch_or_has_no_counterpart_is_refused(model: nn.Module, reason: str) -> None:
    with pytest.raises(Unsupported) as refused:
        lower(model)
    assert re.search(reason, str(refused.value)), refused.value


def test_an_overwritten_value_is_not_read_through_its_parts() -> None:
    def overwrites(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, 1)
        F.relu(x, inplace=True)
        return a + b

    with pytest.raises(Unsupported, match="reads a view of a value, which relu has overwritten since"):
        lower(Behind(overwrites), gradients=False)


@pytest.mark.parametrize("name", ["one size", *SHUFFLENETS])
def test_gradients_go_through(name: str) -> None:
    torch.manual_seed(0)
    if name == "one size":
        model: nn.Module = nn.Sequential(Behind(asks_for_one_size), nn.Flatten(), nn.Linear(12 * 64, 3))
        x = torch.randn(4, 12, 8, 8)
    else:
        model, x = getattr(torchvision.models, name)(num_classes=5), torch.randn(4, 3, 64, 64)
    lowered = lower(model.train())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert differs(model, lowered, x, engine="recorded", optimizer=optimizer) is None
    if name != "one size":
        # To the last bit, derivatives included, by what autograd has written down.
        sample = same_bits(model.eval(), lower(model), play, x[:2], True, lambda _: nullcontext())
        assert sample is not None


@pytest.mark.parametrize("name", SHUFFLENETS)
def test_shufflenet_runs_in_native_code(name: str) -> None:
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)()
    with torch.no_grad():
        model(torch.rand(8, 3, 64, 64))
    model.eval()
    lowered, images = lower(model), torch.rand(3, 3, 96, 80)
    with torch.no_grad():
        assert torch.equal(play(lowered, lowered.tensors, images), model(images))
        torchs, exact = model(images), copy.deepcopy(model).double()(images.double())
        assert cpu_inference.obstacle(lowered, images) is None
        for precise in (False, True):
            ours = cpu_inference.network(lowered, exact=precise)(images)
            assert (ours - exact).norm() <= 5 * (torchs - exact).norm()
    assert cnnrs.explain(model, images.shape).preconv == "cpu"


def test_fit_trains_as_the_plain_loop() -> None:
    torch.manual_seed(0)
    ours = torchvision.models.shufflenet_v2_x0_5(num_classes=3)
    plain = copy.deepcopy(ours)
    batches = [(torch.randn(4, 3, 32, 32), torch.randint(3, (4,))) for _ in range(3)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, fused=True) for m in (ours, plain)]
    with which_engine.watched() as ran, which_engine.played():
        cnnrs.fit(0, ours, batches, optimizer=optimizers[0], loss_fn=F.cross_entropy, verbose=False)
    assert ran == ["recorded"]
    plain.train()
    for inputs, targets in batches:
        optimizers[1].zero_grad()
        F.cross_entropy(plain(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizers[1].step()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name


def test_engine_cpu_of_training_refuses_them() -> None:
    model = nn.Sequential(Behind(again), nn.Flatten(), nn.Linear(12 * 16, 3))
    why = cnnrs.explain(model, (2, 12, 4, 4))
    assert any("the cpu engine has no training kernel for it" in reason for reason in why.reasons), why.reasons
