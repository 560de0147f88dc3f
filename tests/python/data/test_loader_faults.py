"""What a `DataLoader` raises, and at which batch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import picture
from torch.utils.data import DataLoader as TorchDataLoader
from torchvision import datasets, transforms

from cnnrs.data.folder import ImageFolder
from cnnrs.data.loader import DataLoader
from cnnrs.errors import DecodeError

TUTORIAL = transforms.Compose(
    [
        transforms.Resize((32, 32)),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)
Check = Callable[..., None]
pytestmark = pytest.mark.filterwarnings("ignore:cnnrs.DataLoader.* in Python")


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    root = tmp_path / "broken"
    shutil.copytree(folder, root)
    (root / "bee" / "text.jpg").write_text("hello world, this is not an image")
    return root


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_corrupt_file_is_named_at_its_batch(broken: Path, num_workers: int) -> None:
    dataset = ImageFolder(broken, TUTORIAL)
    bad = next(i for i, (path, _) in enumerate(dataset.samples) if path.endswith("text.jpg"))
    loader = DataLoader(dataset, 4, num_workers=num_workers)
    for _ in range(2):
        batches, faults = [], []
        iterator = iter(loader)
        for i in range(len(loader)):
            try:
                batches.append(next(iterator))
            except DecodeError as error:
                faults.append(i)
                assert "text.jpg" in str(error) and "hello w" in str(error)
                assert isinstance(error, OSError)
        assert faults == [bad // 4]
        with pytest.raises(StopIteration):
            next(iterator)
        expected = [batch for i, batch in enumerate(_chunks(dataset, 4)) if i != bad // 4]
        for (images, labels), (other, numbers) in zip(batches, expected, strict=True):
            assert torch.equal(images, other) and torch.equal(labels, numbers)


def _chunks(dataset: ImageFolder, size: int) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None]]:
    for start in range(0, len(dataset), size):
        indices = range(start, min(start + size, len(dataset)))
        if any(dataset.samples[i][0].endswith("text.jpg") for i in indices):
            yield None, None
            continue
        items = [dataset[i] for i in indices]
        yield torch.stack([image for image, _ in items]), torch.tensor([target for _, target in items])


@pytest.mark.parametrize("damage", ["cut", "empty", "header only"])
def test_damaged_photos_raise_where_pillow_raises(folder: Path, tmp_path: Path, damage: str) -> None:
    (tmp_path / "class").mkdir()
    whole = (folder / "bee" / "1.jpg").read_bytes()
    data = {"cut": whole[: len(whole) // 2], "empty": b"", "header only": whole[:30]}[damage]
    (tmp_path / "class" / "a.jpg").write_bytes(data)
    with pytest.raises(OSError):
        datasets.ImageFolder(tmp_path, TUTORIAL)[0]
    with pytest.raises(DecodeError, match=r"class/a\.jpg"):
        next(iter(DataLoader(ImageFolder(tmp_path, TUTORIAL))))


def test_a_file_that_vanished(broken: Path) -> None:
    (broken / "bee" / "text.jpg").unlink()
    dataset = ImageFolder(broken, TUTORIAL)
    gone = dataset.samples[5][0]
    os.remove(gone)
    iterator = iter(DataLoader(dataset, 4, num_workers=2))
    next(iterator)
    with pytest.raises(FileNotFoundError) as caught:
        next(iterator)
    assert os.fspath(caught.value.filename) == gone and gone in str(caught.value)
    assert next(iterator)[0].shape == (4, 3, 32, 32)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(broken: Path) -> None:
    dataset = ImageFolder(broken, TUTORIAL)
    os.chmod(dataset.samples[0][0], 0)
    with pytest.raises(PermissionError):
        next(iter(DataLoader(dataset, 4)))


def test_what_pillow_can_open_is_not_an_error(tmp_path: Path, assert_equal: Check) -> None:
    # A format that Rust does not read, behind an extension of an image: Pillow goes by the content, so must we.
    (tmp_path / "class").mkdir()
    for i, kind in enumerate(("JPEG2000", "ICO", "JPEG", "TGA", "PCX", "PNG")):
        picture(40, 32, i).save(tmp_path / "class" / f"{i}.png", format=kind)
    theirs = list(TorchDataLoader(datasets.ImageFolder(tmp_path, TUTORIAL), 4))
    for num_workers in (0, 2):
        assert_equal(list(DataLoader(ImageFolder(tmp_path, TUTORIAL), 4, num_workers=num_workers)), theirs)


def test_a_sampler_that_fails_fails_at_its_batch(folder: Path) -> None:
    class Failing:
        def __iter__(self) -> Iterator[int]:
            yield from range(6)
            raise ZeroDivisionError("the sampler's own")

    iterator = iter(DataLoader(ImageFolder(folder, TUTORIAL), 2, sampler=Failing(), num_workers=2))
    assert [next(iterator)[0].shape[0] for _ in range(3)] == [2, 2, 2]
    with pytest.raises(ZeroDivisionError, match="own"):
        next(iterator)


def test_an_index_out_of_range_fails_at_its_batch(folder: Path) -> None:
    iterator = iter(DataLoader(ImageFolder(folder, TUTORIAL), 2, sampler=[0, 1, 2, 99, 3, 4], num_workers=2))
    next(iterator)
    with pytest.raises(IndexError):
        next(iterator)
    assert next(iterator)[0].shape[0] == 2


def test_exceptions_of_python_steps_are_not_changed(folder: Path) -> None:
    class Mine(Exception):
        pass

    def fail(image: Any) -> Any:
        raise Mine("as it is")

    transform = transforms.Compose([transforms.Resize((8, 8)), fail, transforms.ToTensor()])
    loader = DataLoader(ImageFolder(folder, transform), 4)
    for _ in range(2):
        with pytest.raises(Mine, match="as it is"):
            next(iter(loader))
