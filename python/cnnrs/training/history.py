"""Losses and accuracies of the epochs so far, and the tutorial's two figures of them."""

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

    def __len__(self) -> int:
        return len(self.train_losses)

    def __repr__(self) -> str:
        if not len(self):
            return "History(no epochs)"
        text = f"train loss {self.train_losses[-1]:.3g} accuracy {self.train_accuracy[-1]:.2f} %"
        if not math.isnan(self.val_losses[-1]):
            text += f", valid loss {self.val_losses[-1]:.3g} accuracy {self.val_accuracy[-1]:.2f} %"
        return f"History({len(self)} epoch{'s' if len(self) > 1 else ''}, {text})"

    def plot(self, path: str | os.PathLike[str] | None = None) -> "Figure":
        """Draw losses and accuracies over the epochs, side by side.

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
        accuracies.plot(epochs, self.train_accuracy, "ro", label="train accuracy")
        if not all(map(math.isnan, self.val_losses)):
            losses.plot(epochs, self.val_losses, f"r{mark}", label="validation loss")
            accuracies.plot(epochs, self.val_accuracy, f"b{mark}", label="val accuracy")
        losses.set(xlabel="epoch", ylabel="loss per sample")
        accuracies.set(xlabel="epoch", ylabel="accuracy, %")
        for axes in (losses, accuracies):
            axes.set_xlim(0.5, max(len(self), 1) + 0.5)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.grid(alpha=0.3)
            axes.legend()
        return finish(figure, path)
