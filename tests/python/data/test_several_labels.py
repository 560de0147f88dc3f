"""Photos with several labels: the loader's batches are torch's, features keep the labels, heads train on them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import Subset
from torchvision import transforms

import cnnrs
from cnnrs import ImageList

Batches = list[list[torch.Tensor]]
SMALL = transforms.Compose([transforms.Resize((12, 12)), transforms.ToTensor()])


def labelled(folder: Path, **options: Any) -> ImageList:
    """The photos of `folder`, each with its class, and some with another label."""
    samples = cnnrs.ImageFolder(folder).samples
    names = ("ant", "bee", "cat")
    labels = [[names[label], *(["night"] * (i % 3 == 0)), *(["rain"] * (i % 5 == 0))] for i, (_, label) in
              enumerate(samples)]  # fmt: skip
    labels[4] = []
    return ImageList(list(zip((path for path, _ in samples), labels, strict=True)), SMALL, **options)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_are_torchs(
    folder: Path, workers: int, shuffle: bool, assert_equal: Callable[[Batches, Batches], None]
) -> None:
    data = labelled(folder)

    def epoch(loader: Any, **options: Any) -> Batches:
        torch.manual_seed(3)
        return list(loader(data, batch_size=4, shuffle=shuffle, **options))

    expected = epoch(TorchDataLoader)
    assert_equal(epoch(cnnrs.DataLoader, num_workers=workers), expected)
    assert_equal(epoch(cnnrs.DataLoader, num_workers=workers, on_error="skip"), expected)
    _, targets = expected[0]
    assert targets.dtype is torch.float32 and targets.shape == (4, 5)
    if not shuffle:
        assert torch.equal(torch.cat([targets for _, targets in expected]), data.targets)


def test_transforms_subsets_and_steps_in_python(folder: Path, assert_equal: Callable[[Batches, Batches], None]) -> None:
    for data in (
        labelled(folder, target_transform=lambda target: target.sum()),
        Subset(labelled(folder), [7, 3, 21, 4, 4]),
        ImageList(labelled(folder).samples, transforms.Compose([SMALL, lambda x: x.flip(1)]), classes=list("abcde")),
    ):
        torch.manual_seed(0)
        expected = list(TorchDataLoader(data, batch_size=3))
        torch.manual_seed(0)
        assert_equal(list(cnnrs.DataLoader(data, batch_size=3)), expected)
    assert torch.equal(ImageList(labelled(folder).samples, classes=list("abcde")).targets, labelled(folder).targets)


def test_pickles_and_parts(folder: Path) -> None:
    data = labelled(folder)
    again = pickle.loads(pickle.dumps(data))
    assert again.samples == data.samples and torch.equal(again.targets, data.targets) and again.multilabel
    for part in data.split(0.3):
        assert [data.samples.index(sample) for sample in part.samples] == sorted(map(data.samples.index, part.samples))
        assert torch.equal(part.targets, data.targets[[data.samples.index(sample) for sample in part.samples]])


def test_bad_files_are_left_out_with_their_labels(folder: Path, tmp_path: Path) -> None:
    data = labelled(folder)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    mixed = ImageList([*data.samples[:3], (str(broken), (0,)), *data.samples[3:]], SMALL, classes=data.classes)
    with pytest.warns(UserWarning, match="skips files that fail"):
        targets = torch.cat([targets for _, targets in cnnrs.DataLoader(mixed, batch_size=4, on_error="skip")])
    assert torch.equal(targets, data.targets)


class Means(nn.Module):
    """(N, 3, H, W) to (N, 12): the colours of four quarters."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(x).flatten(1)


def test_features_keep_the_labels(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = labelled(folder), tmp_path / "features"
    for features in (cnnrs.preconv(data, Means()), cnnrs.preconv(data, Means(), out), cnnrs.load_features(out)):
        assert torch.equal(features.labels, data.targets) and features.labels.dtype is torch.float32
        assert features.classes == data.classes == ["ant", "bee", "cat", "night", "rain"]
    assert np.array_equal(np.load(out / "labels.npy"), data.targets.numpy())
    cnnrs.preconv(data, Means(), out)
    assert "26 features are up to date" in capsys.readouterr().out
    data.samples[0] = (data.samples[0][0], (1, 4))
    assert cnnrs.preconv(data, Means(), out).labels[0].tolist() == [0, 1, 0, 0, 1]
    twice = cnnrs.preconv(data, Means(), tmp_path / "twice", passes=2)
    assert twice.labels.shape == (52, 5) and len(twice.split(0.5, 0.25, 0.25)) == 3
    train, valid = features.split(0.3)
    assert sorted([*(train.paths or []), *(valid.paths or [])]) == sorted(features.paths or [])
    # Most of the three others, label by label.
    found = features.knn(3)
    unit = nn.functional.normalize(features.features, dim=1)
    rows = (unit @ unit.T).fill_diagonal_(-2).topk(3, dim=1).indices
    assert torch.equal(found, (features.labels[rows].sum(dim=1) >= 2).float())
    assert features.nearest(0, 1)[0].label == features.labels[rows[0, 0]].tolist()
    with pytest.raises(ValueError, match="a colour per class needs one label per row"):
        features.plot()


def test_a_head_learns_them(folder: Path) -> None:
    features = cnnrs.preconv(labelled(folder), Means())
    torch.manual_seed(0)
    head = nn.Linear(12, 5)
    loader = cnnrs.DataLoader(cnnrs.FeatureDataset(*features), batch_size=8, shuffle=True)
    fit = cnnrs.compile(
        optimizer=torch.optim.Adam(head.parameters(), 0.05), loss_fn="binary_cross_entropy_with_logits", verbose=False
    )
    losses = [fit(epoch, head, loader)[0] for epoch in range(30)]
    assert losses[-1] < 0.9 * losses[0]


def test_a_batch_is_drawn_with_all_labels(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = cnnrs.DataLoader(labelled(folder), batch_size=6).show(6, tmp_path / "batch.png")
    assert [axes.get_title() for axes in figure.axes] == [
        "ant, night, rain",
        "ant",
        "ant",
        "ant, night",
        "-",
        "ant, rain",
    ]
