"""Parts of a data set are known by any usual name, and folders that look like parts are never taken for classes."""

import os
from pathlib import Path

import pytest

from cnnrs.app.cli import main
from cnnrs.app.jobs.photos import find_photos
from cnnrs.app.layout import Parts, UnclearLayout, class_folders, find_parts, part_of
from cnnrs.data.photos import scan_photos
from cnnrs.pets import cats_and_dogs
from fruit import fruit

TRAIN = ["train", "Train", "TRAIN", "training", "training_set", "train-set", "TrainSet", "Training Data", "train1",
         "train2017", "trainval", "train_images", "images-train", "dataset_train", "训练集", "训练"]  # fmt: skip
VALID = ["valid", "Validation", "val", "vals", "dev", "dev_set", "valid1", "val2017", "eval", "evaluation",
         "validation set", "验证集"]  # fmt: skip
TEST = ["test", "Test", "test1", "testing", "testing_set", "test-set", "tests", "test_images", "测试集", "測試"]
OTHER = ["cat", "trainer", "testudo", "devon", "valley", "value", "evaluator", "trail", "tester", "1", "set", "狗"]


@pytest.mark.parametrize(("part", "names"), [("train", TRAIN), ("valid", VALID), ("test", TEST), (None, OTHER)])
def test_spellings(part: str | None, names: list[str]) -> None:
    assert {name: part_of(name) for name in names} == dict.fromkeys(names, part)


def tree(root: Path, *photos: str) -> Path:
    """Empty files: only names matter here."""
    for name in photos:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def both(*parts: str) -> list[str]:
    return [f"{part}/{name}/{i}.jpg" for part in parts for name in ("cat", "dog") for i in range(2)]


@pytest.mark.parametrize("train", TRAIN)
@pytest.mark.parametrize("valid", ["val", "dev", "test1", "Testing_Set", "验证集"])
def test_two_parts(train: str, valid: str, tmp_path: Path) -> None:
    root = tree(tmp_path, *both(train, valid))
    found = find_parts(root)
    assert found is not None and (found.train, found.held_out) == (root / train, root / valid)


@pytest.mark.parametrize(
    ("photos", "parts"),
    [
        (both("train", "val", "test"), ("train", "val", "test")),
        # The tutorial's folders, from above, and beside photos of nobody knows what.
        (both("train/training", "train/validation"), ("train/training", "train/validation", None)),
        ([*both("train/training", "train/validation"), "test/1.jpg"], ("train/training", "train/validation", None)),
        # Kaggle's: the photos to predict have no classes.
        ([*both("train"), "test/1.jpg", "test/2.jpg"], ("train", None, None)),
        (both("train"), ("train", None, None)),
        # An archive in an archive, and the name twice.
        (both("archive/data/train", "archive/data/test"), ("archive/data/train", None, "archive/data/test")),
        (both("seg_train/seg_train", "seg_test/seg_test"), ("seg_train/seg_train", None, "seg_test/seg_test")),
        (both("pets-train-224", "pets-test-224"), ("pets-train-224", None, "pets-test-224")),
        ([*both("train", "valid"), "notes/readme.txt", ".git/test/1.jpg"], ("train", "valid", None)),
    ],
)
def test_layouts(photos: list[str], parts: tuple[str | None, ...], tmp_path: Path) -> None:
    root = tree(tmp_path, *photos)
    assert find_parts(root) == Parts(*(part and root / part for part in parts))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "photos",
    [
        ["cat/1.jpg", "dog/1.jpg"],
        ["cat/young/1.jpg", "cat/old/1.jpg", "dog/1.jpg"],
        # Vehicles.
        ["train/1.jpg", "car/1.jpg", "ship/1.jpg"],
        ["trail/1.jpg", "test_tube/1.jpg"],
    ],
)
def test_classes(photos: list[str], tmp_path: Path) -> None:
    assert find_parts(tree(tmp_path, *photos)) is None


@pytest.mark.parametrize(
    ("photos", "reason"),
    [
        (["train/1.jpg", "test/1.jpg"], "holds no class folders: training would learn to tell the parts apart"),
        (["Training_Set/1.jpg", "testing/1.jpg"], "holds no class folders"),
        (["train/1.jpg", "test/1.jpg", "cat/1.jpg"], "holds no class folders"),
        ([*both("train"), "valid/1.jpg"], "valid holds no class folders"),
        (both("train", "train1", "test"), "which is for training: train and train1?"),
        (both("train", "dev", "val"), "which is for validation: dev and val?"),
        ([*both("train"), "cat/1.jpg"], "but what is cat?"),
        (both("train", "prueba"), "but what is prueba?"),
        (["cat/1.jpg", "dog/1.jpg", "test/1.jpg"], "test looks like photos to measure with, but no folder is called"),
        (both("test", "val"), "no folder is called train"),
        # In a language that nobody has listed.
        (both("koulutus", "testaus"), "every folder of"),
    ],
)
def test_unclear(
    photos: list[str], reason: str, tmp_path: Path, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tree(tmp_path / "data", *photos)
    with pytest.raises(UnclearLayout, match=r":|every|holds no class folders"):
        find_parts(root)
    weights = ["--backbone", "resnet18", "--weights", str(workplace / "weights.pth")]
    assert main(["train", str(root), *weights, "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert reason in message and "--valid" in message
    assert not (tmp_path / "run").exists()


def test_what_is_which_can_be_said(tmp_path: Path) -> None:
    fruit(tmp_path / "A", 4)
    fruit(tmp_path / "B", 3)
    said: list[str] = []
    found = find_photos(tmp_path / "A", tmp_path / "B", None, said.append)
    assert (found.parts.count("train"), found.parts.count("test")) == (8, 6)
    assert said == [f"training on {tmp_path / 'A'}, measuring with {tmp_path / 'B'}"]
    # The same folders as classes.
    found = find_photos(tmp_path, 0.5, None, said.append)
    assert found.classes == ["A", "B"]
    train, valid = cats_and_dogs(tmp_path / "A")
    assert (len(train), len(valid)) == (6, 2)


@pytest.mark.parametrize("names", [("control", "test"), ("dev", "prod"), ("cat", "dog", "eval")])
def test_classes_that_are_called_like_parts(names: tuple[str, ...], tmp_path: Path) -> None:
    root = tree(tmp_path / "data", *(f"{name}/{i}.jpg" for name in names for i in range(4)))
    with pytest.raises(UnclearLayout, match=r"give --valid 0\.2 if they are all classes"):
        find_photos(root, None, None, print)
    assert find_photos(root, 0.25, None, print).classes == sorted(names)
    parts = tree(tmp_path / "parts", *(f"{name}/{i}.jpg" for name in ("train", "test") for i in range(4)))
    with pytest.raises(UnclearLayout, match="train holds no class folders"):
        find_photos(parts, 0.25, None, print)


@pytest.mark.parametrize("name", ["model.safetensors", "report.html", "history.csv"])
def test_files_of_others_are_no_run(name: str, workplace: Path, tmp_path: Path) -> None:
    root = fruit(tmp_path / "fruit", 3)
    out = tmp_path / "out"
    tree(out, name)
    before = (out / name).read_bytes()
    weights = ["--backbone", "resnet18", "--weights", str(workplace / "weights.pth")]
    assert main(["train", str(root), *weights, "--out", str(out)]) == 2
    assert (out / name).read_bytes() == before


def test_folders_of_cnnrs_are_no_classes(workplace: Path, tmp_path: Path) -> None:
    root = fruit(tmp_path / "fruit", 3)
    (root / "runs").symlink_to(workplace / "runs")
    tree(root, "plum.cnnrs-trash/00.jpg", "stopped/model.safetensors.partial", "features/x/train/features.npy.partial")
    tree(root, "vine/model.json", "vine/1.jpg")
    assert [folder.name for folder in class_folders(root)] == ["berry", "plum", "vine"]
    (root / "vine" / "model.json").unlink()
    for name in ("1.jpg", "2.jpg"):
        (root / "vine" / name).write_bytes((root / "plum" / "00.jpg").read_bytes())
    assert find_photos(root, None, None, print).classes == ["berry", "plum", "vine"]


@pytest.mark.parametrize("option", ["--out", "--features"])
@pytest.mark.parametrize("inside", ["runs/x", "plum/run"])
def test_nothing_is_written_among_photos(
    option: str, inside: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = fruit(tmp_path / "fruit", 2)
    before = sorted(root.rglob("*"))
    arguments = ["train", str(root), "--out", str(tmp_path / "run"), option, str(root / inside)]
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert f"{option} {root / inside} is inside {root}, and would count as photos" in message
    assert sorted(root.rglob("*")) == before


def test_the_run_of_the_current_folder_is_beside_it(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = fruit(tmp_path / "fruit", 4)
    monkeypatch.chdir(root)
    arguments = ["--backbone", "resnet18", "--weights", str(workplace / "weights.pth"), "--epochs", "1"]
    for _ in range(2):
        assert main(["train", ".", *arguments]) == 0
    assert sorted(os.listdir(tmp_path)) == ["fruit", "runs"]
    assert sorted(os.listdir(root)) == ["berry", "plum"]
    assert (tmp_path / "runs" / "fruit" / "model.json").exists()


def test_the_tutorials_folders(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fruit(tmp_path / "cat_and_dog" / "train" / "training", 3)
    fruit(tmp_path / "cat_and_dog" / "train" / "validation", 2, seed=1)
    arguments = ["--backbone", "resnet18", "--weights", str(workplace / "weights.pth"), "--epochs", "1"]
    assert main(["train", str(tmp_path / "cat_and_dog"), *arguments, "--out", str(tmp_path / "run")]) == 0
    assert "10 photos of berry, plum" in capsys.readouterr().out


def test_a_macs_notes_are_no_class(tmp_path: Path) -> None:
    root = tree(tmp_path, "cat/1.jpg", "dog/1.jpg", "__MACOSX/cat/._1.jpg")
    assert [folder.name for folder in class_folders(root)] == ["cat", "dog"]
    assert find_parts(root) is None


def test_training_takes_what_check_and_predict_take(tmp_path: Path) -> None:
    names = ["cat/1.jpg", "cat/2.JFIF", "cat/3.gif", "dog/1.tif", "dog/2.webp"]
    root = tree(tmp_path, *names, "cat/._1.jpg", "cat/Thumbs.db", "dog/.x/1.jpg", "dog/a.txt")
    data = find_photos(root, 0.5, None, print).data
    taken = sorted(os.path.relpath(path, root) for path, _ in data.samples)
    assert taken == sorted(names) == sorted(os.path.relpath(path, root) for path in scan_photos([str(root)])[0])
