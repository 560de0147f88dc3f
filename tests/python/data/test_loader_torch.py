"""What torch's `DataLoader` accepts and gives, for every kind of data set, sampler and batch."""

from __future__ import annotations

import inspect
import pickle
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, ConcatDataset, Dataset, IterableDataset, StackDataset, Subset, TensorDataset
from torch.utils.data import DataLoader as TorchDataLoader
from torchvision import datasets, transforms

from cnnrs.data.feature_dataset import FeatureDataset
from cnnrs.data.folder import ImageFolder
from cnnrs.data.loader import DataLoader
from cnnrs.data.mnist import MNIST

pytestmark = pytest.mark.filterwarnings("ignore:cnnrs.DataLoader")
DTYPES = [
    torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


class Pairs(Dataset[Any]):
    def __getitem__(self, index: Any) -> Any:
        return {"index": index, "twice": [2 * index, str(index)]}

    def __len__(self) -> int:
        return 12


class AtOnce(Pairs):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[i] for i in indices]


def data_sets(folder: Path, mnist_root: Path) -> dict[str, tuple[Any, Any]]:
    """(torch's or torchvision's, the one for us) of each kind."""
    small = transforms.Compose([transforms.Resize((4, 5)), transforms.ToTensor()])
    rows = TensorDataset(torch.arange(24.0).view(12, 2), torch.arange(12))
    images = datasets.ImageFolder(folder, small), ImageFolder(folder, small)
    digits = (datasets.MNIST(mnist_root, transform=small), MNIST(mnist_root, transform=small))
    same = {
        "rows": rows,
        "numpy rows": FeatureDataset(np.arange(24.0).reshape(12, 2), list(range(12))),
        "subset": Subset(rows, [3, 5, 1, 0, -1, 7]),
        "subset of arrays": Subset(rows, np.array([3, 5, 1, 0, 11, 7])),  # type: ignore[arg-type]
        "subset of tensors": Subset(rows, torch.tensor([3, 5, 1, 0, 11, 7])),  # type: ignore[arg-type]
        "subset of a subset": Subset(Subset(rows, range(11, -1, -1)), [1, 2, 3, 4, 5, 6]),
        "concatenated": ConcatDataset([rows, rows]),
        "stacked": StackDataset(rows, rows),
        "a list": [float(i) for i in range(12)],
        "a dict": {i: {"x": torch.tensor(i)} for i in range(12)},
        "called": Pairs(),
        "called at once": AtOnce(),
    }
    pairs = {name: (dataset, dataset) for name, dataset in same.items()}
    return {
        **pairs,
        "images": images,
        "subset of images": tuple(Subset(d, [4, 3, 0, 9, 1, 2]) for d in images),
        "digits": digits,
    }  # type: ignore[dict-item]


KINDS = [
    "rows", "numpy rows", "subset", "subset of arrays", "subset of tensors", "subset of a subset", "concatenated",
    "stacked", "a list", "a dict", "called", "called at once", "images", "subset of images", "digits",
]  # fmt: skip


class Yields:
    """A sampler of anything; it has neither a base class nor a length."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Any]:
        return iter(self.make())


ORDERS: dict[str, Callable[[], dict[str, Any]]] = {
    "default": dict,
    "drop_last": lambda: {"batch_size": 4, "drop_last": True},
    "one batch": lambda: {"batch_size": 1000},
    "samples": lambda: {"batch_size": None},
    "sampler of ints": lambda: {"batch_size": 2, "sampler": Yields(lambda: [3, -1, 0, 5, 5])},
    "samples of a sampler": lambda: {"batch_size": None, "sampler": Yields(lambda: [3, -1, 0, 5, 5])},
    "sampler of numpy ints": lambda: {"batch_size": 2, "sampler": Yields(lambda: np.array([3, 1, 0, 5], np.uint8))},
    "sampler of tensors": lambda: {"batch_size": 2, "sampler": Yields(lambda: torch.tensor([3, 1, 0, 5]))},
    "sampler of byte tensors": lambda: {"batch_size": 2, "sampler": Yields(lambda: torch.tensor([1, 1, 0]).byte())},
    "sampler of bools": lambda: {"batch_size": 2, "sampler": Yields(lambda: [True, False, True])},
    "sampler of lists": lambda: {"batch_size": 2, "sampler": Yields(lambda: [[0, 1], [2, 3], [4, 5]])},
    "samples of lists": lambda: {"batch_size": None, "sampler": Yields(lambda: [[0, 1], [2, 3, 4]])},
    "sampler of slices": lambda: {"batch_size": 2, "sampler": Yields(lambda: [slice(0, 2), slice(2, 4)])},
    "samples of slices": lambda: {"batch_size": None, "sampler": Yields(lambda: [slice(0, 2), slice(1, 5)])},
    "sampler of index tensors": lambda: {"batch_size": 2, "sampler": Yields(lambda: torch.tensor([[0, 1], [3, 2]]))},
    "samples of index tensors": lambda: {"batch_size": None, "sampler": Yields(lambda: torch.tensor([[0, 1], [3, 2]]))},
    "sampler of one-element tensors": lambda: {"batch_size": 2, "sampler": Yields(lambda: torch.tensor([[1], [3]]))},
    "sampler of floats": lambda: {"batch_size": 2, "sampler": Yields(lambda: [1.0, 2.0])},
    "sampler of strings": lambda: {"batch_size": 2, "sampler": Yields(lambda: ["a", "b"])},
    "sampler of None": lambda: {"batch_size": 2, "sampler": Yields(lambda: [None, None])},
    "out of range": lambda: {"batch_size": 2, "sampler": Yields(lambda: [0, 1, 1000, 2, 3])},
    "below the range": lambda: {"batch_size": 2, "sampler": Yields(lambda: [0, -1000])},
    "batches in lists": lambda: {"batch_sampler": Yields(lambda: [[0], [5, 4, 3], [2, 2]])},
    "batches in tuples": lambda: {"batch_sampler": Yields(lambda: [(0,), (5, 4, 3)])},
    "batches in ranges": lambda: {"batch_sampler": Yields(lambda: [range(3), range(5, 2, -1)])},
    "batches in tensors": lambda: {"batch_sampler": Yields(lambda: torch.tensor([[0, 1], [5, 4]]))},
    "batches in arrays": lambda: {"batch_sampler": Yields(lambda: np.array([[0, 1], [5, 4]]))},
    "batches in sets": lambda: {"batch_sampler": Yields(lambda: [{1, 2}, {4}])},
    "batches in iterators": lambda: {"batch_sampler": Yields(lambda: (iter([i, i + 1]) for i in range(3)))},
    "batches in generators": lambda: {"batch_sampler": Yields(lambda: ((j for j in (i, 2)) for i in range(3)))},
    "batches in masks": lambda: {"batch_sampler": Yields(lambda: [[torch.arange(12) < 3, torch.arange(12) > 8]])},
    "batches of nothing": lambda: {"batch_sampler": Yields(lambda: [[0], [], [1]])},
    "batches that are none": lambda: {"batch_sampler": Yields(lambda: [[0], 1, [1]])},
    "batches of batches": lambda: {"batch_sampler": BatchSampler(BatchSampler(range(6), 2, True), 2, False)},
    "own collation": lambda: {"batch_size": 3, "collate_fn": list, "sampler": Yields(lambda: [0, torch.tensor(1), 2])},
}  # fmt: skip


def outcome(loader: Any) -> list[Any]:
    """Every batch, or the type of what was raised instead of it."""
    found: list[Any] = []
    iterator = iter(loader)
    for _ in range(40):
        try:
            found.append(next(iterator))
        except StopIteration:
            break
        except Exception as error:
            found.append(type(error))
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return type(b) is np.ndarray and np.array_equal(a, b)
    if isinstance(a, dict):
        return type(a) is type(b) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and bool(a == b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_workers", [None, 2])
def test_every_order_of_every_data_set(kind: str, num_workers: int | None, folder: Path, mnist_root: Path) -> None:
    theirs, ours = data_sets(folder, mnist_root)[kind]
    for name, keywords in ORDERS.items():
        if kind == "digits" and name in ("default", "samples", "sampler of one-element tensors"):
            # Three hundred of them; and Pillow takes a picture of shape (1, 28, 28), our `MNIST` does not make one.
            continue
        expected = outcome(TorchDataLoader(theirs, **keywords()))
        found = outcome(DataLoader(ours, num_workers=num_workers, **keywords()))
        if kind == "digits":
            # Our `MNIST` refuses what is no number of a digit by other exceptions than Pillow does for torchvision.
            found, expected = [[one for one in epoch if not isinstance(one, type)] for epoch in (found, expected)]
        assert len(found) == len(expected) and all(map(same, found, expected)), (name, found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_every_type(dtype: torch.dtype) -> None:
    values = torch.arange(12).to(dtype)
    for shaped in (values, values.view(6, 2), values.view(6, 1, 2), values.view(6, 2).T[:, 0:0], values[::2]):
        dataset = TensorDataset(shaped, shaped)
        expected = outcome(TorchDataLoader(dataset, 4, sampler=[1, 0, -1, 1, 0]))
        found = outcome(DataLoader(dataset, 4, sampler=[1, 0, -1, 1, 0]))
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            for x, y in zip(a, b, strict=True):
                assert x.dtype == y.dtype == dtype and x.shape == y.shape
                assert x.view(torch.uint8).equal(y.view(torch.uint8)) if x.numel() and x.dim() else x.shape == y.shape


def test_rows_keep_their_gradients() -> None:
    values = torch.arange(6.0, requires_grad=True)
    for make in (TorchDataLoader, DataLoader):
        values.grad = None
        for (batch,) in make(TensorDataset(values), 4):
            batch.sum().backward()
        assert values.grad is not None and values.grad.tolist() == [1.0] * 6


def test_the_class_is_generic() -> None:
    def train(loader: DataLoader[torch.Tensor]) -> None: ...

    assert typing.get_args(inspect.signature(train, eval_str=True).parameters["loader"].annotation) == (torch.Tensor,)
    loader = DataLoader[torch.Tensor](TensorDataset(torch.arange(3)))  # type: ignore[arg-type]
    assert type(loader) is DataLoader and isinstance(loader, TorchDataLoader)
    assert [batch[0].tolist() for batch in loader] == [[0], [1], [2]]


class Endless(DataLoader[Any]):
    """As people write it: epochs in a row, and a length of their own."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        self.rounds = 2
        super().__init__(*args, **keywords)

    def __iter__(self) -> Any:
        for _ in range(self.rounds):
            yield from super().__iter__()

    def __len__(self) -> int:
        return self.rounds * super().__len__()


def test_subclasses_with_an_iteration_of_their_own() -> None:
    loader = Endless(TensorDataset(torch.arange(5)), 2, num_workers=0)
    again = pickle.loads(pickle.dumps(loader))
    for one in (loader, again):
        assert len(one) == 6 and [batch[0].tolist() for batch in one] == [[0, 1], [2, 3], [4]] * 2


class TooLong(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(7))

    def __len__(self) -> int:
        return 5

    def __repr__(self) -> str:
        return "TooLong()"


def warned(loader: Any) -> list[tuple[type[Warning], str, str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if isinstance(loader.dataset, TooLong):
            len(loader)
        list(loader)
    return [(one.category, str(one.message), one.filename) for one in caught]


@pytest.mark.parametrize("keywords", [{}, {"batch_size": None}, {"batch_size": 3}], ids=str)
def test_an_iterable_that_is_longer_than_it_says_is_warned_about(keywords: dict[str, Any]) -> None:
    theirs = warned(TorchDataLoader(TooLong(), **keywords))
    assert len(theirs) == (0 if keywords.get("batch_size") == 3 else 2)
    for num_workers in (None, 0, 2):
        found = warned(DataLoader(TooLong(), num_workers=num_workers, **keywords))
        assert [text for _, text, _ in found] == [text for _, text, _ in theirs]
        assert all(file == __file__ and kind is UserWarning for kind, _, file in found)


@pytest.mark.skipif(
    getattr(torch, "accelerator", torch.cuda).is_available(),
    reason="the warning is about machines without an accelerator",
)
def test_pinning_without_an_accelerator_is_warned_about() -> None:
    dataset = TensorDataset(torch.arange(2))
    theirs = warned(TorchDataLoader(dataset, pin_memory=True))
    assert [text for _, text, _ in warned(DataLoader(dataset, pin_memory=True))] == [text for _, text, _ in theirs]


def rebuilt(loader: Any) -> Any:
    """As libraries that change the sampler do: what is public and the constructor knows, given to it again."""
    known = inspect.signature(type(loader).__init__).parameters
    public = {name: value for name, value in vars(loader).items() if not name.startswith("_")}
    assert set(public) <= set(known), set(public) - set(known)
    arguments = {**public, "multiprocessing_context": loader.multiprocessing_context}
    batches = arguments.pop("batch_sampler")
    for name in ("batch_size", "sampler", "drop_last"):
        arguments.pop(name)
    return type(loader)(**arguments, batch_sampler=BatchSampler(batches.sampler, batches.batch_size, batches.drop_last))


def test_a_loader_is_rebuilt_from_what_is_public(folder: Path, tmp_path: Path) -> None:
    transform = transforms.Compose([transforms.Resize((4, 4)), transforms.ToTensor()])
    options: dict[str, Any] = {
        "on_error": "skip", "truncated": "accept", "exif": True, "max_pixels": 10**6, "max_bytes": 10**6,
        "cache": tmp_path, "cache_bytes": 10**7, "decode": "scaled",
    }  # fmt: skip
    loader = DataLoader(ImageFolder(folder, transform), 4, num_workers=2, **options)
    again = rebuilt(loader)
    assert {name: getattr(again, name) for name in options} == options
    assert all(map(same, list(again), list(loader))) and again.cached["images"] == 26
    with pytest.raises(ValueError, match="cache attribute should not be set"):
        loader.cache = "ram"


def test_a_loader_is_rebuilt_as_torchs_own() -> None:
    """As accelerate does it: torch's class, its own arguments read from the attributes, and another batch sampler."""
    names = (
        "num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context", "generator",
        "prefetch_factor", "persistent_workers", "in_order",
    )  # fmt: skip
    keywords = {"batch_size": 4, "shuffle": True, "num_workers": 0, "generator": torch.Generator().manual_seed(2)}
    loader = DataLoader(TensorDataset(torch.arange(10)), **keywords)  # type: ignore[arg-type]
    # Torch has `in_order` since 2.6.
    arguments = {name: getattr(loader, name) for name in names if hasattr(loader, name)}
    theirs = TorchDataLoader(loader.dataset, batch_sampler=loader.batch_sampler, **arguments)
    state = loader.generator.get_state()  # type: ignore[union-attr]
    expected = list(theirs)
    loader.generator.set_state(state)  # type: ignore[union-attr]
    assert all(map(same, list(loader), expected))
