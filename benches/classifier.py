"""From photos to a measured classifier, and heads that are solved for on stored features, against scikit-learn."""

import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import loader_inputs
import numpy as np
import torch
from loader import THREADS
from loader_inputs import files
from measure import Comparison, Contender
from sklearn.linear_model import LogisticRegressionCV, RidgeClassifierCV
from sklearn.model_selection import GridSearchCV, PredefinedSplit, train_test_split
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import cnnrs
from cnnrs.classifier.logistic import PENALTIES
from cnnrs.classifier.neighbours import NUMBERS

BACKBONE = "efficientnet_lite0"
#: Width and classes of the features; networks give 512 to 2,048 numbers per photo.
SIZES = ((1280, 2), (1280, 37))
ROWS = 25_000
#: As its next versions do by default.
CHOICE: dict[str, Any] = {
    "scoring": "neg_log_loss", "max_iter": 1000, "l1_ratios": (0,), "use_legacy_attributes": False,
}  # fmt: skip


def comparisons() -> Iterator[Comparison]:
    """The whole job on 700 photos; each head on 25,000 rows."""
    if find_spec("efficientnet_lite_pytorch"):
        with tempfile.TemporaryDirectory() as scratch:
            yield whole_job(Path(scratch))
    for width, classes in SIZES:
        rows, labels = made_up(ROWS, width, classes)
        for head, theirs in (("logistic", logistic), ("ridge", ridge), ("knn", knn)):
            contenders = theirs(rows.numpy(), labels.numpy())
            contenders.append(Contender(f'cnnrs.probe(features, labels, "{head}")', ours(head, rows, labels)))
            yield Comparison(f"Head: {head}, {ROWS:,} rows of {width:,}, {classes} classes", "rows/s", contenders, 3)


def whole_job(scratch: Path) -> Comparison:
    """Photos to a measured classifier: torchvision, eager PyTorch and scikit-learn against ``cnnrs.train``."""
    folder, kind = loader_inputs.photos(scratch)
    made = cnnrs.backbone(BACKBONE)
    model = made.eval().to(memory_format=torch.channels_last)

    def theirs() -> int:
        photos = ImageFolder(str(folder), made.transform)
        with torch.no_grad():
            batches = [
                model(images.to(memory_format=torch.channels_last))
                for images, _ in DataLoader(photos, 32, num_workers=THREADS)
            ]
        rows, rest, labels, others = train_test_split(
            torch.cat(batches).flatten(1).numpy(), photos.targets, test_size=0.15, stratify=photos.targets
        )
        head = make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=10, **CHOICE)).fit(rows, labels)
        print(f"{100 * np.mean(head.predict(rest) == others):.1f} % of {len(others)} photos")
        return len(photos)

    def cnnrs_train() -> int:
        with tempfile.TemporaryDirectory(dir=scratch) as out:
            run = cnnrs.train(
                folder, out=Path(out) / "run", features=Path(out) / "features", backbone=BACKBONE, verbose=False
            )
        print(run)
        return len(files(folder))

    contenders = [
        Contender("torchvision, 2 workers; eager, channels_last; scikit-learn, LogisticRegressionCV", theirs),
        Contender("cnnrs.train, with its report", cnnrs_train),
    ]
    return Comparison(f"Photos to a measured classifier: {kind}, {BACKBONE}", "img/s", contenders, 3)


def ours(head: str, rows: torch.Tensor, labels: torch.Tensor) -> Callable[[], int]:
    """Choosing by a fifth and solving for all rows."""

    def run() -> int:
        cnnrs.probe(rows, labels, head)
        return len(rows)

    return run


def searched(make: Callable[[PredefinedSplit], Any], rows: np.ndarray, labels: np.ndarray) -> Callable[[], int]:
    """The same choice by scikit-learn: one fifth held out, then all rows."""
    fold = np.where(np.arange(len(rows)) % 5 == 0, 0, -1)

    def run() -> int:
        make(PredefinedSplit(fold)).fit(rows, labels)
        return len(rows)

    return run


def logistic(rows: np.ndarray, labels: np.ndarray) -> list[Contender]:
    """Its own path over the same penalties, each from the last one's weights on."""
    strengths = [1 / (penalty * len(rows)) for penalty in PENALTIES]
    rows = (rows - rows.mean(axis=0)) / np.sqrt(rows.var(axis=0).sum())

    def make(split: PredefinedSplit) -> Any:
        return LogisticRegressionCV(Cs=strengths, cv=split, **CHOICE)

    return [Contender("scikit-learn, LogisticRegressionCV, the same penalties", searched(make, rows, labels))]


def ridge(rows: np.ndarray, labels: np.ndarray) -> list[Contender]:
    """Leave-one-out in closed form over the same penalties."""
    strengths = [penalty * len(rows) * float(rows.var(axis=0).sum()) for penalty in PENALTIES]

    def run() -> int:
        RidgeClassifierCV(strengths).fit(rows, labels)
        return len(rows)

    return [Contender("scikit-learn, RidgeClassifierCV, the same penalties", run)]


def knn(rows: np.ndarray, labels: np.ndarray) -> list[Contender]:
    """The same numbers of neighbours by cosine."""

    def make(split: PredefinedSplit) -> Any:
        return GridSearchCV(KNeighborsClassifier(metric="cosine"), {"n_neighbors": list(NUMBERS)}, cv=split)

    return [Contender("scikit-learn, GridSearchCV(KNeighborsClassifier)", searched(make, rows, labels))]


def made_up(rows: int, width: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows like those of a network: not negative, of few strong directions and many weak ones; 5 % wrong labels."""
    generator = torch.Generator().manual_seed(seed)
    hidden = 256
    labels = torch.arange(rows) % classes
    strength = torch.arange(1, hidden + 1) ** -0.7
    centres = torch.randn(classes, hidden, generator=generator)
    inside = (0.6 * centres[labels] + torch.randn(rows, hidden, generator=generator)) * strength
    mixing = torch.randn(hidden, width, generator=generator)
    out = torch.empty(rows, width)
    for start in range(0, rows, 1000):
        part = inside[start : start + 1000] @ mixing
        part += 0.3 * torch.randn(part.shape, generator=generator)
        out[start : start + 1000] = part.relu_()
    wrong = torch.rand(rows, generator=generator) < 0.05
    return out, torch.where(wrong, torch.randint(classes, (rows,), generator=generator), labels)
