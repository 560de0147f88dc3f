"""Losses and accuracies of the epochs so far, and the tutorial's two figures of them."""

import csv
import math
import os
from typing import TYPE_CHECKING, SupportsFloat

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Epoch = tuple[SupportsFloat, SupportsFloat]


class History:
    """What `cnnrs.fit` returned, epoch by epoch, in four plain lists of floats with the tutorial's names.

    Attributes:
        train_losses: Mean training loss per sample, one entry per epoch.
        train_accuracy: Training accuracy in percent.
        val_losses: Mean validation loss per sample; NaN for an epoch without validation.
        val_accuracy: Validation accuracy in percent; NaN for an epoch without validation.

    Example:
        >>> history = History()
        >>> history.append(train=(0.9, 71.0), valid=(0.5, 84.5))
        >>> history.append(train=(0.4, 88.0), valid=(0.3, 91.5))
        >>> history.val_accuracy
        [84.5, 91.5]
        >>> history
        History(2 epochs, train loss 0.4 accuracy 88.00 %, valid loss 0.3 accuracy 91.50 %)
        >>> print(history.line(10))
        epoch  2/10: training loss 0.4000,  88.00 %; validation loss 0.3000,  91.50 %
    """

    def __init__(self) -> None:
        self.train_losses: list[float] = []
        self.train_accuracy: list[float] = []
        self.val_losses: list[float] = []
        self.val_accuracy: list[float] = []

    def append(self, *, train: Epoch, valid: Epoch | None = None) -> None:
        """Add one epoch; each argument is the ``(loss, accuracy)`` that `cnnrs.fit` returned for that phase.

        Args:
            train: Loss and accuracy (percent) of the training phase; numbers or tensors of one element.
            valid: The same of the validation phase, if there was one.
        """
        # All four are converted before the first is stored, so that the lists never differ in length.
        epoch = [float(value) for value in (*train, *(valid if valid is not None else (math.nan, math.nan)))]
        loss, accuracy, val_loss, val_accuracy = epoch
        self.train_losses.append(loss)
        self.train_accuracy.append(accuracy)
        self.val_losses.append(val_loss)
        self.val_accuracy.append(val_accuracy)

    def line(self, epochs: int | None = None) -> str:
        """The last epoch in one line, to be printed after each.

        Args:
            epochs: how many there will be; None: not said.

        Raises:
            ValueError: there is no epoch yet.
        """
        if not len(self):
            raise ValueError("there is no epoch yet: append one first")
        number = str(len(self)) if epochs is None else f"{len(self):{len(str(epochs))}}/{epochs}"
        text = f"training loss {self.train_losses[-1]:.4f}, {self.train_accuracy[-1]:6.2f} %"
        if not math.isnan(self.val_losses[-1]):
            text += f"; validation loss {self.val_losses[-1]:.4f}, {self.val_accuracy[-1]:6.2f} %"
        return f"epoch {number}: {text}"

    def __len__(self) -> int:
        return len(self.train_losses)

    def __repr__(self) -> str:
        if not len(self):
            return "History(no epochs)"
        text = f"train loss {self.train_losses[-1]:.3g} accuracy {self.train_accuracy[-1]:.2f} %"
        if not math.isnan(self.val_losses[-1]):
            text += f", valid loss {self.val_losses[-1]:.3g} accuracy {self.val_accuracy[-1]:.2f} %"
        return f"History({len(self)} epoch{'s' if len(self) > 1 else ''}, {text})"

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write a table with a line per epoch: epoch, train_loss, train_accuracy, valid_loss, valid_accuracy.

        Args:
            path: Where to write it; what is there is replaced.
        """
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["epoch", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy"])
            columns = (self.train_losses, self.train_accuracy, self.val_losses, self.val_accuracy)
            for epoch, row in enumerate(zip(*columns, strict=True), 1):
                writer.writerow([epoch, *(f"{value:.6g}" for value in row)])

    def plot(self, path: str | os.PathLike[str] | None = None) -> "Figure":
        """Draw losses and accuracies over the epochs, side by side: training in blue dots, validation in red.

        Args:
            path: Where to write the picture (the suffix says which format); None only draws, and a notebook shows it.

        Returns:
            The matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from cnnrs._util.plots import finish, new_figure

        figure = new_figure("History.plot", path, 10, 4)
        from matplotlib.ticker import MaxNLocator

        epochs = range(1, len(self) + 1)
        losses, accuracies = figure.subplots(1, 2)
        # A line of one point is not seen.
        mark = "" if len(self) > 1 else "s"
        losses.plot(epochs, self.train_losses, "bo", label="training loss")
        accuracies.plot(epochs, self.train_accuracy, "bo", label="train accuracy")
        if not all(map(math.isnan, self.val_losses)):
            losses.plot(epochs, self.val_losses, f"r{mark}", label="validation loss")
            accuracies.plot(epochs, self.val_accuracy, f"r{mark}", label="val accuracy")
        losses.set(xlabel="epoch", ylabel="loss per sample")
        accuracies.set(xlabel="epoch", ylabel="accuracy, %")
        for axes in (losses, accuracies):
            axes.set_xlim(0.5, max(len(self), 1) + 0.5)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.grid(alpha=0.3)
            axes.legend()
        return finish(figure, path)
