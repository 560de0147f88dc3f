"""Networks that look at the size of their images: numbers in a graph for one size, but for the number of samples."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cnnrs
from cnnrs.engine import cpu_inference
from cnnrs.model.lowering import lower
from cnnrs.model.operations import Unsupported

IMAGE = (3, 18, 13)
Made = Callable[[torch.Tensor], torch.Tensor]


class Behind(nn.Module):
    """What is made of the 8 channels of a convolution, and a convolution."""

    def __init__(self, make: Made) -> None:
        super().__init__()
        self.make, self.conv, self.last = make, nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.make(self.conv(x)))  # type: ignore[no-any-return]


class SamePadding(nn.Conv2d):
    """As TensorFlow pads: the last row and column get what is odd."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ih, iw = x.size()[-2:]
        pads = []
        for size, kernel, stride in zip((iw, ih), self.kernel_size[::-1], self.stride[::-1], strict=True):
            pad = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads += [pad // 2, pad - pad // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


def same() -> nn.Module:
    """Two sizes of images are padded differently; behind an activation with no zero of its own."""
    return nn.Sequential(
        SamePadding(3, 24, 3, stride=2), nn.BatchNorm2d(24), nn.SiLU(), SamePadding(24, 24, 5, stride=2, groups=24),
        nn.Sigmoid(), SamePadding(24, 40, 2, stride=(1, 2)), SamePadding(40, 8, 3),
    )  # fmt: skip


def sliced(x: torch.Tensor) -> torch.Tensor:
    return F.adaptive_avg_pool2d(x, [side // 2 for side in x.shape[2:]])


def counted(x: torch.Tensor) -> torch.Tensor:
    return x.relu() if len(x.shape) == 4 == len(x.size()) and x.ndim == x.dim() == 4 else x


def joined(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).reshape(x.shape[:2] + x.shape[2:])


def in_front(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).reshape((x.shape[0],) + x.shape[1:])  # noqa: RUF005


def unpacked(x: torch.Tensor) -> torch.Tensor:
    n, c = x.shape[:2]
    return x.flatten(1).view(n, c, *x.shape[-2:])


def of_another(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).view(x.relu().shape)


def compared(x: torch.Tensor) -> torch.Tensor:
    assert x.shape[1:] == (8, 18, 13) and x.size()[-1] == 13 and x.shape[2] > x.shape[3]
    return x.relu() if math.prod(x.shape[1:]) == 8 * 18 * 13 == x.shape[1:].numel() else x


ANSWERED = [sliced, counted, joined, in_front, unpacked, of_another, compared]


def error(features: torch.Tensor, model: nn.Module, images: torch.Tensor) -> float:
    """Relative, against float64."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(images.double())
    assert features.shape == exact.shape
    return float((features.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("make", ANSWERED)
def test_sizes_but_the_batchs_are_numbers(make: Made) -> None:
    model = Behind(make).eval()
    found = lower(model, False, IMAGE)
    for count in (1, 3, 18):
        images = torch.randn(count, *IMAGE)
        assert error(cpu_inference.network(found)(images), model, images) < 1e-6
    with pytest.raises(Unsupported):
        lower(model)


def test_the_padding_of_tensorflow_at_two_sizes() -> None:
    model = same().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    assert cnnrs.explain(model, (2, 3, 18, 13)).preconv == "cpu"
    for image in ((3, 18, 13), (3, 9, 12), (3, 23, 8)):
        images = torch.randn(3, *image)
        features, _ = cnnrs.preconv(DataLoader(TensorDataset(images, torch.zeros(3)), 2), model, verbose=False)
        assert error(features, model, images) < 1e-6
    pooled = nn.Sequential(model, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    batches = [(torch.randn(2, 3, side, 17), torch.zeros(2)) for side in (18, 15, 18)]
    features, _ = cnnrs.preconv(batches, pooled, engine="cpu", verbose=False)
    for (images, _), rows in zip(batches, features.split(2), strict=True):
        assert error(rows, pooled, images) < 1e-6


def hides(x: torch.Tensor) -> torch.Tensor:
    try:
        return x if x.shape[:2].numel() > 7 else x.relu()
    except Exception:
        return x


REFUSED: dict[str, Made] = {
    "product": lambda x: x * math.prod(x.shape),
    "sum": lambda x: x.reshape(x.shape[0], sum(x.shape[:2]) - x.shape[0], *x.shape[2:]),
    "twice": lambda x: x.view(x.shape[:2][0] * 2 // 2, *x.shape[1:]),
    "from the end": lambda x: x.relu() if x.shape[-4] > 2 else x,
    "equal": lambda x: x.relu() if x.shape == (2, 8, 18, 13) else x,
    "equal slices": lambda x: x.relu() if x.shape[:1] == (2,) else x,
    "contained": lambda x: x.relu() if 2 in x.shape else x,
    "ordered": lambda x: x.relu() if x.shape[:2] > (2, 8) else x,
    "reversed": lambda x: x.relu() if list(reversed(x.shape))[-1] == 2 else x,
    "every second": lambda x: x.relu() if x.shape[::2][0] % 2 else x,
    "joined": lambda x: x.relu() if ((1,) + x.shape)[1] == 2 else x,  # noqa: RUF005
    "largest": lambda x: x.relu() if max(x.shape) > 18 else x,
    "indexed": lambda x: x.relu() if (1, 2, 3)[x.shape[0]] > 1 else x,
    "repeated": lambda x: x.view(x.shape * 1),
    "of a batch's size": lambda x: x * torch.ones(x.shape[:1] + (1, 1, 1)),  # noqa: RUF005
    "counted": lambda x: x.relu() if len(x) > 2 else x,
    "numel": lambda x: x.relu() if x.numel() > 2000 else x,
    "hidden": hides,
}


@pytest.mark.parametrize("name", REFUSED)
def test_nobody_computes_with_the_number_of_samples(name: str) -> None:
    model: Any = Behind(REFUSED[name]).eval()
    with pytest.raises(Unsupported):
        lower(model, False, IMAGE)
    batches = [(torch.randn(count, *IMAGE), torch.zeros(count)) for count in (2, 3)]
    try:
        with torch.no_grad():
            expected = torch.cat([model(images) for images, _ in batches])
    except (IndexError, TypeError, RuntimeError):
        return
    features, _ = cnnrs.preconv(batches, model, verbose=False)
    torch.testing.assert_close(features, expected)
