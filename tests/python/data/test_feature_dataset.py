"""`FeatureDataset` and `data_gen` against the tutorial's `My_dataset` and `data_gen`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import Dataset, Subset, TensorDataset

from cnnrs.data.feature_dataset import FeatureDataset, data_gen
from cnnrs.data.loader import DataLoader


class My_dataset(Dataset[Any]):
    def __init__(self, feat: Any, labels: Any) -> None:
        self.conv_feat = feat
        self.labels = labels

    def __len__(self) -> int:
        return len(self.conv_feat)

    def __getitem__(self, idx: int) -> Any:
        return self.conv_feat[idx], self.labels[idx]


def tutorials_data_gen(conv_feat: Any, labels: Any, batch_size: int = 64, shuffle: bool = True) -> Iterator[Any]:
    labels = np.array(labels)
    if shuffle:
        index = np.random.permutation(len(conv_feat))
        conv_feat = conv_feat[index]
        labels = labels[index]
    for idx in range(0, len(conv_feat), batch_size):
        yield (conv_feat[idx : idx + batch_size], labels[idx : idx + batch_size])


features = np.random.default_rng(0).normal(size=(23, 4, 3, 3)).astype(np.float32)
labels = np.random.default_rng(1).integers(0, 2, 23)

KINDS = {
    "tensors": (torch.from_numpy(features), torch.from_numpy(labels)),
    "arrays": (features, labels),
    "the tutorial's: array and list of numpy numbers": (features, list(labels)),
    "lists": (list(torch.from_numpy(features)), labels.tolist()),
    "float64 array and float list": (features.astype(np.float64), [0.5] * 23),
    "float32 numbers": (features, labels.astype(np.float32)),
    "bytes and booleans": ((features * 9).astype(np.uint8), labels.astype(bool)),
    "transposed": (torch.from_numpy(features).permute(0, 3, 1, 2), torch.from_numpy(labels).view(23, 1)),
    "big-endian labels": (features, labels.astype(">i8")),
    "strings": (features, [str(v) for v in labels]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_are_those_of_the_default_collation(kind: str, shuffle: bool) -> None:
    feats, labs = KINDS[kind]
    theirs: Any = My_dataset(feats, labs)

    def epoch(make: Any, dataset: Any) -> tuple[Any, Any]:
        torch.manual_seed(5)
        try:
            return list(make(dataset, batch_size=5, shuffle=shuffle)), torch.get_rng_state()
        except (TypeError, ValueError) as error:
            return (type(error), str(error)), None

    expected, state = epoch(TorchDataLoader, theirs)
    found, our_state = epoch(DataLoader, FeatureDataset(feats, labs))
    assert type(found) is type(expected) and len(found) == len(expected)
    if state is None:
        assert found == expected
        return
    assert torch.equal(state, our_state)
    for a, b in zip(found, expected, strict=True):
        assert type(a) is type(b) is list
        for x, y in zip(a, b, strict=True):
            assert type(x) is type(y)
            if isinstance(x, torch.Tensor):
                assert x.dtype == y.dtype and x.is_contiguous() == y.is_contiguous()
                assert torch.equal(x, y)
            else:
                assert x == y


def test_items_are_as_given() -> None:
    numbers = list(labels)
    dataset = FeatureDataset(features, numbers)
    assert dataset[3][0].base is features and dataset[3][1] is numbers[3]
    assert len(dataset) == 23
    with pytest.raises(ValueError, match="23 features and 5 labels"):
        FeatureDataset(features, labels[:5])


def test_tensor_dataset_and_subsets() -> None:
    columns = torch.arange(40.0).view(20, 2), torch.arange(20), torch.arange(60).view(20, 3).to(torch.uint8)
    for dataset in (TensorDataset(*columns), Subset(Subset(TensorDataset(*columns), range(15, 3, -1)), [0, -1, 4, 4])):
        for batch_size in (1, 3, 100):
            expected = list(TorchDataLoader(dataset, batch_size))
            for a, b in zip(DataLoader(dataset, batch_size), expected, strict=True):
                assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def test_gradients_flow_as_with_torch() -> None:
    rows = torch.arange(8.0).view(4, 2).requires_grad_()
    batch, _ = next(iter(DataLoader(FeatureDataset(rows, torch.zeros(4)), batch_size=2)))
    batch.sum().backward()
    assert torch.equal(
        rows.grad if rows.grad is not None else torch.empty(0), torch.tensor([[1.0, 1], [1, 1], [0, 0], [0, 0]])
    )


def test_a_batch_is_a_copy() -> None:
    rows, numbers = torch.zeros(4, 2), np.zeros((4, 2), np.float32)
    for source in (rows, numbers):
        batch, _ = next(iter(DataLoader(FeatureDataset(source, torch.zeros(4)), batch_size=4)))
        batch += 1
        assert float(source.sum()) == 0


def test_a_memory_mapped_file_is_read_by_row(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    np.save(tmp_path / "features.npy", features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    found = torch.cat([x for x, _ in DataLoader(FeatureDataset(mapped, labels), batch_size=6)])
    assert torch.equal(found, torch.from_numpy(features))
    assert not recwarn.list


def test_an_index_out_of_range() -> None:
    dataset = FeatureDataset(torch.zeros(4, 2), torch.zeros(4))
    with pytest.raises(IndexError):
        list(DataLoader(dataset, batch_size=2, sampler=[0, 1, 2, 9]))
    assert next(iter(DataLoader(FeatureDataset(torch.arange(4.0), [0] * 4), sampler=[-1])))[0].item() == 3


def test_custom_collation_gets_the_items() -> None:
    dataset = FeatureDataset(torch.arange(6.0).view(3, 2), [7, 8, 9])
    (batch,) = DataLoader(dataset, batch_size=3, collate_fn=lambda items: items)
    assert [label for _, label in batch] == [7, 8, 9]
    singles = list(DataLoader(dataset, batch_size=None))
    expected = list(TorchDataLoader(dataset, batch_size=None))
    assert all(
        torch.equal(a[0], b[0]) and a[1] == b[1] and type(a) is type(b) for a, b in zip(singles, expected, strict=True)
    )


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 5, 23, 64])
def test_data_gen_is_the_tutorials(shuffle: bool, batch_size: int) -> None:
    for feats, labs in ((features, list(labels)), (torch.from_numpy(features), labels)):
        np.random.seed(4)
        expected = list(tutorials_data_gen(feats, labs, batch_size, shuffle))
        np.random.seed(4)
        found = list(data_gen(feats, labs, batch_size, shuffle))
        assert len(found) == len(expected)
        for (a, i), (b, j) in zip(found, expected, strict=True):
            assert type(a) is type(b) and type(i) is type(j)
            assert np.array_equal(np.asarray(a), np.asarray(b)) and np.array_equal(i, j)


def test_data_gen_keeps_tensor_labels_and_names_faults() -> None:
    np.random.seed(0)
    order = np.random.permutation(23)
    np.random.seed(0)
    found = torch.cat([y for _, y in data_gen(torch.zeros(23, 1), torch.arange(23), 4)])
    assert found.tolist() == order.tolist()
    with pytest.raises(ValueError, match="23 features, 4 labels"):
        data_gen(features, [1, 2, 3, 4])
    with pytest.raises(ValueError, match="batch_size"):
        data_gen(features, labels, 0)
