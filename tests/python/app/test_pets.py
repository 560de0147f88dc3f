"""The photos of the notebooks: your own folder, or Oxford-IIIT Pet, and what is said when there is neither."""

from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
from PIL import Image

from cnnrs.pets import cats_and_dogs
from fruit import fruit


def test_own_folder(tmp_path: Path) -> None:
    train, valid = cats_and_dogs(fruit(tmp_path / "fruit", 10))
    assert (len(train), len(valid), train.classes, valid.classes) == (16, 4, ["berry", "plum"], ["berry", "plum"])
    train, valid = cats_and_dogs(tmp_path / "fruit", per_class=3)
    assert train.targets == [0, 0, 0, 1, 1, 1] and valid.targets == [0, 1]


def test_own_halves(tmp_path: Path) -> None:
    fruit(tmp_path / "both" / "training", 4)
    fruit(tmp_path / "both" / "val", 2)
    train, valid = cats_and_dogs(tmp_path / "both", train_transform=list, valid_transform=tuple)
    assert (len(train), len(valid), train.transform, valid.transform) == (8, 4, list, tuple)


def test_oxford_pets(tmp_path: Path) -> None:
    """Folders as torchvision's download leaves them: cat is species 1, dog 2."""
    base = tmp_path / "oxford-iiit-pet"
    (base / "images").mkdir(parents=True)
    (base / "annotations").mkdir()
    for split, names in (("trainval", ["Bengal_1 6 1 2", "pug_1 26 2 1"]), ("test", ["pug_2 26 2 1"])):
        (base / "annotations" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
        for name in names:
            Image.new("RGB", (8, 8)).save(base / "images" / f"{name.split()[0]}.jpg")
    train, valid = cats_and_dogs(root=tmp_path)
    assert [(Path(path).name, train.classes[label]) for path, label in train.samples] == [
        ("Bengal_1.jpg", "cat"),
        ("pug_1.jpg", "dog"),
    ]
    assert [Path(path).name for path, _ in valid.samples] == ["pug_2.jpg"]


def test_no_photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise URLError("Temporary failure in name resolution")

    monkeypatch.setattr("torchvision.datasets.oxford_iiit_pet.download_and_extract_archive", unreachable)
    with pytest.raises(FileNotFoundError, match=r"(?s)cannot be downloaded.*Set PHOTOS to a folder with one folder"):
        cats_and_dogs(root=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"PHOTOS = .*there is no such folder; one folder per class is wanted"):
        cats_and_dogs(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="class folder"):
        cats_and_dogs(tmp_path / "empty")
