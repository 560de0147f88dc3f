"""Curves, average precision and intervals against scikit-learn and SciPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cnnrs
from cnnrs.training.metrics import wilson
from cnnrs.training.ranking import average_precision, curve
from cnnrs.training.several import several_labels, thresholds_of

metrics = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")

# Few different values, so that scores are equal, too.
SCORES = st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=2, max_size=60)


@given(SCORES)
@settings(max_examples=150, deadline=None)
def test_curve(rows: list[tuple[int, bool]]) -> None:
    scores, hits = torch.tensor([float(score) for score, _ in rows]), torch.tensor([hit for _, hit in rows])
    found = curve(scores, hits)
    if not bool(hits.any()):
        assert math.isnan(found.average_precision) and math.isnan(found.area)
        return
    assert found.average_precision == pytest.approx(metrics.average_precision_score(hits, scores), abs=1e-12)
    if bool(hits.all()):
        assert math.isnan(found.area)
    else:
        assert found.area == pytest.approx(metrics.roc_auc_score(hits, scores), abs=1e-12)
    threshold, f1 = found.best_f1()
    every = [metrics.f1_score(hits, scores >= value) for value in scores.unique()]
    assert f1 == pytest.approx(max(every), abs=1e-12)
    assert metrics.f1_score(hits, scores >= threshold) == pytest.approx(f1, abs=1e-12)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=50))
@settings(max_examples=100, deadline=None)
def test_confusion(rows: list[tuple[int, int]]) -> None:
    true, taken = np.array(rows).T
    found = cnnrs.confusion(true, taken, ["a", "b", "c"])
    present = sorted(set(true))
    recall = metrics.recall_score(true, taken, labels=present, average="macro")
    assert found.balanced_accuracy == pytest.approx(100 * recall)
    wanted = metrics.f1_score(true, taken, labels=present, average="macro", zero_division=0)
    assert found.macro_f1 == pytest.approx(100 * wanted)
    assert found.baseline == pytest.approx(100 * max(np.bincount(true)) / len(true))
    hit = {i for i, j in rows if i == j}
    assert found.missed == [name for i, name in enumerate("abc") if i in present and i not in hit]


@pytest.mark.parametrize(("right", "total"), [(0, 1), (1, 1), (0, 20), (13, 20), (20, 20), (9830, 10000)])
def test_interval(right: int, total: int) -> None:
    wanted = stats.binomtest(right, total).proportion_ci(0.95, method="wilson")
    assert wilson(right, total) == pytest.approx((100 * wanted.low, 100 * wanted.high), abs=1e-4)


def test_nothing_was_measured() -> None:
    found = cnnrs.confusion([], [], ["a", "b"])
    for value in (found.accuracy, found.balanced_accuracy, found.macro_f1, found.baseline, *found.interval):
        assert math.isnan(value)


def test_several_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(200, 4, generator=generator) < torch.tensor([0.5, 0.1, 0.9, 0.3])).float()
    scores = 2 * labels - 1 + torch.randn(200, 4, generator=generator)
    limits = thresholds_of(scores, labels)
    found = several_labels(scores, labels, ["a", "b", "c", "d"], limits)
    taken = scores.sigmoid() >= limits
    assert found.mean_average_precision == pytest.approx(
        100 * metrics.average_precision_score(labels, scores), abs=1e-9
    )
    assert found.macro_f1 == pytest.approx(100 * metrics.f1_score(labels, taken, average="macro"), abs=1e-9)
    assert found.exact == pytest.approx(100 * metrics.accuracy_score(labels, taken), abs=1e-4)
    # Chosen on these very rows, they are at least as good as one half.
    assert found.macro_f1 >= several_labels(scores, labels).macro_f1
    assert average_precision(scores, labels) == pytest.approx([one.average_precision / 100 for one in found.classes])
    assert "mean average precision" in str(found) and str(found).count("\n") == 5
