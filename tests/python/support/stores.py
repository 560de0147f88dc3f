"""A network that counts the images it sees, and stores made with it: what the tests of stores share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import transforms

import cnnrs

TRANSFORM = transforms.Compose([transforms.Resize((24, 24)), transforms.ToTensor()])
# Another number of images at a time may take another kernel: sums of 27 products of values below 1, 2**-24 each.
ROUNDING = 27 * 2**-24


# How many images each call of a model has seen. Models come to it by `sys.modules`: a global that `forward` reads is
# part of what identifies a model.
SEEN: list[int] = []


class Counting(nn.Module):
    """A backbone that counts the images it sees."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2))
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sys.modules["stores"].SEEN.append(len(x))
        return self.layers(x) * self.scale


def computed() -> int:
    """Images since the last call."""
    count = sum(SEEN)
    SEEN.clear()
    return count


def run(images: Path, out: Path, model: nn.Module | None = None, **options: Any) -> cnnrs.Features:
    data = cnnrs.ImageFolder(images, options.pop("transform", TRANSFORM))
    options.setdefault("engine", "python")
    return cnnrs.preconv(data, model or Counting(), out=out, batch_size=4, **options)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.strip()


def fresh(images: Path, **options: Any) -> cnnrs.Features:
    """What is right, computed without a store."""
    features = run(images, None, **options)  # type: ignore[arg-type]
    SEEN.clear()
    return features
