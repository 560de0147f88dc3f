"""The four lists and the two figures."""

import builtins
import csv
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from cnnrs.training.history import History


@pytest.fixture
def history() -> History:
    filled = History()
    for epoch in range(1, 6):
        filled.append(train=(1 / epoch, 60 + 6 * epoch), valid=(1.2 / epoch, 58 + 6 * epoch))
    return filled


def test_append_takes_what_fit_returns() -> None:
    history = History()
    # The tutorial's accuracy is a tensor of one element.
    history.append(train=(0.5, torch.tensor(87.5)), valid=(0.25, 90))
    assert history.train_losses == [0.5]
    assert history.train_accuracy == [87.5]
    assert history.val_losses == [0.25]
    assert history.val_accuracy == [90.0]
    assert all(type(v) is float for v in [*history.train_accuracy, *history.val_accuracy])


def test_epoch_without_validation_keeps_the_lists_aligned() -> None:
    history = History()
    history.append(train=(0.5, 80))
    history.append(train=(0.4, 85), valid=(0.45, 84))
    assert len(history) == len(history.val_losses) == 2
    assert math.isnan(history.val_losses[0]) and math.isnan(history.val_accuracy[0])
    assert repr(history) == "History(2 epochs, train loss 0.4 accuracy 85.00 %, valid loss 0.45 accuracy 84.00 %)"


def test_bad_epoch_changes_nothing(history: History) -> None:
    with pytest.raises((TypeError, ValueError)):
        history.append(train=(0.1, 99), valid=(0.1, "many"))  # type: ignore[arg-type]
    assert len(history) == len(history.train_accuracy) == len(history.val_losses) == len(history.val_accuracy) == 5


def test_plot_draws_the_tutorials_two_figures(history: History, tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    figure = history.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    losses, accuracies = figure.axes
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in losses.lines}
    assert drawn == {
        "training loss": ([1, 2, 3, 4, 5], history.train_losses),
        "validation loss": ([1, 2, 3, 4, 5], history.val_losses),
    }
    drawn = {line.get_label(): list(line.get_ydata()) for line in accuracies.lines}
    assert drawn == {"train accuracy": history.train_accuracy, "val accuracy": history.val_accuracy}
    # The same colours mean the same in both.
    looks = [[(line.get_color(), line.get_marker()) for line in axes.lines] for axes in (losses, accuracies)]
    assert looks[0] == looks[1] and looks[0][0] != looks[0][1]


def test_line_of_an_epoch(history: History) -> None:
    assert history.line(12) == "epoch  5/12: training loss 0.2000,  90.00 %; validation loss 0.2400,  88.00 %"
    assert len(history.line(100)) <= 80
    history.append(train=(0.25, 100))
    assert history.line() == "epoch 6: training loss 0.2500, 100.00 %"
    with pytest.raises(ValueError, match="no epoch yet"):
        History().line()


def test_plot_of_nothing(tmp_path: Path) -> None:
    History().plot(tmp_path / "empty.png")
    assert (tmp_path / "empty.png").stat().st_size > 0


def test_to_csv(history: History, tmp_path: Path) -> None:
    history.append(train=(0.5, 80))
    history.to_csv(tmp_path / "history.csv")
    with open(tmp_path / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["epoch", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy"]
    assert [row["epoch"] for row in rows] == list("123456")
    for name, values in (
        ("train_loss", history.train_losses), ("train_accuracy", history.train_accuracy),
        ("valid_loss", history.val_losses), ("valid_accuracy", history.val_accuracy),
    ):  # fmt: skip
        assert [float(row[name]) for row in rows] == pytest.approx(values, rel=1e-5, nan_ok=True)


def test_writing_a_file_opens_no_window(history: History, tmp_path: Path) -> None:
    from matplotlib import pyplot

    before = pyplot.get_fignums()
    history.plot(tmp_path / "curves.svg")
    assert pyplot.get_fignums() == before


def test_plot_without_matplotlib(history: History, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install cnnrs\[plots\]"):
        history.plot()


def test_pickles(history: History) -> None:
    assert pickle.loads(pickle.dumps(history)).val_accuracy == history.val_accuracy
