"""Data the tests share: generated images and digits, and real photos where they are."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cnnrs.engine import choice, companion, cuda_capture
from fake_cuda import FakeCuda
from recorded import Counting, Recorder

# A shell lets what it starts in the background ignore Ctrl-C, and the children of that ignore it too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Beside another worker of pytest-xdist two threads wait for each other's core; what is about threads takes two_threads.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parents[2]
PHOTOS = Path(os.environ.get("CNNRS_PHOTOS", REPOSITORY.parent / "shared" / "data" / "cats_dogs"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU or engine ``torch`` where there is none; marks what engine ``torch`` runs ``libtorch``."""
    problem = companion.problem()
    for item in items:
        if not torch.cuda.is_available() and item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if parameters.get("engine") == "torch":
            item.add_marker(pytest.mark.libtorch)
        if problem is not None and item.get_closest_marker("libtorch") is not None:
            item.add_marker(pytest.mark.skip(reason=problem))


@pytest.fixture(scope="module")
def two_threads() -> Iterator[None]:
    """Kernels share the work between two threads, however many the machine or the worker has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fake_cuda() -> Iterator[FakeCuda]:
    """Two CUDA devices that are none; races and forbidden waits are errors."""
    with FakeCuda() as cuda:
        yield cuda


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))])  # fmt: skip
def device(request: pytest.FixtureRequest) -> str:
    """Where steps are recorded: by a stand-in for CUDA, and on a GPU if there is one."""
    return str(request.param)


@pytest.fixture
def recorder(device: str, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """What records there."""
    made = Recorder() if device == "cpu" else Counting()
    monkeypatch.setitem(cuda_capture.RECORDERS, device, made)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    # As on CUDA, where there is no engine "cpu" that "auto" would take first.
    monkeypatch.setattr(choice, "slow_on_cpu", lambda lowered: ["made so"])
    return made


@pytest.fixture(scope="session")
def photos() -> Path:
    """Real photos: `train` and `valid`, each with the class folders `cat` and `dog`."""
    if not (PHOTOS / "train").is_dir():
        pytest.skip(f"no photos in {PHOTOS}: set CNNRS_PHOTOS")
    return PHOTOS


def picture(height: int, width: int, seed: int) -> Image.Image:
    """Smooth colours with an edge: compresses like a photo, every pixel differs from its neighbours."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    rng = np.random.default_rng(seed)
    waves = [128 + 90 * np.sin((x * a + y * b) / 9 + c) for a, b, c in rng.uniform(0.2, 2, (3, 3))]
    pixels = np.stack(waves, axis=-1)
    pixels[height // 3 :, width // 2 :] *= 0.5
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 generated JPEG and PNG files in three classes: color and gray, many sizes, one folder deeper."""
    root = tmp_path_factory.mktemp("folder")
    for i in range(26):
        kind = ("ant", "bee", "cat")[i % 3]
        image = picture(20 + 7 * i % 61, 25 + 11 * i % 53, i)
        if i % 7 == 0:
            image = image.convert("L")
        path = root / kind / ("deep" if i % 5 == 0 else ".") / f"{i}.{'jpg' if i % 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=88)
    return root


@pytest.fixture(scope="session")
def equal_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 gray 28x28 PNG files in four classes: a data set that needs no Resize."""
    root = tmp_path_factory.mktemp("equal")
    for i in range(40):
        path = root / str(i % 4) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(28, 28, i).convert("L").save(path)
    return root


def write_idx(path: Path, array: np.ndarray) -> None:
    """An IDX file of bytes, gzipped when the name says so."""
    data = struct.pack(f">I{array.ndim}I", 0x0800 | array.ndim, *array.shape) + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture(scope="session")
def mnist_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MNIST in torchvision's layout with generated digits: 300 for training, 70 for testing."""
    root = tmp_path_factory.mktemp("mnist")
    rng = np.random.default_rng(0)
    for split, count in (("train", 300), ("t10k", 70)):
        raw = root / "MNIST" / "raw"
        write_idx(raw / f"{split}-images-idx3-ubyte", rng.integers(0, 256, (count, 28, 28)))
        write_idx(raw / f"{split}-labels-idx1-ubyte", rng.integers(0, 10, count))
    return root


@pytest.fixture
def images(folder: Path, tmp_path: Path) -> Path:
    """A copy of the 26 images, to be changed; a network of `stores` has seen none yet."""
    from stores import SEEN

    SEEN.clear()
    shutil.copytree(folder, tmp_path / "images")
    return tmp_path / "images"


Batches = list[list[torch.Tensor]]


@pytest.fixture(scope="session")
def assert_equal() -> Callable[[Batches, Batches], None]:
    """Two epochs have the same batches, bit by bit, types included."""

    def check(ours: Batches, theirs: Batches) -> None:
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert type(mine) is type(other)
            assert len(mine) == len(other)
            for a, b in zip(mine, other, strict=True):
                assert type(a) is type(b)
                assert a.dtype == b.dtype
                assert a.shape == b.shape
                assert a.is_contiguous() == b.is_contiguous()
                assert torch.equal(a, b)

    return check


@pytest.fixture
def cat_and_dog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a folder `cat_and_dog` of noise as the documentation describes it."""
    rng = np.random.default_rng(0)
    for part, number in (("train", 4), ("valid", 2)):
        for name in ("cat", "dog"):
            place = tmp_path / "cat_and_dog" / part / name
            place.mkdir(parents=True)
            for i in range(number):
                Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(place / f"{i}.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    """A resnet18 of random numbers."""
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.resnet18(weights=None).eval()


@pytest.fixture
def torch_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resnet: nn.Module) -> Path:
    """torch's cache with a file for resnet18 whose hash is right, and no network."""
    import torchvision

    place = tmp_path / "hub" / "checkpoints"
    place.mkdir(parents=True)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    torch.save(resnet.state_dict(), place / "new.pth")
    name = f"resnet18-{hashlib.sha256((place / 'new.pth').read_bytes()).hexdigest()[:8]}.pth"
    (place / "new.pth").rename(place / name)
    entry = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.value
    monkeypatch.setitem(entry.__dict__, "url", f"https://example.invalid/{name}")
    return place / name


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, weights, and a run that was trained on them."""
    import torchvision

    from fruit import fruit, train

    place = tmp_path_factory.mktemp("workplace")
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), place / "weights.pth")
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), place / "squeezenet.pth")
    fruit(place / "fruit")
    (place / "photo.pth").write_bytes((place / "fruit" / "plum" / "03.jpg").read_bytes())
    assert train(place, "runs/fruit", "--epochs", "30") == 0
    return place


@pytest.fixture
def bad_fruit(tmp_path: Path) -> Path:
    """Photos of which two cannot be read."""
    from fruit import fruit

    root = fruit(tmp_path / "fruit", 4)
    (root / "plum" / "00.jpg").write_bytes(b"")
    whole = (root / "plum" / "01.jpg").read_bytes()
    (root / "plum" / "01.jpg").write_bytes(whole[: len(whole) // 2])
    return root
