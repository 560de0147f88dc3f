"""`cnnrs.loader.DataLoader` against torch's DataLoader over torchvision's data sets."""

from __future__ import annotations

import gc
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
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

from cnnrs import loader as module
from cnnrs.errors import DecodeError
from cnnrs.folder import ImageFolder
from cnnrs.loader import DataLoader

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
    module._noted.clear()
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
    module._noted.clear()
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


# -- buffers -----------------------------------------------------------------------------------------------------------


def test_a_held_batch_is_never_overwritten(folder: Path) -> None:
    loader = DataLoader(ImageFolder(folder, TUTORIAL), 4, num_workers=2)
    held = [batch[0] for _ in range(4) for batch in loader]
    copies = [images.clone() for images in held]
    for _ in range(4):
        for images, _ in loader:
            images.fill_(-1)
    assert all(torch.equal(a, b) for a, b in zip(held, copies, strict=True))
    assert len({images.data_ptr() for images in held}) == len(held)


def test_buffers_are_used_again_and_aligned(folder: Path) -> None:
    loader = DataLoader(ImageFolder(folder, TUTORIAL), 4, num_workers=2, drop_last=True)

    def addresses() -> list[int]:
        return [images.data_ptr() for images, _ in loader]

    first, second = addresses(), addresses()
    assert set(first) & set(second), "the second epoch uses buffers of the first"
    # Alive at once: prefetch_factor + 1 in flight and the consumer's; one more when a buffer came back a moment late.
    assert len(set(first + second)) <= 5 < len(first)
    assert all(address % 64 == 0 for address in first + second)


def test_a_view_keeps_the_buffer(folder: Path) -> None:
    loader = DataLoader(ImageFolder(folder, TUTORIAL), 4, num_workers=2)
    images, _ = next(iter(loader))
    row, expected = images[1], images[1].clone()
    array = images[2].numpy()
    kept = array.copy()
    del images
    gc.collect()
    for _ in range(3):
        for batch, _ in loader:
            batch.fill_(7)
    assert torch.equal(row, expected)
    assert np.array_equal(array, kept)


def test_a_tensor_may_outlive_everything_and_die_on_any_thread(folder: Path) -> None:
    loader: Any = DataLoader(ImageFolder(folder, TUTORIAL), 4, num_workers=2)
    held = [images for images, _ in loader]
    total = sum(float(images.sum()) for images in held)
    del loader
    gc.collect()
    assert sum(float(images.sum()) for images in held) == total
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()


def test_batches_are_writable_and_pinning_is_torchs(folder: Path, recwarn: pytest.WarningsRecorder) -> None:
    images, labels = next(iter(DataLoader(ImageFolder(folder, TUTORIAL), 4, pin_memory=True)))
    images.mul_(2)
    assert images.is_pinned() == labels.is_pinned() == torch.cuda.is_available()


# -- random augmentation -----------------------------------------------------------------------------------------------

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


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    root = tmp_path / "broken"
    shutil.copytree(folder, root)
    (root / "bee" / "text.jpg").write_text("hello world, this is not an image")
    return root


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_corrupt_file_is_named_at_its_batch(broken: Path, num_workers: int) -> None:
    dataset = ImageFolder(broken, TUTORIAL)
    bad = next(i for i, (path, _) in enumerate(dataset.samples) if path.endswith("text.jpg"))
    loader = DataLoader(dataset, 4, num_workers=num_workers)
    for _ in range(2):
        batches, faults = [], []
        iterator = iter(loader)
        for i in range(len(loader)):
            try:
                batches.append(next(iterator))
            except DecodeError as error:
                faults.append(i)
                assert "text.jpg" in str(error) and "hello w" in str(error)
                assert isinstance(error, OSError)
        assert faults == [bad // 4]
        with pytest.raises(StopIteration):
            next(iterator)
        expected = [batch for i, batch in enumerate(_chunks(dataset, 4)) if i != bad // 4]
        for (images, labels), (other, numbers) in zip(batches, expected, strict=True):
            assert torch.equal(images, other) and torch.equal(labels, numbers)


def _chunks(dataset: ImageFolder, size: int) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None]]:
    for start in range(0, len(dataset), size):
        indices = range(start, min(start + size, len(dataset)))
        if any(dataset.samples[i][0].endswith("text.jpg") for i in indices):
            yield None, None
            continue
        items = [dataset[i] for i in indices]
        yield torch.stack([image for image, _ in items]), torch.tensor([target for _, target in items])


@pytest.mark.parametrize("damage", ["cut", "empty", "header only"])
def test_damaged_photos_raise_where_pillow_raises(folder: Path, tmp_path: Path, damage: str) -> None:
    (tmp_path / "class").mkdir()
    whole = (folder / "bee" / "1.jpg").read_bytes()
    data = {"cut": whole[: len(whole) // 2], "empty": b"", "header only": whole[:30]}[damage]
    (tmp_path / "class" / "a.jpg").write_bytes(data)
    with pytest.raises(OSError):
        datasets.ImageFolder(tmp_path, TUTORIAL)[0]
    with pytest.raises(DecodeError, match=r"class/a\.jpg"):
        next(iter(DataLoader(ImageFolder(tmp_path, TUTORIAL))))


def test_a_file_that_vanished(broken: Path) -> None:
    (broken / "bee" / "text.jpg").unlink()
    dataset = ImageFolder(broken, TUTORIAL)
    gone = dataset.samples[5][0]
    os.remove(gone)
    iterator = iter(DataLoader(dataset, 4, num_workers=2))
    next(iterator)
    with pytest.raises(FileNotFoundError) as caught:
        next(iterator)
    assert os.fspath(caught.value.filename) == gone and gone in str(caught.value)
    assert next(iterator)[0].shape == (4, 3, 32, 32)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(broken: Path) -> None:
    dataset = ImageFolder(broken, TUTORIAL)
    os.chmod(dataset.samples[0][0], 0)
    with pytest.raises(PermissionError):
        next(iter(DataLoader(dataset, 4)))


def test_what_pillow_can_open_is_not_an_error(tmp_path: Path, assert_equal: Check) -> None:
    # A format that Rust does not read, behind an extension of an image: Pillow goes by the content, so must we.
    (tmp_path / "class").mkdir()
    for i, kind in enumerate(("JPEG2000", "ICO", "JPEG", "TGA", "PCX", "PNG")):
        picture(40, 32, i).save(tmp_path / "class" / f"{i}.png", format=kind)
    theirs = list(TorchDataLoader(datasets.ImageFolder(tmp_path, TUTORIAL), 4))
    for num_workers in (0, 2):
        assert_equal(list(DataLoader(ImageFolder(tmp_path, TUTORIAL), 4, num_workers=num_workers)), theirs)


def test_a_sampler_that_fails_fails_at_its_batch(folder: Path) -> None:
    class Failing(Backwards):
        def __iter__(self) -> Iterator[int]:
            yield from range(6)
            raise ZeroDivisionError("the sampler's own")

    iterator = iter(DataLoader(ImageFolder(folder, TUTORIAL), 2, sampler=Failing(26), num_workers=2))
    assert [next(iterator)[0].shape[0] for _ in range(3)] == [2, 2, 2]
    with pytest.raises(ZeroDivisionError, match="own"):
        next(iterator)


def test_an_index_out_of_range_fails_at_its_batch(folder: Path) -> None:
    iterator = iter(DataLoader(ImageFolder(folder, TUTORIAL), 2, sampler=[0, 1, 2, 99, 3, 4], num_workers=2))
    next(iterator)
    with pytest.raises(IndexError):
        next(iterator)
    assert next(iterator)[0].shape[0] == 2


def test_exceptions_of_python_steps_are_not_changed(folder: Path) -> None:
    class Mine(Exception):
        pass

    def fail(image: Any) -> Any:
        raise Mine("as it is")

    transform = transforms.Compose([transforms.Resize((8, 8)), fail, transforms.ToTensor()])
    loader = DataLoader(ImageFolder(folder, transform), 4)
    for _ in range(2):
        with pytest.raises(Mine, match="as it is"):
            next(iter(loader))


# -- threads, processes, signals ---------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in /proc")
def test_threads_end_with_the_iterator(folder: Path) -> None:
    # In a process of its own: other tests' iterators may still be on their way out.
    code = """
        import sys, time
        from pathlib import Path
        import torch
        from torchvision import transforms
        from cnnrs.folder import ImageFolder
        from cnnrs.loader import DataLoader

        def name(task):
            try:
                return (task / "comm").read_text()
            except OSError:
                return "gone meanwhile"

        def threads():
            return sum(name(task).startswith("cnnrs-") for task in Path("/proc/self/task").iterdir())

        def settles(expected):
            deadline = time.monotonic() + 10
            while threads() != expected and time.monotonic() < deadline:
                time.sleep(0.01)
            return threads() == expected

        transform = transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()])
        dataset = ImageFolder(sys.argv[1], transform)
        loader = DataLoader(dataset, 2, num_workers=5)
        iterator = iter(loader)
        print(threads(), "before somebody asks")
        next(iterator)
        print(threads(), "at work")
        del iterator
        print(settles(0), "iterator dropped")
        for _ in loader:
            break
        print(settles(0), "loop left")
        iterator = iter(loader)
        list(iterator)
        print(settles(0), "epoch over, iterator kept")
        dataset.samples[3] = ("/nowhere.jpg", 0)
        try:
            list(loader)
        except FileNotFoundError:
            pass
        print(settles(0), "after an error")
    """
    assert run(code, str(folder)).splitlines() == [
        "0 before somebody asks",
        "5 at work",
        "True iterator dropped",
        "True loop left",
        "True epoch over, iterator kept",
        "True after an error",
    ]


def test_two_iterators_at_once(folder: Path, assert_equal: Check) -> None:
    loader = DataLoader(ImageFolder(folder, TUTORIAL), 4, num_workers=2)
    pairs = list(zip(loader, loader, strict=True))
    expected = list(TorchDataLoader(datasets.ImageFolder(folder, TUTORIAL), 4))
    assert_equal([a for a, _ in pairs], expected)
    assert_equal([b for _, b in pairs], expected)


def test_the_loader_pickles(folder: Path, assert_equal: Check) -> None:
    loader = DataLoader(ImageFolder(folder, TUTORIAL), 4, shuffle=True, num_workers=2)
    list(loader)
    again = pickle.loads(pickle.dumps(loader))
    torch.manual_seed(3)
    expected = list(loader)
    torch.manual_seed(3)
    assert_equal(list(again), expected)


def run(code: str, *arguments: str, timeout: float = 120) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_after_a_fork(folder: Path) -> None:
    # An iterator in mid-epoch, a new one, and a loader whose tensors are held: all usable in the child.
    code = """
        import os, sys, warnings
        import torch
        from torchvision import transforms
        from cnnrs.folder import ImageFolder
        from cnnrs.loader import DataLoader
        torch.set_num_threads(1)
        transform = transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()])
        dataset = ImageFolder(sys.argv[1], transform)
        loader = DataLoader(dataset, 4, num_workers=3)
        expected = [images.clone() for images, _ in loader]
        iterator = iter(loader)
        held = next(iterator)[0]
        child = os.fork()
        rest = [images for images, _ in iterator]
        whole = [images for images, _ in loader]
        good = len(rest) == 6 and len(whole) == 7
        good = good and all(map(torch.equal, [held, *rest], expected)) and all(map(torch.equal, whole, expected))
        if child == 0:
            os._exit(0 if good else 1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(good, status)
    """
    assert run(code, str(folder)) == "True 0\n"


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_inside_torchs_worker_processes(folder: Path, tmp_path: Path, context: str) -> None:
    code = """
        import sys
        import torch
        from torch.utils.data import DataLoader as TorchDataLoader, Dataset
        from torchvision import transforms
        from cnnrs.folder import ImageFolder
        from cnnrs.loader import DataLoader

        class Nested(Dataset):
            def __init__(self, root):
                transform = transforms.Compose([transforms.Resize((16, 16)), transforms.ToTensor()])
                self.loader = DataLoader(ImageFolder(root, transform), 26, num_workers=2)
                next(iter(self.loader))
            def __len__(self):
                return 4
            def __getitem__(self, index):
                return next(iter(self.loader))[0]

        if __name__ == "__main__":
            nested = Nested(sys.argv[1])
            for images in TorchDataLoader(nested, 1, num_workers=2, multiprocessing_context=sys.argv[2]):
                assert torch.equal(images[0], nested[0])
            print("done")
    """
    # A file: spawned processes import it, which they cannot do with the text behind -c.
    script = tmp_path / "nested.py"
    script.write_text(textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, str(script), str(folder), context], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_ctrl_c_stops_the_wait_and_leaves_no_thread(tmp_path: Path) -> None:
    # Photos that take seconds per batch; the signal arrives in the middle of one.
    (tmp_path / "class").mkdir()
    picture(1300, 1700, 0).save(tmp_path / "class" / "0.jpg", quality=95)
    for i in range(1, 400):
        os.link(tmp_path / "class" / "0.jpg", tmp_path / "class" / f"{i}.jpg")
    code = """
        import os, signal, sys, threading, time
        from pathlib import Path
        import torch
        from torchvision import transforms
        from cnnrs.folder import ImageFolder
        from cnnrs.loader import DataLoader

        def threads():
            found = 0
            for task in Path("/proc/self/task").iterdir():
                try:
                    found += (task / "comm").read_text().startswith("cnnrs-")
                except OSError:
                    pass
            return found

        transform = transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()])
        dataset = ImageFolder(sys.argv[1], transform)
        for num_workers in (2, 0):
            late = []
            for _ in range(3):
                iterator = iter(DataLoader(dataset, 400, num_workers=num_workers))
                sent = []
                def interrupt():
                    sent.append(time.monotonic())
                    os.kill(os.getpid(), signal.SIGINT)
                threading.Timer(0.3, interrupt).start()
                try:
                    next(iterator)
                except KeyboardInterrupt:
                    late.append(time.monotonic() - sent[0])
                del iterator
                deadline = time.monotonic() + 10
                while threads() and time.monotonic() < deadline:
                    time.sleep(0.002)
            # A slice of the wait (50 ms), or without threads the photo it is at (about 30 ms); a batch takes 5 s. The
            # promise is 100 ms; the best of three, because other programs run as well.
            print(len(late), min(late) < 0.1 or late, threads())
    """
    assert run(code, str(tmp_path)) == "3 True 0\n3 True 0\n"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_stays_flat(folder: Path, tmp_path: Path) -> None:
    code = """
        import sys
        from torchvision import transforms
        from cnnrs.folder import ImageFolder
        from cnnrs.loader import DataLoader

        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096

        transform = transforms.Compose(
            [transforms.Resize((64, 64)), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        )
        dataset = ImageFolder(sys.argv[1], transform)
        # A file that fails leaves nothing behind either.
        open(dataset.samples[4][0], "w").close()
        loaders = [
            DataLoader(dataset, 4, shuffle=True, num_workers=2, on_error="skip"),
            DataLoader(dataset, 4, shuffle=True, num_workers=2, on_error="skip", cache=sys.argv[2]),
            DataLoader(dataset, 4, shuffle=True, num_workers=2, on_error="skip", cache="ram"),
        ]
        after = []
        for i in range(100):
            for loader in loaders:
                for _ in loader:
                    pass
            if i in (9, 99):
                after.append(resident())
        # 300 epochs; a leak of one batch (200 KB) each would be 53 MB.
        print((after[1] - after[0]) >> 20)
    """
    root = tmp_path / "images"
    shutil.copytree(folder, root)
    assert int(run(code, str(root), str(tmp_path / "cache"))) < 8


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_the_peak_is_the_batches_in_flight(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    picture(60, 60, 0).save(tmp_path / "class" / "0.png")
    for i in range(1, 640):
        os.link(tmp_path / "class" / "0.png", tmp_path / "class" / f"{i}.png")
    code = """
        import re, sys
        import torch
        from torchvision import transforms
        from cnnrs.folder import ImageFolder
        from cnnrs.loader import DataLoader

        def peak():
            return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

        dataset = ImageFolder(sys.argv[1], transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor()]))
        list(DataLoader(dataset, 1, sampler=[0]))
        before = peak()
        for images, _ in DataLoader(dataset, 32, num_workers=2, prefetch_factor=2):
            pass
        batch = 32 * 3 * 224 * 224 * 4
        print((peak() - before) / batch)
    """
    # prefetch_factor + 1 in flight and the one that the consumer holds, and the threads' images.
    assert float(run(code, str(tmp_path))) < 2 + 1 + 1 + 1


# -- devices -----------------------------------------------------------------------------------------------------------

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]
FINISHES = {
    "normalize": TUTORIAL,
    "float": transforms.Compose([transforms.Resize((20, 21)), transforms.ToTensor()]),
    "bytes": transforms.Compose([transforms.Resize((20, 21)), transforms.PILToTensor()]),
    "table": transforms.Compose(
        [
            transforms.Resize((20, 21)),
            transforms.ToTensor(),
            transforms.Normalize(0.5, 0.2),
            transforms.Normalize(0.1, 3.0),
        ]
    ),
    "gray": transforms.Compose([transforms.Resize((20, 21)), transforms.Grayscale(), transforms.ToTensor()]),
    "python": transforms.Compose([transforms.Resize((20, 21)), transforms.ToTensor(), lambda image: image * 2]),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FINISHES)
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_numbers_made_on_a_device_have_the_same_bits(folder: Path, device: str, name: str, on_error: str) -> None:
    dataset = ImageFolder(folder, FINISHES[name])
    expected = list(DataLoader(dataset, 4))
    loader = DataLoader(dataset, 4, num_workers=2, device=device, on_error=on_error)
    for _ in range(2):
        found = list(loader)
        assert len(found) == len(expected)
        for (images, labels), (other, numbers) in zip(found, expected, strict=True):
            assert images.device.type == labels.device.type == device
            assert images.dtype == other.dtype
            assert torch.equal(images.cpu(), other) and torch.equal(labels.cpu(), numbers)


@pytest.mark.parametrize("device", DEVICES)
def test_bytes_cross_the_bus(folder: Path, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cnnrs.device import Mover

    crossed = []
    copy = Mover._copy

    def watch(self: Mover, tensor: torch.Tensor, sources: list[torch.Tensor]) -> torch.Tensor:
        crossed.append(tensor.dtype)
        return copy(self, tensor, sources)

    monkeypatch.setattr(Mover, "_copy", watch)
    list(DataLoader(ImageFolder(folder, TUTORIAL), 26, device=device))
    assert crossed == [torch.uint8, torch.int64]


@pytest.mark.parametrize("device", DEVICES)
def test_other_batches_move_as_they_are(folder: Path, device: str) -> None:
    rows = torch.utils.data.TensorDataset(torch.arange(6.0).view(3, 2), torch.arange(3))
    (found,) = list(DataLoader(rows, 3, device=device))
    assert torch.equal(found[0].cpu(), rows.tensors[0]) and found[0].device.type == device

    def collate(samples: list[Any]) -> dict[str, Any]:
        return {"images": [image for image, _ in samples], "labels": torch.tensor([i for _, i in samples]), "n": 2}

    batch = next(iter(DataLoader(ImageFolder(folder, TUTORIAL), 2, collate_fn=collate, device=device)))
    assert batch["n"] == 2 and batch["labels"].device.type == batch["images"][1].device.type == device


def test_several_loaders_at_once(folder: Path, assert_equal: Check) -> None:
    dataset = ImageFolder(folder, TUTORIAL)
    expected = list(DataLoader(dataset, 4, num_workers=0))
    found: dict[int, Any] = {}

    def work(i: int) -> None:
        found[i] = [batch for _ in range(3) for batch in DataLoader(dataset, 4, num_workers=2)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert_equal(found[i], expected * 3)


def test_other_python_threads_run_during_the_wait(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    for i in range(8):
        picture(900, 1200, i).save(tmp_path / "class" / f"{i}.jpg")
    loader = DataLoader(ImageFolder(tmp_path, TUTORIAL), 8, num_workers=1)
    ticks = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.002)

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.monotonic()
    next(iter(loader))
    end = time.monotonic()
    stop.set()
    thread.join()
    during = [t for t in ticks if begin < t < end]
    # The batch takes tens of milliseconds; without the GIL the ticker has a turn every 2 ms.
    assert len(during) >= (end - begin) / 0.02


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


def test_a_signal_handler_of_the_user_still_runs(folder: Path) -> None:
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    try:
        iterator = iter(DataLoader(ImageFolder(folder, TUTORIAL), 26, num_workers=1))
        os.kill(os.getpid(), signal.SIGUSR1)
        next(iterator)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [1]
