"""Networks of convolutions as timm and others write them: small modules of the same structure, and look-alikes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnrs
from cnnrs.engine import cpu_inference, kept_plans
from cnnrs.engine.choice import lowered_for
from cnnrs.model.lowering import Lowered, lower
from cnnrs.model.operations import Unsupported
from cnnrs.model.owned import shaped
from like_module import assert_like_the_module, error

IMAGE = (3, 17, 14)
Made = Callable[["Block", torch.Tensor], torch.Tensor]


class Block(nn.Module):
    """What is made of the 40 channels of a convolution, and a convolution."""

    def __init__(self, make: Made) -> None:
        super().__init__()
        self.make, self.conv, self.last = make, nn.Conv2d(3, 40, 3, padding=1), nn.Conv2d(40, 24, 1)
        self.depthwise, self.norm = nn.Conv2d(40, 40, 7, padding=3, groups=40), nn.LayerNorm(40)
        self.wide, self.narrow = nn.Linear(40, 100), nn.Linear(100, 40)
        self.gamma, self.square = nn.Parameter(torch.rand(40) + 0.5), nn.Parameter(torch.randn(17))
        self.one = nn.Parameter(torch.rand(1) + 0.5)
        self.eca, self.far = nn.Conv1d(1, 1, 5, padding=2, bias=False), nn.Conv1d(1, 2, 3, 2, padding=2, dilation=2)
        self.part, self.other = nn.Conv2d(24, 24, 3, padding=1, groups=8), nn.Conv2d(40, 16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.make(self, self.conv(x)))  # type: ignore[no-any-return]


def convnext(m: Block, x: torch.Tensor) -> torch.Tensor:
    y = m.norm(m.depthwise(x).permute(0, 2, 3, 1))
    y = m.narrow(F.gelu(m.wide(y))).permute(0, 3, 1, 2)
    return y.mul(m.gamma.reshape(1, -1, 1, 1)) + x


def scaled(m: Block, x: torch.Tensor) -> torch.Tensor:
    return x.relu() * m.gamma.view(-1, 1, 1) + m.gamma[None, :, None, None] * x


def ghost(m: Block, x: torch.Tensor) -> torch.Tensor:
    x = torch.cat([m.depthwise(x).relu(), x], dim=1)
    return x[:, :40, :, :] + x[:, 40:80]


def whole(m: Block, x: torch.Tensor) -> torch.Tensor:
    y = m.depthwise(x)[:, :40]
    return y[:, -100:, ...].relu() + y


def first_channels(m: Block, x: torch.Tensor) -> torch.Tensor:
    shortcut = m.other(x)
    return torch.cat([x[:, 0:16] + shortcut, x[:, 16:]], dim=1)


def summed(m: Block, x: torch.Tensor) -> torch.Tensor:
    out: Any = 0
    for part in (x, m.depthwise(x)):
        out += part
    out += 0
    return (out * 1 + 0.0).relu()  # type: ignore[no-any-return]


def cross_stage(m: Block, x: torch.Tensor) -> torch.Tensor:
    x = x[:, :48].relu()
    one, other = x.split([16, 24], dim=1)
    return torch.cat([m.part(other).contiguous(), one], dim=1)


def in_halves(m: Block, x: torch.Tensor) -> torch.Tensor:
    one, other = (x + m.depthwise(x)).chunk(2, dim=1)
    return torch.cat([other, one.sigmoid()], dim=1)


def numbers(m: Block, x: torch.Tensor) -> torch.Tensor:
    return 0.2 * (x * 1.7).relu() + x


def channel_attention(m: Block, x: torch.Tensor) -> torch.Tensor:
    y = m.eca(x.mean((2, 3)).view(x.shape[0], 1, -1))
    return x * y.sigmoid().view(x.shape[0], -1, 1, 1).expand_as(x)


def far(m: Block, x: torch.Tensor) -> torch.Tensor:
    y = m.far(x.mean((2, 3)).view(x.shape[0], 1, -1))
    return x * y.reshape(x.shape[0], 40, 1, 1)


def computed(m: Block, x: torch.Tensor) -> torch.Tensor:
    return x * (m.gamma * 2).view(1, -1, 1, 1)


def transposed(m: Block, x: torch.Tensor) -> torch.Tensor:
    return x * m.gamma.view(8, 5).t().reshape(1, -1, 1, 1)


MAKES: list[Made] = [
    convnext, scaled, ghost, whole, first_channels, summed, cross_stage, in_halves, numbers, channel_attention, far,
    computed, transposed,
]  # fmt: skip


def found(model: nn.Module, image: tuple[int, ...] = IMAGE) -> Lowered:
    return lower(model.eval(), False, image)


@pytest.mark.parametrize("make", MAKES)
def test_like_the_module(make: Made) -> None:
    assert_like_the_module(Block(make).eval(), [IMAGE, (3, 7, 9)])


OTHERS: dict[str, Made] = {
    "another dimension": lambda m, x: x * m.square.view(1, 1, -1, 1),
    "every second channel": lambda m, x: torch.cat([x[:, ::2], x[:, 1::2]], 1),
    "one channel": lambda m, x: x + x[:, 3, None],
    "rows": lambda m, x: x[:, :, 1:],
    "samples": lambda m, x: x[:1] + x,
    "permuted": lambda m, x: x.permute(0, 2, 3, 1)[:, 1:].permute(0, 3, 1, 2),
    "expanded only": lambda m, x: x.mean((2, 3), keepdim=True).expand_as(x),
    "expanded and asked": lambda m, x: x * x.mean((2, 3), keepdim=True).expand_as(x).shape[2],
    "expanded to another": lambda m, x: x.mean((2, 3), keepdim=True).expand_as(x[:, :, 1:]) * x[:, :, 1:],
    "expanded and added": lambda m, x: x.mean((2, 3), keepdim=True).expand_as(x) + x,
    "expanded rows": lambda m, x: x * x.mean(2, keepdim=True).expand_as(x),
    "true": lambda m, x: x + True,
    "split rows": lambda m, x: torch.cat(x.split(3, dim=2)[::-1], 2),
    "added in place to a view": lambda m, x: (x[:, :40].add_(x.relu()), x)[1],
}


@pytest.mark.parametrize("name", OTHERS)
def test_look_alikes_have_the_modules_numbers(name: str) -> None:
    model = Block(OTHERS[name]).eval()
    batches = [(torch.randn(3, *IMAGE), torch.zeros(3)) for _ in range(2)]
    with torch.no_grad():
        expected = torch.cat([model(images) for images, _ in batches])
    try:
        refused = cpu_inference.obstacle(lowered := found(model), batches[0][0])
        if refused is None:
            torch.testing.assert_close(cpu_inference.network(lowered)(batches[0][0]), expected[:3])
    except Unsupported:
        pass
    features, _ = cnnrs.preconv(batches, model, verbose=False)
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize("name", sorted({*OTHERS} - {"true"}))
def test_look_alikes_are_refused(name: str) -> None:
    model = Block(OTHERS[name]).eval()
    with pytest.raises(Unsupported):
        if (reason := cpu_inference.obstacle(found(model), torch.randn(3, *IMAGE))) is not None:
            raise Unsupported(reason)


def test_other_shapes_of_weights_follow_them() -> None:
    model, images = Block(convnext).eval(), torch.randn(2, *IMAGE)
    lowered, again = found(model), found(model)
    assert list(map(id, lowered.tensors)) == list(map(id, again.tensors))
    plan = kept_plans.take(model, lowered)
    plan(images)
    plan.give_back()
    assert kept_plans.take(model, again) is plan
    with torch.no_grad():
        model.gamma.mul_(-2.0)
    assert not plan.network.is_current()
    features, _ = cnnrs.preconv([(images, torch.zeros(2))], model, verbose=False)
    assert error(features, model, images) < 1e-6


def test_where_gradients_count_other_shapes_are_no_weights() -> None:
    with pytest.raises(Unsupported, match="neither parameter nor buffer"):
        lower(Block(convnext).eval())


def test_numbers_beside_other_types_stay_with_the_module() -> None:
    with pytest.raises(Unsupported):
        found(Block(numbers).double())
    assert lowered_for(Block(numbers).double().eval(), "auto", False, IMAGE) is None


class Lines(nn.Module):
    """Summands per channel of (N, C, L), as many channels as there are pixels."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.conv, self.bias = nn.Conv2d(3, 64, 1), nn.Parameter(torch.zeros(shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = (self.conv(x).flatten(2) + self.bias).relu().mean(2)
        return y


@pytest.mark.parametrize("shape", [(1, 64, 1), (64, 1)])
def test_summands_that_are_zero_at_first_are_those_of_channels_later(shape: tuple[int, ...]) -> None:
    model, images = Lines(shape).eval(), torch.randn(2, 3, 8, 8)
    for _ in range(2):
        features, _ = cnnrs.preconv([(images, torch.zeros(2))], model, verbose=False)
        with torch.no_grad():
            torch.testing.assert_close(features, model(images))
            model.bias.copy_(torch.arange(64.0).view(shape))


def test_other_shapes_of_weights_follow_new_memory_between_batches() -> None:
    model, images = Block(convnext).eval(), torch.randn(2, *IMAGE)

    def batches() -> Any:
        yield images, torch.zeros(2)
        model.gamma.data = model.gamma.detach() * -3.0
        yield images, torch.zeros(2)

    features, _ = cnnrs.preconv(batches(), model, engine="cpu", verbose=False)
    assert error(features[2:], model, images) < 1e-6


def test_memory_that_has_moved_is_nobody_elses_shape() -> None:
    tensor = torch.arange(6.0)
    first = shaped(tensor, torch.Size([2, 3]))
    assert shaped(tensor, torch.Size([2, 3])) is first
    # As `share_memory_()` and `set_()` do: the shape lives on elsewhere.
    first.set_(torch.arange(6.0).view(2, 3) + 10)  # type: ignore[call-overload]
    assert torch.equal(shaped(tensor, torch.Size([2, 3])), tensor.view(2, 3))
