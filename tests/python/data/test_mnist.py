"""`cnnrs.data.mnist.MNIST` against torchvision's."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import pickle
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_idx
from torch.utils.data import DataLoader as TorchDataLoader
from torchvision import datasets, transforms

from cnnrs.data.loader import DataLoader
from cnnrs.data.mnist import FILES, MNIST
from cnnrs.errors import DecodeError

TUTORIAL = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])


@pytest.mark.parametrize("train", [True, False])
def test_it_is_torchvisions(mnist_root: Path, train: bool) -> None:
    ours, theirs = MNIST(str(mnist_root), train), datasets.MNIST(str(mnist_root), train)
    assert torch.equal(ours.data, theirs.data) and ours.data.dtype == theirs.data.dtype
    assert torch.equal(ours.targets, theirs.targets) and ours.targets.dtype == theirs.targets.dtype
    assert repr(ours) == repr(theirs)
    for name in ("classes", "class_to_idx", "train", "root", "raw_folder"):
        assert getattr(ours, name) == getattr(theirs, name)
    image, target = ours[7]
    assert image.mode == "L" and image.tobytes() == theirs[7][0].tobytes()
    assert type(target) is int and target == theirs[7][1]
    ours, theirs = (make(mnist_root, train, TUTORIAL, lambda t: t + 1) for make in (MNIST, datasets.MNIST))
    assert torch.equal(ours[-1][0], theirs[-1][0]) and ours[-1][1] == theirs[-1][1]
    assert repr(ours) == repr(theirs).replace(repr(theirs.target_transform), repr(ours.target_transform))


@pytest.mark.parametrize("layout", ["raw in root", "gz in root", "gz in MNIST/raw"])
def test_files_are_found(mnist_root: Path, tmp_path: Path, layout: str) -> None:
    target = tmp_path / "MNIST" / "raw" if "MNIST" in layout else tmp_path
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        data = (mnist_root / "MNIST" / "raw" / name).read_bytes()
        if layout.startswith("gz"):
            (target / f"{name}.gz").write_bytes(gzip.compress(data))
        else:
            (target / name).write_bytes(data)
    assert torch.equal(MNIST(tmp_path, train=False).data, MNIST(mnist_root, train=False).data)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        MNIST(tmp_path)
    for name in FILES:
        assert name in str(caught.value)
    assert str(tmp_path / "MNIST" / "raw") in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"\0\0\x08\x01" + data[4:], "0x00000801"),
        (lambda data: data[:-5], "cut short"),
        (lambda data: data + b"more", "behind the data"),
        (lambda data: b"", "shorter"),
        (lambda data: gzip.compress(data)[:-12], "incomplete"),
        (lambda data: gzip.compress(data)[:400] + b"\xff" * 30 + gzip.compress(data)[430:], "gzip"),
        (lambda data: b"<html>Not Found</html>", "IDX"),
    ],
)
def test_damaged_files_are_named(
    mnist_root: Path, tmp_path: Path, damage: Callable[[bytes], bytes], reason: str
) -> None:
    root = tmp_path / "MNIST"
    shutil.copytree(mnist_root / "MNIST", root)
    images = root / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(damage(images.read_bytes()))
    with pytest.raises(DecodeError, match=reason) as caught:
        MNIST(tmp_path)
    assert str(images) in str(caught.value)
    assert isinstance(caught.value, OSError)


def test_files_that_do_not_belong_together(mnist_root: Path, tmp_path: Path) -> None:
    shutil.copytree(mnist_root / "MNIST", tmp_path / "MNIST")
    write_idx(tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte", np.zeros(12, np.uint8))
    with pytest.raises(ValueError, match=r"300 images.*12 labels"):
        MNIST(tmp_path)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    "transform",
    [
        TUTORIAL,
        transforms.ToTensor(),
        transforms.PILToTensor(),
        transforms.Compose([transforms.Resize(32), transforms.ToTensor()]),
        transforms.Compose(
            [transforms.Grayscale(3), transforms.ToTensor(), transforms.Normalize([0.1] * 3, [0.3] * 3)]
        ),
        transforms.Compose([transforms.CenterCrop(20), transforms.Grayscale(), transforms.ToTensor()]),
    ],
    ids=["tutorial", "float", "uint8", "resize", "three channels", "crop"],
)
def test_batches_are_torchs(
    mnist_root: Path, assert_equal: Callable[..., None], transform: Any, shuffle: bool, num_workers: int
) -> None:
    torch.manual_seed(1)
    theirs = list(TorchDataLoader(datasets.MNIST(mnist_root, transform=transform), 32, shuffle))
    state = torch.get_rng_state()
    for make in (MNIST, datasets.MNIST):
        torch.manual_seed(1)
        loader = DataLoader(make(mnist_root, transform=transform), 32, shuffle, num_workers=num_workers)
        assert_equal(list(loader), theirs)
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.filterwarnings("ignore:cnnrs.DataLoader cannot read")
def test_batches_follow_edits_of_the_data(mnist_root: Path, assert_equal: Callable[..., None]) -> None:
    for make in (MNIST, datasets.MNIST):
        dataset = make(mnist_root, transform=TUTORIAL)
        loader = DataLoader(dataset, 16)
        first = next(iter(loader))[0]
        kept = first.clone()
        dataset.data, dataset.targets = 255 - dataset.data[:40], dataset.targets[:40]
        loader = DataLoader(dataset, 16)
        assert_equal(list(loader), list(TorchDataLoader(dataset, 16)))
        assert torch.equal(first, kept)
        # A view that is not contiguous is no longer read by Rust, and still right.
        dataset.data = dataset.data.transpose(1, 2)
        assert_equal(list(loader), list(TorchDataLoader(dataset, 16)))


def test_target_transform_and_index_faults(mnist_root: Path, assert_equal: Callable[..., None]) -> None:
    make = functools.partial(MNIST, mnist_root, transform=TUTORIAL, target_transform=lambda target: target % 2)
    assert_equal(list(DataLoader(make(), 50)), list(TorchDataLoader(make(), 50)))
    assert_equal(list(DataLoader(make(), 2, sampler=[-1, 5])), list(TorchDataLoader(make(), 2, sampler=[-1, 5])))
    loader = iter(DataLoader(make(), 2, sampler=[0, 1, 2, 300, 4, 5]))
    next(loader)
    with pytest.raises(IndexError):
        next(loader)
    assert torch.equal(next(loader)[1], torch.stack([torch.tensor(make()[i][1]) for i in (4, 5)]))


def test_pickles(mnist_root: Path) -> None:
    dataset = MNIST(mnist_root, transform=TUTORIAL)
    assert torch.equal(pickle.loads(pickle.dumps(dataset)).data, dataset.data)


@pytest.fixture
def mirror(mnist_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A server on this machine in place of torchvision's mirrors."""
    served = tmp_path / "served"
    served.mkdir()
    resources = []
    for name in FILES:
        data = gzip.compress((mnist_root / "MNIST" / "raw" / name).read_bytes())
        (served / f"{name}.gz").write_bytes(data)
        resources.append((f"{name}.gz", hashlib.md5(data).hexdigest()))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(served)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}/"
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    monkeypatch.setattr(datasets.MNIST, "mirrors", [url + "gone/", url])
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


def test_download(mirror: Path, mnist_root: Path, tmp_path: Path) -> None:
    ours = MNIST(tmp_path / "data", download=True)
    assert torch.equal(ours.data, MNIST(mnist_root).data)
    raw = tmp_path / "data" / "MNIST" / "raw"
    assert sorted(path.name for path in raw.iterdir()) == sorted(f"{name}.gz" for name in FILES)
    # What is there is not downloaded again.
    for path in mirror.iterdir():
        path.unlink()
    MNIST(tmp_path / "data", train=False, download=True)


def test_a_wrong_checksum_is_refused(mirror: Path, tmp_path: Path) -> None:
    (mirror / "train-images-idx3-ubyte.gz").write_bytes(b"something else")
    with pytest.raises(ConnectionError, match=r"MD5 sum is .*, expected") as caught:
        MNIST(tmp_path / "data", download=True)
    assert "gone/" in str(caught.value) and "404" in str(caught.value)
    assert not list((tmp_path / "data" / "MNIST" / "raw").iterdir())


def test_offline_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(ConnectionError, match=r"put the file into .*raw yourself"):
        MNIST(tmp_path, download=True)


def test_a_mirror_that_does_not_answer_is_given_up(
    mirror: Path, mnist_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cnnrs.data.mnist._SECONDS", 0.2)
    before = socket.getdefaulttimeout()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        published = datasets.MNIST.mirrors
        monkeypatch.setattr(datasets.MNIST, "mirrors", [f"http://127.0.0.1:{silent.getsockname()[1]}/", published[1]])
        assert torch.equal(MNIST(tmp_path / "data", download=True).data, MNIST(mnist_root).data)
    assert socket.getdefaulttimeout() == before
