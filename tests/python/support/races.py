"""Where streams meet: ``python races.py NAME DEVICE`` runs one of these, on CUDA under PyTorch's sanitizer.

The sanitizer (TORCH_CUDA_SANITIZER=1) takes over the whole process and ends it at the first access that nothing orders
after another stream's: hence one process each. It sees the device's memory only; whether the host reads too early shows
in the numbers, which are compared. On the CPU the same code runs.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torchvision import transforms

import cnnrs
from cnnrs.engine import choice
from cnnrs.model.lowering import lower

TRANSFORM = transforms.Compose(
    [transforms.Resize((32, 32)), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.2] * 3)]
)


def photos(root: Path, number: int = 40) -> cnnrs.ImageFolder:
    """Noise in two classes."""
    rng = np.random.default_rng(0)
    for i in range(number):
        place = root / str(i % 2) / f"{i}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(place)
    return cnnrs.ImageFolder(root, TRANSFORM)


def network() -> nn.Module:
    """Without dropout: a GPU draws other random numbers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(392, 2)
    )


def control(device: str) -> None:
    """A race: unless the sanitizer sees it, its silence about the others means nothing."""
    if device == "cpu":
        return
    from torch.cuda._sanitizer import CUDASanitizerErrors

    written = torch.zeros(1 << 20, device=device)
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            written.add_(1)
        written.sum()
    except CUDASanitizerErrors as found:
        print(f"found, as it should be: {str(found).splitlines()[0]}")
    else:
        raise AssertionError("the sanitizer is off, or sees no races")


def loader(device: str) -> None:
    """Batches that another stream copies and normalises, two epochs, each overwritten by its reader."""
    with tempfile.TemporaryDirectory() as scratch:
        data = photos(Path(scratch))
        expected = [(images, labels) for images, labels in cnnrs.DataLoader(data, 8)]
        moved = cnnrs.DataLoader(data, 8, device=device)
        for _ in range(2):
            for (images, labels), (same, numbers) in zip(moved, expected, strict=True):
                assert torch.equal(images.cpu(), same) and torch.equal(labels.cpu(), numbers)
                images.zero_()


def decoded(device: str) -> None:
    """Photos that are decoded there, with some that the CPU decodes and a bad one, whose batch is put together anew."""
    if device == "cpu":
        return
    with tempfile.TemporaryDirectory() as scratch:
        data = photos(Path(scratch))
        for number, (path, _) in enumerate(data.samples[::5]):
            Image.open(path).save(path, "PNG") if number else Path(path).write_bytes(b"no image")
        options: Any = {"batch_size": 8, "on_error": "skip"}
        expected = list(cnnrs.DataLoader(data, **options))
        there = cnnrs.DataLoader(data, device=device, decode="gpu", **options)
        for _ in range(2):
            for (images, labels), (same, numbers) in zip(there, expected, strict=True):
                # Noise, of which colours at half the resolution are spread otherwise: an eighth of the range, in
                # deviations of 0.2.
                assert float((images.cpu() - same).abs().mean()) <= 0.125 / 0.2 and torch.equal(labels.cpu(), numbers)
                images.zero_()


def preconv(device: str) -> None:
    """Photos through a network, from the data set and from a loader of the device, in two precisions."""
    with tempfile.TemporaryDirectory() as scratch:
        data, model = photos(Path(scratch)), network()
        expected, labels = cnnrs.preconv(data, model, verbose=False)
        there = model.to(device)
        for precision, bits in (("exact", 20), ("bf16", 6)):
            for source in (data, cnnrs.DataLoader(data, 8, device=device)):
                rows, same = cnnrs.preconv(
                    source, there, batch_size=8, precision=precision, dtype="float32", verbose=False
                )
                assert torch.equal(same, labels)
                assert torch.dist(rows, expected) <= 2.0**-bits * expected.norm()


def fit(device: str, engine: str = "python") -> None:
    """Three epochs over batches that another stream brings: the losses of the CPU within rounding."""
    with tempfile.TemporaryDirectory() as scratch:
        data = photos(Path(scratch))
        losses = []
        for place in ("cpu", device):
            model = network().to(place)
            sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
            batches = cnnrs.DataLoader(data, 8, device=place)
            for phase in ("training", "training", "validation"):
                loss, _ = cnnrs.fit(
                    0, model, batches, phase, optimizer=sgd, loss_fn=nn.functional.cross_entropy,
                    engine="python" if place == "cpu" else engine, verbose=False,
                )  # fmt: skip
            losses.append(loss)
        # cuDNN may use TF32, 11 bits, and ten steps let differences grow.
        assert abs(losses[1] - losses[0]) <= 0.05 * losses[0], losses


def recorded(device: str) -> None:
    """The same with the step recorded, on CUDA."""
    with mock.patch.object(
        torch.cuda.CUDAGraph, "replay", autospec=True, side_effect=torch.cuda.CUDAGraph.replay
    ) as seen:
        fit(device, engine="auto")
    assert device == "cpu" or seen.call_count > 0, "nothing was recorded"


RACES: dict[str, Callable[[str], None]] = {
    one.__name__: one for one in (control, loader, decoded, preconv, fit, recorded)
}


def looked_into(*args: Any, **kwargs: Any) -> Any:
    """A model as operations, which is refused while a mode of PyTorch's is on, as the sanitizer is."""
    with _disable_current_modes():
        return lower(*args, **kwargs)


def main() -> None:
    """``all`` in one process is for the CPU, which has no races."""
    name, device = sys.argv[1:]
    with mock.patch.object(choice, "lower", looked_into):
        for one, run in RACES.items():
            if name in (one, "all"):
                run(device)
                print(f"{one}: passed on {device}")


if __name__ == "__main__":
    main()
