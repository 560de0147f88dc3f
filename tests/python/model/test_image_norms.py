"""Norms over images, repeated pixels and numbers behind a ReLU, as timm, Hugging Face and others write them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnrs
from cnnrs.engine import cpu_inference
from cnnrs.model.lowering import Lowered, lower
from cnnrs.model.operations import Unsupported
from like_module import assert_like_the_module

IMAGE = (3, 12, 9)
Made = Callable[["Block", torch.Tensor], torch.Tensor]


class Block(nn.Module):
    """What is made of the 24 channels of a convolution, and a convolution."""

    def __init__(self, make: Made) -> None:
        super().__init__()
        self.make, self.conv, self.last = make, nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 20, 3, padding=1)
        self.weight, self.bias = nn.Parameter(torch.randn(24)), nn.Parameter(torch.randn(24))
        self.gamma, self.beta = nn.Parameter(torch.randn(1, 1, 1, 24)), nn.Parameter(torch.randn(1, 1, 1, 24))
        self.scale, self.summand = nn.Parameter(torch.tensor([0.7])), nn.Parameter(torch.tensor([-0.3]))
        self.group = nn.GroupNorm(1, 24, eps=1e-3)
        self.groups = nn.GroupNorm(4, 24)
        nn.init.normal_(self.group.weight)
        nn.init.normal_(self.group.bias)
        self.twice, self.pool = nn.Upsample(scale_factor=2, mode="nearest"), nn.MaxPool2d(2, 1, ceil_mode=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.make(self, self.conv(x)))  # type: ignore[no-any-return]


def channels_last(make: Made) -> Made:
    def made(m: Block, x: torch.Tensor) -> torch.Tensor:
        return make(m, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    made.__name__ = make.__name__
    return made


@channels_last
def as_timm(m: Block, x: torch.Tensor) -> torch.Tensor:
    g = x.norm(p=2, dim=(1, 2), keepdim=True)
    n = g / (g.mean(dim=-1, keepdim=True) + 1e-6)
    return x + torch.addcmul(m.bias.view(1, 1, 1, -1), m.weight.view(1, 1, 1, -1), x * n)


def as_timm_with_channels_first(m: Block, x: torch.Tensor) -> torch.Tensor:
    g = x.norm(p=2, dim=(2, 3), keepdim=True)
    n = g / (g.mean(dim=1, keepdim=True) + 1e-2)
    return x + torch.addcmul(m.bias.view(1, -1, 1, 1), m.weight.view(1, -1, 1, 1), x * n)


@channels_last
def as_its_authors(m: Block, x: torch.Tensor) -> torch.Tensor:
    g = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
    n = g / (g.mean(dim=-1, keepdim=True) + 1e-6)
    return m.gamma * (x * n) + m.beta + x


@channels_last
def as_hugging_face(m: Block, x: torch.Tensor) -> torch.Tensor:
    g = torch.linalg.vector_norm(x, ord=2, dim=(1, 2), keepdim=True)
    n = g / (g.mean(dim=-1, keepdim=True) + 1e-6)
    return m.gamma * (x * n) + m.beta + x


def grouped(m: Block, x: torch.Tensor) -> torch.Tensor:
    return m.group(x).sigmoid() + F.group_norm(x, 1, m.weight, m.bias)


def pooled_less_itself(m: Block, x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x


def upsampled(m: Block, x: torch.Tensor) -> torch.Tensor:
    y = m.twice(F.max_pool2d(x[:, :, :, :], 2, ceil_mode=True))
    return F.interpolate(y, scale_factor=(1.0, 4.0)) + F.interpolate(y, size=(y.shape[2], y.shape[3] * 4))


def affine(m: Block, x: torch.Tensor) -> torch.Tensor:
    x = F.pad(m.scale * x.relu() + m.summand, (0, 1, 0, 1))
    return m.summand + m.pool(x) * m.scale


def negative(m: Block, x: torch.Tensor) -> torch.Tensor:
    return m.summand * x.relu() + m.scale


def per_channel(m: Block, x: torch.Tensor) -> torch.Tensor:
    x = x.relu() * m.weight.view(-1, 1, 1) + m.bias.view(1, -1, 1, 1)
    return x.mean((2, 3), keepdim=True) + m.bias.view(-1, 1, 1) + x


MAKES: list[Made] = [
    as_timm, as_timm_with_channels_first, as_its_authors, as_hugging_face, grouped, pooled_less_itself, upsampled,
    affine, negative, per_channel,
]  # fmt: skip


def found(model: nn.Module, image: tuple[int, ...] = IMAGE) -> Lowered:
    return lower(model.eval(), False, image)


@pytest.mark.parametrize("make", MAKES)
def test_like_the_module(make: Made) -> None:
    assert_like_the_module(Block(make).eval(), [IMAGE, (3, 8, 5)])


def response(m: Block, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    return m.weight.view(-1, 1, 1) * (x * n) + m.bias.view(-1, 1, 1) + x


def norms(x: torch.Tensor) -> torch.Tensor:
    return x.norm(p=2, dim=(2, 3), keepdim=True)


def ratio(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return norms(x) / (norms(y).mean(1, keepdim=True) + 0.1)


def overwritten(m: Block, x: torch.Tensor) -> torch.Tensor:
    n = ratio(x, x)
    x.relu_()
    return response(m, x, n)


OTHERS: dict[str, Made] = {
    "eps beside the norms": lambda m, x: response(m, x, (norms(x) + 0.1) / norms(x).mean(1, keepdim=True)),
    "no eps": lambda m, x: response(m, x, norms(x) / norms(x).mean(1, keepdim=True)),
    "eps taken away": lambda m, x: response(m, x, norms(x) / (norms(x).mean(1, keepdim=True) - 0.1)),
    "upside down": lambda m, x: response(m, x, (norms(x).mean(1, keepdim=True) + 0.1) / norms(x)),
    "of another value": lambda m, x: response(m, x, ratio(x.relu(), x.relu())),
    "of two values": lambda m, x: response(m, x, ratio(x.relu(), x)),
    "of all pixels": lambda m, x: response(m, x, ratio(x, x).mean((0,), keepdim=True)),
    "over rows": lambda m, x: response(m, x, x.norm(dim=2, keepdim=True) / (x.norm(dim=2, keepdim=True) + 1.0)),
    "over channels": lambda m, x: response(m, x, x.norm(dim=(1, 2), keepdim=True) / 7.0),
    "over samples": lambda m, x: response(m, x, x.norm(dim=(0, 2), keepdim=True) / 7.0),
    "of absolute values": lambda m, x: response(m, x, x.norm(p=1, dim=(2, 3), keepdim=True) / 7.0),
    "a matrix norm": lambda m, x: response(m, x, torch.linalg.norm(x, ord=2, dim=(2, 3), keepdim=True) / 7.0),
    "without the value": lambda m, x: m.weight.view(-1, 1, 1) * (x * ratio(x, x)) + m.bias.view(-1, 1, 1),
    "plus another": lambda m, x: response(m, x, ratio(x, x)) - x + x.relu(),
    "bias first": lambda m, x: m.weight.view(-1, 1, 1) * (x * ratio(x, x) + m.bias.view(-1, 1, 1)) + x,
    "weights of rows": lambda m, x: x + m.weight[:12].view(-1, 1) * (x * ratio(x, x)) + m.bias.view(-1, 1, 1),
    "overwritten": overwritten,
    "several groups": lambda m, x: m.groups(x),
    "a line": lambda m, x: m.group(x.flatten(2)).reshape(x.shape),
    "weights computed": lambda m, x: F.group_norm(x, 1, m.weight * 2, m.bias),
    "nearest by three": lambda m, x: F.interpolate(x, scale_factor=3),
    "nearest by one and a half": lambda m, x: F.interpolate(x, scale_factor=1.5),
    "half as many": lambda m, x: F.interpolate(x, scale_factor=0.5),
    "bilinear": lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "nearest exact": lambda m, x: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
    "to another size": lambda m, x: F.interpolate(x, size=(13, 18)),
}
#: Those that have a counterpart all the same.
TAKEN = {"plus another"}


@pytest.mark.parametrize("name", OTHERS)
def test_look_alikes_keep_the_module(name: str) -> None:
    model = Block(OTHERS[name]).eval()
    images = torch.randn(3, *IMAGE)
    if name not in TAKEN:
        with pytest.raises(Unsupported):
            if (reason := cpu_inference.obstacle(found(model), images)) is not None:
                raise Unsupported(reason)
    with torch.no_grad():
        expected = model(images)
    features, _ = cnnrs.preconv([(images, torch.zeros(3))], model, verbose=False)
    torch.testing.assert_close(features, expected)


def test_training_knows_none_of_them() -> None:
    for make in MAKES:
        with pytest.raises(Unsupported):
            lower(Block(make).eval())
