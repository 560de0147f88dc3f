"""`on_error`, `truncated`, limits: what a `DataLoader` makes of files that fail."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps
from torch.utils.data import BatchSampler, ConcatDataset, Sampler, Subset
from torch.utils.data import DataLoader as TorchDataLoader
from torchvision import datasets, transforms

from cnnrs._util.notes import forget_notes
from cnnrs.data.bad_files import CEILING, Faults
from cnnrs.data.folder import ImageFolder, ImageList
from cnnrs.data.loader import DataLoader
from cnnrs.errors import CnnrsError, DecodeError

RESIZE = transforms.Compose([transforms.Resize((12, 12)), transforms.ToTensor()])
pytestmark = [
    pytest.mark.filterwarnings("ignore:cnnrs.DataLoader skips files"),
    pytest.mark.filterwarnings("ignore:cnnrs.DataLoader.* in Python"),
]


def make(root: Path, count: int, bad: set[int]) -> ImageFolder:
    """`count` small images in one class; those in `bad` are text files."""
    (root / "class").mkdir(exist_ok=True)
    for i in range(count):
        path = root / "class" / f"{i:03}.png"
        if i in bad:
            path.write_text(f"file {i} is no image")
        else:
            picture(13, 14 + i % 3, i).save(path)
    return ImageFolder(root, RESIZE)


def epoch(loader: DataLoader) -> list[torch.Tensor]:
    return [images for images, _ in loader]


def rows(dataset: ImageFolder, indices: list[int]) -> torch.Tensor:
    return torch.stack([dataset[i][0] for i in indices])


@settings(max_examples=40, deadline=None)
@given(
    bad=st.sets(st.integers(0, 19), max_size=12),
    batch_size=st.integers(1, 7),
    drop_last=st.booleans(),
    num_workers=st.integers(0, 3),
    shuffle=st.booleans(),
)
def test_batches_are_the_good_samples_in_order(
    tmp_path_factory: pytest.TempPathFactory,
    bad: set[int],
    batch_size: int,
    drop_last: bool,
    num_workers: int,
    shuffle: bool,
) -> None:
    dataset = make(tmp_path_factory.mktemp("skip"), 20, bad)
    torch.manual_seed(5)
    order = list(TorchDataLoader(range(20), None, shuffle=shuffle))  # type: ignore[arg-type]
    good = [i for i in order if i not in bad]
    whole = len(good) // batch_size * batch_size if drop_last else len(good)
    expected = [rows(dataset, good[i : i + batch_size]) for i in range(0, whole, batch_size)]
    loader = DataLoader(
        dataset, batch_size, shuffle=shuffle, drop_last=drop_last, num_workers=num_workers, on_error="skip"
    )
    # The second time the bad files are known and not read again.
    for _ in range(2):
        torch.manual_seed(5)
        found = epoch(loader)
        assert len(found) == len(expected)
        assert all(map(torch.equal, found, expected))
        # Those behind the last batch may not have been met.
        assert {path for path, _ in loader.errors} <= {dataset.samples[i][0] for i in bad}
        if not drop_last:
            assert len(loader.errors) == len(bad)


def test_errors_name_path_and_reason_once(tmp_path: Path) -> None:
    dataset = make(tmp_path, 9, {2, 7})
    os.remove(dataset.samples[4][0])
    loader = DataLoader(dataset, 3, num_workers=2, on_error="skip")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert [len(images) for images in epoch(loader)] == [3, 3]
    assert [os.path.basename(path) for path, _ in loader.errors] == ["002.png", "004.png", "007.png"]
    reasons = [reason for _, reason in loader.errors]
    assert "file 2 is no" in reasons[0] and "No such file" in reasons[1]
    (note,) = [str(warning.message) for warning in caught]
    assert "skips files" in note and "002.png" in note and caught[0].filename == __file__
    again = pickle.loads(pickle.dumps(loader))
    assert again.errors == loader.errors and again.on_error == "skip"
    # Mended, and tried again when asked to.
    picture(13, 14, 4).save(dataset.samples[4][0])
    loader.errors.clear()
    assert sum(len(images) for images in epoch(loader)) == 7
    assert len(loader.errors) == 2


def test_labels_augmentation_and_python_steps_stay_with_their_samples(tmp_path: Path) -> None:
    dataset = make(tmp_path, 24, {1, 2, 9, 23})
    dataset.samples = [(path, i) for i, (path, _) in enumerate(dataset.samples)]
    seen: list[int] = []

    class Step:
        def __call__(self, image: Any) -> Any:
            seen.append(1)
            return image

    flip = transforms.RandomHorizontalFlip()
    for steps in ([], [Step()], [Step(), flip]):
        dataset.transform = transforms.Compose([transforms.Resize((9, 9)), flip, *steps, transforms.ToTensor()])
        found = {}
        for num_workers in (0, 3):
            torch.manual_seed(2)
            loader = DataLoader(dataset, 5, shuffle=True, num_workers=num_workers, on_error="skip")
            batches = list(loader)
            assert [len(labels) for _, labels in batches] == [5, 5, 5, 5]
            found[num_workers] = batches
        for (a, i), (b, j) in zip(found[0], found[3], strict=True):
            assert torch.equal(a, b) and torch.equal(i, j)
        images, labels = (torch.cat(parts) for parts in zip(*found[0], strict=True))
        assert sorted(labels.tolist()) == [i for i in range(24) if i not in {1, 2, 9, 23}]
        for image, label in zip(images, labels.tolist(), strict=True):
            plain = transforms.Compose([transforms.Resize((9, 9)), transforms.ToTensor()])(
                Image.open(dataset.samples[label][0])
            )
            assert torch.equal(image, plain) or torch.equal(image, plain.flip(-1))
    assert len(seen) == 2 * 2 * 20


def test_lists_of_a_batch_sampler_keep_their_lengths(tmp_path: Path) -> None:
    dataset = make(tmp_path, 12, {0, 4})

    class Growing(Sampler[list[int]]):
        def __iter__(self) -> Iterator[list[int]]:
            yield from ([0, 1], [2, 3, 4], [5], [6, 7, 8, 9, 10, 11])

    loader = DataLoader(dataset, batch_sampler=Growing(), num_workers=2, on_error="skip")
    expected = [rows(dataset, indices) for indices in ([1, 2], [3, 5, 6])]
    expected += [rows(dataset, [7]), rows(dataset, [8, 9, 10, 11])]
    found = epoch(loader)
    assert [len(images) for images in found] == [len(images) for images in expected]
    assert all(map(torch.equal, found, expected))


def test_subsets_and_batches_of_none(tmp_path: Path) -> None:
    dataset = make(tmp_path, 8, {3})
    part = Subset(dataset, [7, 3, 3, 1])
    assert torch.equal(torch.cat(epoch(DataLoader(part, 2, on_error="skip"))), rows(dataset, [7, 1]))
    singles = epoch(DataLoader(part, None, on_error="skip"))
    assert torch.equal(torch.stack(singles), rows(dataset, [7, 1]))


def test_different_sizes_are_still_torchs_error(tmp_path: Path) -> None:
    dataset = make(tmp_path, 8, {3})
    dataset.transform = transforms.ToTensor()
    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        epoch(DataLoader(dataset, 4, on_error="skip"))
    found = [one for batch in DataLoader(dataset, 4, on_error="skip", collate_fn=list) for one in batch]
    assert len(found) == 7
    assert all(torch.equal(a, dataset[i][0]) for (a, _), i in zip(found, (0, 1, 2, 4, 5, 6, 7), strict=True))


def test_when_every_file_fails_there_is_an_end(tmp_path: Path) -> None:
    few = make(tmp_path / "few" if (tmp_path / "few").mkdir() is None else tmp_path, 5, set(range(5)))
    loader = DataLoader(few, 2, num_workers=2, on_error="skip")
    for _ in range(2):
        with pytest.raises(DecodeError, match=r"all 5 files failed.*file 0 is no"):
            list(loader)
    (tmp_path / "many").mkdir()
    many = make(tmp_path / "many", CEILING + 40, set(range(CEILING + 40)))
    loader = DataLoader(many, 8, num_workers=2, on_error="skip")
    with pytest.raises(DecodeError, match=f"the first {CEILING} files failed.*right folder"):
        list(loader)
    assert len(loader.errors) == CEILING


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_file_that_may_not_be_read_or_is_a_folder_now(tmp_path: Path, num_workers: int) -> None:
    dataset = make(tmp_path, 6, set())
    gone = dataset.samples[1][0]
    os.remove(gone)
    os.mkdir(gone)
    with pytest.raises(IsADirectoryError, match=r"001\.png"):
        epoch(DataLoader(dataset, 2, num_workers=num_workers))
    loader = DataLoader(dataset, 2, num_workers=num_workers, on_error="skip")
    assert torch.equal(torch.cat(epoch(loader)), rows(dataset, [0, 2, 3, 4, 5]))
    # Root may read everything, so a process that is not root is asked.
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        return
    os.chmod(tmp_path, 0o755)
    for folder in tmp_path.parents:
        if not folder.stat().st_mode & 0o001:
            return
    os.chmod(dataset.samples[2][0], 0)
    code = """
        import sys
        from torchvision import transforms
        from cnnrs import DataLoader, ImageFolder
        dataset = ImageFolder(sys.argv[1], transforms.Compose([transforms.Resize((4, 4)), transforms.ToTensor()]))
        loader = DataLoader(dataset, 2, on_error="skip")
        print([len(images) for images, _ in loader], loader.errors)
        try:
            list(DataLoader(dataset, 2))
        except PermissionError as error:
            print(error.filename)
    """
    command = ["setpriv", "--reuid=65534", "--clear-groups", sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if "Permission denied" in done.stderr and "python" in done.stderr:
        pytest.skip("another user cannot start this Python")
    assert done.returncode == 0, done.stderr
    assert "Permission denied" in done.stdout and done.stdout.splitlines()[-1] == dataset.samples[2][0]


def test_what_is_not_the_files_fault_is_raised() -> None:
    faults = Faults()
    faults.begin(10)
    assert faults.record("a", DecodeError("a cannot be decoded"))
    assert faults.record("b", CnnrsError("internal error: a panic"))
    assert faults.record("c", PermissionError(errno.EACCES, "Permission denied", "c"))
    assert not faults.record("d", OSError(errno.EMFILE, "Too many open files", "d"))
    assert not faults.record("e", ValueError("the crop is larger than the image"))
    assert not faults.record("f", MemoryError())
    assert [path for path, _ in faults.errors] == ["a", "b", "c"]


@pytest.mark.parametrize("limits", [{}, {"max_pixels": 1000}], ids=str)
@pytest.mark.parametrize("error", [OSError(errno.EMFILE, "Too many open files"), MemoryError()], ids=repr)
def test_what_keeps_pillow_from_reading_is_not_the_files_fault(
    error: Exception, limits: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make(tmp_path, 3, set())
    # A kind that only Pillow reads.
    picture(13, 14, 1).save(dataset.samples[1][0], format="TIFF", compression="jpeg")

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    loader = DataLoader(dataset, 3, on_error="skip", **limits)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", fail)
        with pytest.raises(type(error)) as raised:
            next(iter(loader))
    assert raised.value is error and loader.errors == []
    assert torch.equal(torch.cat(epoch(loader)), rows(dataset, [0, 1, 2])) and loader.errors == []


def test_a_file_that_changes_between_scan_and_read(tmp_path: Path) -> None:
    dataset = make(tmp_path, 4, set())
    picture(30, 31, 99).save(dataset.samples[2][0])
    assert torch.equal(torch.cat(epoch(DataLoader(dataset, 2, num_workers=2))), rows(dataset, [0, 1, 2, 3]))


# -- truncated files and limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP"])
def test_truncated_files_are_read_as_pillow_reads_them(tmp_path: Path, kind: str) -> None:
    (tmp_path / "class").mkdir()
    path = tmp_path / "class" / "a.jpg"
    picture(60, 70, 3).save(path, format=kind)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 5])
    dataset = ImageFolder(tmp_path, RESIZE)
    with pytest.raises(DecodeError, match=r"a\.jpg"):
        epoch(DataLoader(dataset))
    (found,) = epoch(DataLoader(dataset, truncated="accept"))
    assert not ImageFile.LOAD_TRUNCATED_IMAGES  # type: ignore[attr-defined]
    ImageFile.LOAD_TRUNCATED_IMAGES = True  # type: ignore[attr-defined]
    try:
        expected = datasets.ImageFolder(tmp_path, RESIZE)[0][0]
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False  # type: ignore[attr-defined]
    assert torch.equal(found[0], expected)


def test_photos_are_turned_upright_when_asked_to(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    exif = Image.Exif()
    for i, kind in enumerate(("JPEG", "PNG", "JPEG2000")):
        exif[0x0112] = 6 + i % 2
        picture(20, 30, i).save(tmp_path / "class" / f"{i}.jpg", format=kind, exif=exif)
    to_tensor = transforms.ToTensor()
    dataset = ImageFolder(tmp_path, to_tensor)
    forget_notes()
    for upright in (False, True):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for cache in (None, "ram"):
                loader = DataLoader(dataset, 1, exif=upright, cache=cache)
                for _ in range(2):
                    for (image, _), (path, _) in zip(loader, dataset.samples, strict=True):
                        with Image.open(path) as opened:
                            expected = ImageOps.exif_transpose(opened) if upright else opened
                            assert torch.equal(image[0], to_tensor(expected.convert("RGB")))
        notes = [str(warning.message) for warning in caught]
        assert len(notes) == (0 if upright else 1)
        assert upright or "exif=True" in notes[0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG2000"])
def test_limits_hold_for_pillow_too(tmp_path: Path, kind: str) -> None:
    (tmp_path / "class").mkdir()
    path = tmp_path / "class" / "a.png"
    picture(20, 30, 0).save(path, format=kind)
    dataset = ImageFolder(tmp_path, RESIZE)
    size = path.stat().st_size
    assert len(epoch(DataLoader(dataset, max_pixels=600, max_bytes=size))) == 1
    for keywords in ({"max_pixels": 599}, {"max_bytes": size - 1}):
        with pytest.raises(DecodeError, match=r"a\.png"):
            epoch(DataLoader(dataset, **keywords))  # type: ignore[arg-type]


def test_arguments_that_make_no_sense(tmp_path: Path) -> None:
    dataset = make(tmp_path, 2, set())
    for keywords, text in (
        ({"on_error": "ignore"}, "on_error must be 'raise' or 'skip', got 'ignore'"),
        ({"truncated": True}, "truncated must be"),
        ({"max_pixels": 0}, "max_pixels must be positive"),
        ({"max_bytes": -1}, "max_bytes must be positive"),
        ({"cache_bytes": 5}, "cache_bytes limits a cache"),
        ({"cache": "ram", "cache_bytes": 0}, "cache_bytes must be a positive number"),
        ({"rank": 0}, "rank and world_size belong together"),
    ):
        with pytest.raises(ValueError, match=text):
            DataLoader(dataset, **keywords)  # type: ignore[arg-type]
    called: Any = ConcatDataset([dataset, dataset])
    with pytest.raises(ValueError, match=r"skip.*ConcatDataset"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        iter(DataLoader(called, on_error="skip"))


def test_a_sampler_that_fails_in_the_middle(tmp_path: Path) -> None:
    dataset = make(tmp_path, 8, {1})

    class Failing(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            yield from range(5)
            raise ZeroDivisionError("the sampler's own")

    iterator = iter(DataLoader(dataset, 2, sampler=Failing(), num_workers=2, on_error="skip"))
    assert torch.equal(next(iterator)[0], rows(dataset, [0, 2]))
    with pytest.raises(ZeroDivisionError, match="own"):
        next(iterator), next(iterator)
    drawn = DataLoader(dataset, batch_sampler=BatchSampler(range(8), 3, False), on_error="skip")
    assert [len(images) for images in epoch(drawn)] == [3, 3, 1]
    bad_index = iter(DataLoader(dataset, 2, sampler=[0, 99, 2], on_error="skip"))
    with pytest.raises(IndexError):
        next(bad_index)


def test_image_lists_are_skipped_too(tmp_path: Path) -> None:
    dataset = make(tmp_path, 4, {0})
    images = ImageList([path for path, _ in dataset.samples], RESIZE)
    assert torch.equal(torch.cat(epoch(DataLoader(images, 2, on_error="skip"))), rows(dataset, [1, 2, 3]))
