"""What looks like a vision transformer and computes something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnrs
from cnnrs import _cnnrs
from cnnrs.engine import cpu_inference
from cnnrs.model.lowering import lower
from cnnrs.model.operations import Unsupported

IMAGE = (3, 16, 16)
Made = Callable[["Alike", torch.Tensor], torch.Tensor]


class Alike(nn.Module):
    """Of 16 tokens, 32 channels, 2 heads."""

    def __init__(self, make: Made, *shape: int) -> None:
        super().__init__()
        self.make, self.conv, self.qkv = make, nn.Conv2d(3, 32, 4, stride=4), nn.Linear(32, 96)
        self.positions = nn.Parameter(torch.randn(*(shape or (1, 16, 32))))
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.make(self, self.conv(x).flatten(2).transpose(1, 2))

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.qkv(x).reshape(x.shape[0], 16, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)


def along_queries(m: Alike, x: torch.Tensor) -> torch.Tensor:
    q, k, v = m.heads(x)
    weights = (q @ k.transpose(-2, -1)).transpose(-2, -1).softmax(-1).transpose(-2, -1)
    return (weights @ v).transpose(1, 2).flatten(2)


def from_keys(m: Alike, x: torch.Tensor) -> torch.Tensor:
    q, k, v = m.heads(x)
    return ((q @ k.transpose(-2, -1)).softmax(-1).transpose(-2, -1) @ v).transpose(1, 2).flatten(2)


def of_keys(m: Alike, x: torch.Tensor) -> torch.Tensor:
    q, k, v = m.heads(x)
    return ((q @ k.transpose(-2, -1)).transpose(-2, -1).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("make", [along_queries, from_keys, of_keys])
def test_transposed_scores_are_other_scores(make: Made) -> None:
    model, images = Alike(make).eval(), torch.randn(2, *IMAGE)
    with pytest.raises(Unsupported):
        lower(model, False, IMAGE)
    features, _ = cnnrs.preconv([(images, torch.zeros(2))], model, verbose=False)
    with torch.no_grad():
        assert torch.equal(features, model(images))


def rectified(m: Alike, x: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(*m.heads(x)).transpose(1, 2).flatten(2).relu()


def gated(m: Alike, x: torch.Tensor) -> torch.Tensor:
    x = F.scaled_dot_product_attention(*m.heads(x)).transpose(1, 2).flatten(2)
    return x * x.sigmoid()


def other_heads(m: Alike, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = m.attention(x, x, x, need_weights=False)[0]
    return result


@pytest.mark.parametrize("make", [rectified, gated, other_heads])
@pytest.mark.parametrize("images", [1, 16, 32])
def test_like_the_module(make: Made, images: int) -> None:
    model, batch = Alike(make).eval(), torch.randn(images, *IMAGE)
    model.attention.num_heads = 2
    with torch.no_grad():
        torch.testing.assert_close(cpu_inference.network(lower(model, False, IMAGE))(batch), model(batch))


def test_positions_of_every_image_are_refused() -> None:
    # As many images, or tokens, as the batch has; the wrong ones would be seen at the next batch at the latest.
    for shape in ((2, 16, 32), (2, 1, 32), (2, 1, 1)):
        found = lower(Alike(lambda m, x: x + m.positions, *shape).eval(), False, IMAGE)
        obstacle = _cnnrs.CpuNetwork.obstacle(found.graph, found.tensors, [2, *IMAGE])
        assert obstacle == "positions (Shift): adds something else to every image"


def test_reasons_are_those_for_the_size_of_the_images() -> None:
    def weights(m: Alike, x: torch.Tensor) -> Any:
        return m.attention(x, x, x, attn_mask=torch.ones(16, 16).tril() > 0)[0]

    why = cnnrs.explain(Alike(weights).eval(), (2, *IMAGE))
    assert why.preconv_reasons == ("attention (MultiheadAttention): is called with a mask",)
