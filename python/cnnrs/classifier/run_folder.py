"""A trained classifier in a folder: weights, classes and preprocessing, without pickle."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from cnnrs._util.json import dumps
from cnnrs.classifier.card import CARD, FORMAT, HISTORY, KEYS, MODEL, PARTIAL, REPORT, read_card
from cnnrs.classifier.heads import Preprocessing, cut
from cnnrs.classifier.recipe import recipe
from cnnrs.data.folder import ImageList
from cnnrs.data.loader import DataLoader
from cnnrs.errors import DecodeError
from cnnrs.features.preconv import preconv
from cnnrs.model.weights import find
from cnnrs.training.history import History

if TYPE_CHECKING:
    from torchvision import transforms


@dataclass(frozen=True)
class Prediction:
    """What a classifier says about one file.

    Attributes:
        path: the file.
        classes: names, most probable first.
        probabilities: theirs, 0 to 1.
    """

    path: str
    classes: list[str]
    probabilities: list[float]

    @property
    def label(self) -> str:
        """The most probable class."""
        return self.classes[0]

    @property
    def probability(self) -> float:
        """Its probability, 0 to 1."""
        return self.probabilities[0]


@dataclass
class Run:
    """A trained classifier, as ``cnnrs train`` leaves it in a folder.

    Attributes:
        model: the whole network in eval mode, (N, 3, H, W) float32 photos to (N, C) scores.
        classes: C names.
        preprocessing: what happens to a photo before the network.
        backbone: name of the network.
        head: "linear", "mlp" or "classifier".
        dropout: probability inside the head.
        facts: what else ``model.json`` says: where data and weights came from, accuracy, versions.
        options: what torchvision's builder needs beside the network's name.
    """

    model: nn.Module
    classes: list[str]
    preprocessing: Preprocessing
    backbone: str
    head: str = "linear"
    dropout: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def transform(self) -> transforms.Compose:
        """The preprocessing as torchvision's objects."""
        return self.preprocessing.transform()

    def predict(
        self,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        *,
        top_k: int = 1,
        batch_size: int = 32,
        num_workers: int | None = None,
        verbose: bool = True,
    ) -> tuple[list[Prediction], list[tuple[str, str]]]:
        """Classify photos.

        Args:
            paths: image files, or one.
            top_k: how many classes are kept per file.
            batch_size: photos at a time.
            num_workers: threads that read photos; None: all cores.
            verbose: whether a bar is shown, on a terminal or in a notebook.

        Returns:
            Predictions in the order of ``paths``, and (path, reason) of files that could not be read.

        Raises:
            TypeError: a path is something else, an image for example.
        """
        files = _files(paths)
        if not files:
            return [], []
        loader = DataLoader(
            ImageList(files, self.transform), batch_size=batch_size, num_workers=num_workers, on_error="skip"
        )
        try:
            scores = preconv(loader, self.model, verbose=verbose).features
        except (DecodeError, OSError, ValueError):
            if len({path for path, _ in loader.errors}) < len(set(files)):
                raise
            return [], _in_order(files, loader.errors)
        failed = {path for path, _ in loader.errors}
        good = [path for path in files if path not in failed]
        probabilities, order = scores.float().softmax(dim=1).sort(dim=1, descending=True)
        k = min(top_k, len(self.classes))
        return [
            Prediction(path, [self.classes[i] for i in classes], values)
            for path, classes, values in zip(good, order[:, :k].tolist(), probabilities[:, :k].tolist(), strict=True)
        ], _in_order(files, loader.errors)

    def recipe(self) -> str:
        """Python that opens the classifier, with cnnrs and without."""
        return recipe(self.backbone, self.head, {"num_classes": len(self.classes), **self.options}, self.preprocessing)

    def save(self, folder: str | os.PathLike[str], history: History | None = None) -> None:
        """Write ``model.safetensors``, ``model.json`` and ``history.csv``; a run that is there is replaced.

        The weights have the network's own key names: they load into torchvision's model with as many classes.
        """
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        card = {
            "format": FORMAT, "backbone": self.backbone, "head": self.head, "dropout": self.dropout,
            "classes": self.classes, "transform": asdict(self.preprocessing),
            **({"options": self.options} if self.options else {}), **self.facts,
        }  # fmt: skip
        names = [MODEL, CARD] if history is None else [MODEL, HISTORY, CARD]
        partial = {name: place / f"{name}{PARTIAL}" for name in names}
        try:
            self._write_weights(partial[MODEL], place / MODEL)
            if history is not None:
                _write_history(history, partial[HISTORY])
            partial[CARD].write_bytes(f"{dumps(card)}\n".encode())
            # safetensors makes files that only their owner can read.
            shutil.copymode(partial[CARD], partial[MODEL])
            for path in partial.values():
                _flush(path)
        except BaseException:
            for path in partial.values():
                path.unlink(missing_ok=True)
            raise
        # The card goes first and comes back last: a folder is a run only while all of it belongs together.
        for name in (CARD, REPORT, HISTORY):
            (place / name).unlink(missing_ok=True)
        for name in names:
            os.replace(partial[name], place / name)

    def _write_weights(self, path: Path, shown: Path) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.model.state_dict().items()}
        try:
            save_file(state, path, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{shown} cannot be written: {error}") from error


def load_run(folder: str | os.PathLike[str]) -> Run:
    """Open what ``cnnrs train --out folder`` wrote.

    Args:
        folder: holds ``model.safetensors`` and ``model.json``.

    Returns:
        The classifier, on the CPU, in eval mode.

    Raises:
        FileNotFoundError: the folder is no run.
        ValueError: it was written in another format, or its files contradict each other.

    Example:
        >>> run = load_run("runs/pets")  # doctest: +SKIP
        >>> predictions, unreadable = run.predict(["holiday/1.jpg"])  # doctest: +SKIP
    """
    place = Path(folder)
    card = read_card(place)
    if not (place / MODEL).is_file():
        raise FileNotFoundError(f"{place / MODEL} is gone, only {CARD} is there; train again")
    try:
        found = find(card["backbone"], None, card.get("options"))
        model = cut(found, card["head"], len(card["classes"]), card["dropout"]).join()
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place / CARD}: {error}") from error
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(place / MODEL))
    except (RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
        raise ValueError(
            f"{place / MODEL} does not hold the {card['backbone']} of {CARD}: {reason}; train again"
        ) from error
    shaped: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in card["transform"].items()}
    preprocessing = Preprocessing(**shaped)
    facts = {name: value for name, value in card.items() if name not in (*KEYS, "options")}
    return Run(
        model.eval(), card["classes"], preprocessing, card["backbone"], card["head"], card["dropout"], facts,
        dict(found.options),
    )  # fmt: skip


def _files(paths: Any) -> list[str]:
    given = [paths] if isinstance(paths, (str, bytes, os.PathLike)) or not isinstance(paths, Iterable) else list(paths)
    for path in given:
        if not isinstance(path, (str, bytes, os.PathLike)):
            raise TypeError(
                f"paths of image files are wanted, got a {type(path).__name__}; for an image in memory: "
                "run.model(run.transform(image)[None]).softmax(dim=1)"
            )
    return [os.fsdecode(path) for path in given]


def _flush(path: Path) -> None:
    # Windows flushes only what may be written.
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_history(history: History, path: Path) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "train_loss", "train_accuracy", "valid_loss", "valid_accuracy"])
        columns = (history.train_losses, history.train_accuracy, history.val_losses, history.val_accuracy)
        for epoch, row in enumerate(zip(*columns, strict=True), 1):
            writer.writerow([epoch, *(f"{value:.6g}" for value in row)])


def _in_order(files: Sequence[str], errors: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    reasons = dict(errors)
    return [(path, reasons[path]) for path in dict.fromkeys(files) if path in reasons]
