"""Batches delivered to a device; on the CPU the same code runs with `device="cpu"`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import transforms

from cnnrs.data.folder import ImageFolder
from cnnrs.data.loader import DataLoader

TUTORIAL = transforms.Compose(
    [
        transforms.Resize((32, 32)),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)
Check = Callable[..., None]
pytestmark = pytest.mark.filterwarnings("ignore:cnnrs.DataLoader.* in Python")


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FINISHES = {
    "normalize": TUTORIAL,
    "float": transforms.Compose([transforms.Resize((20, 21)), transforms.ToTensor()]),
    "bytes": transforms.Compose([transforms.Resize((20, 21)), transforms.PILToTensor()]),
    "table": transforms.Compose(
        [
            transforms.Resize((20, 21)),
            transforms.ToTensor(),
            transforms.Normalize(0.5, 0.2),
            transforms.Normalize(0.1, 3.0),
        ]
    ),
    "gray": transforms.Compose([transforms.Resize((20, 21)), transforms.Grayscale(), transforms.ToTensor()]),
    "python": transforms.Compose([transforms.Resize((20, 21)), transforms.ToTensor(), lambda image: image * 2]),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FINISHES)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_numbers_made_on_a_device_have_the_same_bits(folder: Path, device: str, name: str, on_error: str) -> None:
    dataset = ImageFolder(folder, FINISHES[name])
    expected = list(DataLoader(dataset, 4))
    loader = DataLoader(dataset, 4, num_workers=2, device=device, on_error=on_error)
    for _ in range(2):
        found = list(loader)
        assert len(found) == len(expected)
        for (images, labels), (other, numbers) in zip(found, expected, strict=True):
            assert images.device.type == labels.device.type == device
            assert images.dtype == other.dtype
            assert torch.equal(images.cpu(), other) and torch.equal(labels.cpu(), numbers)


@pytest.mark.parametrize("device", DEVICES)
def test_bytes_cross_the_bus(folder: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cnnrs.data.mover import Mover

    crossed = []
    copy = Mover._copy

    def watch(self: Mover, tensor: torch.Tensor, sources: list[torch.Tensor]) -> torch.Tensor:
        crossed.append(tensor.dtype)
        return copy(self, tensor, sources)

    monkeypatch.setattr(Mover, "_copy", watch)
    list(DataLoader(ImageFolder(folder, TUTORIAL), 26, device=device))
    assert crossed == [torch.uint8, torch.int64]


@pytest.mark.parametrize("device", DEVICES)
def test_other_batches_move_as_they_are(folder: Path, device: str) -> None:
    rows = torch.utils.data.TensorDataset(torch.arange(6.0).view(3, 2), torch.arange(3))
    (found,) = list(DataLoader(rows, 3, device=device))
    assert torch.equal(found[0].cpu(), rows.tensors[0]) and found[0].device.type == device

    def collate(samples: list[Any]) -> dict[str, Any]:
        return {"images": [image for image, _ in samples], "labels": torch.tensor([i for _, i in samples]), "n": 2}

    batch = next(iter(DataLoader(ImageFolder(folder, TUTORIAL), 2, collate_fn=collate, device=device)))
    assert batch["n"] == 2 and batch["labels"].device.type == batch["images"][1].device.type == device
