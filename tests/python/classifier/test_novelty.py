"""Distances to what was trained on against all pairs at once, and what is marked as unknown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.neighbors import NearestNeighbors

from cnnrs.classifier.novelty import Novelty


def clouds(rows: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (np.eye(8)[rng.integers(0, 2, rows)] * 4 + rng.normal(size=(rows, 8)) * 0.5).astype(np.float32)


def test_distances_and_threshold() -> None:
    train, valid, more = clouds(500, 0), clouds(300, 1), clouds(50, 2)
    found = Novelty.of(train, valid)
    theirs = NearestNeighbors(n_neighbors=5, metric="cosine").fit(train)
    # Rows are kept as float16: 2 ** -11 relative each.
    np.testing.assert_allclose(found.score(more).numpy(), theirs.kneighbors(more)[0][:, -1], atol=1e-3)
    farther = (found.score(valid) > found.threshold).sum()
    assert farther in (2, 3), "one in a hundred of 300"
    assert (found.score(-more) > found.threshold).all()
    assert found.score(more).dtype == torch.float32


def test_without_validation_rows_the_others_measure() -> None:
    train = clouds(400, 0)
    found = Novelty.of(train)
    theirs = NearestNeighbors(n_neighbors=6, metric="cosine").fit(train).kneighbors(train)[0][:, -1]
    assert found.threshold == pytest.approx(np.quantile(theirs, 0.99, method="higher"), abs=1e-3)


def test_so_many_rows_are_remembered_and_kept_in_a_file(tmp_path: Path) -> None:
    train, valid = clouds(500, 0), clouds(300, 1)
    found = Novelty.of(train, valid, most_rows=64)
    assert found.rows.shape == (64, 8) and found.rows.dtype == torch.float16
    assert torch.equal(found.rows, Novelty.of(train, valid, most_rows=64).rows)
    assert not torch.equal(found.rows, Novelty.of(train, valid, most_rows=64, seed=1).rows)
    save_file(found.state(), tmp_path / "novelty.safetensors")
    again = Novelty.from_state(load_file(tmp_path / "novelty.safetensors"))
    assert again.threshold == found.threshold and torch.equal(again.score(valid), found.score(valid))


def test_few_rows() -> None:
    one = Novelty.of(np.eye(3)[:1], np.eye(3))
    assert one.score(np.eye(3)).tolist() == pytest.approx([0, 1, 1])
    assert Novelty.of(np.eye(3)).threshold == pytest.approx(1)
    assert Novelty.of(np.zeros((4, 3)), np.zeros((2, 3))).threshold == 1


def test_what_is_wrong_is_said() -> None:
    found = Novelty.of(np.eye(3))
    with pytest.raises(ValueError, match="features of 3 numbers per row are known, got 4"):
        found.score(np.eye(4))
    with pytest.raises(ValueError, match="row 0 of the features holds NaN"):
        found.score(np.full((2, 3), np.nan))
    with pytest.raises(ValueError, match="one row has no others to be measured against: give valid_features"):
        Novelty.of(np.eye(3)[:1])
    with pytest.raises(ValueError, match="quantile must be above 0 and at most 1, got 99"):
        Novelty.of(np.eye(3), quantile=99)
    with pytest.raises(ValueError, match="this is no state of a Novelty: 'k'"):
        Novelty.from_state({"rows": torch.eye(3)})
    with pytest.raises(ValueError, match="this is no state of a Novelty: k is 4 for rows of shape"):
        Novelty.from_state({"rows": torch.eye(3), "k": torch.tensor(4), "threshold": torch.tensor(0.5)})
