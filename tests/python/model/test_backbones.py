"""Any network as a backbone: names, layers, poolings and weights, against torchvision."""

from __future__ import annotations

import hashlib
import shutil
from http.client import RemoteDisconnected
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

import cnnrs
from cnnrs.layers import put
from cnnrs.model import cut, weights

# -- layers ------------------------------------------------------------------------------------------------------------

CASES = [
    ("vgg11", "features.10"),
    ("vgg11", "classifier.3"),
    ("resnet18", "layer2"),
    ("resnet18", "layer3.0.bn1"),
    ("mobilenet_v3_small", "features.5"),
    ("efficientnet_b0", "features.3.0"),
    ("convnext_tiny", "features.3"),
    ("densenet121", "features.transition1"),
    ("vit_b_16", "encoder.layers.encoder_layer_1"),
    ("swin_t", "features.1"),
]


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_a_layer_is_the_part_before_it(name: str, layer: str) -> None:
    torch.manual_seed(0)
    model = models.get_model(name, weights=None).eval()
    x = torch.rand(1, 3, 224, 224)
    expected = create_feature_extractor(model, {layer: "out"})
    body = cnnrs.backbone(model, layer)
    with torch.no_grad():
        assert torch.equal(body(x), expected(x)["out"])
    # Shared, not copied; and nothing behind the layer is kept.
    ours = list(body.parameters())
    assert {id(p) for p in ours} <= {id(p) for p in model.parameters()}
    assert len(ours) < len(list(model.parameters()))
    assert model.training is False


@pytest.mark.parametrize("name", ["swin_t", "swin_v2_t"])
@pytest.mark.parametrize("layer", [None, "features", "features.0.0", "features.3", "norm", "permute"])
def test_swins_channels_come_last(name: str, layer: str | None) -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 3, 64, 64)
    model = models.get_model(name, weights=None).eval()
    whole = cnnrs.backbone(model, layer or "permute").eval()
    torch.manual_seed(0)
    ours = cnnrs.backbone(name if layer is None else model, layer, "avg", weights=None).eval()
    with torch.no_grad():
        picture = whole(x)
        axes = (2, 3) if layer in (None, "permute", "features.0.0") else (1, 2)
        if layer is None:
            ours.load_state_dict({f"body.{key}": value for key, value in model.state_dict().items()}, strict=False)
        assert torch.allclose(ours(x), picture.mean(axes), rtol=1e-5, atol=1e-6)


def test_a_layer_that_is_called_twice(resnet: nn.Module) -> None:
    # A residual block's ReLU serves inside and at the end.
    with pytest.raises(ValueError, match=r"ResNet calls layer4\.1\.relu 2 times: .* told; take the layer around it"):
        cnnrs.backbone(resnet, "layer4.1.relu")
    with pytest.raises(TypeError, match=r"layer must be the path of a module, such as 'features\.29', got 29"):
        cnnrs.backbone(resnet, 29)  # type: ignore[arg-type]


def test_a_model_that_cannot_be_traced_is_stopped_behind_the_layer() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            if x.sum() > 1e9:
                return x
            raise AssertionError("behind the layer")

    model = Branching()
    x = torch.rand(2, 3, 8, 8)
    body = cnnrs.backbone(model, "first")
    assert torch.equal(body(x), model.first(x)) and not model.first._forward_hooks
    features = cnnrs.preconv([(x, torch.zeros(2))], model, layer="first")
    assert torch.equal(features.features, model.first(x))
    model.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="forward of Branching does not call second"):
        cut._Until(model, "second")(x)


@pytest.mark.parametrize("engine", ["torch", "python"])
def test_cut_models_run_on_the_lowered_engine(resnet: nn.Module, engine: Any) -> None:
    assert cnnrs.explain(cnnrs.backbone(resnet, "layer2", "avg").eval()).operations > 0
    torch.manual_seed(0)
    vgg = models.vgg11(weights=None).eval()
    x = torch.rand(1, 3, 64, 64)
    features = cnnrs.preconv([(x, torch.zeros(1))], vgg, layer="features.20", engine=engine)
    with torch.no_grad():
        assert torch.equal(features.features, vgg.features(x))


def test_unknown_layers_name_their_likes(resnet: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"ResNet has no layer 'layer5'; close to it: layer"):
        cnnrs.backbone(resnet, "layer5")
    with pytest.raises(ValueError, match="pool must be one of 'avg', 'max', 'cls' or None, got 'mean'"):
        cnnrs.backbone(resnet, pool="mean")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        cnnrs.backbone(7)  # type: ignore[arg-type]


# -- poolings ----------------------------------------------------------------------------------------------------------


def test_poolings(resnet: nn.Module) -> None:
    x = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        pictures = cnnrs.backbone(resnet, "layer4")(x)
        mean, largest = (cnnrs.backbone(resnet, "layer4", pool)(x) for pool in ("avg", "max"))
    assert pictures.shape == (2, 512, 2, 2)
    assert torch.equal(largest, pictures.amax(dim=(2, 3)))
    # A mean of 4 numbers below 16, in another order.
    assert torch.allclose(mean, pictures.mean(dim=(2, 3)), rtol=4 * 2**-24, atol=1e-6)
    tokens = torch.rand(2, 5, 7)
    for pool, expected in (("avg", tokens.mean(1)), ("max", tokens.amax(1)), ("cls", tokens[:, 0])):
        assert torch.allclose(cnnrs.backbone(nn.Identity(), pool=pool)(tokens), expected, rtol=0, atol=5 * 2**-24)
    with pytest.raises(ValueError, match=r'pool="cls" takes the first of \(N, tokens, C\), .* \(2, 3, 64, 64\)'):
        cnnrs.backbone(nn.Identity(), pool="cls")(x)
    with pytest.raises(ValueError, match=r"pool='avg' takes .* this layer returns \(2, 4\)"):
        cnnrs.backbone(nn.Identity(), pool="avg")(torch.zeros(2, 4))


def test_the_class_token_of_a_transformer() -> None:
    torch.manual_seed(0)
    model = models.vit_b_16(weights=None).eval()
    x = torch.rand(1, 3, 224, 224)
    head, model.heads = model.heads, nn.Identity()
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(cnnrs.backbone(model, "encoder", "cls")(x), expected)
    model.heads = head


# -- names and weights -------------------------------------------------------------------------------------------------


def test_names_give_the_model_before_its_head(torch_cache: Path, resnet: nn.Module) -> None:
    body = cnnrs.backbone("resnet18").eval()
    x = torch.rand(2, 3, 64, 64)
    headless = nn.Sequential(*list(resnet.children())[:-1], nn.Flatten())
    with torch.no_grad():
        assert torch.equal(body(x), headless(x))
        assert torch.equal(cnnrs.backbone("resnet18", "layer3").eval()(x), cnnrs.backbone(resnet, "layer3")(x))
        assert cnnrs.backbone("resnet18", pool="max").eval()(x).shape == (2, 512)
    assert body.name == "resnet18 (IMAGENET1K_V1)"
    for chosen in ("IMAGENET1K_V1", models.ResNet18_Weights.IMAGENET1K_V1, "ResNet18_Weights.IMAGENET1K_V1"):
        assert cnnrs.backbone("resnet18", weights=chosen).name == "resnet18 (IMAGENET1K_V1)"
    with pytest.raises(ValueError, match=r"resnet18 has the weights IMAGENET1K_V1, DEFAULT, or give a \.pth"):
        cnnrs.backbone("resnet18", weights="IMAGENET22K")


def test_vgg_by_name_has_the_tutorials_features() -> None:
    body = cnnrs.backbone("vgg11", "features", weights=None)
    assert body(torch.zeros(1, 3, 64, 64)).shape == (1, 512, 2, 2)
    assert cnnrs.backbone("vgg11", weights=None).eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 4096)
    assert cnnrs.backbone("vgg11", pool="avg", weights=None)(torch.zeros(1, 3, 64, 64)).shape == (1, 512)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="no model is called 'resnet19'; close to it: resnet"):
        cnnrs.backbone("resnet19")


@pytest.mark.parametrize("kind", ["plain", "wrapped", "parallel"])
def test_a_file_of_ones_own(tmp_path: Path, resnet: nn.Module, kind: str) -> None:
    torch.manual_seed(3)
    own = models.resnet18(weights=None, num_classes=2)
    state: Any = own.state_dict()
    if kind == "wrapped":
        state = {"epoch": 3, "state_dict": state}
    if kind == "parallel":
        state = {f"module.{key}": value for key, value in state.items()}
    path = tmp_path / "own.pth"
    torch.save(state, path)
    x = torch.rand(1, 3, 64, 64)
    for given in (path, str(path)):
        body = cnnrs.backbone("resnet18", weights=given).eval()
        own.fc = nn.Identity()
        with torch.no_grad():
            assert torch.equal(body(x), own.eval()(x))
    assert isinstance(body.transform, type(models.ResNet18_Weights.DEFAULT.transforms()))


def test_files_that_are_no_weights(tmp_path: Path, resnet: nn.Module) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pth'?: there is no such file"):
        cnnrs.backbone("resnet18", weights=tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match=r"text\.pth cannot be read as weights"):
        cnnrs.backbone("resnet18", weights=tmp_path / "text.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth holds a list, not a state_dict"):
        cnnrs.backbone("resnet18", weights=tmp_path / "list.pth")
    torch.save(models.resnet34(weights=None).state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth does not fit ResNet: Unexpected key"):
        cnnrs.backbone("resnet18", weights=tmp_path / "other.pth")


def test_a_damaged_download_is_refused(torch_cache: Path) -> None:
    data = bytearray(torch_cache.read_bytes())
    data[len(data) // 2] ^= 1
    torch_cache.write_bytes(data)
    with pytest.raises(ValueError, match=r"resnet18-\w+\.pth is damaged: its sha256 begins with \w+, not \w+\. Delete"):
        cnnrs.backbone("resnet18")


@pytest.mark.parametrize("error", [URLError("no route"), TimeoutError("timed out"), RemoteDisconnected("closed")])
def test_offline(torch_cache: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", fail)
    name = torch_cache.name
    torch_cache.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        cnnrs.backbone("resnet18")
    text = str(caught.value)
    assert f"wanted:  {name}, from https://example.invalid/{name}" in text and f"looked:  {torch_cache.parent}" in text
    assert "weights=<path>" in text


BUILT = [
    ("inception_v3", "DEFAULT", 299),
    ("googlenet", "DEFAULT", 64),
    ("mnasnet0_5", "DEFAULT", 64),
    ("vit_b_16", "IMAGENET1K_SWAG_E2E_V1", 384),
    ("shufflenet_v2_x0_5", "DEFAULT", 64),
    ("squeezenet1_1", "DEFAULT", 64),
]


@pytest.mark.parametrize(("name", "version", "size"), BUILT)
@pytest.mark.parametrize("source", ["download", "file"])
def test_a_name_is_the_model_that_torchvision_builds_for_the_weights(
    name: str, version: str, size: int, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    options = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    if name == "vit_b_16":
        options["image_size"] = size
    state = models.get_model(name, weights=None, **options).state_dict()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", lambda *_, **__: state)
    theirs = models.get_model(name, weights=version).eval()
    given = version
    if source == "file":
        # Named as torchvision names it: that is how the file says which version it is.
        given = str(tmp_path / Path(models.get_weight(f"{_class(name)}.{version}").url).name)
        torch.save(state, given)
    ours = cnnrs.backbone(name, weights=given).eval()
    x = torch.rand(2, 3, size, size)
    heads = [path for path, module in theirs.named_modules() if isinstance(module, nn.Linear)]
    if heads:
        put(theirs, heads[-1], nn.Identity())
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))


def _class(name: str) -> str:
    return type(next(iter(models.get_model_weights(name)))).__name__


def test_a_googlenet_without_auxiliary_heads_and_mnasnet_without_versions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.googlenet(weights=None, aux_logits=False, init_weights=False)
    torch.save(model.state_dict(), tmp_path / "own.pth")
    body = cnnrs.backbone("googlenet", weights=tmp_path / "own.pth")
    assert all(
        torch.equal(value, model.state_dict()[f"{key.removeprefix('body.')}"])
        for key, value in body.state_dict().items()
    )
    plain = dict(models.mnasnet0_5(weights=None).state_dict())
    torch.save(plain, tmp_path / "plain.pth")
    assert len(cnnrs.backbone("mnasnet0_5", weights=tmp_path / "plain.pth").state_dict()) == len(plain) - 2


def test_hashes_of_names(tmp_path: Path) -> None:
    for name in ("model.pth", "model-final.pth", "resnet18-new.pth"):
        (tmp_path / name).write_bytes(b"anything")
        weights.check_hash(tmp_path / name)
    digest = hashlib.sha256(b"anything").hexdigest()
    shutil.copy(tmp_path / "model.pth", tmp_path / f"m-{digest[:8]}.pth")
    weights.check_hash(tmp_path / f"m-{digest[:8]}.pth")
    shutil.copy(tmp_path / "model.pth", tmp_path / "m-0123abcd.pth")
    with pytest.raises(ValueError, match="damaged"):
        weights.check_hash(tmp_path / "m-0123abcd.pth")
