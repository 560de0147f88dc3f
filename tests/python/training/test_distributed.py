"""`state_dict`, `set_epoch`, `rank` and `world_size`: an epoch in pieces, over time and over processes."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import picture
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data import DataLoader as TorchDataLoader
from torchvision import datasets, transforms

from cnnrs.data.folder import ImageFolder
from cnnrs.data.loader import DataLoader

AUGMENTED = transforms.Compose(
    [
        transforms.Resize((16, 16)),
        transforms.RandomHorizontalFlip(),
        transforms.RandomRotation(20),
        transforms.ToTensor(),
    ]
)
PLAIN = transforms.Compose([transforms.Resize((16, 16)), transforms.ToTensor()])
Check = Callable[..., None]
pytestmark = pytest.mark.filterwarnings(
    "ignore:cnnrs.DataLoader skips files", "ignore:cnnrs.DataLoader cannot read", "ignore:cnnrs.DataLoader uses threads"
)


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """The state as a checkpoint brings it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


class Lists(Sampler[list[int]]):
    """Batches of different lengths, in a new order every time."""

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(26).tolist()
        yield from (order[:3], order[3:7], order[7:8], order[8:14], order[14:20], order[20:])


# Each makes the keywords anew, as a script does that starts again.
KEYWORDS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "shuffle": lambda _: {"batch_size": 4, "shuffle": True, "num_workers": 2},
    "in order": lambda _: {"batch_size": 4, "num_workers": 0},
    "generator": lambda _: {"batch_size": 4, "shuffle": True, "generator": torch.Generator().manual_seed(3)},
    "its own generator": lambda data: {
        "batch_size": 4,
        "sampler": RandomSampler(data, generator=torch.Generator().manual_seed(4)),
    },
    "replacement": lambda data: {"batch_size": 4, "sampler": RandomSampler(data, replacement=True, num_samples=40)},
    "weighted": lambda data: {"batch_size": 4, "sampler": WeightedRandomSampler([1.0 + i for i in range(26)], 26)},
    "batch_sampler": lambda data: {"batch_sampler": BatchSampler(RandomSampler(data), 5, True), "num_workers": 3},
    "own batches": lambda _: {"batch_sampler": Lists(), "num_workers": 2},
    "distributed": lambda data: {"batch_size": 4, "sampler": DistributedSampler(data, 2, 1, seed=9)},
    "persistent": lambda _: {"batch_size": 4, "shuffle": True, "num_workers": 2, "persistent_workers": True},
    "skip": lambda _: {"batch_size": 4, "shuffle": True, "num_workers": 2, "on_error": "skip"},
    "skip, own batches": lambda _: {"batch_sampler": Lists(), "num_workers": 2, "on_error": "skip"},
    "samples": lambda _: {"batch_size": None, "shuffle": True},
}


@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """26 images of which three are broken."""
    root = tmp_path_factory.mktemp("sick")
    (root / "class").mkdir()
    for i in range(26):
        path = root / "class" / f"{i:02}.png"
        picture(18, 19, i).save(path)
        if i in (3, 11, 12):
            path.write_text("no image")
    return root


@pytest.mark.parametrize("done", [0, 1, 3, "all"])
@pytest.mark.parametrize("name", KEYWORDS)
def test_an_epoch_goes_on_where_it_was_left(
    name: str, done: Any, folder: Path, sick: Path, assert_equal: Check
) -> None:
    dataset = ImageFolder(sick if "skip" in name else folder, AUGMENTED)
    torch.manual_seed(11)
    loader = DataLoader(dataset, **KEYWORDS[name](dataset))
    loader.set_epoch(2)
    list(loader)
    iterator = iter(loader)
    total = len(list(zip(range(1000), DataLoader(dataset, **KEYWORDS[name](dataset)), strict=False)))
    # The loaders above have drawn from the global generator, at different moments: only the state counts.
    count = total if done == "all" else done
    for _ in range(count):
        next(iterator)
    state = saved(loader.state_dict())
    rest = list(iterator)
    if done != "all":
        assert rest

    torch.manual_seed(999)
    again = DataLoader(dataset, **KEYWORDS[name](dataset))
    again.load_state_dict(state)
    assert again.state_dict()["epoch"] == 2
    before = torch.get_rng_state()
    iterator = iter(again)
    resumed = [*iterator]
    assert torch.equal(torch.get_rng_state(), before), "the model's random numbers are not touched"
    if name == "samples":
        assert len(resumed) == len(rest)
        assert all(torch.equal(a, b) and i == j for (a, i), (b, j) in zip(resumed, rest, strict=True))
    else:
        assert_equal(resumed, rest)
    # And the next epoch is a whole one.
    assert len(list(again)) == total


def test_the_state_is_that_of_the_consumer_not_of_the_threads(folder: Path) -> None:
    loader = DataLoader(ImageFolder(folder, PLAIN), 4, num_workers=2, prefetch_factor=5)
    assert loader.state_dict()["batches"] == 0
    for i, _ in enumerate(loader, 1):
        state = loader.state_dict()
        assert (state["batches"], state["samples"]) == (i, min(4 * i, 26))
        if i == 3:
            break
    # The loop was left: the state is still there.
    assert loader.state_dict()["batches"] == 3
    loader.load_state_dict(loader.state_dict())
    assert loader.state_dict()["batches"] == 3
    assert len(list(loader)) == 4
    # The epoch is over: the next one is new.
    state = loader.state_dict()
    assert (state["batches"], state["samples"], state["seed"]) == (0, 0, None)


def test_a_batch_that_failed_is_behind(folder: Path, tmp_path: Path) -> None:
    dataset = ImageFolder(folder, PLAIN)
    dataset.samples[5] = (str(tmp_path / "nowhere.jpg"), 0)
    loader = DataLoader(dataset, 4, num_workers=2)
    iterator = iter(loader)
    next(iterator)
    with pytest.raises(FileNotFoundError):
        next(iterator)
    state = loader.state_dict()
    assert state["batches"] == 2
    third = next(iterator)
    again = DataLoader(dataset, 4)
    again.load_state_dict(state)
    assert torch.equal(next(iter(again))[0], third[0])


def test_rows_and_other_data_sets_resume_too() -> None:
    for dataset in (TensorDataset(torch.arange(20)), [(i,) for i in range(20)]):
        torch.manual_seed(0)
        loader = DataLoader(dataset, 3, shuffle=True)  # type: ignore[arg-type]
        iterator = iter(loader)
        for _ in range(4):
            next(iterator)
        state = loader.state_dict()
        rest = list(iterator)
        again = DataLoader(dataset, 3, shuffle=True)  # type: ignore[arg-type]
        again.load_state_dict(state)
        assert [batch[0].tolist() for batch in again] == [batch[0].tolist() for batch in rest]


def test_states_that_do_not_fit(folder: Path) -> None:
    dataset = ImageFolder(folder, PLAIN)
    loader = DataLoader(dataset, 4)
    next(iter(loader))
    state = loader.state_dict()
    for keywords, text in (
        ({"batch_size": 5}, "batch_size 4, this loader has 5"),
        ({"batch_size": 4, "on_error": "skip"}, "on_error raise, this loader has skip"),
    ):
        with pytest.raises(ValueError, match=text):
            DataLoader(dataset, **keywords).load_state_dict(state)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="number of samples 26, this loader has 3"):
        DataLoader([1, 2, 3], 4).load_state_dict(state)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not a state"):
        loader.load_state_dict({"batches": 3})

    class Numbers(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(4))

    with pytest.raises(TypeError, match="IterableDataset"):
        DataLoader(Numbers()).state_dict()


def test_skipping_costs_nothing_per_batch(tmp_path: Path) -> None:
    # 2,000 batches are skipped without their files being opened: these do not exist.
    (tmp_path / "class").mkdir()
    picture(8, 8, 0).save(tmp_path / "class" / "a.png")
    dataset = ImageFolder(tmp_path, PLAIN)
    good = dataset.samples[0]
    dataset.samples = [(str(tmp_path / "nowhere.png"), 0)] * 64_000 + [good] * 4
    dataset.targets = [0] * len(dataset.samples)
    loader = DataLoader(dataset, 32)
    iter(loader)
    state = {**loader.state_dict(), "batches": 2000, "samples": 64_000}
    loader.load_state_dict(state)
    begin = time.monotonic()
    (batch,) = list(loader)
    assert len(batch[0]) == 4
    # Reading one index costs less than 10 us even on a busy machine, decoding one photo 300.
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_share_the_data_as_torchs_do(folder: Path, assert_equal: Check, drop_last: bool) -> None:
    theirs, ours = datasets.ImageFolder(folder, PLAIN), ImageFolder(folder, PLAIN)
    for shuffle in (False, True):
        for rank in range(3):
            sampler: Any = DistributedSampler(theirs, 3, rank, shuffle=shuffle, drop_last=drop_last)
            reference = TorchDataLoader(theirs, 4, sampler=sampler, drop_last=drop_last)
            loader = DataLoader(ours, 4, shuffle=shuffle, drop_last=drop_last, rank=rank, world_size=3)
            same = DataLoader(ours, 4, sampler=sampler, drop_last=drop_last)
            assert len(loader) == len(reference)
            for epoch in range(2):
                sampler.set_epoch(epoch)
                loader.set_epoch(epoch)
                expected = list(reference)
                assert_equal(list(loader), expected)
                assert_equal(list(same), expected)


def test_ranks_need_each_other_and_no_other_sampler(folder: Path) -> None:
    dataset = ImageFolder(folder, PLAIN)
    with pytest.raises(ValueError, match="belong together, got rank=None, world_size=2"):
        DataLoader(dataset, world_size=2)
    with pytest.raises(ValueError, match="not both"):
        DataLoader(dataset, sampler=[1, 2], rank=0, world_size=2)
    with pytest.raises(ValueError, match="Invalid rank"):
        DataLoader(dataset, rank=2, world_size=2)


def test_the_epoch_decides_the_augmentation(folder: Path, assert_equal: Check) -> None:
    # The same seed at the start of every epoch, as some scripts have it: `set_epoch` makes the difference.
    def epoch(number: int, workers: int) -> list[Any]:
        loader = DataLoader(ImageFolder(folder, AUGMENTED), 13, num_workers=workers)
        loader.set_epoch(number)
        torch.manual_seed(0)
        return list(loader)

    assert_equal(epoch(3, 0), epoch(3, 4))
    assert not torch.equal(epoch(3, 1)[0][0], epoch(4, 1)[0][0])
    assert not torch.equal(epoch(0, 1)[0][0], epoch(1, 1)[0][0])
