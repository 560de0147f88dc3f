"""Parts of a data set: as the halves of before, in any number, with every label in each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import random_split

from cnnrs import Features, ImageList
from cnnrs.data.parts import fractions_of, stratified


def halves(labels: list[int], fraction: float, seed: int) -> list[int]:
    """The second half as it was found when there were two halves only."""
    by_class: dict[int, list[int]] = {}
    for i, target in enumerate(labels):
        by_class.setdefault(target, []).append(i)
    generator = torch.Generator().manual_seed(seed)
    second: list[int] = []
    for target in sorted(by_class):
        members = by_class[target]
        take = round(fraction * len(members))
        if len(members) > 1:
            take = min(max(take, 1), len(members) - 1)
        order = torch.randperm(len(members), generator=generator).tolist()
        second += [members[i] for i in order[:take]]
    return sorted(second)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0.01, 0.99), st.integers(0, 9))
def test_two_parts_are_the_halves_of_before(labels: list[int], fraction: float, seed: int) -> None:
    first, second = stratified(labels, *fractions_of(fraction, (), seed))
    assert second == halves(labels, fraction, seed)
    assert sorted(first + second) == list(range(len(labels)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=90), st.sampled_from([(0.7, 0.15, 0.15), (0.2, 0.3, 0.1, 0.4)]))
def test_every_class_is_shared_out(labels: list[int], fractions: tuple[float, ...]) -> None:
    parts = stratified(labels, fractions, 0)
    assert sorted(i for part in parts for i in part) == list(range(len(labels)))
    for label in set(labels):
        count = labels.count(label)
        shares = [sum(labels[i] == label for i in part) for part in parts]
        assert 0 not in shares or count < len(parts)
        # Both ends of a part are rounded, and one sample of it may have gone to a part without.
        assert all(abs(share - fraction * count) <= 2 for share, fraction in zip(shares, fractions, strict=True))


@pytest.mark.parametrize("several", [False, True])
def test_samples_of_one_path_stay_together(several: bool) -> None:
    samples: list[Any] = [(f"{i % 30}.jpg", [str(i % 3)] if several else i % 3) for i in range(60)]
    parts = ImageList([*samples, ("0.jpg", ["1"] if several else 1)]).split(0.5, 0.3, 0.2)
    paths = [{path for path, _ in part.samples} for part in parts]
    assert sum(map(len, paths)) == 30 and sum(map(len, parts)) == 61
    assert [len(part) for part in parts] == pytest.approx([30.5, 18.3, 12.2], abs=2)


@pytest.mark.parametrize("labels", ["list", "features"])
def test_three_parts(labels: str) -> None:
    kinds = [i % 2 for i in range(40)]
    whole: Any = ImageList([(f"{i}.jpg", kind) for i, kind in enumerate(kinds)])
    if labels == "features":
        whole = Features(torch.arange(40.0).view(40, 1), torch.tensor(kinds), [f"{i}.jpg" for i in range(40)])
    parts = whole.split(0.7, 0.15, 0.15)
    # As many as torch's, here in every class.
    assert [len(part) for part in parts] == [len(part) for part in random_split(range(40), [0.7, 0.15, 0.15])]  # type: ignore[arg-type]
    again = whole.split([0.7, 0.15, 0.15], seed=0)
    other = whole.split([0.7, 0.15, 0.15], seed=1)

    def paths(part: Any) -> list[str]:
        return part.paths if labels == "features" else [path for path, _ in part.samples]

    assert [paths(part) for part in parts] == [paths(part) for part in again] != [paths(part) for part in other]
    assert sorted(path for part in parts for path in paths(part)) == sorted(f"{i}.jpg" for i in range(40))
    assert paths(whole.split(0.8, 0.2)[1]) == paths(whole.split(0.2)[1])
    assert paths(whole.split(0.2, 3)[1]) == paths(whole.split(0.2, seed=3)[1])
    assert len(whole.split([0.25] * 4)) == 4
    for array in (np.array([0.5, 0.5]), torch.tensor([0.5, 0.5])):
        assert paths(whole.split(array)[1]) == paths(whole.split(0.5)[1])
    for wrong in ((0.7, 0.15), ([0.7],), ([0.5, 0.6],)):
        with pytest.raises(
            ValueError, match=r"must add up to 1, got .*: split\(0\.2\), or split\(0\.7, 0\.15, 0\.15\)"
        ):
            whole.split(*wrong)
    for wrong in ((1.5,), (0.5, 1.5), ([],), ([0.0, 1.0],)):
        with pytest.raises(ValueError, match="fraction"):
            whole.split(*wrong)
    for wrong in (("0.2",), ([0.5, "half"],)):
        with pytest.raises(TypeError, match="split takes the fractions of the parts"):
            whole.split(*wrong)


def test_transforms_of_every_part() -> None:
    whole = ImageList([(f"{i}.jpg", i % 2) for i in range(40)], str)
    parts = whole.split(0.5, 0.25, 0.25, transforms=(int, None, str))
    assert [part.transform for part in parts] == [int, None, str] and whole.transform is str


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_several_labels_are_shared_out(seed: int) -> None:
    """Each label's share is right within one photo per label that is rarer; nothing is lost."""
    generator = torch.Generator().manual_seed(seed)
    hot = (torch.rand(200, 5, generator=generator) < torch.tensor([0.5, 0.3, 0.1, 0.05, 0.02])).float()
    labels = [tuple(row.nonzero().flatten().tolist()) for row in hot]
    parts = stratified(labels, [0.6, 0.2, 0.2], seed)
    assert sorted(i for part in parts for i in part) == list(range(200))
    for label in range(5):
        count = int(hot[:, label].sum())
        for part, fraction in zip(parts, (0.6, 0.2, 0.2), strict=True):
            assert abs(int(hot[part, label].sum()) - fraction * count) <= 5
    # The rarest is right to within a photo.
    rarest = int(hot.sum(dim=0).where(hot.sum(dim=0) > 0, torch.tensor(1e9)).argmin())
    shares = [int(hot[part, rarest].sum()) for part in parts]
    wanted = [fraction * int(hot[:, rarest].sum()) for fraction in (0.6, 0.2, 0.2)]
    assert all(abs(share - right) <= 1 for share, right in zip(shares, wanted, strict=True))
