"""`decode="scaled"`: what `PIL.Image.draft` makes of large JPEGs, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import picture
from PIL import Image, ImageOps
from torchvision import transforms

from cnnrs._util.notes import forget_notes
from cnnrs.data.folder import ImageFolder
from cnnrs.data.loader import DataLoader

SIZES = [(64, 64), (63, 90), (130, 128), (200, 333), (257, 130), (31, 400)]


@pytest.fixture
def jpegs(tmp_path: Path) -> Path:
    root = tmp_path / "jpegs" / "class"
    root.mkdir(parents=True)
    exif = Image.Exif()
    for i, (height, width) in enumerate(SIZES):
        exif[0x0112] = (1, 6, 3, 8, 1, 1)[i]
        image = picture(height, width, i).convert("L" if i == 2 else "RGB")
        image.save(root / f"{i}.jpg", quality=85, progressive=i == 3, exif=exif)
    picture(150, 160, 9).save(root / "9.png")
    return root.parent


def drafted(path: str, transform: Any, height: int, width: int, upright: bool = False) -> torch.Tensor:
    with Image.open(path) as image:
        turned = upright and image.getexif().get(0x0112, 1) >= 5
        image.draft("RGB", (height, width) if turned else (width, height))
        if upright:
            image = ImageOps.exif_transpose(image)
        result: torch.Tensor = transform(image.convert("RGB"))
    return result


@pytest.mark.filterwarnings("ignore:.*EXIF")
@pytest.mark.parametrize("exif", [False, True])
@pytest.mark.parametrize("size", [(16, 16), (30, 20), (32, 64), (64, 64), (300, 300)])
def test_jpegs_are_what_draft_makes_of_them(jpegs: Path, size: tuple[int, int], exif: bool) -> None:
    transform = transforms.Compose([transforms.Resize(size), transforms.ToTensor()])
    dataset = ImageFolder(jpegs, transform)
    found = next(iter(DataLoader(dataset, len(dataset), decode="scaled", exif=exif)))[0]
    expected = [drafted(path, transform, *size, upright=exif) for path, _ in dataset.samples]
    assert torch.equal(found, torch.stack(expected))


@pytest.mark.filterwarnings("ignore:.*EXIF")
def test_the_shorter_edge_decides(jpegs: Path) -> None:
    transform = transforms.Compose([transforms.Resize(30), transforms.CenterCrop(28), transforms.ToTensor()])
    dataset = ImageFolder(jpegs, transform)
    exact, found = (next(iter(DataLoader(dataset, 7, decode=decode)))[0] for decode in ("exact", "scaled"))
    for (path, _), one, plain in zip(dataset.samples, found, exact, strict=True):
        with Image.open(path) as image:
            width, height = image.size
        short = min(height, width)
        expected = drafted(path, transform, height * 30 // short, width * 30 // short)
        assert torch.equal(one, expected)
        # 31 is less than twice 30, and a PNG has no smaller form.
        assert torch.equal(one, plain) == (short < 60 or path.endswith(".png"))


@pytest.mark.filterwarnings("ignore:.*EXIF")
def test_a_cache_tells_both_ways_apart(jpegs: Path, tmp_path: Path) -> None:
    transform = transforms.Compose([transforms.Resize((16, 16)), transforms.ToTensor()])
    dataset = ImageFolder(jpegs, transform)
    kept = {}
    for decode in ("exact", "scaled", "exact", "scaled"):
        plain = next(iter(DataLoader(dataset, 7, decode=decode)))[0]
        found = next(iter(DataLoader(dataset, 7, decode=decode, cache=tmp_path / "cache")))[0]
        assert torch.equal(found, plain) and torch.equal(kept.setdefault(decode, found), found)
    assert not torch.equal(kept["exact"], kept["scaled"])


def test_without_a_resize_in_front_it_says_that_it_does_nothing(jpegs: Path) -> None:
    forget_notes()
    dataset = ImageFolder(jpegs, transforms.Compose([transforms.RandomResizedCrop(16), transforms.ToTensor()]))
    with pytest.warns(UserWarning, match='decode="scaled" has an effect only where the transform begins with a Resize'):
        next(iter(DataLoader(dataset, decode="scaled")))
    with pytest.raises(ValueError, match="decode must be 'exact' or 'scaled' or 'gpu', got 'fast'"):
        DataLoader(dataset, decode="fast")
