"""What the parts compute on: thousands of photos out of hundreds, batches on the device, copies of a network."""

import copy
from pathlib import Path
from typing import Any

import loader_inputs
import torch
from torch import nn
from torchvision.transforms import Compose, Normalize, Resize, ToTensor

from gpu.scale import Scale


def many(scratch: Path, number: int) -> Path:
    """A folder of ``number`` photos in classes: those at hand as often as needed, each time with other bytes.

    A comment in front of the picture makes them different files of the same pixels, so that nothing is found again.
    """
    source, _ = loader_inputs.photos(scratch / "source")
    files = loader_inputs.files(source)
    folder = scratch / "photos"
    for count in range(number):
        path = files[count % len(files)]
        data = path.read_bytes()
        comment = b"\xff\xfe\x00\x06" + count.to_bytes(4, "big")
        place = folder / path.parent.name / f"{count:05}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        # Behind the two bytes that every JPEG begins with.
        place.write_bytes(data[:2] + comment + data[2:])
    return folder


def fewer(folder: Path, number: int, place: Path) -> Path:
    """Links to some of them, of every class."""
    files = loader_inputs.files(folder)
    for path in files[:: max(1, len(files) // number)][:number]:
        link = place / path.parent.name / path.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.hardlink_to(path)
    return place


def transform(scale: Scale, *last: Any) -> Compose:
    """The tutorial's, or one that ends otherwise."""
    numbers = [ToTensor(), Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    return Compose([Resize((scale.pixels, scale.pixels)), *(last or numbers)])


def on_device(scale: Scale, model: nn.Module) -> nn.Module:
    """A copy: other contenders change its types and its order of memory."""
    return copy.deepcopy(model).to(scale.device)


def resident(scale: Scale) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of the main size that lie on the device, two of them in turn."""
    size = scale.batches[-1]
    two = [
        (torch.randn(size, 3, scale.pixels, scale.pixels, device=scale.device), torch.zeros(size, dtype=torch.int64))
        for _ in range(2)
    ]
    return [two[number % 2] for number in range(scale.resident)]
