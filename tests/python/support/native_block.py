"""A small network in which every native kernel has something to do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Block(nn.Module):
    """Everything that has a kernel: residual sums, depthwise convolutions, odd numbers of channels."""

    def __init__(self, activation: Callable[[], nn.Module] = nn.SiLU) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), activation())
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.wide = nn.Sequential(nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24), activation())
        self.depthwise = nn.Conv2d(24, 24, 5, 2, 2, groups=24)
        self.bn3 = nn.BatchNorm2d(24, affine=False, momentum=None)
        self.act = activation()
        self.fc = nn.Linear(24, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.act(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x
        x = self.bn3(self.depthwise(self.wide(self.act(y))))
        return self.fc(x.mean((2, 3)))
