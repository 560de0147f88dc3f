"""Heads are chosen and measured by rows that had no say in them: on features made up for it."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cnnrs.app.jobs.clock import Clock
from cnnrs.app.jobs.deal import deal, join
from cnnrs.app.jobs.judge import Verdict, judge
from cnnrs.app.jobs.measure import Measured, measure
from cnnrs.app.jobs.photos import Part
from cnnrs.classifier.alike import Pair
from cnnrs.classifier.heads import new_head
from cnnrs.classifier.names import HEADS
from cnnrs.classifier.train_head import HeadOptions
from cnnrs.data.feature_dataset import FeatureDataset
from cnnrs.features.features import Features
from cnnrs.training.several import thresholds_of

WIDTH = 16


def clouds(counts: Sequence[int], distance: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of as many classes, in clouds of deviation 1 this far apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    centres = torch.eye(len(counts), WIDTH) * distance / 2**0.5
    return centres[labels] + torch.randn(len(labels), WIDTH, generator=generator), labels


def measured(
    rows: tuple[Tensor, Tensor], kinds: Sequence[str] = ("linear",), parts: Sequence[Part | None] | None = None,
    groups: Sequence[int] | None = None, test: float | None = None, also: Sequence[str] = (), **options: Any,
) -> Measured:  # fmt: skip
    """What training on these rows gives."""
    features, labels = rows
    classes = labels.shape[1] if labels.dim() == 2 else int(labels.max()) + 1
    makers = {kind: (lambda kind=kind: new_head(kind, features.shape[1], classes)) for kind in HEADS}
    return measure(
        FeatureDataset(features, labels), parts or [None] * len(labels), groups or range(len(labels)), kinds, makers,
        HeadOptions(classes, **options), None, test, Clock(), lambda text: None, also,
    )  # fmt: skip


def verdict(rows: tuple[Tensor, Tensor], **options: Any) -> Verdict:
    """Its numbers."""
    found = measured(rows, **options)
    labels = rows[1][found.rows]
    return judge(found.scores, labels, [f"c{i}" for i in range(found.scores.shape[1])], found.thresholds)


@pytest.mark.parametrize("kinds", [("linear",), ("knn",), ("linear", "logistic", "ridge")])
@pytest.mark.parametrize("count", [60, 200])
def test_labels_that_mean_nothing_are_not_learnt(kinds: tuple[str, ...], count: int) -> None:
    """By folds and by a third part: half are right, whatever the rows that were trained on say."""
    found = verdict(clouds([count, count], 0.0), kinds=kinds, epochs=30)
    # Fair coins, within four standard deviations.
    assert abs(found.facts["accuracy"] - 50) < 4 * 50 / found.confusion.matrix.sum() ** 0.5  # type: ignore[union-attr]
    assert any("always saying" in text for text in found.warnings)


@pytest.mark.parametrize("kinds", [("linear",), ("linear", "mlp", "logistic", "ridge")])
def test_what_measures_has_no_say(kinds: tuple[str, ...]) -> None:
    features, labels = clouds([200, 200], 3.0)
    parts: list[Part | None] = [("train", "valid", "test")[i % 3] for i in range(400)]  # type: ignore[misc]
    before = measured((features, labels), kinds, parts)
    test = torch.tensor([part == "test" for part in parts])
    changed = torch.where(test[:, None], -features, features), torch.where(test, 1 - labels, labels)
    other = measured(changed, kinds, parts)
    assert before.trained.kind == other.trained.kind
    for ours, theirs in zip(before.trained.module.parameters(), other.trained.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_auto_takes_the_least_loss_of_those_it_may() -> None:
    found = measured(clouds([200, 200], 2.0), ("linear", "ridge"), also=("logistic", "knn"))
    losses = {one.kind: one.loss for one in found.tried}
    assert set(losses) == {"linear", "ridge", "logistic", "knn"}
    assert found.trained.kind == min(("linear", "ridge"), key=losses.__getitem__)
    assert found.trained.loss == pytest.approx(losses[found.trained.kind])


def test_a_rare_class_is_spoken_of() -> None:
    rows = clouds([190, 10], 0.0)
    found = verdict(rows, kinds=("logistic",))
    assert found.facts["baseline"] == 95.0 and found.facts["balanced_accuracy"] < 65
    assert any("always saying c0" in text for text in found.warnings)


def test_balance_finds_the_rare() -> None:
    rows = clouds([600, 40], 2.0)
    recall = {
        balance: verdict(rows, balance=balance, epochs=30).confusion.recall[1]  # type: ignore[union-attr]
        for balance in ("none", "loss", "sampler")
    }
    assert min(recall["loss"], recall["sampler"]) > recall["none"] + 10


def test_copies_are_not_learnt_by_heart() -> None:
    """Four copies of each row: a neighbour that is the row itself would know all labels."""
    features, labels = torch.randn(300, 256, generator=torch.Generator().manual_seed(0)), torch.arange(300) % 2
    rows = features.repeat(4, 1), labels.repeat(4)
    groups, pairs, notes = join(Features(*rows), None)
    assert len(pairs) == 900 and not notes
    assert verdict(rows, kinds=("knn",)).facts["accuracy"] > 95
    # 45 originals: four standard deviations are 30 points.
    assert verdict(rows, kinds=("knn",), groups=groups).facts["accuracy"] < 80


def test_what_the_user_says_belongs_together() -> None:
    features, labels = clouds([3, 3], 0.0)
    groups, _, _ = join(Features(features, labels), ["a", "b", "a", "b", "c", "d"])
    assert groups[0] == groups[2] and groups[1] == groups[3] and len(set(groups)) == 4


def test_half_of_all_pictures_in_one_chain_are_no_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = [Pair(0, 1, 1.0), *(Pair(row, row + 1, 0.8) for row in range(1, 50))]
    monkeypatch.setattr("cnnrs.app.jobs.deal.alike", lambda features, threshold: chain)
    groups, pairs, notes = join(Features(torch.randn(100, WIDTH), torch.arange(100) % 2), None)
    assert len(set(groups)) == 99 and pairs == chain[:1]
    assert len(notes) == 1 and "51 of 100 photos are so alike" in notes[0]


def test_what_belongs_together_is_not_known_from_its_neighbour() -> None:
    """Eight leaves of each plant, and nothing but the plant says whether it is sick."""
    generator = torch.Generator().manual_seed(0)
    plants = torch.arange(320) // 8
    rows = 2 * torch.randn(40, WIDTH, generator=generator)[plants] + torch.randn(320, WIDTH, generator=generator)
    assert verdict((rows, plants % 2), kinds=("knn",)).facts["accuracy"] > 85
    assert verdict((rows, plants % 2), kinds=("knn",), groups=plants.tolist()).facts["accuracy"] < 75


def test_training_ends_when_validation_no_longer_improves() -> None:
    found = measured(clouds([300, 300], 1.0))
    assert found.trained.best + 1 < len(found.trained.history) < 100
    assert "had not improved for" in found.trained.stopped
    few = measured(clouds([300, 300], 1.0), epochs=3).trained
    assert len(few.history) == 3 and few.stopped == "all 3 epochs were made"
    losses = found.trained.history.val_losses
    assert losses[found.trained.best] == min(losses)


def test_small_sets_are_trained_to_the_end() -> None:
    """An epoch is twenty passes over few rows."""
    rows = clouds([15, 15], 4.0)
    found = measured(rows)
    assert found.trained.history.train_losses[-1] < 0.2 < measured(rows, epochs=3).trained.history.train_losses[-1]
    assert found.how == "photos, each by a classifier that had not seen it (5 folds)"
    assert sorted(found.rows.tolist()) == list(range(30)) and len(found.split.train) == 30


def test_a_class_that_is_missing_from_training() -> None:
    """Both rows of a class in one group: heads in closed form have no row of it, and never name it."""
    features, labels = clouds([20, 20, 2], 4.0)
    groups = [*range(40), 40, 40]
    for kind in ("logistic", "ridge", "knn", "linear"):
        found = measured((features, labels), (kind,), groups=groups, epochs=5)
        assert found.scores.shape == (42, 3) and bool(found.scores.isfinite().all())


@pytest.mark.parametrize(
    ("parts", "counts"),
    [
        ([None] * 100, (70, 15, 15)),
        (["train"] * 60 + ["test"] * 40, (51, 9, 40)),
        (["train"] * 50 + ["valid"] * 30 + ["test"] * 20, (50, 30, 20)),
        # One more class, beside folders for training and measuring.
        (["train"] * 40 + ["test"] * 20 + [None] * 40, (62, 12, 26)),
    ],
)
def test_parts(parts: list[Part | None], counts: tuple[int, ...]) -> None:
    labels = torch.arange(100) % 2
    split = deal(labels, parts, range(100), 0.15, 0.15, seed=0)
    assert tuple(map(len, split)) == counts
    for row, part in enumerate(parts):
        assert part in (None, "train") or row in getattr(split, part)


def test_copies_of_photos_that_measure_are_left_out() -> None:
    rows = clouds([100, 100], 3.0)
    parts: list[Part | None] = ["test" if i % 4 == 0 else "train" for i in range(200)]
    groups = [i // 4 if i % 4 < 2 else 1000 + i for i in range(200)]
    found = measured(rows, parts=parts, groups=groups)
    assert len(found.split.test) == 50 and len(found.split.train) + len(found.split.valid) == 100


def test_several_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(400, 3, generator=generator) < torch.tensor([0.5, 0.2, 0.1])).float()
    features = torch.randn(400, WIDTH, generator=generator)
    features[:, :3] += 4 * labels
    for kinds in (("linear",), ("logistic",), ("ridge",), ("knn",)):
        found = verdict((features, labels), kinds=kinds, balance="loss", epochs=40, lr=0.01)
        assert found.facts["mean_average_precision"] > 80
        assert found.several is not None and len(found.facts["thresholds"]) == 3
    few = verdict((features[:100], labels[:100]), kinds=("logistic",))
    assert few.facts["mean_average_precision"] > 70


def test_copies_are_kept_where_nothing_else_is_there() -> None:
    parts: list[Part | None] = ["test" if i % 2 else "train" for i in range(40)]
    found = measured(clouds([20, 20], 3.0), parts=parts, groups=[i // 2 for i in range(40)], epochs=2)
    assert len(found.split.train) + len(found.split.valid) == 20 and "looks better than it is" in found.note


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_few_groups_are_folded(count: int) -> None:
    """400 photos of a few sessions: whole sessions are measured by what was trained on the others."""
    rows = clouds([200, 200], 3.0)
    groups = [i % count for i in range(400)]
    found = measured(rows, ("linear",), groups=groups, epochs=3)
    assert len(found.rows) == 400
    folds = min(count, 5) if count > 1 else 5
    assert f"({folds} folds)" in found.how and bool(found.note) == (count == 1)
    assert all(one.loss < 1 for one in found.tried)
    with pytest.raises(ValueError, match="groups are too few to be shared out"):
        measured(rows, ("linear",), groups=[0] * 400, test=0.2)


def test_names_that_are_empty_join_nothing() -> None:
    features, labels = clouds([3, 3], 0.0)
    groups, _, _ = join(Features(features, labels), ["", "", "a", "a", "", ""])
    assert len(set(groups)) == 5


def test_a_class_that_only_chooses() -> None:
    features, labels = clouds([30, 30, 10], 4.0)
    parts: list[Part | None] = ["train"] * 60 + ["valid"] * 10
    parts[50:60] = ["test"] * 10
    for kind in ("logistic", "ridge", "knn", "linear"):
        assert measured((features, labels), (kind,), parts=parts, epochs=2).trained.kind == kind


def test_thresholds_are_not_chosen_by_what_they_measure() -> None:
    """Labels that mean nothing: chosen on the measured rows, thresholds would find more than chance."""
    generator = torch.Generator().manual_seed(1)
    labels = (torch.rand(150, 5, generator=generator) < 0.3).float()
    rows = torch.randn(150, WIDTH, generator=generator), labels
    found = measured(rows, ("logistic",))
    assert found.thresholds is not None and found.thresholds.shape == (150, 5)
    names = [str(i) for i in range(5)]
    chosen = judge(found.scores, labels, names, found.thresholds).facts["macro_f1"]
    on_itself = judge(found.scores, labels, names, thresholds_of(found.scores, labels)).facts["macro_f1"]
    assert chosen < on_itself
