"""Labels that were changed on purpose are found again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_predict

import cnnrs
from cnnrs.classifier.suspects import suspects


def clouds(rows: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, rows)
    return (np.eye(16)[labels] * 3 + rng.normal(size=(rows, 16))).astype(np.float32), labels


def flipped(labels: np.ndarray, classes: int, number: int, seed: int = 1) -> tuple[np.ndarray, set[int]]:
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(labels), number, replace=False)
    changed = labels.copy()
    changed[rows] = (changed[rows] + rng.integers(1, classes, number)) % classes
    return changed, set(rows.tolist())


@pytest.mark.parametrize("classes", [2, 5])
def test_flipped_labels_come_first(classes: int) -> None:
    features, labels = clouds(500, classes)
    given, rows = flipped(labels, classes, 20)
    names = [f"kind {i}" for i in range(classes)]
    paths = [f"{i}.jpg" for i in range(500)]
    stored = cnnrs.Features(torch.from_numpy(features), torch.from_numpy(given), paths)
    found = suspects(stored, given, names)
    assert len(rows & {one.row for one in found[:60]}) >= 18
    right = [one.proposed == f"kind {labels[one.row]}" for one in found if one.row in rows]
    assert np.mean(right) > 0.9
    for one in found:
        assert one.path == paths[one.row] and one.given == f"kind {given[one.row]}" != one.proposed
        assert 0 <= one.probability <= 1 and 0 <= one.agreement <= 1
    assert found == suspects(stored, given, names)
    assert found[:3] == suspects(stored, given, names, most=3)
    # The order is about that of scikit-learn's heads that have not seen the row.
    theirs = cross_val_predict(LogisticRegression(C=0.1), features, given, method="predict_proba")
    sure = theirs[np.arange(500), given]
    assert np.median(sure[[one.row for one in found[:20]]]) < 0.2 < np.median(sure)


def test_rows_of_one_group_do_not_judge_each_other() -> None:
    """Six copies of a photo with one wrong label look right to each other; as one group they do not."""
    features, labels = clouds(200, 2)
    given = labels.copy()
    features[:6], given[:6] = features[0], 1 - labels[0]
    alone = {one.row for one in suspects(features, given)}
    groups = [0] * 6 + list(range(6, 200))
    together = suspects(features, given, groups=groups)
    assert set(range(6)) <= {one.row for one in together[:20]}
    assert all(one.agreement < 0.5 for one in together if one.row < 6)
    assert len(alone & set(range(6))) <= 6


def test_few_rows_and_rare_classes() -> None:
    """A class with one row: no head that has not seen it can know it."""
    features, labels = clouds(60, 2)
    labels[0] = 2
    found = suspects(features, labels, ["a", "b", "c"])
    assert [one.given for one in found if one.row == 0] in ([], ["c"])
    assert suspects(np.eye(4), [0, 1, 0, 1], groups=[0, 0, 1, 1]) is not None
    named = suspects(features, np.array(["x", "y"])[labels % 2])
    assert {one.given for one in named} <= {"x", "y"}


def test_what_is_wrong_is_said() -> None:
    features, labels = clouds(30, 2)
    with pytest.raises(ValueError, match="every row needs one label"):
        suspects(features, labels[:5])
    with pytest.raises(ValueError, match="every row needs one group: got 30 rows and 4 groups"):
        suspects(features, labels, groups=[0, 1, 2, 3])
    with pytest.raises(ValueError, match="at least two classes are needed"):
        suspects(features, labels * 0)
    with pytest.raises(ValueError, match="where every photo has one label"):
        suspects(features, np.eye(30))
    with pytest.raises(ValueError, match="folds must be at least 2, got 1"):
        suspects(features, labels, folds=1)


def test_flipped_photos(photos: Path) -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    data = cnnrs.ImageFolder(str(photos / "train"))
    features = cnnrs.preconv(data, "efficientnet_lite0", verbose=False)
    labels = features.labels.numpy()
    for number in (12, 50):
        given, rows = flipped(labels, 2, number)
        first = suspects(features, given, data.classes)[: 3 * number]
        assert len(rows & {one.row for one in first}) >= 0.9 * number
