"""Pipes, sockets and devices in a folder of images: named, never opened for good."""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path

import PIL
import pytest
import torch
from conftest import picture
from torchvision import transforms

from cnnrs.data.check import check
from cnnrs.data.folder import ImageFolder
from cnnrs.data.loader import DataLoader
from cnnrs.data.mnist import MNIST
from cnnrs.errors import CnnrsError, DecodeError

SMALL = transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()])
pytestmark = pytest.mark.filterwarnings("ignore:cnnrs.DataLoader skips")


@pytest.fixture
def odd(tmp_path: Path) -> Iterator[Path]:
    """Two images, one of them through a link, and what is no file: 1 pipe, 2 link to a pipe, 3 device, 4 socket."""
    place = tmp_path / "class"
    place.mkdir()
    picture(20, 30, 0).save(place / "0.png")
    os.mkfifo(place / "1.png")
    (place / "2.png").symlink_to(place / "1.png")
    (place / "3.png").symlink_to("/dev/zero")
    here = os.getcwd()
    # The name of a socket may not be long.
    os.chdir(place)
    server = socket.socket(socket.AF_UNIX)
    server.bind("4.png")
    os.chdir(here)
    (place / "5.png").symlink_to(place / "0.png")
    yield tmp_path
    server.close()


KINDS = {1: "a named pipe", 2: "a named pipe", 3: "a device", 4: "a socket"}


@pytest.mark.parametrize("options", [{}, {"num_workers": 0}, {"cache": "ram"}, {"exif": True}], ids=str)
def test_a_loader_names_what_is_no_file(odd: Path, options: dict[str, object]) -> None:
    dataset = ImageFolder(odd, SMALL)
    iterator = iter(DataLoader(dataset, 1, **options))  # type: ignore[arg-type]
    for i in range(6):
        if i not in KINDS:
            assert next(iterator)[0].shape == (1, 3, 8, 8)
            continue
        with pytest.raises(OSError, match=KINDS[i]) as caught:
            next(iterator)
        assert f"class/{i}.png" in str(caught.value)


def test_a_loader_that_skips_leaves_them_out(odd: Path) -> None:
    loader = DataLoader(ImageFolder(odd, SMALL), 8, on_error="skip")
    ((images, _),) = list(loader)
    assert torch.equal(images[0], images[1]) and len(images) == 2
    assert [os.path.basename(path) for path, _ in loader.errors] == ["1.png", "2.png", "3.png", "4.png"]


@pytest.mark.parametrize("num_workers", [1, 4])
def test_check_lists_them(odd: Path, num_workers: int) -> None:
    report = check(odd, num_workers=num_workers, verbose=False)
    assert [
        (os.path.basename(path), KINDS[i] in reason) for i, (path, reason) in zip(KINDS, report.unreadable, strict=True)
    ] == [(f"{i}.png", True) for i in KINDS]
    assert report.files == 6 and not report.corrupt and report.sizes == {(30, 20): 2}


def test_a_folder_of_digits_with_a_pipe(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        os.mkfifo(raw / name)
    with pytest.raises((OSError, RuntimeError)):
        MNIST(tmp_path)


@pytest.mark.parametrize("kind", [DecodeError, OSError, CnnrsError, PIL.UnidentifiedImageError])
def test_what_pillows_users_catch(kind: type[Exception], tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "text.jpg").write_text("no image")
    with pytest.raises(kind, match=r"text\.jpg") as caught:
        list(DataLoader(ImageFolder(tmp_path, SMALL)))
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is DecodeError and str(again) == str(caught.value) and again.errno is None
