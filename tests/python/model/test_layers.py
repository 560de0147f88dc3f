"""Layer surgery on the tutorial's networks and on torchvision's."""

import math

import pytest
import torch
import torchvision
from torch import nn

from cnnrs import layers, models


def vgg16() -> nn.Module:
    # On the meta device: the shapes of 138 million weights without the weights.
    with torch.device("meta"):
        return torchvision.models.vgg16(weights=None)


def test_freeze_and_unfreeze() -> None:
    net = models.MnistNet()
    assert layers.freeze(net.conv1) is net.conv1
    before = [p.clone() for p in net.parameters()]
    net.eval()(torch.randn(4, 1, 28, 28)).sum().backward()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True)]
    assert moved == [False, False] + [True] * 6
    layers.unfreeze(net)
    assert all(p.requires_grad for p in net.parameters())


def test_replace_head_of_vgg_is_the_tutorials_line() -> None:
    vgg = vgg16()
    assert layers.replace_head(vgg, 2) is vgg
    assert (vgg.classifier[-1].in_features, vgg.classifier[-1].out_features) == (4096, 2)
    assert vgg.classifier[-1].weight.is_meta
    assert vgg.classifier[3].out_features == 4096


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet18", "fc"),
        ("mobilenet_v2", "classifier.1"),
        ("densenet121", "classifier"),
        ("efficientnet_b0", "classifier.1"),
        ("vit_b_16", "heads.head"),
    ],
)
def test_replace_head_of_torchvision_models(name: str, head: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
    before = {key: layer for key, layer in model.named_modules() if key != head}
    layers.replace_head(model, 7)
    assert model.get_submodule(head).out_features == 7
    # Nothing else was touched.
    assert {key: layer for key, layer in model.named_modules() if key != head} == before


def test_replace_head_keeps_dtype_bias_and_mode() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False)).double().eval()
    layers.replace_head(layers.freeze(model), 3)
    assert model[1].weight.dtype == torch.float64
    assert model[1].bias is None
    assert not model[1].training
    assert model[1].weight.requires_grad and not model[0].weight.requires_grad
    assert model(torch.zeros(1, 6, dtype=torch.float64)).shape == (1, 3)


@pytest.mark.parametrize("model", [nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Linear(3, 2)])
def test_replace_head_needs_a_linear_inside(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=f"{type(model).__name__} contains no nn.Linear"):
        layers.replace_head(model, 2)


def test_replace_head_needs_a_class() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        layers.replace_head(models.MnistNet(), 0)


def test_set_dropout_is_the_tutorials_loop() -> None:
    vgg = vgg16()
    assert layers.set_dropout(vgg.classifier, 0.2) is vgg.classifier
    assert [layer.p for layer in vgg.classifier if type(layer) is nn.Dropout] == [0.2, 0.2]
    net = layers.set_dropout(models.MnistNet(), 0.1)
    assert (net.conv2[1].p, net.fc1[2].p) == (0.1, 0.1)


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan])
def test_set_dropout_checks_the_probability(p: float) -> None:
    net = models.MnistNet()
    with pytest.raises(ValueError, match="between 0 and 1"):
        layers.set_dropout(net, p)
    assert net.conv2[1].p == 0.5


def test_set_dropout_without_dropout() -> None:
    with pytest.raises(ValueError, match="Linear contains no dropout layer"):
        layers.set_dropout(nn.Linear(2, 2), 0.2)


@pytest.mark.parametrize(
    ("scheme", "function"),
    [
        ("normal", nn.init.normal_),
        ("xavier_normal", nn.init.xavier_normal_),
        ("kaiming_normal", nn.init.kaiming_normal_),
        ("orthogonal", nn.init.orthogonal_),
    ],
)
def test_init_is_the_tutorials_loop(scheme: str, function: object) -> None:
    torch.manual_seed(0)
    mine = layers.init(models.SimpleCNN(), scheme)
    torch.manual_seed(0)
    theirs = models.SimpleCNN()
    for m in theirs.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            function(m.weight.data)  # type: ignore[operator]
            m.bias.data.fill_(0)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_init_passes_options_and_leaves_other_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 2))
    layers.init(model, "normal", mean=5.0, std=0.0)
    assert torch.equal(model[0].weight, torch.full((4, 3, 3, 3), 5.0))
    assert torch.equal(model[1].weight, torch.ones(4))
    assert torch.equal(model[2].bias, torch.zeros(2))


def test_init_names_the_schemes() -> None:
    with pytest.raises(ValueError, match=r"unknown scheme 'he', expected one of normal, .*kaiming_normal"):
        layers.init(models.MnistNet(), "he")


def test_conv_layers_prints_as_in_the_tutorial() -> None:
    net = models.SimpleCNN()
    convolutions = layers.conv_layers(net)
    assert str(convolutions) == (
        "Sequential(\n"
        "  (conv1 conv1): Conv2d(3, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))\n"
        "  (conv2 conv2): Conv2d(32, 64, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))\n"
        "  (conv3 conv3): Conv2d(64, 128, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))\n"
        ")"
    )
    assert convolutions[0] is net.conv1.conv1


def test_conv_layers_of_a_convolution_and_of_none() -> None:
    convolution = nn.Conv2d(3, 4, 3)
    assert list(layers.conv_layers(convolution)) == [convolution]
    assert len(layers.conv_layers(nn.Linear(2, 2))) == 0
