"""When a `DataLoader` draws its random numbers: torch's moments, seen by every other user of the generators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import RandomSampler, Sampler, TensorDataset, WeightedRandomSampler

from cnnrs.data.loader import DataLoader

pytestmark = pytest.mark.filterwarnings("ignore:cnnrs.DataLoader cannot read", "ignore:cnnrs.DataLoader uses threads")
SIZE = 23


class Eager(Sampler[int]):
    """Draws when it is asked for an iterator, and counts how often that is."""

    asked = 0

    def __iter__(self) -> Iterator[int]:
        self.asked += 1
        return iter(torch.randperm(SIZE).tolist())

    def __len__(self) -> int:
        return SIZE


class OneByOne(Sampler[int]):
    """Draws every index when it is due."""

    def __iter__(self) -> Iterator[int]:
        return (int(torch.randint(SIZE, ())) for _ in range(SIZE))

    def __len__(self) -> int:
        return SIZE


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


ORDERS: dict[str, Callable[[], dict[str, Any]]] = {
    "shuffle": lambda: {"batch_size": 4, "shuffle": True},
    "generator": lambda: {"batch_size": 4, "shuffle": True, "generator": generator()},
    "samples": lambda: {"batch_size": None, "shuffle": True},
    "in order": lambda: {"batch_size": 4},
    "weighted": lambda: {"batch_size": 5, "sampler": WeightedRandomSampler([1.0 + i for i in range(SIZE)], 40)},
    "replacement": lambda: {
        "batch_size": 5,
        "sampler": RandomSampler(range(SIZE), replacement=True, num_samples=90, generator=generator()),
    },
    "eager": lambda: {"batch_size": 4, "sampler": Eager()},
    "one by one": lambda: {"batch_size": 2, "sampler": OneByOne()},
    "batch_sampler": lambda: {"batch_sampler": [[3, 1], [2], [0, 4, 5]]},
}
# Worker processes take their time: few of them.
WORKERS: dict[str, dict[str, Any]] = {
    "0": {"num_workers": 0},
    "1": {"num_workers": 1, "prefetch_factor": 3},
    "2": {"num_workers": 2},
    "persistent": {"num_workers": 1, "persistent_workers": True},
}
Trace = list[Any]


def numbers(batch: Any) -> Any:
    return [part.tolist() for part in batch]


def whole_epochs(make: Callable[[], Any]) -> Trace:
    loader = make()
    return [[numbers(batch) for batch in loader] for _ in range(3)]


def zipped(make: Callable[[], Any]) -> Trace:
    return [(numbers(a), numbers(b)) for a, b in zip(make(), make(), strict=True)]


def one_loader_zipped(make: Callable[[], Any]) -> Trace:
    loader = make()
    return [(numbers(a), numbers(b)) for a, b in zip(loader, loader, strict=True)]


def first_batches(make: Callable[[], Any]) -> Trace:
    loader = make()
    return [numbers(next(iter(loader))) for _ in range(3)]


def partly(make: Callable[[], Any]) -> Trace:
    found, loader = [], make()
    for stop in (0, 2, 1):
        for i, batch in enumerate(loader):
            found.append(numbers(batch))
            if i == stop:
                break
    return found


def beside_a_model(make: Callable[[], Any]) -> Trace:
    """Dropout draws between the batches, and a model is made between `iter` and the first one."""
    iterator = iter(make())
    found = [torch.rand(3).tolist(), torch.get_rng_state().tolist()]
    for batch in iterator:
        found += [numbers(batch), torch.rand(2).tolist()]
    return found


USES = (whole_epochs, zipped, one_loader_zipped, first_batches, partly, beside_a_model)


CASES = [(order, "0") for order in ORDERS] + [
    (order, workers)
    for workers in ("1", "2", "persistent")
    for order in ("shuffle", "generator", "eager", "one by one", "replacement")
]


@pytest.mark.parametrize(("order", "workers"), CASES)
def test_orders_and_generators_are_torchs(order: str, workers: str) -> None:
    dataset = TensorDataset(torch.arange(100))
    # Processes take their time to start.
    uses = {"0": USES, "persistent": (whole_epochs,)}.get(workers, (partly, beside_a_model))
    for use in uses:
        traces = []
        for loader in (TorchDataLoader, DataLoader):
            torch.manual_seed(3)
            made: list[dict[str, Any]] = []

            def make(loader: Any = loader, made: Any = made) -> Any:
                made.append(ORDERS[order]())
                return loader(dataset, **made[-1], **WORKERS[workers])

            trace = use(make)
            owners = [part for keywords in made for part in keywords.values()]
            states = [part.get_state().tolist() for part in owners if isinstance(part, torch.Generator)]
            states += [part.generator.get_state().tolist() for part in owners if isinstance(part, RandomSampler)]
            asked = [part.asked for part in owners if isinstance(part, Eager)]
            traces.append((trace, torch.get_rng_state().tolist(), states, asked))
        assert traces[0] == traces[1], use.__name__


@pytest.mark.parametrize("order", [name for name in ORDERS if name not in ("one by one", "replacement")])
def test_without_a_number_of_workers_the_moments_are_those_of_none(order: str) -> None:
    """Samplers that draw index by index are asked ahead of the consumer (docs/loader.md), the others are not."""
    dataset = TensorDataset(torch.arange(100))
    for use in USES:
        traces = []
        for loader in (TorchDataLoader, DataLoader):
            torch.manual_seed(3)
            traces.append(
                (use(lambda loader=loader: loader(dataset, **ORDERS[order]())), torch.get_rng_state().tolist())
            )
        assert traces[0] == traces[1], use.__name__


@pytest.mark.parametrize("kind", ["rows", "called", "images", "skip"])
@pytest.mark.parametrize("num_workers", [None, 0, 2])
def test_every_kind_of_data_set_draws_at_the_same_moments(kind: str, num_workers: int | None, folder: Any) -> None:
    """Not only rows: images, also where files may be left out, and data sets that are called."""
    from torchvision import datasets, transforms

    from cnnrs.data.folder import ImageFolder

    transform = transforms.Compose([transforms.Resize((4, 4)), transforms.ToTensor()])
    ours: Any = {
        "rows": TensorDataset(torch.arange(26.0)),
        "called": [float(i) for i in range(26)],
        "images": ImageFolder(folder, transform),
    }[kind if kind != "skip" else "images"]
    theirs = datasets.ImageFolder(folder, transform) if kind in ("images", "skip") else ours
    keywords: dict[str, Any] = {"on_error": "skip"} if kind == "skip" else {}
    for use in (two_of_each, beside):
        torch.manual_seed(8)
        expected = use(lambda: TorchDataLoader(theirs, 4, shuffle=True, num_workers=num_workers or 0))
        state = torch.get_rng_state()
        torch.manual_seed(8)
        found = use(lambda: DataLoader(ours, 4, shuffle=True, num_workers=num_workers, **keywords))
        assert torch.equal(torch.get_rng_state(), state)
        assert len(found) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), use.__name__


def flat(batch: Any) -> list[torch.Tensor]:
    return list(batch) if isinstance(batch, (list, tuple)) else [batch]


def two_of_each(make: Callable[[], Any]) -> list[torch.Tensor]:
    return [part for a, b in zip(make(), make(), strict=True) for part in (*flat(a), *flat(b))]


def beside(make: Callable[[], Any]) -> list[torch.Tensor]:
    iterator = iter(make())
    found = [torch.rand(3)]
    for batch in iterator:
        found += [*flat(batch), torch.rand(2)]
    return found
