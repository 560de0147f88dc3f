"""What a report shows: filled by those who train and measure, drawn by the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cnnrs.training.history import History
from cnnrs.training.several import SeveralLabels

if TYPE_CHECKING:
    from cnnrs.classifier.suspects import Suspect

Interval = tuple[float, float]


@dataclass(frozen=True)
class ClassRow:
    """One class in numbers.

    Attributes:
        name: of the class.
        photos: how many of the measured photos are of it.
        recall: of these, percent that were found; NaN without any.
        precision: of the photos that were given this class, percent that are of it; NaN without any.
        recall_interval: 95 % interval in percent, None where unknown.
        precision_interval: the same of the precision.
    """

    name: str
    photos: int
    recall: float
    precision: float
    recall_interval: Interval | None = None
    precision_interval: Interval | None = None


@dataclass(frozen=True)
class HeadRow:
    """A head that was tried.

    Attributes:
        name: "logistic", "knn", "mlp" and the like, with what was chosen inside it ("logistic, penalty 0.01").
        loss: mean cross entropy per validation photo.
        accuracy: percent of the validation photos that are right.
        seconds: training took.
        chosen: whether the run uses it.
    """

    name: str
    loss: float
    accuracy: float
    seconds: float
    chosen: bool = False


@dataclass(frozen=True)
class Curve:
    """One class against the others over all thresholds: ROC, or precision over recall.

    Attributes:
        name: of the class.
        x: false positive rate, or recall; 0 to 1.
        y: true positive rate, or precision; 0 to 1, as many.
        area: under the ROC curve, or average precision; 0 to 1.
        at: the point (x, y) of the threshold that is used, where the class is the most probable one; None: not known.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    area: float
    at: tuple[float, float] | None = None


@dataclass(frozen=True)
class Neighbour:
    """A training photo that looks like another photo to the network.

    Attributes:
        path: the training photo.
        label: name of its class.
        similarity: cosine of the two rows of features, -1 to 1.
    """

    path: str
    label: str
    similarity: float


@dataclass(frozen=True)
class Twins:
    """Two photos that are nearly the same.

    Attributes:
        paths: both.
        labels: names of their classes.
        similarity: cosine of their features, -1 to 1.
        parts: the parts of the data they would have been in, "train" and "test" for example; None where not parted.
    """

    paths: tuple[str, str]
    labels: tuple[str, str]
    similarity: float
    parts: tuple[str, str] | None = None


@dataclass(frozen=True)
class Unknown:
    """From when on a photo is called strange.

    Attributes:
        threshold: novelty above which it is.
        share: of the measured photos, percent that are above; NaN where not measured.
    """

    threshold: float
    share: float


@dataclass(frozen=True)
class Evidence:
    """Everything a report is made of beside the classifier itself. What is left out is not shown.

    Attributes:
        history: losses and accuracies of the epochs; empty for a head that is not trained in epochs.
        best: epoch whose weights were kept, counted from 0.
        scores: (N, C) float outputs before softmax for the photos that were measured.
        labels: (N,) int64 true class numbers; of several labels (N, C) 0/1.
        paths: N photos, None where unknown.
        classes: C names.
        measured: what was measured with, in words: "test photos", "validation photos", "photos, each by a classifier
            that had not seen it (5 folds)".
        untouched: whether nothing was chosen by the photos that were measured.
        parts: photos by part, in order: {"training": 400, "validation": 100, "test": 200}, or {"all": 200}; empty: as
            the facts say.
        roc: ROC curves, one per class, a single one for two classes.
        precision_recall: precision over recall, likewise.
        heads: all that were tried.
        why_stopped: a sentence: why training went on no longer.
        warnings: sentences about the data, most important first.
        suspects: photos whose label may be wrong, best candidates first.
        twins: pairs of photos that are nearly the same.
        neighbours: training photos that look like a measured photo, by its row in ``scores``.
        unknown: from when on a photo is called strange.
        skipped: (path, reason) of photos that were left out.
        several: the numbers of photos that may have several labels; None: classes exclude each other.
        read: how photos are read, as arguments of :class:`cnnrs.DataLoader`; ``write_report`` has it from the run.
    """

    history: History
    best: int
    scores: Tensor
    labels: Tensor
    paths: list[str] | None
    classes: list[str]
    measured: str = "validation photos"
    untouched: bool = False
    parts: Mapping[str, int] = field(default_factory=dict)
    roc: Sequence[Curve] = ()
    precision_recall: Sequence[Curve] = ()
    heads: Sequence[HeadRow] = ()
    why_stopped: str = ""
    warnings: Sequence[str] = ()
    suspects: Sequence[Suspect] = ()
    twins: Sequence[Twins] = ()
    neighbours: Mapping[int, Sequence[Neighbour]] = field(default_factory=dict)
    unknown: Unknown | None = None
    skipped: Sequence[tuple[str, str]] = ()
    several: SeveralLabels | None = None
    read: Mapping[str, Any] = field(default_factory=dict)
