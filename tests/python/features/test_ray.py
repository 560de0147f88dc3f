"""`cnnrs.ray`: the callable class by itself, and on a local Ray with two workers where Ray is installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import transforms

import cnnrs
import cnnrs.features.on_ray
from cnnrs.features.samples import Data

TRANSFORM = transforms.Compose([transforms.Resize((24, 24)), transforms.ToTensor()])
AUGMENT = transforms.Compose(
    [transforms.RandomResizedCrop(24), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2))


def test_paths_get_features(folder: Path) -> None:
    data = cnnrs.ImageFolder(folder, TRANSFORM)
    expected = cnnrs.preconv(data, model(), batch_size=4)
    extract = cnnrs.ray.Extract(model(), TRANSFORM, batch_size=4)
    batch = {"path": np.array([path for path, _ in data.samples]), "caption": np.arange(26)}
    found = extract(batch)
    assert list(found) == ["path", "caption", "features"] and found["caption"] is batch["caption"]
    assert torch.equal(torch.from_numpy(found["features"]), expected.features)
    with pytest.raises(KeyError, match='needs the column "path", got image'):
        extract({"image": np.zeros(3)})


def test_samples_get_the_augmentation_they_have_in_one_process(folder: Path) -> None:
    data = cnnrs.ImageFolder(folder, AUGMENT)
    expected = cnnrs.preconv(data, model(), passes=2, seed=3, batch_size=4)
    source = Data(cnnrs.DataLoader(data, batch_size=4))
    extract = cnnrs.ray.Extract(model(), data=source, batch_size=4, seed=3, dtype="bfloat16")
    for number, start in ((0, 8), (1, 4)):
        samples = np.arange(start, start + 8)
        stats = [source.stat(i) for i in samples]
        columns = {"bytes": np.array([s[0] for s in stats]), "changed": np.array([s[1] for s in stats])}  # type: ignore[index]
        columns["changed"][2] += 1
        found = extract({"sample": samples, "pass": np.full(8, number), **columns})
        features = torch.from_numpy(found["features"]).view(torch.bfloat16)
        rows = number * 26 + torch.from_numpy(samples)
        assert torch.equal(features, expected.features[rows].bfloat16())
        # A file that is not what the driver saw has no identity.
        identities = [source.identity(int(i)) for i in samples]
        assert found["identity"].tolist() == [*identities[:2], "", *identities[3:]]
    with pytest.raises(ValueError, match=r"a batch must be of one pass, got \[0, 1\]"):
        extract({"sample": np.arange(2), "pass": np.arange(2)})


def test_data_without_files_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match=r"cnnrs\.ray\.extract needs a data set of image files: only loaders"):
        cnnrs.ray.extract([(torch.zeros(1, 3, 8, 8), torch.zeros(1))], model(), tmp_path / "f")
    with pytest.raises(ValueError, match="format must be 'store' or 'parquet', got 'csv'"):
        cnnrs.ray.extract([], model(), tmp_path / "f", format="csv")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Ray on this machine, with room for two workers."""
    ray = pytest.importorskip("ray")
    pytest.importorskip("pyarrow")
    ray.init(num_cpus=3, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()


@pytest.mark.timeout(280)
def test_two_workers_write_the_store_of_one_process(cluster: Any, folder: Path, tmp_path: Path, capsys: Any) -> None:
    images = tmp_path / "images"
    shutil.copytree(folder, images)
    data = cnnrs.ImageFolder(images, AUGMENT)
    options: dict[str, Any] = {"passes": 3, "seed": 1, "batch_size": 2}
    alone = cnnrs.preconv(data, model(), out=tmp_path / "alone", **options)
    found = cnnrs.ray.extract(data, model(), tmp_path / "ray", workers=2, num_workers=1, **options)
    assert found is not None and torch.equal(found.features, alone.features)
    for name in ("features.npy", "labels.npy", "meta.json"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    # Each opens what the other wrote, and computes what is new.
    capsys.readouterr()
    assert torch.equal(cnnrs.preconv(data, model(), out=tmp_path / "ray", **options).features, alone.features)
    assert "78 features are up to date" in capsys.readouterr().out
    shutil.copy(images / "ant" / "6.png", images / "ant" / "new.png")
    (images / "ant" / "new.png").write_bytes((images / "ant" / "6.png").read_bytes() + b"\0")
    more = cnnrs.ray.extract(cnnrs.ImageFolder(images, AUGMENT), model(), tmp_path / "ray", **options)
    assert more is not None and len(more) == 81 and "computing 3 rows, 78 are there" in capsys.readouterr().out
    again = cnnrs.load_features(tmp_path / "ray")
    kept = [row for row, path in enumerate(again.paths or []) if not path.endswith("new.png")]
    assert torch.equal(again.features[kept], alone.features)


@pytest.mark.timeout(280)
def test_parquet(cluster: Any, folder: Path, tmp_path: Path) -> None:
    data = cnnrs.ImageFolder(folder, TRANSFORM)
    assert cnnrs.ray.extract(data, model(), tmp_path / "p", format="parquet", batch_size=4, num_workers=1) is None
    table = cluster.data.read_parquet(str(tmp_path / "p")).to_pandas().sort_values("path")
    expected = cnnrs.preconv(data, model(), batch_size=4)
    order = np.argsort(expected.paths)
    assert table["path"].tolist() == [expected.paths[i] for i in order]  # type: ignore[index]
    assert table["label"].tolist() == expected.labels[order].tolist()
    features = torch.from_numpy(np.stack([np.asarray(row) for row in table["features"]]))
    assert torch.equal(features, expected.features[order])
