"""Early stopping and best checkpoints around the four-argument call."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cnnrs
import tutorial


def test_patience_counts_epochs_without_an_improvement() -> None:
    stop = cnnrs.EarlyStopping(patience=2, min_delta=0.1)
    assert [stop(f) for f in (1.0, 0.95, 0.85, math.nan, 0.8)] == [False, False, False, False, True]
    assert (stop.best, stop.waited) == (0.85, 2)
    again = cnnrs.EarlyStopping(patience=2, min_delta=0.1)
    again.load_state_dict(stop.state_dict())
    assert not again(0.5) and again.best == 0.5
    accuracy = cnnrs.EarlyStopping(patience=1, mode="max")
    assert [accuracy(f) for f in (50.0, 60.0, 60.0)] == [False, False, True]


@pytest.mark.parametrize("options", [{"patience": 0}, {"min_delta": -1.0}, {"mode": "best"}])
def test_stopping_refuses_nonsense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got"):
        cnnrs.EarlyStopping(**options)


def test_the_best_weights_come_back_and_training_goes_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    sgd = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    # Labels without a rule: the better it knows the first batch, the worse it does on the second.
    data, unseen = ([(torch.randn(8, 4), torch.randint(3, (8,)))] for _ in range(2))
    fit = cnnrs.compile(optimizer=sgd, loss_fn=F.cross_entropy, verbose=False)
    best = cnnrs.BestCheckpoint(tmp_path / "runs" / "best.pt", model, sgd)
    stop = cnnrs.EarlyStopping(patience=3)
    kept: list[Any] = []
    losses = []
    for epoch in range(60):
        fit(epoch, model, data, "training")
        loss, _ = fit(epoch, model, unseen, "validation")
        losses.append(loss)
        if best(loss, epoch):
            kept = [copy.deepcopy(model.state_dict()), copy.deepcopy(sgd.state_dict())]
        if stop(loss):
            break
    assert len(losses) < 60
    assert best.best == stop.best == min(losses)
    assert not tutorial.same(model.state_dict(), kept[0])
    assert best.restore() == losses.index(min(losses)) == best.epoch
    assert tutorial.same(model.state_dict(), kept[0])
    assert tutorial.same(sgd.state_dict(), kept[1])
    assert fit(0, model, unseen, "validation")[0] == min(losses)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["best.pt"]


def test_a_file_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    best = cnnrs.BestCheckpoint(tmp_path / "best.pt", model, mode="max")
    assert best(50.0, 0)
    before = (tmp_path / "best.pt").read_bytes()

    def full(content: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        best(60.0, 1)
    assert (tmp_path / "best.pt").read_bytes() == before and best.best == 50.0
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]
    assert not best(math.nan, 2)


def test_nothing_to_restore(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        cnnrs.BestCheckpoint(tmp_path / "none.pt", nn.Linear(1, 1)).restore()
