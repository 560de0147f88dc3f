"""Heads that are solved for: scikit-learn's on the same features say the same."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone, is_classifier
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import cnnrs
from cnnrs.classifier import logistic, ridge
from cnnrs.classifier.labelled import Standard, Targets
from cnnrs.classifier.neighbours import Neighbours
from cnnrs.classifier.probe import PROBE_HEADS, Probe
from cnnrs.classifier.scores import sharpness
from cnnrs.training.metrics import calibration


def data(rows: int, width: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Clouds that overlap, far from zero and of unequal size: what a head has to cope with."""
    rng = np.random.default_rng(seed)
    labels = np.minimum(rng.integers(0, classes + 2, rows), classes - 1)
    fixed = np.random.default_rng(classes)
    centres, noise = fixed.normal(size=(classes, width)), fixed.uniform(0.2, 2, width)
    features = 3 + 0.5 * centres[labels] + rng.normal(size=(rows, width)) * noise
    return features.astype(np.float32), labels


def spread_of(features: np.ndarray) -> float:
    """What a row's squared distance from the mean is on average: penalties are in this unit."""
    return float(features.astype(np.float64).var(axis=0).sum())


SHAPES = [(300, 20), (40, 90)]


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_logistic_is_that_of_scikit_learn(rows: int, width: int, classes: int, balance: bool) -> None:
    features, labels = data(rows, width, classes)
    more, _ = data(200, width, classes, seed=1)
    for penalty in (1e-1, 1e-3):
        ours = Probe(penalty=penalty, balance=balance).fit(features, labels)
        theirs = LogisticRegression(
            C=1 / (rows * penalty * spread_of(features)), tol=1e-8, max_iter=10_000,
            class_weight="balanced" if balance else None,
        ).fit(features.astype(np.float64), labels)  # fmt: skip
        # Float32 scores of some 5 in size, and where L-BFGS stops: slopes of 1e-6 over a curvature of 1e-3.
        np.testing.assert_allclose(ours.predict_proba(more), theirs.predict_proba(more), atol=1e-3)
        layer = ours.module()
        assert isinstance(layer, torch.nn.Linear)
        weight = layer.weight.detach().numpy()
        if classes == 2:
            weight = weight[1:] - weight[:1]
        np.testing.assert_allclose(weight, theirs.coef_, atol=5e-3 * np.abs(theirs.coef_).max())
        assert (ours.predict(more) == theirs.predict(more)).mean() > 0.99


@pytest.mark.parametrize("balance", [False, True])
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_ridge_is_that_of_scikit_learn(rows: int, width: int, classes: int, balance: bool) -> None:
    features, labels = data(rows, width, classes)
    more, _ = data(200, width, classes, seed=1)
    for penalty in (1e-1, 1e-4):
        ours = Probe("ridge", penalty=penalty, balance=balance).fit(features, labels)
        theirs = RidgeClassifier(
            alpha=rows * penalty * spread_of(features), class_weight="balanced" if balance else None
        ).fit(features.astype(np.float64), labels)
        said, wanted = ours.decision_function(more), theirs.decision_function(more)
        # Ours are sharpened by one factor.
        sharp = (said * wanted).sum() / (wanted**2).sum()
        assert sharp > 0
        np.testing.assert_allclose(said / sharp, wanted, atol=2e-4)
        assert (ours.predict(more) == theirs.predict(more)).all()


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("k", [1, 5])
def test_knn_is_that_of_scikit_learn(classes: int, k: int) -> None:
    features, labels = data(400, 16, classes)
    more, _ = data(200, 16, classes, seed=1)
    features, more = features - 3, more - 3
    ours = Probe("knn", k=k).fit(features, labels)
    theirs = KNeighborsClassifier(k, metric="cosine").fit(features, labels)
    shares = np.sort(theirs.predict_proba(more), axis=1)
    clear = shares[:, -1] > shares[:, -2]
    assert clear.mean() > 0.6
    assert (ours.predict(more) == theirs.predict(more))[clear].all()
    stored = cnnrs.Features(torch.from_numpy(features), torch.from_numpy(labels))
    assert (ours.predict(more) == stored.knn(k, torch.from_numpy(more)).numpy()).all()
    assert (ours.penalty_, ours.k_) == (None, k)


@pytest.mark.parametrize("balance", [False, True])
def test_several_labels_are_one_against_the_rest(balance: bool) -> None:
    features, kinds = data(300, 12, 4)
    labels = np.stack([kinds == 0, kinds > 1, features[:, 0] > 4], axis=1).astype(int)
    more, _ = data(200, 12, 4, seed=1)
    ours = Probe(penalty=1e-2, balance=balance).fit(features, labels)
    theirs = OneVsRestClassifier(
        LogisticRegression(
            C=1 / (300 * 1e-2 * spread_of(features)), tol=1e-8, class_weight="balanced" if balance else None
        )
    ).fit(features, labels)
    np.testing.assert_allclose(ours.predict_proba(more), theirs.predict_proba(more), atol=1e-3)
    taken = ours.predict(more)
    assert taken.shape == (200, 3) and set(np.unique(taken)) == {0, 1}
    assert (taken == theirs.predict(more)).mean() > 0.99
    assert ours.score(features, labels) == (ours.predict(features) == labels).all(axis=1).mean()


@pytest.mark.parametrize("head", ["ridge", "knn"])
def test_several_labels_with_other_heads(head: str) -> None:
    features, kinds = data(400, 12, 4)
    labels = np.stack([kinds == 0, kinds > 1, kinds == 1], axis=1).astype(int)
    more, kinds = data(200, 12, 4, seed=1)
    more_labels = np.stack([kinds == 0, kinds > 1, kinds == 1], axis=1).astype(int)
    plain = Probe(head).fit(features, labels)
    if head == "knn":
        theirs: Any = KNeighborsClassifier(plain.k_, metric="cosine").fit(features, labels)
    else:
        theirs = RidgeClassifier(alpha=400 * float(plain.penalty_ or 0) * spread_of(features)).fit(features, labels)
    assert (plain.predict(more) == theirs.predict(more)).mean() > 0.999
    # Rare labels are said more often where all weigh the same, and found more often.
    even = Probe(head, balance=True).fit(features, labels)
    rare = more_labels.mean(axis=0) < 0.5
    assert (even.predict(more).sum(axis=0) >= plain.predict(more).sum(axis=0))[rare].all()


def test_one_factorisation_serves_all_penalties_and_any_labels() -> None:
    """A class more or less, or corrected labels: nothing is computed from the rows but products with the targets."""
    features, labels = data(500, 30, 5)
    rows = Standard.of(torch.from_numpy(features)).rows
    factor = ridge.Factor.of(rows, torch.ones(500, dtype=torch.float64))
    joined = np.minimum(labels, 3)
    for kinds, penalty in itertools.product((labels, joined, labels == 2), (1e-1, 1e-4)):
        targets = Targets.of(kinds, 500)
        weight, bias = factor.solve(2 * targets.columns() - 1, penalty)
        theirs = RidgeClassifier(alpha=500 * penalty).fit(rows.double().numpy(), kinds)
        np.testing.assert_allclose(weight.numpy(), np.atleast_2d(theirs.coef_), atol=2e-4)
        np.testing.assert_allclose(bias.numpy(), theirs.intercept_, atol=2e-4)


@pytest.mark.parametrize("head", ["logistic", "ridge"])
def test_the_penalty_is_the_best_for_the_validation_rows(head: str) -> None:
    features, labels = data(120, 60, 3)
    # Some that are wrong: neither no penalty nor the strongest is best.
    labels[::7] = 0
    valid = data(300, 60, 3, seed=1)
    valid[1][::7] = 0
    chosen = Probe(head).fit(features, labels, valid)
    losses = {p: Probe(head, penalty=p).fit(features, labels, valid).loss_ for p in logistic.PENALTIES}
    least = min(filter(None, losses.values()))
    assert logistic.PENALTIES[0] > chosen.penalty_ > logistic.PENALTIES[-1]  # type: ignore[operator]
    # The path is followed to about a hundredth.
    assert chosen.loss_ == pytest.approx(least, rel=0.02)
    # What was held out trains nothing: the head is that of its penalty on the first rows alone.
    again = Probe(head, penalty=chosen.penalty_).fit(features, labels, valid)
    np.testing.assert_allclose(again.predict_proba(features), chosen.predict_proba(features), atol=1e-3)
    assert chosen.loss_ == pytest.approx(log_loss(valid[1], chosen.predict_proba(valid[0])), rel=0.02)


def test_of_many_rows_a_share_chooses_the_penalty_and_all_are_solved_for() -> None:
    features, labels = data(12_000, 30, 3)
    labels[::7] = 0
    # A class of so few rows that a share of them may have none.
    labels[:2] = 3
    valid = data(3_000, 30, 3, seed=1)
    valid[1][::7] = 0
    chosen = Probe().fit(features, labels, valid)
    losses = [Probe(penalty=p).fit(features, labels, valid).loss_ or 0 for p in logistic.PENALTIES[3:12:4]]
    assert chosen.loss_ == pytest.approx(min(losses), rel=0.01)
    # Chosen by 8,192 of them, and less for all, in proportion.
    assert any(chosen.penalty_ == pytest.approx(p * 8192 / 12_000) for p in logistic.PENALTIES)
    again = Probe(penalty=chosen.penalty_).fit(features, labels, valid)
    assert chosen.loss_ == pytest.approx(again.loss_, rel=1e-3)


def test_k_is_the_best_for_the_validation_rows() -> None:
    features, labels = data(400, 16, 3)
    valid = data(300, 16, 3, seed=1)
    chosen = Probe("knn").fit(features, labels, valid)
    losses = {k: Probe("knn", k=k).fit(features, labels, valid).loss_ for k in (1, 3, 5, 9, 15, 25, 49)}
    assert chosen.k_ == min(losses, key=lambda k: losses[k] or 0)
    assert chosen.loss_ == losses[chosen.k_]


@pytest.mark.parametrize("head", ["ridge", "knn"])
def test_probabilities_mean_something(head: str) -> None:
    """Of predictions that are about 80 % sure, about 80 % are right."""
    features, labels = data(2000, 10, 2)
    more, true = data(2000, 10, 2, seed=1)
    probabilities = torch.from_numpy(Probe(head).fit(features, labels).predict_proba(more))
    assert calibration(probabilities, torch.from_numpy(true)).error < 4


def test_sharpness_has_the_least_loss() -> None:
    from scipy.optimize import minimize_scalar

    features, labels = data(200, 10, 3)
    scores = torch.from_numpy(features[:, :3].astype(np.float64))
    targets = Targets.of(labels, 200)
    doubt = 1 / 202

    def loss(exponent: float) -> float:
        logs = (scores * float(np.exp(exponent))).log_softmax(dim=1)
        right = logs.gather(1, targets.values[:, None])[:, 0]
        return float(-((1 - doubt) * right + doubt * logs.mean(dim=1)).mean())

    factor, _ = sharpness(scores, targets, targets.weights(False))
    assert np.log(factor) == pytest.approx(minimize_scalar(loss, bounds=(-9, 9), method="bounded").x, abs=1e-3)
    # Everything is right: sure, but not infinitely.
    perfect = torch.nn.functional.one_hot(targets.values).double()
    factor, loss_of_it = sharpness(perfect, targets, targets.weights(False))
    assert 1e-4 < loss_of_it < 0.05 and factor < 20


@pytest.mark.parametrize("head", PROBE_HEADS)
def test_scikit_learn_takes_it(head: str) -> None:
    features, labels = data(150, 8, 3)
    names = np.array(["ant", "bee", "cat"])[labels]
    ours = Probe(head, seed=3)
    copy = clone(ours)
    assert copy is not ours and copy.get_params() == ours.get_params() and is_classifier(ours)
    scores = cross_val_score(ours, features, names, cv=3)
    assert scores.min() > 0.5
    pipeline = make_pipeline(StandardScaler(), Probe(head)).fit(features, names)
    assert pipeline.score(features, names) > 0.5
    search = GridSearchCV(Probe(head), {"balance": [False, True]}, cv=3, scoring="neg_log_loss").fit(features, names)
    assert set(search.best_params_) == {"balance"}
    assert ours.set_params(balance=True) is ours and ours.balance
    with pytest.raises(ValueError, match="there is no parameter 'C', only head, penalty, balance, k, seed"):
        ours.set_params(C=1)


@pytest.mark.parametrize("head", PROBE_HEADS)
def test_forms_of_features_and_labels(head: str, tmp_path: Path) -> None:
    """Half floats in a file, (N, C, H, W), lists, strings and any integers: the same head."""
    features, labels = data(120, 12, 3)
    half = features.astype(np.float16)
    plain = cnnrs.probe(half.astype(np.float32), labels, head).predict_proba(half)
    np.save(tmp_path / "features.npy", half.reshape(120, 3, 2, 2))
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    same = cnnrs.probe(mapped, labels, head)
    # Float16 rows are kept as float16 by "knn" only.
    np.testing.assert_allclose(same.predict_proba(mapped), plain, atol=0.02 if head == "knn" else 1e-6)
    stored = cnnrs.Features(torch.from_numpy(half), torch.from_numpy(labels))
    assert (cnnrs.probe(stored, head=head).predict(stored) == same.predict(mapped)).all()
    named = cnnrs.probe(features.tolist(), [f"kind {label}" for label in labels], head)
    assert (
        named.predict(features) == [f"kind {label}" for label in cnnrs.probe(features, labels, head).predict(features)]
    ).all()
    assert named.classes_.tolist() == ["kind 0", "kind 1", "kind 2"]
    backwards = np.ascontiguousarray(features[::-1])[::-1].astype(">f4")
    assert (
        cnnrs.probe(backwards, labels, head).predict(features) == cnnrs.probe(features, labels, head).predict(features)
    ).all()
    odd = cnnrs.probe(features, torch.from_numpy(labels * 7 - 3), head)
    assert odd.classes_.tolist() == [-3, 4, 11] and set(odd.predict(features)) <= {-3, 4, 11}


@pytest.mark.parametrize("head", PROBE_HEADS)
@pytest.mark.parametrize("several", [False, True])
def test_the_module_is_the_probe(head: str, several: bool) -> None:
    features, kinds = data(100, 9, 3)
    labels = np.stack([kinds == 0, kinds > 1], axis=1).astype(int) if several else kinds
    found = cnnrs.probe(features, labels, head)
    module = found.module()
    assert not module.training
    with torch.no_grad():
        scores = module(torch.from_numpy(features))
    probabilities = scores.sigmoid() if several else scores.softmax(dim=1)
    assert torch.equal(probabilities, torch.from_numpy(found.predict_proba(features)))
    if isinstance(module, Neighbours):
        again: torch.nn.Module = Neighbours(100, 9, labels.max() + 1 if not several else 2, module.k, several)
    else:
        again = torch.nn.Linear(9, 2 if several else 3)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(torch.from_numpy(features)), scores)


@pytest.mark.parametrize("head", PROBE_HEADS)
def test_the_same_seed_gives_the_same_bits(head: str) -> None:
    features, labels = data(150, 20, 3)
    first, second, other = (Probe(head, seed=seed).fit(features, labels) for seed in (0, 0, 1))
    for one, two in zip(first.module().state_dict().values(), second.module().state_dict().values(), strict=True):
        assert torch.equal(one, two)
    assert first.loss_ == second.loss_ != other.loss_


@pytest.mark.parametrize("head", PROBE_HEADS)
def test_nothing_that_is_given_is_changed(head: str) -> None:
    features, labels = data(60, 5, 2)
    more, kinds = data(30, 5, 2, seed=1)
    given = [torch.from_numpy(one).clone() for one in (features, labels, more, kinds)]
    found = Probe(head).fit(given[0], given[1], (given[2], given[3]))
    found.predict_proba(given[2])
    found.score(given[0], given[1])
    for one, other in zip(given, (features, labels, more, kinds), strict=True):
        assert torch.equal(one, torch.from_numpy(other))


def test_a_fifth_is_held_out_of_every_class_and_images_stay_whole() -> None:
    targets = Targets.of([0] * 50 + [1] * 10 + [2], 61)
    train, held = targets.hold_out(0.2, 0)
    assert sorted([*train.tolist(), *held.tolist()]) == list(range(61))
    assert targets.values[held].bincount(minlength=3).tolist() == [10, 2, 0]
    passes = cnnrs.Features(torch.rand(60, 4), torch.arange(60) % 2, paths=[f"{i % 30}.jpg" for i in range(60)])
    train, held = Targets.of(passes.labels, 60).hold_out(0.2, 0, passes)
    assert not {i % 30 for i in train.tolist()} & {i % 30 for i in held.tolist()}
    many = Targets.of(torch.eye(5).repeat(10, 1), 50)
    _, held = many.hold_out(0.2, 0)
    assert many.values[held].sum(dim=0).tolist() == [2.0] * 5


@pytest.mark.parametrize("head", PROBE_HEADS)
def test_few_and_strange_rows(head: str) -> None:
    """One row per class, features that are the same for all, a column that never changes, rows without length."""
    one_each = cnnrs.probe(np.eye(4), list("abcd"), head)
    assert one_each.loss_ is None
    assert (one_each.predict(np.eye(4)) == list("abcd")).all()
    features, labels = data(90, 6, 2)
    features[:, 2] = 1e4
    features[4] = 0
    assert cnnrs.probe(features, labels, head).score(features, labels) > 0.6
    same = cnnrs.probe(np.ones((90, 3)), [0] * 60 + [1] * 30, head).predict_proba(np.ones((1, 3)))
    assert np.isfinite(same).all()
    if head != "knn":
        # Nothing to tell them apart by but how frequent they are.
        assert same[0, 0] > 0.55
    repeated = np.repeat(features[:10], 9, axis=0)
    assert np.isfinite(cnnrs.probe(repeated, np.repeat(labels[:10], 9), head).predict_proba(repeated)).all()
    twice = np.concatenate([features, features], axis=1)
    for penalty in (None, 1e-15):
        assert cnnrs.probe(twice, labels, head, penalty=penalty).score(twice, labels) > 0.6
    huge = cnnrs.probe(features * 1e15, labels, head)
    assert huge.score(features * 1e15, labels) > 0.6


@pytest.mark.parametrize("head", PROBE_HEADS)
@pytest.mark.parametrize("labels", [np.arange(40) % 2, np.stack([np.arange(40) % 2, np.zeros(40), np.ones(40)], 1)])
def test_classes_without_rows(head: str, labels: np.ndarray) -> None:
    features, _ = data(40, 5, 2)
    features[:, 0] += 9 * (np.arange(40) % 2)
    if labels.ndim == 2:
        found = cnnrs.probe(features, labels, head)
    else:
        found = cnnrs.probe(features, labels, head, classes=range(4))
        assert found.classes_.tolist() == [0, 1, 2, 3]
    assert found.score(features, labels) >= 0.9
    assert found.predict_proba(features).shape == (40, 4 if labels.ndim == 1 else 3)
    if labels.ndim == 1:
        assert found.predict_proba(features)[:, 2:].max() < 0.1


GOOD = np.eye(6, dtype=np.float32)
HOLE = GOOD.copy()
HOLE[4, 1] = np.nan


@pytest.mark.parametrize(
    ("features", "labels", "options", "says"),
    [
        (GOOD, [0, 1], {}, r"every row needs one label: got 6 rows of features and labels of shape \(2,\)"),
        (HOLE, [0, 1] * 3, {}, "row 4 of the features holds NaN, infinity or a number beyond float32: leave it out"),
        (GOOD.astype(float) * 1e300, [0, 1] * 3, {}, "row 0 of the features holds NaN"),
        (GOOD, ["a"] * 6, {}, "at least two classes are needed, all 6 labels are"),
        (GOOD, [0.5, 1] * 3, {}, "labels must be integers or strings, got 0.5"),
        (GOOD, [np.nan, 1] * 3, {}, "labels must be integers or strings, got nan"),
        (GOOD, np.array([None, "a"] * 3, dtype=object), {}, "labels must all be integers or all be strings"),
        (GOOD, np.full((6, 2), 2), {}, r"labels of shape \(N, C\) must be zeros and ones"),
        (GOOD, np.zeros((6, 1, 1)), {}, r"labels must be \(N,\), or \(N, C\) .*, got shape \(6, 1, 1\)"),
        (GOOD[0], [0, 1] * 3, {}, r"features must be \(N, \.\.\.\) with .*, got shape \(6,\)"),
        (GOOD[:0], [], {}, r"features must be .*, got shape \(0, 6\)"),
        (GOOD, [0, 1] * 3, {"head": "forest"}, "head must be one of logistic, ridge, knn, got 'forest'"),
        (GOOD, [0, 1] * 3, {"penalty": 0}, "penalty must be a positive number, or None to have it chosen, got 0"),
        (GOOD, [0, 1] * 3, {"head": "knn", "k": 9}, "k must be between 1 and the . rows that vote, got 9"),
        (GOOD, None, {}, "labels are missing: only cnnrs.Features bring theirs, not a ndarray"),
        (GOOD, [0, 1] * 3, {"valid": (GOOD[:, :5], [0, 1] * 3)}, "6 numbers per row, the validation features 5"),
        (GOOD, [0, 1] * 3, {"valid": (GOOD, [0, 2] * 3)}, "validation features have .*2.*, which is none"),
        (GOOD, [0, 1] * 3, {"valid": (GOOD, GOOD)}, r"validation labels must be \(6,\) as the others, got \(6, 6\)"),
        (GOOD, [0, 1] * 3, {"valid": (HOLE, [0, 1] * 3)}, "row 4 of the validation features holds NaN"),
        (GOOD, [0, 1] * 3, {"classes": [0, 2]}, "labels of the features have .*1.*, which is none of the classes"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(features: Any, labels: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        cnnrs.probe(features, labels, **options)


def test_what_is_wrong_is_said_when_predicting() -> None:
    with pytest.raises(ValueError, match=r"nothing was fitted yet: call fit\(features, labels\)"):
        Probe().predict(GOOD)
    found = cnnrs.probe(GOOD, [0, 1] * 3, penalty=1e-2)
    with pytest.raises(ValueError, match="features of 6 numbers per row were fitted, got 5"):
        found.predict(GOOD[:, :5])
    with pytest.raises(ValueError, match=r"labels of shape \(6,\) are needed for these features, got \(5,\)"):
        found.score(GOOD, [0] * 5)
    for strange in (GOOD * 1j, np.array([["a"]]), torch.zeros(2, 2, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="features must be real numbers"):
            cnnrs.probe(strange, [0, 1])
    assert repr(Probe("ridge", balance=True)) == "Probe('ridge', balance=True)"
