"""Networks and batches for tests of `preconv` on a GPU, also one that is none."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import transforms

import cnnrs

TRANSFORM = transforms.Compose(
    [transforms.Resize((24, 24)), transforms.ToTensor(), transforms.Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])]
)


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 22 * 22, 5))


def batches(count: int = 7, size: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 3, 24, 24, generator=generator), torch.arange(size)) for _ in range(count)]


def rows(model: nn.Module, data: Iterable[tuple[torch.Tensor, Any]]) -> torch.Tensor:
    """What the CPU makes of batches in the order of memory a GPU gets, which on some processors has other last bits."""
    last: Any = torch.channels_last
    model = copy.deepcopy(model).eval().to(memory_format=last)
    with torch.no_grad():
        return torch.cat([model(images.contiguous(memory_format=last)) for images, _ in data])


def preconv(data: Any, model: Any, **options: Any) -> cnnrs.Features:
    return cnnrs.preconv(data, model, **({"verbose": False} | options))


class Large(nn.Module):
    """More than float16 can hold, and what becomes of it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1, 3 * 24 * 24), 300.0))
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x.flatten(1).abs() + 1, self.weight)
        return y - y if self.kind == "NaN" else y
