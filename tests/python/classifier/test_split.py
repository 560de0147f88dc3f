"""Rows are dealt into parts: every class in each, what belongs together on one side, shares kept."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnrs.classifier.split import folds, three_ways


@st.composite
def grouped(draw: st.DrawFn) -> tuple[torch.Tensor, list[int]]:
    """Rows of a few classes in groups of any size."""
    labels = draw(st.lists(st.integers(0, 3), min_size=4, max_size=120))
    # Classes are numbered without a gap.
    numbers = {label: number for number, label in enumerate(sorted(set(labels)))}
    groups = draw(st.lists(st.integers(0, 40), min_size=len(labels), max_size=len(labels)))
    return torch.tensor([numbers[label] for label in labels]), groups


@given(grouped(), st.integers(0, 3), st.sampled_from([(0.15, 0.15), (0.2, 0.0), (0.3, 0.3)]))
@settings(max_examples=150, deadline=None)
def test_every_row_once_and_groups_whole(
    rows: tuple[torch.Tensor, list[int]], seed: int, shares: tuple[float, float]
) -> None:
    labels, groups = rows
    split = three_ways(labels, groups, *shares, seed=seed)
    assert sorted(torch.cat(split).tolist()) == list(range(len(labels)))
    sides = [{groups[row] for row in part.tolist()} for part in split]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert shares[1] or not len(split.test)
    assert len(split.train)
    again = three_ways(labels, groups, *shares, seed=seed)
    assert all(torch.equal(part, other) for part, other in zip(split, again, strict=True))


@given(st.lists(st.integers(3, 60), min_size=2, max_size=6), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_classes_are_spread_as_their_shares_say(sizes: list[int], seed: int) -> None:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    split = three_ways(labels, range(len(labels)), seed=seed)
    for number, size in enumerate(sizes):
        counts = [int((labels[part] == number).sum()) for part in split]
        # One row cannot be divided; and every part has one.
        assert min(counts) >= 1
        for count, share in zip(counts[1:], (0.15, 0.15), strict=True):
            assert abs(count - max(share * size, 1)) <= 1


@given(st.lists(st.integers(5, 40), min_size=2, max_size=5))
@settings(max_examples=40, deadline=None)
def test_folds_have_as_many_of_each_class(sizes: list[int]) -> None:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    which = folds(labels, range(len(labels)), 5)
    for number in range(len(sizes)):
        counts = which[labels == number].bincount(minlength=5)
        assert int(counts.max() - counts.min()) <= 1


def test_several_labels() -> None:
    """A rare label is in every part, although it comes only together with others."""
    labels = torch.zeros(100, 3)
    labels[:, 0] = 1
    labels[:9, 1] = 1
    labels[5:60, 2] = 1
    split = three_ways(labels, range(100))
    rare = [int(labels[part, 1].sum()) for part in split]
    assert min(rare) >= 1 and sum(rare) == 9 and rare[0] >= 6
    assert [len(part) for part in split] == [70, 15, 15]


def test_a_large_group_is_where_there_is_room() -> None:
    labels = torch.tensor([0] * 50 + [1] * 50)
    groups = [0] * 30 + list(range(1, 71))
    split = three_ways(labels, groups)
    assert {0} <= {groups[row] for row in split.train.tolist()}
    assert min(int((labels[part] == number).sum()) for part in split for number in (0, 1)) >= 1
