"""Networks in which native kernels have something to do, and what PyTorch in float64 says of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cnnrs.engine.kernels import Kernels
from cnnrs.model.lowering import lower


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


class Inverted(nn.Module):
    """Batch norms that a convolution alone reads, behind convolutions that gather their statistics."""

    def __init__(self, activation: Callable[[], nn.Module] = nn.SiLU, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 1)
        self.norm = nn.BatchNorm2d(24)
        self.expand, self.norm1 = nn.Conv2d(24, 40, 1, bias=False), nn.BatchNorm2d(40)
        self.depthwise = nn.Conv2d(40, 40, kernel, stride, kernel // 2, groups=40, bias=False)
        self.norm2 = nn.BatchNorm2d(40, affine=False, momentum=None)
        self.project, self.norm3 = nn.Conv2d(40, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.last, self.norm4 = nn.Conv2d(24, 32, 1, bias=False), nn.BatchNorm2d(32, track_running_stats=False)
        self.act1, self.act2, self.act3 = activation(), activation(), activation()
        self.fc = nn.Linear(32, 3)
        self.residual = stride == 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x))
        y = self.act1(self.norm1(self.expand(x)))
        y = self.act2(self.norm2(self.depthwise(y)))
        y = self.norm3(self.project(y))
        y = self.last(x + y if self.residual else y)
        return self.fc(self.act3(self.norm4(y)).mean((2, 3)))


class Padded(Inverted):
    """Zeros around the image by a layer of their own, as "same" padding is written."""

    def __init__(
        self, activation: Callable[[], nn.Module] = nn.SiLU, kernel: int = 3, stride: int = 1,
        pad: tuple[int, int, int, int] = (0, 2, 0, 2),
    ) -> None:  # fmt: skip
        super().__init__(activation, kernel, stride)
        conv = nn.Conv2d(40, 40, kernel, stride, groups=40, bias=False)
        self.depthwise = nn.Sequential(nn.ZeroPad2d(pad), conv)


class Mean(nn.Module):
    """The mean of each channel of an image, as timm writes it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3), keepdim=True)


class Gated(nn.Module):
    """Squeeze and excitation behind a batch norm and in front of a convolution."""

    def __init__(
        self, activation: Callable[[], nn.Module] = nn.SiLU, channels: int = 40, pool: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 24, 1), nn.BatchNorm2d(24)
        self.expand, self.norm1 = nn.Conv2d(24, 40, 1, bias=False), nn.BatchNorm2d(40)
        self.pool = pool or nn.AdaptiveAvgPool2d(1)
        self.squeeze, self.excite = nn.Conv2d(40, 10, 1), nn.Conv2d(10, channels, 1)
        self.project, self.norm2 = nn.Conv2d(40, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.act, self.act1 = activation(), activation()
        self.fc = nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x))
        y = self.act(self.norm1(self.expand(x)))
        y = self.excite(self.act1(self.squeeze(self.pool(y)))).sigmoid() * y
        return self.fc((self.norm2(self.project(y)) + x).mean((2, 3)))


def sequential(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def outcome(
    model: nn.Module, inputs: torch.Tensor, kernels: bool, dtype: torch.dtype = torch.float32, of_inputs: bool = True
) -> dict[str, Any]:
    """Output, gradients and buffers behind one batch."""
    model, inputs = copy.deepcopy(model).to(dtype), inputs.to(dtype, copy=True).requires_grad_(of_inputs)
    lowered = lower(model, True)
    output = Kernels(lowered).play(lowered, lowered.tensors, inputs) if kernels else model(inputs)
    output.square().sum().backward()
    found = {"output": output.detach(), "input": inputs.grad, **dict(model.named_buffers())}
    return found | {name: p.grad for name, p in model.named_parameters()}


def assert_as_exact(model: nn.Module, inputs: torch.Tensor, of_inputs: bool = True) -> None:
    """At most ten times the error of PyTorch in float32, or what rounding of 2e-6 becomes where sums cancel."""
    exact = outcome(model, inputs, False, torch.float64, of_inputs)
    theirs, ours = (outcome(model, inputs, kernels, of_inputs=of_inputs) for kernels in (False, True))
    assert exact.keys() == ours.keys()
    largest = max(value.norm() for value in exact.values() if value is not None and value.is_floating_point())
    for name, value in exact.items():
        if value is None or not value.is_floating_point():
            assert ours[name] is value is None or torch.equal(ours[name], value), name
            continue
        # In front of a batch norm a bias, or the scale of weights, has no gradient but rounding.
        floor = 5e-5 * value.norm() + 1e-6 * largest
        assert (ours[name] - value).norm() <= max(10 * (theirs[name] - value).norm(), floor), name
