"""Loaders that deliver to CUDA devices that are none: no race, and the host waits for no batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset
from torchvision import transforms

import cnnrs
from cnnrs.data.labels import on_host
from fake_cuda import FakeCuda

RESIZED = [transforms.Resize((20, 21))]
FINISHES: dict[str, list[Any]] = {
    "normalize": [transforms.ToTensor(), transforms.Normalize([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])],
    "float": [transforms.ToTensor()],
    "table": [transforms.ToTensor(), transforms.Normalize(0.5, 0.2), transforms.Normalize(0.1, 3.0)],
    "bytes": [transforms.PILToTensor()],
}


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
@pytest.mark.parametrize("name", FINISHES)
def test_images(fake_cuda: FakeCuda, folder: Path, device: str, name: str) -> None:
    data = cnnrs.ImageFolder(folder, transforms.Compose(RESIZED + FINISHES[name]))
    expected = list(cnnrs.DataLoader(data, 4))
    loader = cnnrs.DataLoader(data, 4, num_workers=2, device=device)
    for _ in range(2):
        found = [(images * 1, labels * 1) for images, labels in loader]
        for (images, labels), (other, numbers) in zip(found, expected, strict=True):
            assert images.device == labels.device == fake_cuda.resolve(device)
            assert torch.equal(images.cpu(), other) and torch.equal(labels.cpu(), numbers)


def test_the_second_epoch_takes_no_new_stream_and_waits_for_no_batch(fake_cuda: FakeCuda, folder: Path) -> None:
    loader = cnnrs.DataLoader(
        cnnrs.ImageFolder(folder, transforms.Compose(RESIZED + FINISHES["float"])), 4, device="cuda"
    )
    counts = []
    for _ in range(2):
        fake_cuda.waits.clear()
        sum(images.mean() for images, _ in loader)
        counts.append((len(fake_cuda.streams), fake_cuda.waits.copy()))
    assert counts[0] == counts[1] and counts[0][1] == []


@pytest.mark.parametrize("kind", ["tensors", "features", "subset"])
def test_rows_on_the_device(fake_cuda: FakeCuda, kind: str) -> None:
    rows, labels = torch.arange(20.0).view(10, 2), torch.arange(10)
    there = rows.cuda(), labels.cuda()
    fake_cuda.waits.clear()
    data: Any = cnnrs.FeatureDataset(*there) if kind == "features" else TensorDataset(*there)
    if kind == "subset":
        data = torch.utils.data.Subset(data, list(range(10)))
    found = [(x * 1, y * 1) for x, y in cnnrs.DataLoader(data, batch_size=4, shuffle=True)]
    assert fake_cuda.waits == []
    order = torch.cat([y for _, y in found]).cpu()
    assert sorted(order.tolist()) == list(range(10))
    assert torch.equal(torch.cat([x for x, _ in found]).cpu(), rows[order])


def test_rows_on_the_host_for_the_device(fake_cuda: FakeCuda) -> None:
    loader = cnnrs.DataLoader(TensorDataset(torch.arange(10.0), torch.arange(10)), batch_size=4, device="cuda:1")
    found = torch.cat([y * 1 for _, y in loader])
    assert fake_cuda.waits == [] and found.device == torch.device("cuda:1") and found.tolist() == list(range(10))


def test_rows_of_another_device(fake_cuda: FakeCuda) -> None:
    rows = TensorDataset(torch.arange(10.0).cuda(), torch.arange(10).cuda())
    found = torch.cat([y * 1 for _, y in cnnrs.DataLoader(rows, batch_size=4, device="cuda:1")])
    assert found.device == torch.device("cuda:1") and found.tolist() == list(range(10))
    # Nor does it count as known on the host.
    assert all(on_host(y) is None for _, y in cnnrs.DataLoader(rows, batch_size=4, device="cuda:1"))


@pytest.mark.parametrize("shuffle", [False, True])
def test_data_gen_on_the_device(fake_cuda: FakeCuda, shuffle: bool) -> None:
    features, labels = torch.arange(20.0).view(10, 2).cuda(), torch.arange(10).cuda()
    np.random.seed(0)
    fake_cuda.waits.clear()
    found = list(cnnrs.data_gen(features, labels, 4, shuffle))
    assert fake_cuda.waits == []
    assert all(torch.equal(x[:, 0], y * 2.0) for x, y in found) and sum(len(y) for _, y in found) == 10
