"""Metrics, pictures and progress bars: what people look at while and after a model is trained."""

import builtins
import fcntl
import io
import math
import os
import re
import struct
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import cnnrs
from cnnrs._util import plots
from cnnrs._util.progress import Step, beside, progress, steps
from cnnrs.training import metrics

# -- metrics -----------------------------------------------------------------------------------------------------------


def test_confusion_is_scikit_learns() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(5, (300,), generator=generator)
    scores = torch.randn(300, 5, generator=generator)
    found = cnnrs.confusion(targets, scores)
    taken = scores.argmax(dim=1)
    assert np.array_equal(found.matrix.numpy(), sklearn.confusion_matrix(targets, taken))
    precision, recall, _, support = sklearn.precision_recall_fscore_support(targets, taken)
    assert found.precision == pytest.approx(100 * precision) and found.recall == pytest.approx(100 * recall)
    assert found.support == support.tolist()
    assert found.accuracy == pytest.approx(100 * sklearn.accuracy_score(targets, taken))


def test_confusion_of_classes_that_never_occur() -> None:
    found = cnnrs.confusion([0, 0], [0, 1], ["cat", "dog", "fox"])
    assert found.recall[0] == 50 and all(math.isnan(value) for value in (*found.recall[1:], found.precision[2]))
    assert found.most_confused() == [("cat", "dog", 1)]
    assert math.isnan(cnnrs.confusion([], [], ["cat"]).accuracy)


@pytest.mark.parametrize(
    ("targets", "predictions", "classes", "reason"),
    [
        ([0, 1], [0], None, "2 targets and 1 predictions"),
        ([0, 2], [0, 1], ["cat", "dog"], r"must be in 0..1 for 2 classes, got up to 2"),
        ([0, -1], [0, 1], ["cat", "dog"], "class numbers must be in"),
    ],
)
def test_confusion_refuses(targets: Any, predictions: Any, classes: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        cnnrs.confusion(targets, predictions, classes)


def test_top_losses_are_cross_entropy() -> None:
    scores = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(40) % 3
    losses = torch.nn.functional.cross_entropy(scores, targets, reduction="none")
    worst = cnnrs.top_losses(scores, targets, k=5)
    assert [one.index for one in worst] == losses.argsort(descending=True)[:5].tolist()
    # The same float32 function of the same numbers.
    assert [one.loss for one in worst] == pytest.approx(losses.sort(descending=True).values[:5].tolist(), abs=1e-6)
    wrong = cnnrs.top_losses(scores, targets, k=100, wrong_only=True)
    assert len(wrong) == int((scores.argmax(dim=1) != targets).sum())
    with pytest.raises(ValueError, match="40 scores, 39 targets"):
        cnnrs.top_losses(scores, targets[:39])


def test_calibration() -> None:
    probabilities = torch.tensor([[0.95, 0.05]] * 20 + [[0.55, 0.45]] * 20)
    targets = torch.tensor([0] * 19 + [1] + [0] * 10 + [1] * 10)
    found = metrics.calibration(probabilities, targets)
    assert [(b.count, b.accuracy) for b in found.bins] == [(20, 0.5), (20, 0.95)]
    # Half of the samples are 5 points too sure, the others not at all.
    assert found.error == pytest.approx(2.5, abs=1e-4)


# -- pictures ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def loader(tmp_path: Path) -> cnnrs.DataLoader:
    for name, level in (("dark", 40), ("light", 220)):
        (tmp_path / name).mkdir()
        for i in range(3):
            Image.new("RGB", (20, 16), (level, 100, 10 * i)).save(tmp_path / name / f"{i}.png")
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])])
    return cnnrs.DataLoader(cnnrs.ImageFolder(tmp_path, transform), batch_size=4)


def test_show_undoes_the_normalisation(loader: cnnrs.DataLoader, tmp_path: Path) -> None:
    figure = loader.show(path=tmp_path / "batch.png")
    assert [axes.get_title() for axes in figure.axes] == ["dark", "dark", "dark", "light"]
    shown = figure.axes[3].images[0].get_array()
    # Normalising and back: two float32 roundings of values up to 4.
    assert np.abs(np.asarray(shown) - np.array([220, 100, 0]) / 255).max() < 1e-6
    assert (tmp_path / "batch.png").read_bytes().startswith(b"\x89PNG")


def test_show_of_a_part(loader: cnnrs.DataLoader, tmp_path: Path) -> None:
    part = cnnrs.DataLoader(torch.utils.data.Subset(loader.dataset, [5, 0]), batch_size=2)
    figure = part.show(1, tmp_path / "part.png")
    assert [axes.get_title() for axes in figure.axes] == ["light"]


def test_show_needs_images(tmp_path: Path) -> None:
    rows = cnnrs.DataLoader(cnnrs.FeatureDataset(torch.zeros(4, 7), torch.zeros(4)), batch_size=2)
    with pytest.raises(TypeError, match=r"this loader yields \(2, 7\)"):
        rows.show(path=tmp_path / "none.png")
    with pytest.raises(ValueError, match="yields no batch"):
        plots.show_batch([], path=tmp_path / "none.png")


def test_features_plot_separates_classes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    rows = torch.randn(60, 30, generator=generator)
    rows[:, 0] += 20 * labels
    before = torch.get_rng_state()
    figure = cnnrs.Features(rows, labels, classes=["a", "b"]).plot(tmp_path / "features.svg")
    assert torch.equal(torch.get_rng_state(), before)
    first, second = (collection.get_offsets()[:, 0] for collection in figure.axes[0].collections)
    assert first.max() < second.min() or second.max() < first.min()
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["a", "b"]
    with pytest.raises(ValueError, match="at least three rows"):
        plots.plot_features(rows[:2], labels[:2])


def test_many_long_and_chinese_names(tmp_path: Path) -> None:
    names = ["猫", "a name that is much longer than a picture is wide", *(f"class {i}" for i in range(10))]
    labels = torch.arange(36) % 12
    figure = cnnrs.Features(torch.rand(36, 5), labels, classes=names).plot(tmp_path / "features.png")
    (legend,) = figure.legends
    figure.draw_without_rendering()
    # Beside the points, not on them.
    assert legend.get_window_extent().x0 > figure.axes[0].get_window_extent().x1
    assert len({tuple(points.get_facecolor()[0]) for points in figure.axes[0].collections}) == 12
    figure = cnnrs.confusion(labels, labels, names).plot(tmp_path / "matrix.png")
    shown = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert shown[0] == "猫" and shown[1].startswith("a name that is") and len(shown[1]) < 30

    table = str(cnnrs.confusion(labels, labels, names)).splitlines()
    assert max(map(len, table)) <= 130 and table[1].split() == [str(i) for i in range(12)]
    small = str(cnnrs.confusion([0, 1], [0, 1], ["猫", "dog"])).splitlines()
    assert small[1:] == ["        猫   dog", "猫       1     0", "dog      0     1"]


def test_confusion_and_top_losses_plot(loader: cnnrs.DataLoader, tmp_path: Path) -> None:
    paths = [path for path, _ in loader.dataset.samples]
    scores = torch.eye(2)[[0, 0, 1, 1, 1, 0]] * 5
    found = cnnrs.confusion(loader.dataset.targets, scores, loader.dataset.classes)
    assert {text.get_text() for text in found.plot(tmp_path / "matrix.png").axes[0].texts} == {"2", "1"}
    worst = cnnrs.top_losses(scores, loader.dataset.targets, paths, loader.dataset.classes, k=2)
    titles = [axes.get_title() for axes in worst.plot(tmp_path / "worst.png").axes]
    assert titles == ["dark\nlight? 99 %", "light\ndark? 99 %"]
    with pytest.raises(ValueError, match="the files are not known"):
        cnnrs.top_losses(scores, loader.dataset.targets).plot()


def test_pictures_without_matplotlib(loader: cnnrs.DataLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    features = cnnrs.Features(torch.rand(4, 3), torch.arange(4))
    for draw in (loader.show, features.plot, cnnrs.confusion([0], [0]).plot):
        with pytest.raises(ImportError, match=r"pip install cnnrs\[plots\]"):
            draw()


# -- progress ----------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def slow_batches(count: int, seconds: float) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for _ in range(count):
        time.sleep(seconds)
        yield torch.zeros(4, 2), torch.zeros(4)


@pytest.mark.parametrize(("reading", "computing", "bottleneck"), [(0.02, 0.0, "reading"), (0.0, 0.02, "model")])
def test_bottleneck(reading: float, computing: float, bottleneck: str) -> None:
    with steps() as found:
        for _ in progress(slow_batches(5, reading), "features", verbose=False):
            time.sleep(computing)
    (step,) = found
    assert (step.name, step.samples, step.bottleneck) == ("features", 20, bottleneck)
    assert step.seconds >= 0.1
    limit = {"reading": "reading", "model": "the network"}[bottleneck]
    assert re.fullmatch(rf"\d+ images/s, limited by {limit} \(\d+ % of the time\)", str(step))


def test_bar_says_what_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    # It says so once half a second is over.
    for _ in progress(slow_batches(6, 0.15), "features"):
        pass
    assert re.search(r"features [456] batches, 2\d images/s, limited by reading", terminal.getvalue())


def on_terminal(columns: int, monkeypatch: pytest.MonkeyPatch, work: Callable[[], None]) -> list[str]:
    """What a terminal of this width showed, one after the other."""
    keyboard, screen = os.openpty()
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(screen, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        work()
        stream.flush()
        printed = os.read(keyboard, 1 << 16).decode()
    os.close(keyboard)
    return [line.strip() for line in re.split(r"[\r\n]", printed) if line.strip()]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (100, "features |BAR| 16/20, RATE images/s, 1 s left, limited by reading"),
        (80, "features |BAR| 16/20, RATE images/s, 1 s left, limited by reading"),
        (40, "features |BAR| 16/20, RATE images/s"),
        (24, "features |BAR| 16/20"),
    ],
)
def test_bar_fits_the_terminal(columns: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rate, and whole words only."""
    pattern = re.escape(expected).replace("BAR", "[█▏▎▍▌▋▊▉]+ *").replace("RATE", r"\d+")

    def read() -> None:
        for _ in progress(slow_batches(5, 0.2), "features", samples=20):
            pass

    lines = on_terminal(columns, monkeypatch, read)
    assert all(len(line) <= columns and line.count("/s") <= 1 for line in lines)
    assert any(re.fullmatch(pattern, line) for line in lines), lines


@pytest.mark.parametrize("columns", range(10, 140))
def test_words_beside_a_bar(columns: int) -> None:
    step = Step("training epoch 12", samples=3200, waiting=1.0, working=20.0)
    words = beside(step, 100, 782, columns)
    whole = ["152 images/s", "2 min left", "limited by the network"]
    assert words in [", ".join(whole[:count]) for count in range(4)]
    assert len(f"training epoch 12 |______| 100/782, {words}") <= columns or not words
    assert beside(step, 0, 782, columns) == ""
    assert "images" not in beside(step, 100, 782, columns, counts_images=False)


def test_bar_of_features_counts_images(monkeypatch: pytest.MonkeyPatch, loader: cnnrs.DataLoader) -> None:
    """How many of how many, and the time that is left."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    class Slow(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            # What depends on data cannot be traced: it is really called.
            if x.sum() == x.sum():
                time.sleep(0.15)
            return x.mean((2, 3))

    cnnrs.preconv(cnnrs.DataLoader(loader.dataset, batch_size=1), Slow())
    assert re.search(r"[1-5]/6, \d\.\d images/s, \d s left", terminal.getvalue())


def test_pipes_and_verbose_false_are_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream, verbose in ((io.StringIO(), True), (Terminal(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert len(list(progress(slow_batches(3, 0), "features", verbose=verbose))) == 3
        assert stream.getvalue() == ""


def test_consumer_that_stops_closes_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    items = progress(slow_batches(3, 0), "features")
    next(items)
    items.close()  # type: ignore[attr-defined]
    assert terminal.getvalue().endswith("\r")
