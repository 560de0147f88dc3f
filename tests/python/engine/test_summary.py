"""`summary`: shapes as PyTorch computes them, parameters, receptive fields and costs as the tutorial counts them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision import models as zoo

import cnnrs

SIDES = st.integers(1, 24)


@st.composite
def windows(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a convolution or pool that PyTorch accepts: padding at most half the kernel."""
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    padding = tuple(draw(st.integers(0, side // 2)) for side in kernel)
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    return {"kernel_size": kernel, "stride": stride, "padding": padding}


@settings(max_examples=150, deadline=None)
@given(windows(), st.integers(1, 3), st.booleans(), SIDES, SIDES)
def test_window_shapes_are_pytorchs(window: dict[str, Any], dilation: int, ceil: bool, height: int, width: int) -> None:
    layers = [
        nn.Conv2d(2, 3, dilation=dilation, **window),
        nn.MaxPool2d(dilation=dilation, ceil_mode=ceil, **window),
        nn.AvgPool2d(ceil_mode=ceil, **window),
    ]
    x = torch.zeros(1, 2, height, width)
    for layer in layers:
        try:
            expected = tuple(layer(x).shape)
        except RuntimeError:
            with pytest.raises(RuntimeError, match="does not fit an input"):
                cnnrs.summary(layer, x.shape)
            continue
        if 0 not in expected:
            assert cnnrs.summary(layer, x.shape).layers[0].output_shape == expected


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121", "efficientnet_b0"])
def test_shapes_of_whole_networks(name: str) -> None:
    model = getattr(zoo, name)(weights=None).eval()
    seen: dict[str, tuple[int, ...]] = {}
    for path, module in model.named_modules():
        if not any(module.children()):
            module.register_forward_hook(lambda m, i, o, path=path: seen.__setitem__(path, tuple(o.shape)))
    with torch.no_grad():
        model(torch.zeros(2, 3, 64, 96))
    for module in model.modules():
        module._forward_hooks.clear()
    summary = cnnrs.summary(model, (2, 3, 64, 96))
    ours = {layer.name: layer.output_shape for layer in summary.layers if layer.name in seen}
    assert ours == {path: seen[path] for path in ours}
    assert len(ours) > 20
    assert summary.parameters == sum(p.numel() for p in model.parameters())


def test_three_3x3_layers_see_what_one_7x7_layer_sees() -> None:
    three = cnnrs.summary(nn.Sequential(*(nn.Conv2d(3, 3, 3) for _ in range(3))), (1, 3, 32, 32))
    one = cnnrs.summary(nn.Conv2d(3, 3, 7), (1, 3, 32, 32))
    assert three.layers[-1].receptive_field == one.layers[-1].receptive_field == (7, 7)
    assert three.layers[-1].output_shape == one.layers[-1].output_shape
    # The tutorial's count: 3 x (3 x 3 x C x C) = 27 C^2 against 7 x 7 x C x C = 49 C^2, and C biases per layer.
    assert (three.parameters, one.parameters) == (27 * 9 + 9, 49 * 9 + 3)


def test_receptive_field_counts_strides_dilation_and_the_widest_branch() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 2, 3, stride=2)
            self.narrow = nn.Conv2d(2, 2, 1)
            self.wide = nn.Conv2d(2, 2, 3, dilation=2, padding=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return self.narrow(x) + self.wide(x)

    fields = {layer.name: layer.receptive_field for layer in cnnrs.summary(Branches(), (1, 1, 33, 33)).layers}
    # stem 3; wide 3 + (3 - 1) * 2 * 2 = 11
    assert fields == {"stem": (3, 3), "narrow": (3, 3), "wide": (11, 11), "add": (11, 11)}


def test_flops_are_pytorchs_own_count() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = zoo.vgg16(weights=None).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    layers = cnnrs.summary(model, (1, 3, 224, 224)).layers
    products = [layer for layer in layers if layer.kind in ("Conv2d", "Linear")]
    biases = sum(torch.Size(layer.output_shape).numel() for layer in products)
    # PyTorch counts the products of matrices without the biases.
    assert sum(layer.flops or 0 for layer in products) - biases == counter.get_total_flops()


def test_shared_and_frozen_parameters() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    cnnrs.freeze(model[0])
    summary = cnnrs.summary(model, (1, 4))
    assert (summary.parameters, summary.trainable) == (24, 4)


def test_the_table_and_a_model_that_cannot_be_lowered() -> None:
    text = str(cnnrs.summary(cnnrs.models.MnistNet(), (1, 1, 28, 28)))
    lines = text.splitlines()
    assert lines[0].split("  ")[0] == "layer" and lines[2].split() == [
        "conv1.0", "Conv2d", "1", "x", "10", "x", "24", "x", "24", "260", "5", "x", "5", "0.29"]  # fmt: skip
    assert lines[-1] == "21,840 parameters, 21,840 trainable, 1.0 MFLOP, engine 'cpu'"
    soft = nn.Sequential(nn.Conv2d(3, 4, 3), *(nn.Softplus() for _ in range(10)))
    for layer in soft:
        layer.forward = layer.forward
    summary = cnnrs.summary(soft, (1, 3, 64, 64))
    assert summary.parameters == sum(p.numel() for p in soft.parameters())
    assert summary.engine == "python" and summary.flops is None
    assert str(summary).splitlines()[-1].startswith("  ... and ")
    assert all(not m._forward_hooks for m in soft.modules()) and soft.training


def test_a_wrong_input_shape_names_the_layer() -> None:
    with pytest.raises(RuntimeError, match=r"conv1\.0 \(Conv2d\): expects 1 input channels, got 3"):
        cnnrs.summary(cnnrs.models.MnistNet(), (1, 3, 28, 28))
    with pytest.raises(RuntimeError, match=r"reshape \(View\): shape .* is invalid for input of shape"):
        cnnrs.summary(cnnrs.models.MnistNet(), (1, 1, 40, 40))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
        cnnrs.summary("vgg16", (1, 3, 224, 224))  # type: ignore[arg-type]
