"""`preconv`: the model's own numbers, the model untouched, and a folder that is reused only when it is right."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, WeightedRandomSampler
from torchvision import datasets, transforms

import cnnrs
import tutorial

ENGINES = ["torch", "python"]
TRANSFORM = transforms.Compose([transforms.Resize((24, 24)), transforms.ToTensor()])


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(True), nn.MaxPool2d(2), nn.Dropout(0.5))


def by_hand(loader: Any, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The tutorial's preconvfeat, in eval mode."""
    model = copy.deepcopy(model).eval()
    rows, labels = [], []
    for inputs, targets in loader:
        with torch.no_grad():
            rows.append(model(inputs))
        labels.append(targets)
    return torch.cat(rows), torch.cat(labels)


@pytest.mark.parametrize("engine", ENGINES)
def test_features_are_the_models_and_the_model_is_untouched(folder: Path, engine: Any) -> None:
    model = backbone()
    model[1].eval()  # flags of single layers survive too
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    data = cnnrs.ImageFolder(folder, TRANSFORM)
    features = cnnrs.preconv(data, model, batch_size=7, engine=engine)
    expected = by_hand(DataLoader(datasets.ImageFolder(str(folder), TRANSFORM), batch_size=7), model)
    assert torch.equal(features.features, expected[0]) and torch.equal(features.labels, expected[1])
    assert features.paths == [path for path, _ in data.samples]
    assert features.classes == data.classes
    assert tutorial.same(model.state_dict(), before)
    assert [m.training for m in model.modules()] == flags
    assert not features.features.requires_grad


def test_features_unpack_index_and_print(folder: Path) -> None:
    features = cnnrs.preconv(cnnrs.ImageFolder(folder, TRANSFORM), backbone())
    conv_feat, labels = features
    assert conv_feat is features.features and labels is features.labels
    assert len(features) == 26 and features[3][1] == labels[3] and torch.equal(features[3][0], conv_feat[3])
    assert repr(features) == "Features(features=(26, 6, 11, 11) float32, labels=(26,))"
    batches = list(cnnrs.data_gen(conv_feat, labels, batch_size=10))
    assert [len(x) for x, _ in batches] == [10, 10, 6]


@pytest.mark.parametrize("make", [DataLoader, cnnrs.DataLoader])
def test_any_source_of_batches(folder: Path, make: Any) -> None:
    model = backbone()
    data = cnnrs.ImageFolder(folder, TRANSFORM)
    whole, labels = cnnrs.preconv(data, model)
    torch.manual_seed(4)
    shuffled = cnnrs.preconv(make(data, batch_size=5, shuffle=True), model)
    order = [[path for path, _ in data.samples].index(path) for path in shuffled.paths or []]
    assert sorted(order) == list(range(26)) and order != list(range(26))
    # Another batch size may take another convolution kernel: sums of 27 products of values below 1, 2**-24 each.
    assert torch.allclose(shuffled.features, whole[order], rtol=0, atol=27 * 2**-24)
    assert torch.equal(shuffled.labels, labels[order])
    part = cnnrs.preconv(make(Subset(data, [20, 3, 11]), batch_size=2), model)
    assert torch.allclose(part.features, whole[[20, 3, 11]], rtol=0, atol=27 * 2**-24)
    assert part.paths == [data.samples[i][0] for i in (20, 3, 11)]
    pairs = ((x.numpy(), y.numpy()) for x, y in make(data, batch_size=5))
    assert torch.allclose(cnnrs.preconv(pairs, model).features, whole, rtol=0, atol=27 * 2**-24)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_of_features(tmp_path: Path, dtype: torch.dtype) -> None:
    model = nn.Conv2d(1, 2, 3).to(dtype)
    batches = [(torch.randn(3, 1, 8, 8, dtype=dtype), torch.arange(3))]
    expected, _ = by_hand(batches, model)
    for out in (None, tmp_path / "f"):
        features = cnnrs.preconv(batches, model, out=out)
        assert features.features.dtype == dtype and torch.equal(features.features, expected)


def test_no_samples_and_unequal_images(folder: Path, tmp_path: Path) -> None:
    for out in (None, tmp_path / "f"):
        with pytest.raises(ValueError, match="no samples: there are no features"):
            cnnrs.preconv([], backbone(), out=out)
    sizes = [(torch.zeros(1, 3, side, side), torch.zeros(1)) for side in (10, 12)]
    with pytest.raises(
        ValueError, match=r"features changed from \[6, 4, 4\] .* to \[6, 5, 5\] .* at sample 1: .*Resize"
    ):
        cnnrs.preconv(sizes, backbone())
    with pytest.raises(TypeError, match=r"must yield pairs \(inputs, targets\), got a Tensor"):
        cnnrs.preconv([torch.zeros(1, 3, 8, 8)], backbone())
    with pytest.raises(TypeError, match="the model must return one tensor, got tuple"):
        cnnrs.preconv([(torch.zeros(1, 4), torch.zeros(1))], nn.GRU(4, 4))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        cnnrs.preconv([], 7)  # type: ignore[arg-type]


# -- the folder --------------------------------------------------------------------------------------------------------


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.strip()


def test_a_second_call_loads_and_numpy_opens_the_files(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, data, model = tmp_path / "features", cnnrs.ImageFolder(folder, TRANSFORM), backbone()
    first = cnnrs.preconv(data, model, out=out)
    assert said(capsys) == ""
    expected, labels = cnnrs.preconv(data, model)
    assert torch.equal(first.features, expected)
    monkeypatch.setattr("cnnrs._cnnrs.extract_rows", lambda *_: pytest.fail("computed again"))
    second = cnnrs.preconv(cnnrs.DataLoader(data, batch_size=3, shuffle=True), model, out=out)
    assert said(capsys) == f"{out}: 26 features are up to date, nothing to compute"
    assert torch.equal(second.features, expected) and torch.equal(second.labels, labels)
    assert second.paths == [path for path, _ in data.samples] and second.classes == data.classes
    assert np.array_equal(np.load(out / "features.npy"), expected.numpy())
    assert np.array_equal(np.load(out / "labels.npy"), labels.numpy())
    assert json.loads((out / "meta.json").read_text())["shape"] == [26, 6, 11, 11]
    opened = cnnrs.load_features(out)
    assert torch.equal(opened.features, expected) and opened.folder == out
    opened.features.zero_()  # private: the file stays as it is
    assert torch.equal(cnnrs.load_features(out).features, expected)
    assert sorted(path.name for path in out.iterdir()) == ["features.npy", "labels.npy", "meta.json"]


def test_whatever_shapes_the_numbers_makes_them_new(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    shutil.copytree(folder, images)
    out, model = tmp_path / "features", backbone()

    def run(transform: Any = TRANSFORM) -> str:
        data = cnnrs.ImageFolder(images, transform)
        features = cnnrs.preconv(data, model, out=out, overwrite=True)
        assert torch.equal(features.features, cnnrs.preconv(data, model).features)
        return said(capsys)

    assert run() == ""
    assert run().endswith("26 features are up to date, nothing to compute")
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += 1
    assert run() == f"{out}: recomputing the features, because the model or its weights changed"
    model[3] = nn.MaxPool2d(2, stride=1)
    assert run().endswith("because the model or its weights changed")
    model[1].running_mean += 1
    assert run().endswith("because the model or its weights changed")
    other = transforms.Compose(
        [transforms.Resize((24, 24), transforms.InterpolationMode.NEAREST), transforms.ToTensor()]
    )
    assert run(other).endswith("because the transform changed")
    victim = next(images.rglob("*.png"))
    shutil.copy(next(images.rglob("*.jpg")), victim)
    assert run(other) == f"{out}: 1 image is gone: computing 0 rows, 26 are there"  # the copy's features are known
    victim.unlink()
    assert run().endswith("because the transform changed")
    assert run().endswith("25 features are up to date, nothing to compute")


def test_data_that_cannot_be_identified_is_recomputed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batches = [(torch.randn(2, 3, 8, 8), torch.arange(2))]
    for expected in ("", "recomputing the features, because cnnrs cannot tell whether these are the same images"):
        features = cnnrs.preconv(batches, backbone(), out=tmp_path / "f")
        assert expected in said(capsys)
        assert features.paths is None


def test_a_sampler_that_repeats_images_is_not_trusted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = cnnrs.ImageFolder(folder, TRANSFORM)
    loader = cnnrs.DataLoader(data, batch_size=4, sampler=WeightedRandomSampler([1.0] * 26, 40))
    for _ in range(2):
        features = cnnrs.preconv(loader, backbone(), out=tmp_path / "f")
        assert len(features) == len(features.paths or []) == 40
    assert "cannot tell whether" in said(capsys)


def test_an_incomplete_or_foreign_folder(folder: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "features", cnnrs.ImageFolder(folder, TRANSFORM)
    cnnrs.preconv(data, backbone(), out=out)
    (out / "meta.json").unlink()
    with pytest.raises(FileNotFoundError, match="holds no complete features"):
        cnnrs.load_features(out)
    cnnrs.preconv(data, backbone(), out=out)
    meta = json.loads((out / "meta.json").read_text())
    (out / "meta.json").write_text(json.dumps({**meta, "format": 99}))
    with pytest.raises(ValueError, match="is in format 99, this cnnrs reads format 2"):
        cnnrs.load_features(out)
    np.save(out / "labels.npy", np.zeros(3))
    (out / "meta.json").write_text(json.dumps(meta, separators=(",", ":")))
    with pytest.raises(ValueError, match=r"labels\.npy is damaged"):
        cnnrs.load_features(out)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("do not lose")
    with pytest.raises(FileExistsError, match=r"holds 'thesis\.tex', not a feature file"):
        cnnrs.preconv(data, backbone(), out=tmp_path / "work")
    with pytest.raises(FileNotFoundError, match="holds no complete features"):
        cnnrs.load_features(tmp_path / "nowhere")


def test_a_folder_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file"):
        cnnrs.preconv(cnnrs.ImageFolder(folder, TRANSFORM), backbone(), out=tmp_path / "file")


@pytest.mark.parametrize("engine", ENGINES)
def test_a_head_trains_on_features_as_on_the_images(folder: Path, engine: Any) -> None:
    """The whole point: freezing the front and training the head gives the same head, bit for bit."""
    model = nn.Sequential(backbone().eval(), nn.Flatten(), nn.Linear(6 * 11 * 11, 3))
    cnnrs.freeze(model[0])
    head = copy.deepcopy(model[1:])
    data = cnnrs.ImageFolder(folder, TRANSFORM)
    slow = torch.optim.SGD(model[2].parameters(), lr=0.01)
    fast = torch.optim.SGD(head.parameters(), lr=0.01)
    features = cnnrs.preconv(data, model[0], engine=engine)
    for epoch in range(2):
        model.train()
        model[0].eval()
        for x, y in cnnrs.DataLoader(data, batch_size=8):
            slow.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            slow.step()
        loader = cnnrs.DataLoader(cnnrs.FeatureDataset(*features), batch_size=8)
        cnnrs.fit(
            epoch, head, loader, optimizer=fast, loss_fn=nn.functional.cross_entropy, verbose=False, engine=engine
        )
    assert tutorial.same(head[1].state_dict(), model[2].state_dict())


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ENGINES)
def test_features_from_cuda_come_back(folder: Path, engine: Any) -> None:
    data = cnnrs.ImageFolder(folder, TRANSFORM)
    on_cpu, _ = cnnrs.preconv(data, backbone())
    on_gpu, _ = cnnrs.preconv(data, backbone().cuda(), engine=engine)
    assert on_gpu.device.type == "cpu"
    # cuDNN may use TF32: 10 bits of mantissa, sums of 27 products of values below 1.
    assert torch.allclose(on_gpu, on_cpu, atol=1e-3)


def test_arguments_that_make_no_sense(folder: Path, tmp_path: Path) -> None:
    model = nn.Conv2d(3, 2, 3)
    batches = [(torch.rand(4, 3, 8, 8), torch.arange(4))]
    with pytest.raises(
        TypeError, match=r"must be a loader or a data set, got a path: cnnrs\.ImageFolder\('.*', transform\)"
    ):
        cnnrs.preconv(folder, model)  # type: ignore[arg-type]
    assert len(cnnrs.preconv(batches, model, passes=np.int64(1), seed=np.int64(3))) == 4
    for passes in ("2", 2.0, 0):
        with pytest.raises(ValueError, match="passes must be at least 1, a whole number, got"):
            cnnrs.preconv(batches, model, passes=passes)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="seed must be a whole number, got None"):
        cnnrs.preconv(batches, model, seed=None)  # type: ignore[arg-type]
    file = tmp_path / "file"
    file.touch()
    for out in (file, file / "below"):
        with pytest.raises(OSError, match=r"out= names a folder, but here is a file: '.*file"):
            cnnrs.preconv(batches, model, out=out)
    with pytest.raises(TypeError, match=r"body must be a torch\.nn\.Module, got 'resnet18'"):
        cnnrs.preconv(batches, model).attach(nn.Flatten(), "resnet18")  # type: ignore[arg-type]

    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return x, x

    with pytest.raises(TypeError, match="pool='avg' takes one tensor, this layer returns a tuple"):
        cnnrs.preconv(batches, Pair(), pool="avg")
    with pytest.raises(TypeError, match="weights is a dict: load it"):
        cnnrs.preconv(batches, "resnet18", weights={})
