"""`preconv(precision="int8")`: near float32, of one calibration, refused where it cannot be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms
from torchvision.models import VisionTransformer

import cnnrs
from cnnrs.errors import UnsupportedModelError
from cnnrs.features import calibration
from cnnrs.features.update import Update


class Residual(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 32, 1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.second = nn.Conv2d(32, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.second(torch.relu(self.norm(self.first(x)))))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 24, 3, stride=2, padding=1)
    return nn.Sequential(stem, nn.ReLU(), Residual(24), Residual(24), nn.AdaptiveAvgPool2d(4), nn.Flatten()).eval()


@pytest.fixture
def photos() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(300, 3, 20, 20, generator=generator), torch.arange(300) % 3)


def run(data: Any, model: nn.Module, out: Path | None = None, **options: Any) -> cnnrs.Features:
    return cnnrs.preconv(data, model, out, **{"verbose": False, "precision": "int8", **options})


def test_features_are_near_those_in_float32(photos: TensorDataset, model: nn.Module) -> None:
    exact = run(photos, model, precision=None).features
    found = run(photos, model).features
    assert found.dtype == torch.float32 and found.shape == exact.shape
    assert not torch.equal(found, exact)
    assert torch.cosine_similarity(found, exact).min() > 0.999


def test_the_order_of_the_loader_does_not_matter(photos: TensorDataset, model: nn.Module) -> None:
    expected = run(photos, model, batch_size=64)
    shuffled = run(DataLoader(photos, 64, shuffle=True), model)
    assert sorted(map(tuple, shuffled.features.tolist())) == sorted(map(tuple, expected.features.tolist()))


def test_batches_of_anything_are_calibrated_on_the_first_of_them(photos: TensorDataset, model: nn.Module) -> None:
    images, labels = photos.tensors
    batches = ((images[i : i + 50], labels[i : i + 50]) for i in range(0, 300, 50))
    found = run(batches, model)
    assert torch.equal(found.features, run(photos, model, batch_size=50).features)
    assert torch.equal(found.labels, labels)


def test_files_that_are_as_they_were_are_not_read_for_the_key(
    folder: Path, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = cnnrs.ImageFolder(folder, transforms.Compose([transforms.Resize((20, 20)), transforms.ToTensor()]))
    first = run(data, model, tmp_path / "f").features
    monkeypatch.setattr("cnnrs.features.samples.Data.identity", lambda *_: pytest.fail("read"))
    assert torch.equal(run(data, model, tmp_path / "f").features, first)


def test_a_store_says_what_it_was_calibrated_on(photos: TensorDataset, model: nn.Module, tmp_path: Path) -> None:
    first = run(photos, model, tmp_path / "f")
    meta = json.loads((tmp_path / "f" / "meta.json").read_text())
    assert meta["key"]["precision"] == "int8"
    assert (meta["calibration"]["images"], meta["calibration"]["percent_beyond"]) == (256, 0.01)
    # What four convolutions read.
    assert len(meta["calibration"]["ranges"]) == 4
    assert torch.equal(first.features, run(photos, model).features)


def test_float32_is_another_store(
    photos: TensorDataset, model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(photos, model, tmp_path / "f")
    run(photos, model, tmp_path / "f", verbose=True)
    assert "up to date" in capsys.readouterr().out
    exact = run(photos, model, tmp_path / "f", precision=None, verbose=True)
    assert capsys.readouterr().out.strip().endswith("recomputing the features, because another precision is asked for")
    assert "calibration" not in json.loads((tmp_path / "f" / "meta.json").read_text())
    assert torch.equal(exact.features, run(photos, model, precision=None).features)


def test_new_images_are_computed_in_the_same_ranges(
    photos: TensorDataset, model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, labels = photos.tensors
    before = run(TensorDataset(images[:280], labels[:280]), model, tmp_path / "f").features.clone()
    more = run(photos, model, tmp_path / "f", verbose=True)
    assert "computing 20 rows" in capsys.readouterr().out
    assert torch.equal(more.features[:280], before)
    # Others in front: the ranges might be others, and all is computed.
    run(TensorDataset(images[10:], labels[10:]), model, tmp_path / "f", verbose=True)
    assert "the first images, on which the ranges for int8 were found, are others" in capsys.readouterr().out


def test_who_goes_on_computes_in_the_ranges_of_the_rows_that_are_there(
    photos: TensorDataset, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(photos, model, tmp_path / "whole")
    items = Update.items

    def interrupted(self: Update) -> Iterator[Any]:
        for number, item in enumerate(items(self)):
            if number == 5:
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(Update, "items", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(photos, model, tmp_path / "f")

    def looked(*_: Any) -> None:
        raise AssertionError("looked for the ranges again")

    with monkeypatch.context() as patch:
        patch.setattr("cnnrs.features.session.Session._first_images", looked)
        run(photos, model, tmp_path / "f")
    for name in ("features.npy", "labels.npy", "meta.json"):
        assert (tmp_path / "f" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert torch.equal(expected.features, cnnrs.load_features(tmp_path / "f").features)


def test_what_cannot_be_is_refused(photos: TensorDataset, model: nn.Module) -> None:
    for engine in ("torch", "python"):
        with pytest.raises(ValueError, match=f"computed by engine \"cpu\" only, got engine='{engine}'"):
            run(photos, model, engine=engine)
    with pytest.raises(ValueError, match="no layer would compute in int8"):
        run(photos, nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)))

    class Reads(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * float(x.mean())

    with pytest.raises(UnsupportedModelError, match=r"(?s)engine 'cpu' only, which cannot run.*leave precision away"):
        run(photos, Reads())
    with pytest.raises(UnsupportedModelError, match=r"(?s)float64.*leave precision away"):
        run(photos, nn.Sequential(model.double()))


def test_values_without_a_range_are_refused(photos: TensorDataset, model: nn.Module) -> None:
    images, labels = photos.tensors
    bad = images.clone()
    bad[290, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="an image holds infinite or NaN values"):
        run(TensorDataset(bad, labels), model)
    bad[3] = torch.inf
    with pytest.raises(ValueError, match="makes infinite or NaN values, which int8 cannot hold"):
        run(TensorDataset(bad, labels), model)


def test_a_network_that_loses_more_says_so(
    photos: TensorDataset, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "CLOSE", 1.1)
    with pytest.warns(UserWarning, match=r"features of Sequential have a cosine of 0\.99\d|1\.000 to those in float32"):
        run(photos, model)


def test_explained(model: nn.Module) -> None:
    assert cnnrs.explain(model, (2, 3, 20, 20)).int8 is None
    said = str(cnnrs.explain(model, (2, 3, 20, 20), precision="int8"))
    assert "precision='int8': 4 of 5 convolutions and linear layers, all others in float32:\n  - 2.first" in said
    none = cnnrs.explain(nn.Sequential(nn.Conv2d(3, 8, 3)), (2, 3, 20, 20), precision="int8")
    assert "no layer would compute in int8" in str(none)


@pytest.fixture
def transformer() -> nn.Module:
    torch.manual_seed(0)
    made = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=64, mlp_dim=128)
    made.heads = nn.Identity()
    return made.eval()


def images_of(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_vision_transformers(transformer: nn.Module, tmp_path: Path) -> None:
    photos = TensorDataset(images_of(300, 3, 32, 32), torch.arange(300) % 3)
    exact = run(photos, transformer, precision=None).features
    found = run(photos, transformer, tmp_path / "f").features
    assert not torch.equal(found, exact) and torch.cosine_similarity(found, exact).mean() > 0.9995
    calibrated = json.loads((tmp_path / "f" / "meta.json").read_text())["calibration"]
    # Of two blocks: what queries, keys and values are made of, what comes out of attention, what both layers read.
    assert len(calibrated["ranges"]) == 8 and calibrated["image"] == [3, 32, 32]
    said = str(cnnrs.explain(transformer, (2, 3, 32, 32), precision="int8"))
    assert "precision='int8': 8 of 9 convolutions and linear layers" in said


def test_a_few_large_channels_of_a_layer_norm_cost_nothing(transformer: nn.Module) -> None:
    """The same network, computed with a few channels between norm and linear layer that are 30 times as large."""
    for block in transformer.encoder.layers:  # type: ignore[union-attr]
        for norm, weight in (
            (block.ln_1, block.self_attention.in_proj_weight),
            (block.ln_2, block.mlp[0].weight),
        ):
            factor = torch.ones(64)
            factor[[3, 40]] = 30
            with torch.no_grad():
                norm.weight *= factor
                weight /= factor
    batches = [(images_of(64, 3, 32, 32), torch.zeros(64))]
    found, exact = run(batches, transformer).features, run(batches, transformer, precision=None).features
    assert torch.cosine_similarity(found, exact).mean() > 0.9995


def test_images_of_another_size_are_refused_where_the_model_looks_at_it(tmp_path: Path) -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 4, 4), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n, _, h, w = x.shape
            return self.second(self.first(x).reshape(n, 16, (h // 4) * (w // 4)).permute(0, 2, 1)).mean(1)

    model, labels = Sized().eval(), torch.zeros(2)
    small, large = images_of(2, 3, 8, 8), images_of(2, 3, 8, 12)
    assert run([(small, labels)], model).features.shape == (2, 16)
    with pytest.raises(UnsupportedModelError, match=r"images of one size .* \[3, 8, 8\] at first, now \[3, 8, 12\]"):
        run([(small, labels), (large, labels)], model)
    # Ranges that are known are of the operations at that size.
    with pytest.raises(UnsupportedModelError, match=r"\[3, 8, 8\] at first, now \[3, 8, 12\]"):
        calibration.Calibration({"images": 2, "image": [3, 8, 8], "ranges": []}).find(None, [], (3, 8, 12))  # type: ignore[arg-type]


def test_a_module_that_computes_something_else_is_refused_in_the_words_of_int8(model: nn.Module) -> None:
    verify_says = "computes something else"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cnnrs.engine.verify.differs", lambda *_a, **_k: verify_says)
        with pytest.raises(UnsupportedModelError, match=f"(?s)int8.*{verify_says}.*leave precision away"):
            run([(torch.randn(4, 3, 20, 20), torch.zeros(4))], model)


def test_weights_of_any_size_keep_their_digits() -> None:
    torch.manual_seed(2)
    first, second = nn.Conv2d(3, 16, 3, bias=False), nn.Conv2d(16, 16, 1, bias=False)
    first.weight.data *= 1e33
    second.weight.data *= 1e-33
    model = nn.Sequential(first, nn.ReLU(), second).eval()
    batches = [(torch.randn(8, 3, 9, 9), torch.zeros(8))]
    found, exact = run(batches, model, check=False).features, run(batches, model, precision=None).features
    assert torch.cosine_similarity(found.flatten(1), exact.flatten(1)).min() > 0.99
