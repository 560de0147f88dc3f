"""A run that was interrupted, at any moment, goes on as the one that was not."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DistributedSampler, RandomSampler, TensorDataset, WeightedRandomSampler
from torchvision import transforms

from cnnrs.data.folder import ImageFolder
from cnnrs.data.loader import DataLoader

pytestmark = pytest.mark.filterwarnings("ignore:cnnrs.DataLoader uses threads")
AUGMENTED = transforms.Compose(
    [transforms.Resize((6, 6)), transforms.RandomHorizontalFlip(), transforms.RandomRotation(30), transforms.ToTensor()]
)
EPOCHS = 3
# Batches of an epoch that were delivered when the run ended, in the epoch with that number.
MOMENTS = [(0, "before"), (0, 0), (0, 2), (1, "before"), (1, 0), (1, 3), (2, "before"), (2, 1)]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


KEYWORDS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "shuffle": lambda _: {"shuffle": True},
    "inline": lambda _: {"shuffle": True, "num_workers": 0},
    "workers": lambda _: {"shuffle": True, "num_workers": 2},
    "generator": lambda _: {"shuffle": True, "generator": generator()},
    "its own generator": lambda data: {"sampler": RandomSampler(data, generator=generator())},
    "two generators": lambda data: {"sampler": RandomSampler(data, generator=generator()), "generator": generator()},
    "replacement": lambda data: {"sampler": RandomSampler(data, True, 30, generator()), "num_workers": 2},
    "weighted": lambda _: {"sampler": WeightedRandomSampler([1.0 + i for i in range(26)], 26, generator=generator())},
    "distributed": lambda data: {"sampler": DistributedSampler(data, 2, 1, seed=9)},
    "persistent": lambda _: {"shuffle": True, "num_workers": 2, "persistent_workers": True, "generator": generator()},
    "skip": lambda _: {"shuffle": True, "num_workers": 2, "on_error": "skip", "generator": generator()},
}


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """The state as a checkpoint brings it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def run(loader: Any, stop: tuple[int, Any] | None = None) -> tuple[list[Any], Any]:
    """The batches of all epochs, or those up to a moment and the state there, with torch's own."""
    found = []
    for epoch in range(EPOCHS):
        loader.set_epoch(epoch)
        if stop == (epoch, "before"):
            break
        iterator = iter(loader)
        for count in range(1000):
            if stop == (epoch, count):
                break
            batch = next(iterator, None)
            if batch is None:
                break
            # Dropout of the model, say.
            found.append([*batch, torch.rand(1)])
        if stop is not None and stop[0] == epoch:
            break
    return found, (saved(loader.state_dict()), torch.get_rng_state())


@pytest.mark.parametrize("name", KEYWORDS)
def test_a_run_goes_on_as_if_it_had_not_been_interrupted(name: str, folder: Path) -> None:
    for dataset in (ImageFolder(folder, AUGMENTED), TensorDataset(torch.arange(26.0), torch.arange(26))):
        if name == "skip" and isinstance(dataset, TensorDataset):
            continue
        torch.manual_seed(11)
        whole, _ = run(DataLoader(dataset, 4, **KEYWORDS[name](dataset)))
        for stop in MOMENTS:
            torch.manual_seed(11)
            before, (state, random) = run(DataLoader(dataset, 4, **KEYWORDS[name](dataset)), stop)
            # Another process: its loader is new, and the script has restored torch's generator for the model.
            torch.manual_seed(999)
            again = DataLoader(dataset, 4, **KEYWORDS[name](dataset))
            again.load_state_dict(state)
            torch.set_rng_state(random)
            after = rest(again, stop[0])
            both = [*before, *after]
            assert len(both) == len(whole), stop
            for batch, expected in zip(both, whole, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(batch, expected, strict=True)), stop


def rest(loader: Any, epoch: int) -> list[Any]:
    """The batches from the epoch on whose number the state has set."""
    found = [[*batch, torch.rand(1)] for batch in loader]
    for number in range(epoch + 1, EPOCHS):
        loader.set_epoch(number)
        found += [[*batch, torch.rand(1)] for batch in loader]
    return found


def test_orders_do_not_repeat_where_nothing_else_was_restored() -> None:
    """Only the loader's state was saved: its orders go on, torch's generator stays what the script made it."""
    dataset = TensorDataset(torch.arange(20))
    for keywords in ({}, {"num_workers": 0}, {"num_workers": 2}):
        torch.manual_seed(0)
        loader = DataLoader(dataset, 20, shuffle=True, **keywords)  # type: ignore[arg-type]
        next(iter(loader))
        list(loader)
        state = saved(loader.state_dict())
        ((expected,),) = list(loader)
        torch.manual_seed(0)
        again = DataLoader(dataset, 20, shuffle=True, **keywords)  # type: ignore[arg-type]
        again.load_state_dict(state)
        before = torch.get_rng_state()
        ((found,),) = list(again)
        assert torch.equal(found, expected)
        assert torch.equal(torch.get_rng_state(), before)


def test_a_state_of_a_state_is_the_same(folder: Path) -> None:
    """Saved again before anything was drawn, and after `iter` alone."""
    dataset = ImageFolder(folder, AUGMENTED)
    torch.manual_seed(1)
    loader = DataLoader(dataset, 4, shuffle=True)
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    state = loader.state_dict()
    expected = [images for images, _ in iterator]
    again = DataLoader(dataset, 4, shuffle=True)
    again.load_state_dict(state)
    third = DataLoader(dataset, 4, shuffle=True)
    third.load_state_dict(saved(again.state_dict()))
    begun = iter(third)
    fourth = DataLoader(dataset, 4, shuffle=True)
    fourth.load_state_dict(saved(third.state_dict()))
    for found in (begun, iter(fourth), iter(again)):
        assert all(torch.equal(a[0], b) for a, b in zip(list(found), expected, strict=True))


@pytest.mark.parametrize("done", [0, 1, 3])
def test_a_state_of_version_1_goes_on(folder: Path, done: int) -> None:
    """As commit 0148a67 saved it, of this version's numbers."""

    def made() -> DataLoader:
        return DataLoader(ImageFolder(folder, AUGMENTED), 4, shuffle=True, num_workers=0, generator=generator())

    loader = made()
    list(loader)
    iterator = iter(loader)
    for _ in range(done):
        next(iterator)
    state = {name: one for name, one in loader.state_dict().items() if name not in ("drawn", "base_seed", "rounds")}
    rest = [images for images, _ in [*iterator, *loader]]
    again = made()
    again.load_state_dict({**state, "version": 1})
    assert all(map(torch.equal, [images for images, _ in [*again, *again]], rest))
