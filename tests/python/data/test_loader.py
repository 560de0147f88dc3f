"""`cnnrs.data.loader.DataLoader` against torch's DataLoader over torchvision's data sets."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import picture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, ConcatDataset, IterableDataset, RandomSampler, Sampler, Subset, random_split
from torch.utils.data import DataLoader as TorchDataLoader
from torchvision import datasets, transforms

from cnnrs._util.notes import forget_notes
from cnnrs.data.folder import ImageFolder
from cnnrs.data.loader import DataLoader

TUTORIAL = transforms.Compose(
    [
        transforms.Resize((32, 32)),
        transforms.ToTensor(),
        transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ]
)
Check = Callable[..., None]
pytestmark = pytest.mark.filterwarnings("ignore:cnnrs.DataLoader.* in Python")


def epochs(make: Any, dataset: Any, count: int = 2, **kwargs: Any) -> tuple[list[Any], torch.Tensor]:
    torch.manual_seed(7)
    loader = make(dataset, **kwargs)
    return [batch for _ in range(count) for batch in loader], torch.get_rng_state()


@pytest.mark.parametrize("num_workers", [0, 1, 2, 7, None])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_are_torchs(folder: Path, assert_equal: Check, shuffle: bool, num_workers: int | None) -> None:
    theirs, state = epochs(TorchDataLoader, datasets.ImageFolder(folder, TUTORIAL), batch_size=4, shuffle=shuffle)
    for dataset in (ImageFolder(folder, TUTORIAL), datasets.ImageFolder(folder, TUTORIAL)):
        ours, our_state = epochs(DataLoader, dataset, batch_size=4, shuffle=shuffle, num_workers=num_workers)
        assert_equal(ours, theirs)
        assert torch.equal(state, our_state)


PHOTO = transforms.Compose([transforms.Resize((224, 224)), *TUTORIAL.transforms[1:]])


@pytest.fixture(scope="module")
def photo_epochs(photos: Path) -> dict[str, tuple[list[Any], torch.Tensor]]:
    """What torch and torchvision make of all photos: the slow half of the comparison, once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = {
        split: epochs(TorchDataLoader, datasets.ImageFolder(photos / split, PHOTO), 1, batch_size=32, shuffle=shuffle)
        for split, shuffle in (("train", True), ("valid", False))
    }
    torch.set_num_threads(threads)
    return found


@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_batches_are_torchs_on_photos(
    photos: Path, photo_epochs: dict[str, Any], assert_equal: Check, num_workers: int
) -> None:
    for split, (theirs, state) in photo_epochs.items():
        dataset = ImageFolder(photos / split, PHOTO)
        keywords = {"batch_size": 32, "shuffle": split == "train", "num_workers": num_workers}
        ours, our_state = epochs(DataLoader, dataset, 1, **keywords)
        assert_equal(ours, theirs)
        assert torch.equal(state, our_state)


def test_equal_sizes_need_no_resize(equal_folder: Path, assert_equal: Check) -> None:
    for transform in (
        transforms.ToTensor(),
        transforms.Compose([transforms.Grayscale(), transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]),
    ):
        theirs, _ = epochs(TorchDataLoader, datasets.ImageFolder(equal_folder, transform), batch_size=8)
        ours, _ = epochs(DataLoader, ImageFolder(equal_folder, transform), batch_size=8, num_workers=3)
        assert_equal(ours, theirs)


def test_different_sizes_are_torchs_error_or_your_collation(folder: Path) -> None:
    transform = transforms.ToTensor()
    with pytest.raises(RuntimeError) as theirs:
        list(TorchDataLoader(datasets.ImageFolder(folder, transform), 4))
    for num_workers in (0, 2):
        with pytest.raises(RuntimeError) as ours:
            list(DataLoader(ImageFolder(folder, transform), 4, num_workers=num_workers))
        assert str(ours.value) == str(theirs.value)
    items = [item for batch in DataLoader(ImageFolder(folder, transform), 4, collate_fn=list) for item in batch]
    for (image, target), (expected, number) in zip(items, datasets.ImageFolder(folder, transform), strict=True):
        assert torch.equal(image, expected) and target == number and type(target) is int


class Backwards(Sampler[int]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[Any]:
        # Not all of them ints: numpy numbers and tensors are indices too.
        for i in range(self.size - 1, -1, -1):
            yield (i, np.int64(i), torch.tensor(i))[i % 3]

    def __len__(self) -> int:
        return self.size


KEYWORDS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "drop_last": lambda _: {"batch_size": 4, "drop_last": True, "shuffle": True},
    "batch_size 1": lambda _: {},
    "one batch": lambda _: {"batch_size": 1000},
    "generator": lambda _: {"batch_size": 4, "shuffle": True, "generator": torch.Generator().manual_seed(1)},
    "sampler": lambda data: {"batch_size": 4, "sampler": Backwards(len(data))},
    "sampler with replacement": lambda data: {
        "batch_size": 5,
        "sampler": RandomSampler(data, replacement=True, num_samples=33),
    },
    "list as sampler": lambda _: {"batch_size": 2, "sampler": [3, 1, 1, -2, 0]},
    "batch_sampler": lambda data: {"batch_sampler": BatchSampler(Backwards(len(data)), 6, True)},
    "list as batch_sampler": lambda _: {"batch_sampler": [[0], [5, 4, 3], [2, 2], [1, 0, 8, 9, 10, 11]]},
    "prefetch_factor": lambda _: {"batch_size": 2, "prefetch_factor": 5, "num_workers": 2},
    "no batches": lambda _: {"batch_size": None, "shuffle": True},
    "persistent": lambda _: {"batch_size": 4, "shuffle": True, "persistent_workers": True, "num_workers": 2},
}


@pytest.mark.parametrize("name", KEYWORDS)
@pytest.mark.filterwarnings("ignore:cnnrs.DataLoader uses threads")
def test_keywords_mean_what_they_mean_in_torch(name: str, folder: Path, assert_equal: Check) -> None:
    theirs = datasets.ImageFolder(folder, TUTORIAL)
    ours = ImageFolder(folder, TUTORIAL)
    expected, state = epochs(TorchDataLoader, theirs, **KEYWORDS[name](theirs))
    found, our_state = epochs(DataLoader, ours, **KEYWORDS[name](ours))
    assert torch.equal(state, our_state)
    assert len(DataLoader(ours, **KEYWORDS[name](ours))) == len(TorchDataLoader(theirs, **KEYWORDS[name](theirs)))
    if name != "no batches":
        assert_equal(found, expected)
        return
    assert len(found) == len(expected)
    for (image, target), (other, number) in zip(found, expected, strict=True):
        assert torch.equal(image, other) and target == number and type(target) is type(number)


def test_faults_in_arguments_are_torchs(folder: Path) -> None:
    dataset = ImageFolder(folder, TUTORIAL)
    for keywords in (
        {"batch_size": 0},
        {"batch_size": -1},
        {"num_workers": -1},
        {"shuffle": True, "sampler": [1]},
        {"batch_sampler": [[1]], "batch_size": 3},
        {"num_workers": 0, "prefetch_factor": 2},
        {"num_workers": 0, "persistent_workers": True},
        {"batch_size": None, "drop_last": True},
        {"timeout": -1},
        {"num_workers": 2, "multiprocessing_context": "nonsense"},
    ):
        with pytest.raises(ValueError) as theirs:
            TorchDataLoader(dataset, **keywords)  # type: ignore[arg-type]
        with pytest.raises(ValueError) as ours:
            DataLoader(dataset, **keywords)  # type: ignore[arg-type]
        assert str(ours.value) == str(theirs.value)
    loader = DataLoader(dataset)
    assert isinstance(loader, TorchDataLoader)
    with pytest.raises(ValueError, match="batch_size attribute should not be set"):
        loader.batch_size = 3


def test_what_threads_do_not_need_is_ignored_with_one_note(folder: Path, assert_equal: Check) -> None:
    forget_notes()
    dataset = ImageFolder(folder, TUTORIAL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            loader = DataLoader(dataset, 4, num_workers=64, timeout=3, worker_init_fn=print, in_order=False)
            assert_equal(list(loader), list(TorchDataLoader(dataset, 4)))
    assert [str(warning.message) for warning in caught] == [
        "cnnrs.DataLoader uses threads, not worker processes, and ignores timeout, worker_init_fn, in_order"
    ]
    assert caught[0].filename == __file__
    assert loader.num_workers == 64


def test_subsets(folder: Path, assert_equal: Check) -> None:
    def subset(make: Any) -> Any:
        halves = random_split(make(folder, TUTORIAL), [0.5, 0.5], torch.Generator().manual_seed(2))
        return Subset(halves[1], [9, 0, 3, 3, 7, -1, 1, 2])

    theirs, _ = epochs(TorchDataLoader, subset(datasets.ImageFolder), batch_size=3, shuffle=True)
    for make in (ImageFolder, datasets.ImageFolder):
        assert_equal(epochs(DataLoader, subset(make), batch_size=3, shuffle=True)[0], theirs)


def test_target_transform_runs_in_order(folder: Path, assert_equal: Check) -> None:
    seen: list[int] = []

    def half(target: int) -> float:
        seen.append(target)
        return target / 2

    dataset = ImageFolder(folder, TUTORIAL, target_transform=half)
    ours = list(DataLoader(dataset, 4, num_workers=2))
    assert seen == dataset.targets
    assert_equal(ours, list(TorchDataLoader(dataset, 4)))
    assert ours[0][1].dtype == torch.float64


def test_edits_between_epochs_count(folder: Path, assert_equal: Check) -> None:
    dataset = ImageFolder(folder, TUTORIAL)
    loader = DataLoader(dataset, 4)
    list(loader)
    dataset.transform = transforms.Compose([transforms.Resize((8, 8)), transforms.PILToTensor()])
    dataset.samples = dataset.samples[::-1]
    assert_equal(list(loader), list(TorchDataLoader(dataset, 4)))


class Doubled(ImageFolder):
    def __getitem__(self, index: int) -> Any:
        image, target = super().__getitem__(index)
        return image * 2, target


class Numbers(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


@pytest.mark.parametrize(
    "make",
    [
        lambda root: Doubled(root, TUTORIAL),
        lambda root: ImageFolder(root, TUTORIAL, loader=lambda path: datasets.folder.pil_loader(path).rotate(90)),
        lambda root: ConcatDataset([ImageFolder(root, TUTORIAL), ImageFolder(root, TUTORIAL)]),
        lambda root: [(i, float(i)) for i in range(9)],
        lambda root: Numbers(),
    ],
    ids=["own __getitem__", "own loader", "concatenated", "a list", "iterable"],
)
def test_other_data_sets_are_called(make: Any, folder: Path, assert_equal: Check) -> None:
    forget_notes()
    dataset = make(folder)
    shuffle = None if isinstance(dataset, IterableDataset) else True
    theirs, state = epochs(TorchDataLoader, dataset, batch_size=4, shuffle=shuffle)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours, our_state = epochs(DataLoader, dataset, batch_size=4, shuffle=shuffle, num_workers=2)
    assert torch.equal(state, our_state)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    notes = [str(warning.message) for warning in caught]
    assert len(notes) == (0 if isinstance(dataset, IterableDataset) else 1)
    assert all("calls it sample by sample" in text for text in notes)


@settings(max_examples=20, deadline=None)
@given(
    order=st.lists(st.integers(-26, 25), min_size=1, max_size=30),
    batch_size=st.integers(1, 9),
    drop_last=st.booleans(),
    num_workers=st.integers(0, 4),
)
def test_any_order_and_batch_size(
    folder: Path, assert_equal: Check, order: list[int], batch_size: int, drop_last: bool, num_workers: int
) -> None:
    keywords: dict[str, Any] = {"batch_size": batch_size, "sampler": order, "drop_last": drop_last}
    theirs = list(TorchDataLoader(datasets.ImageFolder(folder, TUTORIAL), **keywords))
    assert_equal(list(DataLoader(ImageFolder(folder, TUTORIAL), num_workers=num_workers, **keywords)), theirs)


AUGMENTED = transforms.Compose(
    [
        transforms.Resize((32, 32)),
        transforms.RandomHorizontalFlip(),
        transforms.RandomRotation(30),
        transforms.RandomVerticalFlip(0.3),
        transforms.ToTensor(),
    ]
)


def test_augmentation_depends_on_the_seed_only(folder: Path, assert_equal: Check) -> None:
    dataset = ImageFolder(folder, AUGMENTED)
    reference, _ = epochs(DataLoader, dataset, batch_size=4, shuffle=True, num_workers=0)
    for num_workers in (1, 2, 8):
        assert_equal(epochs(DataLoader, dataset, batch_size=4, shuffle=True, num_workers=num_workers)[0], reference)
    # Another epoch, another size of the batches: the first draws again, the second does not.
    half = len(reference) // 2
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(reference[:half], reference[half:], strict=True))
    images = torch.cat([batch[0] for batch in reference])
    again, _ = epochs(DataLoader, dataset, batch_size=9, shuffle=True)
    assert torch.equal(torch.cat([batch[0] for batch in again]), images)


@pytest.mark.filterwarnings("ignore:cnnrs.DataLoader uses threads")
def test_augmentation_differs_between_epochs_of_persistent_workers(folder: Path) -> None:
    loader = DataLoader(ImageFolder(folder, AUGMENTED), 26, num_workers=2, persistent_workers=True)
    (first,), (second,) = list(loader), list(loader)
    assert not torch.equal(first[0], second[0])


def test_operations_on_both_sides_of_a_python_step_draw_independently(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    for i in range(200):
        picture(6, 7, i).save(tmp_path / "class" / f"{i}.png")
    flip = transforms.RandomHorizontalFlip()
    transform = transforms.Compose([flip, transforms.Lambda(lambda image: image), flip, transforms.ToTensor()])
    plain = datasets.ImageFolder(tmp_path, transforms.ToTensor())
    torch.manual_seed(0)
    found = torch.cat([x for x, _ in DataLoader(ImageFolder(tmp_path, transform), 50)])
    flipped = sum(not torch.equal(image, plain[i][0]) for i, image in enumerate(found))
    # Two independent fair flips cancel half the time: Binomial(200, 0.5), deviation 7; equal draws would give 0.
    assert 65 <= flipped <= 135


def test_a_folder_is_no_data_set(tmp_path: Path) -> None:
    for folder in ("cat_and_dog", tmp_path):
        with pytest.raises(TypeError, match=r"must be a data set, got a path: cnnrs\.ImageFolder\('.*', transform\)"):
            DataLoader(folder)
