"""How a folder of photos is laid out: class folders, parts for training and validation, what cnnrs itself put there."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

from cnnrs.classifier.names import CARD, MODEL, TRASH, is_run_file
from cnnrs.data.photos import NOTES_FOLDER, photo_extensions
from cnnrs.features.store import is_ours

ONE_PER_CLASS = "a folder with one folder per class (pets/cat/1.jpg, pets/dog/2.jpg)"

# Words by which a folder is known as a part of a data set, without separators, digits and case.
_PARTS = {
    "train": "train|trains|training|trainings|trainval|trn|训练|訓練",
    "valid": "valid|validation|validate|val|vals|vali|dev|devel|development|eval|evals|evaluation|evaluate|holdout"
    "|验证|驗證|校验|评估|評估",
    "test": "test|tests|testing|tst|测试|測試",
}
_AFFIXES = (
    "dataset|data|sets|set|images|image|imgs|img|photos|photo|pictures|picture|pics|samples|split|files|folder|the|my"
    "|数据集|数据|數據|资料|集|图片|圖片|图像|样本"
)
_NAMES = {part: re.compile(f"(?:{_AFFIXES})*(?:{words})(?:{_AFFIXES})*") for part, words in _PARTS.items()}
# Also something to be recognised on photos, beside cars and ships.
_VEHICLES = ("train", "trains")


class UnclearLayout(ValueError):
    """Folders look like parts of a data set, and it cannot be told which is which.

    Attributes:
        alike: whether they may be classes all the same, if the user says so.
    """

    def __init__(self, text: str, alike: bool = False) -> None:
        super().__init__(text)
        self.alike = alike


class Parts(NamedTuple):
    """Folders with one folder per class each, by what they are for; what is None is cut from ``train``."""

    train: Path
    valid: Path | None = None
    test: Path | None = None

    @property
    def held_out(self) -> Path | None:
        """Where there are photos that are not trained on: to choose with, or else to measure with."""
        return self.valid or self.test


def find_parts(root: Path, alike_are_classes: bool = False) -> Parts | None:
    """The folders for training, validation and testing inside ``root``; None where its folders are classes.

    Args:
        root: a folder of folders.
        alike_are_classes: whether folders that all hold the same folders are classes, if their names say nothing, and
            folders of photos, if they are not named for training and for measuring both.

    Raises:
        UnclearLayout: they look like parts of a data set, not like classes, but it cannot be told which is which.
    """
    folders = class_folders(root)
    parts = _parts(folders)
    if not parts:
        if len(folders) == 1 and class_folders(folders[0]) and not _has_photos(folders[0]):
            # pets.zip holds pets/, for example.
            return find_parts(folders[0], alike_are_classes)
        if not alike_are_classes and (same := _alike(folders)):
            raise UnclearLayout(
                f"every folder of {root} ({_listed(folders)}) holds the same folders ({', '.join(same[:4])}): these "
                "look like the classes, and the folders above like parts of the data set, but which part is which?",
                alike=True,
            )
        return None
    train = _only(root, "training", parts.get("train", []))
    others = [folder for folder in folders if not any(folder in found for found in parts.values())]
    whole = "train" in parts and len(parts) > 1
    if alike_are_classes and not whole and all(map(_has_photos, folders)):
        return None
    if train is None:
        looks = _listed([folder for found in parts.values() for folder in found])
        raise UnclearLayout(
            f"{root}: {looks} looks like photos to measure with, but no folder is called train",
            alike=all(map(_has_photos, folders)),
        )
    if not class_folders(train):
        if len(parts) == 1 and others and train.name.casefold() in _VEHICLES:
            return None
        looks = _listed([folder for found in parts.values() for folder in found])
        raise UnclearLayout(
            f"{root}: {looks} looks like a part of the data set, but {train} holds no class folders: training would "
            "learn to tell the parts apart",
            alike=not whole and all(map(_has_photos, folders)),
        )
    if (inner := _inner_parts(train)) is not None:
        return inner
    train = _unwrapped(train)
    valid, test = (_only(root, what, parts.get(part, [])) for part, what in (("valid", "validation"), ("test", "test")))
    if valid is not None and not class_folders(valid):
        raise UnclearLayout(f"{valid} holds no class folders; those of {train} are wanted there too")
    # Kaggle's photos to predict have no classes.
    test = test if test is not None and class_folders(test) else None
    if valid is not None or test is not None:
        return Parts(train, *(part and _unwrapped(part) for part in (valid, test)))
    classes = {folder.name for folder in class_folders(train)}
    for other in others:
        if _has_photos(other) or classes & {folder.name for folder in class_folders(other)}:
            raise UnclearLayout(f"{root}: {train.name} looks like a part of the data set, but what is {other.name}?")
    return Parts(train)


def need_folder(path: Path, wanted: str) -> None:
    """That there is a folder; ``wanted`` says what should be in it.

    Raises:
        FileNotFoundError: there is nothing of that name.
        NotADirectoryError: it is a file.
    """
    if path.is_dir():
        return
    if path.exists():
        raise NotADirectoryError(f"{path}: is a file; {wanted} is wanted")
    raise FileNotFoundError(f"{path}: there is no such folder; {wanted} is wanted")


def class_folders(root: Path) -> list[Path]:
    """The folders of ``root`` that may be classes: none that is hidden, none that cnnrs or a Mac has written."""
    folders = (entry.name for entry in os.scandir(root) if entry.is_dir())
    names = sorted(name for name in folders if not name.startswith(".") and name != NOTES_FOLDER)
    return [folder for folder in (root / name for name in names) if not is_own(folder)]


def is_own(folder: Path) -> bool:
    """Whether a folder is what commands leave behind: a run, features, trash, or a folder of nothing but these."""
    if folder.name.endswith(TRASH) or all((folder / name).is_file() for name in (CARD, MODEL)):
        return True
    try:
        with os.scandir(folder) as entries:
            entry = None
            # A class folder is left at its first photo.
            for entry in entries:
                named = is_run_file(entry.name) or is_ours(entry.name)
                if not named and not (entry.is_dir(follow_symlinks=False) and is_own(Path(entry.path))):
                    return False
            return entry is not None
    except OSError:
        return False


def part_of(name: str) -> str | None:
    """What the name of a folder says it is, in any usual spelling: train, valid or test.

    >>> [part_of(name) for name in ("Training_Set", "train1", "dev", "测试集", "trainer")]
    ['train', 'train', 'valid', 'test', None]
    """
    text = re.sub(r"[\W\d_]+", "", unicodedata.normalize("NFKC", name).casefold())
    return next((part for part, words in _NAMES.items() if words.fullmatch(text)), None)


def _parts(folders: list[Path]) -> dict[str, list[Path]]:
    """Folders by the part their names say; also seg_train and seg_test, which differ in that word only."""
    parts: dict[str, list[Path]] = {}
    stems: dict[str, list[tuple[str, Path]]] = {}
    for folder in folders:
        part = part_of(folder.name)
        if part is not None:
            parts.setdefault(part, []).append(folder)
            continue
        words = re.split(r"[\W_]+", folder.name)
        for i, word in enumerate(words):
            part = part_of(word)
            if part is not None:
                stems.setdefault(" ".join([*words[:i], "*", *words[i + 1 :]]), []).append((part, folder))
    for found in stems.values():
        if len({part for part, _ in found}) > 1:
            for part, folder in found:
                parts.setdefault(part, []).append(folder)
    return parts


def _only(root: Path, what: str, folders: list[Path]) -> Path | None:
    if len(folders) > 1:
        raise UnclearLayout(f"{root}: which is for {what}: {_listed(folders)}?")
    return folders[0] if folders else None


def _inner_parts(folder: Path) -> Parts | None:
    """As in cat_and_dog/train/training and cat_and_dog/train/validation."""
    parts = _parts(class_folders(folder))
    return find_parts(folder, alike_are_classes=True) if "train" in parts and len(parts) > 1 else None


def _unwrapped(folder: Path) -> Path:
    """The folder with the classes: in seg_train/seg_train the inner one."""
    inside = class_folders(folder)
    twice = len(inside) == 1 and inside[0].name == folder.name and class_folders(inside[0])
    return inside[0] if twice else folder


def _alike(folders: list[Path]) -> list[str]:
    """The folders that every one of ``folders`` holds, if these hold nothing else and are two or more."""
    same: list[str] | None = None
    for folder in folders if len(folders) > 1 else []:
        names = [inside.name for inside in class_folders(folder)]
        if len(names) < 2 or same not in (None, names) or _has_photos(folder):
            return []
        same = names
    return same or []


def _has_photos(folder: Path) -> bool:
    endings = photo_extensions()
    return any(
        not entry.name.startswith(".") and entry.name.lower().endswith(endings) and not entry.is_dir()
        for entry in os.scandir(folder)
    )


def _listed(folders: list[Path]) -> str:
    return " and ".join(folder.name for folder in folders[:4]) + (", ..." if len(folders) > 4 else "")
