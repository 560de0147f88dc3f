"""`cnnrs.data.folder.ImageFolder` against torchvision's."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import datasets, transforms

from cnnrs.data.folder import ImageFolder, ImageList, make_dataset
from cnnrs.data.loader import DataLoader


def both(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    return ImageFolder(*args, **kwargs), datasets.ImageFolder(*args, **kwargs)


def both_raise(*args: Any, **kwargs: Any) -> None:
    with pytest.raises(Exception) as theirs:
        datasets.ImageFolder(*args, **kwargs)
    with pytest.raises(Exception) as ours:
        ImageFolder(*args, **kwargs)
    assert type(ours.value) is type(theirs.value)
    assert str(ours.value) == str(theirs.value)


def same(ours: Any, theirs: Any) -> None:
    for name in ("root", "classes", "class_to_idx", "samples", "targets", "imgs", "extensions", "loader", "transform"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert repr(ours.transforms) == repr(theirs.transforms)
    assert len(ours) == len(theirs)
    assert repr(ours) == repr(theirs)


def test_attributes_are_torchvisions(folder: Path) -> None:
    same(*both(str(folder)))
    same(*both(folder))
    same(*both(str(folder) + "/"))
    same(*both(str(folder), transforms.ToTensor(), target_transform=os.path.basename))


def test_attributes_are_torchvisions_on_photos(photos: Path) -> None:
    same(*both(str(photos / "train"), transform=transforms.ToTensor()))


def test_a_relative_root_stays_relative(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    same(*both(folder.name))
    monkeypatch.setenv("HOME", str(folder.parent))
    same(*both(f"~/{folder.name}"))


def test_items_are_torchvisions(folder: Path) -> None:
    ours, theirs = both(str(folder))
    for (a, i), (b, j) in zip(ours, theirs, strict=True):
        assert i == j
        assert a.mode == b.mode == "RGB"
        assert a.tobytes() == b.tobytes()
    ours, theirs = both(str(folder), transforms.ToTensor(), lambda target: target * 10)
    assert torch.equal(ours[-1][0], theirs[-1][0])
    assert ours[5][1] == theirs[5][1]
    with pytest.raises(IndexError):
        ours[len(ours)]


def test_loader_and_is_valid_file(folder: Path) -> None:
    same(*both(str(folder), loader=os.path.basename, is_valid_file=lambda path: path.endswith("0.png")))
    ours = ImageFolder(str(folder), loader=os.path.basename)
    assert ours[0][0] == os.path.basename(ours.samples[0][0])


def test_classes_may_be_chosen(folder: Path) -> None:
    def choose(self: Any, directory: str) -> tuple[list[str], dict[str, int]]:
        return ["cat", "ant"], {"cat": 5, "ant": 2}

    ours = type("Chosen", (ImageFolder,), {"find_classes": choose})(str(folder))
    theirs = type("Chosen", (datasets.ImageFolder,), {"find_classes": choose})(str(folder))
    same(ours, theirs)


def test_names_sort_as_python_strings(tmp_path: Path) -> None:
    image = picture(8, 8, 0)
    names = ["b.JPG", "a.png", "é.jpg", "Z.jpeg", "🐱.png", "\ue000.png", "a b.png", ".hidden.png", "notes.txt", "jpg"]
    for name in [*names, "sub/z.png", "sub-1/y.png", "sub/deep/x.png", "sub.png/w.png"]:
        path = tmp_path / "class" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, format="PNG")
    # Not UTF-8: Python knows this name with lone surrogates, which sort between U+D7FF and U+E000.
    (tmp_path / "class" / os.fsdecode(b"\xff\xfe.png")).write_bytes((tmp_path / "class" / "a.png").read_bytes())
    (tmp_path / "class" / "to_sub").symlink_to(tmp_path / "class" / "sub")
    (tmp_path / "class" / "broken.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "linked_class").symlink_to(tmp_path / "class")
    (tmp_path / "a_file_beside_the_classes.png").write_bytes(b"")
    ours, theirs = both(str(tmp_path))
    same(ours, theirs)
    assert len(ours) == 2 * 16


@settings(max_examples=25, deadline=None)
@given(st.sets(st.binary(min_size=1, max_size=5).filter(lambda b: not set(b) & set(b"/\0")), max_size=12))
def test_any_names(tmp_path_factory: pytest.TempPathFactory, names: set[bytes]) -> None:
    root = tmp_path_factory.mktemp("names")
    (root / "class").mkdir()
    for name in names:
        (root / "class" / os.fsdecode(name + b".png")).write_bytes(b"")
    same(*both(str(root), allow_empty=True))


def test_faults_are_torchvisions(tmp_path: Path, folder: Path) -> None:
    both_raise(str(tmp_path / "missing"))
    both_raise(str(folder / "ant" / "1.jpg"))
    both_raise(str(tmp_path))
    for name in ("dogs", "birds", "apes"):
        (tmp_path / name).mkdir()
    (tmp_path / "dogs" / "rex.txt").write_text("a dog")
    both_raise(str(tmp_path))
    both_raise(str(tmp_path), is_valid_file=lambda path: path.endswith(".gif"))
    same(*both(str(tmp_path), allow_empty=True))
    with pytest.raises(ValueError, match="class_to_index"):
        make_dataset(tmp_path, {}, extensions=".png")
    with pytest.raises(ValueError, match="Both extensions and is_valid_file"):
        make_dataset(tmp_path)


def test_pickles(folder: Path) -> None:
    ours = ImageFolder(str(folder), transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()]))
    again = pickle.loads(pickle.dumps(ours))
    for name in ("root", "classes", "class_to_idx", "samples", "targets", "imgs", "loader"):
        assert getattr(again, name) == getattr(ours, name), name
    assert repr(again) == repr(ours)
    assert torch.equal(again[3][0], ours[3][0])


def test_split_is_stratified_and_complete(folder: Path) -> None:
    whole = ImageFolder(str(folder), transforms.ToTensor())
    small = transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()])
    first, second = whole.split(0.25, seed=3, transforms=(None, small))
    assert sorted(first.samples + second.samples) == sorted(whole.samples)
    assert first.samples == [sample for sample in whole.samples if sample in set(first.samples)]
    for number in range(3):
        assert second.targets.count(number) == round(0.25 * whole.targets.count(number))
    assert first.imgs is first.samples
    assert first.transform is None and first.transforms is None
    assert second[0][0].shape == (3, 8, 8)
    assert "Resize" in repr(second) and "Resize" not in repr(first)
    assert whole.split(0.25, seed=3)[1].samples == second.samples
    assert whole.split(0.25, seed=4)[1].samples != second.samples
    assert whole.split(0.25)[0].transform is whole.transform
    # Never all, never none of a class that has two samples.
    assert set(whole.split(0.001)[1].targets) == set(whole.split(0.999)[0].targets) == {0, 1, 2}
    for fraction in (0, 1, -0.5, float("nan")):
        with pytest.raises(ValueError, match="fraction"):
            whole.split(fraction)


def test_torchvision_is_not_imported_before_it_is_needed() -> None:
    code = (
        "import sys, cnnrs.data.folder, cnnrs.data.mnist, cnnrs.data.loader; "
        "print(any('torchvision' in name for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_scans_from_several_python_threads(folder: Path) -> None:
    expected = datasets.ImageFolder(str(folder)).samples
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(ImageFolder(str(folder)).samples)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


# -- beyond torchvision ------------------------------------------------------------------------------------------------


def tree(root: Path, *names: str) -> None:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(8, 9, i).save(root / name)


def relative(dataset: Any, root: Path) -> list[tuple[str, int]]:
    return [(os.path.relpath(path, root), label) for path, label in dataset.samples]


def test_links_that_lead_back_are_not_followed(tmp_path: Path) -> None:
    # torchvision lists a.png 41 times with one such link, and does not come to an end with two.
    tree(tmp_path, "class/a.png", "class/deep/b.png", "other/c.png")
    for link in ("class/loop", "class/again", "class/deep/up"):
        (tmp_path / link).symlink_to(tmp_path / "class")
    (tmp_path / "class" / "beside").symlink_to(tmp_path / "other")
    with pytest.warns(UserWarning, match=r"and 2 more: a link to a folder that it lies in, not followed"):
        dataset = ImageFolder(tmp_path)
    expected = [("class/a.png", 0), ("class/beside/c.png", 0), ("class/deep/b.png", 0), ("other/c.png", 1)]
    assert relative(dataset, tmp_path) == expected


def test_hidden_folders_are_warned_about_or_skipped(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    tree(tmp_path, "cat/a.png", "cat/._a.png", "dog/b.png", "dog/.thumbs/c.png", ".ipynb_checkpoints/d.png")
    same(*both(str(tmp_path)))
    (note,) = [str(warning.message) for warning in recwarn]
    assert ".ipynb_checkpoints" in note and "skip_hidden=True" in note
    recwarn.clear()
    dataset = ImageFolder(tmp_path, skip_hidden=True)
    assert relative(dataset, tmp_path) == [("cat/a.png", 0), ("dog/b.png", 1)]
    assert dataset.classes == ["cat", "dog"] and not recwarn.list


def test_some_classes_in_an_order(tmp_path: Path) -> None:
    tree(tmp_path, "cat/a.png", "dog/b.png", "emu/c.png")
    dataset = ImageFolder(tmp_path, classes=["emu", "cat"])
    assert dataset.classes == ["emu", "cat"] and dataset.class_to_idx == {"emu": 0, "cat": 1}
    assert relative(dataset, tmp_path) == [("cat/a.png", 1), ("emu/c.png", 0)]
    with pytest.raises(FileNotFoundError, match=r"no class folder cow; it has cat, dog, emu"):
        ImageFolder(tmp_path, classes=["cat", "cow"])
    for wrong in ([], "cat", ["cat", "cat"]):
        with pytest.raises(ValueError, match="classes must be"):
            ImageFolder(tmp_path, classes=wrong)


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    tree(tmp_path, "b.PNG", "a.png", "deep/c.jpg", ".d.png")
    (tmp_path / "notes.txt").write_text("")
    images = ImageFolder.flat(tmp_path, transforms.ToTensor())
    assert relative(images, tmp_path) == [(".d.png", -1), ("a.png", -1), ("b.PNG", -1), ("deep/c.jpg", -1)]
    assert len(ImageFolder.flat(str(tmp_path), skip_hidden=True)) == 3
    assert len(ImageFolder.flat(tmp_path, is_valid_file=lambda path: path.endswith("txt"))) == 1
    assert images[1][1] == -1 and images[1][0].shape == (3, 8, 9) and images.classes == []
    assert f"Root location: {tmp_path}" in repr(images)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ImageFolder.flat(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="Found no valid file"):
        ImageFolder.flat(tmp_path / "empty")


def test_a_list_of_paths_and_labels(tmp_path: Path) -> None:
    tree(tmp_path, "a.png", "b.png", "c.png")
    a, b, c = (tmp_path / f"{name}.png" for name in "abc")
    names = ImageList([(a, "dog"), (str(b), "cat"), (c, "dog")], transforms.ToTensor())
    assert names.classes == ["cat", "dog"] and names.targets == [1, 0, 1]
    assert ImageList([(a, 7), (b, 3)]).targets == [7, 3] and ImageList([a, b]).targets == [-1, -1]
    images, labels = next(iter(DataLoader(names, 3)))
    assert torch.equal(images, torch.stack([names[i][0] for i in range(3)])) and labels.tolist() == [1, 0, 1]
    first, second = ImageList([(f"{i}.png", i // 4) for i in range(8)]).split(0.5)
    assert first.targets == second.targets == [0, 0, 1, 1]
    assert pickle.loads(pickle.dumps(names)).samples == names.samples
    assert repr(names).startswith("Dataset ImageList\n    Number of datapoints: 3")
    for wrong in ([3], [(a, 1, 2)], [(a, "cat"), (b, 1)], [(a, 1.5)]):
        with pytest.raises(TypeError):
            ImageList(wrong)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:cnnrs.DataLoader skips files")
def test_names_that_are_not_utf8_load(tmp_path: Path) -> None:
    tree(tmp_path, "cl/a.png", "cl/é🐱.png")
    strange = os.fsencode(tmp_path / "cl") + b"/\xff\xfe.png"
    os.link(os.fsencode(tmp_path / "cl" / "a.png"), strange)
    ours, theirs = both(str(tmp_path), transforms.ToTensor())
    same(ours, theirs)
    assert os.fsdecode(strange) in [path for path, _ in ours.samples]
    images, _ = next(iter(DataLoader(ours, 3)))
    assert torch.equal(images, torch.stack([image for image, _ in theirs]))
    os.remove(strange)
    skipping = DataLoader(ours, 3, on_error="skip")
    assert [len(images) for images, _ in skipping] == [2]
    assert skipping.errors[0][0] == os.fsdecode(strange)
