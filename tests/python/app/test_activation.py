"""What a network looks at: the textbook's formulas, whatever the layout of the map; no trace left in the model."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor, nn

import cnnrs
from cnnrs.app.report.activation import Layer, NoMap, activation_maps, grad_cam, last_map
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
    layer = last_map(model, images[:1])
    assert layer == (model.relu, 1, (20, 20), "NCHW")
    found = grad_cam(model, layer, images, classes)
    with torch.no_grad():
        expected = torch.einsum("nchw,nc->nhw", model.maps(images), model.fc.weight[classes]).relu()
    assert found.shape == (4, 20, 20)
    assert equal_up_to_scale(found, expected)


def test_grad_cam_is_selvarajus() -> None:
    """Gradients averaged over the map weigh its channels; here a ReLU in place follows the map."""
    torch.manual_seed(0)
    model = Pooled().eval()
    images, classes = torch.randn(3, 3, 32, 32), torch.tensor([2, 0, 1])
    layer = last_map(model, images[:1])
    assert layer[:2] == (model.second, 0)
    maps = model.map(images).detach().requires_grad_()
    scores = model.fc(F.relu(maps).mean(dim=(2, 3)))
    (gradient,) = torch.autograd.grad(scores.gather(1, classes[:, None]).sum(), maps)
    expected = (gradient.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1).relu()
    found = grad_cam(model, layer, images, classes)
    torch.testing.assert_close(found, expected.detach())


def test_nothing_is_left_in_the_model() -> None:
    model = Pooled().eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        layer = last_map(model, images[:1])
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
    found = grad_cam(model, layer, torch.randn(2, 3, 96, 96), torch.tensor([0, 1]))
    assert found.dim() == 3 and found.shape[0] == 2 and min(found.shape[1:]) >= 3


# -- transformers ------------------------------------------------------------------------------------------------------


def by_hand(maps: Tensor, scores: Tensor, leaf: Tensor, classes: Tensor, to_map: Callable[[Tensor], Tensor]) -> Tensor:
    """Grad-CAM of (N, C) scores by a leaf that ``to_map`` turns into (N, C, h, w), as ``maps`` was."""
    (gradient,) = torch.autograd.grad(scores.gather(1, classes[:, None]).sum(), leaf)
    weights = to_map(gradient).mean(dim=(2, 3))
    return torch.einsum("nchw,nc->nhw", maps, weights).relu().detach()


def test_tokens_before_the_last_attention() -> None:
    """Behind it only the class token counts. torchvision's network, its last block written out."""
    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(32, 8, 3, 2, 12, 24, num_classes=3).eval()
    # Zeros until somebody trains it: nothing would speak for any class.
    nn.init.normal_(model.heads.head.weight)
    images, classes = torch.randn(4, 3, 32, 32), torch.tensor([0, 2, 1, 2])
    block = model.encoder.layers[-1]
    layer = last_map(model, images[:1])
    assert layer == (block.ln_1, 0, (4, 4), "tokens")
    with torch.no_grad():
        x = model.conv_proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([model.class_token.expand(4, -1, -1), x], dim=1) + model.encoder.pos_embedding
        x = model.encoder.layers[1](model.encoder.layers[0](x))
    leaf = block.ln_1(x).detach().requires_grad_()
    y = x + block.self_attention(leaf, leaf, leaf, need_weights=False)[0]
    scores = model.heads(model.encoder.ln(y + block.mlp(block.ln_2(y)))[:, 0])

    def to_map(tokens: Tensor) -> Tensor:
        # Row by row, the first token is that of the class.
        return torch.stack([tokens[:, 1 + 4 * row : 5 + 4 * row] for row in range(4)], dim=1).permute(0, 3, 1, 2)

    found = grad_cam(model, layer, images, classes)
    torch.testing.assert_close(found, by_hand(to_map(leaf), scores, leaf, classes, to_map))
    assert found.flatten(1).amax(dim=1).gt(0).any()


def test_channels_last() -> None:
    """Swin's features as they are before torchvision puts the channels first: averaging them is the same."""
    torch.manual_seed(0)
    swin = torchvision.models.swin_t(weights=None, num_classes=3).eval()

    class Swin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.norm, self.head = swin.features, swin.norm, swin.head

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.head(self.norm(self.features(x)).mean(dim=(1, 2)))
            return scores

    images, classes = torch.randn(2, 3, 96, 96), torch.tensor([2, 0])
    model = Swin().eval()
    layer = last_map(model, images[:1])
    assert layer == (swin.norm, 0, (3, 3), "NHWC")
    leaf = swin.norm(swin.features(images)).detach().requires_grad_()
    scores = swin.head(leaf.mean(dim=(1, 2)))
    expected = by_hand(leaf.permute(0, 3, 1, 2), scores, leaf, classes, lambda x: x.permute(0, 3, 1, 2))
    torch.testing.assert_close(grad_cam(model, layer, images, classes), expected)
    theirs = last_map(swin, images[:1])
    assert theirs == (swin.permute, 0, (3, 3), "NCHW")
    torch.testing.assert_close(grad_cam(swin, theirs, images, classes), expected)


class Tokens(nn.Module):
    """Patches as tokens that attend to each other through layers of their own; the mean is classified."""

    def __init__(self, step: int = 1) -> None:
        super().__init__()
        self.patches, self.qkv, self.soft = nn.Conv2d(3, 6, 4, stride=4), nn.Linear(6, 18), nn.Softmax(dim=-1)
        self.norm, self.fc, self.step = nn.LayerNorm(6), nn.Linear(6, 2), step

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)[:, :: self.step]
        q, k, v = (part.unflatten(2, (2, 3)).transpose(1, 2) for part in self.qkv(tokens).chunk(3, dim=2))
        # (N, heads, T, T), which is no map.
        mixed = (self.soft(q @ k.transpose(2, 3)) @ v).transpose(1, 2).flatten(2)
        scores: Tensor = self.fc(self.norm(tokens + mixed).mean(dim=1))
        return scores


def test_mean_of_tokens_is_the_class_activation_map() -> None:
    torch.manual_seed(0)
    model = Tokens().eval()
    images, classes = torch.randn(3, 3, 20, 20), torch.tensor([1, 0, 1])
    layer = last_map(model, images[:1])
    assert layer == (model.norm, 0, (5, 5), "tokens")
    kept: list[Tensor] = []
    handle = model.norm.register_forward_hook(lambda *given: kept.append(given[-1]))
    with torch.no_grad():
        model(images)
        handle.remove()
        expected = (kept[0] * model.fc.weight[classes][:, None]).sum(dim=2).view(3, 5, 5).relu()
    assert equal_up_to_scale(grad_cam(model, layer, images, classes), expected)


def test_tokens_that_have_lost_their_places() -> None:
    model = Tokens(step=2).eval()
    with pytest.raises(NoMap, match="no layer's output is laid out as"):
        last_map(model, torch.randn(1, 3, 20, 20))


def test_untrained_heads_of_zeros() -> None:
    model = torchvision.models.VisionTransformer(32, 8, 1, 2, 12, 24, num_classes=2).eval()
    with pytest.raises(NoMap, match="the scores do not depend on the tokens of patches"):
        last_map(model, torch.randn(1, 3, 32, 32))


def test_maps_of_outputs() -> None:
    values = torch.arange(24.0).view(1, 2, 3, 4)
    module = nn.Identity()
    assert Layer(module, 0, (3, 4), "NCHW").as_map(values).equal(values)
    assert Layer(module, 0, (3, 4), "NHWC").as_map(values.permute(0, 2, 3, 1)).equal(values)
    tokens = torch.cat([torch.zeros(1, 2, 2), values.flatten(2).transpose(1, 2)], dim=1)
    assert Layer(module, 0, (3, 4), "tokens").as_map(tokens).equal(values)


# -- heads and pictures ------------------------------------------------------------------------------------------------


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
    with pytest.raises(NoMap, match="the head does not say which way its scores go"):
        activation_maps(run, [(str(tmp_path / "a.png"), 0)])


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
