"""Engine ``cpu``'s features of a module against the module's own."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

import cnnrs
from cnnrs.engine import cpu_inference
from cnnrs.model.lowering import lower
from cnnrs.model.player import play


def error(features: torch.Tensor, model: nn.Module, images: torch.Tensor) -> float:
    """Relative, against float64."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(images.double())
    assert features.shape == exact.shape
    return float((features.double() - exact).norm() / exact.norm())


def assert_like_the_module(model: nn.Module, sizes: Sequence[tuple[int, ...]]) -> None:
    """Images of each size, of different numbers; of the first by `preconv`, in two batches."""
    for image in sizes:
        lowered = lower(model.eval(), False, image)
        for count in (1, 3, 8):
            images = torch.randn(count, *image)
            assert error(cpu_inference.network(lowered)(images), model, images) < 1e-6
        with torch.no_grad():
            torch.testing.assert_close(play(lowered, lowered.tensors, images), model(images))
    batches = [(torch.randn(2, *sizes[0]), torch.zeros(2)) for _ in range(2)]
    features, _ = cnnrs.preconv(batches, model, engine="cpu", verbose=False)
    assert error(features, model, torch.cat([images for images, _ in batches])) < 1e-6
