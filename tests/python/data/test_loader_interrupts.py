"""A `DataLoader` that is asked for more behind a Ctrl-C: a batch is lost, everything else is as without it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import Dataset, TensorDataset, default_collate
from torchvision import transforms

from cnnrs.data.folder import ImageList
from cnnrs.data.loader import DataLoader
from cnnrs.data.mnist import MNIST

pytestmark = [
    pytest.mark.filterwarnings("ignore:cnnrs.DataLoader.* in Python"),
    pytest.mark.filterwarnings("ignore:cnnrs.DataLoader uses threads"),
    pytest.mark.filterwarnings("ignore:cnnrs.DataLoader cannot read"),
]
SAMPLES = 10


def numbered(root: Path, size: int) -> ImageList:
    """Images that are as bright as their label."""
    samples = []
    for i in range(SAMPLES):
        path = root / f"{i}.png"
        Image.new("RGB", (size, size), (i, i, i)).save(path)
        samples.append((str(path), i))
    return ImageList(samples, transforms.Compose([transforms.CenterCrop(8), transforms.PILToTensor()]))


@pytest.fixture
def alarm() -> Iterator[Callable[[float], None]]:
    """Ctrl-C so many seconds from now."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds) and None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer that signals")
@pytest.mark.parametrize("python_step", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"num_workers": 0}, {"num_workers": 1}, {"num_workers": 1, "on_error": "skip"}], ids=str
)
def test_images_keep_their_labels(
    options: dict[str, Any], python_step: bool, tmp_path: Path, alarm: Callable[[float], None]
) -> None:
    dataset = numbered(tmp_path, 1000)
    if python_step:
        dataset.transform = transforms.Compose([transforms.CenterCrop(8), lambda x: x, transforms.PILToTensor()])
    interrupts = 0
    # Decoding one takes milliseconds: most of these come while the loader waits.
    for wait in (0.001, 0.003):
        iterator = iter(DataLoader(dataset, 1, **options))
        found: list[tuple[int, int]] = []
        lost = 0
        while True:
            try:
                if lost == 0:
                    alarm(wait)
                images, labels = next(iterator)
                alarm(0)
                found.append((int(images[0, 0, 0, 0]), int(labels)))
            except KeyboardInterrupt:
                lost += 1
            except StopIteration:
                break
        alarm(0)
        assert all(image == label for image, label in found), found
        assert len(found) >= SAMPLES - lost
        assert sorted(found) == found and len(set(found)) == len(found)
        interrupts += lost
    assert interrupts


class Squares(Dataset[int]):
    def __getitem__(self, index: int) -> int:
        return index * index

    def __len__(self) -> int:
        return SAMPLES


@pytest.mark.parametrize("kind", ["images", "rows", "called"])
@pytest.mark.parametrize(
    "options",
    [{"num_workers": 1, "prefetch_factor": 1}, {"num_workers": 1}, {"num_workers": 2}, {"num_workers": 0}, {}],
    ids=str,
)
def test_the_epoch_goes_on_to_its_end(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    calls = 0

    def collate(samples: list[Any]) -> Any:
        nonlocal calls
        calls += 1
        if calls in (2, 3, 5):
            raise KeyboardInterrupt
        return default_collate(samples)

    dataset: Any = {"images": numbered(tmp_path, 8), "rows": TensorDataset(torch.arange(SAMPLES)), "called": Squares()}
    iterator = iter(DataLoader(dataset[kind], 1, collate_fn=collate, **options))
    delivered = interrupts = 0
    while True:
        try:
            next(iterator)
            delivered += 1
        except KeyboardInterrupt:
            interrupts += 1
        except StopIteration:
            break
    assert (delivered, interrupts) == (SAMPLES - 3, 3)


class Interrupted:
    """A sampler that Ctrl-C meets once, and that can go on."""

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __init__(self) -> None:
        self.drawn = -1

    def __next__(self) -> list[int]:
        self.drawn += 1
        if self.drawn == 4:
            raise KeyboardInterrupt
        if self.drawn >= SAMPLES:
            raise StopIteration
        return [self.drawn]

    def __len__(self) -> int:
        return SAMPLES


@pytest.mark.parametrize("options", [{"num_workers": 1, "prefetch_factor": 1}, {"num_workers": 0}, {}], ids=str)
def test_an_interrupted_sampler_goes_on(options: dict[str, Any], tmp_path: Path) -> None:
    iterator = iter(DataLoader(numbered(tmp_path, 8), batch_sampler=Interrupted(), **options))
    found, interrupts = [], 0
    while True:
        try:
            images, labels = next(iterator)
            found.append(int(labels))
            assert int(images[0, 0, 0, 0]) == found[-1]
        except KeyboardInterrupt:
            interrupts += 1
        except StopIteration:
            break
    # With workers the next index is drawn behind a batch, which is lost then.
    expected = [i for i in range(SAMPLES) if i != 4 and not ("prefetch_factor" in options and i == 3)]
    assert (found, interrupts) == (expected, 1)


@pytest.mark.parametrize("num_workers", [None, 0, 2])
@pytest.mark.parametrize("listed", [False, True])
def test_a_digit_without_a_label_is_no_other_digits(listed: bool, num_workers: int | None, mnist_root: Path) -> None:
    """Its batch fails, as with torch, and the batches behind it have their own images."""
    found = []
    for loader in (TorchDataLoader, DataLoader):
        digits = MNIST(mnist_root, transform=transforms.ToTensor())
        size = len(digits)
        targets = digits.targets[: size - 1]
        digits.targets = targets.tolist() if listed else targets
        workers = {"num_workers": num_workers} if loader is DataLoader else {}
        iterator = iter(loader(digits, 2, sampler=[0, 1, size - 1, 2, 3, 4, 5], **workers))
        batches: list[Any] = []
        while True:
            try:
                batches.append(next(iterator))
            except IndexError:
                batches.append("no label")
            except StopIteration:
                break
        found.append(batches)
    theirs, ours = found
    assert [type(batch) for batch in ours] == [type(batch) for batch in theirs]
    assert theirs[1] == ours[1] == "no label"
    for ours_one, theirs_one in zip(ours, theirs, strict=True):
        assert all(map(torch.equal, ours_one, theirs_one)) if ours_one != "no label" else True
