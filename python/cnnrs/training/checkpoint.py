"""Stop when validation no longer improves, and keep the best weights: two helpers around the four-argument ``fit``."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

Mode = Literal["min", "max"]


class EarlyStopping:
    """Says when a figure has not improved for some epochs.

    Args:
        patience: epochs without an improvement after which it says stop.
        min_delta: how much better than the best so far counts as an improvement.
        mode: "min" for losses, "max" for accuracies.

    Attributes:
        best: the best figure so far; infinite before the first.
        waited: epochs since then.

    Raises:
        ValueError: a patience below 1, a negative ``min_delta`` or an unknown mode.

    >>> stop = EarlyStopping(patience=2)
    >>> [stop(loss) for loss in (1.0, 0.8, 0.9, 0.8)]
    [False, False, False, True]
    """

    def __init__(self, patience: int = 5, min_delta: float = 0.0, mode: Mode = "min") -> None:
        if patience < 1 or min_delta < 0:
            raise ValueError(f"patience must be at least 1 and min_delta not negative, got {patience} and {min_delta}")
        self.patience = patience
        self.min_delta = min_delta
        self.mode = _checked(mode)
        self.best = math.inf if mode == "min" else -math.inf
        self.waited = 0

    def __call__(self, figure: float) -> bool:
        """Takes the epoch's figure, a loss or an accuracy; returns whether to stop. NaN is no improvement."""
        if _better(figure, self.best, self.min_delta, self.mode):
            self.best = float(figure)
            self.waited = 0
        else:
            self.waited += 1
        return self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on with."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a ``state_dict``."""
        self.best, self.waited = state["best"], state["waited"]


class BestCheckpoint:
    """Writes model (and optimizer) to a file whenever a figure is the best so far; the file is whole at any time.

    Args:
        path: of the file: a ``torch.save`` of {"model", "optimizer", "figure", "epoch"} that ``torch.load`` reads with
            ``weights_only=True``. A file that is there already counts as the best so far only after :meth:`restore`.
        model: the module whose weights are kept.
        optimizer: kept beside it, to go on training; None: the weights alone.
        mode: "min" for losses, "max" for accuracies.

    Attributes:
        best: the best figure so far; infinite before the first.
        epoch: the epoch it came from, None before the first.

    Raises:
        ValueError: an unknown mode.
        OSError: the file cannot be written; the one before stays.

    >>> import tempfile
    >>> model = torch.nn.Linear(2, 2)
    >>> best = BestCheckpoint(Path(tempfile.mkdtemp()) / "best.pt", model)
    >>> [best(loss, epoch) for epoch, loss in enumerate((0.7, 0.5, 0.6))]
    [True, True, False]
    >>> best.restore()
    1
    """

    def __init__(
        self, path: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer | None = None, mode: Mode = "min"
    ) -> None:
        self.path = Path(path)
        self.model = model
        self.optimizer = optimizer
        self.mode = _checked(mode)
        self.best = math.inf if mode == "min" else -math.inf
        self.epoch: int | None = None

    def __call__(self, figure: float, epoch: int) -> bool:
        """Takes the epoch's figure; writes the file and returns True if it is the best. NaN never is."""
        if not _better(figure, self.best, 0.0, self.mode):
            return False
        optimizer = self.optimizer.state_dict() if self.optimizer is not None else None
        figure = float(figure)
        _save({"model": self.model.state_dict(), "optimizer": optimizer, "figure": figure, "epoch": epoch}, self.path)
        self.best, self.epoch = figure, epoch
        return True

    def restore(self) -> int:
        """Loads the file into the model (and the optimizer, if both were given one); returns the epoch it came from.

        Raises:
            FileNotFoundError: nothing has been written yet.
        """
        found: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(found["model"])
        if self.optimizer is not None and found["optimizer"] is not None:
            self.optimizer.load_state_dict(found["optimizer"])
        self.best, self.epoch = float(found["figure"]), int(found["epoch"])
        return self.epoch


def _checked(mode: Mode) -> Mode:
    if mode not in ("min", "max"):
        raise ValueError(f"mode must be 'min' or 'max', got {mode!r}")
    return mode


def _better(figure: float, best: float, by: float, mode: Mode) -> bool:
    return bool(figure < best - by if mode == "min" else figure > best + by)


def _save(content: dict[str, Any], path: Path) -> None:
    """Write beside the file and rename: who reads sees the old file or the new one, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's files are private; a checkpoint gets the mode of any new file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
