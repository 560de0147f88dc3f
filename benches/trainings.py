"""The tutorial's three trainings from files to the last epoch: its own loop and torchvision's loaders against cnnrs."""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import loader_inputs
import torch
import torch.nn.functional as F
import torchvision
from fit_cases import tutorials_fit, vgg_head
from loader import DIGITS, TUTORIAL
from measure import show
from mnist_files import mnist
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import cnnrs

EPOCHS = 20
BATCH = 32
#: Photos whose features plain PyTorch computes; the rest would take as long each.
SAMPLE = 64


Run = Callable[[], object]


@dataclass(frozen=True)
class Part:
    """Work that a training does ``times`` times; ``run`` does a ``share`` of it."""

    run: Run
    times: int = EPOCHS
    share: float = 1.0


@dataclass(frozen=True)
class Training:
    """What plain PyTorch does, and what cnnrs does."""

    name: str
    theirs: list[Part]
    ours: list[Part]


class Trainings:
    """Seconds per training, from the median of a few rounds of each of its parts."""

    rounds = 2

    def __init__(self, trainings: Iterator[Training]) -> None:
        self.trainings = trainings

    def measure(self) -> "Trainings":
        """Every part once to warm up, then all in turn."""
        trainings = list(self.trainings)
        runs = dict.fromkeys(part.run for training in trainings for part in (*training.theirs, *training.ours))
        rounds: list[dict[Run, float]] = []
        for number in range(self.rounds + 1):
            rounds.append({run: _seconds(run) for run in runs})
            print(f"The tutorial's trainings: round {number} of {self.rounds}", file=sys.stderr, flush=True)

        def total(parts: list[Part], seconds: dict[Run, float]) -> float:
            return sum(part.times / part.share * seconds[part.run] for part in parts)

        self.rows = []
        for training in trainings:
            pairs = [(total(training.theirs, s), total(training.ours, s)) for s in rounds[1:]]
            medians = map(statistics.median, zip(*pairs, strict=True))
            self.rows.append((training.name, *medians, statistics.median(a / b for a, b in pairs)))
        return self

    def table(self) -> str:
        """Minutes or seconds, and how many times as fast."""
        lines = [
            "### The tutorial's three trainings",
            "",
            f"{EPOCHS} epochs each, batches of {BATCH}, loading included, without validation. One epoch is measured, "
            f"{self.rounds} times, and multiplied; plain PyTorch computes the features of {SAMPLE} photos, scaled to "
            "all. torchvision loads in the main process as in the tutorial; both sides compute on all cores.",
            "",
            "| training | plain PyTorch | cnnrs | times as fast |",
            "|---|---:|---:|---:|",
        ]
        for name, theirs, ours, ratio in self.rows:
            lines.append(f"| {name} | {_duration(theirs)} | {_duration(ours)} | {ratio:.1f} |")
        return "\n".join([*lines, ""])


def comparisons() -> Iterator[Trainings]:
    """One table."""
    with tempfile.TemporaryDirectory() as scratch:
        yield Trainings(trainings(Path(scratch)))


def trainings(scratch: Path) -> Iterator[Training]:
    """Two from scratch; VGG16 as before and after the tutorial's preconv."""
    root = mnist(scratch)
    digits = (torchvision.datasets.MNIST(root, True, DIGITS), cnnrs.MNIST(root, train=True, transform=DIGITS))
    yield _from_scratch("MNIST: MnistNet, 60,000 digits", cnnrs.models.MnistNet, *digits)
    folder = loader_inputs.photos(scratch)[0]
    photos = (torchvision.datasets.ImageFolder(str(folder), TUTORIAL), cnnrs.ImageFolder(folder, TUTORIAL))
    count = len(photos[0])
    yield _from_scratch(f"cats and dogs from scratch: CatDogNet, {count} photos", cnnrs.models.CatDogNet, *photos)
    torch.manual_seed(0)
    vgg = torchvision.models.vgg16().features.eval().requires_grad_(False)

    def features() -> None:
        with torch.no_grad():
            for images, _ in DataLoader(Subset(photos[0], range(SAMPLE)), BATCH):
                vgg(images)

    def preconv() -> None:
        with tempfile.TemporaryDirectory(dir=scratch) as out:
            cnnrs.preconv(photos[1], vgg, Path(out) / "features", batch_size=BATCH, verbose=False)

    rows = TensorDataset(torch.randn(count, 25088).relu_(), torch.randint(2, (count,)))
    head = _from_scratch("", vgg_head, rows, cnnrs.FeatureDataset(*rows.tensors), F.cross_entropy)
    every, once = (Part(features, times, SAMPLE / count) for times in (EPOCHS, 1))
    ours = [Part(preconv, 1), *head.ours]
    yield Training(f"VGG16 on {count} photos, frozen features in every epoch; cnnrs: once", [every, *head.theirs], ours)
    yield Training(f"VGG16 on {count} photos, features once (preconv) on both sides", [once, *head.theirs], ours)


def _from_scratch(
    name: str, make: Callable[[], nn.Module], theirs: Any, ours: Any, loss_fn: Any = F.nll_loss
) -> Training:
    models = [make(), make()]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.0001, momentum=0.5) for model in models]
    loaders = DataLoader(theirs, BATCH, shuffle=True), cnnrs.DataLoader(ours, BATCH, shuffle=True)

    def plain() -> None:
        tutorials_fit(models[0], loaders[0], optimizers[0], loss_fn)

    def fit() -> None:
        cnnrs.fit(0, models[1], loaders[1], optimizer=optimizers[1], loss_fn=loss_fn, verbose=False)

    return Training(name, [Part(plain)], [Part(fit)])


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _duration(seconds: float) -> str:
    return f"{show(seconds / 60)} min" if seconds >= 120 else f"{show(seconds)} s"
