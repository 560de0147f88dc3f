"""Rows that are alike against all pairs at once, groups against scipy's connected components."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

import cnnrs
from cnnrs.classifier import alike as module
from cnnrs.classifier.alike import Pair, alike, components


def numbered(groups: np.ndarray) -> list[int]:
    """By first row."""
    seen: dict[int, int] = {}
    return [seen.setdefault(int(group), len(seen)) for group in groups]


def brute(rows: np.ndarray, threshold: float) -> tuple[np.ndarray, list[int]]:
    """Cosines in the metric of the inverse covariance with a ridge, all at once; rows that are near share one vote."""
    apart = 1 - (directions := rows / np.linalg.norm(rows, axis=1, keepdims=True)) @ directions.T
    weights = 1 / (apart <= 0.15 * np.quantile(apart, 0.9, method="lower")).sum(axis=1)
    number = weights.sum()
    around = rows - weights @ rows / number * number**2 / (number**2 + 10)
    covariance = np.cov(rows.T, bias=True, aweights=weights)
    ridge = weights @ (around**2).sum(axis=1) / number / min(number, rows.shape[1], 500)
    inner = around @ np.linalg.inv(covariance + ridge * np.eye(rows.shape[1])) @ around.T
    length = np.sqrt(np.diag(inner))
    cosines = inner / length / length[:, None]
    return cosines, numbered(connected_components(coo_matrix(cosines >= threshold), directed=False)[1])


@pytest.mark.parametrize("block", [7, 64, 2048])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("width", [6, 300])
def test_groups_are_those_of_all_pairs(width: int, seed: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(6, width))
    centres = rng.normal(size=(40, 6))[rng.integers(0, 40, 200)]
    rows = 3 + (centres + 0.2 * rng.normal(size=(200, 6))) @ mixing + 0.01 * rng.normal(size=(200, width))
    cosines, groups = brute(rows, 0.97)
    assert 5 < len(set(groups)) < 190
    # Not where a cosine is the threshold up to rounding.
    assert np.abs(cosines - 0.97).min() > 2e-6
    pairs = alike(rows, 0.97)
    assert components(200, pairs) == groups
    assert len(pairs) == 200 - len(set(groups))
    assert pairs == sorted(pairs, key=lambda pair: -pair.similarity)
    for first, second, similarity in pairs:
        assert first < second and similarity == pytest.approx(cosines[first, second], abs=1e-5)
    if block == 2048:
        # The most similar ones of all come first.
        np.fill_diagonal(cosines, -1)
        assert pairs[0].similarity == pytest.approx(cosines.max(), abs=1e-5)


def test_many_copies_are_few_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 100)
    rows = torch.ones(1000, 3)
    rows[::2, 0] = -1
    pairs = alike(cnnrs.Features(rows.half(), torch.zeros(1000)))
    assert len(pairs) == 998
    assert components(1000, pairs) == [0, 1] * 500


@pytest.mark.parametrize("number", [1, 2, 3, 50])
def test_rows_that_are_the_same_are_alike_in_any_company(number: int) -> None:
    same = torch.randn(20, generator=torch.Generator().manual_seed(0)).repeat(number, 1)
    assert components(number, alike(same, 0.9999)) == [0] * number
    others = torch.randn(30, 20, generator=torch.Generator().manual_seed(1))
    pairs = alike(torch.cat([others, same]), 0.9999)
    assert components(30 + number, pairs) == [*range(30), *[30] * number]
    assert alike(torch.cat([same[:1], others[:1]])) == []


@pytest.mark.parametrize("number", [10, 40])
def test_a_burst_that_is_half_of_all(number: int) -> None:
    """Its differences are small beside those of photos, but as frequent."""
    generator = torch.Generator().manual_seed(0)
    strength = torch.arange(1, 201) ** -0.5
    photos, one = torch.randn(number, 200, generator=generator), torch.randn(200, generator=generator)
    burst = one + 0.15 * torch.randn(number, 200, generator=generator)
    groups = components(2 * number, alike(1 + torch.cat([photos, burst]) * strength))
    assert groups == [*range(number), *[number] * number]


@pytest.mark.parametrize("row", [2442, 2443])
def test_the_row_that_is_not_finite_is_named(row: int) -> None:
    """Whether it is among those that tell how rows differ, or not."""
    rows = torch.randn(5000, 8, generator=torch.Generator().manual_seed(0))
    rows[row, 3] = torch.nan
    with pytest.raises(ValueError, match=f"row {row} of the features holds NaN"):
        alike(rows)


def test_what_all_have_in_common_does_not_count() -> None:
    """Rows of a network whose features are all large: their cosines are all above 0.99."""
    generator = torch.Generator().manual_seed(0)
    rows = 10 + torch.rand(300, 64, generator=generator)
    rows[7] = rows[200] + 0.05 * torch.rand(64, generator=generator)
    assert [pair[:2] for pair in alike(rows)] == [(7, 200)]


def test_components() -> None:
    assert components(5, [Pair(3, 1, 1.0), Pair(1, 4, 1.0)]) == [0, 1, 2, 1, 1]
    assert components(0, []) == []
    with pytest.raises(IndexError, match="there are 2 rows, a pair names 0 and 2"):
        components(2, [Pair(0, 2, 1.0)])


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ValueError, match=r"threshold must be a cosine, from -1 to 1, got 95"):
        alike(torch.eye(2), 95)
    with pytest.raises(ValueError, match=r"row 1 of the features holds NaN"):
        alike(torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]))
    # Rows of zeros resemble nothing, not even each other.
    assert alike(torch.zeros(3, 4)) == []


def test_photos_that_were_saved_again(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    some = sorted(photos.glob("train/*/*.jpg"))[::17][:30]
    for i, path in enumerate(some):
        image = Image.open(path).convert("RGB")
        image.save(tmp_path / f"{i:02}-a.jpg", quality=95)
        small = image.resize((max(image.width * 2 // 3, 1), max(image.height * 2 // 3, 1)), Image.Resampling.LANCZOS)
        small.save(tmp_path / f"{i:02}-b.jpg", quality=80)
    data = cnnrs.ImageList(sorted(map(str, tmp_path.iterdir())))
    features = cnnrs.preconv(data, "efficientnet_lite0", verbose=False)
    pairs = alike(features)
    right = {(2 * i, 2 * i + 1) for i in range(len(some))}
    found = {(pair.first_row, pair.second_row) for pair in pairs}
    assert len(found & right) >= 0.95 * len(right) and len(found - right) <= 1
