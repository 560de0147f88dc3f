"""What a network looks at: the textbook's formulas, nothing for networks of tokens, no trace left in the model."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn

import cnnrs
from cnnrs.app.report.activation import activation_maps, grad_cam, last_map
from cnnrs.app.report.evidence import Evidence
from cnnrs.app.report.photos import looked_at, mistakes_of, right_ones
from cnnrs.classifier.heads import Preprocessing
from cnnrs.classifier.run_folder import Run

SHAPE = Preprocessing(72, 64, "bilinear", (0.5,) * 3, (0.25,) * 3)


class Pooled(nn.Module):
    """Two convolutions, a ReLU in place, global average pooling, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=4)
        self.second = nn.Conv2d(8, 5, 3, padding=1)
        self.fc = nn.Linear(5, 3)

    def map(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(F.relu(self.first(x)))
        return found

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(F.relu_(self.map(x)).mean(dim=(2, 3)))
        return scores


class Shared(nn.Module):
    """One ReLU for two layers: its second call makes the last map."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)])
        self.relu = nn.ReLU()
        self.fc = nn.Linear(6, 2)

    def maps(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.relu(layer(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(self.maps(x).mean(dim=(2, 3)))
        return scores


def equal_up_to_scale(one: Tensor, other: Tensor) -> bool:
    flat = [x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True).clamp(min=1e-20) for x in (one, other)]
    return torch.allclose(*flat, atol=1e-5)


def test_behind_average_pooling_it_is_the_class_activation_map() -> None:
    """The feature map times the weights of the class (Zhou and others, 2016), where it is positive."""
    torch.manual_seed(0)
    model = Shared().eval()
    images, classes = torch.randn(4, 3, 24, 24), torch.tensor([0, 1, 1, 0])
    layer = last_map(model, images)
    assert layer == (model.relu, 1)
    found = grad_cam(model, layer, images, classes)
    with torch.no_grad():
        expected = torch.einsum("nchw,nc->nhw", model.maps(images), model.fc.weight[classes]).relu()
    assert found is not None and found.shape == (4, 20, 20)
    assert equal_up_to_scale(found, expected)


def test_grad_cam_is_selvarajus() -> None:
    """Gradients averaged over the map weigh its channels; here a ReLU in place follows the map."""
    torch.manual_seed(0)
    model = Pooled().eval()
    images, classes = torch.randn(3, 3, 32, 32), torch.tensor([2, 0, 1])
    layer = last_map(model, images)
    assert layer == (model.second, 0)
    maps = model.map(images).detach().requires_grad_()
    scores = model.fc(F.relu(maps).mean(dim=(2, 3)))
    (gradient,) = torch.autograd.grad(scores.gather(1, classes[:, None]).sum(), maps)
    expected = (gradient.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1).relu()
    found = grad_cam(model, layer, images, classes)
    assert found is not None
    torch.testing.assert_close(found, expected.detach())


def test_nothing_is_left_in_the_model() -> None:
    model = Pooled().eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        layer = last_map(model, images)
        assert layer is not None
        grad_cam(model, layer, images, torch.tensor([0]))
        assert not torch.is_grad_enabled()
    grad_cam(model, layer, images, torch.tensor([0]))
    assert torch.is_grad_enabled()
    assert all(not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "mobilenet_v3_small", "swin_t", "densenet121", "googlenet"])
def test_networks_with_a_map(name: str) -> None:
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=3, **options).eval()
    layer = last_map(model, torch.randn(1, 3, 96, 96))
    assert layer is not None
    found = grad_cam(model, layer, torch.randn(2, 3, 96, 96), torch.tensor([0, 1]))
    assert found is not None and found.dim() == 3 and found.shape[0] == 2 and min(found.shape[1:]) >= 3


def test_tokens_have_no_map() -> None:
    model = torchvision.models.vit_b_16(weights=None, num_classes=2, image_size=32).eval()
    assert last_map(model, torch.randn(1, 3, 32, 32)) is None


class Counts(nn.Module):
    """Scores with no way back to the map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return (self.conv(x) > 0).float().mean(dim=(2, 3))


def test_heads_that_are_not_smooth(tmp_path: Path) -> None:
    Image.new("RGB", (80, 80), (200, 30, 30)).save(tmp_path / "a.png")
    run = Run(Counts().eval(), ["a", "b"], SHAPE, "resnet18")
    assert activation_maps(run, [(str(tmp_path / "a.png"), 0)]) == {}


def test_pictures(tmp_path: Path) -> None:
    """A network that looks for red: the red half of the photo is covered, the other is as it was."""
    photo = Image.new("RGB", (96, 72), (20, 60, 200))
    photo.paste((200, 30, 30), (0, 0, 48, 72))
    for number in range(10):
        photo.save(tmp_path / f"{number}.png")
    (tmp_path / "bad.png").write_bytes(b"no photo")
    model = nn.Sequential(
        nn.Conv2d(3, 1, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2)
    )
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[0, 0, 1, 1], model[0].bias[:] = 1.0, 0.0
        model[4].weight[:], model[4].bias[:] = torch.tensor([[1.0], [-1.0]]), 0.0
    run = Run(model.eval(), ["red", "blue"], SHAPE, "resnet18")
    paths = [str(tmp_path / f"{number}.png") for number in range(10)]
    found = activation_maps(run, [*((path, 0) for path in paths), (str(tmp_path / "bad.png"), 0)])
    assert sorted(found) == paths
    picture = Image.open(io.BytesIO(found[paths[0]])).convert("RGB")
    assert picture.size == (64, 64) and picture.format is None
    left, right = picture.getpixel((12, 32)), picture.getpixel((52, 32))
    # 60 % of (214, 32, 32) over (200, 30, 30); JPEG rounds a little.
    assert all(abs(a - b) < 14 for a, b in zip(left, (208, 31, 31), strict=True))  # type: ignore[arg-type]
    assert all(abs(a - b) < 14 for a, b in zip(right, (20, 60, 200), strict=True))  # type: ignore[arg-type]
    assert activation_maps(run, [(paths[0], 0)], seconds=-1) == {}


def test_photos_are_read_as_the_run_reads_them(tmp_path: Path) -> None:
    """16 bits, of which Pillow alone would make white."""
    Image.fromarray(np.full((72, 72), 64 * 257, np.uint16)).save(tmp_path / "a.png")
    model = nn.Sequential(
        nn.Conv2d(3, 1, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 2)
    )
    with torch.no_grad():
        model[4].weight.zero_()
    run = Run(model.eval(), ["a", "b"], SHAPE, "resnet18", read={"scale": "full"})
    found = activation_maps(run, [(str(tmp_path / "a.png"), 0)])
    assert Image.open(io.BytesIO(found[str(tmp_path / "a.png")])).convert("L").getextrema() == (64, 64)


@pytest.mark.parametrize(("classes", "each", "most"), [(2, 4, 8), (10, 4, 40), (25, 1, 25), (60, 1, 40)])
def test_which_photos(classes: int, each: int, most: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % classes
    scores = torch.randn(600, classes, generator=generator) + 2.2 * F.one_hot(labels, classes)
    names = [str(i) for i in range(classes)]
    evidence = Evidence(cnnrs.History(), 0, scores, labels, [f"{i}.jpg" for i in range(600)], names)
    right = right_ones(evidence)
    assert sum(map(len, right.values())) == most and all(len(set(rows)) == each for rows in right.values())
    sure = scores.softmax(dim=1).max(dim=1).values
    for name, rows in right.items():
        assert all(int(labels[row]) == int(scores[row].argmax()) == int(name) for row in rows)
        values = [float(sure[row]) for row in rows]
        assert values == sorted(values, reverse=True)
        of_class = (labels == int(name)) & (scores.argmax(dim=1) == labels)
        assert values[0] == float(sure[of_class].max()) and (each == 1 or values[-1] == float(sure[of_class].min()))
    wanted = looked_at(evidence, mistakes_of(evidence))
    assert len(wanted) == most + 12 and len(dict(wanted)) == len(wanted)
